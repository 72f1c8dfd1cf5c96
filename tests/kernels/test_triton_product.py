"""Products with packed coefficients: on a GPU where there is one, in triton's interpreter, and compiled for an H100."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import cases

pytest.importorskip("triton", reason="triton is for Linux")

from cospadi.kernels import triton_product
from cospadi.kernels.triton_product import sparse_product, unpack
from cospadi.packing.matrix import pack

pytestmark = pytest.mark.slow

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPES = [(1, 7), (1, 300), (9, 128), (6, 200), (5, 131), (3, 257)]
"""d_out and atoms: in the interpreter a tile is 4 outputs of 128 atoms."""

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="neither GPU nor interpreter"
)


def packed(d_out: int, atoms: int, dtype: torch.dtype, density: float = 0.4) -> tuple[torch.Tensor, tuple]:
    """Coefficients, transposed, and their packed form. The second output uses no atom, the third every one."""
    generator = torch.Generator().manual_seed(atoms)
    columns = torch.randn(d_out, atoms, generator=generator).to(dtype)
    columns[torch.rand(d_out, atoms, generator=generator) > density] = 0
    columns[1:2], columns[2:3] = 0, 1.5
    support = columns != 0
    mask = torch.from_numpy(np.packbits(support.numpy(), bitorder="little"))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), support.sum(dim=1).cumsum(dim=0)]).int()
    return columns.to(DEVICE), tuple(tensor.to(DEVICE) for tensor in (mask, columns[support], offsets))


def inputs(rows: int, atoms: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, atoms, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)


@pytest.mark.skipif(INTERPRETED, reason="is in the interpreter already")
def test_the_kernels_in_tritons_interpreter():
    """It has to be chosen before triton is imported, which other tests may have done: hence another process."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d_out", "atoms"), SHAPES)
def test_unpacked_is_what_was_packed(d_out, atoms, dtype):
    columns, form = packed(d_out, atoms, dtype)
    assert torch.equal(unpack(*form, d_out, atoms), columns)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize(("d_out", "atoms"), SHAPES)
def test_the_product_is_the_dense_one_summed_in_float32(d_out, atoms, rows, dtype):
    columns, form = packed(d_out, atoms, dtype)
    z = inputs(rows, atoms, dtype)
    out = sparse_product(z, *form, d_out)
    exact = z.double() @ columns.double().T
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)  # one rounding, at the end


def quantized(d_out: int, atoms: int, form: str, group_size: int) -> tuple[torch.Tensor, tuple, tuple]:
    """Coefficients, transposed, in float32; mask, packed codes, offsets; scales, group size and format."""
    columns, (mask, _, offsets) = packed(d_out, atoms, torch.float32)
    largest = {"int8": 127, "int4": 7, "float8": 400}[form]
    codes = columns.cpu() / columns.abs().max().cpu() * largest
    codes = (
        codes.to(torch.float8_e4m3fn) if form == "float8" else codes.round().clamp(-largest - 1, largest).to(torch.int8)
    )
    filled = torch.where(codes.float() == 0, torch.ones(()), codes.float()).to(codes.dtype)  # of a small value, too
    listed = filled.view(torch.uint8)[columns.cpu() != 0].view(codes.dtype)
    scales = (torch.rand(d_out, -(-atoms // group_size), generator=torch.Generator().manual_seed(1)) + 0.5).half()
    wide = scales.float().repeat_interleave(group_size, dim=1)[:, :atoms]
    full = torch.where(columns.cpu() != 0, filled.float() * wide, 0.0)
    weight = tuple(t.to(DEVICE) for t in (mask, pack(listed, form), offsets))
    return full.to(DEVICE), weight, (scales.to(DEVICE), group_size, form)


@runs_kernels
@pytest.mark.parametrize("form", ["int8", "int4", "float8"])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("d_out", "atoms"), SHAPES)
def test_codes_are_multiplied_with_their_scales(d_out, atoms, group_size, form):
    columns, weight, how = quantized(d_out, atoms, form, group_size)
    assert torch.equal(unpack(*weight, d_out, atoms, *how), columns)
    for rows in (1, 3):
        z = inputs(rows, atoms, torch.float32)
        exact = z.double() @ columns.double().T
        out = sparse_product(z, *weight, d_out, *how)
        bound = 1e-5 * (z.double().abs() @ columns.double().abs().T) + 1e-6
        assert ((out.double() - exact).abs() <= bound).all()


@runs_kernels
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_inputs_may_have_another_dtype_than_the_values(rows, z_dtype):
    columns, form = packed(6, 200, torch.bfloat16)
    z = inputs(rows, 200, z_dtype)
    out = sparse_product(z, *form, 6)
    assert out.dtype == z_dtype
    exact = z.double() @ columns.double().T
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(z_dtype).eps, atol=1e-4)


@runs_kernels
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_values_at_all_and_no_zero_at_all(density):
    columns, form = packed(2, 200, torch.float16, density)
    assert torch.equal(unpack(*form, 2, 200), columns)


@runs_kernels
def test_inputs_need_not_be_contiguous():
    _, form = packed(6, 200, torch.float16)
    z = inputs(3, 400, torch.float16)[:, ::2]
    assert torch.equal(sparse_product(z, *form, 6), sparse_product(z.contiguous(), *form, 6))


@runs_kernels
def test_a_length_that_does_not_fit_is_refused():
    _, (mask, values, offsets) = packed(6, 200, torch.float16)
    with pytest.raises(ValueError, match="6 outputs of 200 atoms have 150 bytes of mask and 7 offsets, not 149 and 7"):
        unpack(mask[:-1], values, offsets, 6, 200)
    with pytest.raises(ValueError, match="not 150 and 6"):
        sparse_product(inputs(1, 200, torch.float16), mask, values, offsets[:-1], 6)


@runs_kernels
@pytest.mark.parametrize("rows", [1, 3])
def test_torch_knows_shapes_and_dtypes_without_running_them(rows):
    _, form = packed(6, 200, torch.float16)
    torch.library.opcheck(sparse_product, (inputs(rows, 200, torch.float16), *form, 6))
    torch.library.opcheck(unpack, (*form, 6, 200))


@runs_kernels
def test_compile_leaves_no_gap():
    columns, form = packed(6, 200, torch.float16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(z):
        return sparse_product(2 * z, *form, 6) + z @ unpack(*form, 6, 200).T

    z = inputs(3, 200, torch.float16)
    torch.testing.assert_close(both(z).double(), 3 * z.double() @ columns.double().T, rtol=4e-3, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_replays_on_new_inputs():
    columns, form = packed(6, 200, torch.float16)
    z = inputs(1, 200, torch.float16)
    sparse_product(z, *form, 6)  # tile sizes are timed now, not while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_product(z, *form, 6)
    z.mul_(-2)
    graph.replay()
    torch.testing.assert_close(out.double(), z.double() @ columns.double().T, rtol=1e-3, atol=1e-4)


KERNELS = {
    "one row": (triton_product._one_row, "*fp16 *u8 *fp16 *fp16 *i32 *fp16 i32 i32"),
    "several rows": (triton_product._several_rows, "*bf16 *u8 *bf16 *bf16 *i32 *bf16 i32 i32 i32"),
    "several float32 rows": (triton_product._several_rows, "*fp32 *u8 *bf16 *bf16 *i32 *fp32 i32 i32 i32"),
    "unpack": (triton_product._unpack, "*u8 *bf16 *bf16 *i32 *bf16 i32 i32"),
    "one row of int4": (triton_product._one_row, "*fp16 *u8 *u8 *fp16 *i32 *fp16 i32 i32", "int4"),
    "several rows of int8": (triton_product._several_rows, "*bf16 *u8 *u8 *bf16 *i32 *bf16 i32 i32 i32", "int8"),
    "several rows of float8": (triton_product._several_rows, "*fp16 *u8 *u8 *fp16 *i32 *fp16 i32 i32 i32", "float8"),
    "unpack int4": (triton_product._unpack, "*u8 *u8 *fp16 *i32 *fp32 i32 i32", "int4"),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("whole_bytes", cases([True, False], {True}))
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_tile_size_compiles_for_an_h100(kernel, whole_bytes, tmp_path, monkeypatch):
    """The interpreter knows neither types nor layouts, and the compiler needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuned, types, *form = KERNELS[kernel]
    for config in tuned.configs:
        constants = {
            "WHOLE_BYTES": whole_bytes,
            "GROUP": 128,
            "FORM": triton_product._form("".join(form)),
            **config.kwargs,
        }
        signature = dict(zip(tuned.arg_names, types.split() + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(tuned.fn, signature, constants)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": config.num_warps})
        assert built.metadata.shared <= 227 * 1024
        assert built.asm["cubin"]
