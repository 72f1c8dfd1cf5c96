"""Choosing the codes of a matrix: to the nearest, or so that errors make up for each other.

What counts is the error at the layer's output. With ``H`` the gram of what a matrix is multiplied with and ``V`` the
best real numbers, a column ``q`` of few bits costs ``(v − q)ᵀ H (v − q)``. For a dense weight or a dictionary ``H`` is the
gram of the activations; for the values beside a dictionary ``D`` it is that of ``x D``, which is ``Dᵀ (XᵀX) D``.

Zeros stay zeros, so that the same code rounds sparse columns, each on a support of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.solvers.pruning import inverse_factor
from cospadi.packing.formats import format_of
from cospadi.packing.matrix import Quantized, by_row, encoded, groups, nearest

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Scales to try, as fractions of the one that just holds the largest number: clipping may cost less than coarse steps."""
BLOCK = 64
"""Rows of a matrix whose updates of the others wait for each other, and then are one product."""


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded."""

    format: str
    """One of `FORMATS`."""
    group_size: int
    """Rows of a column that have a scale together."""
    compensated: bool = True
    """Let later numbers make up for the errors of earlier ones, instead of rounding each to the nearest."""
    damping: float = 0.01
    """Ridge on the gram in the first pass, as a fraction of its mean diagonal."""
    sweeps: int = 4
    """Rounds of coordinate descent behind the first pass."""


@torch.no_grad()
def quantized(
    numbers: Float[Tensor, "rows columns"],
    gram: Float[Tensor, "rows rows"],
    rounding: Rounding,
    scale_dtype: torch.dtype = torch.float16,
    gradient: Float[Tensor, "rows columns"] | None = None,
) -> Quantized:
    """``numbers`` in few bits, zeros where they are zero.

    Scales are searched for the least ``Σ_i H_ii (v_i − q_i)²``. Compensated, a first pass goes down the rows and lets those
    not yet rounded make up for each error (GPTQ, arXiv:2210.17323, algorithm 1). Then every number in turn takes the
    code that is best beside all others, and every group the scale that is best for its codes, ``sweeps`` times:
    coordinate descent, which never raises the error. No column ends above its nearest codes.

    Args:
        gram: ``H``, positive semidefinite.
        gradient: ``b − H V`` where ``numbers`` are not the minimum of ``qᵀHq − 2bᵀq``; zero where they are.

    Raises:
        UserError: a number or a scale does not fit.
    """
    numbers = numbers.float()
    gram = gram.float()
    if not torch.isfinite(numbers).all():
        raise UserError("quantization meets NaN or infinite numbers: the factors are damaged. Factorize again.")
    scales = _searched_scales(numbers, gram.diagonal(), rounding, scale_dtype)
    values = _round(numbers, by_row(scales, rounding.group_size, len(numbers)), rounding.format)
    if rounding.compensated and numbers.numel():
        gradient = torch.zeros_like(numbers) if gradient is None else gradient.float()
        descent = _Descent(numbers, gram, gradient, scales, rounding, scale_dtype)
        values, scales = descent.run(values)
    codes = _codes(values, by_row(scales, rounding.group_size, len(values)), rounding.format)
    return Quantized(codes, scales.to(scale_dtype), rounding.format, rounding.group_size)


def _searched_scales(
    numbers: Tensor, importance: Tensor, rounding: Rounding, scale_dtype: torch.dtype
) -> Float[Tensor, "groups columns"]:
    """The best of `SHRINKS` for every group; either sign, as there is one code more below zero than above.

    Raises:
        UserError: when a scale overflows ``scale_dtype``.
    """
    rows, columns = numbers.shape
    size = rounding.group_size
    format = format_of(rounding.format)

    # Every group on its own, the last one filled up with zeros, which any scale rounds without an error.
    count = groups(rows, size)
    missing = count * size - rows
    cells = torch.nn.functional.pad(numbers, (0, 0, 0, missing)).view(count, size, columns)
    importance = importance.clamp_min(1e-6 * importance.mean().clamp_min(torch.finfo(importance.dtype).tiny))
    weights = torch.nn.functional.pad(importance, (0, missing)).view(count, size, 1)

    # The number of largest magnitude has to fit: as the lowest code, or as the highest.
    top = cells.amax(dim=1)
    bottom = cells.amin(dim=1)
    largest = torch.where(top > -bottom, top, bottom)
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    smallest = torch.tensor(
        torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps, device=numbers.device
    )
    # Floating codes have the same relative steps at every scale, so clipping gains nothing.
    for shrink in SHRINKS if format.is_whole else SHRINKS[:1]:
        for extreme in (largest / format.lowest, largest.abs() / format.highest):
            scales = (extreme * shrink).to(scale_dtype).float()
            scales = torch.where((scales == 0) & (extreme != 0), smallest.copysign(extreme), scales)
            if not torch.isfinite(scales).all():
                raise UserError(
                    f"quantization: a number of magnitude {largest.abs().max():.1e} needs a scale beyond {scale_dtype}. "
                    "Set factorization.storage_dtype=bfloat16, whose scales reach further."
                )
            errors = (cells - _round(cells, scales[:, None], rounding.format)).square_().mul_(weights).sum(dim=1)
            better = errors < least
            best = torch.where(better, scales, best)
            least = torch.where(better, errors, least)
    return best


class _Descent:
    """Lowers ``(V − Q)ᵀ H (V − Q) − 2 gradientᵀ (Q − V)`` over codes and scales, all columns at once."""

    def __init__(
        self,
        numbers: Tensor,
        gram: Tensor,
        gradient: Tensor,
        scales: Tensor,
        rounding: Rounding,
        scale_dtype: torch.dtype,
    ) -> None:
        self.numbers = numbers
        self.gram = gram
        self.gradient = gradient
        self.scales = scales
        self.rounding = rounding
        self.scale_dtype = scale_dtype
        self.support = (numbers != 0).to(numbers)
        self.diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)

    def run(self, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers with codes, and the scales they are multiples of."""
        # A column that the first pass made worse goes back to its nearest codes, so none ends above them.
        values = self._first_pass()
        ahead = self._cost(values) < self._cost(nearest)
        values = torch.where(ahead, values, nearest)
        left = self._left(values)

        # Codes for the scales, then scales for the codes, until neither changes: both only lower the cost.
        for _ in range(self.rounding.sweeps):
            changed = self._sweep(values, left)
            self._refit_scales(values, left)
            if not changed:
                break
        return values, self.scales

    def _left(self, values: Tensor) -> Tensor:
        """Minus half the gradient of the cost."""
        return torch.addmm(self.gradient, self.gram, self.numbers - values)

    def _cost(self, values: Tensor) -> Tensor:
        """Cost of every column, but for a constant."""
        ahead = values - self.numbers
        return (ahead * (self.gram @ ahead - 2 * self.gradient)).sum(dim=0)

    def _first_pass(self) -> Tensor:
        """Row after row rounded, the rows below moved to make up for it."""
        # Rows that nothing is multiplied with get a diagonal of 1, so that the gram can be inverted.
        unused = torch.diag((self.gram.diagonal() <= 0).to(self.gram))
        factor = inverse_factor(self.gram + unused, self.rounding.damping).to(self.gram)
        rest = self.numbers.clone()
        values = torch.empty_like(self.numbers)
        scales = by_row(self.scales, self.rounding.group_size, len(rest))
        for block in _blocks(len(rest)):
            triangle = factor[block, block]
            errors = torch.empty_like(rest[block])
            # Within the block the rows below are updated at once: the next one is rounded from what is left.
            for i, row in enumerate(range(block.start, block.stop)):
                values[row] = _round(rest[row], scales[row], self.rounding.format).mul_(self.support[row])
                errors[i] = (rest[row] - values[row]) / triangle[i, i]
                rest[row : block.stop] -= triangle[i, i:, None] * errors[i]
            # All rows beyond the block take its errors in one product.
            rest[block.stop :] -= factor[block, block.stop :].T @ errors
        return values

    def _sweep(self, values: Tensor, left: Tensor) -> bool:
        """Every number to its best code beside the others, in place; whether any changed."""
        scales = by_row(self.scales, self.rounding.group_size, len(values))
        changed = False
        for block in _blocks(len(values)):
            own = self.gram[block, block]
            near = left[block].clone()
            moved = torch.empty_like(near)
            for i, row in enumerate(range(block.start, block.stop)):
                # The minimum over this row alone is a parabola's: the nearest code to it is the best one.
                best = _round(values[row] + near[i] / self.diagonal[row], scales[row], self.rounding.format)
                moved[i] = best.mul_(self.support[row]) - values[row]
                values[row] += moved[i]
                near[i:] -= own[i:, i, None] * moved[i]
            left -= self.gram[:, block] @ moved
            changed = changed or bool(moved.any())
        return changed

    def _refit_scales(self, values: Tensor, left: Tensor) -> None:
        """Every group to the scale that is best for its codes, in place; kept where it stays ahead once rounded."""
        for number in range(len(self.scales)):
            rows = slice(number * self.rounding.group_size, (number + 1) * self.rounding.group_size)
            old = self.scales[number].clone()
            codes = _coded(values[rows], old, self.rounding.format)
            # As a function of its scale the cost is a parabola: a step of slope / curvature leads to its minimum.
            slope = (codes * left[rows]).sum(dim=0)
            curvature = (codes * (self.gram[rows, rows] @ codes)).sum(dim=0)
            new = torch.where(curvature > 0, old + slope / curvature, old).to(self.scale_dtype).float()
            # Rounding the new scale to 16 bits may undo the gain: then the old one stays.
            step = new - old
            worth = (step * (2 * slope - step * curvature) > 0) & torch.isfinite(new) & (new != 0)
            self.scales[number] = torch.where(worth, new, old)
            values[rows] = codes * self.scales[number]
            left -= self.gram[:, rows] @ (codes * (self.scales[number] - old))


def _blocks(rows: int) -> Sequence[slice]:
    return [slice(first, min(first + BLOCK, rows)) for first in range(0, rows, BLOCK)]


def _round(numbers: Tensor, scales: Tensor, name: str) -> Tensor:
    """The nearest multiples of the scales that have a code."""
    return _coded(numbers, scales, name).mul_(scales)


def _coded(numbers: Tensor, scales: Tensor, name: str) -> Tensor:
    """The nearest codes of numbers over their scales, in float32."""
    return nearest(torch.where(scales != 0, numbers / scales, 0.0), name)


def _codes(values: Tensor, scales: Tensor, name: str) -> Tensor:
    """The codes of numbers that are multiples of their scales, in the dtype of the format."""
    return encoded(_coded(values, scales, name), name)
