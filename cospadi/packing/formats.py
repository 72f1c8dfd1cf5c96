"""Number formats of few bits: what codes there are, and how many bytes they take.

A number is ``code · scale``. Codes of ``intN`` are the whole numbers of N bits, -2^(N-1) to 2^(N-1) - 1; those of
``float8`` are the 8-bit floats with 4 exponent and 3 mantissa bits (e4m3, arXiv:2209.05433). No torch here: settings are
checked with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cospadi.errors import UserError

FLOAT8 = "float8"


@dataclass(frozen=True)
class Format:
    """A number format: which codes there are. A number is ``code · scale``."""

    name: str
    bits: int
    """Bits of a stored code."""
    lowest: float
    """The lowest code."""
    highest: float
    """The highest code."""
    is_whole: bool
    """Codes are whole numbers, so that any wider format of whole numbers holds them, too."""

    @classmethod
    def whole(cls, bits: int) -> Format:
        """Whole numbers of ``bits`` bits in two's complement."""
        half = 2.0 ** (bits - 1)
        return cls(f"int{bits}", bits, -half, half - 1, is_whole=True)


FORMATS = {
    **{f"int{bits}": Format.whole(bits) for bits in range(2, 9)},
    FLOAT8: Format(FLOAT8, 8, -448.0, 448.0, is_whole=False),
}
"""Every number format by its name."""
LANES = 32
"""Weights that the kernels take at a time, and so what a group with one scale is a multiple of."""
TRUNCATED = "truncated14"
"""The paper's: 16-bit values without their two lowest mantissa bits, no scale (arXiv:2509.22075, section 3.3)."""


def format_of(name: str) -> Format:
    """
    >>> format_of("int4").bits
    4

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


def largest_codes(name: str) -> tuple[float, float]:
    """The lowest and the highest code.

    >>> largest_codes("int4"), largest_codes("float8")
    ((-8.0, 7.0), (-448.0, 448.0))
    """
    found = format_of(name)
    return found.lowest, found.highest


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
        ValueError, TypeError: when it is nothing like that.
    """
    if not isinstance(formats or {}, Mapping):
        raise TypeError(f"formats={formats}")
    found = {}
    for part, how in (formats or {}).items():
        name, group_size = how if isinstance(how, list | tuple) and len(how) == 2 else (None, None)
        if name not in FORMATS or not isinstance(group_size, int) or group_size < 1 or group_size % LANES:
            raise ValueError(f"formats.{part}={how}")
        found[part] = (name, group_size)
    return found


def require_known(setting: str, name: str | None, also: tuple[str, ...] = ()) -> None:
    """
    Raises:
        UserError: when ``name`` is no format.
    """
    if name is not None and name not in (*FORMATS, *also):
        raise UserError(f"{setting}={name} is not known. Choose one of: {', '.join((*FORMATS, *also))}, or null.")
