"""The stages of one model in a row, in one process: what Snakemake is to a study, this is to ``cospadi compress``.

Both run the functions of `cospadi.pipeline.stages`, and both leave out what is finished by comparing recipes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cospadi.errors import UserError
from cospadi.factorization.settings import layer_blocks
from cospadi.models import Projection, find_projections
from cospadi.pipeline import recipes
from cospadi.pipeline.compress_plan import BLOCK_BYTES
from cospadi.pipeline.size import ratio_of_size
from cospadi.pipeline.stages import allocation, calibration, factorization, quantization, sources
from cospadi.records import read_json, write_json
from cospadi.settings import Config
from cospadi.sources.families import fitted


@dataclass(frozen=True)
class Compressed:
    """What the stages leave behind: a file of factors, and its record, for every block of layers."""

    config: Config
    """The settings, with the ratio that a size asked for."""
    model: Path
    """The dense checkpoint."""
    factors: list[Path]
    records: list[Path]


class Chain:
    """Stages in a row: one runs unless its output is there, made by the same recipe from what was there before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_stale = False
        """Whether an earlier stage was run again, so that all later ones have new inputs."""

    def run(self, stage: str, recipe: str, output: Path, function: Callable[[], None]) -> None:
        note = self.folder / f"{stage}.recipe.json"
        made_by = read_json(note) if note.is_file() else None
        if not self.is_stale and output.exists() and made_by == recipe:
            return
        self.is_stale = True
        note.unlink(missing_ok=True)
        function()
        write_json(note, recipe)


def compress(config: Config, work: Path, size: int | None = None, dtype: str | None = None) -> Compressed:
    """Fetch, calibrate, factorize and, if asked for, quantize one model. What is finished in ``work`` is used again.

    ``size``, in bytes, takes the place of the ratio; embeddings, norms and head will be stored in ``dtype``, by default their own.
    """
    chain = Chain(work)
    text = config.calibration.text
    model = work / "model"
    documents = work / "documents.json"
    grams = work / "grams"

    # The text first: a mistyped path is found before a model is fetched.
    chain.run(
        "text",
        recipes.of_text(text),
        documents,
        lambda: sources.prepare_text(text, documents, work / "text.json"),
    )
    chain.run(
        "model",
        recipes.of_stage("model", config),
        model,
        lambda: sources.prepare_model(config, model, work / "model.json"),
    )
    config = replace(config, model=fitted(config.model, read_json(model / "config.json").get("model_type")))
    projections = find_projections(model, config.model)
    if size is not None:
        ratio = ratio_of_size(config, model, projections, size, dtype)
        config = replace(config, factorization=replace(config.factorization, compression_ratio=ratio))
        print(f"{ratio:.2%} of the projections' bits have to go", flush=True)

    def calibrate() -> None:
        _require_disk(config, projections, work)
        calibration.calibrate(config, model, documents, grams, work / "calibration.json")

    chain.run("calibration", recipes.of_stage("calibration", config), grams, calibrate)
    fisher = _fisher(chain, config, model, documents) if config.factorization.needs_fisher else None
    ratios = _ratios(chain, config, model, grams, fisher) if config.factorization.allocates else None
    blocks = _blocks(config, projections)
    factorized = _factorized(chain, config, model, grams, fisher, ratios, blocks)
    return _quantized(chain, config, grams, fisher, factorized) if config.quantization.changes else factorized


def _fisher(chain: Chain, config: Config, model: Path, documents: Path) -> Path:
    factors = chain.folder / "fisher"
    record = chain.folder / "fisher.json"
    function = partial(calibration.fisher, config, model, documents, factors, record)
    chain.run("fisher", recipes.of_stage("fisher", config), factors, function)
    return factors


def _ratios(chain: Chain, config: Config, model: Path, grams: Path, fisher: Path) -> Path:
    losses = chain.folder / "losses.json"
    function = partial(allocation.expect_losses, config, model, grams, fisher, losses)
    chain.run("losses", recipes.of_stage("losses", config), losses, function)
    ratios = chain.folder / "ratios.json"
    function = partial(allocation.choose_ratios, config, losses, ratios)
    chain.run("ratios", recipes.of_stage("factorization", config), ratios, function)
    return ratios


def _require_disk(config: Config, projections: Sequence[Projection], work: Path) -> None:
    """
    Raises:
        UserError: the disk has less room than grams, factors and checkpoint will take.
    """
    inputs = {(p.layer, p.shared_input): p.d_in for p in projections}
    weighed = {(p.layer, p.shared_input) for p in projections if p.attended and config.calibration.attention}
    grams = sum(8 * d_in**2 * (2 if shared_input in weighed else 1) for shared_input, d_in in inputs.items())
    kept = 1 - config.factorization.compression_ratio
    factors = kept * sum(2 * p.d_in * p.d_out for p in projections)
    # The factors lie in the work folder and in the checkpoint.
    needed = grams + 2 * factors
    free = shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"{work} is on a disk with {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: {grams / 1e9:.1f} for the "
            "grams of all layers, the rest for factors. Free some space, or name an OUT on another disk."
        )


def _blocks(config: Config, projections: Sequence[Projection]) -> list[str]:
    """Blocks of layers, as ``first-last``, of at most `BLOCK_BYTES`, or of one layer or group where that is larger."""
    n_layers = 1 + max(p.layer for p in projections)
    bytes_per_layer = sum(2 * p.d_in * p.d_out for p in projections) / n_layers
    return layer_blocks(config.factorization, n_layers, max(1, int(BLOCK_BYTES / bytes_per_layer)))


def _factorized(
    chain: Chain,
    config: Config,
    model: Path,
    grams: Path,
    fisher: Path | None,
    ratios: Path | None,
    blocks: Sequence[str],
) -> Compressed:
    folder = chain.folder / "factorization"
    files = [folder / f"{b}.safetensors" for b in blocks]
    made = Compressed(config, model, files, [file.with_suffix(".json") for file in files])
    for block, factors, record in zip(blocks, made.factors, made.records, strict=True):
        inputs = config, model, grams, block, factors, record
        function = partial(factorization.factorize, *inputs, fisher=fisher, ratios=ratios)
        chain.run(f"factorization-{block}", recipes.of_stage("factorization", config), factors, function)
    return made


def _quantized(chain: Chain, config: Config, grams: Path, fisher: Path | None, before: Compressed) -> Compressed:
    folder = chain.folder / "quantization"
    files = [folder / file.name for file in before.factors]
    made = Compressed(config, before.model, files, [folder / file.name for file in before.records])
    for factors, record, smaller, new_record in zip(
        before.factors, before.records, made.factors, made.records, strict=True
    ):
        inputs = config, before.model, grams, factors, record, smaller, new_record
        function = partial(quantization.quantize, *inputs, fisher=fisher)
        chain.run(f"quantization-{factors.stem}", recipes.of_stage("quantization", config), smaller, function)
    return made
