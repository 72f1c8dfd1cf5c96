"""Orthonormal dictionaries: Procrustes and hard thresholding in turn (COMPOT's factorization)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.solvers.htp import largest, relative_error
from cospadi.factorization.solvers.low_rank import left_singular_vectors
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import require_finite


@torch.no_grad()
def orthogonal(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    n_rounds: int = 20,
    progress: Callable[[int, float], None] | None = None,
) -> Solution:
    """Minimise ``‖Y − D S‖_F`` over ``DᵀD = I`` and ``S`` with ``sparsity`` non-zeros per column.

    Both steps are exact: for an orthonormal ``D`` the best sparse code keeps the largest entries of each column of
    ``DᵀY``, and for a given ``S`` the best ``D`` is the polar factor ``U Vᵀ`` of ``Y Sᵀ = U Σ Vᵀ`` (Procrustes), so the
    error never rises. Starts from the left singular vectors of ``Y``. The factorization of COMPOT, at a uniform budget.

    Raises:
        UserError: more atoms than ``d_in``, which cannot be orthonormal, or a target that is not finite.
    """
    require_finite("target", target)
    if atoms > len(target):
        raise UserError(
            f"{atoms} atoms of length {len(target)} cannot be orthonormal. Lower factorization.rho, or take another solver."
        )
    dictionary = _completed(left_singular_vectors(target, min(atoms, *target.shape)), atoms)
    errors: list[float] = []
    for done in range(n_rounds + 1):
        # For an orthonormal dictionary, thresholding DᵀY is the exact sparse code.
        codes = target.T @ dictionary
        codes *= largest(codes, sparsity)
        errors.append(relative_error(target, dictionary @ codes.T))
        if progress is not None:
            progress(done, errors[-1])
        # Procrustes: the orthonormal dictionary nearest to the codes is the polar factor of Y Sᵀ.
        if done < n_rounds:
            left, _, right = torch.linalg.svd(target @ codes, full_matrices=False)
            dictionary = left @ right
    return Solution(dictionary, codes.T, errors)


def _completed(basis: Float[Tensor, "d_in n"], atoms: int) -> Float[Tensor, "d_in atoms"]:
    """An orthonormal basis of ``atoms`` columns that begins with (the span of) ``basis``."""
    if basis.shape[1] == atoms and _is_orthonormal(basis):
        return basis
    everything = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    return torch.linalg.qr(torch.cat([basis, everything], dim=1)).Q[:, :atoms]


def _is_orthonormal(basis: Tensor) -> bool:
    """False where the target is singular: its missing singular vectors come out as zeros."""
    gram = basis.T @ basis
    return bool((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max() < 1e-3)
