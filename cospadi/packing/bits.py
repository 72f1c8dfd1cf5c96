"""Words of 16 bits with their lower bits cut, one after another without gaps."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def pack_bits(words: Tensor, n_bits: int) -> UInt8[Tensor, " bytes"]:
    """The upper ``n_bits`` of 16-bit words, written one after another without gaps.

    >>> pack_bits(torch.tensor([-4, 4], dtype=torch.int16), 14).tolist()
    [255, 252, 0, 16]
    """
    unsigned = words.contiguous().cpu().numpy().view(np.uint16)
    bits = np.unpackbits(unsigned.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, :n_bits]
    return torch.from_numpy(np.packbits(bits))


def unpack_bits(packed: UInt8[Tensor, " bytes"], n_bits: int, count: int) -> Tensor:
    """The words that ``pack_bits`` wrote, their lower bits zero.

    >>> unpack_bits(pack_bits(torch.tensor([-4, 4], dtype=torch.int16), 14), 14, 2).tolist()
    [-4, 4]
    """
    bits = np.zeros((count, 16), dtype=np.uint8)
    bits[:, :n_bits] = np.unpackbits(packed.numpy(), count=count * n_bits).reshape(count, n_bits)
    return torch.from_numpy(np.packbits(bits).view(">u2").astype(np.uint16).view(np.int16))
