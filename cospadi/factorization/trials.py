"""What a projection would lose at some ratios, found by solving it roughly at each."""

from __future__ import annotations

from dataclasses import replace

from cospadi.factorization.allocation import TRIED
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import CoSpaDiConfig


def tried(config: CoSpaDiConfig, problem: Problem) -> dict[float, float]:
    """Expected loss, in nats per token, of a projection at every ratio of `TRIED`; empty where nothing is known of it."""
    losses: dict[float, float] = {}
    if problem.columns is None:
        return losses
    for ratio in TRIED:
        factors = factorize(replace(config.rough, compression_ratio=ratio), problem)
        losses[ratio] = problem.expected_loss(factors.weight())
    return losses
