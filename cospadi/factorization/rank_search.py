"""ASVD's rank search (arXiv:2312.05821, section 3.3): which truncations are accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.models import Projection


def truncated_rank(projection: Projection, kept: float) -> int:
    """``⌊kept · d_in · d_out / (d_in + d_out)⌋``, at least 1; ``kept`` is a fraction of the parameters."""
    return max(int(kept * projection.d_in * projection.d_out / (projection.d_in + projection.d_out) + 1e-9), 1)


def sortable(perplexity: float) -> float:
    """A truncation that breaks the model (not a number) is worse than any other."""
    return float("inf") if math.isnan(perplexity) else perplexity


def smallest_accepted(pairs: Sequence[tuple[float, str, float]]) -> dict[str, float]:
    """The smallest kept fraction among the accepted pairs of each projection."""
    kept: dict[str, float] = {}
    for _, name, fraction in pairs:
        kept[name] = min(fraction, kept.get(name, 1.0))
    return kept


def bits_of(projections: Sequence[Projection], kept: Mapping[str, float]) -> int:
    """Stored bits of all projections; those without a kept fraction stay dense."""
    return sum(
        budget.low_rank_bits(p.d_in, p.d_out, truncated_rank(p, kept[p.name]))
        if p.name in kept
        else budget.dense_bits(p.d_in, p.d_out)
        for p in projections
    )


def fewest_that_fit(
    projections: Sequence[Projection], pairs: Sequence[tuple[float, str, float]], compression_ratio: float
) -> int:
    """Bits fall as more pairs are accepted: bisect for the first count within the budget."""
    allowed = sum(budget.budget_bits(p.d_in, p.d_out, compression_ratio) for p in projections)
    least = bits_of(projections, smallest_accepted(pairs))
    if least > allowed:
        raise UserError(
            f"factorization.rank_search.truncation_ratios cannot reach factorization.compression_ratio="
            f"{compression_ratio:g}: the harshest choice stores {least} bits, {allowed} are allowed. "
            f"Add a truncation ratio of {1 - compression_ratio:g} or less."
        )
    low = 0
    high = len(pairs)
    while low < high:
        middle = (low + high) // 2
        if bits_of(projections, smallest_accepted(pairs[:middle])) <= allowed:
            high = middle
        else:
            low = middle + 1
    return high
