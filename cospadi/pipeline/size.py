"""``cospadi compress MODEL OUT --size 200MB``: the ratio with which the files of weights have some size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from cospadi.errors import UserError
from cospadi.experts import names_experts
from cospadi.factorization.allocation import HIGHEST, LOWEST
from cospadi.factorization.budget import DENSE_BITS
from cospadi.factorization.settings import PlainConfig
from cospadi.models import Checkpoint, Projection, unread_tensors
from cospadi.pipeline.compress_plan import quantized_bytes
from cospadi.settings import Config

HEADER = 120
"""Bytes that the header of a file takes for a tensor, beside twice its name: dtype, shape, place and checksum, rounded up."""
TENSORS = 5
"""Tensors that a compressed projection is stored as, at most."""
MILDEST = 0.01
HARSHEST = 0.95
"""Ratios that a size may ask of a method that allocates nothing."""
BISECTIONS = 40


def require_free_ratio(config: Config) -> None:
    """
    Raises:
        UserError: the method removes one fraction of the bits and no other, so it has one size.
    """
    method = config.factorization
    if isinstance(method, PlainConfig) or getattr(method, "pattern", None):
        raise UserError(
            f"--size chooses a ratio, and {method.name} has one alone, so its size follows from it. Leave --size out, or choose another "
            "--method."
        )


def ratio_of_size(
    config: Config, model: Path, projections: Sequence[Projection], size: int, dtype: str | None = None
) -> float:
    """The lowest compression ratio with which the weights of the checkpoint take ``size`` bytes at most.

    The 16-bit factors of a ratio are at most that part of the dense 16-bit projections, to the bit. What a quantization makes of them
    is an estimate (`quantized_bytes`).

    Args:
        config: method and quantization.
        model: the dense checkpoint.
        projections: those that are compressed.
        size: of the files of weights.
        dtype: of embeddings, norms and head; by default their own.

    Raises:
        UserError: when the size is more than these methods leave, or less than they can reach; the sentence says where the bounds are.
    """
    others = other_bytes(model, projections, dtype)
    weights = sum(p.d_in * p.d_out for p in projections)

    def bytes_at(ratio: float) -> int | float:
        return others + quantized_bytes(config, (1 - ratio) * weights * DENSE_BITS / 8, weights)

    low, high = (LOWEST, HIGHEST) if config.factorization.allocates else (MILDEST, HARSHEST)
    largest, smallest = bytes_at(low), bytes_at(high)
    if size >= largest:
        raise UserError(
            f"--size {_megabytes(size)} is more than is left when {low:.0%} of the projections' bits are removed, {_megabytes(largest)}. "
            "Ask for less."
        )
    if size < smallest:
        advice = [f"Ask for {_megabytes(smallest, up=True)} or more"]
        if not config.quantization.changes and getattr(config.factorization, "accounting", "mask") == "mask":
            advice.append("store the factors in fewer bits (--quantize int4)")
        if other_bytes(model, projections, "bfloat16") < others:
            advice.append("store the embeddings in 16 bits (--dtype bfloat16)")
        raise UserError(
            f"--size {_megabytes(size)} cannot be reached: embeddings, norms and head take {_megabytes(others)}, and the projections "
            f"{_megabytes(smallest - others)} with {high:.0%} of their bits removed. {', or '.join(advice)}."
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if bytes_at(middle) > size else (low, middle)
    return math.ceil(high * 1e5) / 1e5


def other_bytes(model: Path, projections: Sequence[Projection], dtype: str | None = None) -> int:
    """Bytes of all that is not compressed, in the files of the checkpoint that `cospadi.checkpoint.write` makes."""
    checkpoint = Checkpoint(model)
    left_out = {f"{p.name}.weight" for p in projections} | set(unread_tensors(model))
    names = checkpoint.names_apart if names_experts(p.projection for p in projections) else checkpoint.names
    kept = [name for name in names if name not in left_out]
    headers = sum(HEADER + 2 * len(name) for name in kept)
    headers += sum(TENSORS * (HEADER + 2 * len(f"{p.name}.dictionary_scales")) for p in projections)
    return sum(checkpoint.n_bytes(name, dtype) for name in kept) + headers


def _megabytes(size: int | float, up: bool = False) -> str:
    """
    >>> _megabytes(123_440_000), _megabytes(123_440_000, up=True)
    ('123.4MB', '123.5MB')
    """
    tenths = math.ceil(size / 1e5) if up else round(size / 1e5)
    return f"{tenths / 10:.1f}MB"
