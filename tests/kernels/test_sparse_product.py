"""Products with packed weights: against dense arithmetic in double precision, at odd sizes, and at the end of memory."""

import ctypes
import mmap
import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from llvmlite.binding import get_host_cpu_features

from cospadi.kernels import sparse_product as kernels
from cospadi.kernels.sparse_product import dense_product, offsets, sparse_product, unpack
from cospadi.packing.matrix import Packed, pack

pytestmark = pytest.mark.slow  # kernels are compiled first

either = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(columns):
    """Mask, values and offsets of ``Sᵀ``, written out bit by bit."""
    support = (columns != 0).numpy()
    mask = np.packbits(support.reshape(-1), bitorder="little")
    starts = np.concatenate([[0], support.sum(1).cumsum()]).astype(np.int32)
    return torch.from_numpy(mask), columns[torch.from_numpy(support)], torch.from_numpy(starts)


def quantized(seed, d_out, atoms, density, form, group_size, dtype=torch.float16):
    """``Sᵀ`` in float32; mask, packed codes with their scales, and offsets; and ``S`` whole as a packed matrix."""
    columns = sparse(seed, d_out, atoms, density, torch.float32) * 40
    codes = columns.to(torch.float8_e4m3fn) if form == "float8" else columns.round().clamp(*LIMITS[form]).to(torch.int8)
    mask, _, starts = packed(codes.float())
    groups = -(-atoms // group_size)
    scales = (normal(seed + 1, d_out, groups).abs() + 0.1).to(dtype)
    listed = codes.view(torch.uint8)[codes.float() != 0].view(codes.dtype)
    full = codes.float() * scales.float().repeat_interleave(group_size, dim=1)[:, :atoms]
    whole = codes.view(torch.uint8).T.contiguous().view(codes.dtype)
    matrix = Packed(pack(whole, form), scales.T.contiguous(), form, group_size)
    return full, (mask, Packed(pack(listed, form), scales, form, group_size), starts), matrix


LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


def sparse(seed, d_out, atoms, density, dtype):
    chosen = torch.rand(d_out, atoms, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(chosen, normal(seed, d_out, atoms).to(dtype), 0)


def close(actual, inputs, weight):
    """Equal to ``inputs @ weight`` up to the rounding of the terms."""
    assert actual.dtype == torch.float32
    inputs, weight = inputs.double(), weight.double()
    assert ((actual.double() - inputs @ weight).abs() <= 1e-6 * (inputs.abs() @ weight.abs()) + 1e-37).all()


shapes = st.tuples(
    st.integers(1, 20),
    st.integers(1, 80) | st.integers(1, 40).map(lambda count: 16 * count),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.0]),
    st.integers(0, 10**6),
)


@either
@given(shape=shapes)
def test_agrees_with_dense_arithmetic(dtype, shape):
    rows, atoms, d_out, density, seed = shape
    columns, z, x = sparse(seed, d_out, atoms, density, dtype), normal(seed, rows, atoms), normal(seed, rows, d_out)
    mask, values, starts = packed(columns)
    assert torch.equal(offsets(mask, d_out, atoms), starts)
    assert torch.equal(unpack(mask, values, starts, atoms), columns.float())
    close(sparse_product(z, mask, values, starts), z, columns.T)
    close(dense_product(x, columns), x, columns)


forms = pytest.mark.parametrize("form", ["int8", "int4", "float8"])


@either
@forms
@given(shape=shapes, group_size=st.sampled_from([32, 64, 128]))
def test_codes_are_multiplied_with_their_scales(dtype, form, shape, group_size):
    rows, atoms, d_out, density, seed = shape
    columns, weight, matrix = quantized(seed, d_out, atoms, density, form, group_size, dtype)
    z = normal(seed, rows, atoms)
    assert torch.equal(unpack(*weight, atoms), columns)
    close(sparse_product(z, *weight), z, columns.T)
    close(dense_product(z, matrix), z, columns.T)


@forms
def test_neither_threads_nor_other_rows_change_a_row_of_codes(form, monkeypatch):
    columns, weight, matrix = quantized(0, 203, 77, 0.4, form, 32)
    z = normal(1, 15, 77)
    calls = [lambda rows: sparse_product(rows, *weight), lambda rows: dense_product(rows, matrix)]
    whole = [call(z) for call in calls]
    close(whole[0], z, columns.T)
    monkeypatch.setattr(kernels, "WORTH", 1)
    for threads in (2, 3, 64):
        monkeypatch.setattr(kernels.torch, "get_num_threads", lambda threads=threads: threads)
        assert all(torch.equal(call(z), expected) for call, expected in zip(calls, whole, strict=True))
        assert torch.equal(unpack(*weight, 77), columns)
    for row in (0, 8, 14):
        assert all(
            torch.equal(call(z[row : row + 1])[0], expected[row]) for call, expected in zip(calls, whole, strict=True)
        )


@either
def test_empty_and_full_columns(dtype):
    columns = normal(0, 6, 100).to(dtype)
    columns[[0, 3, 5]] = 0
    z = normal(1, 3, 100)
    mask, values, starts = packed(columns)
    assert torch.equal(offsets(mask, 6, 100), starts)
    close(sparse_product(z, mask, values, starts), z, columns.T)
    assert torch.equal(unpack(mask, values, starts, 100), columns.float())


@either
def test_no_rows_and_no_values(dtype):
    mask, values, starts = packed(torch.zeros(5, 7, dtype=dtype))
    assert torch.equal(sparse_product(normal(0, 2, 7), mask, values, starts), torch.zeros(2, 5))
    assert sparse_product(normal(0, 0, 7), mask, values, starts).shape == (0, 5)
    assert dense_product(normal(0, 0, 5), torch.zeros(5, 7, dtype=dtype)).shape == (0, 7)


@either
def test_every_finite_16_bit_number_is_widened_exactly(dtype):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers != 0)]  # subnormals, the largest, both signs
    columns = numbers[: len(numbers) - len(numbers) % 90].view(-1, 90)
    mask, values, starts = packed(columns)
    assert torch.equal(unpack(mask, values, starts, 90), columns.float())
    one = torch.zeros(1, 90)
    one[0, 77] = 1
    assert torch.equal(sparse_product(one, mask, values, starts)[0], columns[:, 77].float())
    assert torch.equal(dense_product(one, columns[:90])[0], columns[77].float())


@either
def test_what_is_infinite_stays_in_its_column(dtype):
    columns = sparse(0, 9, 43, 0.5, dtype)
    columns[4, columns[4].nonzero()[0]] = torch.inf
    z = normal(0, 3, 43)
    assert (sparse_product(z, *packed(columns)).isfinite() == torch.tensor([j != 4 for j in range(9)])).all()
    assert (dense_product(z, columns.T.contiguous()).isfinite() == torch.tensor([j != 4 for j in range(9)])).all()


@either
def test_neither_threads_nor_other_rows_change_a_row(dtype, monkeypatch):
    columns, z = sparse(0, 203, 77, 0.4, dtype), normal(1, 15, 77)
    mask, values, starts = packed(columns)
    calls = [
        lambda rows: sparse_product(rows, mask, values, starts),
        lambda rows: dense_product(rows, columns.T.contiguous()),
        lambda rows: unpack(mask, values, starts, 77),
    ]
    whole = [call(z) for call in calls]
    monkeypatch.setattr(kernels, "WORTH", 1)
    for threads in (2, 3, 64):
        monkeypatch.setattr(kernels.torch, "get_num_threads", lambda threads=threads: threads)
        assert all(torch.equal(call(z), expected) for call, expected in zip(calls, whole, strict=True))
    for row in (0, 8, 14):
        alone = [call(z[row : row + 1]) for call in calls[:2]]
        assert all(torch.equal(one[0], expected[row]) for one, expected in zip(alone, whole, strict=False))


def test_one_thread_needs_no_pool(monkeypatch):
    monkeypatch.setattr(kernels, "WORTH", 1)
    monkeypatch.setattr(kernels.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(kernels, "_threads", None)
    dense_product(normal(0, 2, 64), normal(1, 64, 64).half())


libc = ctypes.CDLL(None)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def at_the_end(tensor):
    """A copy, and right behind its last byte a page that nobody may read or write."""
    size = tensor.numel() * tensor.element_size()
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(address + length, mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=length - size)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.skipif(os.name != "posix", reason="protects pages as POSIX does")
@either
@pytest.mark.parametrize(("d_out", "atoms"), [(1, 1), (3, 5), (1, 100), (13, 37), (7, 64), (40, 523)])
def test_nothing_behind_the_end_is_read(dtype, d_out, atoms):
    columns = sparse(0, d_out, atoms, 0.5, dtype)
    columns[-1, -1] = 1
    z, x = at_the_end(normal(1, 3, atoms)), at_the_end(normal(1, 3, d_out))
    mask, values, starts = map(at_the_end, packed(columns))
    assert torch.equal(offsets(mask, d_out, atoms), starts)
    assert torch.equal(unpack(mask, values, starts, atoms), columns.float())
    close(sparse_product(z, mask, values, starts), z, columns.T)
    close(dense_product(x, at_the_end(columns)), x, columns)


@pytest.mark.skipif(os.name != "posix", reason="protects pages as POSIX does")
@forms
@pytest.mark.parametrize(("d_out", "atoms"), [(1, 1), (3, 5), (1, 100), (13, 37), (7, 64), (40, 523)])
def test_nothing_behind_the_end_of_codes_and_scales_is_read(form, d_out, atoms):
    columns, (mask, values, starts), matrix = quantized(0, d_out, atoms, 0.6, form, 32)

    def moved(found):
        return Packed(at_the_end(found.codes), at_the_end(found.scales), found.format, found.group_size)

    z, weight = at_the_end(normal(1, 3, atoms)), (at_the_end(mask), moved(values), at_the_end(starts))
    assert torch.equal(unpack(*weight, atoms), columns)
    close(sparse_product(z, *weight), z, columns.T)
    close(dense_product(z, moved(matrix)), z, columns.T)


AVX2 = ("haswell", "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+popcnt")
"""A processor without AVX-512, as most are."""
has_avx2 = pytest.mark.skipif(not get_host_cpu_features().get("avx2"), reason="needs AVX2")


def on_a_plain_cpu(script, inputs, folder, cpu=("generic", "")):
    """What ``script`` saves to its second argument, given ``inputs`` in its first, compiled for no processor in particular."""
    torch.save(inputs, folder / "in.pt")
    name, features = cpu
    plain = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", script, folder / "in.pt", folder / "out.pt"]
    subprocess.run(command, env=os.environ | plain, check=True)
    return torch.load(folder / "out.pt")


@forms
def test_codes_on_a_cpu_without_these_instructions(tmp_path, form):
    script = """
import sys, torch
from cospadi.packing.matrix import Packed
from cospadi.kernels.sparse_product import dense_product, sparse_product, unpack
z, mask, values, starts, matrix = torch.load(sys.argv[1])
values, matrix = Packed(*values), Packed(*matrix)
found = sparse_product(z, mask, values, starts), dense_product(z, matrix), unpack(mask, values, starts, z.shape[1])
torch.save(found, sys.argv[2])
"""
    columns, (mask, values, starts), matrix = quantized(0, 9, 45, 0.5, form, 32)
    z = normal(1, 2, 45)
    inputs = (z, mask, tuple(vars(values).values()), starts, tuple(vars(matrix).values()))
    sparsely, densely, full = on_a_plain_cpu(script, inputs, tmp_path)
    close(sparsely, z, columns.T)
    close(densely, z, columns.T)
    assert torch.equal(full, columns)


@pytest.mark.parametrize("cpu", [("generic", ""), pytest.param(AVX2, marks=has_avx2)], ids=["generic", "avx2"])
@either
def test_a_cpu_without_these_instructions_gives_the_same(tmp_path, dtype, cpu):
    script = """
import sys, torch
from cospadi.kernels.sparse_product import sparse_product, unpack
z, mask, values, starts = torch.load(sys.argv[1])
torch.save((sparse_product(z, mask, values, starts), unpack(mask, values, starts, z.shape[1])), sys.argv[2])
"""
    columns, z = sparse(0, 9, 45, 0.5, dtype), normal(1, 1, 45)
    columns[:4, 0] = torch.tensor([1e-7, -65504, 6e-5, 3e-6])  # subnormal and large in half precision
    product, dense = on_a_plain_cpu(script, (z, *packed(columns)), tmp_path, cpu)
    close(product, z, columns.T)
    assert torch.equal(dense, columns.float())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_loops_write_float32_whatever_torchs_default_dtype_is(default):
    """A buffer of another width would be written beyond its end, or read as something else."""
    columns = sparse(5, 9, 70, 0.4, torch.float16)
    form = packed(columns)
    z = normal(6, 3, 70)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        full = unpack(*form, 70)
        product = sparse_product(z, *form)
        starts = offsets(form[0], 9, 70)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(full, columns.float())
    assert torch.equal(starts, form[2])
    close(product, z, columns.double().T)
