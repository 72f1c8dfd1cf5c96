"""CoSpaDi's own steps: whiten, choose sizes, solve in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import AUTO
from cospadi.factorization import budget, search
from cospadi.factorization.problem import Problem, unit_scale
from cospadi.factorization.settings import IDENTITY, LEARNED_FRACTIONS, CoSpaDiConfig
from cospadi.factorization.solvers.htp import htp_batch
from cospadi.factorization.solvers.ksvd import ksvd
from cospadi.factorization.solvers.one_shot import one_shot
from cospadi.factorization.solvers.orthogonal import orthogonal


def sizes_of_group(config: CoSpaDiConfig, weights: Float[Tensor, "g d_in d_out"]) -> tuple[int, int | float]:
    """Atoms that a group shares, and non-zeros per column."""
    g, d_in, d_out = weights.shape
    if config.fixed_atoms != IDENTITY:
        return budget.atoms_and_sparsity(d_in, d_out, config.compression_ratio, config.rho, config.accounting, g)
    return search.size_beside_identity(d_in, d_out, config.compression_ratio, config.learned_atoms, g)


def batches(config: CoSpaDiConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Sequence[Problem]]]:
    """Runs of groups that are solved together: on a GPU, by htp, single projections of one shape."""

    def together(group: Sequence[Problem]) -> tuple[Any, ...]:
        weight = group[0].weight
        batched = config.solver == "htp" and weight.is_cuda and len(group) == 1
        return (tuple(weight.shape), weight.device) if batched else (id(group),)

    return (list(run) for _, run in itertools.groupby(groups, together))


def whitened(problem: Problem) -> tuple[Tensor, Tensor]:
    """``R W`` in float32 with entries near 1, whatever the calibration size, and its scale."""
    return unit_scale(problem.whitener @ problem.weight.double())


def solve(
    config: CoSpaDiConfig,
    batch: Sequence[Problem],
    targets: Float[Tensor, "batch d_in d_out"],
    scales: Sequence[Tensor],
    members: int = 1,
) -> list[Any]:
    """A solution of every target, at the bits of ``members`` projections side by side in each.

    ``targets`` are the whitened weights of ``batch`` over ``scales``.
    """
    _, d_in, d_out = targets.shape
    shape = d_in, d_out // members, config.compression_ratio
    if config.fixed_atoms == IDENTITY:
        return search.beside_identity(
            targets,
            torch.stack([(problem.whitener / scale).float() for problem, scale in zip(batch, scales, strict=True)]),
            torch.stack([problem.weight.float() for problem in batch]),
            config.compression_ratio,
            LEARNED_FRACTIONS if config.learned_atoms == AUTO else [config.learned_atoms],
            htp_settings(config),
            members,
        )
    if config.solver == "htp" and config.rho == AUTO:
        return search.learned_only(targets, config.compression_ratio, htp_settings(config), members)
    atoms, sparsity = budget.atoms_and_sparsity(*shape, config.rho, config.accounting, members)
    if config.solver == "htp":
        return htp_batch(targets, atoms, sparsity, **htp_settings(config))
    (problem,), target = batch, targets[0]
    if config.solver == "ksvd":
        return [ksvd(target, atoms, sparsity, config.rounds, config.power_iterations, config.seed)]
    atoms, sparsity = budget.within_eigenbasis(*shape, atoms, sparsity, config.accounting, members)
    if config.solver == "orthogonal":
        return [orthogonal(target, atoms, sparsity, config.rounds)]
    return [one_shot(target, atoms, sparsity, problem.whitener)]


def htp_settings(config: CoSpaDiConfig) -> dict[str, Any]:
    return {
        "n_rounds": config.rounds,
        "balanced": config.support == "column",
        "first_step": config.first_step,
        "last_step": config.last_step,
        "cg_steps": config.cg_steps,
        "tolerance": config.tolerance,
    }
