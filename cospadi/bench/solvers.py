"""Who solves: every solver under one signature, and plain orthogonal matching pursuit beside scikit-learn's."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.bench.cases import Case
from cospadi.devices import synchronize
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.settings import CoSpaDiConfig
from cospadi.factorization.solver_table import SOLVERS, Sizes, Solver
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import sparse_code
from cospadi.factorization.work import ONE_CORE

Progress = Callable[[int, float], None]
"""``progress(rounds_done, error)``"""
OMP = "sklearn_omp"
"""Not a solver: a comparison of one sparse coding, made once."""
OMP_SPARSITY = 200
PLAIN_SLOWDOWN = 5.0
"""How many times longer ``ksvd_plain`` takes than ``ksvd``, for the time left and nothing else."""


@dataclass(frozen=True)
class Settings:
    """Settings of the K-SVD solvers; all others run with their own defaults."""

    rounds: int
    seed: int


def _solve(solver: Solver, case: Case, settings: Settings, progress: Progress) -> Solution:
    reports = {"progress": progress} if solver.reports_progress else {}
    if solver.solves_batches:
        (fit,) = solver.solve(case.target[None], case.atoms, case.sparsity, **reports)
        return fit
    return solver.solve(case.target, case.atoms, case.sparsity, **reports)


def _ksvd(case: Case, settings: Settings, progress: Progress, compiled: bool = True) -> Solution:
    return SOLVERS["ksvd"].solve(
        case.target,
        case.atoms,
        case.sparsity,
        n_rounds=settings.rounds,
        seed=settings.seed,
        progress=progress,
        compiled=compiled,
    )


MEASURED: dict[str, Callable[[Case, Settings, Progress], Solution]] = {
    **{name: partial(_solve, solver) for name, solver in SOLVERS.items()},
    "ksvd": _ksvd,
    "ksvd_plain": partial(_ksvd, compiled=False),
}
"""Every solver under one signature; ``ksvd_plain`` is what a GPU runs, in plain torch."""


def _row_of(name: str) -> Solver:
    """The row of the table behind a name of `MEASURED`."""
    return SOLVERS[name.removesuffix("_plain")]


def expected_seconds(name: str, case: Case, settings: Settings) -> float:
    """Seconds of a run on one core, roughly: for the time left and nothing else."""
    solver = _row_of(name)
    rounds = settings.rounds if name.startswith("ksvd") else solver.rounds
    sizes = Sizes(case.d_in, case.d_out, case.atoms, case.sparsity)
    seconds = solver.work(CoSpaDiConfig(name=name, title=name), sizes, rounds).seconds(ONE_CORE)
    return seconds * (PLAIN_SLOWDOWN if name == "ksvd_plain" else 1.0)


def named(names: Sequence[str]) -> list[str]:
    """The names themselves, once each.

    Raises:
        UserError: when one is unknown, or scikit-learn is asked for and missing.
    """
    solvers = [*MEASURED, OMP]
    for name in names:
        if name not in solvers:
            raise UserError(f"--solvers {name} does not exist. Choose from {', '.join(solvers)}.")
    if OMP in names and importlib.util.find_spec("sklearn") is None:
        raise UserError(f"--solvers {OMP} needs scikit-learn. Install it, or leave {OMP} out.")
    return list(dict.fromkeys(names))


def suited(name: str, case: Case) -> Case:
    """The case as the pipeline gives it to this solver: an eigenbasis has no more atoms, the rest goes to values."""
    if not _row_of(name).within_eigenbasis:
        return case
    atoms, sparsity = budget.within_eigenbasis(case.d_in, case.d_out, case.ratio, case.atoms, case.sparsity)
    return replace(case, atoms=atoms, sparsity=sparsity)


@dataclass(frozen=True)
class Timed:
    """One run."""

    seconds: float
    rounds: int
    curve: list[tuple[float, float]]
    """``(seconds since the start, error)`` after every round and of what is returned."""
    output_error: float


def timed(name: str, case: Case, settings: Settings) -> Timed:
    """Run a solver once; the error it ends with is computed here, in float64, the same way for all."""
    curve: list[tuple[float, float]] = []
    rounds = 1
    device = case.target.device

    def progress(done: int, error: float) -> None:
        nonlocal rounds
        rounds = max(rounds, done)
        curve.append((time.perf_counter() - started, float(error)))

    synchronize(device)
    started = time.perf_counter()
    fit = MEASURED[name](case, settings, progress)
    synchronize(device)
    seconds = time.perf_counter() - started
    error = output_error(case.target, fit.dictionary, fit.coefficients)
    return Timed(seconds, rounds, [*curve, (seconds, error)], error)


def output_error(
    target: Float[Tensor, "d_in d_out"],
    dictionary: Float[Tensor, "d_in atoms"],
    coefficients: Float[Tensor, "atoms d_out"],
) -> float:
    """``‖Y − D S‖_F / ‖Y‖_F`` in float64."""
    target = target.double()
    return float((target - dictionary.double() @ coefficients.double()).norm() / target.norm())


@dataclass(frozen=True)
class Coding:
    """One sparse coding by orthogonal matching pursuit."""

    seconds: float
    coefficients: Float[Tensor, "atoms d_out"]


def omp_codings(case: Case, dictionary: Float[Tensor, "d_in atoms"]) -> dict[str, Coding]:
    """The same columns coded by scikit-learn (on the CPU) and by `sparse_code`, the Gram's time included in both."""
    from sklearn.linear_model import orthogonal_mp_gram  # a package of the dev extra

    def theirs() -> Tensor:
        atoms = dictionary.cpu().numpy()
        columns = case.target.cpu().numpy()
        # It warns where it stops early, which `sparse_code` does in silence.
        with _blas_threads(), warnings.catch_warnings(action="ignore"):
            codes = orthogonal_mp_gram(atoms.T @ atoms, atoms.T @ columns, n_nonzero_coefs=case.sparsity)
        return torch.from_numpy(codes).to(case.target)

    def ours() -> Tensor:
        return sparse_code(dictionary, case.target, case.sparsity)

    codings = {}
    for name, code in ((OMP, theirs), ("sparse_code", ours)):
        synchronize(case.target.device)
        started = time.perf_counter()
        coefficients = code()
        synchronize(case.target.device)
        codings[name] = Coding(time.perf_counter() - started, coefficients)
    return codings


@contextmanager
def _blas_threads() -> Iterator[None]:
    """As many threads for numpy as torch has."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(torch.get_num_threads()):
        yield
