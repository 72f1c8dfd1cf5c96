"""CoSpaDi's own steps around its solvers: what is solved together, whitened targets, the dictionary's own metric."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.factorization import budget, search
from cospadi.factorization.problem import Problem, unit_scale
from cospadi.factorization.settings import IDENTITY, OWN_ROUNDS, CoSpaDiConfig
from cospadi.factorization.solver_table import SOLVERS
from cospadi.factorization.solvers.shared import shared_htp
from cospadi.factorization.solvers.solution import Solution


def batches(config: CoSpaDiConfig, groups: Sequence[Sequence[Problem]]) -> Iterator[list[Sequence[Problem]]]:
    """Runs of groups that are solved together.

    On a GPU a solver that takes batches gets all single projections of one shape at once. Everything else comes alone.
    """

    def key(group: Sequence[Problem]) -> tuple[object, ...]:
        weight = group[0].weight
        batched = SOLVERS[config.solver].solves_batches and weight.is_cuda and len(group) == 1
        return (tuple(weight.shape), weight.device, group[0].ratio) if batched else (id(group),)

    return (list(run) for _, run in itertools.groupby(groups, key))


def whitened(
    problems: Sequence[Problem],
) -> tuple[Float[Tensor, "batch d_in d_out"], Float[Tensor, " batch"]]:
    """``R W`` of every problem in float32 with entries near 1, whatever the calibration size, and the scales divided out."""
    targets, scales = zip(*(unit_scale(p.whitener @ p.weighed(p.weight)) for p in problems), strict=True)
    return torch.stack(targets), torch.stack(scales)


def atoms_and_sparsity(
    config: CoSpaDiConfig, d_in: int, d_out: int, members: int, ratio: float
) -> tuple[int, int | float]:
    """Atoms that ``members`` projections of ``d_in × d_out`` share, and non-zeros per column, where neither is searched.

    Raises:
        UserError: the budget has no room for one atom and one non-zero per column.
    """
    accounting = config.accounting
    if config.fixed_atoms == IDENTITY:
        return search.size_beside_identity(d_in, d_out, ratio, config.learned_atoms, members)
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, ratio, config.rho, accounting, members)
    if SOLVERS[config.solver].within_eigenbasis:
        return budget.within_eigenbasis(d_in, d_out, ratio, atoms, sparsity, accounting, members)
    return atoms, sparsity


def under_own_grams(config: CoSpaDiConfig, group: Sequence[Problem]) -> Solution:
    """One dictionary for a group, the error of every projection measured under its own gram (`shared_htp`).

    The coefficients of the group stand side by side.
    """
    weights = torch.stack([problem.weight.double() for problem in group])
    whiteners = torch.stack([problem.whitener for problem in group])
    _, d_in, d_out = weights.shape
    settings = SOLVERS["htp"].settings(config)
    if config.fixed_atoms == IDENTITY:
        settings |= {"identity": True, "fixed_codes": weights.mT.float()}
    return shared_htp(
        (whiteners @ weights).float(),
        whiteners,
        *atoms_and_sparsity(config, d_in, d_out, len(group), config.compression_ratio),
        own_rounds=OWN_ROUNDS,
        **settings,
    )
