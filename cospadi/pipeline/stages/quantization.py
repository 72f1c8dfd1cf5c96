"""Stage of room 4: factors in fewer bits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cospadi import devices
from cospadi.factorization.factors import Factors
from cospadi.factorization.files import FactorsFile, read_factors, shares
from cospadi.models import find_projections
from cospadi.pipeline.stages.factorization import described, measured
from cospadi.pipeline.stages.problems import problems_of
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.progress import Progress
from cospadi.quantization import methods
from cospadi.records import Record, file_hashes, read_json
from cospadi.settings import Config


def quantize(
    config: Config,
    model: Path,
    grams: Path,
    factors: Path,
    factorization: Path,
    out: Path,
    record: Path,
    fisher: Path | None = None,
) -> None:
    """Room 4: factors of a block of layers -> the same in fewer bits.

    ``factorization`` is the record of ``factors``; what it says of every projection goes on, sizes and errors new.
    """
    log = Record(
        "quantization",
        {
            "quantization": asdict(config.quantization),
            "factorization": asdict(config.factorization),
            "calibration": asdict(config.calibration),
        },
    )
    before = {row["name"]: row for row in read_json(factorization)["projections"]}
    projections = {p.name: p for p in find_projections(model, config.model)}
    device = devices.pick(config.quantization.device, "quantization.device")
    problem_of = problems_of(config, model, grams, fisher, device)
    title = f"{config.factorization.title} in {config.quantization.title}"
    progress = Progress(len(before), title, float(sum(row["d_in"] * row["d_out"] for row in before.values())))
    file = FactorsFile(list(before))
    for group in _groups_of(read_factors([factors], order=list(before)), before):
        started = time.perf_counter()
        problems = [problem_of(projections[name]) for name, _ in group]
        smaller = methods.quantize(config.quantization, [factors for _, factors in group], problems)
        seconds = (time.perf_counter() - started) / len(group)
        for (name, _), quantized, problem in zip(group, smaller, problems, strict=True):
            row = before[name] | measured(quantized, problem, shares(before[name])) | {"seconds": seconds}
            file.add(row, quantized)
            progress.step(name, described(row), float(row["d_in"] * row["d_out"]))
    file.write(out)
    log.finish(record, inputs=file_hashes(factors, factorization) | weights_hash(model), projections=file.rows)


def _groups_of(
    factors: Iterable[tuple[str, Factors]], rows: dict[str, dict[str, Any]]
) -> Iterable[list[tuple[str, Factors]]]:
    """Factors that share, together."""
    for _, group in itertools.groupby(factors, lambda named: (rows[named[0]]["group"] or [named[0]])[0]):
        yield list(group)
