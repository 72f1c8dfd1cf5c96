"""Who solves: every solver under one signature, and plain orthogonal matching pursuit beside scikit-learn's."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.bench.problems import Problem
from cospadi.devices import synchronize
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.solvers.htp import htp
from cospadi.factorization.solvers.ksvd import ksvd
from cospadi.factorization.solvers.one_shot import one_shot
from cospadi.factorization.solvers.orthogonal import orthogonal
from cospadi.factorization.solvers.sparse_coding import sparse_code

Heard = Callable[[int, float], None]
"""``progress(rounds_done, error)``"""
Factors = tuple[Float[Tensor, "d_in atoms"], Float[Tensor, "atoms d_out"]]
OMP = "sklearn_omp"
"""No solver of its own: a comparison of one sparse coding, made once."""
OMP_SPARSITY = 200


@dataclass(frozen=True)
class Settings:
    """What the K-SVD solvers are told; all others run with their own defaults."""

    rounds: int
    seed: int


def _htp(problem: Problem, settings: Settings, progress: Heard) -> Factors:
    return _factors(htp(problem.target, problem.atoms, problem.sparsity, progress=progress))


def _ksvd(problem: Problem, settings: Settings, progress: Heard, compiled: bool = True) -> Factors:
    told = {"n_rounds": settings.rounds, "seed": settings.seed, "progress": progress, "compiled": compiled}
    return _factors(ksvd(problem.target, problem.atoms, problem.sparsity, **told))


def _one_shot(problem: Problem, settings: Settings, progress: Heard) -> Factors:
    return _factors(one_shot(problem.target, problem.atoms, problem.sparsity))


def _orthogonal(problem: Problem, settings: Settings, progress: Heard) -> Factors:
    return _factors(orthogonal(problem.target, problem.atoms, problem.sparsity, progress=progress))


SOLVERS: dict[str, Callable[[Problem, Settings, Heard], Factors]] = {
    "htp": _htp,
    "ksvd": _ksvd,
    "ksvd_plain": partial(_ksvd, compiled=False),
    "one_shot": _one_shot,
    "orthogonal": _orthogonal,
}
EXPECTED = {"htp": 6.0, "ksvd": 20.0, "ksvd_plain": 100.0, "orthogonal": 10.0}
"""Seconds with all repeats, those of one run of ``htp`` being 1: for the time left and nothing else."""


def named(names: Sequence[str]) -> list[str]:
    """The names themselves, once each.

    Raises:
        UserError: when one is unknown, or scikit-learn is asked for and missing.
    """
    known = [*SOLVERS, OMP]
    for name in names:
        if name not in known:
            raise UserError(f"--solvers {name} does not exist. Choose from {', '.join(known)}.")
    if OMP in names and importlib.util.find_spec("sklearn") is None:
        raise UserError(f"--solvers {OMP} needs scikit-learn. Install it, or leave {OMP} out.")
    return list(dict.fromkeys(names))


def suited(solver: str, problem: Problem) -> Problem:
    """The problem as the pipeline gives it to this solver: an eigenbasis has no more atoms, the rest goes to values."""
    if solver not in ("orthogonal", "one_shot"):
        return problem
    shape = problem.d_in, problem.d_out, problem.ratio
    atoms, sparsity = budget.within_eigenbasis(*shape, problem.atoms, problem.sparsity)
    return replace(problem, atoms=atoms, sparsity=sparsity)


@dataclass(frozen=True)
class Timed:
    """One run."""

    seconds: float
    rounds: int
    curve: list[tuple[float, float]]
    """``(seconds since the start, error)`` after every round and of what is returned."""
    output_error: float


def timed(solver: str, problem: Problem, settings: Settings) -> Timed:
    """Run a solver once; the error it ends with is computed here, in float64, the same way for all."""
    curve: list[tuple[float, float]] = []
    rounds = 1
    device = problem.target.device

    def heard(done: int, error: float) -> None:
        nonlocal rounds
        rounds = max(rounds, done)
        curve.append((time.perf_counter() - started, float(error)))

    synchronize(device)
    started = time.perf_counter()
    factors = SOLVERS[solver](problem, settings, heard)
    synchronize(device)
    seconds = time.perf_counter() - started
    error = output_error(problem.target, *factors)
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


def omp_codings(problem: Problem, dictionary: Float[Tensor, "d_in atoms"]) -> dict[str, Coding]:
    """The same columns coded by scikit-learn (on the CPU) and by `sparse_code`, the Gram's time included in both."""
    from sklearn.linear_model import orthogonal_mp_gram

    def theirs() -> Tensor:
        atoms, columns = dictionary.cpu().numpy(), problem.target.cpu().numpy()
        with (
            _blas_threads(),
            warnings.catch_warnings(action="ignore"),
        ):  # that it stopped early, as ours does in silence
            found = orthogonal_mp_gram(atoms.T @ atoms, atoms.T @ columns, n_nonzero_coefs=problem.sparsity)
        return torch.from_numpy(found).to(problem.target)

    def ours() -> Tensor:
        return sparse_code(dictionary, problem.target, problem.sparsity)

    found = {}
    for name, code in ((OMP, theirs), ("sparse_code", ours)):
        synchronize(problem.target.device)
        started = time.perf_counter()
        coefficients = code()
        synchronize(problem.target.device)
        found[name] = Coding(time.perf_counter() - started, coefficients)
    return found


@contextmanager
def _blas_threads() -> Iterator[None]:
    """As many threads for numpy as torch has."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    with threadpool_limits(torch.get_num_threads()):
        yield


def _factors(fit: Any) -> Factors:
    return fit.dictionary, fit.coefficients
