"""Stage of room 3: factors of a block of layers."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cospadi import devices
from cospadi.calibration.statistics import read_statistics, statistics_file
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import Factors, stored_bits
from cospadi.factorization.files import FactorsFile, shares
from cospadi.factorization.groups import by_shared_input, factorize_projections, problems_from, require_whole_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import MATCHED, FactorizationConfig
from cospadi.factorization.solvers.whitening import output_error, weight_error
from cospadi.models import Checkpoint, Projection, find_projections
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.progress import Progress
from cospadi.records import Record, file_hashes, read_json
from cospadi.settings import Config

Group = tuple[Projection, ...]
"""Projections that share; most often one alone."""


def factorize(
    config: Config, model: Path, grams: Path, layers: str, factors: Path, record: Path, ranks: Path | None
) -> None:
    """Room 3: gram and weights -> factors of every projection in a block of layers."""
    block = re.fullmatch(r"(\d+)-(\d+)", layers)
    if block is None:
        raise UserError(f"--layers {layers} is no block of layers. Write first-last, counted from 0: 000-014.")
    first, last = int(block[1]), int(block[2])
    settings = {"factorization": asdict(config.factorization), "calibration": asdict(config.calibration)}
    log = Record("factorization", settings)
    checkpoint = Checkpoint(model)
    everything = find_projections(model, config.model)
    projections = [p for p in everything if first <= p.layer <= last]
    if not projections:
        raise UserError(
            f"{model} has no layers {layers}. Set model.n_layers to {1 + max(p.layer for p in everything)}."
        )
    require_whole_groups(config.factorization, first, last, 1 + max(p.layer for p in everything))
    chosen = read_json(ranks)["ranks"] if ranks else None
    size = [p.d_in * p.d_out for p in projections]
    progress = Progress(len(projections), f"{config.factorization.title}, layers {layers}", float(sum(size)))
    file = FactorsFile([p.name for p in projections])  # their order; a GPU takes them by shape
    for compact, row in _factorized(config, checkpoint, projections, grams, chosen):
        file.add(row, compact)
        progress.step(row["name"], described(row), float(row["d_in"] * row["d_out"]))
    file.write(factors)
    statistics = [statistics_file(grams, layer) for layer in sorted({p.layer for p in projections})]
    inputs = file_hashes(*statistics, *([ranks] if ranks else [])) | weights_hash(model)
    log.finish(record, inputs=inputs, projections=file.rows)


def _factorized(
    config: Config, checkpoint: Checkpoint, projections: Sequence[Projection], grams: Path, ranks: dict[str, Any] | None
) -> Iterator[tuple[Factors, dict[str, Any]]]:
    """Yield ``(factors, row of the record)``; projections that share an input share its whitener.

    ``seconds`` of a row are those since the one before: the first matrix of a batch carries the time of all.
    """
    factorization = config.factorization
    device = devices.pick(factorization.device, "factorization.device")
    problem_of = problems_from(
        lambda p: checkpoint.weight(p).to(device),
        lambda p: read_statistics(grams, p.layer, p.shared_input, device, p.attended),
        config.calibration.damping,
        ranks,
    )

    def batches(groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        return _batches(groups, factorization, device)

    last = time.perf_counter()
    for projection, group, problem, factors in factorize_projections(factorization, projections, problem_of, batches):
        row = _row(projection, group, factors, problem, factorization.compression_ratio)
        if ranks is not None and factorization.rank_search.perplexity_budget is not None:
            row["fallback"] = "rank chosen by factorization.rank_search.perplexity_budget, whatever the ratio"
        row["seconds"], last = time.perf_counter() - last, time.perf_counter()
        yield factors, row


def _batches(
    groups: Sequence[Group], factorization: FactorizationConfig, device: torch.device
) -> Iterator[Sequence[Group]]:
    """Groups to hold in memory together: those of one shared input, or of as many layers as a GPU has room for.

    On a GPU those of one shape stand side by side, so that they are solved as one batch.
    """
    if device.type != "cuda" or getattr(factorization, "pairing", None) == MATCHED:
        yield from by_shared_input(factorization, groups)
        return
    size = getattr(factorization, "group_size", 1)
    layers = [list(run) for _, run in itertools.groupby(groups, lambda group: group[0].layer // size)]
    free, _ = torch.cuda.mem_get_info(device)
    # gram and whitener in float64, then weight, target, factors and the solver's state
    needed = max(sum(16 * p.d_in**2 + 64 * p.d_in * p.d_out for group in layer for p in group) for layer in layers)
    at_once = max(1, int(free / 2 // needed))
    for first in range(0, len(layers), at_once):
        window = itertools.chain.from_iterable(layers[first : first + at_once])
        yield sorted(window, key=lambda group: (len(group), group[0].d_in, group[0].d_out))


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
    return {
        "kind": factors.kind,
        **factors.sizes,
        "value_bits": factors.value_bits,
        "stored_bits": stored_bits(factors, shares),
        "output_error": output_error(problem.whitener, problem.weight, approximation),
        "weight_error": weight_error(problem.weight, approximation),
    }


def described(row: dict[str, Any]) -> str:
    """Sizes, error and seconds of a projection, for the progress line."""
    sizes = "  ".join(f"{name} {row[name]}" for name in ("rank", "atoms", "sparsity") if row[name])
    kept = "kept dense" if row["value_bits"] == 16 else f"dense, {row['value_bits']} bits"
    return f"{sizes or kept:<26} error {row['output_error']:.4f}  {row['seconds']:5.2f} s"
