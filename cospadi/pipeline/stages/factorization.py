"""Stage of room 3: factors of a block of layers."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cospadi import devices
from cospadi.calibration.statistics import statistics_file
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import Factors, stored_bits
from cospadi.factorization.files import FactorsFile, FinishedGroups, shares
from cospadi.factorization.groups import (
    Group,
    factorized,
    groups_of,
    require_whole_groups,
    runs_in_memory,
)
from cospadi.factorization.problem import Problem
from cospadi.factorization.solvers.whitening import output_error, weight_error
from cospadi.models import Projection, find_projections
from cospadi.pipeline.stages.problems import problems_of
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.progress import Progress
from cospadi.records import Record, file_hashes, key_of, read_json
from cospadi.settings import Config
from cospadi.sources.addresses import state_on_disk


def factorize(
    config: Config,
    model: Path,
    grams: Path,
    layers: str,
    factors: Path,
    record: Path,
    ranks: Path | None = None,
    fisher: Path | None = None,
    ratios: Path | None = None,
) -> None:
    """Room 3: gram and weights -> factors of every projection in a block of layers."""
    factorization = config.factorization
    log = Record("factorization", {"factorization": asdict(factorization), "calibration": asdict(config.calibration)})
    projections = _projections_of(config, model, layers)
    chosen_ranks = read_json(ranks)["ranks"] if ranks else None
    chosen_ratios = read_json(ratios)["ratios"] if ratios else None

    # One problem per projection, read from the disk when its turn comes.
    device = devices.pick(factorization.device, "factorization.device")
    problem_of = problems_of(config, model, grams, fisher, device, chosen_ranks, chosen_ratios)
    groups = groups_of(factorization, projections, problem_of)
    folders = [folder for folder in (grams, fisher) if folder]
    statistics = [statistics_file(folder, n) for folder in folders for n in sorted({p.layer for p in projections})]
    chosen = [file for file in (ranks, ratios) if file]
    log.content["inputs"] = file_hashes(*statistics, *chosen) | weights_hash(model)

    # What an earlier run of this job has finished is used again.
    key = key_of(log.content["settings"], log.content["inputs"], state_on_disk(str(model)))
    finished = FinishedGroups(factors.with_name(f".{factors.stem}.groups"), key)
    file = FactorsFile([p.name for p in projections])  # in this order, although a GPU takes them by shape
    entries = float(sum(p.d_in * p.d_out for p in projections))
    progress = Progress(len(projections), f"{factorization.title}, layers {layers}", entries)

    def note(row: dict[str, Any], compact: Factors) -> None:
        file.add(row, compact)
        progress.step(row["name"], described(row), float(row["d_in"] * row["d_out"]))

    left = []
    for group in groups:
        done = finished.read([p.name for p in group])
        for row, compact in done or []:
            note(row, compact)
        left += [] if done else [group]

    last = time.perf_counter()
    for group, problems, solved in factorized(factorization, runs_in_memory(factorization, left, device), problem_of):
        rows = []
        for projection, problem, compact in zip(group, problems, solved, strict=True):
            row = _row(projection, group, compact, problem, problem.ratio or factorization.compression_ratio)
            if ranks and factorization.rank_search.perplexity_budget is not None:
                row["fallback"] = "rank chosen by factorization.rank_search.perplexity_budget, whatever the ratio"
            # Seconds since the row before: the first matrix of a batch carries the time of all.
            now = time.perf_counter()
            row["seconds"] = now - last
            last = now
            rows.append(row)
        finished.keep(rows, solved)
        for row, compact in zip(rows, solved, strict=True):
            note(row, compact)

    file.write(factors)
    log.finish(record, projections=file.rows)
    finished.remove()


def _projections_of(config: Config, model: Path, layers: str) -> list[Projection]:
    """The projections of ``layers``, first-last.

    Raises:
        UserError: when there are none, or the block cuts a group.
    """
    block = re.fullmatch(r"(\d+)-(\d+)", layers)
    if block is None:
        raise UserError(f"--layers {layers} is not a block of layers. Write first-last, counted from 0: 000-014.")
    first, last = map(int, block.groups())
    everything = find_projections(model, config.model)
    n_layers = 1 + max(p.layer for p in everything)
    projections = [p for p in everything if first <= p.layer <= last]
    if not projections:
        raise UserError(f"{model} has no layers {layers}. Set model.n_layers to {n_layers}.")
    require_whole_groups(config.factorization, first, last, n_layers)
    return projections


def _row(
    projection: Projection, group: Group, factors: Factors, problem: Problem, compression_ratio: float
) -> dict[str, Any]:
    """What the record keeps of one projection; what a group shares is counted at its first member."""
    row = asdict(projection) | {"group": [p.name for p in group] if len(group) > 1 else None}
    row |= {
        "dense_bits": budget.dense_bits(projection.d_in, projection.d_out),
        "budget_bits": budget.budget_bits(projection.d_in, projection.d_out, compression_ratio),
    }
    return row | measured(factors, problem, shares(row)) | {"fallback": None}


def measured(factors: Factors, problem: Problem, shares: bool) -> dict[str, Any]:
    """Sizes and errors of factors."""
    approximation = factors.weight()
    expected = {} if problem.columns is None else {"expected_loss": problem.expected_loss(approximation)}
    return {
        "kind": factors.kind,
        **factors.sizes,
        "value_bits": factors.value_bits,
        "stored_bits": stored_bits(factors, shares),
        "output_error": output_error(problem.whitener, problem.weighed(problem.weight), problem.weighed(approximation)),
        "weight_error": weight_error(problem.weight, approximation),
        **expected,
    }


def described(row: dict[str, Any]) -> str:
    """Sizes, error and seconds of a projection, for the progress line."""
    sizes = "  ".join(f"{name} {row[name]}" for name in ("rank", "atoms", "sparsity") if row[name])
    kept = "kept dense" if row["value_bits"] == 16 else f"dense, {row['value_bits']} bits"
    return f"{sizes or kept:<26} error {row['output_error']:.4f}  {row['seconds']:5.2f} s"
