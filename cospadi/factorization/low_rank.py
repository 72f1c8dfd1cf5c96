"""Truncated SVD, through the Gram of the shorter side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def truncated_svd(
    matrix: Float[Tensor, "rows columns"], rank: int
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """``left, right`` with ``left @ right`` the best rank-``rank`` approximation of ``matrix`` (Eckart-Young).

    One eigendecomposition of the shorter side's Gram in float64, several times cheaper than an SVD: only the leading
    subspace is needed, the other factor follows by projection. On the short side the factor is orthonormal.
    """
    matrix = matrix.double()
    rows, columns = matrix.shape
    if rows <= columns:
        basis = leading_eigenvectors(matrix @ matrix.T, rank)
        return basis, basis.T @ matrix
    basis = leading_eigenvectors(matrix.T @ matrix, rank)
    return matrix @ basis, basis.T


def leading_eigenvectors(gram: Float[Tensor, "n n"], count: int) -> Float[Tensor, "n count"]:
    """Eigenvectors of a symmetric matrix with the ``count`` largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]


def left_singular_vectors(matrix: Float[Tensor, "rows columns"], count: int) -> Float[Tensor, "rows count"]:
    """The first ``count`` left singular vectors; ``count`` is at most ``min(rows, columns)``."""
    matrix = matrix.double()
    rows, columns = matrix.shape
    if rows <= columns:
        return leading_eigenvectors(matrix @ matrix.T, count)
    vectors = matrix @ leading_eigenvectors(matrix.T @ matrix, count)
    return vectors / vectors.norm(dim=0).clamp_min(torch.finfo(matrix.dtype).tiny)
