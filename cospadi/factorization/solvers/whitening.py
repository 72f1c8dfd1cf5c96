"""From a gram to a whitener, and back from whitened factors to weights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError


def whitener(gram: Float[Tensor, "d_in d_in"], damping: float = 0.0) -> Float[Tensor, "d_in d_in"]:
    """Upper-triangular ``R`` such that ``RᵀR = gram + damping · mean(diag(gram)) · I``, in float64.

    For ``gram = XᵀX`` and no damping, ``‖X(W − Ŵ)‖_F = ‖R(W − Ŵ)‖_F``: error at the layer's
    output becomes the plain Frobenius error that dictionary learning minimises (arXiv:2403.07378, section 3.2).

    Raises:
        UserError: when the gram is not finite, or not positive definite to working precision.
    """
    gram = gram.double()
    if not torch.isfinite(gram).all():
        raise UserError(
            f"The {len(gram)}×{len(gram)} gram holds NaN or infinite numbers. Collect it again: run calibration anew."
        )
    ridge = damping * gram.diagonal().mean()
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed_at = torch.linalg.cholesky_ex(damped, upper=True)
    if failed_at or _barely_definite(factor):
        lowest = torch.linalg.eigvalsh(gram)[0]
        # Ten times what would lift the smallest eigenvalue to zero, as a power of ten, and more than there is now.
        lacking = max(10 * float(-lowest / gram.diagonal().mean().clamp_min(1e-300)), 10 * damping, 1e-6)
        enough = 10.0 ** math.ceil(math.log10(lacking))
        raise UserError(
            f"The {len(gram)}×{len(gram)} gram is not positive definite: smallest eigenvalue {lowest:.1e}, "
            f"damping {damping:g}. The calibration tokens leave some input direction unseen. "
            f"Set calibration.damping to {enough:.0e} or more, or take a longer and more varied calibration.text."
        )
    return factor


def _barely_definite(factor: Float[Tensor, "d_in d_in"]) -> bool:
    """Whether rounding alone may have kept a rank-deficient gram positive.

    Compares the smallest eigenvalue, found by inverse iteration from the smallest pivot, with the usual tolerance of
    a numerical rank. The pivots themselves do not tell: all of them can be far above the smallest eigenvalue.
    """
    vector = torch.zeros_like(factor[:, :1])
    vector[factor.diagonal().abs().argmin()] = 1.0
    growth = torch.ones_like(vector[0, 0])
    for _ in range(4):
        vector = torch.cholesky_solve(vector, factor, upper=True)
        growth = vector.norm()
        vector = vector / growth
    # The usual tolerance of a numerical rank, with the trace in place of the largest eigenvalue.
    tolerance = len(factor) * torch.finfo(factor.dtype).eps * factor.square().sum()
    return not bool(growth * tolerance < 1)


def unwhiten(
    whitener: Float[Tensor, "d_in d_in"], left: Float[Tensor, "d_in columns"]
) -> Float[Tensor, "d_in columns"]:
    """``R⁻¹ left`` by a triangular solve: whitened columns become columns that act on the layer's inputs."""
    return torch.linalg.solve_triangular(whitener, left.to(whitener.dtype), upper=True)


def output_error(
    whitener: Float[Tensor, "d_in d_in"],
    weight: Float[Tensor, "d_in d_out"],
    approximation: Float[Tensor, "d_in d_out"],
) -> float:
    """``‖X(W − Ŵ)‖_F / ‖XW‖_F`` through ``R``; 0 for a weight whose outputs are all zero and stay so."""
    weight = weight.to(whitener.dtype)
    error = torch.linalg.norm(whitener @ (weight - approximation.to(whitener.dtype)))
    scale = torch.linalg.norm(whitener @ weight)
    return float(error / scale) if scale > 0 else (0.0 if error == 0 else float("inf"))


def weight_error(weight: Float[Tensor, "d_in d_out"], approximation: Float[Tensor, "d_in d_out"]) -> float:
    """``‖W − Ŵ‖_F / ‖W‖_F``; 0 for a zero weight that stays zero."""
    weight = weight.double()
    error = torch.linalg.norm(weight - approximation.double())
    scale = torch.linalg.norm(weight)
    return float(error / scale) if scale > 0 else (0.0 if error == 0 else float("inf"))
