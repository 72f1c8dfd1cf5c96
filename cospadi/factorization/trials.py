"""What a projection would lose at some ratios, found by solving it roughly at each."""

from __future__ import annotations

from dataclasses import replace

from cospadi.factorization.allocation import TRIED
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import IDENTITY, UNIFORM, CoSpaDiConfig

ROUNDS = 1
CG_STEPS = 3
"""Of a trial: losses of projections are compared with each other, and all end about as much too high."""


def tried(config: CoSpaDiConfig, problem: Problem) -> dict[float, float]:
    """Expected loss, in nats per token, of a projection at every ratio of `TRIED`."""
    trial = _rough(config)
    losses = {}
    for ratio in TRIED:
        factors = factorize(replace(trial, compression_ratio=ratio), problem)
        losses[ratio] = problem.expected_loss(factors.weight())
    return losses


def _rough(config: CoSpaDiConfig) -> CoSpaDiConfig:
    """The same method for `ROUNDS` rounds, without learned atoms beside the identity's."""
    learned = {"learned_atoms": 0} if config.fixed_atoms == IDENTITY else {}
    return replace(config, n_rounds=ROUNDS, cg_steps=CG_STEPS, allocation=UNIFORM, **learned)
