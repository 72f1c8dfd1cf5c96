"""The recipe of arXiv:2509.22075 written down plainly in torch: the yardstick of the benchmark.

Nothing here is tuned for a shape or compiled, and nothing outside the benchmark uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 16 * 2**20
"""Working memory of the columns that are coded together: what falls out of a core's cache is half as fast."""
CUDA_CHUNK_BYTES = 2**30
"""The same on a GPU, which is idle unless it gets many columns."""


@torch.no_grad()
def ksvd_plain(
    target: Float[Tensor, "d_in d_out"],
    atoms: int,
    sparsity: int,
    n_rounds: int = 60,
    power_iterations: int = 8,
    seed: int = 42,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Float[Tensor, "d_in atoms"], Float[Tensor, "atoms d_out"]]:
    """Dictionary and coefficients of the best of ``n_rounds`` rounds of `omp` and `sweep`, from random columns.

    ``progress(rounds_done, error)`` hears ``‖Y − D S‖_F / ‖Y‖_F`` after every round.
    """
    dictionary = random_columns(target, atoms, seed)
    best = None
    for done in range(1, n_rounds + 1):
        coefficients = omp(dictionary, target, sparsity)
        dictionary, coefficients = sweep(dictionary, coefficients, target, power_iterations)
        residual = target - dictionary @ coefficients
        error = float(residual.norm() / target.norm())
        if best is None or error < best[0]:
            best = error, dictionary, coefficients
        if progress is not None:
            progress(done, error)
        unused = (coefficients == 0).all(dim=1).nonzero()[:, 0]
        if len(unused):  # the columns that are represented worst take their places
            worst = residual.norm(dim=0).argsort(descending=True)[: len(unused)]
            dictionary = dictionary.index_copy(1, unused[: len(worst)], unit(target[:, worst]))
    return best[1], best[2]


def random_columns(target: Float[Tensor, "d_in d_out"], atoms: int, seed: int) -> Float[Tensor, "d_in atoms"]:
    """Distinct random columns of ``target``, made unit; Gaussian directions where they are too few."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(target.shape[1], generator=draw)[:atoms]
    gaussian = torch.randn(len(target), atoms - len(chosen), generator=draw).to(target)
    return unit(torch.cat([target[:, chosen.to(target.device)], gaussian], dim=1))


def unit(columns: Float[Tensor, "d_in atoms"]) -> Float[Tensor, "d_in atoms"]:
    return columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)


@torch.no_grad()
def omp(
    dictionary: Float[Tensor, "d_in atoms"], target: Float[Tensor, "d_in d_out"], sparsity: int
) -> Float[Tensor, "atoms d_out"]:
    """Orthogonal matching pursuit of every column, on the Gram of the dictionary, many columns at a time."""
    gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
    sparsity = min(sparsity, *dictionary.shape)
    coefficients = torch.zeros_like(correlations)
    per_column = gram.element_size() * sparsity * (len(gram) + sparsity)
    chunk = max(16, (CUDA_CHUNK_BYTES if gram.is_cuda else CHUNK_BYTES) // per_column)
    for part, out in zip(correlations.split(chunk), coefficients.split(chunk), strict=True):
        out.scatter_(1, *_pursue(gram, part, sparsity))
    return coefficients.T.contiguous()


def _pursue(
    gram: Float[Tensor, "atoms atoms"], correlations: Float[Tensor, "columns atoms"], sparsity: int
) -> tuple[Int[Tensor, "columns sparsity"], Float[Tensor, "columns sparsity"]]:
    """Atoms taken, in order, and their values.

    ``inverse`` grows into the inverse Cholesky factor of the support's Gram by a row per step, ``basis[i] = Dᵀqᵢ`` (all
    columns in one row) is the same step's orthonormal direction seen by all atoms, and ``correlations = Dᵀr`` moves by
    ``Dᵀq (qᵀr)``. A column whose residual is rounding noise goes on with zero steps.
    """
    columns, atoms = correlations.shape
    offset = atoms * torch.arange(columns, device=gram.device)
    rounding = 64 * torch.finfo(gram.dtype).eps
    correlations = correlations.clone()
    vanished = rounding * correlations.abs().amax(dim=1)
    inverse = gram.new_zeros(columns, sparsity, sparsity)
    basis = gram.new_empty(sparsity, columns * atoms)
    steps = gram.new_zeros(columns, sparsity)
    support = torch.zeros(columns, sparsity, dtype=torch.long, device=gram.device)
    taken = torch.zeros_like(correlations)
    for i in range(sparsity):
        largest, atom = correlations.abs().add_(taken).max(dim=1)
        known = basis[:i].index_select(1, offset + atom).T.contiguous()[:, None]  # the atom, in the span so far
        left = gram.diagonal()[atom] - known.square().sum(dim=(1, 2))
        scale = torch.where((largest > vanished) & (left > rounding), left, torch.inf).rsqrt()
        newest = torch.cat([-torch.bmm(known, inverse[:, :i, :i])[:, 0], torch.ones_like(scale)[:, None]], dim=1)
        newest *= scale[:, None]
        inverse[:, i, : i + 1] = newest
        support[:, i] = atom
        steps[:, i] = scale * correlations.gather(1, atom[:, None])[:, 0]
        taken.scatter_(1, atom[:, None], -torch.inf)
        direction = F.embedding_bag(support[:, : i + 1], gram, per_sample_weights=newest, mode="sum")
        basis[i] = direction.view(-1)
        correlations.addcmul_(direction, steps[:, i : i + 1], value=-1)
    return support, torch.bmm(steps[:, None], inverse)[:, 0]


@torch.no_grad()
def sweep(
    dictionary: Float[Tensor, "d_in atoms"],
    coefficients: Float[Tensor, "atoms d_out"],
    target: Float[Tensor, "d_in d_out"],
    power_iterations: int = 8,
) -> tuple[Float[Tensor, "d_in atoms"], Float[Tensor, "atoms d_out"]]:
    """Refit every atom with its coefficients, one after another: the rank-1 approximation of what the others leave."""
    rows = (target - dictionary @ coefficients).T.contiguous()
    dictionary = dictionary.T.clone(memory_format=torch.contiguous_format)
    coefficients = coefficients.clone()
    for j, used in enumerate(coefficients != 0):
        columns = used.nonzero()[:, 0]
        if not len(columns):
            continue
        atom = dictionary[j]
        error = torch.addr(rows[columns], coefficients[j, columns], atom)
        values = error @ atom
        for _ in range(power_iterations):
            direction = values @ error
            length = direction.norm()
            atom = torch.where(length > 0, direction / length, atom)
            values = error @ atom
        rows[columns] = torch.addr(error, values, atom, alpha=-1)
        dictionary[j], coefficients[j, columns] = atom, values
    return dictionary.T.contiguous(), coefficients
