"""What calibration keeps of one shared input, and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from cospadi.errors import UserError

WEIGHTED_GRAM = "gram_attended"
"""Name of the second gram in a layer's file."""
TOKENS = 4096
"""Tokens of one product."""
PANEL = 192
"""Columns of one product: few enough to leave nearly half of a gram out, enough for the speed of a large product."""
ROUTED = "n_tokens"
"""Name of the number of tokens that an expert saw, in a layer's file."""


@dataclass
class InputStatistics:
    """What is known about one shared input, summed over tokens."""

    gram: Float[Tensor, "d_in d_in"]
    """float64, ``Σ xxᵀ``"""
    absolute: Float[Tensor, " d_in"]
    """float64, ``Σ |x|``"""
    n_tokens: int = 0
    attended: Float[Tensor, "d_in d_in"] | None = None
    """float64, ``Σ_j a_j x_j x_jᵀ``; of inputs that projections of ``model.attended`` read."""
    routed: int | None = None
    """Tokens that the router sent to the expert whose input this is; ``None`` for all other inputs."""

    @classmethod
    def zeros(cls, d_in: int, device: torch.device) -> InputStatistics:
        return cls(
            torch.zeros(d_in, d_in, dtype=torch.float64, device=device),
            torch.zeros(d_in, dtype=torch.float64, device=device),
        )

    def add(self, inputs: Float[Tensor, "tokens d_in"], dtype: torch.dtype) -> None:
        """Add tokens; products run in ``dtype`` over at most `TOKENS` tokens, sums in float64.

        A float32 product of n tokens errs by at most ``n · 2⁻²⁴ · Σ|x_i||x_j|`` per entry, n = 4096: 2.4e-4 of the
        entry's absolute mass; rounding errors that do not conspire stay near 1e-6. Sums over chunks add nothing.
        """
        for chunk in inputs.split(TOKENS):
            add_products(self.gram, chunk.to(dtype))
            # Sums of a column each; torch's own norms over rows take eight times as long.
            self.absolute += chunk.new_ones(len(chunk), dtype=torch.float32) @ chunk.abs().float()
        self.n_tokens += len(inputs)

    def add_attended(
        self, inputs: Float[Tensor, "tokens d_in"], received: Float[Tensor, " tokens"], dtype: torch.dtype
    ) -> None:
        """Add the same tokens once more, each times the attention it received."""
        if self.attended is None:
            self.attended = torch.zeros_like(self.gram)
        add_weighted(self.attended, inputs, received, dtype)

    @property
    def grams(self) -> list[Tensor]:
        return [self.gram, *([] if self.attended is None else [self.attended])]

    def gram_of(self, attended: bool) -> Float[Tensor, "d_in d_in"]:
        """The gram of a projection that is read through the attention, or is not."""
        return self.gram if self.attended is None or not attended else self.attended

    @property
    def absolute_mean(self) -> Float[Tensor, " d_in"]:
        return self.absolute / max(self.n_tokens, 1)


def add_weighted(
    gram: Float[Tensor, "d_in d_in"],
    inputs: Float[Tensor, "tokens d_in"],
    weights: Float[Tensor, " tokens"],
    dtype: torch.dtype,
) -> None:
    """Add ``Σ_t w_t x_t x_tᵀ`` to ``gram``; products run in ``dtype``, as in `InputStatistics.add`."""
    for chunk, of_chunk in zip(inputs.split(TOKENS), weights.split(TOKENS), strict=True):
        add_products(gram, chunk.to(dtype) * of_chunk.to(dtype).sqrt()[:, None])


def add_products(gram: Float[Tensor, "d_in d_in"], inputs: Float[Tensor, "tokens d_in"]) -> None:
    """Add ``XᵀX`` to ``gram``, in place, a panel of columns at a time: what lies below the diagonal is not multiplied."""
    for start in range(0, len(gram), PANEL):
        panel = slice(start, start + PANEL)
        product = inputs[:, panel].T @ inputs[:, start:]
        gram[panel, start:] += product
        gram[start + PANEL :, panel] += product[:, PANEL:].T


def statistics_file(grams: Path, layer: int) -> Path:
    """File of a layer's statistics."""
    return grams / f"{layer:03d}.safetensors"


def existing_file(folder: Path, layer: int, remedy: str) -> Path:
    """`statistics_file` of a layer.

    Raises:
        UserError: when it is missing; the sentence ends with ``remedy``.
    """
    file = statistics_file(folder, layer)
    if not file.is_file():
        raise UserError(f"{file} is missing. {remedy}")
    return file


def tensors_of(statistics: dict[str, InputStatistics]) -> dict[str, Tensor]:
    """What is written of a layer."""
    tensors = {}
    for shared_input, of_input in statistics.items():
        tensors[f"{shared_input}.gram"] = of_input.gram
        tensors[f"{shared_input}.absolute_mean"] = of_input.absolute_mean
        if of_input.routed is not None:
            tensors[f"{shared_input}.{ROUTED}"] = torch.tensor(of_input.routed)
        if of_input.attended is not None:
            tensors[f"{shared_input}.{WEIGHTED_GRAM}"] = of_input.attended
    return tensors


def read_statistics(
    grams: Path, layer: int, shared_input: str, device: torch.device, attended: bool = False
) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, " d_in"]]:
    """Gram and mean absolute activation of one shared input, from the folder that calibration left.

    Of an ``attended`` projection the gram is the one weighted by attention, where calibration made one.

    Raises:
        UserError: when the layer's file is missing.
    """
    file = existing_file(grams, layer, "Collect the grams again: run calibrate for this model.")
    with safe_open(file, framework="pt") as tensors:
        weighted = f"{shared_input}.{WEIGHTED_GRAM}"
        name = weighted if attended and weighted in tensors.keys() else f"{shared_input}.gram"  # noqa: SIM118
        gram = tensors.get_tensor(name).to(device)
        return gram, tensors.get_tensor(f"{shared_input}.absolute_mean").to(device)
