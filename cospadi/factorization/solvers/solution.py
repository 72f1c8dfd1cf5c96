"""What every solver returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Solution(NamedTuple):
    """A dictionary, its coefficients and how the fit went: ``Y ≈ [F D] S`` with the fixed atoms ``F``, if any."""

    dictionary: Float[Tensor, "d_in atoms"]
    """The learned atoms ``D``, unit columns."""
    coefficients: Float[Tensor, "all_atoms d_out"]
    """Rows for the fixed atoms, if any, come first, then rows for the learned ones."""
    errors: Sequence[float]
    """``‖Y − DS‖_F / ‖Y‖_F`` after every round; of htp estimated, and last that of what is returned, exactly."""
