"""Vectors of `LANES` numbers in registers: loads, expansions and sums that numba has no types for, as LLVM instructions.

Every function here is an intrinsic: a compiled loop calls it, and its ``code`` writes the instructions. They name no
instruction set of their own but where LLVM's general form is much slower (AVX512-VBMI2's expand, AVX2's permutation, F16C's
conversion).
Numbers in memory are addresses: looking at an array takes numba as long as a small product.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from cospadi.packing.formats import FLOAT8_FORM, INT4_FORM, INT8_FORM, LANES, SIXTEEN_BITS

LINE = 64
"""Bytes of a cache line. A load across two of them takes twice as long."""
AHEAD = 2048
"""Bytes by which values and bits are asked for before their turn: these streams are too slow for a CPU to foresee."""
HALF_FORM = SIXTEEN_BITS
BRAIN_FORM = -1  # 16 bits that are bfloat16; the forms of codes are those of their `Format`
WIDTHS = {HALF_FORM: 16, BRAIN_FORM: 16, INT8_FORM: 8, INT4_FORM: 4, FLOAT8_FORM: 8}
"""Bits of a weight."""

FLOAT = ir.FloatType()
HALF = ir.HalfType()
BYTE = ir.IntType(8)
SHORT = ir.IntType(16)
INT = ir.IntType(32)


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
    """An address as a pointer to ``kind``."""
    return builder.inttoptr(address, kind.as_pointer())


def _call(builder, name, result, *arguments, fastmath=()):
    """A call of one of LLVM's own functions."""
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
    count = words.type.count
    whole = ir.VectorType(INT, count)
    floats = ir.VectorType(FLOAT, count)
    # One instruction where the CPU has it.
    if not brain and _has(context, "f16c"):
        return builder.fpext(builder.bitcast(words, ir.VectorType(HALF, count)), floats)

    def constant(number):
        return ir.Constant(whole, [number] * count)

    # bfloat16 is the upper half of a float32.
    wide = builder.zext(words, whole)
    if brain:
        return builder.bitcast(builder.shl(wide, constant(16)), floats)

    # A half has 5 exponent bits and 10 mantissa bits, a float 8 and 23: exponent and mantissa move up by 13. Its exponents
    # begin at −15 instead of −127, which a product with 2^112 corrects, subnormal numbers included.
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    size = builder.shl(builder.and_(wide, constant(0x7FFF)), constant(13))
    endless = builder.icmp_signed(">=", size, constant(0x7C00 << 13))
    size = builder.fmul(builder.bitcast(size, floats), ir.Constant(floats, [2.0**112] * count))
    size = builder.bitcast(size, whole)

    # The largest exponent means infinity or not a number in both formats, and the product has moved it away.
    size = builder.select(endless, builder.or_(size, constant(0x7F800000)), size)
    return builder.bitcast(builder.or_(sign, size), floats)


def _shuffled(builder, left, right, picks):
    """The lanes of two vectors, one behind the other, whose numbers are in ``picks``."""
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(INT, len(picks)), list(picks)))


def _joined(builder, parts):
    """Vectors of one length one behind the other, joined in pairs; their number is a power of two."""
    while len(parts) > 1:
        picks = range(2 * parts[0].type.count)
        parts = [_shuffled(builder, *pair, picks) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _is(kind, value):
    """Whether an argument is known when a loop is compiled, and to be ``value``."""
    return isinstance(kind, types.Literal) and kind.literal_value == value


@intrinsic(prefer_literal=True)
def zeros(context, rows):
    """Zero in all lanes of all rows."""

    def code(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Lanes(rows.literal_value)(rows), code


@intrinsic(prefer_literal=True)
def address(context, array):
    """The first cache line that begins in an array. Ask again at each use: numba frees what it sees no more use of."""

    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        last = ir.Constant(ir.IntType(64), LINE - 1)
        return builder.and_(builder.add(builder.ptrtoint(data, last.type), last), builder.not_(last))

    return types.int64(array), code


@intrinsic(prefer_literal=True)
def prefetch(context, address):
    """Ask for a cache line. No address is wrong here."""

    def code(context, builder, signature, arguments):
        read, keep, data = (ir.Constant(INT, number) for number in (0, 3, 1))
        pointer = _pointer(builder, arguments[0], SHORT)
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, keep, data)

    return types.void(types.int64), code


@intrinsic(prefer_literal=True)
def prefetch_weights(context, base, index, form):
    """Ask for the weights `AHEAD` bytes behind the one with a number."""

    def code(context, builder, signature, arguments):
        base, index, _ = arguments
        place = builder.add(_place(builder, base, index, form.literal_value), ir.Constant(base.type, AHEAD))
        read, keep, data = (ir.Constant(INT, number) for number in (0, 3, 1))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), _pointer(builder, place, SHORT), read, keep, data)

    return types.void(types.int64, types.int64, form), code


@intrinsic(prefer_literal=True)
def load_int32(context, address):
    """A 32-bit integer from memory, as 64 bits."""

    def code(context, builder, signature, arguments):
        return builder.sext(builder.load(_pointer(builder, arguments[0], INT), align=4, typ=INT), ir.IntType(64))

    return types.int64(address), code


@intrinsic(prefer_literal=True)
def popcount(context, bits):
    """How many bits are set."""

    def code(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(bits), code


@intrinsic(prefer_literal=True)
def mask_bits(context, mask, n_bytes, bit, count):
    """The ``count`` bits of the mask from ``bit`` on, read from eight bytes that lie within it."""

    def code(context, builder, signature, arguments):
        mask, n_bytes, bit, count = arguments
        # Eight bytes are read at once, from the byte of the first bit on; near the end of the mask from further in front.
        start = builder.ashr(bit, ir.Constant(bit.type, 3))
        latest = builder.sub(n_bytes, ir.Constant(bit.type, 8))
        start = builder.select(builder.icmp_signed("<", start, latest), start, latest)
        word = builder.load(_pointer(builder, builder.add(mask, start), bit.type), align=1, typ=bit.type)
        # What is in front of the first bit is shifted out, what is behind the last one masked away.
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
    # Only bytes that hold asked codes are read: behind them memory may end. An odd index begins with an upper half.
    second = builder.and_(index, one)
    needed = builder.ashr(builder.add(builder.add(count, second), one), one)
    pointer = _pointer(builder, _place(builder, base, index, INT4_FORM), bytes_)
    taken = _masked_load(builder, pointer, _chosen(builder, _first(builder, needed)), bytes_)

    # From an upper half on, everything moves down by four bits: a funnel shift with the next 64 bits, by 0 or by 4.
    quad = builder.bitcast(taken, quads)
    following = _shuffled(builder, quad, ir.Constant(quads, None), range(1, LANES // 8 + 1))
    four = builder.insert_element(
        ir.Constant(ir.VectorType(quads.element, 1), None),
        builder.shl(second, ir.Constant(second.type, 2)),
        ir.Constant(INT, 0),
    )
    shift = _shuffled(builder, four, four, [0] * (LANES // 8))
    quad = _call(builder, f"llvm.fshr.v{LANES // 8}i64", quads, following, quad, shift)

    # Two codes in a byte become two bytes: 0x00BA, then 0x0B0A.
    sixteen = _shuffled(builder, builder.bitcast(quad, bytes_), ir.Constant(bytes_, None), range(LANES // 2))
    wide = builder.zext(sixteen, words)

    def constant(kind, number):
        return ir.Constant(kind, [number] * kind.count)

    wide = builder.and_(builder.or_(wide, builder.shl(wide, constant(words, 4))), constant(words, 0x0F0F))
    # The sign bit is the fourth: (code ^ 8) − 8 spreads it over the byte.
    codes = builder.bitcast(wide, bytes_)
    return builder.sub(builder.xor(codes, constant(bytes_, 8)), constant(bytes_, 8))


def _numbers(context, builder, codes, form):
    """float32 from codes, or from 16-bit weights."""
    count = codes.type.count
    floats = ir.VectorType(FLOAT, count)
    words = ir.VectorType(SHORT, count)
    if _element(form) == SHORT:
        return _widened(context, builder, codes, form == BRAIN_FORM)
    if form != FLOAT8_FORM:
        return builder.sitofp(builder.sext(codes, ir.VectorType(INT, count)), floats)

    def constant(number):
        return ir.Constant(words, [number] * count)

    # e4m3 as a half: the sign moves to its place, exponent and mantissa end where the half's do. The half's exponents begin
    # at −15 instead of −7, so 2^8 is missing.
    wide = builder.zext(codes, words)
    sign = builder.shl(builder.and_(wide, constant(0x80)), constant(8))
    size = builder.shl(builder.and_(wide, constant(0x7F)), constant(7))
    halves = _widened(context, builder, builder.or_(sign, size), False)
    return builder.fmul(halves, ir.Constant(floats, [2.0**8] * count))


def _expand(context, builder, signature, arguments):
    """The instructions of `expand`."""
    base, index, word, _ = arguments
    form = signature.args[3].literal_value
    kind = ir.VectorType(_element(form), LANES)
    name = f"v{LANES}i{kind.element.width}"
    bits = _chosen(builder, word)
    nothing = ir.Constant(kind, None)
    # Codes of four bits are taken apart first; all others are expanded from memory as they are.
    count = builder.ctpop(word)
    near = None
    pointer = None
    if form == INT4_FORM:
        near = _nibbles(builder, base, index, count)
    else:
        pointer = _pointer(builder, _place(builder, base, index, form), kind)
    # AVX512-VBMI2 expands a register in one instruction, and a load before it is twice as fast as `expandload`.
    if _has(context, "avx512vbmi2"):
        if near is None:
            near = _masked_load(builder, pointer, _chosen(builder, _first(builder, count)), kind)
        taken = _call(builder, f"llvm.x86.avx512.mask.expand.{name}", kind, near, nothing, bits)
    else:
        if pointer is None:
            pointer = cgutils.alloca_once(builder, kind)
            builder.store(near, pointer)
        taken = _call(builder, f"llvm.masked.expandload.{name}", kind, pointer, bits, nothing)
    return _numbers(context, builder, taken, form)


@intrinsic(prefer_literal=True)
def expand(context, base, index, bits, form):
    """The next weights, from the one with number ``index`` on, where a bit is set; zero elsewhere."""
    return Lanes(1)(types.int64, types.int64, types.int64, form), _expand


EIGHT = 8
"""Lanes that AVX2 permutes at once."""


def _places(byte):
    """For every bit of a byte that is set, how many are set below it.

    >>> _places(0b10010110)
    [0, 0, 1, 0, 2, 0, 0, 3]
    """
    return [(byte & (1 << lane) - 1).bit_count() if byte >> lane & 1 else 0 for lane in range(EIGHT)]


def _in_eights(context, builder, word, form, load):
    """What `expand` gives, eight lanes at a time: a table says for every byte of the mask which number each lane takes.

    ``load`` gives the eight numbers that follow a count of others.
    """
    lanes = ir.VectorType(INT, EIGHT)
    floats = ir.VectorType(FLOAT, EIGHT)
    rows = [ir.Constant(lanes, _places(byte)) for byte in range(256)]
    table = cgutils.global_constant(builder, "cospadi_places", ir.Constant(ir.ArrayType(lanes, 256), rows))
    place = builder.ptrtoint(table, word.type)
    single = ir.Constant(lanes, [1 << lane for lane in range(EIGHT)])
    parts = []
    for first in range(0, LANES, EIGHT):
        before = builder.ctpop(builder.and_(word, ir.Constant(word.type, (1 << first) - 1)))
        byte = builder.and_(builder.lshr(word, ir.Constant(word.type, first)), ir.Constant(word.type, 255))
        row = builder.add(place, builder.mul(byte, ir.Constant(word.type, 4 * EIGHT)))
        picks = builder.load(_pointer(builder, row, lanes), align=4, typ=lanes)
        numbers = _numbers(context, builder, load(before), form)
        moved = _call(builder, "llvm.x86.avx2.permps", floats, numbers, picks)
        one = builder.insert_element(ir.Constant(lanes, None), builder.trunc(byte, INT), ir.Constant(INT, 0))
        chosen = builder.and_(_shuffled(builder, one, one, [0] * EIGHT), single)
        is_set = builder.icmp_signed("!=", chosen, ir.Constant(lanes, None))
        parts.append(builder.select(is_set, moved, ir.Constant(floats, None)))
    return _joined(builder, parts)


@intrinsic(prefer_literal=True)
def expand_inside(context, base, index, bits, form):
    """`expand` where at least `LANES` more weights are in memory from ``index`` on, so that more than the chosen may be read."""

    def code(context, builder, signature, arguments):
        base, index, word, _ = arguments
        width = form.literal_value
        # With AVX512-VBMI2 `expand` is fast already, without AVX2 there is nothing faster.
        if _has(context, "avx512vbmi2") or not _has(context, "avx2"):
            return _expand(context, builder, signature, arguments)
        kind = ir.VectorType(_element(width), EIGHT)
        size = kind.element.width // 8
        if width == INT4_FORM:
            near = cgutils.alloca_once(builder, ir.VectorType(BYTE, LANES))
            builder.store(_nibbles(builder, base, index, builder.ctpop(word)), near)
            place = builder.ptrtoint(near, word.type)
        else:
            place = _place(builder, base, index, width)

        def load(before):
            there = builder.add(place, builder.mul(before, ir.Constant(word.type, size)))
            return builder.load(_pointer(builder, there, kind), align=size, typ=kind)

        return _in_eights(context, builder, word, width, load)

    return Lanes(1)(types.int64, types.int64, types.int64, form), code


@intrinsic(prefer_literal=True)
def load_weights(context, row, column, count, form):
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
def load_scale(context, address, brain):
    """A scale in all lanes."""

    def code(context, builder, signature, arguments):
        word = builder.load(_pointer(builder, arguments[0], SHORT), align=2, typ=SHORT)
        one = builder.insert_element(ir.Constant(ir.VectorType(SHORT, 1), None), word, ir.Constant(INT, 0))
        return _widened(context, builder, _shuffled(builder, one, one, [0] * LANES), brain.literal_value)

    return Lanes(1)(types.int64, brain), code


@intrinsic(prefer_literal=True)
def multiply(context, left, right):
    """The product, lane by lane."""

    def code(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return left(left, right), code


@intrinsic(prefer_literal=True)
def load_rows(context, address, stride, count, rows):
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
def broadcast_rows(context, address, stride, rows):
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
def multiply_add(context, total, weights, others):
    """``total + weights · others``, the same weights for every row."""

    def code(context, builder, signature, arguments):
        total, weights, others = arguments
        repeated = _shuffled(builder, weights, weights, list(range(LANES)) * signature.args[0].rows)
        name = f"llvm.fmuladd.v{total.type.count}f32"
        return _call(builder, name, total.type, repeated, others, total)

    return total(total, weights, others), code


@intrinsic(prefer_literal=True)
def store(context, address, lanes):
    """All lanes to memory."""

    def code(context, builder, signature, arguments):
        builder.store(arguments[1], _pointer(builder, arguments[0], arguments[1].type), align=4)

    return types.void(types.int64, lanes), code


@intrinsic(prefer_literal=True)
def store_some(context, address, lanes, count):
    """The first ``count`` lanes to memory."""

    def code(context, builder, signature, arguments):
        address, lanes, count = arguments
        pointer = _pointer(builder, address, lanes.type)
        four = ir.Constant(INT, 4)
        some = _chosen(builder, _first(builder, count))
        _call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), lanes, pointer, four, some)

    return types.void(types.int64, lanes, types.int64), code


@intrinsic(prefer_literal=True)
def store_sums(context, address, stride, lanes):
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
