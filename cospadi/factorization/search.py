"""How many atoms a matrix gets: a few sizes of equal bytes are tried for a few rounds, the best one is run to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.htp import Solution, first_atoms, htp_batch
from cospadi.factorization.low_rank import left_singular_vectors

RHOS = (2.0, 2.5, 3.0, 3.5)
LEARNED = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Learned atoms beside identity atoms, in fractions of ``d_in``."""
PROBE_ROUNDS = 6
"""Enough to tell which of the candidates ends lowest, to about a percent of the error."""

Size = tuple[int, int | float]
"""Atoms that are stored, and non-zeros per column."""
Solve = Callable[[list[int], Size, int], list[Solution]]
"""Some of the matrices of a batch, by number, in some size for so many rounds."""


def learned_only(
    targets: Float[Tensor, "batch d_in d_out"], compression_ratio: float, settings: dict[str, Any], members: int = 1
) -> list[Solution]:
    """The best of `RHOS` for every matrix; one eigenbasis for all.

    Nothing else is worth reusing: a dictionary fitted at a neighbouring rho is a worse start than the eigenbasis
    (docs/solver-log.md).

    Raises:
        UserError: when there is no room for one atom and one non-zero per column.
    """
    _, d_in, d_out = targets.shape
    sizes = _those_that_fit(
        lambda rho: budget.atoms_and_sparsity(d_in, d_out // members, compression_ratio, rho, members=members), RHOS
    )
    basis = left_singular_vectors(targets, min(d_in, d_out))

    def solve(members: list[int], size: Size, n_rounds: int) -> list[Solution]:
        start = first_atoms(targets[members], *size, basis[members])
        return htp_batch(targets[members], *size, **settings | {"n_rounds": n_rounds}, start=start)

    return _best(len(targets), sizes, solve, settings["n_rounds"])


def beside_identity(
    targets: Float[Tensor, "batch d_in d_out"],
    whiteners: Float[Tensor, "batch d_in d_in"],
    weights: Float[Tensor, "batch d_in d_out"],
    compression_ratio: float,
    fractions: Sequence[float],
    settings: dict[str, Any],
    members: int = 1,
) -> list[Solution]:
    """``Y ≈ [R D] S``: identity atoms, whitened, and the best of ``fractions`` of ``d_in`` learned ones.

    Coding starts from the weight itself, which reproduces ``Y = R W`` but is not sparse. Without learned atoms what
    comes out is sparse least squares on the weight. Learned atoms start as singular vectors of what that leaves over;
    one such run serves all candidates. Of ``members`` projections side by side each has its share of the bits.

    Raises:
        UserError: when there is no room for one non-zero per column.
    """
    _, d_in, d_out = targets.shape
    sizes = _those_that_fit(
        lambda fraction: size_beside_identity(d_in, d_out // members, compression_ratio, fraction, members), fractions
    )
    codes = weights.mT.contiguous()
    starts: list[Tensor] = []

    def solve(members: list[int], size: Size, n_rounds: int) -> list[Solution]:
        start = starts[0][members, :, : size[0]] if starts and size[0] <= starts[0].shape[2] else None
        given = settings | {"n_rounds": n_rounds, "fixed": whiteners[members], "fixed_codes": codes[members]}
        found = htp_batch(targets[members], *size, **given, start=start)
        if size[0] == 0 and not starts and len(members) == len(targets):
            left = torch.stack([y - r @ s.coefficients for y, r, s in zip(targets, whiteners, found, strict=True)])
            starts.append(left_singular_vectors(left, min(d_in, d_out)))
        return found

    return _best(len(targets), sizes, solve, settings["n_rounds"])


def size_beside_identity(d_in: int, d_out: int, compression_ratio: float, fraction: float, members: int = 1) -> Size:
    """So many learned atoms beside the identity's, and the mean number of non-zeros per column that leaves.

    Raises:
        UserError: when there is no room for one non-zero per column.
    """
    atoms, columns = round(fraction * d_in), members * d_out
    return atoms, budget.nonzeros(d_in, d_out, compression_ratio, atoms, members, at_least=columns) / columns


def _those_that_fit(size_of: Callable[[float], Size], candidates: Sequence[float]) -> list[Size]:
    """The sizes that the budget has room for.

    Raises:
        UserError: when it has room for none.
    """
    sizes, error = [], None
    for candidate in candidates:
        try:
            sizes.append(size_of(candidate))
        except UserError as refused:
            error = refused
    if error and not sizes:
        raise error
    return list(dict.fromkeys(sizes))


def _best(count: int, sizes: Sequence[Size], solve: Solve, n_rounds: int) -> list[Solution]:
    """A short run of every size; then full ones of each matrix' best and of the first, of which the lower error is kept.

    Sizes go up until no matrix gains any more.
    """
    everything = list(range(count))
    if len(sizes) == 1:
        return solve(everything, sizes[0], n_rounds)
    lowest = torch.full((count,), torch.inf, dtype=torch.float64)
    chosen = torch.zeros(count, dtype=torch.long)
    for candidate, size in enumerate(sizes):
        errors = torch.tensor([s.errors[-1] for s in solve(everything, size, PROBE_ROUNDS)], dtype=torch.float64)
        gains = errors < lowest
        chosen[gains], lowest = candidate, torch.minimum(errors, lowest)
        if not gains.any():
            break
    solutions = solve(everything, sizes[0], n_rounds)
    for candidate in sorted(set(chosen.tolist()) - {0}):
        members = (chosen == candidate).nonzero()[:, 0].tolist()
        for member, found in zip(members, solve(members, sizes[candidate], n_rounds), strict=True):
            solutions[member] = min(solutions[member], found, key=lambda solution: solution.errors[-1])
    return solutions
