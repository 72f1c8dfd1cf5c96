"""Which projection loses how much: the ratios at which the expected loss of all is lowest, at the bits of one ratio for all.

Expected losses of projections add up, as each is in nats per token (`cospadi.calibration.fisher`). Every projection was tried at some
ratios; between two of them the logarithm of its loss is taken as straight. The best ratios give up the same loss for the last bit
everywhere, so one number, the price of a bit, says them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cospadi.errors import UserError

TRIED = (0.2, 0.4, 0.6)
"""Ratios at which every projection is tried."""
LOWEST = 0.05
HIGHEST = 0.85
"""Ratios that an allocation may choose."""
STEP = 0.005
"""Between two ratios that it chooses from."""
BISECTIONS = 100
"""Of the price: enough for all digits of a float."""


def allocate(
    losses: Mapping[str, Mapping[float, float]], sizes: Mapping[str, int], compression_ratio: float
) -> dict[str, float]:
    """A ratio for every projection, by name.

    Args:
        losses: expected loss of every projection at the ratios at which it was tried, two or more; none where nothing is known, and
            then the projection gets ``compression_ratio``.
        sizes: weights of every projection.
        compression_ratio: of all projections together.

    Raises:
        UserError: when that is beyond what an allocation may choose.
    """
    if not LOWEST <= compression_ratio <= HIGHEST:
        raise UserError(
            f"factorization.compression_ratio={compression_ratio:g} cannot be divided among projections, of which each loses "
            f"{LOWEST:g} to {HIGHEST:g}. Set it in between, or factorization.allocation=uniform."
        )
    names = [name for name, tried in losses.items() if tried]
    unknown = {name: compression_ratio for name, tried in losses.items() if not tried}
    if not names:
        return unknown
    choices = np.round(np.arange(LOWEST, HIGHEST + STEP / 2, STEP), 6)
    curves = np.stack([_curve(losses[name], choices) for name in names])
    weights = np.array([sizes[name] for name in names], dtype=np.float64)
    wanted = compression_ratio * weights.sum()

    def best(price: float) -> np.ndarray:
        """Of every projection the choice whose loss, less what its bits are worth, is lowest."""
        return (curves - price * weights[:, None] * choices).argmin(axis=1)

    # The more a bit is worth, the more is removed: bisection on its logarithm.
    low, high = -100.0, 100.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if weights @ choices[best(np.exp(middle))] >= wanted:
            high = middle
        else:
            low = middle
    chosen = choices[best(np.exp(high))]

    # One more step less wherever it helps most, until no bit of the budget is left over.
    spare = weights @ chosen - wanted
    at = np.searchsorted(choices, chosen - STEP / 2)
    rows = np.arange(len(names))
    while True:
        lower = np.maximum(at - 1, 0)
        gain = (curves[rows, at] - curves[rows, lower]) / weights
        gain[(at == 0) | (weights * STEP > spare)] = -np.inf
        first = int(gain.argmax())
        if gain[first] == -np.inf:
            break
        at[first] -= 1
        spare -= weights[first] * STEP
    chosen_of = {name: float(choices[i]) for name, i in zip(names, at, strict=True)}
    return {name: (chosen_of | unknown)[name] for name in losses}


def expected(losses: Mapping[str, Mapping[float, float]], ratios: Mapping[str, float]) -> float:
    """Expected loss of all projections at these ratios, in nats per token."""
    return float(sum(_curve(losses[name], np.array([ratio]))[0] for name, ratio in ratios.items() if losses[name]))


def _curve(tried: Mapping[float, float], choices: np.ndarray) -> np.ndarray:
    """Loss at every choice: its logarithm is straight between two ratios that were tried, and goes on straight beyond them."""
    ratios, losses = _points(tried)
    logs = np.log(np.maximum(losses, 1e-30))
    inside = np.interp(choices, ratios, logs)
    below = logs[0] + (choices - ratios[0]) * (logs[1] - logs[0]) / (ratios[1] - ratios[0])
    above = logs[-1] + (choices - ratios[-1]) * (logs[-1] - logs[-2]) / (ratios[-1] - ratios[-2])
    return np.exp(np.where(choices < ratios[0], below, np.where(choices > ratios[-1], above, inside)))


def _points(tried: Mapping[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Ratios in order, and losses that never fall as more is removed."""
    ratios = np.array(sorted(tried))
    return ratios, np.maximum.accumulate([tried[ratio] for ratio in ratios])
