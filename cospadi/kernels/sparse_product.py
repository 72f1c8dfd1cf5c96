"""Products with weights as they are stored, compiled: values of few bits and the bits of a mask, never a dense matrix.

A decode step reads every weight once and multiplies it with a few rows, so its time is that of reading them. These loops
take `LANES` weights at a time from memory to float32 registers and use them for up to eight rows. They are written in
LLVM's own vectors, which numba has no types for: half precision, and expanding, which puts the next values into the
lanes whose mask bit is set. That is one instruction where a CPU has AVX512-VBMI2, a table of permutations with AVX2, and a slow
sequence elsewhere.

Weights are in 16 bits, or `Packed`: codes of 8 or 4 bits, one scale for a group of them. A group holds whole vectors, so
that a vector of codes has one scale.

Numbers are handed over as addresses: looking at an array takes numba as long as a small product.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, UInt8
from torch import Tensor

from cospadi.kernels.compiled import compiled
from cospadi.kernels.lanes import (
    AHEAD,
    BRAIN_FORM,
    HALF_FORM,
    LINE,
    WIDTHS,
    address,
    broadcast_rows,
    expand,
    expand_inside,
    load_int32,
    load_rows,
    load_scale,
    load_weights,
    mask_bits,
    multiply,
    multiply_add,
    popcount,
    prefetch,
    prefetch_weights,
    store,
    store_some,
    store_sums,
    zeros,
)
from cospadi.packing.formats import LANES, format_of
from cospadi.packing.matrix import Packed

BLOCKS = (8, 4, 2, 1)
"""Rows multiplied at a time: as many as there are registers for their sums."""
DEPTH = 8
"""Rows of a dictionary read side by side, for each load and store of the sums."""
WORTH = 1 << 19
"""Minimum multiplications per thread; below this, starting a thread costs more than it saves."""

Weights = Float[Tensor, "..."] | Packed


def sparse_product(
    z: Float32[Tensor, "rows atoms"],
    mask: UInt8[Tensor, " bytes"],
    values: Float[Tensor, " nonzeros"] | Packed,
    offsets: Int32[Tensor, " d_out_and_one"],
) -> Float32[Tensor, "rows d_out"]:
    """``z @ S`` with the coefficients ``S`` in their packed form,

        ``out[r, j] = Σ_{k in support(j)} z[r, k] S[k, j]``.

    A row's result depends neither on the other rows nor on the number of threads.

    Args:
        z: on the CPU, as are the others.
        mask: bit ``j · atoms + k``, the lowest of a byte first, is set where ``S[k, j]`` is stored.
        values: column by column of ``S``, float16 or bfloat16, or packed.
        offsets: what `offsets` says about this mask.
    """
    rows, atoms = z.shape
    d_out = len(offsets) - 1
    z = z.contiguous()
    mask = _padded(mask)
    offsets = offsets.contiguous()
    kind, numbers, scales, group = _handed_over(values)
    out = z.new_empty(rows, d_out)
    weight = (mask.data_ptr(), len(mask), numbers.data_ptr(), scales, group, offsets.data_ptr())
    work = len(numbers) * 16 // WIDTHS[kind[0]]  # about: two codes of four bits in a byte
    for block, row in _blocks(rows):
        there = (z.data_ptr() + 4 * atoms * row, atoms, *weight, out.data_ptr() + 4 * d_out * row, d_out)
        _share(_sparse(block, *kind), there, d_out, block * work)
    return out


def _handed_over(weights: Weights) -> tuple[tuple[int, bool], Tensor, int, int]:
    """Form of the numbers and whether scales are bfloat16; numbers; address of the scales; vectors that have one together."""
    if isinstance(weights, Packed):
        kind = format_of(weights.format).form, weights.scales.dtype is torch.bfloat16
        return kind, weights.codes.contiguous(), weights.scales.data_ptr(), weights.group_size // LANES
    numbers = weights.contiguous()
    return (BRAIN_FORM if numbers.dtype is torch.bfloat16 else HALF_FORM, False), numbers, 0, 1


def dense_product(
    x: Float32[Tensor, "rows d_in"], dictionary: Float[Tensor, "d_in atoms"] | Packed
) -> Float32[Tensor, "rows atoms"]:
    """``x @ D`` in float32 with a dictionary in 16 bits, or packed.

    Args:
        x: on the CPU.
        dictionary: float16 or bfloat16, or packed; on the CPU.
    """
    packed = isinstance(dictionary, Packed)
    rows, d_in = x.shape
    atoms = (dictionary.scales if packed else dictionary).shape[1]
    kind, numbers, scales, group = _handed_over(dictionary)
    out = x.new_empty(rows, atoms)
    x = x.contiguous()
    weight = (numbers.data_ptr(), numbers.shape[1] * numbers.element_size(), scales, group * LANES)
    for block, row in _blocks(rows):
        there = (x.data_ptr() + 4 * d_in * row, d_in, *weight, out.data_ptr() + 4 * atoms * row, atoms)
        _share(_dense(block, *kind), there, atoms, block * d_in * atoms, LANES)
    return out


def unpack(
    mask: UInt8[Tensor, " bytes"],
    values: Float[Tensor, " nonzeros"] | Packed,
    offsets: Int32[Tensor, " d_out_and_one"],
    atoms: int,
) -> Float32[Tensor, "d_out atoms"]:
    """``Sᵀ`` in full, from the packed form that `sparse_product` takes."""
    mask = _padded(mask)
    offsets = offsets.contiguous()
    kind, numbers, scales, group = _handed_over(values)
    d_out = len(offsets) - 1
    out = torch.empty(d_out, atoms, dtype=torch.float32, device="cpu")
    weight = (mask.data_ptr(), len(mask), numbers.data_ptr(), scales, group, offsets.data_ptr())
    _share(_unpack(*kind), (*weight, out.data_ptr(), atoms), d_out, d_out * atoms)
    return out


def offsets(mask: UInt8[Tensor, " bytes"], d_out: int, atoms: int) -> Int32[Tensor, " d_out_and_one"]:
    """Where the values of every output begin, and behind them where the last ones end.

    >>> offsets(torch.tensor([0b10110, 0b1], dtype=torch.uint8), d_out=3, atoms=3).tolist()
    [0, 2, 3, 4]
    """
    mask = _padded(mask)
    starts = torch.zeros(d_out + 1, dtype=torch.int32, device="cpu")
    _count(mask.data_ptr(), len(mask), starts.numpy(), atoms)
    return starts


def _padded(mask: Tensor) -> Tensor:
    """A mask of eight bytes or more: the loops read eight at a time."""
    return mask.contiguous() if len(mask) >= 8 else torch.nn.functional.pad(mask, (0, 8 - len(mask)))


@cache
def _blocks(rows: int) -> list[tuple[int, int]]:
    """Sizes and first rows of the blocks that ``rows`` are multiplied in.

    >>> _blocks(11)
    [(8, 0), (2, 8), (1, 10)]
    """
    blocks = []
    row = 0
    for block in BLOCKS:
        while rows - row >= block:
            blocks.append((block, row))
            row += block
    return blocks


def _share(loop: Callable, there: tuple[int, ...], count: int, work: int, unit: int = 1) -> None:
    """``loop`` over ``count`` outputs, in pieces of whole ``unit``: one here, the others in threads of their own."""
    # A thread has to be worth its start.
    units = -(-count // unit)
    pieces = min(torch.get_num_threads(), work // WORTH, units)
    if pieces <= 1:
        loop(*there, 0, count)
        return
    bounds = [min(count, unit * (units * piece // pieces)) for piece in range(pieces + 1)]
    (first, last), *others = itertools.pairwise(bounds)
    waiting = [_threads(pieces - 1).submit(loop, *there, *part) for part in others]
    loop(*there, first, last)
    for other in waiting:
        other.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process: a call here is shorter than the start of one."""
    return ThreadPoolExecutor(count)


# --- loops --------------------------------------------------------------------------------------------------------------


@compiled
def _count(mask, n_bytes, starts, atoms):
    """Bits in front of every output."""
    # 56 bits at a time: eight bytes hold them wherever they begin.
    count = 0
    for j in range(len(starts) - 1):
        starts[j] = count
        for column in range(0, atoms, 56):
            count += popcount(mask_bits(mask, n_bytes, j * atoms + column, min(56, atoms - column)))
    starts[-1] = count


@cache
def _sparse(rows, form, brain):
    """The loop of `sparse_product` for a block of rows: a word of the mask is decoded once for all of them."""
    scaled = form not in (HALF_FORM, BRAIN_FORM)

    def loop(z, atoms, mask, n_bytes, values, scales, group, starts, out, d_out, first, last):
        words = (atoms + LANES - 1) // LANES
        if not scaled:
            group = max(words, 1)
        groups = (words + group - 1) // group

        # The rows of z, each from a cache line on and filled up to whole vectors, so that the loop below needs no tails.
        padded = np.empty(rows * words * LANES + LINE // 4, np.float32)
        stride = 4 * words * LANES
        for row in range(rows):
            for word in range(words):
                part = load_rows(z + 4 * (row * atoms + LANES * word), 0, min(LANES, atoms - LANES * word), 1)
                store(address(padded) + row * stride + 4 * LANES * word, part)

        # Output by output: its values lie one behind the other, so the place of the next one is a running count.
        end = load_int32(starts + 4 * last)
        for j in range(first, last):
            total = zeros(rows)
            value = load_int32(starts + 4 * j)
            for number in range(groups):
                if scaled:
                    scale = load_scale(scales + 2 * (j * groups + number), brain)
                else:
                    scale = zeros(1)
                for word in range(number * group, min(words, (number + 1) * group)):
                    bits = mask_bits(mask, n_bytes, j * atoms + LANES * word, min(LANES, atoms - LANES * word))
                    if value + LANES <= end:
                        weights = expand_inside(values, value, bits, form)
                    else:
                        weights = expand(values, value, bits, form)
                    if scaled:
                        weights = multiply(weights, scale)
                    # Decoded once, used for all rows of the block.
                    total = multiply_add(
                        total, weights, load_rows(address(padded) + 4 * LANES * word, stride, LANES, rows)
                    )
                    value += popcount(bits)
                    prefetch_weights(values, value, form)
            prefetch(mask + j * atoms // 8 + AHEAD)
            store_sums(out + 4 * j, 4 * d_out, total)

    return compiled(loop)


@cache
def _dense(rows, form, brain):
    """The loop of `dense_product`: `DEPTH` rows of the dictionary at a time, so that memory is read in order.

    One lane's sums over all of its rows would need no stores, but touch another page every few steps. Those `DEPTH` rows
    are of one group: their sum is scaled once.
    """
    scaled = form not in (HALF_FORM, BRAIN_FORM)
    width = WIDTHS[form]
    scale_form = BRAIN_FORM if brain else HALF_FORM

    def loop(x, d_in, dictionary, row_bytes, scales, group_rows, out, atoms, first, last):
        words = (last - first + LANES - 1) // LANES
        sums = np.zeros(words * rows * LANES + LINE // 4, np.float32)
        # Sums of all outputs stay in cache, while `DEPTH` rows of the dictionary pass by in the order of memory.
        for top in range(0, d_in, DEPTH):
            bottom = min(top + DEPTH, d_in)
            group = scales + 2 * (top // group_rows) * atoms
            for word in range(words):
                place = address(sums) + 4 * LANES * rows * word
                column = first + LANES * word
                count = min(LANES, last - column)
                before = load_rows(place, 4 * LANES, LANES, rows)
                total = zeros(rows) if scaled else before
                # The rows that come after these are asked for now: the next visit to this column needs them.
                for i in range(bottom, bottom + DEPTH):
                    prefetch(dictionary + i * row_bytes + column * width // 8)
                # Whole vectors without a mask: the compiler keeps their loads short. The last few columns have one.
                if count == LANES:
                    for i in range(top, bottom):
                        weights = load_weights(dictionary + i * row_bytes, column, LANES, form)
                        total = multiply_add(total, weights, broadcast_rows(x + 4 * i, 4 * d_in, rows))
                    if scaled:
                        total = multiply_add(before, load_weights(group, column, LANES, scale_form), total)
                else:
                    for i in range(top, bottom):
                        weights = load_weights(dictionary + i * row_bytes, column, count, form)
                        total = multiply_add(total, weights, broadcast_rows(x + 4 * i, 4 * d_in, rows))
                    if scaled:
                        total = multiply_add(before, load_weights(group, column, count, scale_form), total)
                store(place, total)

        # Sums were kept vector by vector, all rows side by side; outputs are row by row.
        for row in range(rows):
            for word in range(words):
                column = first + LANES * word
                part = load_rows(address(sums) + 4 * LANES * (rows * word + row), 0, LANES, 1)
                store_some(out + 4 * (row * atoms + column), part, min(LANES, last - column))

    return compiled(loop)


@cache
def _unpack(form, brain):
    """The loop of `unpack`."""
    scaled = form not in (HALF_FORM, BRAIN_FORM)

    def loop(mask, n_bytes, values, scales, group, starts, out, atoms, first, last):
        words = (atoms + LANES - 1) // LANES
        groups = (words + group - 1) // group
        end = load_int32(starts + 4 * last)
        for j in range(first, last):
            value = load_int32(starts + 4 * j)
            for word in range(words):
                column = LANES * word
                count = min(LANES, atoms - column)
                bits = mask_bits(mask, n_bytes, j * atoms + column, count)
                if value + LANES <= end:
                    weights = expand_inside(values, value, bits, form)
                else:
                    weights = expand(values, value, bits, form)
                if scaled:
                    weights = multiply(weights, load_scale(scales + 2 * (j * groups + word // group), brain))
                store_some(out + 4 * (j * atoms + column), weights, count)
                value += popcount(bits)
                prefetch_weights(values, value, form)

    return compiled(loop)
