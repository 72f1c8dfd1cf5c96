"""What a factorization is given: a weight and what calibration tells about its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.solvers.shared import mean_whitener


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
    columns: Float[Tensor, " d_out"] | None = None
    """Roots of the weights of its outputs, float64, where the loss is what counts; the whitener is then that of the loss, too, and
    ``½ ‖R ΔW diag(columns)‖²`` the expected loss in nats per token."""
    ratio: float | None = None
    """Set by an allocation; ``None``: the compression ratio of the settings."""

    def __post_init__(self) -> None:
        if not torch.isfinite(self.weight).all():
            raise UserError("The weight holds NaN or infinite numbers. Check the checkpoint of model.source.")

    def weighed(self, weight: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "d_in d_out"]:
        """``weight`` in float64, its columns times the roots of their weights: errors of what comes out all count alike."""
        return weight.double() if self.columns is None else weight.double() * self.columns

    def unweighed(self, coefficients: Float[Tensor, "atoms d_out"]) -> Float[Tensor, "atoms d_out"]:
        """The opposite of `weighed`, on coefficients of it."""
        return coefficients.double() if self.columns is None else coefficients.double() / self.columns

    def expected_loss(self, approximation: Float[Tensor, "d_in d_out"]) -> float:
        """``½ ‖R (W − Ŵ) diag(columns)‖²``: nats per token by which the loss is expected to rise."""
        return 0.5 * float((self.whitener @ self.weighed(self.weight - approximation)).square().sum())

    @property
    def input_norms(self) -> Float[Tensor, " d_in"]:
        """``‖x_i‖₂`` of every input channel over the calibration tokens: the roots of the gram's diagonal."""
        return self.whitener.norm(dim=0)


def side_by_side(problems: Sequence[Problem]) -> Problem:
    """``[W_1 … W_g]`` under the mean gram; a problem alone is itself."""
    if len(problems) == 1:
        return problems[0]
    return Problem(
        torch.cat([problem.weight for problem in problems], dim=1),
        mean_whitener(torch.stack([problem.whitener for problem in problems])),
        torch.stack([problem.absolute_mean for problem in problems]).mean(dim=0),
    )


def unit_scale(target: Tensor) -> tuple[Tensor, Tensor]:
    """``target`` in float32 with a root mean square of 1, and that of before."""
    scale = target.norm() / target.numel() ** 0.5
    scale = torch.where(scale > 0, scale, 1.0)
    return (target / scale).float(), scale
