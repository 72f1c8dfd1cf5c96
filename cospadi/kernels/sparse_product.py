"""Products with weights as they are stored, compiled: values of few bits and the bits of a mask, never a dense matrix.

A decode step reads every weight once and multiplies it with a few rows, so its time is that of reading them. These loops
take `LANES` weights at a time from memory to float32 registers and use them for up to eight rows. They are written in
LLVM's own vectors, which numba has no types for: half precision, and expanding, which puts the next values into the
lanes whose mask bit is set. That is one instruction where a CPU has AVX512-VBMI2, and a slow sequence elsewhere.

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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from cospadi.kernels.compiled import compiled
from cospadi.packing.formats import FLOAT8_FORM, INT4_FORM, INT8_FORM, LANES, SIXTEEN_BITS, format_of
from cospadi.packing.matrix import Packed

BLOCKS = (8, 4, 2, 1)
"""Rows multiplied at a time: as many as there are registers for their sums."""
DEPTH = 8
"""Rows of a dictionary read side by side, for each load and store of the sums."""
LINE = 64
"""Bytes of a cache line. A load across two of them takes twice as long."""
AHEAD = 2048
"""Bytes by which values and bits are asked for before their turn: these streams are too slow for a CPU to foresee."""
WORTH = 1 << 19
"""Multiplications that are worth another thread."""

HALF_FORM = SIXTEEN_BITS
BRAIN_FORM = -1
"""16 bits that are bfloat16; the forms of codes are those of their `Format`."""
WIDTHS = {HALF_FORM: 16, BRAIN_FORM: 16, INT8_FORM: 8, INT4_FORM: 4, FLOAT8_FORM: 8}
"""Bits of a weight."""

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
    x, out = x.contiguous(), x.new_empty(rows, atoms)
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
    """Kept for the life of the process: a call here is shorter than the start of a thread."""
    return ThreadPoolExecutor(count)


# --- LLVM's vectors -----------------------------------------------------------------------------------------------------

FLOAT, HALF, BYTE, SHORT, INT = ir.FloatType(), ir.HalfType(), *map(ir.IntType, (8, 16, 32))


class Lanes(types.Type):
    """``rows`` times `LANES` float32 in registers."""

    def __init__(self, rows):
        self.rows = rows
        super().__init__(f"Lanes({rows})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(FLOAT, lanes.rows * LANES))


# Helpers of the intrinsics below: they write LLVM instructions, ``builder`` says where.


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _call(builder, name, result, *arguments, fastmath=()):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=fastmath)


def _chosen(builder, bits):
    """The lanes whose bit is set."""
    return builder.bitcast(builder.trunc(bits, INT), ir.VectorType(ir.IntType(1), LANES))


def _first(builder, count):
    """A bit for each of the first ``count`` lanes."""
    one = ir.Constant(count.type, 1)
    return builder.sub(builder.shl(one, count), one)


def _masked_load(builder, pointer, lanes, kind):
    """The chosen lanes from memory, zero in the others, whose memory is not touched."""
    name, size = {FLOAT: ("f32", 4), SHORT: ("i16", 2), BYTE: ("i8", 1)}[kind.element]
    name = f"llvm.masked.load.v{LANES}{name}.p0"
    return _call(builder, name, kind, pointer, ir.Constant(INT, size), lanes, ir.Constant(kind, None))


def _has(context, feature):
    """Whether the CPU that the code is for has an instruction set."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def _widened(context, builder, words, brain):
    """float32 from 16 bits, exactly."""
    whole = ir.VectorType(INT, LANES)
    floats = ir.VectorType(FLOAT, LANES)
    if not brain and _has(context, "f16c"):
        return builder.fpext(builder.bitcast(words, ir.VectorType(HALF, LANES)), floats)

    def constant(number):
        return ir.Constant(whole, [number] * LANES)

    wide = builder.zext(words, whole)
    if brain:  # bfloat16 is the upper half
        return builder.bitcast(builder.shl(wide, constant(16)), floats)
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    size = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
    endless = builder.icmp_signed(">=", size, constant(0x7C00 << 13))  # infinite, or not a number
    size = builder.fmul(
        builder.bitcast(size, floats), ir.Constant(floats, [2.0**112] * LANES)
    )  # exponents begin elsewhere
    size = builder.bitcast(size, whole)
    size = builder.select(endless, builder.or_(size, constant(0x7F800000)), size)
    return builder.bitcast(builder.or_(sign, size), floats)


def _shuffled(builder, left, right, picks):
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(INT, len(picks)), list(picks)))


def _joined(builder, parts):
    """Vectors of one length one behind the other; their number is a power of two."""
    while len(parts) > 1:
        picks = range(2 * parts[0].type.count)
        parts = [_shuffled(builder, *pair, picks) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _is(kind, value):
    """Whether an argument is known when a loop is compiled, and to be ``value``."""
    return isinstance(kind, types.Literal) and kind.literal_value == value


@intrinsic(prefer_literal=True)
def _zeros(context, rows):
    def code(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Lanes(rows.literal_value)(rows), code


@intrinsic(prefer_literal=True)
def _address(context, array):
    """The first cache line that begins in an array. Ask again at each use: numba frees what it sees no more use of."""

    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        last = ir.Constant(ir.IntType(64), LINE - 1)
        return builder.and_(builder.add(builder.ptrtoint(data, last.type), last), builder.not_(last))

    return types.int64(array), code


@intrinsic(prefer_literal=True)
def _prefetch(context, address):
    """Ask for a cache line. No address is wrong here."""

    def code(context, builder, signature, arguments):
        read, keep, data = (ir.Constant(INT, number) for number in (0, 3, 1))
        pointer = _pointer(builder, arguments[0], SHORT)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)

    return types.void(types.int64), code


@intrinsic(prefer_literal=True)
def _prefetch_weights(context, base, index, form):
    """Ask for the weights `AHEAD` bytes behind the one with a number."""

    def code(context, builder, signature, arguments):
        base, index, _ = arguments
        place = builder.add(_place(builder, base, index, form.literal_value), ir.Constant(base.type, AHEAD))
        read, keep, data = (ir.Constant(INT, number) for number in (0, 3, 1))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), _pointer(builder, place, SHORT), read, keep, data)

    return types.void(types.int64, types.int64, form), code


@intrinsic(prefer_literal=True)
def _int32(context, address):
    def code(context, builder, signature, arguments):
        return builder.sext(builder.load(_pointer(builder, arguments[0], INT), align=4, typ=INT), ir.IntType(64))

    return types.int64(address), code


@intrinsic(prefer_literal=True)
def _popcount(context, bits):
    def code(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(bits), code


@intrinsic(prefer_literal=True)
def _bits(context, mask, n_bytes, bit, count):
    """The ``count`` bits of the mask from ``bit`` on, read from eight bytes that lie within it."""

    def code(context, builder, signature, arguments):
        mask, n_bytes, bit, count = arguments
        start = builder.ashr(bit, ir.Constant(bit.type, 3))
        latest = builder.sub(n_bytes, ir.Constant(bit.type, 8))
        start = builder.select(builder.icmp_signed("<", start, latest), start, latest)
        word = builder.load(_pointer(builder, builder.add(mask, start), bit.type), align=1, typ=bit.type)
        skipped = builder.sub(bit, builder.shl(start, ir.Constant(bit.type, 3)))
        return builder.and_(builder.lshr(word, skipped), _first(builder, count))

    return types.int64(types.int64, types.int64, types.int64, types.int64), code


def _element(form):
    """The integer that holds a code, or the bits of a 16-bit weight."""
    return SHORT if WIDTHS[form] == 16 else BYTE


def _place(builder, base, index, form):
    """The address of the weight with a number; of two in one byte the byte's."""
    one = ir.Constant(index.type, 1)
    offset = {16: lambda: builder.shl(index, one), 8: lambda: index, 4: lambda: builder.ashr(index, one)}[
        WIDTHS[form]
    ]()
    return builder.add(base, offset)


def _nibbles(builder, base, index, count):
    """``count`` codes of four bits from the one with number ``index`` on, a byte each."""
    bytes_ = ir.VectorType(BYTE, LANES)
    words = ir.VectorType(SHORT, LANES // 2)
    quads = ir.VectorType(ir.IntType(64), LANES // 8)
    one = ir.Constant(index.type, 1)
    second = builder.and_(index, one)  # it begins with the upper half of a byte
    needed = builder.ashr(builder.add(builder.add(count, second), one), one)
    pointer = _pointer(builder, _place(builder, base, index, INT4_FORM), bytes_)
    taken = _masked_load(builder, pointer, _chosen(builder, _first(builder, needed)), bytes_)
    quad = builder.bitcast(taken, quads)
    following = _shuffled(builder, quad, ir.Constant(quads, None), range(1, LANES // 8 + 1))
    four = builder.insert_element(
        ir.Constant(ir.VectorType(quads.element, 1), None),
        builder.shl(second, ir.Constant(second.type, 2)),
        ir.Constant(INT, 0),
    )
    shift = _shuffled(builder, four, four, [0] * (LANES // 8))
    quad = _call(builder, f"llvm.fshr.v{LANES // 8}i64", quads, following, quad, shift)
    sixteen = _shuffled(builder, builder.bitcast(quad, bytes_), ir.Constant(bytes_, None), range(LANES // 2))
    wide = builder.zext(sixteen, words)  # 0x00BA, and then 0x0B0A

    def constant(kind, number):
        return ir.Constant(kind, [number] * kind.count)

    wide = builder.and_(builder.or_(wide, builder.shl(wide, constant(words, 4))), constant(words, 0x0F0F))
    codes = builder.bitcast(wide, bytes_)
    return builder.sub(builder.xor(codes, constant(bytes_, 8)), constant(bytes_, 8))  # the sign


def _numbers(context, builder, codes, form):
    """float32 from codes, or from 16-bit weights."""
    floats = ir.VectorType(FLOAT, LANES)
    words = ir.VectorType(SHORT, LANES)
    if _element(form) == SHORT:
        return _widened(context, builder, codes, form == BRAIN_FORM)
    if form != FLOAT8_FORM:
        return builder.sitofp(builder.sext(codes, ir.VectorType(INT, LANES)), floats)

    def constant(number):
        return ir.Constant(words, [number] * LANES)

    wide = builder.zext(codes, words)  # as a half: sign and exponent move up, and exponents begin elsewhere
    sign = builder.shl(builder.and_(wide, constant(0x80)), constant(8))
    size = builder.shl(builder.and_(wide, constant(0x7F)), constant(7))
    halves = _widened(context, builder, builder.or_(sign, size), False)
    return builder.fmul(halves, ir.Constant(floats, [2.0**8] * LANES))


@intrinsic(prefer_literal=True)
def _expand(context, base, index, bits, form):
    """The next weights, from the one with number ``index`` on, where a bit is set; zero elsewhere."""

    def code(context, builder, signature, arguments):
        base, index, word, _ = arguments
        kind = ir.VectorType(_element(form.literal_value), LANES)
        name = f"v{LANES}i{kind.element.width}"
        bits = _chosen(builder, word)
        nothing = ir.Constant(kind, None)
        count = builder.ctpop(word)
        near = None
        pointer = None
        if form.literal_value == INT4_FORM:
            near = _nibbles(builder, base, index, count)
        else:
            pointer = _pointer(builder, _place(builder, base, index, form.literal_value), kind)
        if _has(context, "avx512vbmi2"):  # `expandload` itself takes twice as long
            if near is None:
                near = _masked_load(builder, pointer, _chosen(builder, _first(builder, count)), kind)
            taken = _call(builder, f"llvm.x86.avx512.mask.expand.{name}", kind, near, nothing, bits)
        else:
            if pointer is None:
                pointer = cgutils.alloca_once(builder, kind)
                builder.store(near, pointer)
            taken = _call(builder, f"llvm.masked.expandload.{name}", kind, pointer, bits, nothing)
        return _numbers(context, builder, taken, form.literal_value)

    return Lanes(1)(types.int64, types.int64, types.int64, form), code


@intrinsic(prefer_literal=True)
def _load(context, row, column, count, form):
    """The first ``count`` of `LANES` weights of a row from an even column on."""

    def code(context, builder, signature, arguments):
        row, column, number, _ = arguments
        number = ir.Constant(column.type, LANES) if _is(count, LANES) else number
        if form.literal_value == INT4_FORM:
            return _numbers(context, builder, _nibbles(builder, row, column, number), INT4_FORM)
        kind = ir.VectorType(_element(form.literal_value), LANES)
        pointer = _pointer(builder, _place(builder, row, column, form.literal_value), kind)
        if _is(count, LANES):
            taken = builder.load(pointer, align=kind.element.width // 8, typ=kind)
        else:
            taken = _masked_load(builder, pointer, _chosen(builder, _first(builder, number)), kind)
        return _numbers(context, builder, taken, form.literal_value)

    count_type = count if _is(count, LANES) else types.int64
    return Lanes(1)(types.int64, types.int64, count_type, form), code


@intrinsic(prefer_literal=True)
def _scale(context, address, brain):
    """A scale in all lanes."""

    def code(context, builder, signature, arguments):
        word = builder.load(_pointer(builder, arguments[0], SHORT), align=2, typ=SHORT)
        one = builder.insert_element(ir.Constant(ir.VectorType(SHORT, 1), None), word, ir.Constant(INT, 0))
        return _widened(context, builder, _shuffled(builder, one, one, [0] * LANES), brain.literal_value)

    return Lanes(1)(types.int64, brain), code


@intrinsic(prefer_literal=True)
def _times(context, left, right):
    def code(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return left(left, right), code


@intrinsic(prefer_literal=True)
def _stack(context, address, stride, count, rows):
    """The first ``count`` of `LANES` numbers of each row, rows ``stride`` bytes apart."""

    def code(context, builder, signature, arguments):
        floats = ir.VectorType(FLOAT, LANES)
        address, stride, number, _ = arguments
        parts = []
        for _ in range(rows.literal_value):
            pointer = _pointer(builder, address, floats)
            if _is(count, LANES):
                parts.append(builder.load(pointer, align=4, typ=floats))
            else:
                parts.append(_masked_load(builder, pointer, _chosen(builder, _first(builder, number)), floats))
            address = builder.add(address, stride)
        return _joined(builder, parts)

    count_type = count if _is(count, LANES) else types.int64
    return Lanes(rows.literal_value)(types.int64, types.int64, count_type, rows), code


@intrinsic(prefer_literal=True)
def _spread(context, address, stride, rows):
    """A number of every row, in all lanes of its row."""

    def code(context, builder, signature, arguments):
        address, stride, _ = arguments
        parts = []
        for _ in range(rows.literal_value):
            number = builder.load(_pointer(builder, address, FLOAT), align=4, typ=FLOAT)
            one = builder.insert_element(ir.Constant(ir.VectorType(FLOAT, 1), None), number, ir.Constant(INT, 0))
            parts.append(_shuffled(builder, one, one, [0] * LANES))
            address = builder.add(address, stride)
        return _joined(builder, parts)

    return Lanes(rows.literal_value)(types.int64, types.int64, rows), code


@intrinsic(prefer_literal=True)
def _add(context, total, weights, others):
    """``total + weights · others``, the same weights for every row."""

    def code(context, builder, signature, arguments):
        total, weights, others = arguments
        repeated = _shuffled(builder, weights, weights, list(range(LANES)) * signature.args[0].rows)
        name = f"llvm.fmuladd.v{total.type.count}f32"
        return _call(builder, name, total.type, repeated, others, total)

    return total(total, weights, others), code


@intrinsic(prefer_literal=True)
def _store(context, address, lanes):
    def code(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], arguments[1].type), align=4)

    return types.void(types.int64, lanes), code


@intrinsic(prefer_literal=True)
def _store_some(context, address, lanes, count):
    """The first ``count`` lanes to memory."""

    def code(context, builder, signature, arguments):
        address, lanes, count = arguments
        pointer = _pointer(builder, address, lanes.type)
        four = ir.Constant(INT, 4)
        some = _chosen(builder, _first(builder, count))
        _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), lanes, pointer, four, some)

    return types.void(types.int64, lanes, types.int64), code


@intrinsic(prefer_literal=True)
def _store_sums(context, address, stride, lanes):
    """The sum over its lanes for each row, ``stride`` bytes apart."""

    def code(context, builder, signature, arguments):
        address, stride, total = arguments
        for row in range(lanes.rows):
            part = _shuffled(builder, total, total, range(LANES * row, LANES * row + LANES))
            name = f"llvm.vector.reduce.fadd.v{LANES}f32"
            number = _call(builder, name, FLOAT, ir.Constant(FLOAT, 0.0), part, fastmath=["reassoc"])
            builder.store(number, _pointer(builder, address, FLOAT), align=4)
            address = builder.add(address, stride)

    return types.void(types.int64, types.int64, lanes), code


@compiled
def _count(mask, n_bytes, starts, atoms):
    """Bits in front of every output."""
    count = 0
    for j in range(len(starts) - 1):
        starts[j] = count
        for column in range(0, atoms, 56):
            count += _popcount(_bits(mask, n_bytes, j * atoms + column, min(56, atoms - column)))
    starts[-1] = count


# --- loops --------------------------------------------------------------------------------------------------------------


@cache
def _sparse(rows, form, brain):
    """The loop of `sparse_product` for a block of rows: a word of the mask is decoded once for all of them."""
    scaled = form not in (HALF_FORM, BRAIN_FORM)

    def loop(z, atoms, mask, n_bytes, values, scales, group, starts, out, d_out, first, last):
        words = (atoms + LANES - 1) // LANES
        if not scaled:
            group = max(words, 1)
        groups = (words + group - 1) // group
        padded = np.empty(rows * words * LANES + LINE // 4, np.float32)
        stride = 4 * words * LANES
        for row in range(rows):
            for word in range(words):
                part = _stack(z + 4 * (row * atoms + LANES * word), 0, min(LANES, atoms - LANES * word), 1)
                _store(_address(padded) + row * stride + 4 * LANES * word, part)
        for j in range(first, last):
            total = _zeros(rows)
            value = _int32(starts + 4 * j)
            for number in range(groups):
                if scaled:
                    scale = _scale(scales + 2 * (j * groups + number), brain)
                else:
                    scale = _zeros(1)
                for word in range(number * group, min(words, (number + 1) * group)):
                    bits = _bits(mask, n_bytes, j * atoms + LANES * word, min(LANES, atoms - LANES * word))
                    weights = _expand(values, value, bits, form)
                    if scaled:
                        weights = _times(weights, scale)
                    total = _add(total, weights, _stack(_address(padded) + 4 * LANES * word, stride, LANES, rows))
                    value += _popcount(bits)
                    _prefetch_weights(values, value, form)
            _prefetch(mask + j * atoms // 8 + AHEAD)
            _store_sums(out + 4 * j, 4 * d_out, total)

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
        for top in range(0, d_in, DEPTH):
            bottom = min(top + DEPTH, d_in)
            group = scales + 2 * (top // group_rows) * atoms
            for word in range(words):
                place = _address(sums) + 4 * LANES * rows * word
                column = first + LANES * word
                count = min(LANES, last - column)
                before = _stack(place, 4 * LANES, LANES, rows)
                total = _zeros(rows) if scaled else before
                for i in range(bottom, bottom + DEPTH):
                    _prefetch(dictionary + i * row_bytes + column * width // 8)
                if count == LANES:
                    for i in range(top, bottom):
                        weights = _load(dictionary + i * row_bytes, column, LANES, form)
                        total = _add(total, weights, _spread(x + 4 * i, 4 * d_in, rows))
                    if scaled:
                        total = _add(before, _load(group, column, LANES, scale_form), total)
                else:
                    for i in range(top, bottom):
                        weights = _load(dictionary + i * row_bytes, column, count, form)
                        total = _add(total, weights, _spread(x + 4 * i, 4 * d_in, rows))
                    if scaled:
                        total = _add(before, _load(group, column, count, scale_form), total)
                _store(place, total)
        for row in range(rows):
            for word in range(words):
                column = first + LANES * word
                part = _stack(_address(sums) + 4 * LANES * (rows * word + row), 0, LANES, 1)
                _store_some(out + 4 * (row * atoms + column), part, min(LANES, last - column))

    return compiled(loop)


@cache
def _unpack(form, brain):
    """The loop of `unpack`."""
    scaled = form not in (HALF_FORM, BRAIN_FORM)

    def loop(mask, n_bytes, values, scales, group, starts, out, atoms, first, last):
        words = (atoms + LANES - 1) // LANES
        groups = (words + group - 1) // group
        for j in range(first, last):
            value = _int32(starts + 4 * j)
            for word in range(words):
                column = LANES * word
                count = min(LANES, atoms - column)
                bits = _bits(mask, n_bytes, j * atoms + column, count)
                weights = _expand(values, value, bits, form)
                if scaled:
                    weights = _times(weights, _scale(scales + 2 * (j * groups + word // group), brain))
                _store_some(out + 4 * (j * atoms + column), weights, count)
                value += _popcount(bits)
                _prefetch_weights(values, value, form)

    return compiled(loop)
