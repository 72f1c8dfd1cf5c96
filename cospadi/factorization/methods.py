"""Every method: a settings class in ``config`` and a function here that reads like its paper's algorithm box."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.config import ASVDConfig, CoSpaDiConfig, FactorizationConfig, SVDConfig, SVDLLMConfig
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import STORAGE_DTYPES, Dense, Factors, LowRank, SparseDictionary, rounded
from cospadi.factorization.htp import htp
from cospadi.factorization.ksvd import ksvd
from cospadi.factorization.low_rank import truncated_svd
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
    d_in, d_out = problem.weight.shape
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, config.compression_ratio, config.rho, config.accounting)
    target = problem.whitener @ problem.weight.double()
    scale = target.norm() / target.numel() ** 0.5  # near 1 in float32, whatever the calibration size
    target = (target / torch.where(scale > 0, scale, 1.0)).float()
    dictionary, coefficients = _solve(config, target, atoms, sparsity)
    return SparseDictionary.normalized(
        unwhiten(problem.whitener, dictionary.double() * scale),
        coefficients.double(),
        STORAGE_DTYPES[config.storage_dtype],
        budget.value_bits(config.accounting),
    )


def _solve(config: CoSpaDiConfig, target: Tensor, atoms: int, sparsity: int) -> tuple[Tensor, Tensor]:
    if config.solver == "ksvd":
        fit = ksvd(target, atoms, sparsity, config.n_rounds or 60, config.power_iterations, config.seed)
    else:
        fit = htp(target, atoms, sparsity, config.n_rounds or 12, config.step, config.cg_steps, config.tolerance)
    return fit.dictionary, fit.coefficients


def _rank(config: FactorizationConfig, problem: Problem) -> int:
    return problem.rank or budget.rank(*problem.weight.shape, config.compression_ratio)
