"""Orthogonal matching pursuit (OMP), compiled: one column at a time, in working memory that fits a core's cache."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.kernels.compiled import compiled

COLUMNS = 64
"""Columns a thread takes at a time: enough to forget the call, few enough to share the work evenly."""


def pursue(
    gram: Float[Tensor, "atoms atoms"], correlations: Float[Tensor, "columns atoms"], sparsity: int
) -> Float[Tensor, "columns atoms"]:
    """OMP of every column from ``gram = DᵀD`` and ``correlations = (DᵀY)ᵀ``: the coefficients, a row per column.

    The Cholesky factor ``L`` of the support's Gram grows by a row per step. With ``q`` the newest vector of the
    orthonormal basis of the support and ``b_k = Dᵀq_k``, the atom ``t`` taken at step ``i`` gives

        ``L[i, k] = b_k[t]``,    ``L[i, i]² = DᵀD[t, t] − Σ_k L[i, k]²``,
        ``b_i = (DᵀD[t] − Σ_k L[i, k] b_k) / L[i, i]``,    ``Dᵀr ← Dᵀr − b_i (qᵀr)``

    for the atoms not yet taken; ``Lᵀ s = Qᵀy`` gives the values at the end. Of equally correlated atoms the first is
    taken. A column ends early when nothing is left to explain or no atom is independent of its support, up to rounding.

    Columns are shared out over ``torch.get_num_threads()`` threads, each with ``sparsity · (atoms + sparsity)`` numbers
    of working memory. A column's result does not depend on the threads or on the other columns.

    Args:
        gram: float32 or float64, on the CPU.
        correlations: finite, of the same dtype.
        sparsity: non-zeros allowed in a column, at most ``atoms``.
    """
    coefficients = torch.zeros_like(correlations, memory_format=torch.contiguous_format)
    arrays = [tensor.contiguous().numpy() for tensor in (gram, correlations, coefficients)]
    rounding = arrays[0].dtype.type(64 * np.finfo(arrays[0].dtype).eps)

    def code(first: int) -> None:
        _pursue(*arrays, sparsity, rounding, first, min(first + COLUMNS, len(correlations)))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(code, range(0, len(correlations), COLUMNS)))
    return coefficients


@compiled
def _pursue(gram, correlations, coefficients, sparsity, rounding, first, last):
    """OMP of the columns from ``first`` to ``last``.

    The atoms still to be had stand at the front of ``live``, ``remaining`` and of the rows of ``basis``, at ``place``:
    a taken atom gives its place to the last one, so that steps get shorter.
    """
    atoms = len(gram)
    basis = np.empty((sparsity, atoms + -atoms % 16), gram.dtype)  # rows as long as cache lines are a tenth faster
    factor = np.empty((sparsity, sparsity), gram.dtype)
    projections = np.empty(sparsity, gram.dtype)
    support = np.empty(sparsity, np.int64)
    for column in range(first, last):
        live = np.arange(atoms)
        place = np.arange(atoms)
        remaining = correlations[column].copy()
        vanished = rounding * np.abs(remaining).max()
        taken = 0
        while taken < sparsity:
            # The atom that correlates most with the residual.
            largest, atom = _first_largest(remaining, live, atoms - taken)
            if not largest > vanished:
                break
            # Its row of L, and the squared norm of what is outside the span. On the way its place in every row of the
            # basis goes to the last atom, so that the atoms still to be had stay side by side.
            at = place[atom]
            end = atoms - taken - 1
            new = basis[taken]
            onto_basis = factor[taken]
            left = gram[atom, atom]
            for k in range(taken):
                onto_basis[k] = onto = basis[k, at]
                left -= onto * onto
                basis[k, at] = basis[k, end]
            if not left > rounding * gram[atom, atom]:
                break
            # The new basis vector's share of the target, and the atom out of the list.
            length = np.sqrt(left)
            projection = remaining[at] / length
            onto_basis[taken] = length
            projections[taken] = projection
            support[taken] = atom
            place[live[end]] = at
            remaining[at] = remaining[end]
            live[at] = live[end]

            # b_i over the atoms that are left, and the correlations without it.
            row = gram[atom]
            for j in range(end):
                new[j] = row[live[j]]
            _subtract_rows(new, onto_basis, basis, taken, end)
            for j in range(end):
                new[j] /= length
                remaining[j] -= projection * new[j]
            taken += 1

        # Values of the atoms from projections on the basis: Lᵀ s = Qᵀy.
        _solve_transposed(factor, projections, taken)
        for k in range(taken):
            coefficients[column, support[k]] = projections[k]


@compiled
def _first_largest(values, names, count):
    """The largest magnitude among the first ``count`` values, and the smallest name that goes with it."""
    largest = np.abs(values[0])
    for j in range(count):
        largest = max(largest, np.abs(values[j]))
    name = len(values) - 1
    for j in range(count):
        if np.abs(values[j]) == largest:
            name = min(name, names[j])
    return largest, name


@compiled
def _subtract_rows(out, weights, rows, count, width):
    """``out -= Σ_k weights[k] · rows[k]`` over the first ``count`` rows, up to ``width``: nearly all the time is here.

    Eight rows at a time, as ``out`` is loaded and stored once for all of them.
    """
    for k in range(0, count - 7, 8):
        w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        w4, w5, w6, w7 = weights[k + 4], weights[k + 5], weights[k + 6], weights[k + 7]
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        r4, r5, r6, r7 = rows[k + 4], rows[k + 5], rows[k + 6], rows[k + 7]
        for j in range(width):
            out[j] -= (
                w0 * r0[j] + w1 * r1[j] + w2 * r2[j] + w3 * r3[j] + w4 * r4[j] + w5 * r5[j] + w6 * r6[j] + w7 * r7[j]
            )
    for k in range(count - count % 8, count):
        weight = weights[k]
        row = rows[k]
        for j in range(width):
            out[j] -= weight * row[j]


@compiled
def _solve_transposed(factor, values, count):
    """Solve ``Lᵀ x = values`` in place, ``L`` the leading lower triangle of ``factor``; rows are read in order."""
    for i in range(count - 1, -1, -1):
        values[i] /= factor[i, i]
        value = values[i]
        row = factor[i]
        for k in range(i):
            values[k] -= row[k] * value
