"""The largest magnitudes of every row, compiled: counting, where ``topk`` moves pairs of values and places about."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.kernels.compiled import compiled

ROWS = 64
"""Fewer rows than this are not worth another thread."""


def keep_largest(values: Float[Tensor, "rows columns"], count: int) -> Float[Tensor, "rows columns"]:
    """1 where the ``count`` largest magnitudes of a row are, 0 elsewhere; of equal ones the first are taken.

    Args:
        values: on the CPU, without NaN.
        count: at least 1, at most ``columns``.
    """
    whole = torch.int32 if values.dtype == torch.float32 else torch.int64
    array = values.contiguous().view(whole).numpy()
    top_bit = array.dtype.type(array.dtype.itemsize * 8 - 2)
    kept = torch.empty_like(values, memory_format=torch.contiguous_format)
    pieces = max(1, min(torch.get_num_threads(), len(array) // ROWS))
    if pieces == 1:
        _keep_largest(array, top_bit, count, kept.numpy())
        return kept
    bounds = np.linspace(0, len(array), pieces + 1).astype(int)
    parts = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    list(_threads(pieces).map(lambda part: _keep_largest(array[part], top_bit, count, kept.numpy()[part]), parts))
    return kept


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Kept for the life of the process: a call here is shorter than the start of a thread."""
    return ThreadPoolExecutor(count)


@compiled
def _keep_largest(bits, top_bit, count, kept):
    """``bits`` of the magnitudes as integers, which are in the same order: their threshold is found bit by bit.

    A pass counts without a branch, so it runs in vector units, and there are no more passes than bits.
    """
    columns = bits.shape[1]
    magnitudes = np.empty(columns, bits.dtype)
    one = bits.dtype.type(1)
    sign = ~(one << (top_bit + one))
    for row in range(len(bits)):
        # Without their sign, floats as integers are in the order of their magnitudes.
        numbers = bits[row]
        out = kept[row]
        for j in range(columns):
            magnitudes[j] = numbers[j] & sign

        # The largest threshold that at least ``count`` reach, from the highest bit down; done early when it is exact.
        threshold = bits.dtype.type(0)
        enough = columns
        bit = top_bit
        while bit >= 0 and enough != count:
            higher = threshold | (one << bit)
            reaching = 0
            for j in range(columns):
                reaching += magnitudes[j] >= higher
            if reaching >= count:
                threshold = higher
                enough = reaching
            bit -= one

        for j in range(columns):
            out[j] = magnitudes[j] >= threshold
        # Too many may be equal to the threshold: the last of them go.
        j = columns - 1
        while enough > count:
            if magnitudes[j] == threshold:
                out[j] = 0
                enough -= 1
            j -= 1
