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
    """``‖Y − DS‖_F / ‖Y‖_F`` after the start and every round, and of what is returned: the last is the least."""


def htp(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    n_rounds: int = 12,
    step: float = 1.7,
    cg_steps: int = 2,
    tolerance: float = 1e-3,
    final_cg_steps: int = 20,
) -> Solution:
    """Minimise ``‖Y − D S‖_F`` over ``D`` and ``S`` with at most ``sparsity`` non-zeros per column of ``S``.

    Starts from the eigenbasis (left singular vectors of ``Y``). A round is a gradient step ``S + step · Dᵀ(Y − DS)``, the
    ``sparsity`` largest per column, least squares on that support by ``cg_steps`` conjugate-gradient steps (hard
    thresholding pursuit: Foucart 2011, doi:10.1137/100806278), and the closed-form dictionary ``Y Sᵀ (S Sᵀ)⁻¹`` (MOD:
    Engan 1999). The step only ranks candidates for the support, so it may be longer than a descent step: beyond 1 it
    favours atoms that are not in use yet, which loses a little at first and ends at a far lower error. Rounds stop after
    ``n_rounds`` or when two in a row gained less than ``tolerance`` of the error each. The best round is kept, and its least
    squares goes on for ``final_cg_steps``.
    """
    energy = float(target.square().sum(dtype=torch.float64))
    dictionary = first_atoms(target, atoms, sparsity)
    codes = torch.zeros(target.shape[1], atoms, dtype=target.dtype, device=target.device)
    residual, errors = target, []
    for _ in range(1 + n_rounds):  # the first one is one-shot thresholding in the eigenbasis
        gradient = residual.T @ dictionary
        support = largest(codes + step * gradient, sparsity)
        codes = least_squares(dictionary.T @ dictionary, gradient, codes, support, cg_steps)
        dictionary, codes = best_dictionary(target, dictionary, codes)
        residual = target - dictionary @ codes.T
        errors.append(_relative(residual, energy))
        if len(errors) == 1 or errors[-1] < min(errors[:-1]):
            best = dictionary, codes, residual
        if len(errors) > 3 and errors[-1] > (1 - tolerance) ** 2 * errors[-3]:
            break
    dictionary, codes, residual = best
    gram, gradient = dictionary.T @ dictionary, residual.T @ dictionary
    polished = least_squares(gram, gradient, codes, codes != 0, final_cg_steps)
    error = _relative(target - dictionary @ polished.T, energy)
    if error <= min(errors):
        codes = polished
    errors.append(min(error, *errors))
    return Solution(dictionary, codes.T, errors)


def first_atoms(target: Float[Tensor, "d_in d_out"], atoms: int, sparsity: int) -> Float[Tensor, "d_in atoms"]:
    """The eigenbasis of the target; beyond its size, singular vectors of what a sparse code in it leaves over."""
    basis = left_singular_vectors(target, min(atoms, *target.shape)).to(target)
    while basis.shape[1] < atoms:
        gradient = target.T @ basis
        support = largest(gradient, min(sparsity, basis.shape[1]))
        codes = least_squares(basis.T @ basis, gradient, torch.zeros_like(gradient), support, steps=10)
        extra = min(atoms - basis.shape[1], *target.shape)
        basis = torch.cat([basis, left_singular_vectors(target - basis @ codes.T, extra).to(target)], dim=1)
    return basis


def largest(values: Float[Tensor, "d_out atoms"], sparsity: int) -> Bool[Tensor, "d_out atoms"]:
    """Where the ``sparsity`` largest magnitudes of every row are."""
    support = torch.zeros_like(values, dtype=torch.bool)
    return support.scatter_(1, values.abs().topk(sparsity, dim=1, sorted=False).indices, True)


def least_squares(
    gram: Float[Tensor, "atoms atoms"],
    gradient: Float[Tensor, "d_out atoms"],
    codes: Float[Tensor, "d_out atoms"],
    support: Bool[Tensor, "d_out atoms"],
    steps: int,
) -> Float[Tensor, "d_out atoms"]:
    """``steps`` conjugate-gradient steps on every row's normal equations, restricted to its support.

    Starts from ``codes`` cut down to ``support``; ``gradient`` is ``Dᵀ(Y − DS)`` at ``codes`` as they come in. Each step
    lowers every row's error or leaves it. A row stops for good once its residual is rounding noise, or points where the
    atoms of its support are dependent to working precision: a step there would be noise over nothing.
    """
    inside = support.to(gram.dtype)
    start = codes * inside
    residual = torch.addmm(gradient, codes - start, gram) * inside
    codes = start
    direction = residual
    length = residual.square().sum(dim=1, keepdim=True)
    epsilon = torch.finfo(gram.dtype).eps
    noise = (4 * epsilon) ** 2 * length
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


def _relative(residual: Tensor, energy: float) -> float:
    """``‖Y − DS‖ / ‖Y‖``; 0 where there is nothing to fit."""
    return (float(residual.square().sum(dtype=torch.float64)) / energy) ** 0.5 if energy else 0.0


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
