"""The table of CoSpaDi's solvers: a row says where a solver is, what it takes and how long it works.

Settings, methods, ``cospadi plan`` and ``cospadi bench solver`` all read it. No torch here: settings are checked with it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cospadi.factorization.work import EIGEN, Work

if TYPE_CHECKING:
    from cospadi.factorization.settings import CoSpaDiConfig
    from cospadi.factorization.solvers.solution import Solution


@dataclass(frozen=True)
class Sizes:
    """Sizes of ``Y ≈ [F D] S``."""

    d_in: int
    d_out: int
    """Columns of all projections that share the dictionary."""
    atoms: int | float
    """Learned atoms, the columns of ``D``."""
    sparsity: int | float
    """Non-zeros per column of ``S``."""
    fixed: int = 0
    """Fixed atoms, the columns of ``F``."""


@dataclass(frozen=True)
class Solver:
    """A solver of ``Y ≈ D S``, a function of the target, the number of atoms and the non-zeros per column."""

    function: str
    """``module:function``; imported on the first call, since torch takes seconds."""
    rounds: int
    """Alternations where ``factorization.n_rounds`` is not set."""
    work: Callable[[CoSpaDiConfig, Sizes, int], Work]
    """Operations of so many rounds, with what comes before the first and after the last."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Further arguments of the function, and the property of `CoSpaDiConfig` that each is given."""
    reports_progress: bool = True
    """Whether it calls ``progress(rounds_done, error)`` after every round."""
    solves_batches: bool = False
    """Whether it takes a stack of targets and returns a list of solutions."""
    needs_whitener: bool = False
    """Whether it also weighs errors in the weights, for which it takes ``whitener=``."""
    within_eigenbasis: bool = False
    """Whether its atoms are at most as many as the shorter side; what they leave of the budget goes to non-zeros."""

    @property
    def solve(self) -> Callable[..., Solution | list[Solution]]:
        return pkgutil.resolve_name(self.function)

    def settings(self, config: CoSpaDiConfig) -> dict[str, object]:
        """Its further arguments, as the settings say."""
        return {argument: getattr(config, setting) for argument, setting in self.arguments.items()}


def _htp_work(config: CoSpaDiConfig, sizes: Sizes, rounds: int) -> Work:
    """Codings over all atoms, the dictionary between them, and the polish at the end (`htp_batch`)."""
    m = sizes.d_in
    n = sizes.d_out
    learned = sizes.atoms
    atoms = learned + sizes.fixed
    coding = 2 * m * atoms**2 + 2 * m * n * atoms + 2 * n * atoms**2 * (2 + config.cg_steps)
    update = 2 * n * atoms * learned + 2 * m * n * learned + learned**3 / 3 + 2 * m * learned**2
    polish = 2 * m * atoms**2 + 2 * m * n * atoms * 3 + 2 * n * atoms**2 * 6
    start = EIGEN * min(m, n) ** 3 if learned else 0.0
    return Work(product=(rounds + 1) * coding + rounds * update + polish, eigen=start)


def _ksvd_work(config: CoSpaDiConfig, sizes: Sizes, rounds: int) -> Work:
    """A round: matching pursuit in full float32, then every atom with the columns that use it, bound by memory."""
    m = sizes.d_in
    n = sizes.d_out
    atoms = sizes.atoms
    sparsity = sizes.sparsity
    pursuit = n * (sparsity**2 * atoms + sparsity**3)  # full float32 is no faster than float64 on a GPU
    users = n * sparsity / atoms
    sweep = atoms * 4 * users * m * (2 * config.power_iterations + 4)
    return Work(product=2 * m * atoms * (n + atoms), double=pursuit, memory=sweep) * rounds


def _orthogonal_work(config: CoSpaDiConfig, sizes: Sizes, rounds: int) -> Work:
    """A round: two products, and the polar factor by an SVD."""
    product = 4 * sizes.d_in * sizes.d_out * sizes.atoms
    return Work(product=product, eigen=EIGEN * sizes.atoms**3) * rounds


SOLVERS = {
    "htp": Solver(
        "cospadi.factorization.solvers.htp:htp_batch",
        rounds=24,
        work=_htp_work,
        arguments={
            "n_rounds": "rounds",
            "balanced": "balanced",
            "first_step": "first_step",
            "last_step": "last_step",
            "cg_steps": "cg_steps",
            "tolerance": "tolerance",
        },
        solves_batches=True,
    ),
    "ksvd": Solver(
        "cospadi.factorization.solvers.ksvd:ksvd",
        rounds=60,  # the paper's
        work=_ksvd_work,
        arguments={"n_rounds": "rounds", "power_iterations": "power_iterations", "seed": "seed"},
    ),
    "orthogonal": Solver(
        "cospadi.factorization.solvers.orthogonal:orthogonal",
        rounds=20,
        work=_orthogonal_work,
        arguments={"n_rounds": "rounds"},
        within_eigenbasis=True,
    ),
    "one_shot": Solver(
        "cospadi.factorization.solvers.one_shot:one_shot",
        rounds=1,
        work=_htp_work,
        reports_progress=False,
        needs_whitener=True,
        within_eigenbasis=True,
    ),
}
"""Every solver by its name, the value of ``factorization.solver``."""
