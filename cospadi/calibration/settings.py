"""Settings of the calibration: which text, how many tokens, which grams."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from cospadi.errors import require, require_at_least, require_device, require_one_of, require_seed
from cospadi.sources.settings import TextConfig


@dataclass
class FisherConfig:
    """What the loss cares about, for methods with ``objective=loss``: one backward pass over calibration tokens."""

    n_samples: int | None = 16
    """Of the token sequences of the calibration; ``null``: all. Going back costs four times as much as going forward."""
    blend: float = 0.5
    """Share of the plain gram in the one that is weighted by gradients; 0: none."""
    seed: int = 42
    """Of the labels, which are drawn from the model's own predictions."""
    revision: int = 1

    def __post_init__(self) -> None:
        require_at_least("calibration.fisher.n_samples", self.n_samples, 1)
        require_seed("calibration.fisher.seed", self.seed)
        require(
            0 <= self.blend <= 1,
            f"calibration.fisher.blend={self.blend:g} is not a share. Set 0 (gradients alone) to 1 (the plain gram alone).",
        )


@dataclass
class CalibrationConfig:
    """Which text runs through the dense model to collect the grams."""

    name: str = MISSING
    text: TextConfig = MISSING
    n_samples: int = 256
    """Token sequences drawn from the text."""
    sample_length: int = 1024
    """Tokens in a sequence."""
    seed: int = 42
    batch_size: int = 4
    """Sequences that run through a block at once."""
    gram_dtype: str = "float32"
    """Dtype of the products of one batch; sums are always float64. ``float64`` halves the speed."""
    attention: bool = True
    """Whether the inputs of ``model.attended`` are weighted, token by token, by the attention they receive: the first token of a text counts
    as much as hundreds of others, as nearly all look at it. ``false``: every token alike, as in the papers."""
    damping: float = 1e-6
    """Ridge on the gram, as a fraction of its mean diagonal."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    fisher: FisherConfig = field(default_factory=FisherConfig)
    revision: int = 2

    def __post_init__(self) -> None:
        require_at_least("calibration.n_samples", self.n_samples, 1)
        require_at_least("calibration.sample_length", self.sample_length, 2)
        require_at_least("calibration.batch_size", self.batch_size, 1)
        require_at_least("calibration.damping", self.damping, 0)
        require_seed("calibration.seed", self.seed)
        require_device("calibration.device", self.device)
        require_one_of("calibration.gram_dtype", self.gram_dtype, ("float32", "float64"))
