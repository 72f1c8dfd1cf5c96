"""Eigenbasis, threshold, one least squares: a dictionary without iterations (ROCKET's factorization)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.factorization.solvers.htp import largest, relative_error
from cospadi.factorization.solvers.low_rank import left_singular_vectors
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import require_finite
from cospadi.factorization.solvers.whitening import unwhiten

SPARE = 0.005
"""Fraction of all coefficients that is given to whichever column needs them most."""
RIDGE = 1e-3
"""Ridge of the dictionary fit, as a fraction of the mean diagonal of ``S Sᵀ``."""


@torch.no_grad()
def one_shot(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    whitener: Float[Tensor, "d_in d_in"] | None = None,
    balance: float = 0.5,
) -> Solution:
    """``Y ≈ D S`` by thresholding in the eigenbasis ``U`` of ``Y``: ``C = UᵀY``, keep the largest, refit the dictionary.

    A coefficient's importance is the geometric mean of ``|c_ij|`` and ``|c_ij| · ‖R⁻¹u_i‖``, its weight at the layer's
    output and in the weights; ``balance`` is the exponent of the second, and without ``whitener`` only the first counts.
    All columns keep the same number but for a spare 0.5 % of all entries, which go to the most important ones left.
    Then ``D = Y Sᵀ (S Sᵀ + λI)⁻¹``. The factorization of ROCKET, whose profiling and allocation of ratios are not here.

    ``atoms`` beyond ``min(d_in, d_out)`` have no eigenvector and stay zero: the dictionary is then padded.

    Raises:
        UserError: the target is not finite.
    """
    require_finite("target", target)
    # Coefficients in the eigenbasis, weighted by what they are worth in the weights as well as at the outputs.
    basis = left_singular_vectors(target, min(atoms, *target.shape))
    codes = target.T @ basis
    importance = codes.abs()
    if whitener is not None:
        importance = importance * unwhiten(whitener, basis).norm(dim=0).to(target) ** balance
    codes = torch.where(_most_important(importance, sparsity), codes, 0.0)

    # One least squares of the dictionary; the eigenbasis stays where the ridge costs more than the fit gains.
    dictionary = _ridge_dictionary(target, codes, basis)
    errors = [relative_error(target, atoms_of @ codes.T) for atoms_of in (basis, dictionary)]
    if errors[1] > errors[0]:
        dictionary = basis
        errors = errors[:1]

    # Unit atoms, their lengths in the codes; atoms beyond the eigenbasis are zero.
    lengths = dictionary.norm(dim=0)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    missing = atoms - basis.shape[1]
    return Solution(
        torch.nn.functional.pad(dictionary / lengths, (0, missing)),
        torch.nn.functional.pad(codes * lengths, (0, missing)).T,
        errors,
    )


def _most_important(importance: Float[Tensor, "d_out atoms"], sparsity: int) -> Tensor:
    """``sparsity`` of a row on average: most of them in every row, the rest wherever in the matrix."""
    d_out, atoms = importance.shape
    per_row = min(sparsity, atoms)
    spare = min(round(SPARE * atoms), per_row)
    kept = largest(importance, per_row - spare).bool() if spare < per_row else torch.zeros_like(importance).bool()
    left = importance.masked_fill(kept, -1.0).flatten()
    return kept.flatten().scatter(0, left.topk(spare * d_out).indices, True).view_as(importance)


def _ridge_dictionary(target: Tensor, codes: Tensor, basis: Tensor) -> Tensor:
    moments = codes.T @ codes
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(moments)
    return basis if failed else torch.cholesky_solve((target @ codes).T, factor).T  # fails where all codes are zero
