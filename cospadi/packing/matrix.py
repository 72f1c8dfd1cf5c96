"""A matrix of few bits per entry, and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from cospadi.packing.formats import LANES, Format, bits_of, format_of, packed_bytes


@dataclass(frozen=True)
class Packed:
    """Codes as they are stored and as the kernels multiply them, and the scales they are multiplied with."""

    codes: UInt8[Tensor, "*rows bytes"]
    """Codes of a matrix, row by row, each row whole bytes; or of a list of values."""
    scales: Float[Tensor, "_ _"]
    """float16 or bfloat16, contiguous: (groups × columns) of a matrix, whose groups are rows; (d_out × groups) of values."""
    format: str
    """Name of a format with a kernel form."""
    group_size: int
    """Rows of a matrix, or atoms, that have a scale together: a multiple of `LANES`."""

    def __post_init__(self) -> None:
        if self.group_size % LANES or not self.scales.is_contiguous():
            raise ValueError(f"group_size={self.group_size}, scales contiguous: {self.scales.is_contiguous()}")


@dataclass(frozen=True)
class Quantized:
    """``codes · scales``: every ``group_size`` rows of a column have a scale of their own, the last group maybe fewer."""

    codes: Shaped[Tensor, "rows columns"]
    """Codes in the dtype of the format; packed only when stored."""
    scales: Float[Tensor, "groups columns"]
    """Scales in 16 bits."""
    format: str
    """One of `FORMATS`."""
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scales: what is computed from them has its range."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def float(self) -> Float[Tensor, "rows columns"]:
        """The numbers in float32: products of a code and a scale are exact there."""
        return decoded(self.codes, self.format) * by_row(self.scales.float(), self.group_size, len(self.codes))

    @property
    def nonzero(self) -> Shaped[Tensor, "rows columns"]:
        """Where a number is not zero."""
        return self.codes.float() != 0


def by_row(scales: Tensor, group_size: int, rows: int) -> Tensor:
    """The scale of every entry, from the scale of every group.

    >>> by_row(torch.tensor([[1.0], [2.0]]), 2, 3).flatten().tolist()
    [1.0, 1.0, 2.0]
    """
    return scales.repeat_interleave(group_size, dim=0)[:rows]


def groups(rows: int, group_size: int) -> int:
    """
    >>> groups(576, 128), groups(0, 128)
    (5, 0)
    """
    return -(-rows // group_size)


def code_dtype(name: str) -> torch.dtype:
    """The dtype that holds a code of this format."""
    return getattr(torch, format_of(name).dtype)


def nearest(numbers: Tensor, name: str) -> Tensor:
    """The nearest numbers that are codes, in place, in the dtype of ``numbers``.

    >>> nearest(torch.tensor([-9.0, 0.4, 3.6]), "int4").tolist()
    [-8.0, 0.0, 4.0]
    """
    format = format_of(name)
    numbers = numbers.clamp_(format.lowest, format.highest)
    if format.table:
        return _table(format, numbers)[_places(format, numbers)]
    return numbers.round_() if format.is_whole else numbers.to(code_dtype(name)).to(numbers.dtype)


def encoded(values: Tensor, name: str) -> Tensor:
    """Numbers that are codes, in the dtype that holds them.

    >>> encoded(torch.tensor([-8.0, 7.0]), "int4").dtype
    torch.int8
    """
    format = format_of(name)
    if not format.table:
        return values.to(code_dtype(name))
    # Places counted from that of 0, so that memory filled with zeros holds zeros; the last ones go round to the front.
    half = 2 ** (format.bits - 1)
    counted = _places(format, values) - format.table.index(0.0)
    return ((counted + half) % (2 * half) - half).to(code_dtype(name))


def decoded(codes: Tensor, name: str) -> Tensor:
    """The numbers that codes stand for, in float32."""
    format = format_of(name)
    numbers = codes.float()
    if not format.table:
        return numbers
    places = (codes.long() + format.table.index(0.0)) % 2**format.bits
    return _table(format, numbers)[places]


def _table(format: Format, like: Tensor) -> Tensor:
    return torch.tensor(format.table, dtype=like.dtype, device=like.device)


def _places(format: Format, numbers: Tensor) -> Tensor:
    """Places in the table of the nearest codes: numbers are compared with the middles between neighbours."""
    table = _table(format, numbers)
    return torch.bucketize(numbers.contiguous(), (table[1:] + table[:-1]) / 2)


def pack(codes: Shaped[Tensor, "*rows columns"], name: str) -> UInt8[Tensor, "*rows bytes"]:
    """Codes of every row one after another without gaps, the lowest bits of a byte first; rows begin at a byte.

    >>> pack(torch.tensor([1, -1, 2], dtype=torch.int8), "int4").tolist()  # 0x1 and 0xF, 0x2
    [241, 2]
    """
    bits = bits_of(name)
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    unsigned = codes.cpu().numpy().view(np.uint8)
    split = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    flat = split.reshape(*unsigned.shape[:-1], unsigned.shape[-1] * bits)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little")).to(codes.device)


def unpack(packed: UInt8[Tensor, "*rows bytes"], name: str, columns: int) -> Shaped[Tensor, "*rows columns"]:
    """What `pack` packed.

    >>> unpack(pack(torch.tensor([1, -1, 2], dtype=torch.int8), "int4"), "int4", 3).tolist()
    [1, -1, 2]
    """
    bits = bits_of(name)
    if bits == 8:
        return packed.view(code_dtype(name))
    if bits == 4:  # on whatever device it lies: layers do this for every prompt
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(start_dim=-2)[..., :columns]
    else:
        split = np.unpackbits(packed.cpu().numpy(), axis=-1, count=columns * bits, bitorder="little")
        split = split.reshape(*packed.shape[:-1], columns, bits)
        codes = torch.from_numpy(np.packbits(split, axis=-1, bitorder="little")[..., 0]).to(packed.device)
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)  # the sign again


def empty_packed(name: str, *shape: int) -> Tensor:
    """Room for the packed codes of a matrix, or of a list."""
    *rows, columns = shape
    return torch.empty(*rows, packed_bytes(name, columns), dtype=torch.uint8)
