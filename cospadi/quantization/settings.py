"""Settings of the quantization: formats and rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import MISSING

from cospadi.errors import require, require_at_least, require_device, require_one_of
from cospadi.packing.formats import LANES, TRUNCATED, require_known

ROUNDINGS = ("compensated", "nearest")

NONE = "none"
"""The quantization that leaves factors in 16 bits."""


@dataclass
class QuantizationConfig:
    """Fewer bits for what a factorization stores; masks stay bits."""

    name: str = MISSING
    """The file name in ``conf/quantization``."""
    title: str = MISSING
    """How tables and figures name it, behind the method."""
    dictionary: str | None = None
    """Format of a dictionary, or of a left factor: ``int2`` to ``int8``, ``float8``; ``null``: 16 bits, as it is."""
    values: str | None = None
    """Format of the values, of a right factor, of dense weights; ``truncated14`` also, for values alone: the paper's."""
    group_size: int = 128
    """Rows of a column that have a scale together; a multiple of 32, the last group of a column may be smaller."""
    rounding: str = "compensated"
    """``compensated``: numbers make up for each other's errors, at the layer's output; ``nearest``: each for itself."""
    damping: float = 0.01
    """compensated: of the gram in the first pass, as a fraction of its mean diagonal."""
    sweeps: int = 4
    """compensated: rounds of coordinate descent."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    revision: int = 1
    """Raise it when a code change alters the numbers."""

    def __post_init__(self) -> None:
        require_known("quantization.dictionary", self.dictionary)
        require_known("quantization.values", self.values, (TRUNCATED,))
        require(
            self.group_size > 0 and self.group_size % LANES == 0,
            f"quantization.group_size={self.group_size} is not a multiple of {LANES}, and the kernels take so many weights at a "
            f"time. Set it to {max(LANES, self.group_size // LANES * LANES)}.",
        )
        require_one_of("quantization.rounding", self.rounding, ROUNDINGS)
        require(
            self.damping > 0 and math.isfinite(self.damping),
            f"quantization.damping={self.damping:g} leaves a gram that cannot be inverted. Set a small positive number: 0.01.",
        )
        require_at_least("quantization.sweeps", self.sweeps, 0)
        require_device("quantization.device", self.device)
        require(
            self.name != "none" or not self.changes,
            f"quantization.dictionary={self.dictionary} and quantization.values={self.values} belong to a quantization with a name "
            "of its own: results are filed under it. Choose quantization=int8, or write a file of conf/quantization.",
        )

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.dictionary is not None or self.values is not None
