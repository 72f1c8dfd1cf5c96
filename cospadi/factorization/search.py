"""How many atoms a matrix gets: a few sizes of equal bytes are tried for a few rounds, the best one is run to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.settings import PROBE_ROUNDS, RHOS, probe_step
from cospadi.factorization.solvers.htp import first_atoms, htp_batch, relative_error
from cospadi.factorization.solvers.low_rank import left_singular_vectors
from cospadi.factorization.solvers.solution import Solution

WITHIN_REACH = 1.15
"""How far above the error without learned atoms a short run with them may end and still be worth a full one."""
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

    def solve(which: list[int], size: Size, n_rounds: int) -> list[Solution]:
        start = first_atoms(targets[which], *size, basis[which])
        return htp_batch(targets[which], *size, **settings | {"n_rounds": n_rounds}, start=start)

    everything = list(range(len(targets)))
    n_rounds = settings["n_rounds"]
    if len(sizes) == 1:
        return solve(everything, sizes[0], n_rounds)
    # Matrices that chose the same size are run to the end as one batch.
    chosen, _ = _probed(len(targets), sizes, solve)
    solutions: dict[int, Solution] = {}
    for candidate in sorted(set(chosen)):
        which = [i for i in everything if chosen[i] == candidate]
        solutions |= dict(zip(which, solve(which, sizes[candidate], n_rounds), strict=True))
    return [solutions[i] for i in everything]


@torch.no_grad()
def beside_identity(
    targets: Float[Tensor, "batch d_in d_out"],
    whiteners: Float[Tensor, "batch d_in d_in"],
    weights: Float[Tensor, "batch d_in d_out"],
    compression_ratio: float,
    fractions: Sequence[float],
    settings: dict[str, Any],
    members: int = 1,
) -> list[Solution]:
    """``Y ≈ [R D] S``: identity atoms, whitened, and the best of ``fractions`` of the shorter side learned ones.

    ``fractions`` is one, or several from 0 up.

    Coding starts from the weight itself, which reproduces ``Y = R W`` but is not sparse. Without learned atoms what
    comes out is sparse least squares on the weight, settled in a third of the rounds; learned atoms start as singular
    vectors of what that leaves over, and are kept where they end lower. Of ``members`` projections side by side each has
    its share of the bits.

    Raises:
        UserError: when there is no room for one non-zero per column.
    """
    _, d_in, d_out = targets.shape
    sizes = _those_that_fit(
        lambda fraction: size_beside_identity(d_in, d_out // members, compression_ratio, fraction, members), fractions
    )
    codes = weights.mT.contiguous()

    def solve(
        which: list[int], size: Size, n_rounds: int, start: Tensor | None = None, every: int = 1
    ) -> list[Solution]:
        further = {"n_rounds": n_rounds, "fixed": whiteners[which], "fixed_codes": codes[which, ::every]}
        start = None if start is None else start[which, :, : size[0]]
        return htp_batch(targets[which, :, ::every], *size, **settings | further, start=start)

    everything = list(range(len(targets)))
    n_rounds = settings["n_rounds"]
    # Without learned atoms, sparse least squares on the weight settles in a third of the rounds.
    solutions = solve(everything, sizes[0], n_rounds if sizes[0][0] else max(1, n_rounds // 3))
    if len(sizes) == 1:
        return solutions

    # Learned atoms start where the identity's atoms leave most: singular vectors of the residual.
    explained = torch.stack([r @ fit.coefficients for r, fit in zip(whiteners, solutions, strict=True)])
    basis = left_singular_vectors(targets - explained, max(atoms for atoms, _ in sizes))
    # Sizes are ranked, not solved, so a part of many columns will do.
    every = probe_step(targets.shape[2])
    chosen, errors = _probed(len(targets), sizes[1:], lambda which, size, n: solve(which, size, n, basis, every))
    without = [relative_error(y[:, ::every], z[:, ::every]) for y, z in zip(targets, explained, strict=True)]

    # A full run only where the short one came near, and its result only where it ends lower.
    for candidate, size in enumerate(sizes[1:]):
        which = [i for i in everything if chosen[i] == candidate and errors[i] < WITHIN_REACH * without[i]]
        if not which:
            continue
        for i, with_atoms in zip(which, solve(which, size, n_rounds, basis), strict=True):
            solutions[i] = min(solutions[i], with_atoms, key=lambda solution: solution.errors[-1])
    return solutions


def size_beside_identity(d_in: int, d_out: int, compression_ratio: float, fraction: float, members: int = 1) -> Size:
    """So many learned atoms beside the identity's, and the mean number of non-zeros per column that leaves.

    Of the same number in every column, the fraction is lost: less than a value per column.

    >>> size_beside_identity(576, 576, 0.5, 0.0625)
    (36, 213.75)

    Raises:
        UserError: when there is no room for one non-zero per column.
    """
    columns = members * d_out
    atoms = round(fraction * min(d_in, columns))
    return atoms, budget.nonzeros(d_in, d_out, compression_ratio, atoms, members, at_least=columns) / columns


def affordable(d_in: int, d_out: int, compression_ratio: float, fraction: float, members: int = 1) -> float:
    """``fraction``, or 0 where so many learned atoms would hold more numbers than they leave for values.

    >>> affordable(576, 192, 0.5, 0.0625), affordable(576, 192, 0.85, 0.0625), affordable(32, 32, 0.85, 0.0625)
    (0.0625, 0.0, 0.0)
    """
    try:
        atoms, sparsity = size_beside_identity(d_in, d_out, compression_ratio, fraction, members)
    except UserError:  # not even one value a column would be left
        return 0.0
    return fraction if atoms * d_in <= sparsity * members * d_out else 0.0


def _those_that_fit(size_of: Callable[[float], Size], candidates: Sequence[float]) -> list[Size]:
    """The sizes that the budget has room for.

    Raises:
        UserError: when it has room for none.
    """
    sizes: list[Size] = []
    error: UserError | None = None
    for candidate in candidates:
        try:
            sizes.append(size_of(candidate))
        except UserError as refused:
            error = refused
    if error and not sizes:
        raise error
    return list(dict.fromkeys(sizes))


def _probed(count: int, sizes: Sequence[Size], solve: Solve) -> tuple[list[int], list[float]]:
    """The best size of every matrix after a short run, and its error; sizes go up until the matrix gains no more."""
    chosen = [0] * count
    lowest = [float("inf")] * count
    improving = list(range(count))
    for candidate, size in enumerate(sizes):
        errors = {i: s.errors[-1] for i, s in zip(improving, solve(improving, size, PROBE_ROUNDS), strict=True)}
        # Every matrix decides for itself, so that its size does not depend on what else is in the batch.
        improving = [i for i in improving if errors[i] < lowest[i]]
        for i in improving:
            chosen[i] = candidate
            lowest[i] = errors[i]
        if not improving:
            break
    return chosen, lowest
