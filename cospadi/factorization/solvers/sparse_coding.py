"""Sparse coding: orthogonal matching pursuit (OMP) on the Gram of the dictionary, compiled for CPUs, batched on GPUs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.kernels import pursuit

GPU_FRACTION = 0.25
"""Share of the free memory of a CUDA GPU that one chunk of columns may fill."""
CPU_BYTES = 16 * 2**20
"""The same on a CPU whose compiled loops are left aside: what falls out of a core's cache is half as fast."""
CPU_COLUMNS = 16
"""Fewer columns at a time than this and a CPU spends its time in calls."""


@torch.no_grad()
def sparse_code(
    dictionary: Float[Tensor, "d_in atoms"],
    target: Float[Tensor, "d_in d_out"],
    sparsity: int,
    chunk: int | None = None,
    compiled: bool = True,
) -> Float[Tensor, "atoms d_out"]:
    """Greedy solution of ``min ‖y − D s‖₂  subject to  ‖s‖₀ ≤ sparsity``, for every column ``y`` of ``target``.

    Orthogonal matching pursuit: take the atom with the largest ``|dᵀr|``, refit all values by least squares, repeat.
    The step in arXiv:2509.22075 that alternates with the K-SVD sweep. Work is on ``DᵀD`` and ``DᵀY`` only
    (Batch-OMP: Rubinstein, Zibulevsky, Elad, Technion CS-2008-08), with the support's basis made orthonormal one atom
    per step: with ``q`` the newest basis vector, the correlations move by

        ``Dᵀr ← Dᵀr − (Dᵀq)(qᵀr)``

    which costs a column about ``atoms · (support so far)`` multiplications, in the dtype of the inputs. On a CPU each
    thread takes columns one by one in compiled loops (`cospadi.kernels.pursuit`), with ``sparsity · (atoms + sparsity)``
    numbers of working memory; a GPU takes a chunk of them at a time, with as many numbers for each.

    A column gets exactly ``min(sparsity, atoms)`` non-zeros, or fewer if its residual vanishes or no atom outside its
    support is linearly independent of it, up to rounding. Zero columns of ``target`` get zeros, zero atoms are never
    used.

    Args:
        dictionary: unit columns, float32 or float64.
        target: the columns to code; same dtype and device.
        sparsity: non-zeros allowed in a column of the result.
        chunk: columns a GPU codes at a time, by default what fits ``GPU_FRACTION`` of its memory. No effect on the
            result but for rounding, and none at all in compiled loops.
        compiled: on a CPU; otherwise what a GPU does, in plain torch: the yardstick of ``cospadi bench solver``.

    Raises:
        UserError: ``sparsity`` or ``chunk`` is below 1, or an input is not finite.

    >>> sparse_code(torch.eye(3), torch.tensor([[3.0], [-5.0], [4.0]]), sparsity=2).T
    tensor([[ 0., -5.,  4.]])
    """
    if sparsity < 1:
        raise UserError(f"sparsity={sparsity}: a column needs at least 1 non-zero. Lower the compression ratio.")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk}: at least 1 column must be coded at a time. Leave it out to fit memory.")
    for name, tensor in (("dictionary", dictionary), ("target", target)):
        require_finite(name, tensor)
    sparsity = min(sparsity, dictionary.shape[1])
    gram = dictionary.T @ dictionary
    correlations = target.T @ dictionary
    if correlations.numel() == 0:
        return torch.zeros_like(correlations).T
    if compiled and gram.device.type == "cpu":
        return pursuit.pursue(gram, correlations, sparsity).T.contiguous()
    return _pursue_in_chunks(gram, correlations, sparsity, chunk).T.contiguous()


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise a UserError that says how many entries of ``tensor`` are NaN or infinite, if any is."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise UserError(
            f"{bad} of {tensor.numel()} entries of the {name} are NaN or infinite. "
            "Check the weight and the calibration gram it was made from."
        )


def _columns_that_fit(gram: Tensor, sparsity: int) -> int:
    """How many columns `_pursue` may take at a time."""
    atoms = len(gram)
    bytes_per_column = gram.element_size() * (sparsity * (atoms + sparsity + 4) + 4 * atoms)
    if gram.is_cuda:
        return max(1, int(GPU_FRACTION * torch.cuda.mem_get_info(gram.device)[0] / bytes_per_column))
    return max(CPU_COLUMNS, CPU_BYTES // bytes_per_column)


def _pursue_in_chunks(
    gram: Float[Tensor, "atoms atoms"],
    correlations: Float[Tensor, "columns atoms"],
    sparsity: int,
    chunk: int | None = None,
) -> Float[Tensor, "columns atoms"]:
    """What `cospadi.kernels.pursuit.pursue` does, in nothing but torch, many columns at a time: for a GPU."""
    coefficients = torch.zeros_like(correlations)
    chunk = chunk or _columns_that_fit(gram, sparsity)
    for part, out in zip(correlations.split(chunk), coefficients.split(chunk), strict=True):
        out.scatter_(1, *_pursue(gram, part, sparsity))
    return coefficients


def _pursue(
    gram: Float[Tensor, "atoms atoms"], correlations: Float[Tensor, "columns atoms"], sparsity: int
) -> tuple[Tensor, Float[Tensor, "columns sparsity"]]:
    """OMP of one chunk: the ``(columns, sparsity)`` atoms taken, in order and without repeats, and their values.

    Loop invariants for each column: ``inverse[:, i]`` holds ``f_i`` with ``q_i = D[:, support] f_i`` orthonormal (the
    columns of the inverse Cholesky factor of the support's Gram), ``basis[i] = Dᵀq_i = (DᵀD)[:, support] f_i`` (all
    columns in one row) and ``correlations = Dᵀr``. Nothing in the loop waits for a GPU, but for one look in 32 steps
    whether any column is still open. A closed column goes on with zero steps.
    """
    columns, atoms = correlations.shape
    offset = atoms * torch.arange(columns, device=gram.device)
    rounding = 64 * torch.finfo(gram.dtype).eps
    squared_norms = gram.diagonal()
    correlations = correlations.clone()
    inverse = gram.new_zeros(columns, sparsity, sparsity)
    basis = gram.new_empty(sparsity, columns * atoms)
    steps = gram.new_zeros(columns, sparsity)
    support = torch.zeros(columns, sparsity, dtype=torch.long, device=gram.device)
    penalty = torch.zeros_like(correlations)
    vanished = rounding * correlations.abs().amax(1)
    is_open = torch.ones(columns, dtype=torch.bool, device=gram.device)
    for i in range(sparsity):
        # The atom that correlates most with the residual; those taken already carry a penalty of −∞.
        largest, atom = correlations.abs().add_(penalty).max(1)
        onto_basis = basis[:i].index_select(1, offset + atom).T.contiguous()[:, None]
        # Squared norm of the part of the atom outside the span: 0 where it depends on the support.
        left = squared_norms[atom] - onto_basis.square().sum((1, 2))
        is_open = is_open & (largest > vanished) & (left > rounding * squared_norms[atom])
        if i % 32 == 0 and not is_open.any():
            support = support[:, :i]
            steps = steps[:, :i]
            inverse = inverse[:, :i, :i]
            break

        # The next row of the inverse Cholesky factor; a closed column is divided by infinity and takes no step.
        scale = torch.where(is_open, left, torch.inf).rsqrt()
        newest = torch.cat([torch.bmm(onto_basis, inverse[:, :i, :i])[:, 0].neg_(), torch.ones_like(scale)[:, None]], 1)
        newest *= scale[:, None]
        inverse[:, i, : i + 1] = newest

        # What the residual has along the new direction, and the correlations without it.
        support[:, i] = atom
        steps[:, i] = scale * correlations.gather(1, atom[:, None])[:, 0]
        penalty.scatter_(1, atom[:, None], -torch.inf)
        product = F.embedding_bag(support[:, : i + 1], gram, per_sample_weights=newest, mode="sum")
        basis[i] = product.view(-1)
        correlations.addcmul_(product, steps[:, i : i + 1], value=-1)
    return support, torch.bmm(steps[:, None], inverse)[:, 0]
