"""Dictionary learning by hard-thresholding pursuit: nothing but matrix products.

Coefficients are kept transposed, ``codes = coefficientsᵀ (d_out × atoms)``, so that choosing the support of a column
runs along contiguous memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cospadi.factorization.low_rank import left_singular_vectors


@dataclass(frozen=True)
class Solution:
    """A dictionary, its coefficients and how the fit went."""

    dictionary: Float[Tensor, "d_in atoms"]
    coefficients: Float[Tensor, "atoms d_out"]
    errors: Sequence[float]
    """``‖Y − DS‖_F / ‖Y‖_F`` of the start, after every round, and of what is returned: the last is the least."""


def htp(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    n_rounds: int = 20,
    cg_steps: int = 3,
    tolerance: float = 1e-3,
    final_cg_steps: int = 20,
) -> Solution:
    """Minimise ``‖Y − D S‖_F`` over ``D`` and ``S`` with at most ``sparsity`` non-zeros per column of ``S``.

    Starts from the eigenbasis (left singular vectors of ``Y``). A round is a normalised gradient step on ``S``, the
    ``sparsity`` largest per column, least squares on that support by ``cg_steps`` conjugate-gradient steps (hard
    thresholding pursuit: Foucart 2011, doi:10.1137/100806278), and the closed-form dictionary ``Y Sᵀ (S Sᵀ)⁻¹`` (MOD:
    Engan 1999). Stops after ``n_rounds`` or when a round gains less than ``tolerance`` of the error. A round may lose
    (a new support is not always better): the best one is kept, and its least squares goes on for ``final_cg_steps``.
    """
    dictionary = first_atoms(target, atoms, sparsity)
    gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
    support = largest(correlations, sparsity)
    codes = least_squares(gram, correlations, torch.where(support, correlations, 0.0), support, cg_steps)
    energy = float(target.square().sum(dtype=torch.float64))
    best = dictionary, gram, correlations, codes, support
    errors = [_relative_error(target, dictionary, codes, energy)]
    for _ in range(n_rounds):
        dictionary, codes = best_dictionary(target, dictionary, codes)
        gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
        support = largest(codes + gradient_step(gram, correlations, codes), sparsity)
        codes = least_squares(gram, correlations, torch.where(support, codes, 0.0), support, cg_steps)
        errors.append(_relative_error(target, dictionary, codes, energy))
        if errors[-1] <= min(errors):
            best = dictionary, gram, correlations, codes, support
        if len(errors) > 2 and errors[-2] - errors[-1] < tolerance * errors[-1]:
            break
    dictionary, gram, correlations, codes, support = best
    polished = least_squares(gram, correlations, codes, support, final_cg_steps)
    error = _relative_error(target, dictionary, polished, energy)
    if error <= min(errors):
        codes = polished
    errors.append(min(error, *errors))
    return Solution(dictionary, codes.T, errors)


def first_atoms(target: Float[Tensor, "d_in d_out"], atoms: int, sparsity: int) -> Float[Tensor, "d_in atoms"]:
    """The eigenbasis of the target; beyond its size, singular vectors of what a sparse code in it leaves over."""
    basis = left_singular_vectors(target, min(atoms, *target.shape)).to(target)
    while basis.shape[1] < atoms:
        correlations = target.T @ basis
        support = largest(correlations, min(sparsity, basis.shape[1]))
        codes = least_squares(basis.T @ basis, correlations, torch.where(support, correlations, 0.0), support, steps=10)
        extra = min(atoms - basis.shape[1], *target.shape)
        basis = torch.cat([basis, left_singular_vectors(target - basis @ codes.T, extra).to(target)], dim=1)
    return basis


def gradient_step(
    gram: Float[Tensor, "atoms atoms"],
    correlations: Float[Tensor, "d_out atoms"],
    codes: Float[Tensor, "d_out atoms"],
) -> Float[Tensor, "d_out atoms"]:
    """``μ_j g_j`` with ``g = Dᵀ(Y − DS)`` and the step ``μ_j = ‖g_j‖² / ‖D g_j‖²`` that is exact along ``g_j``."""
    gradient = correlations - codes @ gram
    curvature = ((gradient @ gram) * gradient).sum(dim=1, keepdim=True)
    return gradient * (gradient.square().sum(dim=1, keepdim=True) / curvature.clamp_min(_tiny(gradient)))


def largest(values: Float[Tensor, "d_out atoms"], sparsity: int) -> Bool[Tensor, "d_out atoms"]:
    """Where the ``sparsity`` largest magnitudes of every row are."""
    support = torch.zeros_like(values, dtype=torch.bool)
    return support.scatter_(1, values.abs().topk(sparsity, dim=1, sorted=False).indices, True)


def least_squares(
    gram: Float[Tensor, "atoms atoms"],
    correlations: Float[Tensor, "d_out atoms"],
    codes: Float[Tensor, "d_out atoms"],
    support: Bool[Tensor, "d_out atoms"],
    steps: int,
) -> Float[Tensor, "d_out atoms"]:
    """``steps`` conjugate-gradient steps from ``codes`` on every row's normal equations, restricted to its support.

    Each step lowers every row's error or leaves it. A row stops for good once its residual is rounding noise, or points
    where the atoms of its support are dependent to working precision: a step there would be noise over nothing.
    """
    inside = support.to(gram.dtype)
    residual = (correlations - codes @ gram) * inside
    direction = residual
    length = residual.square().sum(dim=1, keepdim=True)
    epsilon = torch.finfo(gram.dtype).eps
    noise = (4 * epsilon) ** 2 * (correlations * inside).square().sum(dim=1, keepdim=True)
    flat = 4 * epsilon * gram.diagonal().max()
    going = torch.ones_like(length, dtype=torch.bool)
    for _ in range(steps):
        image = direction @ gram
        curvature = (direction * image).sum(dim=1, keepdim=True)
        going = going & (length > noise) & (curvature > flat * length)
        step = torch.where(going, length / curvature, 0.0)
        codes = codes + step * direction
        residual = torch.addcmul(residual, image * inside, step.expand_as(image), value=-1)
        shorter = residual.square().sum(dim=1, keepdim=True)
        direction = residual + shorter / length.clamp_min(_tiny(gram)) * direction
        length = shorter
    return codes


def best_dictionary(
    target: Float[Tensor, "d_in d_out"],
    dictionary: Float[Tensor, "d_in atoms"],
    codes: Float[Tensor, "d_out atoms"],
) -> tuple[Float[Tensor, "d_in atoms"], Float[Tensor, "d_out atoms"]]:
    """``argmin_D ‖Y − D S‖_F = Y Sᵀ (S Sᵀ + εI)⁻¹`` with unit columns, and ``S`` scaled to match.

    An atom that no column uses keeps its place. The ridge is relative to the mean diagonal and only there for
    solvability.
    """
    products = target @ codes
    moments = codes.T @ codes
    scale = moments.diagonal().mean()
    epsilon = 10 * torch.finfo(moments.dtype).eps * len(moments)
    moments.diagonal().add_(epsilon * scale)
    products += epsilon * scale * dictionary  # pulls towards the old atoms, not towards zero
    factor, failed = torch.linalg.cholesky_ex(moments)
    if failed:
        return dictionary, codes
    solved = torch.cholesky_solve(products.T, factor).T
    norms = solved.norm(dim=0)
    used = norms > _tiny(norms)
    norms = torch.where(used, norms, 1.0)
    return torch.where(used, solved / norms, dictionary), codes * norms


def _relative_error(target: Tensor, dictionary: Tensor, codes: Tensor, energy: float) -> float:
    """``‖Y − DS‖/‖Y‖`` from the residual itself: inner products would cancel where codes are large."""
    if energy == 0:
        return 0.0
    residual = target - dictionary @ codes.T
    return (float(residual.square().sum(dtype=torch.float64)) / energy) ** 0.5


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
