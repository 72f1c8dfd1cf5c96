"""Number formats of few bits: which codes there are, how they are held and stored, and what multiplies them.

A number is ``code · scale``. Codes of ``intN`` are the whole numbers of N bits, -2^(N-1) to 2^(N-1) - 1; those of
``float8`` are the 8-bit floats with 4 exponent and 3 mantissa bits (e4m3, arXiv:2209.05433). A format is a row of
`FORMATS`, and nothing else asks for its name. No torch here: settings are checked with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cospadi.errors import UserError

SIXTEEN_BITS, INT8_FORM, INT4_FORM, FLOAT8_FORM = range(4)
"""Forms that the kernels read: weights in 16 bits, and codes as they are stored."""


@dataclass(frozen=True)
class Format:
    """A number format. Numbers are rounded, held, packed, stored and multiplied as its fields say."""

    name: str
    bits: int
    """Bits of a stored code."""
    lowest: float
    """The lowest code."""
    highest: float
    """The highest code."""
    dtype: str
    """torch dtype that holds a code. Without a table, rounding to the nearest code is rounding to that dtype."""
    table: tuple[float, ...] = ()
    """The codes in ascending order, 0 among them, where they are neither whole numbers nor floats of ``dtype``; they are
    held as their places in the table, counted from that of 0."""
    form: int | None = None
    """Form in which the kernels multiply its codes as they are stored; ``None``: they do not.

    Whole numbers without one are held a byte each and multiplied as ``int8``. Other codes go through a dense product.
    """

    @classmethod
    def whole(cls, bits: int, form: int | None = None) -> Format:
        """Whole numbers of ``bits`` bits in two's complement."""
        half = 2.0 ** (bits - 1)
        return cls(f"int{bits}", bits, -half, half - 1, "int8", form=form)

    @classmethod
    def of_table(cls, name: str, bits: int, table: Sequence[float]) -> Format:
        """Any 2^bits numbers, 0 among them."""
        return cls(name, bits, min(table), max(table), "int8", tuple(sorted(table)))

    @property
    def is_whole(self) -> bool:
        """Whether codes are whole numbers, so that any wider format of whole numbers holds them, too."""
        return self.dtype == "int8" and not self.table


FORMATS = {
    format.name: format
    for format in (
        *(Format.whole(bits, {4: INT4_FORM, 8: INT8_FORM}.get(bits)) for bits in range(2, 9)),
        Format("float8", 8, -448.0, 448.0, "float8_e4m3fn", form=FLOAT8_FORM),
    )
}
"""Every number format by its name."""
LANES = 32
"""Weights that the kernels take at a time. A group with one scale holds a multiple of it."""
TRUNCATED = "truncated14"
"""The paper's format of values: 16-bit values without their two lowest mantissa bits, no scale (arXiv:2509.22075, section 3.3)."""


def format_of(name: str) -> Format:
    """
    >>> format_of("int4").bits, format_of("int4").lowest, format_of("float8").highest
    (4, -8.0, 448.0)

    Raises:
        ValueError: there is no such format.
    """
    if name not in FORMATS:
        raise ValueError(f"The number format {name} is not known. There are: {', '.join(FORMATS)}.")
    return FORMATS[name]


def bits_of(name: str) -> int:
    """Bits of a code.

    >>> bits_of("int4"), bits_of("float8")
    (4, 8)
    """
    return format_of(name).bits


def packed_bytes(name: str, count: int) -> int:
    """Bytes that ``count`` codes take one after another without gaps.

    >>> packed_bytes("int4", 3), packed_bytes("int3", 8)
    (2, 3)
    """
    return (bits_of(name) * count + 7) // 8


def parsed(formats: Mapping[str, Any] | None) -> dict[str, tuple[str, int]]:
    """Part -> format and group size, from what a checkpoint's config says.

    >>> parsed({"dictionary": ["int4", 128]})
    {'dictionary': ('int4', 128)}

    Raises:
        ValueError, TypeError: it does not have that form.
    """
    if not isinstance(formats or {}, Mapping):
        raise TypeError(f"formats={formats}")
    of_parts = {}
    for part, how in (formats or {}).items():
        name, group_size = how if isinstance(how, list | tuple) and len(how) == 2 else (None, None)
        if name not in FORMATS or not isinstance(group_size, int) or group_size < 1 or group_size % LANES:
            raise ValueError(f"formats.{part}={how}")
        of_parts[part] = (name, group_size)
    return of_parts


def require_known(setting: str, name: str | None, also: tuple[str, ...] = ()) -> None:
    """
    Raises:
        UserError: ``name`` is not a format.
    """
    if name is not None and name not in (*FORMATS, *also):
        raise UserError(f"{setting}={name} is not known. Choose one of: {', '.join((*FORMATS, *also))}, or null.")
