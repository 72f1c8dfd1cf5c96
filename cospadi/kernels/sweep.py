"""The K-SVD sweep, compiled: power iterations that read each row of the residual once."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cospadi.kernels.compiled import compiled


def sweep(
    residual: Float[Tensor, "d_out d_in"],
    dictionary: Float[Tensor, "atoms d_in"],
    coefficients: Float[Tensor, "atoms d_out"],
    power_iterations: int,
) -> None:
    """Refit every atom together with its coefficients, one after another, supports kept. In place.

    A power iteration ``s = E d``, ``d ← Eᵀs / ‖Eᵀs‖`` on the rows ``E`` of the columns that use an atom is one pass,

        ``d ← Σ_c (e_c·d) e_c``,    made unit,

    so that a row serves both products while the core's cache has it. Single-threaded: a pass takes tens of
    microseconds, as long as telling another thread to take half of it.

    Args:
        residual: ``(Y − D S)ᵀ``, contiguous and on the CPU, as are the other two, and of one dtype.
        dictionary: an atom per row.
        coefficients: an atom per row.
        power_iterations: passes for an atom before its coefficients are read off.
    """
    _sweep(residual.numpy(), dictionary.numpy(), coefficients.numpy(), power_iterations)


@compiled
def _sweep(residual, dictionary, coefficients, power_iterations):
    direction = np.empty_like(dictionary[0])
    for j in range(len(dictionary)):
        atom = dictionary[j]
        values = coefficients[j]
        users = np.flatnonzero(values)
        if len(users) == 0:
            continue
        # E = residual + d_j s_jᵀ, in place of the residual of the columns that use the atom.
        for c in users:
            _add(residual[c], values[c], atom)
        # Power iterations: d becomes the leading direction of E.
        for _ in range(power_iterations):
            direction[:] = 0
            for c in users:
                _add(direction, _dot(residual[c], atom), residual[c])
            length = np.sqrt(_dot(direction, direction))
            if not length > 0:  # nothing is left to fit: the atom stays
                break
            atom[:] = direction / length
        # Coefficients are projections on it, and the residual is what they leave.
        for c in users:
            values[c] = _dot(residual[c], atom)
            _add(residual[c], -values[c], atom)


@compiled
def _dot(left, right):
    total = left.dtype.type(0)
    for j in range(len(left)):
        total += left[j] * right[j]
    return total


@compiled
def _add(out, weight, row):
    """``out += weight · row``"""
    for j in range(len(out)):
        out[j] += weight * row[j]
