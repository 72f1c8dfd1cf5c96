"""Every method: a settings class in ``settings`` and a function here that reads like its paper's algorithm box.

Most methods see one projection at a time (`alone`). Those that can share a dictionary or a basis see groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch, wraps
from typing import get_type_hints

import torch
from torch import Tensor

from cospadi.errors import AUTO, UserError
from cospadi.factorization import budget, search
from cospadi.factorization.dictionary_learning import atoms_and_sparsity, batches, under_own_grams, whitened
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
    LEARNED_FRACTIONS,
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
from cospadi.factorization.solver_table import SOLVERS
from cospadi.factorization.solvers import pruning
from cospadi.factorization.solvers.low_rank import truncated_svd
from cospadi.factorization.solvers.oats import sparse_plus_low_rank
from cospadi.factorization.solvers.whitening import unwhiten


@singledispatch
def factorize_groups(config: FactorizationConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """Compress every group by the method that ``config`` stands for; yields its factors, in the order of ``groups``.

    Projections of a group have one shape and share a dictionary or a basis, at the bits they may take together. Most
    groups are one projection alone.

    Raises:
        UserError: the budget is too small for a shape, numbers do not fit the storage dtype, or the method shares nothing.
    """
    raise UserError(f"No factorization method is registered for {type(config).__name__}.")


def factorize(config: FactorizationConfig, problem: Problem) -> Factors:
    """Compress one projection: `factorize_groups` of a group of one."""
    (factors,) = next(factorize_groups(config, [[problem]]))
    return factors


def alone(method: Callable[..., Factors]) -> Callable[..., Factors]:
    """Register a method that sees one projection at a time, as its paper does."""

    @wraps(method)
    def each(config: FactorizationConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
        for group in groups:
            if len(group) > 1:
                raise UserError(
                    f"{type(config).__name__} shares nothing. Choose another method, or factorization.group_size=1."
                )
            yield [method(config, group[0])]

    factorize_groups.register(get_type_hints(method)["config"], each)
    return method


@alone
def plain(config: PlainConfig, problem: Problem) -> Factors:
    """Every weight in 16 bits."""
    return Dense(rounded(problem.weight, STORAGE_DTYPES[config.storage_dtype]))


@alone
def svd(config: SVDConfig, problem: Problem) -> Factors:
    """Truncated SVD of the weight."""
    left, right = truncated_svd(problem.weight, _rank(config, problem))
    return LowRank.balanced(left, right, STORAGE_DTYPES[config.storage_dtype])


@alone
def svd_llm(config: SVDLLMConfig, problem: Problem) -> Factors:
    """Truncated SVD of the whitened weight, solved back (SVD-LLM, arXiv:2403.07378, algorithm 1)."""
    target = problem.whitener @ problem.weight.double()
    left, right = truncated_svd(target, _rank(config, problem))
    return LowRank.balanced(unwhiten(problem.whitener, left), right, STORAGE_DTYPES[config.storage_dtype])


@factorize_groups.register
def basis_sharing(config: BasisSharingConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """Truncated SVD of ``R [W_1 … W_g]``, ``RᵀR`` the mean gram: one basis, private coefficients (arXiv:2410.03765)."""
    storage = STORAGE_DTYPES[config.storage_dtype]
    for group in groups:
        members = len(group)
        joint = side_by_side(group)
        rank = budget.rank(*group[0].weight.shape, config.compression_ratio, members)
        left, right = truncated_svd(joint.whitener @ joint.weight.double(), rank)
        yield split(LowRank.balanced(unwhiten(joint.whitener, left), right, storage), members)


@alone
def asvd(config: ASVDConfig, problem: Problem) -> Factors:
    """Truncated SVD of ``S W`` with ``S = diag(mean|x|^alpha)``, scaled back (ASVD, arXiv:2312.05821, section 3.2)."""
    storage = STORAGE_DTYPES[config.storage_dtype]
    if problem.keep_dense:
        return Dense(rounded(problem.weight, storage))
    scale = problem.absolute_mean.double() ** config.alpha
    scale = scale.clamp_min(float(scale.max()) * 1e-6 or 1.0)  # a channel that is always 0 still has to be undone
    left, right = truncated_svd(scale[:, None] * problem.weight.double(), _rank(config, problem))
    return LowRank.balanced(left / scale[:, None], right, storage)


@alone
def magnitude(config: MagnitudeConfig, problem: Problem) -> Factors:
    """The largest weights of the whole matrix."""
    nonzeros = budget.nonzeros(*problem.weight.shape, config.compression_ratio)
    sparse = pruning.keep_largest(problem.weight, nonzeros)
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


@alone
def wanda(config: WandaConfig, problem: Problem) -> Factors:
    """The weights of every output that are largest times the norm of their input (Wanda, arXiv:2306.11695)."""
    nonzeros = _pattern_nonzeros(config, problem) or budget.nonzeros_per_output(
        *problem.weight.shape, config.compression_ratio
    )
    sparse = pruning.wanda(problem.weight.double(), problem.input_norms, nonzeros, config.kept_of_group)
    return SparseDictionary.of_sparse_weight(sparse, STORAGE_DTYPES[config.storage_dtype])


@alone
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


@alone
def oats(config: OATSConfig, problem: Problem) -> Factors:
    """``D W ≈ sparse + low rank`` with ``D = diag(‖x_i‖)``, ``D`` undone (OATS, arXiv:2409.13652, algorithm 2)."""
    storage = STORAGE_DTYPES[config.storage_dtype]
    rank, nonzeros = budget.rank_and_nonzeros(*problem.weight.shape, config.compression_ratio, config.rank_ratio)
    loudness = problem.input_norms[:, None]
    target, scale = unit_scale(loudness * problem.weight.double())
    sparse, left, right = sparse_plus_low_rank(target, rank, nonzeros, config.n_rounds)
    undo = scale / loudness
    return SparsePlusLowRank(
        SparseDictionary.of_sparse_weight(sparse * undo, storage),
        LowRank.balanced(left * undo, right.double(), storage),
    )


@factorize_groups.register
def cospadi(config: CoSpaDiConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Factors]]:
    """Sparse dictionary learning on the whitened weight (CoSpaDi, arXiv:2509.22075, algorithm 1).

    The projections of a group share a dictionary, fitted under their mean gram (eq. 30) or, with ``metric=own``, under
    every projection's own.
    """
    solver = SOLVERS[config.solver]
    settings = solver.settings(config)
    for batch in batches(config, groups):
        members = len(batch[0])
        ratio = batch[0][0].ratio or config.compression_ratio
        if members > 1 and config.metric == "own":
            (group,) = batch
            fit = under_own_grams(config, group)
            yield _stored(config, fit.dictionary, fit.coefficients, members)
            continue

        # Whitening turns the error at the layer's outputs into the error of a matrix: ‖X (W − D S)‖ = ‖R W − R D S‖. Where the loss is
        # what counts, columns have their weights C, too.
        problems = [side_by_side(group) for group in batch]
        targets, scales = whitened(problems)
        d_in, d_out = batch[0][0].weight.shape

        if config.fixed_atoms == IDENTITY:
            whiteners = torch.stack([(p.whitener / scale).float() for p, scale in zip(problems, scales, strict=True)])
            weights = torch.stack([problem.weighed(problem.weight).float() for problem in problems])
            if config.learned_atoms == AUTO:
                fractions = LEARNED_FRACTIONS
            elif batch[0][0].ratio is None:
                fractions = [config.learned_atoms]
            else:  # an allocation knows nothing of atoms, and may leave them no room
                fractions = [search.affordable(d_in, d_out, ratio, config.learned_atoms, members)]
            fits = search.beside_identity(targets, whiteners, weights, ratio, fractions, settings, members)
        elif config.rho == AUTO:
            fits = search.learned_only(targets, ratio, settings, members)
        elif solver.solves_batches:
            fits = solver.solve(targets, *atoms_and_sparsity(config, d_in, d_out, members, ratio), **settings)
        else:
            further = {"whitener": problems[0].whitener} if solver.needs_whitener else {}
            fits = [
                solver.solve(
                    targets[0], *atoms_and_sparsity(config, d_in, d_out, members, ratio), **settings, **further
                )
            ]

        # R W C ≈ D S becomes W ≈ (R⁻¹ D) (S C⁻¹), so that nothing of the metric is stored.
        for problem, scale, fit in zip(problems, scales, fits, strict=True):
            dictionary = unwhiten(problem.whitener, fit.dictionary.double() * scale)
            yield _stored(config, dictionary, problem.unweighed(fit.coefficients), members)


def _stored(config: CoSpaDiConfig, dictionary: Tensor, coefficients: Tensor, members: int) -> list[Factors]:
    """The factors of every member of a group, in the numbers they are stored in."""
    factors = SparseDictionary.normalized(
        dictionary.double(),
        coefficients.double(),
        STORAGE_DTYPES[config.storage_dtype],
        budget.value_bits(config.accounting),
        identity=config.fixed_atoms == IDENTITY,
    )
    return split(factors, members)


def _rank(config: FactorizationConfig, problem: Problem) -> int:
    return problem.rank or budget.rank(*problem.weight.shape, config.compression_ratio)
