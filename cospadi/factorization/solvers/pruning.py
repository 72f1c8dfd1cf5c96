"""Which weights stay, and what they become: magnitude, Wanda, SparseGPT. All on ``(d_in, d_out)`` weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.factorization.solvers.htp import largest


def keep_largest(weight: Float[Tensor, "d_in d_out"], nonzeros: int) -> Float[Tensor, "d_in d_out"]:
    """``weight`` with its ``nonzeros`` largest entries, whichever output they belong to."""
    return weight * _largest_anywhere(weight, nonzeros)


def wanda(
    weight: Float[Tensor, "d_in d_out"],
    input_norms: Float[Tensor, " d_in"],
    nonzeros: int,
    pattern: tuple[int, int] | None = None,
) -> Float[Tensor, "d_in d_out"]:
    """``weight`` with the entries of largest ``|w_ij| · ‖x_i‖`` of every output (Wanda, arXiv:2306.11695, equation 1).

    Args:
        weight: the dense weight.
        input_norms: ``‖x_i‖₂`` of every input over the calibration tokens.
        nonzeros: non-zeros of every output; not read with a pattern.
        pattern: ``(n, m)``: n of every m consecutive inputs instead.
    """
    scores = (weight.abs() * input_norms[:, None]).T
    if pattern is None:
        return weight * largest(scores, nonzeros).T
    kept, group = pattern
    return weight * largest(scores.reshape(-1, group), kept).view(scores.shape).T


@torch.no_grad()
def sparsegpt(
    weight: Float[Tensor, "d_in d_out"],
    gram: Float[Tensor, "d_in d_in"],
    nonzeros: int,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Float[Tensor, "d_in d_out"]:
    """Optimal brain surgeon, one input after the other for all outputs at once (SparseGPT, arXiv:2301.00774, algorithm 1).

    Removing ``w_i`` of an output costs ``w_i² / (H⁻¹)_ii`` when the inputs after ``i`` make up for it, which they do by
    ``−w_i / (H⁻¹)_ii · (H⁻¹)_i,i+1:``; ``H`` is the gram of the inputs not yet passed. All of these inverses are in one
    triangular factor ``UᵀU = H⁻¹``: their ``(H⁻¹)_ii`` is ``u_ii²`` and their row is ``u_ii · U_i,i:``.

    The mask of ``block_size`` inputs is chosen at once, as the cheapest removals over all outputs, so that outputs may
    differ in how many stay. Each block has its share of ``nonzeros``.

    Args:
        weight: the dense weight, in float64.
        gram: ``XᵀX``, positive definite.
        nonzeros: non-zeros of the whole weight; not read with a pattern.
        pattern: ``(n, m)``: n of every m consecutive inputs of an output, chosen when the first of them is reached.
        block_size: a multiple of m.
        damping: ridge on the gram, as a fraction of its mean diagonal.
    """
    d_in = len(weight)
    factor = inverse_factor(gram, damping)
    left = weight.clone()  # what is left to prune, with all corrections so far
    sparse = torch.zeros_like(weight)
    for first in range(0, d_in, block_size):
        last = min(first + block_size, d_in)
        block = left[first:last]
        triangle = factor[first:last, first:last]
        errors = torch.empty_like(block)
        kept = torch.empty_like(block)
        # Without a pattern the whole block's mask is chosen now: those go whose removal costs least.
        if pattern is None:
            share = nonzeros * last // d_in - nonzeros * first // d_in
            kept = _largest_anywhere(block / triangle.diagonal()[:, None], share)
        for i in range(last - first):
            # With a pattern the mask of a group is chosen when it is reached, after all corrections to it.
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                costs = block[group] / triangle.diagonal()[group, None]
                kept[group] = largest(costs.T, pattern[0]).T
            # Prune the input, and let the later inputs of the block make up for it.
            sparse[first + i] = block[i] * kept[i]
            errors[i] = (block[i] - sparse[first + i]) / triangle[i, i]
            block[i:] -= triangle[i, i:, None] * errors[i]
        # Inputs beyond the block take all of its corrections in one product.
        left[last:] -= factor[first:last, last:].T @ errors
    return sparse


def inverse_factor(gram: Float[Tensor, "d_in d_in"], damping: float) -> Float[Tensor, "d_in d_in"]:
    """Upper-triangular ``U`` with ``UᵀU = (gram + damping · mean(diag(gram)) · I)⁻¹``, in float64.

    From the factor ``A Aᵀ`` of the matrix itself with ``A`` upper (Cholesky from the last row up): ``U = A⁻¹``.
    """
    gram = gram.double()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damped = gram + damping * gram.diagonal().mean() * identity
    backwards = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(backwards, identity, upper=True)


def _largest_anywhere(values: Tensor, count: int) -> Tensor:
    """1 where the ``count`` largest magnitudes of a whole matrix are, 0 elsewhere."""
    if count == 0:
        return torch.zeros_like(values)
    return largest(values.reshape(1, -1), count).view(values.shape)
