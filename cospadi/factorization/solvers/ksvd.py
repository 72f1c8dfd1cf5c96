"""K-SVD dictionary learning as in the paper: rounds of sparse coding and one sweep over the atoms."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import require_finite, sparse_code
from cospadi.kernels import sweep


@torch.no_grad()
def ksvd(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    n_rounds: int = 60,
    power_iterations: int = 8,
    seed: int = 42,
    progress: Callable[[int, float], None] | None = None,
    compiled: bool = True,
) -> Solution:
    """Minimise ``‖Y − D S‖_F`` over unit-column ``D (d_in × atoms)`` and ``S`` with ``sparsity`` non-zeros a column.

    The solver of arXiv:2509.22075 with its settings: start from random columns of ``target``, then alternate
    `sparse_code` and `ksvd_sweep`. ``target`` is the whitened weight ``R W``, so the error is the layer's output error.
    After each sweep an unused atom is replaced by the worst-represented column of ``target`` (Aharon, Elad,
    Bruckstein 2006); its coefficients are zero, so the error of the round stays.

    Args:
        target: float32 or float64.
        atoms: columns of the dictionary; beyond the non-zero columns of ``target``, the start is filled up with
            random Gaussian directions.
        sparsity: non-zeros allowed in a column of the coefficients.
        n_rounds: rounds of coding and sweep.
        power_iterations: power iterations of each rank-1 approximation in a sweep.
        seed: seed of the choice of columns; drawn on the CPU, so it is the same on every device.
        progress: called as ``progress(rounds_done, error)`` after each round.
        compiled: on a CPU; otherwise what a GPU does, in plain torch: the yardstick of ``cospadi bench solver``.

    Returns:
        The round with the smallest error, and the error of every round.

    Raises:
        UserError: a count is below 1, or ``target`` is not finite.
    """
    for name, count in (("atoms", atoms), ("sparsity", sparsity), ("n_rounds", n_rounds)):
        if count < 1:
            raise UserError(f"{name}={count}: K-SVD needs at least 1.")
    require_finite("target", target)
    dictionary = first_atoms(target, atoms, seed)
    scale = target.norm().clamp_min(torch.finfo(target.dtype).tiny)
    best: tuple[float, Tensor, Tensor] | None = None
    errors: list[float] = []
    for done in range(1, n_rounds + 1):
        coefficients = sparse_code(dictionary, target, sparsity, compiled=compiled)
        dictionary, coefficients, residual = ksvd_sweep(dictionary, coefficients, target, power_iterations, compiled)
        errors.append(float(residual.norm() / scale))
        if best is None or errors[-1] < best[0]:
            best = errors[-1], dictionary, coefficients
        if progress is not None:
            progress(done, errors[-1])
        # An atom that nothing uses would stay unused: it becomes what the dictionary explains worst.
        if done < n_rounds:
            dictionary = _replace_unused(dictionary, coefficients, target, residual)
    return Solution(best[1], best[2], errors)


@torch.no_grad()
def first_atoms(target: Float[Tensor, "d_in d_out"], atoms: int, seed: int) -> Float[Tensor, "d_in atoms"]:
    """Distinct random non-zero columns of ``target``, made unit; where they are too few, random Gaussian directions."""
    draw = torch.Generator().manual_seed(seed)
    nonzero = target.norm(dim=0).nonzero()[:, 0].cpu()
    chosen = nonzero[torch.randperm(len(nonzero), generator=draw)[:atoms]].to(target.device)
    gaussian = torch.randn(len(target), atoms - len(chosen), generator=draw, dtype=torch.float64).to(target)
    dictionary = torch.cat([target[:, chosen], gaussian], dim=1)
    return dictionary / dictionary.norm(dim=0)


@torch.no_grad()
def ksvd_sweep(
    dictionary: Float[Tensor, "d_in atoms"],
    coefficients: Float[Tensor, "atoms d_out"],
    target: Float[Tensor, "d_in d_out"],
    power_iterations: int = 8,
    compiled: bool = True,
) -> tuple[Float[Tensor, "d_in atoms"], Float[Tensor, "atoms d_out"], Float[Tensor, "d_in d_out"]]:
    """Refit every atom ``d_j`` together with its coefficients ``s_j``, one after another, supports kept.

    With ``E = Y − Σ_{i≠j} d_i s_iᵀ`` on the columns that use atom ``j`` (Aharon, Elad, Bruckstein 2006), ``(d_j, s_j)``
    becomes the rank-1 approximation of ``E`` that ``power_iterations`` rounds of

        ``s ← Eᵀd``,    ``d ← E s / ‖E s‖``

    reach from the current atom, then ``s_j = Eᵀd_j``. No step raises ``‖Y − D S‖_F``. ``E`` is read off the
    residual, which is kept up to date. Atoms nothing uses stay as they are. On a CPU the loops are compiled
    (`cospadi.kernels.sweep`) unless ``compiled`` is false.

    Returns:
        dictionary, coefficients and the residual ``Y − D S``, all new tensors.
    """
    residual = (target.T - coefficients.T @ dictionary.T).contiguous()
    dictionary, coefficients = (
        old.clone(memory_format=torch.contiguous_format) for old in (dictionary.T, coefficients)
    )
    refit = sweep.sweep if compiled and target.device.type == "cpu" else _sweep
    refit(residual, dictionary, coefficients, power_iterations)
    return dictionary.T.contiguous(), coefficients, residual.T


def _sweep(
    residual: Float[Tensor, "d_out d_in"],
    dictionary: Float[Tensor, "atoms d_in"],
    coefficients: Float[Tensor, "atoms d_out"],
    power_iterations: int,
) -> None:
    """What `cospadi.kernels.sweep.sweep` does, in nothing but torch: for a GPU."""
    # Whoever uses an atom is known beforehand, since supports are kept: one transfer to the host instead of many.
    used = coefficients != 0
    users = used.nonzero()[:, 1].split(used.sum(1).tolist())
    for j, columns in enumerate(users):
        if not len(columns):
            continue
        # E = residual + d_j s_jᵀ on the columns that use the atom.
        atom = dictionary[j]
        error = torch.addr(residual[columns], coefficients[j, columns], atom)
        values = error @ atom
        for _ in range(power_iterations):
            direction = values @ error
            length = direction.norm()
            atom = torch.where(length > 0, direction / length, atom)  # nothing is left to fit: the atom stays
            values = error @ atom

        # The next atom is refit against what this one leaves.
        residual[columns] = error.addr_(values, atom, alpha=-1)
        dictionary[j] = atom
        coefficients[j, columns] = values


def _replace_unused(
    dictionary: Float[Tensor, "d_in atoms"],
    coefficients: Float[Tensor, "atoms d_out"],
    target: Float[Tensor, "d_in d_out"],
    residual: Float[Tensor, "d_in d_out"],
) -> Float[Tensor, "d_in atoms"]:
    """Put the columns of ``target`` with the largest residual, made unit, in place of atoms no column uses."""
    unused = (coefficients == 0).all(dim=1).nonzero()[:, 0]
    worst = residual.norm(dim=0).argsort(descending=True, stable=True)[: len(unused)]
    lengths = target[:, worst].norm(dim=0)
    worst = worst[lengths > 0]
    lengths = lengths[lengths > 0]
    dictionary = dictionary.clone()
    dictionary[:, unused[: len(worst)]] = target[:, worst] / lengths
    return dictionary
