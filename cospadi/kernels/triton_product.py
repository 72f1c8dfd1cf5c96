"""Products with packed coefficients on a GPU: the dense coefficients are never written, or written only to be multiplied.

The packed form of ``coefficients (atoms × d_out)`` lies output by output:

- ``mask``: a bit per coefficient, non-zero or not, from the low bit of a byte to the high one. Output ``j`` begins at bit
  ``j · atoms``, in the middle of a byte where that is not a multiple of 8.
- ``values``: the non-zeros in the same order, 16 bits each; or codes of 8 or 4 bits without gaps, with ``scales``: one for
  each ``group_size`` atoms of an output (`cospadi.packing.matrix`).
- ``offsets``: where each output's values begin, and at the end how many there are.

A value's place is the number of ones before its bit, and counting them is what this file is about: per byte by one
multiplication, then along the bytes by a cumulative sum. Importing this file imports triton, so import it where a GPU is.
The first call of a shape times a few tile sizes: make it before recording a CUDA graph.
"""

import os
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from cospadi.packing.formats import SIXTEEN_BITS, format_of

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ROWS = tl.constexpr(16)
"""Rows a program takes at a time if there are several: the least that tensor cores are made for."""


def _tiles(*sizes: tuple[int, int, int]) -> list[triton.Config]:
    """Outputs × atoms of a tile, and warps, to choose from; the interpreter has nothing to time and takes small ones."""
    if INTERPRETED:
        return [triton.Config({"OUTPUTS": 4, "TILE": 128})]
    return [triton.Config({"OUTPUTS": outputs, "TILE": tile}, num_warps=warps) for outputs, tile, warps in sizes]


@torch.library.custom_op(
    "cospadi::sparse_product",
    mutates_args=(),
    schema="(Tensor z, Tensor mask, Tensor values, Tensor offsets, SymInt d_out, Tensor? scales=None, "
    'SymInt group_size=32, str form="") -> Tensor',
)
def sparse_product(
    z: Float[Tensor, "rows atoms"],
    mask: UInt8[Tensor, " bytes"],
    values: Shaped[Tensor, " nonzeros_or_bytes"],
    offsets: Int32[Tensor, " bounds"],
    d_out: int,
    scales: Float[Tensor, "d_out groups"] | None = None,
    group_size: int = 32,
    form: str = "",
) -> Float[Tensor, "rows d_out"]:
    """``z @ coefficients``, straight from the packed form, for the few rows of a decoding step:

        ``out[r, j] = Σ_k coefficients[k, j] · z[r, k]``    over the ``k`` that output ``j`` uses.

    Sums are float32. The packed form is read once for up to 16 rows and once more for every further 16: for the rows of a
    whole prompt, ``unpack`` and a dense product read it once.

    Args:
        z: float16, bfloat16 or float32, on the GPU like the rest. The result has its dtype.
        mask: ``d_out · atoms`` bits, so ``bytes = ⌈d_out · atoms / 8⌉``.
        values: float16 or bfloat16; packed codes where ``form`` names their format.
        offsets: ``d_out + 1`` of them.
        d_out: outputs.
        scales: of packed codes, float16 or bfloat16.
        group_size: atoms that have a scale together, a multiple of 8.
        form: name of a format with a kernel form; none: 16 bits.

    Raises:
        ValueError: when ``mask`` or ``offsets`` have another length than ``d_out`` and ``atoms`` ask for.
    """
    rows, atoms = z.shape
    _check_sizes(mask, offsets, d_out, atoms)
    out = z.new_empty(rows, d_out)
    tensors = (z.contiguous(), mask, values, values if scales is None else scales, offsets, out)
    whole_bytes = atoms % 8 == 0
    how = group_size, _form(form)
    with torch.cuda.device_of(z):
        if rows == 1:
            _one_row[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]),)](*tensors, d_out, atoms, whole_bytes, *how)
        else:
            _several_rows[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]), triton.cdiv(rows, ROWS.value))](
                *tensors, rows, d_out, atoms, whole_bytes, *how
            )
    return out


@sparse_product.register_fake
def _(z, mask, values, offsets, d_out, scales=None, group_size=32, form=""):
    return z.new_empty(z.shape[0], d_out)


@torch.library.custom_op(
    "cospadi::unpack",
    mutates_args=(),
    schema="(Tensor mask, Tensor values, Tensor offsets, SymInt d_out, SymInt atoms, Tensor? scales=None, "
    'SymInt group_size=32, str form="") -> Tensor',
)
def unpack(
    mask: UInt8[Tensor, " bytes"],
    values: Shaped[Tensor, " nonzeros_or_bytes"],
    offsets: Int32[Tensor, " bounds"],
    d_out: int,
    atoms: int,
    scales: Float[Tensor, "d_out groups"] | None = None,
    group_size: int = 32,
    form: str = "",
) -> Float[Tensor, "d_out atoms"]:
    """``coefficientsᵀ`` written out, zeros included: for the many rows of a prompt.

    In the dtype of ``values``; packed codes times their scales in float32, where they are exact.

    Args:
        mask: ``⌈d_out · atoms / 8⌉`` bytes.
        values: float16 or bfloat16; packed codes where ``form`` names their format.
        offsets: ``d_out + 1`` of them.
        d_out: outputs.
        atoms: coefficients of an output.
        scales: scales of packed codes, as in `sparse_product`.
        group_size: atoms that share a scale.
        form: format of packed codes.

    Raises:
        ValueError: when ``mask`` or ``offsets`` have another length than ``d_out`` and ``atoms`` ask for.
    """
    _check_sizes(mask, offsets, d_out, atoms)
    out = values.new_empty(d_out, atoms, dtype=torch.float32 if form else values.dtype)
    tensors = (mask, values, values if scales is None else scales, offsets, out)
    with torch.cuda.device_of(values):
        _unpack[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]),)](
            *tensors, d_out, atoms, atoms % 8 == 0, group_size, _form(form)
        )
    return out


@unpack.register_fake
def _(mask, values, offsets, d_out, atoms, scales=None, group_size=32, form=""):
    return values.new_empty(d_out, atoms, dtype=torch.float32 if form else values.dtype)


def _form(name: str) -> int:
    """Number of the branch that reads a format's codes."""
    return format_of(name).form if name else SIXTEEN_BITS


def _check_sizes(mask: Tensor, offsets: Tensor, d_out: int, atoms: int) -> None:
    """A wrong length would be read beyond its end, which a GPU need not notice."""
    if len(mask) != -(-d_out * atoms // 8) or len(offsets) != d_out + 1:
        raise ValueError(
            f"{d_out} outputs of {atoms} atoms have {-(-d_out * atoms // 8)} bytes of mask and {d_out + 1} offsets, "
            f"not {len(mask)} and {len(offsets)}."
        )


@triton.autotune(
    _tiles((2, 1024, 4), (4, 512, 2), (4, 1024, 4), (8, 256, 1), (8, 512, 2), (8, 1024, 4)),
    key=["d_out", "atoms", "FORM"],
)
@triton.jit
@no_type_check
def _one_row(
    z,
    mask,
    values,
    scales,
    offsets,
    out,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A thread keeps a byte of the mask to itself, bit after bit: nothing passes between threads but the byte's count."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    total = tl.zeros((OUTPUTS, TILE // 8), tl.float32)
    for first in range(0, atoms, TILE):
        spread, before, start, place = _count(mask, bits, place, outputs < d_out, first, atoms, WHOLE_BYTES, TILE)
        # Bit by bit over all bytes of the tile: a thread's values lie side by side in memory.
        columns = first + 8 * tl.arange(0, TILE // 8)
        part = tl.zeros((OUTPUTS, TILE // 8), tl.float32)
        for bit in tl.static_range(8):
            index = start + ((before >> (4 * bit)) & 15).to(tl.int32)
            value = _numbers(values, index, (spread & (1 << 4 * bit)) != 0, FORM)
            entry = tl.load(z + columns + bit, columns + bit < atoms, 0.0)
            part += value.to(tl.float32) * entry.to(tl.float32)[None, :]
        total += part * _scales(scales, outputs, columns, outputs < d_out, atoms, GROUP, FORM)
    tl.store(out + outputs, tl.sum(total, 1).to(out.dtype.element_ty), outputs < d_out)


@triton.autotune(_tiles((16, 64, 4), (16, 128, 4), (16, 256, 8), (32, 64, 4)), key=["d_out", "atoms", "FORM"])
@triton.jit
@no_type_check
def _several_rows(
    z,
    mask,
    values,
    scales,
    offsets,
    out,
    rows,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sixteen rows at a time: a tile is unpacked into registers and multiplied by the tensor cores."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, atoms, TILE):
        tile, place = _tile(
            mask, values, scales, outputs, bits, place, d_out, first, atoms, WHOLE_BYTES, GROUP, FORM, OUTPUTS, TILE
        )
        columns = first + tl.arange(0, TILE)
        inside = (block < rows)[:, None] & (columns < atoms)[None, :]
        entries = tl.load(z + block[:, None] * atoms + columns[None, :], inside, 0.0)
        if entries.dtype == tile.dtype and (tile.dtype == tl.float16 or not INTERPRETED):
            total = tl.dot(entries, tl.trans(tile), total)
        else:
            # Dtypes that differ; and the interpreter takes the bits of bfloat16 for an integer's.
            total = tl.dot(entries.to(tl.float32), tl.trans(tile.to(tl.float32)), total, input_precision="tf32x3")
    inside = (block < rows)[:, None] & (outputs < d_out)[None, :]
    tl.store(out + block[:, None] * d_out + outputs[None, :], total.to(out.dtype.element_ty), inside)


@triton.autotune(_tiles((2, 1024, 4), (4, 512, 4), (8, 512, 8), (8, 128, 4)), key=["d_out", "atoms", "FORM"])
@triton.jit
@no_type_check
def _unpack(
    mask,
    values,
    scales,
    offsets,
    out,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    for first in range(0, atoms, TILE):
        tile, place = _tile(
            mask, values, scales, outputs, bits, place, d_out, first, atoms, WHOLE_BYTES, GROUP, FORM, OUTPUTS, TILE
        )
        columns = first + tl.arange(0, TILE)
        inside = (outputs < d_out)[:, None] & (columns < atoms)[None, :]
        tl.store(out + bits[:, None] + columns[None, :], tile, inside)


@triton.jit
@no_type_check
def _begin(offsets, outputs, d_out, atoms):
    """The first bit and the first value of each output. A large matrix has more bits than int32 counts."""
    return outputs.to(tl.int64) * atoms, tl.load(offsets + outputs, outputs < d_out, 0)


@triton.jit
@no_type_check
def _tile(
    mask,
    values,
    scales,
    outputs,
    bits,
    place,
    d_out,
    first,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Coefficients (OUTPUTS × TILE) of the atoms from ``first`` on, and the place of the first value after them."""
    live = outputs < d_out
    spread, before, start, place = _count(mask, bits, place, live, first, atoms, WHOLE_BYTES, TILE)
    nibble = (4 * tl.arange(0, 8)).to(tl.uint32)[None, None, :]
    index = start[:, :, None] + ((before[:, :, None] >> nibble) & 15).to(tl.int32)
    tile = _numbers(values, index, ((spread[:, :, None] >> nibble) & 1) != 0, FORM)
    if FORM != 0:
        columns = first + 8 * tl.arange(0, TILE // 8)
        tile *= _scales(scales, outputs, columns, live, atoms, GROUP, FORM)[:, :, None]
    return tl.reshape(tile, (OUTPUTS, TILE)), place


@triton.jit
@no_type_check
def _numbers(values, index, inside, FORM: tl.constexpr):
    """The weights with these numbers: as they are, or float32 from their codes; zero where none is wanted."""
    if FORM == 0:
        weights = tl.load(values + index, inside, 0.0)
    elif FORM == 1:
        weights = ((tl.load(values + index, inside, 0).to(tl.int32) ^ 128) - 128).to(tl.float32)
    elif FORM == 2:
        pair = tl.load(values + (index >> 1), inside, 0).to(tl.int32)
        weights = ((((pair >> (4 * (index & 1))) & 15) ^ 8) - 8).to(tl.float32)
    else:
        code = tl.load(values + index, inside, 0).to(tl.int32)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)  # sign and exponent move up, and exponents begin elsewhere
        weights = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return weights


@triton.jit
@no_type_check
def _scales(scales, outputs, columns, live, atoms, GROUP: tl.constexpr, FORM: tl.constexpr):
    """The scale of every output's eight atoms from these columns on; 1 for weights in 16 bits."""
    if FORM == 0:
        scale = tl.full((1, 1), 1.0, tl.float32)
    else:
        groups = (atoms + GROUP - 1) // GROUP
        at = scales + outputs.to(tl.int64)[:, None] * groups + (columns // GROUP)[None, :]
        scale = tl.load(at, live[:, None] & (columns < atoms)[None, :], 0.0).to(tl.float32)
    return scale


@triton.jit
@no_type_check
def _count(mask, bits, place, live, first, atoms, WHOLE_BYTES: tl.constexpr, TILE: tl.constexpr):
    """For each byte of a tile of the mask (OUTPUTS × TILE / 8), where its values are; and the place after the tile.

    ``spread`` has the byte's eight bits in eight nibbles; multiplied by ``0x11111111`` it has in each nibble the ones up to
    there, at most 8, so that nothing is carried over. ``before`` leaves the bit itself out, ``start`` is the place of the
    byte's first value: bit ``b`` has its value at ``start`` plus nibble ``b`` of ``before``.
    """
    octets = first // 8 + tl.arange(0, TILE // 8)
    inside = tl.minimum(tl.maximum(atoms - 8 * octets, 0), 8)  # bits that are still this output's
    present = live[:, None] & (inside > 0)[None, :]
    at = mask + (bits >> 3)[:, None] + octets[None, :]
    byte = tl.load(at, present, 0).to(tl.uint32)
    if not WHOLE_BYTES:  # the byte lies across two stored ones
        skipped = (bits & 7).to(tl.int32)[:, None]
        upper = tl.load(at + 1, present & (skipped + inside[None, :] > 8), 0).to(tl.uint32)
        byte = (byte | (upper << 8)) >> skipped.to(tl.uint32)
    byte &= ((1 << inside) - 1).to(tl.uint32)[None, :]

    # Eight bits into eight nibbles, by halves: 4 + 4, 2 + 2 + 2 + 2, and one each.
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    # Running counts of ones in one product; the last nibble counts the whole byte.
    upto = spread * 0x11111111
    ones = (upto >> 28).to(tl.int32)
    return spread, upto - spread, place[:, None] + tl.cumsum(ones, 1) - ones, place + tl.sum(ones, 1)
