"""Every method: a settings class in ``settings`` and a function here that reads like its paper's algorithm box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.dictionary_learning import batches, htp_settings, sizes_of_group, solve, whitened
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
from cospadi.factorization.problem import Problem, side_by_side, unit_scale
from cospadi.factorization.settings import (
    IDENTITY,
    OWN_ROUNDS,
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
from cospadi.factorization.solvers import pruning
from cospadi.factorization.solvers.low_rank import truncated_svd
from cospadi.factorization.solvers.oats import sparse_plus_low_rank
from cospadi.factorization.solvers.shared import shared_htp
from cospadi.factorization.solvers.whitening import unwhiten


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
    target, scale = unit_scale(loudness * problem.weight.double())
    sparse, left, right = sparse_plus_low_rank(target, *sizes, config.n_rounds)
    undo = scale / loudness
    return SparsePlusLowRank(
        SparseDictionary.of_sparse_weight(sparse * undo, storage),
        LowRank.balanced(left * undo, right.double(), storage),
    )


@factorize.register
def cospadi(config: CoSpaDiConfig, problem: Problem) -> Factors:
    """Sparse dictionary learning on the whitened weight (CoSpaDi, arXiv:2509.22075, algorithm 1)."""
    return next(_dictionaries(config, [problem]))


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
    joint, g = side_by_side(problems), len(problems)
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
        joint = side_by_side(problems)
        target, scale = whitened(joint)
        (fit,) = solve(config, [joint], target[None], [scale], members=g)
        dictionary, coefficients = unwhiten(joint.whitener, fit.dictionary.double() * scale), fit.coefficients.double()
    else:
        weights = torch.stack([problem.weight.double() for problem in problems])
        whiteners = torch.stack([problem.whitener for problem in problems])
        sizes, settings = sizes_of_group(config, weights), htp_settings(config)
        if identity:
            settings |= {"identity": True, "fixed_codes": weights.mT.float()}
        fit = shared_htp((whiteners @ weights).float(), whiteners, *sizes, own_rounds=OWN_ROUNDS, **settings)
        dictionary, coefficients = fit.dictionary.double(), torch.cat(fit.coefficients, dim=1).double()
    return split(SparseDictionary.normalized(dictionary, coefficients, storage, value_bits, identity), g)


@singledispatch
def factorize_all(config: FactorizationConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """The factors of every group, in their order; most groups are one projection alone."""
    for group in groups:
        yield [factorize(config, group[0])] if len(group) == 1 else factorize_group(config, group)


@factorize_all.register
def cospadi_all(config: CoSpaDiConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """On a GPU `htp` solves projections of equal shape, those that share with none, as one batch."""
    for batch in batches(config, groups):
        if len(batch[0]) > 1:
            yield from (factorize_group(config, group) for group in batch)
        else:
            yield from ([factors] for factors in _dictionaries(config, [problem for (problem,) in batch]))


def _dictionaries(config: CoSpaDiConfig, problems: Sequence[Problem]) -> Iterator[Factors]:
    """Whiten, solve all at once, and undo the whitening: ``R W ≈ D S`` becomes ``W ≈ (R⁻¹ D) S``."""
    targets, scales = zip(*(whitened(problem) for problem in problems), strict=True)
    solutions = solve(config, problems, torch.stack(targets), scales)
    for problem, scale, fit in zip(problems, scales, solutions, strict=True):
        yield SparseDictionary.normalized(
            unwhiten(problem.whitener, fit.dictionary.double() * scale),
            fit.coefficients.double(),
            STORAGE_DTYPES[config.storage_dtype],
            budget.value_bits(config.accounting),
            identity=config.fixed_atoms == IDENTITY,
        )


def _rank(config: FactorizationConfig, problem: Problem) -> int:
    return problem.rank or budget.rank(*problem.weight.shape, config.compression_ratio)
