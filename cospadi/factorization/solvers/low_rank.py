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


def followed_svd(
    matrix: Float[Tensor, "rows columns"], right: Float[Tensor, "columns rank"], steps: int
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "columns rank"]]:
    """``left, right`` with ``left @ right.T`` near the truncated SVD of ``matrix``, by subspace iteration from ``right``.

    For a matrix that changes little from call to call, ``right`` being the one that came out last, a few steps follow its
    truncated SVD, each at the price of two thin products and a QR. One step is already no farther from ``matrix`` than
    the best ``anything @ right.T``, so the error of an alternation that uses it still falls.
    """
    for _ in range(steps):
        left = torch.linalg.qr(matrix @ right).Q
        right = matrix.T @ left
    return left, right


def leading_eigenvectors(gram: Float[Tensor, "*batch n n"], count: int) -> Float[Tensor, "*batch n count"]:
    """Eigenvectors of a symmetric matrix with the ``count`` largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :count]


def left_singular_vectors(
    matrix: Float[Tensor, "*batch rows columns"], count: int
) -> Float[Tensor, "*batch rows count"]:
    """The first ``count`` left singular vectors, at most ``min(rows, columns)``, in the precision of ``matrix``.

    Through the shorter side's Gram, so those of singular values below ``√ε`` of the largest are noise: orthonormal all the
    same for ``rows ≤ columns``, otherwise not even that. Good to start an iteration from.
    """
    if count == 0:
        return matrix[..., :0]  # a decomposition would be thrown away
    if matrix.shape[-2] <= matrix.shape[-1]:
        return leading_eigenvectors(matrix @ matrix.mT, count)
    vectors = matrix @ leading_eigenvectors(matrix.mT @ matrix, count)
    return vectors / vectors.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
