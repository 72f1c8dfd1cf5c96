"""Products with packed coefficients on a GPU: the dense coefficients are never written, or written only to be multiplied.

The packed form of ``coefficients (atoms × d_out)`` lies output by output:

- ``mask``: a bit per coefficient, non-zero or not, from the low bit of a byte to the high one. Output ``j`` begins at bit
  ``j · atoms``, in the middle of a byte where that is no multiple of 8.
- ``values``: the non-zeros in the same order, 16 bits each.
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
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

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
    schema="(Tensor z, Tensor mask, Tensor values, Tensor offsets, SymInt d_out) -> Tensor",
)
def sparse_product(
    z: Float[Tensor, "rows atoms"],
    mask: UInt8[Tensor, " bytes"],
    values: Float[Tensor, " nonzeros"],
    offsets: Int32[Tensor, " bounds"],
    d_out: int,
) -> Float[Tensor, "rows d_out"]:
    """``z @ coefficients``, straight from the packed form, for the few rows of a decoding step:

        ``out[r, j] = Σ_k coefficients[k, j] · z[r, k]``    over the ``k`` that output ``j`` uses.

    Sums are float32. The packed form is read once for up to 16 rows and once more for every further 16: for the rows of a
    whole prompt, ``unpack`` and a dense product read it once.

    Args:
        z: float16, bfloat16 or float32, on the GPU like the rest. The result has its dtype.
        mask: ``d_out · atoms`` bits, so ``bytes = ⌈d_out · atoms / 8⌉``.
        values: float16 or bfloat16.
        offsets: ``d_out + 1`` of them.
        d_out: outputs.

    Raises:
        ValueError: when ``mask`` or ``offsets`` have another length than ``d_out`` and ``atoms`` ask for.
    """
    rows, atoms = z.shape
    _check_sizes(mask, offsets, d_out, atoms)
    out = z.new_empty(rows, d_out)
    tensors = (z.contiguous(), mask, values, offsets, out)
    whole_bytes = atoms % 8 == 0
    with torch.cuda.device_of(z):
        if rows == 1:
            _one_row[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]),)](*tensors, d_out, atoms, whole_bytes)
        else:
            _several_rows[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]), triton.cdiv(rows, ROWS.value))](
                *tensors, rows, d_out, atoms, whole_bytes
            )
    return out


@sparse_product.register_fake
def _(z, mask, values, offsets, d_out):
    return z.new_empty(z.shape[0], d_out)


@torch.library.custom_op(
    "cospadi::unpack",
    mutates_args=(),
    schema="(Tensor mask, Tensor values, Tensor offsets, SymInt d_out, SymInt atoms) -> Tensor",
)
def unpack(
    mask: UInt8[Tensor, " bytes"],
    values: Float[Tensor, " nonzeros"],
    offsets: Int32[Tensor, " bounds"],
    d_out: int,
    atoms: int,
) -> Float[Tensor, "d_out atoms"]:
    """``coefficientsᵀ`` written out in the dtype of ``values``, zeros included: for the many rows of a prompt.

    Args:
        mask: ``⌈d_out · atoms / 8⌉`` bytes.
        values: float16 or bfloat16.
        offsets: ``d_out + 1`` of them.
        d_out: outputs.
        atoms: coefficients of an output.

    Raises:
        ValueError: when ``mask`` or ``offsets`` have another length than ``d_out`` and ``atoms`` ask for.
    """
    _check_sizes(mask, offsets, d_out, atoms)
    out = values.new_empty(d_out, atoms)
    with torch.cuda.device_of(values):
        _unpack[lambda tile: (triton.cdiv(d_out, tile["OUTPUTS"]),)](
            mask, values, offsets, out, d_out, atoms, atoms % 8 == 0
        )
    return out


@unpack.register_fake
def _(mask, values, offsets, d_out, atoms):
    return values.new_empty(d_out, atoms)


def _check_sizes(mask: Tensor, offsets: Tensor, d_out: int, atoms: int) -> None:
    """A wrong length would be read beyond its end, which a GPU need not notice."""
    if len(mask) != -(-d_out * atoms // 8) or len(offsets) != d_out + 1:
        raise ValueError(
            f"{d_out} outputs of {atoms} atoms have {-(-d_out * atoms // 8)} bytes of mask and {d_out + 1} offsets, "
            f"not {len(mask)} and {len(offsets)}."
        )


@triton.autotune(
    _tiles((2, 1024, 4), (4, 512, 2), (4, 1024, 4), (8, 256, 1), (8, 512, 2), (8, 1024, 4)), key=["d_out", "atoms"]
)
@triton.jit
@no_type_check
def _one_row(
    z,
    mask,
    values,
    offsets,
    out,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A thread keeps a byte of the mask to itself, bit after bit: nothing passes between threads but the byte's count."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    total = tl.zeros((OUTPUTS, TILE // 8), tl.float32)
    for first in range(0, atoms, TILE):
        spread, before, start, place = _count(mask, bits, place, outputs < d_out, first, atoms, WHOLE_BYTES, TILE)
        columns = first + 8 * tl.arange(0, TILE // 8)
        for bit in tl.static_range(8):
            index = start + ((before >> (4 * bit)) & 15).to(tl.int32)
            value = tl.load(values + index, (spread & (1 << 4 * bit)) != 0, 0.0)
            entry = tl.load(z + columns + bit, columns + bit < atoms, 0.0)
            total += value.to(tl.float32) * entry.to(tl.float32)[None, :]
    tl.store(out + outputs, tl.sum(total, 1).to(out.dtype.element_ty), outputs < d_out)


@triton.autotune(_tiles((16, 64, 4), (16, 128, 4), (16, 256, 8), (32, 64, 4)), key=["d_out", "atoms"])
@triton.jit
@no_type_check
def _several_rows(
    z,
    mask,
    values,
    offsets,
    out,
    rows,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sixteen rows at a time: a tile is unpacked into registers and multiplied by the tensor cores."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, atoms, TILE):
        tile, place = _tile(mask, values, bits, place, outputs < d_out, first, atoms, WHOLE_BYTES, OUTPUTS, TILE)
        columns = first + tl.arange(0, TILE)
        wanted = (block < rows)[:, None] & (columns < atoms)[None, :]
        entries = tl.load(z + block[:, None] * atoms + columns[None, :], wanted, 0.0)
        if entries.dtype == tile.dtype and (tile.dtype == tl.float16 or not INTERPRETED):
            total = tl.dot(entries, tl.trans(tile), total)
        else:  # dtypes that differ; and the interpreter multiplies bfloat16 as if its bits were an integer's
            total = tl.dot(entries.to(tl.float32), tl.trans(tile.to(tl.float32)), total, input_precision="tf32x3")
    wanted = (block < rows)[:, None] & (outputs < d_out)[None, :]
    tl.store(out + block[:, None] * d_out + outputs[None, :], total.to(out.dtype.element_ty), wanted)


@triton.autotune(_tiles((2, 1024, 4), (4, 512, 4), (8, 512, 8), (8, 128, 4)), key=["d_out", "atoms"])
@triton.jit
@no_type_check
def _unpack(
    mask,
    values,
    offsets,
    out,
    d_out,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    bits, place = _begin(offsets, outputs, d_out, atoms)
    for first in range(0, atoms, TILE):
        tile, place = _tile(mask, values, bits, place, outputs < d_out, first, atoms, WHOLE_BYTES, OUTPUTS, TILE)
        columns = first + tl.arange(0, TILE)
        wanted = (outputs < d_out)[:, None] & (columns < atoms)[None, :]
        tl.store(out + bits[:, None] + columns[None, :], tile, wanted)


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
    bits,
    place,
    live,
    first,
    atoms,
    WHOLE_BYTES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Coefficients (OUTPUTS × TILE) of the atoms from ``first`` on, and the place of the first value after them."""
    spread, before, start, place = _count(mask, bits, place, live, first, atoms, WHOLE_BYTES, TILE)
    nibble = (4 * tl.arange(0, 8)).to(tl.uint32)[None, None, :]
    index = start[:, :, None] + ((before[:, :, None] >> nibble) & 15).to(tl.int32)
    tile = tl.load(values + index, ((spread[:, :, None] >> nibble) & 1) != 0, 0.0)
    return tl.reshape(tile, (OUTPUTS, TILE)), place


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
    wanted = live[:, None] & (inside > 0)[None, :]
    at = mask + (bits >> 3)[:, None] + octets[None, :]
    byte = tl.load(at, wanted, 0).to(tl.uint32)
    if not WHOLE_BYTES:  # the byte lies across two stored ones
        skipped = (bits & 7).to(tl.int32)[:, None]
        upper = tl.load(at + 1, wanted & (skipped + inside[None, :] > 8), 0).to(tl.uint32)
        byte = (byte | (upper << 8)) >> skipped.to(tl.uint32)
    byte &= ((1 << inside) - 1).to(tl.uint32)[None, :]

    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    upto = spread * 0x11111111
    ones = (upto >> 28).to(tl.int32)
    return spread, upto - spread, place[:, None] + tl.cumsum(ones, 1) - ones, place + tl.sum(ones, 1)
