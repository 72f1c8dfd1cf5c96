"""Stages of room 3: what every projection would lose at some ratios, and the ratio that each gets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cospadi import devices
from cospadi.calibration.statistics import statistics_file
from cospadi.factorization.allocation import TRIED, allocate, expected
from cospadi.factorization.trials import tried
from cospadi.models import find_projections
from cospadi.pipeline import recipes
from cospadi.pipeline.stages.problems import problems_of
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.progress import Progress
from cospadi.records import FinishedRows, Record, file_hashes, key_of, read_json
from cospadi.settings import Config
from cospadi.sources.addresses import state_on_disk

MIDDLE = f"{TRIED[len(TRIED) // 2]:g}"
"""The ratio whose loss the progress tells."""


def expect_losses(config: Config, model: Path, grams: Path, fisher: Path, losses: Path) -> None:
    """Room 3: every projection, solved roughly at every ratio of `TRIED` -> its expected losses, in nats per token."""
    factorization = config.factorization
    log = Record("losses", {"factorization": asdict(factorization)}, weights_hash(model))
    projections = find_projections(model, config.model)
    problem_of = problems_of(config, model, grams, fisher, devices.pick(factorization.device, "factorization.device"))
    sizes = {p.name: p.d_in * p.d_out for p in projections}
    progress = Progress(len(projections), f"Expected losses at {len(TRIED)} ratios", float(sum(sizes.values())))
    statistics = [
        statistics_file(folder, n) for folder in (grams, fisher) for n in sorted({p.layer for p in projections})
    ]
    finished = FinishedRows(
        losses, key_of(recipes.of_stage("losses", config), file_hashes(*statistics), state_on_disk(str(model)))
    )
    found = {}
    for projection in projections:
        row = finished.get(projection.name)
        if row is None:
            row = {f"{ratio:g}": loss for ratio, loss in tried(factorization, problem_of(projection)).items()}
            finished.keep(projection.name, row)
        found[projection.name] = row
        told = f"{row[MIDDLE]:.2e} nats at {MIDDLE}" if row else "no token came by"
        progress.step(projection.name, told, sizes[projection.name])
    log.finish(losses, losses=found, sizes=sizes)
    finished.remove()


def choose_ratios(config: Config, losses: Path, ratios: Path) -> None:
    """Room 3: expected losses -> a ratio for every projection, at the bits of ``compression_ratio`` for all."""
    log = Record("ratios", {"factorization": asdict(config.factorization)})
    found = read_json(losses)
    curves = {name: {float(ratio): loss for ratio, loss in row.items()} for name, row in found["losses"].items()}
    ratio = config.factorization.compression_ratio
    chosen = allocate(curves, found["sizes"], ratio)
    log.finish(
        ratios,
        ratios=chosen,
        expected_loss=expected(curves, chosen),
        expected_loss_uniform=expected(curves, dict.fromkeys(chosen, ratio)),
    )
