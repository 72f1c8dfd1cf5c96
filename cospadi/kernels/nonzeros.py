"""The numbers of a sparse matrix that are not zero, and a bit for each that says where they are: one pass, compiled."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from cospadi.kernels.compiled import compiled

WORDS = {1: torch.uint8, 2: torch.int16}
"""Whole numbers of a number's bytes."""


def gather(numbers: Shaped[Tensor, "*shape"]) -> tuple[UInt8[Tensor, " bytes"], Shaped[Tensor, " nonzeros"]]:
    """The mask of ``numbers``, the first in the lowest bit of the first byte, and those that are not zero.

    >>> mask, values = gather(torch.tensor([[1.0, 0.0], [-0.0, 2.0]], dtype=torch.float16))
    >>> mask.tolist(), values.tolist()
    ([9], [1.0, 2.0])

    Args:
        numbers: of 8 or 16 bits, on the CPU: floats, or codes of 8 bits. A zero with a sign is a zero.
    """
    words = numbers.contiguous().view(WORDS[numbers.element_size()]).flatten().numpy()
    # A float without its sign, which a zero may have; of a code that is a whole number all bits count.
    n_bits = 8 * words.itemsize - int(numbers.is_floating_point())
    magnitude = words.dtype.type((1 << n_bits) - 1)
    mask = np.empty(-(-len(words) // 8), np.uint8)
    values = np.empty(len(words) + 1, words.dtype)
    whole = len(words) // 8 * 8
    found = _gather(words[:whole], magnitude, mask, values)
    if whole < len(words):  # the last byte, filled up with zeros
        last = np.zeros(8, words.dtype)
        last[: len(words) - whole] = words[whole:]
        found += _gather(last, magnitude, mask[-1:], values[found:])
    return torch.from_numpy(mask), torch.from_numpy(values[:found].copy()).view(numbers.dtype)


def count(mask: UInt8[Tensor, " bytes"]) -> int:
    """Numbers that are not zero.

    >>> count(torch.tensor([9], dtype=torch.uint8))
    2
    """
    return int(np.bitwise_count(mask.numpy()).sum())


def scatter(
    mask: UInt8[Tensor, " bytes"], values: Shaped[Tensor, " nonzeros"], rows: int, columns: int
) -> Shaped[Tensor, "rows columns"]:
    """What `gather` took apart.

    Raises:
        ValueError: the mask has another length, or another number of bits set than there are values.
    """
    size = rows * columns
    if len(mask) != -(-size // 8):
        raise ValueError(f"a mask of {len(mask)} bytes for {rows} × {columns} numbers")
    if count(mask) != len(values):
        raise ValueError(f"a mask with {count(mask)} bits set for {len(values)} values")
    word = WORDS[values.element_size()]
    ended = torch.cat([values.contiguous().view(word), torch.zeros(1, dtype=word)])  # looked at after the last value
    numbers = torch.empty(8 * len(mask), dtype=word)
    _scatter(mask.numpy(), ended.numpy(), numbers.numpy())
    return numbers[:size].view(values.dtype).view(rows, columns)


@compiled
def _gather(words, magnitude, mask, values):
    """Every number is written where the next non-zero belongs, and the place moves on if it was one: no branch."""
    place = 0
    for byte in range(len(words) // 8):
        bits = 0
        for i in range(8):
            word = words[8 * byte + i]
            nonzero = (word & magnitude) != 0
            values[place] = word
            place += nonzero
            bits |= nonzero << i
        mask[byte] = bits
    return place


@compiled
def _scatter(mask, values, numbers):
    """Reads the next value at every bit, keeps it if the bit is set, and moves on by the bit: no branch."""
    place = 0
    for byte in range(len(mask)):
        bits = np.int64(mask[byte])
        for i in range(8):
            bit = (bits >> i) & 1
            numbers[8 * byte + i] = values[place] * bit
            place += bit
