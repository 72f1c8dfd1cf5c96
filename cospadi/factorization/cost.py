"""The work of every method: operations counted from shapes and settings, for ``cospadi plan``."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from cospadi.errors import AUTO, UserError
from cospadi.factorization import budget
from cospadi.factorization.allocation import TRIED
from cospadi.factorization.settings import (
    IDENTITY,
    LEARNED_FRACTIONS,
    OWN_ROUNDS,
    PROBE_ROUNDS,
    RHOS,
    ASVDConfig,
    BasisSharingConfig,
    CoSpaDiConfig,
    FactorizationConfig,
    MagnitudeConfig,
    OATSConfig,
    PlainConfig,
    SparseGPTConfig,
    SVDConfig,
    SVDLLMConfig,
    WandaConfig,
    probe_step,
)
from cospadi.factorization.solver_table import SOLVERS, Sizes
from cospadi.factorization.work import EIGEN, Work

TYPICAL_FRACTION = 1 / 8
"""Learned atoms beside identity atoms, as a fraction of the shorter side, where several are tried: the middle one."""
TYPICAL_RHO = 3.0
"""Atoms per non-zero where several are tried."""


def factorize(config: FactorizationConfig, d_in: int, d_out: int, members: int = 1) -> Work:
    """The work of a group of ``members`` projections of one shape that share a dictionary, from gram to record.

    Every method has the whitener (a Cholesky factor), the whitened weight and the error afterwards.

    Raises:
        UserError: nobody has counted the work of this method.
    """
    common = Work(double=d_in**3 / 3 + 4 * d_in**2 * d_out) * members
    return common + own_work(config, d_in, d_out, members)


@singledispatch
def own_work(config: FactorizationConfig, d_in: int, d_out: int, members: int) -> Work:
    """The work of the method itself, beside what all methods do.

    Raises:
        UserError: nobody has counted the work of this method.
    """
    raise UserError(
        f"Nothing is known about the work of {type(config).__name__}. "
        "Register a function for it with cospadi.factorization.cost.own_work."
    )


@own_work.register
def nothing_more(config: PlainConfig | MagnitudeConfig | WandaConfig, d_in: int, d_out: int, members: int) -> Work:
    """One pass over the weight, next to nothing beside its error."""
    return Work()


@own_work.register
def low_rank(
    config: SVDConfig | SVDLLMConfig | ASVDConfig | BasisSharingConfig, d_in: int, d_out: int, members: int
) -> Work:
    """The eigendecomposition of a gram, and products with its leading vectors."""
    m = d_in
    n = members * d_out
    rank = m * n / (m + n)
    short = min(m, n)
    return Work(double=2 * m * n * short + 2 * m * n * rank + m**2 * rank, eigen=EIGEN * short**3)


@own_work.register
def sparsegpt(config: SparseGPTConfig, d_in: int, d_out: int, members: int) -> Work:
    """Updates in small blocks, at half the speed of large products."""
    n = members * d_out
    return Work(double=4 * d_in**3 + 4 * d_in**2 * n)


@own_work.register
def oats(config: OATSConfig, d_in: int, d_out: int, members: int) -> Work:
    """Narrow products and QR, at a third of the speed of large products."""
    m = d_in
    n = members * d_out
    rank = config.rank_ratio * (1 - config.compression_ratio) * m * n / (m + n)
    return Work(product=config.n_rounds * 3 * 6 * m * n * rank)


@own_work.register
def cospadi(config: CoSpaDiConfig, d_in: int, d_out: int, members: int) -> Work:
    """The solver's rounds, the trials of its sizes, and the dictionary whitened back."""
    if config.fixed_atoms == IDENTITY:
        return _beside_identity(config, d_in, members * d_out)
    rho = TYPICAL_RHO if config.rho == AUTO else float(config.rho)
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, config.compression_ratio, rho, config.accounting, members)
    sizes = Sizes(d_in, members * d_out, atoms, sparsity)
    solver = SOLVERS[config.solver]
    work = Work(double=d_in**2 * atoms) + solver.work(config, sizes, config.rounds)
    if config.rho == AUTO:
        work += solver.work(config, sizes, PROBE_ROUNDS) * len(RHOS)
    if members > 1 and config.metric == "own":
        work += solver.work(config, sizes, OWN_ROUNDS)
        work += Work(double=12 * OWN_ROUNDS * members * d_in**2 * atoms)
    return work


def trials(config: CoSpaDiConfig, d_in: int, d_out: int) -> Work:
    """One projection solved roughly at every ratio that an allocation tries, with its whitener and the errors."""
    common = Work(double=d_in**3 / 3 + (2 + 2 * len(TRIED)) * d_in**2 * d_out)
    return common + own_work(config.rough, d_in, d_out, 1) * len(TRIED)


def _beside_identity(config: CoSpaDiConfig, d_in: int, d_out: int) -> Work:
    """Identity atoms alone in a third of the rounds, trials of learned ones beside them, and the best to the end."""
    work = SOLVERS[config.solver].work
    identity_alone = Sizes(d_in, d_out, 0, 0, fixed=d_in)
    first = work(config, identity_alone, max(1, config.rounds // 3))
    if config.learned_atoms == 0:
        return first
    tried = config.learned_atoms == AUTO
    fraction = TYPICAL_FRACTION if tried else float(config.learned_atoms)
    beside = Sizes(d_in, d_out, fraction * min(d_in, d_out), 0, fixed=d_in)
    trials = len(LEARNED_FRACTIONS) - 1 if tried else 0
    probed = replace(beside, d_out=len(range(0, d_out, probe_step(d_out))))
    return first + work(config, probed, PROBE_ROUNDS) * trials + work(config, beside, config.rounds)
