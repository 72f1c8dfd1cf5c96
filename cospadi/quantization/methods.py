"""Quantization of factors, kind by kind: the first of two matrices against the activations' gram, the second beside it.

    first:  Q₁ ≈ F₁, least error of  X (F₁ − Q₁)    (dictionary, dense weight; a left factor: of what the right cannot reach)
    second: F₂ fitted again to Q₁, least error of  X (F₁ F₂ − Q₁ F₂')    (values on their support, right factor)
            Q₂ ≈ F₂', least error of  X (F₁ F₂ − Q₁ Q₂)

So the second makes up for what rounding the first did, and both for what they do themselves (`rounding.quantized`). The aim
is what the factors computed, not the weight they stand for: how closely that is fitted was the factorization's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.factors import (
    Dense,
    Factors,
    LowRank,
    SparseDictionary,
    SparsePlusLowRank,
    rounded,
    truncated,
)
from cospadi.factorization.solvers.htp import least_squares
from cospadi.kernels.precision import float32_products
from cospadi.packing.formats import TRUNCATED, bits_of
from cospadi.packing.matrix import Quantized
from cospadi.quantization.rounding import Rounding, quantized

if TYPE_CHECKING:
    from cospadi.factorization.problem import Problem
    from cospadi.quantization.settings import QuantizationConfig


REFIT_STEPS = 16
"""Conjugate-gradient steps that fit the second matrix to the rounded first one."""
WITHIN_SPAN = 0.05
"""What an error of a left factor within its own span counts. Of 0.5, 0.2, 0.05 and 0.01 the lower are better for low-rank
factors, whose right one reaches all of the span, and worse for dictionaries, whose values are sparse (docs/solver-log.md)."""


@dataclass(frozen=True)
class _Target:
    """What rounded factors should compute, in float32."""

    weight: Float[Tensor, "d_in d_out"]
    """The factors multiplied out."""
    gram: Float[Tensor, "d_in d_in"]
    """Gram of its inputs, with a mean diagonal of 1."""


def quantize(config: QuantizationConfig, factors: Sequence[Factors], problems: Sequence[Problem]) -> list[Factors]:
    """The factors of a group, or of one projection, in few bits; what they share stays shared.

    Args:
        config: formats and rounding; a part whose format is ``null`` stays in 16 bits.
        factors: of one kind, all with the same shared part.
        problems: the weights they stand for, and the whiteners of their inputs.

    Raises:
        UserError: a format that this kind of factors does not have, or numbers that do not fit.
    """
    with float32_products(exact=True):
        factors = [_moved(f, problems[0].weight.device) for f in factors]
        together = [_target(f, problem) for f, problem in zip(factors, problems, strict=True)]
        first = factors[0]
        if isinstance(first, LowRank):
            left = _left(config, first.left, together)
            return [
                replace(f, left=left, right=_second(config, left, f.right, p))
                for f, p in zip(factors, together, strict=True)
            ]
        if isinstance(first, SparseDictionary):
            dictionary = _first(config, first.dictionary, together)
            return [
                _values(config, replace(f, dictionary=dictionary), p) for f, p in zip(factors, together, strict=True)
            ]
        (problem,) = together
        if isinstance(first, SparsePlusLowRank):
            return [_sparse_plus_low_rank(config, first, problem)]
        if config.values is None:
            return [first]
        _refuse_truncation(config, first)
        return [Dense(quantized(first.dense, problem.gram, _rounding(config, config.values), first.dense.dtype))]


def _first(config: QuantizationConfig, matrix: Tensor, problems: Sequence[_Target]) -> Tensor | Quantized:
    """A dictionary, in the mean metric of all that use it."""
    if config.dictionary is None:
        return matrix
    gram = sum(problem.gram for problem in problems)
    return quantized(matrix, gram, _rounding(config, config.dictionary), matrix.dtype)


def _left(config: QuantizationConfig, left: Tensor, problems: Sequence[_Target]) -> Tensor | Quantized:
    """A left factor: its errors count mostly where the right one, fitted again, cannot make up for them.

    Within the span of ``L`` it can, so ``H = G − (1 − ε) G L (Lᵀ G L)⁻¹ Lᵀ G``.
    """
    if config.dictionary is None:
        return left
    columns = left.double()
    gram = sum(problem.gram for problem in problems).double()
    weighted = gram @ columns
    inner = columns.T @ weighted
    inner.diagonal().mul_(1 + 1e-6).add_(torch.finfo(torch.float32).tiny)
    reached = weighted @ torch.linalg.solve(inner, weighted.T)
    gram = gram - (1 - WITHIN_SPAN) / 2 * (reached + reached.T)
    return quantized(left, gram.float(), _rounding(config, config.dictionary), left.dtype)


def _second(
    config: QuantizationConfig, left: Tensor | Quantized, right: Tensor, problem: _Target
) -> Tensor | Quantized:
    """A right factor beside its left one."""
    gram, refitted, gradient = _fitted(left.float(), right.float(), problem)
    if config.values is None:
        return rounded(refitted, right.dtype)
    if config.values == TRUNCATED:
        raise _no_truncation("low-rank factors")
    return quantized(refitted, gram, _rounding(config, config.values), right.dtype, gradient)


def _values(config: QuantizationConfig, factors: SparseDictionary, problem: _Target) -> SparseDictionary:
    """The values of a sparse dictionary whose dictionary is rounded already."""
    atoms = factors.dictionary.float()
    if factors.identity:
        atoms = torch.cat([torch.eye(len(atoms), dtype=atoms.dtype, device=atoms.device), atoms], dim=1)
    before = factors.coefficients
    dtype = factors.coefficients.dtype
    if factors.value_bits != 16:
        raise UserError(
            "quantization meets values of 14 bits, those of factorization.accounting=paper. Set accounting=mask."
        )
    if config.dictionary is None and config.values in (None, TRUNCATED):
        return factors if config.values is None else truncated(factors)
    gram, refitted, gradient = _fitted(atoms, before.float(), problem)
    if config.values in (None, TRUNCATED):
        kept = replace(factors, coefficients=rounded(refitted, dtype))
        return kept if config.values is None else truncated(kept)
    codes = quantized(refitted, gram, _rounding(config, config.values), dtype, gradient)
    return replace(factors, coefficients=codes, value_bits=bits_of(config.values))


def _sparse_plus_low_rank(
    config: QuantizationConfig, factors: SparsePlusLowRank, problem: _Target
) -> SparsePlusLowRank:
    """The low-rank part to what the sparse one leaves, then the sparse one to what the rounded low-rank part leaves."""
    _refuse_truncation(config, factors)
    dense = factors.sparse.weight()
    low = factors.low_rank
    left = _left(config, low.left, [problem])
    low = LowRank(left, _second(config, left, low.right, replace(problem, weight=problem.weight - dense)))
    left_over = replace(problem, weight=problem.weight - low.weight())
    return SparsePlusLowRank(_values(config, factors.sparse, left_over), low)


def _fitted(
    atoms: Float[Tensor, "d_in atoms"], codes: Float[Tensor, "atoms d_out"], problem: _Target
) -> tuple[Tensor, Tensor, Tensor]:
    """``H = Bᵀ G B`` of the atoms ``B``, codes fitted again on their support, and what is left of ``Bᵀ G (W − B S)``."""
    weighted = problem.gram @ atoms
    gram = atoms.T @ weighted
    gradient = weighted.T @ problem.weight - gram @ codes
    lengths = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()  # Jacobi preconditioning: unit atoms
    support = (codes != 0).to(codes).T[None]
    unit = gram / lengths / lengths[:, None]
    over_unit_atoms, _ = least_squares(
        unit[None], (gradient / lengths[:, None]).T[None], (codes * lengths[:, None]).T[None], support, REFIT_STEPS
    )
    refitted = (over_unit_atoms[0].T / lengths[:, None]) * (codes != 0)
    return gram, refitted, (weighted.T @ problem.weight - gram @ refitted) * (codes != 0)


def _target(factors: Factors, problem: Problem) -> _Target:
    gram = problem.whitener.T @ problem.whitener
    mean = gram.diagonal().mean()
    return _Target(factors.weight(), (gram / torch.where(mean > 0, mean, 1.0)).float())


def _moved(factors: Any, device: torch.device) -> Any:
    """Factors with their tensors on a device."""
    parts = {field.name: getattr(factors, field.name) for field in fields(factors)}
    moved = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
    moved |= {name: _moved(part, device) for name, part in parts.items() if is_dataclass(part)}
    return replace(factors, **moved)


def _rounding(config: QuantizationConfig, name: str) -> Rounding:
    return Rounding(name, config.group_size, config.rounding == "compensated", config.damping, config.sweeps)


def _refuse_truncation(config: QuantizationConfig, factors: Factors) -> None:
    if config.values == TRUNCATED:
        raise _no_truncation(f"{factors.kind} factors")


def _no_truncation(what: str) -> UserError:
    return UserError(
        f"quantization.values={TRUNCATED} is for the values of a sparse dictionary, not for {what}. Choose another format."
    )
