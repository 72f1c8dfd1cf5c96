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
        atom, values = dictionary[j], coefficients[j]
        users = np.flatnonzero(values)
        if len(users) == 0:
            continue
        for c in users:
            _add(residual[c], values[c], atom)
        for _ in range(power_iterations):
            direction[:] = 0
            for c in users:
                _add(direction, _dot(residual[c], atom), residual[c])
            length = np.sqrt(_dot(direction, direction))
            if not length > 0:  # nothing left to fit: keep the atom
                break
            atom[:] = direction / length
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
