"""Slow, obvious numerics in float64, a few lines each: what the fast ones are compared with."""

import numpy as np
import torch


def sparse_code(dictionary, target, sparsity):
    """Orthogonal matching pursuit: one column at a time, least squares from scratch at each step."""
    coefficients = torch.zeros(dictionary.shape[1], target.shape[1], dtype=target.dtype)
    for j, column in enumerate(target.T):
        support, residual = [], column
        for _ in range(sparsity):
            scores = (dictionary.T @ residual).abs()
            scores[support] = -1.0
            support.append(int(scores.argmax()))
            values = torch.linalg.lstsq(dictionary[:, support], column[:, None]).solution[:, 0]
            residual = column - dictionary[:, support] @ values
        coefficients[support, j] = values
    return coefficients


def ksvd_sweep(dictionary, coefficients, target):
    """Each atom in turn: the full SVD of the residual it has to explain, on the columns that use it."""
    dictionary, coefficients = dictionary.clone(), coefficients.clone()
    for j in range(dictionary.shape[1]):
        users = coefficients[j] != 0
        if users.any():
            coefficients_without = coefficients.clone()
            coefficients_without[j] = 0
            error = (target - dictionary @ coefficients_without)[:, users]
            left, singular_values, right = torch.linalg.svd(error, full_matrices=False)
            dictionary[:, j], coefficients[j, users] = left[:, 0], singular_values[0] * right[0]
    return dictionary, coefficients


def whitener(gram):
    """Upper-triangular ``R`` with ``RᵀR = gram``."""
    return torch.from_numpy(np.linalg.cholesky(gram.double().numpy()).T.copy())


def svd_llm(weight, gram, rank):
    """The rank-``rank`` matrix closest to ``weight`` at the outputs: SVD of ``R W``, solved back."""
    factor = np.linalg.cholesky(gram.double().numpy()).T
    left, singular_values, right = np.linalg.svd(factor @ weight.double().numpy(), full_matrices=False)
    best = left[:, :rank] @ np.diag(singular_values[:rank]) @ right[:rank]
    return torch.from_numpy(np.linalg.solve(factor, best))


def hard_threshold_columns(matrix, sparsity):
    """Keep the ``sparsity`` largest magnitudes of each column, zero the rest."""
    kept = torch.zeros_like(matrix)
    for j, column in enumerate(matrix.T):
        largest = column.abs().argsort(descending=True, stable=True)[:sparsity]
        kept[largest, j] = column[largest]
    return kept


def least_squares_on_support(dictionary, target, support):
    """Best coefficients that are zero wherever the boolean ``support`` is false."""
    coefficients = torch.zeros(dictionary.shape[1], target.shape[1], dtype=target.dtype)
    for j, column in enumerate(target.T):
        atoms = support[:, j].nonzero()[:, 0]
        if len(atoms):
            solution = torch.linalg.lstsq(dictionary[:, atoms], column[:, None], driver="gelsd").solution
            coefficients[atoms, j] = solution[:, 0]
    return coefficients


def dictionary_update(target, coefficients, ridge=0.0):
    """``Y Sᵀ (S Sᵀ + ridge · I)⁻¹``."""
    outer = coefficients @ coefficients.T + ridge * torch.eye(len(coefficients), dtype=target.dtype)
    return target @ coefficients.T @ torch.linalg.inv(outer)


def output_error(inputs, weight, approximation):
    """``‖X(W − Ŵ)‖_F / ‖XW‖_F`` from the inputs themselves."""
    return float((inputs @ weight - inputs @ approximation).norm() / (inputs @ weight).norm())


def stored_bits_by_storing(dictionary, coefficients):
    """Bits of the numpy arrays that hold dictionary, non-zero coefficients and 1-bit support mask."""
    mask = (coefficients != 0).numpy()
    arrays = (
        dictionary.numpy().astype(np.float16),
        coefficients.numpy()[mask].astype(np.float16),
        np.packbits(mask),  # rounded up to whole bytes
    )
    return 8 * sum(array.nbytes for array in arrays)


def htp_round(dictionary, coefficients, target, sparsity, step):
    gradient = dictionary.T @ (target - dictionary @ coefficients)
    kept = hard_threshold_columns(coefficients + step * gradient, sparsity)
    return least_squares_on_support(dictionary, target, kept != 0)


def wanda(inputs, weight, nonzeros):
    """One output at a time: the weights whose magnitude times the norm of their input is largest."""
    kept = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        scores = [abs(float(weight[i, j])) * float(inputs[:, i].norm()) for i in range(len(weight))]
        for i in sorted(range(len(weight)), key=lambda i: -scores[i])[:nonzeros]:
            kept[i, j] = weight[i, j]
    return kept


def sparsegpt(weight, gram, choose, step, damping):
    """Optimal brain surgeon, one weight at a time, with the explicit inverse Hessian of the inputs not yet passed.

    ``choose(costs, first)`` says which of the ``step`` inputs from ``first`` on stay.
    """
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for i in range(len(weight)):
        if i % step == 0:
            block = range(i, min(i + step, len(weight)))
            costs = [weight[j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in block]
            kept[i : i + step] = choose(torch.stack(costs), i)
        inverse = torch.linalg.inv(hessian[i:, i:])
        for output in range(weight.shape[1]):
            if not kept[i, output]:
                weight[i:, output] -= weight[i, output].clone() / inverse[0, 0] * inverse[:, 0]
                weight[i, output] = 0
    return weight


def oats(target, rank, nonzeros, n_rounds):
    """Truncated SVD of what is not sparse, the largest of every column of what is not low-rank, in turn."""
    sparse = torch.zeros_like(target)
    for _ in range(n_rounds):
        left, singular_values, right = torch.linalg.svd(target - sparse, full_matrices=False)
        low_rank = (left[:, :rank] * singular_values[:rank]) @ right[:rank]
        sparse = hard_threshold_columns(target - low_rank, nonzeros)
    return sparse, low_rank


def shared_dictionary(whiteners, weights, coefficients):
    """The one ``D`` that minimises ``Σ_l ‖R_l(W_l − D S_l)‖²``: its normal equations written out as one linear system."""
    atoms, d_in = len(coefficients[0]), len(whiteners[0])
    matrix = torch.zeros(atoms * d_in, atoms * d_in, dtype=torch.float64)
    right = torch.zeros(d_in, atoms, dtype=torch.float64)
    for factor, weight, codes in zip(whiteners, weights, coefficients, strict=True):
        gram = factor.T @ factor
        matrix += torch.kron(codes @ codes.T, gram)  # vec(G D M) = (M ⊗ G) vec(D), columns stacked
        right += gram @ weight @ codes.T
    return torch.linalg.solve(matrix, right.T.flatten()).view(atoms, d_in).T


def compensated_rounding(numbers, gram, scales, damping, levels):
    """GPTQ for one column at a time: after each number the inverse of what is left, from scratch; zeros have no code but 0."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    rounded = torch.zeros_like(numbers)
    for j in range(numbers.shape[1]):
        left = numbers[:, j].clone()
        for i in range(len(left)):
            if numbers[i, j] != 0:
                rounded[i, j] = scales[i, j] * (left[i] / scales[i, j]).round().clamp(*levels)
            inverse = torch.linalg.inv(damped[i:, i:])
            left[i:] -= (left[i] - rounded[i, j]) / inverse[0, 0] * inverse[0]
    return rounded
