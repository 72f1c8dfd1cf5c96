"""Every method: a settings class in ``config`` and a function here that reads like its paper's algorithm box."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.config import (
    AUTO,
    ASVDConfig,
    BasisSharingConfig,
    CoSpaDiConfig,
    FactorizationConfig,
    SVDConfig,
    SVDLLMConfig,
)
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import STORAGE_DTYPES, Dense, Factors, LowRank, SparseDictionary, rounded, split
from cospadi.factorization.htp import Solution, first_atoms, htp_batch
from cospadi.factorization.ksvd import ksvd
from cospadi.factorization.low_rank import left_singular_vectors, truncated_svd
from cospadi.factorization.one_shot import one_shot
from cospadi.factorization.orthogonal import orthogonal
from cospadi.factorization.shared import mean_whitener, shared_htp
from cospadi.factorization.whitening import unwhiten


@dataclass(frozen=True)
class Problem:
    """One projection and what calibration tells about its inputs."""

    weight: Float[Tensor, "d_in d_out"]
    whitener: Float[Tensor, "d_in d_in"]
    """float64, upper, ``RᵀR = XᵀX``"""
    absolute_mean: Float[Tensor, " d_in"]
    """mean ``|x|`` of every input channel"""
    rank: int | None = None
    """Set by a rank search; ``None``: from the compression ratio."""
    keep_dense: bool = False
    """Set by a rank search that leaves this projection alone."""

    def __post_init__(self) -> None:
        if not torch.isfinite(self.weight).all():
            raise UserError("The weight holds NaN or infinite numbers. Check the checkpoint of model.source.")


@singledispatch
def factorize(config: FactorizationConfig, problem: Problem) -> Factors:
    """Compress one projection by the method that ``config`` stands for.

    Raises:
        UserError: when the budget is too small for this shape or numbers do not fit the storage dtype.
    """
    raise UserError(f"No factorization method is registered for {type(config).__name__}.")


@factorize.register
def svd(config: SVDConfig, problem: Problem) -> Factors:
    """Truncated SVD of the weight."""
    left, right = truncated_svd(problem.weight, _rank(config, problem))
    return LowRank.balanced(left, right, STORAGE_DTYPES[config.storage_dtype])


@factorize.register
def svd_llm(config: SVDLLMConfig, problem: Problem) -> Factors:
    """Truncated SVD of the whitened weight, solved back (SVD-LLM, arXiv:2403.07378, algorithm 1)."""
    target = problem.whitener @ problem.weight.double()
    left, right = truncated_svd(target, _rank(config, problem))
    return LowRank.balanced(unwhiten(problem.whitener, left), right, STORAGE_DTYPES[config.storage_dtype])


@factorize.register
def basis_sharing(config: BasisSharingConfig, problem: Problem) -> Factors:
    """A group of one: `svd_llm`."""
    return factorize_group(config, [problem])[0]


@factorize.register
def asvd(config: ASVDConfig, problem: Problem) -> Factors:
    """Truncated SVD of ``S W`` with ``S = diag(mean|x|^alpha)``, scaled back (ASVD, arXiv:2312.05821, section 3.2)."""
    storage = STORAGE_DTYPES[config.storage_dtype]
    if problem.keep_dense:
        return Dense(rounded(problem.weight, storage))
    scale = problem.absolute_mean.double() ** config.alpha
    scale = scale.clamp_min(float(scale.max()) * 1e-6 or 1.0)  # a channel that is always 0 still has to be undone
    left, right = truncated_svd(scale[:, None] * problem.weight.double(), _rank(config, problem))
    return LowRank.balanced(left / scale[:, None], right, storage)


@factorize.register
def cospadi(config: CoSpaDiConfig, problem: Problem) -> Factors:
    """Sparse dictionary learning on the whitened weight (CoSpaDi, arXiv:2509.22075, algorithm 1)."""
    return next(factorize_all(config, [problem]))


@singledispatch
def factorize_group(config: FactorizationConfig, problems: Sequence[Problem]) -> list[Factors]:
    """Compress projections of equal shape that share a dictionary or a basis, at the bits they may take together.

    Raises:
        UserError: as `factorize`.
    """
    raise UserError(f"{type(config).__name__} shares nothing. Choose another method, or factorization.group_size=1.")


@factorize_group.register
def basis_sharing_group(config: BasisSharingConfig, problems: Sequence[Problem]) -> list[Factors]:
    """Truncated SVD of ``R [W_1 … W_g]``, ``RᵀR`` the summed gram: one basis, private coefficients (arXiv:2410.03765)."""
    joint, g = _side_by_side(problems), len(problems)
    rank = budget.rank(*problems[0].weight.shape, config.compression_ratio, g)
    left, right = truncated_svd(joint.whitener @ joint.weight.double(), rank)
    storage = STORAGE_DTYPES[config.storage_dtype]
    return split(LowRank.balanced(unwhiten(joint.whitener, left), right, storage), g)


@factorize_group.register
def cospadi_group(config: CoSpaDiConfig, problems: Sequence[Problem]) -> list[Factors]:
    """One dictionary under the mean gram (arXiv:2509.22075, eq. 30), or under every projection's own (`shared_htp`)."""
    g, storage, value_bits = len(problems), STORAGE_DTYPES[config.storage_dtype], budget.value_bits(config.accounting)
    if config.metric == "mean":
        joint = _side_by_side(problems)
        target, scale = _whitened(joint)
        (fit,) = _solve(config, [joint], target[None], members=g)
        dictionary, coefficients = unwhiten(joint.whitener, fit.dictionary.double() * scale), fit.coefficients.double()
    else:
        shape, ratio = problems[0].weight.shape, config.compression_ratio
        sizes = budget.atoms_and_sparsity(*shape, ratio, config.rho, config.accounting, members=g)
        whiteners = torch.stack([problem.whitener for problem in problems])
        targets = whiteners @ torch.stack([problem.weight.double() for problem in problems])
        fit = shared_htp(targets.float(), whiteners, *sizes, **_htp_settings(config))
        dictionary, coefficients = fit.dictionary.double(), torch.cat(fit.coefficients, dim=1).double()
    return split(SparseDictionary.normalized(dictionary, coefficients, storage, value_bits), g)


def factorize_groups(config: FactorizationConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """The factors of every group, in their order; those of one alone are its own (`factorize_all`)."""
    for alone, run in itertools.groupby(groups, lambda group: len(group) == 1):
        if alone:
            yield from ([factors] for factors in factorize_all(config, [problem for (problem,) in run]))
        else:
            yield from (factorize_group(config, group) for group in run)


def _side_by_side(problems: Sequence[Problem]) -> Problem:
    """``[W_1 … W_g]`` under the mean gram."""
    return Problem(
        torch.cat([problem.weight for problem in problems], dim=1),
        mean_whitener(torch.stack([problem.whitener for problem in problems])),
        torch.stack([problem.absolute_mean for problem in problems]).mean(dim=0),
    )


def factorize_all(config: FactorizationConfig, problems: Sequence[Problem]) -> Iterator[Factors]:
    """`factorize` for several projections, in their order; `htp` solves those of equal shape on a GPU as one batch."""
    if not isinstance(config, CoSpaDiConfig):
        yield from (factorize(config, problem) for problem in problems)
        return
    for batch in _batches(config, problems):
        targets, scales = zip(*(_whitened(problem) for problem in batch), strict=True)
        for problem, scale, fit in zip(batch, scales, _solve(config, batch, torch.stack(targets)), strict=True):
            yield SparseDictionary.normalized(
                unwhiten(problem.whitener, fit.dictionary.double() * scale),
                fit.coefficients.double(),
                STORAGE_DTYPES[config.storage_dtype],
                budget.value_bits(config.accounting),
            )


def _batches(config: CoSpaDiConfig, problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Runs of projections that are solved together."""

    def together(problem: Problem) -> tuple[Any, ...]:
        batched = config.solver == "htp" and problem.weight.is_cuda
        return (tuple(problem.weight.shape), problem.weight.device) if batched else (id(problem),)

    return (list(run) for _, run in itertools.groupby(problems, together))


def _whitened(problem: Problem) -> tuple[Tensor, Tensor]:
    """``R W`` in float32 with entries near 1, whatever the calibration size, and its scale."""
    target = problem.whitener @ problem.weight.double()
    scale = target.norm() / target.numel() ** 0.5
    scale = torch.where(scale > 0, scale, 1.0)
    return (target / scale).float(), scale


def _solve(
    config: CoSpaDiConfig, batch: Sequence[Problem], targets: Float[Tensor, "batch d_in d_out"], members: int = 1
) -> list[Any]:
    """A solution of every target, at the bits of ``members`` projections side by side in each."""
    _, d_in, d_out = targets.shape
    shape = d_in, d_out // members, config.compression_ratio
    if config.solver == "htp" and config.rho == AUTO:
        return _search_rho(config, targets, members)
    atoms, sparsity = budget.atoms_and_sparsity(*shape, config.rho, config.accounting, members)
    if config.solver == "htp":
        return htp_batch(targets, atoms, sparsity, **_htp_settings(config))
    (problem,), target = batch, targets[0]
    if config.solver == "ksvd":
        return [ksvd(target, atoms, sparsity, config.n_rounds or 60, config.power_iterations, config.seed)]
    atoms, sparsity = budget.within_eigenbasis(*shape, atoms, sparsity, config.accounting, members)
    if config.solver == "orthogonal":
        return [orthogonal(target, atoms, sparsity, config.n_rounds or 20)]
    return [one_shot(target, atoms, sparsity, problem.whitener)]


def _htp_settings(config: CoSpaDiConfig) -> dict[str, Any]:
    return {
        "n_rounds": config.n_rounds or 24,
        "first_step": config.first_step,
        "last_step": config.last_step,
        "cg_steps": config.cg_steps,
        "tolerance": config.tolerance,
    }


RHO_CANDIDATES = (2.0, 2.5, 3.0, 3.5)
PROBE_ROUNDS = 6
"""Enough to tell which of the candidates ends lowest, to about a percent of the error."""


def _search_rho(config: CoSpaDiConfig, targets: Float[Tensor, "batch d_in d_out"], members: int = 1) -> list[Solution]:
    """A short run at equal bytes of every candidate, then a full one of each matrix' best; one eigenbasis for all.

    Nothing else is worth reusing: a dictionary fitted at a neighbouring rho is a worse start than the eigenbasis
    (docs/solver-log.md).
    """
    _, d_in, d_out = targets.shape
    basis = left_singular_vectors(targets, min(d_in, d_out))
    settings = _htp_settings(config)
    errors, sizes = [], []
    for rho in RHO_CANDIDATES:
        try:
            atoms, sparsity = budget.atoms_and_sparsity(
                d_in, d_out // members, config.compression_ratio, rho, members=members
            )
        except UserError:  # no room for one atom and one non-zero at this rho
            if not sizes and rho == RHO_CANDIDATES[-1]:
                raise
            continue
        sizes.append((atoms, sparsity))
        start = first_atoms(targets, atoms, sparsity, basis)
        probe = htp_batch(targets, atoms, sparsity, **settings | {"n_rounds": PROBE_ROUNDS}, start=start)
        errors.append([solution.errors[-1] for solution in probe])
        del probe, start
    chosen = torch.tensor(errors).argmin(dim=0).tolist()
    solutions: dict[int, Solution] = {}
    for candidate in sorted(set(chosen)):
        members = [i for i, choice in enumerate(chosen) if choice == candidate]
        start = first_atoms(targets[members], *sizes[candidate], basis[members])
        found = htp_batch(targets[members], *sizes[candidate], **settings, start=start)
        solutions |= dict(zip(members, found, strict=True))
    return [solutions[i] for i in range(len(targets))]


def _rank(config: FactorizationConfig, problem: Problem) -> int:
    return problem.rank or budget.rank(*problem.weight.shape, config.compression_ratio)
