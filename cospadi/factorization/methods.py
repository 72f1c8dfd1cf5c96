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
    IDENTITY,
    ASVDConfig,
    BasisSharingConfig,
    CoSpaDiConfig,
    FactorizationConfig,
    MagnitudeConfig,
    OATSConfig,
    PlainConfig,
    PruningConfig,
    SparseGPTConfig,
    SVDConfig,
    SVDLLMConfig,
    WandaConfig,
)
from cospadi.errors import UserError
from cospadi.factorization import budget, pruning, search
from cospadi.factorization.factors import (
    STORAGE_DTYPES,
    Dense,
    Factors,
    LowRank,
    SparseDictionary,
    SparsePlusLowRank,
    rounded,
    split,
)
from cospadi.factorization.htp import htp_batch
from cospadi.factorization.ksvd import ksvd
from cospadi.factorization.low_rank import truncated_svd
from cospadi.factorization.oats import sparse_plus_low_rank
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

    @property
    def input_norms(self) -> Float[Tensor, " d_in"]:
        """``‖x_i‖₂`` of every input channel over the calibration tokens: the roots of the gram's diagonal."""
        return self.whitener.norm(dim=0)


@singledispatch
def factorize(config: FactorizationConfig, problem: Problem) -> Factors:
    """Compress one projection by the method that ``config`` stands for.

    Raises:
        UserError: when the budget is too small for this shape or numbers do not fit the storage dtype.
    """
    raise UserError(f"No factorization method is registered for {type(config).__name__}.")


@factorize.register
def plain(config: PlainConfig, problem: Problem) -> Factors:
    """Every weight in 16 bits."""
    return Dense(rounded(problem.weight, STORAGE_DTYPES[config.storage_dtype]))


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
def magnitude(config: MagnitudeConfig, problem: Problem) -> Factors:
    """The largest weights of the whole matrix."""
    nonzeros = budget.nonzeros(*problem.weight.shape, config.compression_ratio)
    sparse = pruning.keep_largest(problem.weight, nonzeros)
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


@factorize.register
def wanda(config: WandaConfig, problem: Problem) -> Factors:
    """The weights of every output that are largest times the norm of their input (Wanda, arXiv:2306.11695)."""
    nonzeros = _pattern_nonzeros(config, problem) or budget.nonzeros_per_output(
        *problem.weight.shape, config.compression_ratio
    )
    sparse = pruning.wanda(problem.weight.double(), problem.input_norms, nonzeros, config.kept_of_group)
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


@factorize.register
def sparsegpt(config: SparseGPTConfig, problem: Problem) -> Factors:
    """Prune input by input, the inputs that follow making up for it (SparseGPT, arXiv:2301.00774, algorithm 1)."""
    nonzeros = _pattern_nonzeros(config, problem) or budget.nonzeros(*problem.weight.shape, config.compression_ratio)
    gram = problem.whitener.T @ problem.whitener
    settings = config.kept_of_group, config.block_size, config.damping
    sparse = pruning.sparsegpt(problem.weight.double(), gram, nonzeros, *settings)
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


def _pattern_nonzeros(config: PruningConfig, problem: Problem) -> int | None:
    """Non-zeros per output by the pattern, known to fit; ``None`` without one."""
    if config.kept_of_group is None:
        return None
    return budget.pattern_nonzeros(*problem.weight.shape, config.compression_ratio, *config.kept_of_group)


@factorize.register
def oats(config: OATSConfig, problem: Problem) -> Factors:
    """``D W ≈ sparse + low rank`` with ``D = diag(‖x_i‖)``, ``D`` undone (OATS, arXiv:2409.13652, algorithm 2)."""
    storage = STORAGE_DTYPES[config.storage_dtype]
    sizes = budget.rank_and_nonzeros(*problem.weight.shape, config.compression_ratio, config.rank_ratio)
    loudness = problem.input_norms[:, None]
    target, scale = _unit_scale(loudness * problem.weight.double())
    sparse, left, right = sparse_plus_low_rank(target, *sizes, config.n_rounds)
    undo = scale / loudness
    return SparsePlusLowRank(
        SparseDictionary.of_sparse_weight(sparse * undo, storage),
        LowRank.balanced(left * undo, right.double(), storage),
    )


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
    identity = config.fixed_atoms == IDENTITY
    if config.metric == "mean":
        joint = _side_by_side(problems)
        target, scale = _whitened(joint)
        (fit,) = _solve(config, [joint], target[None], [scale], members=g)
        dictionary, coefficients = unwhiten(joint.whitener, fit.dictionary.double() * scale), fit.coefficients.double()
    else:
        weights = torch.stack([problem.weight.double() for problem in problems])
        whiteners = torch.stack([problem.whitener for problem in problems])
        sizes, settings = _sizes_of_group(config, weights), _htp_settings(config)
        if identity:
            settings |= {"identity": True, "fixed_codes": weights.mT.float()}
        fit = shared_htp((whiteners @ weights).float(), whiteners, *sizes, **settings)
        dictionary, coefficients = fit.dictionary.double(), torch.cat(fit.coefficients, dim=1).double()
    return split(SparseDictionary.normalized(dictionary, coefficients, storage, value_bits, identity), g)


def _sizes_of_group(config: CoSpaDiConfig, weights: Float[Tensor, "g d_in d_out"]) -> tuple[int, int | float]:
    """Atoms that a group shares, and non-zeros per column."""
    g, d_in, d_out = weights.shape
    if config.fixed_atoms != IDENTITY:
        return budget.atoms_and_sparsity(d_in, d_out, config.compression_ratio, config.rho, config.accounting, g)
    return search.size_beside_identity(d_in, d_out, config.compression_ratio, config.learned_atoms, g)


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
        for problem, scale, fit in zip(batch, scales, _solve(config, batch, torch.stack(targets), scales), strict=True):
            yield SparseDictionary.normalized(
                unwhiten(problem.whitener, fit.dictionary.double() * scale),
                fit.coefficients.double(),
                STORAGE_DTYPES[config.storage_dtype],
                budget.value_bits(config.accounting),
                identity=config.fixed_atoms == IDENTITY,
            )


def _batches(config: CoSpaDiConfig, problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Runs of projections that are solved together."""

    def together(problem: Problem) -> tuple[Any, ...]:
        batched = config.solver == "htp" and problem.weight.is_cuda
        return (tuple(problem.weight.shape), problem.weight.device) if batched else (id(problem),)

    return (list(run) for _, run in itertools.groupby(problems, together))


def _whitened(problem: Problem) -> tuple[Tensor, Tensor]:
    """``R W`` in float32 with entries near 1, whatever the calibration size, and its scale."""
    return _unit_scale(problem.whitener @ problem.weight.double())


def _unit_scale(target: Tensor) -> tuple[Tensor, Tensor]:
    """``target`` in float32 with a root mean square of 1, and that of before."""
    scale = target.norm() / target.numel() ** 0.5
    scale = torch.where(scale > 0, scale, 1.0)
    return (target / scale).float(), scale


def _solve(
    config: CoSpaDiConfig,
    batch: Sequence[Problem],
    targets: Float[Tensor, "batch d_in d_out"],
    scales: Sequence[Tensor],
    members: int = 1,
) -> list[Any]:
    """A solution of every target, at the bits of ``members`` projections side by side in each.

    ``targets`` are the whitened weights of ``batch`` over ``scales``.
    """
    _, d_in, d_out = targets.shape
    shape = d_in, d_out // members, config.compression_ratio
    if config.fixed_atoms == IDENTITY:
        return search.beside_identity(
            targets,
            torch.stack([(problem.whitener / scale).float() for problem, scale in zip(batch, scales, strict=True)]),
            torch.stack([problem.weight.float() for problem in batch]),
            config.compression_ratio,
            search.LEARNED if config.learned_atoms == AUTO else [config.learned_atoms],
            _htp_settings(config),
            members,
        )
    if config.solver == "htp" and config.rho == AUTO:
        return search.learned_only(targets, config.compression_ratio, _htp_settings(config), members)
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
        "balanced": config.support == "column",
        "first_step": config.first_step,
        "last_step": config.last_step,
        "cg_steps": config.cg_steps,
        "tolerance": config.tolerance,
    }


def _rank(config: FactorizationConfig, problem: Problem) -> int:
    return problem.rank or budget.rank(*problem.weight.shape, config.compression_ratio)
