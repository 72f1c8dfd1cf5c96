"""The stages of one model in a row, in one process: what Snakemake is to a study, this is to ``cospadi compress``.

Both run the functions of `cospadi.pipeline.stages`, and both leave out what is finished by comparing recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cospadi.models import find_projections
from cospadi.pipeline import recipes
from cospadi.pipeline.stages import calibration, factorization, quantization, sources
from cospadi.records import read_json, write_json
from cospadi.settings import Config
from cospadi.sources.families import fitted


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


def compress(config: Config, work: Path) -> tuple[Path, Path, Path]:
    """Fetch, calibrate, factorize and, if asked for, quantize one model. What is finished in ``work`` is used again.

    Returns:
        the dense checkpoint, the factors of all its projections, and their record.
    """
    chain = Chain(work)
    text = config.calibration.text
    model = work / "model"
    documents = work / "documents.json"
    grams = work / "grams"
    factors = work / "factors.safetensors"
    record = work / "factorization.json"

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
    chain.run(
        "calibration",
        recipes.of_stage("calibration", config),
        grams,
        lambda: calibration.calibrate(config, model, documents, grams, work / "calibration.json"),
    )
    last = max(p.layer for p in find_projections(model, config.model))
    chain.run(
        "factorization",
        recipes.of_stage("factorization", config),
        factors,
        lambda: factorization.factorize(config, model, grams, f"0-{last}", factors, record, None),
    )
    if not config.quantization.changes:
        return model, factors, record

    quantized = work / "quantized.safetensors"
    quantized_record = work / "quantization.json"
    chain.run(
        "quantization",
        recipes.of_stage("quantization", config),
        quantized,
        lambda: quantization.quantize(config, model, grams, factors, record, quantized, quantized_record),
    )
    return model, quantized, quantized_record
