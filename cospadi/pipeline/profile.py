"""``cospadi bench pipeline``: what every stage of a study takes, on the first blocks of its model.

Each part is the stage itself, in a process of its own, with the settings of one cell of the study. Calibration, factorization and
quantization see a model that ends after these blocks. Evaluation reads the whole model, whose first blocks are replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from cospadi.bench.render import MISSING, table
from cospadi.bench.render import seconds as digits
from cospadi.bench.usage import machine, product_peaks
from cospadi.errors import UserError
from cospadi.factorization.factors import stored_bits
from cospadi.factorization.files import FactorsFile, read_factors, shares
from cospadi.factorization.work import Work
from cospadi.models import Checkpoint
from cospadi.pipeline import cost
from cospadi.pipeline.stages import allocation, calibration, evaluation, factorization, quantization, sources
from cospadi.pipeline.study import CellId, Study, parse_overrides
from cospadi.progress import Progress
from cospadi.quantization.settings import NONE
from cospadi.records import read_json, write_json, write_tensors, write_text
from cospadi.settings import Config
from cospadi.sources.files import companions
from cospadi.sources.shapes import Shape, shape_of

Row = dict[str, Any]
PEAK_SIZE = 2048
"""Rows and columns of the square product that the machine's best rate is taken from."""
OF_BLOCKS = ("calibration", "packing", "factorization", "quantization", "unpacking")
"""Stages whose time grows with the number of blocks."""
PRELOADED = [
    "cospadi.pipeline.stages.evaluation",
    "cospadi.evaluation.harness",
    "transformers.models.llama",
    "scipy.linalg",
    "numba",
]
"""Imported once: it is no part of a stage's time."""


@dataclass(frozen=True)
class Part:
    """A stage with the settings of one cell."""

    stage: str
    part: str
    run: Callable[[], object]
    work: Work = field(default_factory=Work)
    """Operations, counted from shapes and settings."""
    count: int = 1
    """How often the study runs it."""
    numbers: int | None = None
    """Coefficients that it packs or unpacks."""


def run(options: argparse.Namespace) -> None:
    """Measure what the options of `cospadi.bench.arguments` ask for, and report.

    Raises:
        UserError: an option is invalid, or a stage fails.
    """
    study = Study(options.study, parse_overrides(options.of_study))
    model = options.model or study.study.models[0]
    if model not in study.study.models:
        raise UserError(f"--model {model} is not in study {study.name}. There are: {', '.join(study.study.models)}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="cospadi-bench-") as folder:
        rows = measure(study, model, options.blocks, Path(folder), options.json)
    report = rendered(rows, f"Study {study.name}, {model}, {machine(torch.device('cpu'))}")
    print(report, end="")
    if options.markdown:
        write_text(options.markdown, report)


def measure(study: Study, model: str, n_blocks: int, folder: Path, file: Path | None = None) -> list[Row]:
    """A row for every part of the study, kept in ``file`` as they come.

    Raises:
        UserError: ``n_blocks`` is not between 1 and the number of the model's blocks, or a stage fails.
    """
    whole = study.config(model)
    shape = shape_of(whole.model)
    if not 1 <= n_blocks <= shape.layers:
        raise UserError(
            f"--blocks {n_blocks} is not a number of blocks. {model} has {shape.layers}: set 1 to {shape.layers}."
        )
    threads = torch.get_num_threads()
    # Before the first part: looking for the peak beside it would slow both down.
    peak = product_peaks(PEAK_SIZE, PEAK_SIZE, PEAK_SIZE, torch.device("cpu"), of=["fast"])["fast"]
    rows: list[Row] = []
    parts = list(_parts(study, model, n_blocks, shape, folder))
    progress = Progress(len(parts), f"Stages of study {study.name} on {n_blocks} of {shape.layers} blocks")
    for part in parts:
        measured = _apart(part.run, threads, folder / "stages.log")
        operations = sum(getattr(part.work, f.name) for f in fields(Work) if f.name != "memory")
        scale = shape.layers / n_blocks if part.stage in OF_BLOCKS else 1.0
        row = {"stage": part.stage, "part": part.part, **measured}
        row["gflops"] = operations / measured["seconds"] / 1e9 if operations else None
        row["peak_gflops"] = peak / 1e9
        row["ns_per_number"] = None
        if part.numbers:
            row["ns_per_number"] = 1e9 * measured["core_seconds"] / part.numbers
        row["study_core_seconds"] = measured["core_seconds"] * scale * part.count
        rows.append(row)
        if file:
            write_json(file, rows)
        progress.step(f"{part.stage} {part.part}", f"{digits(measured['core_seconds'])} core-seconds")
    return rows


def _parts(study: Study, model: str, n_blocks: int, shape: Shape, folder: Path) -> Iterator[Part]:
    """In the order in which a study runs them: each reads what those before it wrote."""
    root = study.config(model)
    texts = {name: folder / f"{name}.json" for name in study.texts}
    dense, cut, grams = folder / "dense" / "checkpoint", folder / "cut" / "checkpoint", folder / "grams"
    for name, text in study.texts.items():
        yield Part(
            "sources", f"text {name}", partial(sources.prepare_text, text, texts[name], folder / f"text-{name}.json")
        )
    yield Part("sources", model, partial(sources.prepare_model, root, dense, dense.parent / "record.json"))
    yield Part("sources", f"first {n_blocks} blocks", partial(keep_blocks, root, dense, n_blocks, cut), count=0)

    shape_of_cut = replace(shape, layers=n_blocks)
    documents = texts[root.calibration.text.name]
    yield Part(
        "calibration",
        root.calibration.name,
        partial(calibration.calibrate, _cut(root, n_blocks), cut, documents, grams, folder / "calibration.json"),
        cost.calibrate(root, shape_of_cut),
    )

    cells = [cell for cell in study.cells if cell.model == model]
    methods = {cell.method: _cut(study.config(model, cell.method), n_blocks) for cell in cells}
    needs_fisher = any(config.factorization.needs_fisher for config in methods.values())
    back = folder / "fisher" if needs_fisher else None
    if needs_fisher:
        yield Part(
            "calibration",
            "fisher",
            partial(calibration.fisher, _cut(root, n_blocks), cut, documents, back, folder / "fisher.json"),
            cost.fisher(root, shape_of_cut),
        )
    for method, config in methods.items():
        if config.factorization.allocates:
            losses = folder / f"{method}.losses.json"
            yield Part(
                "factorization",
                f"losses of {method}",
                partial(allocation.expect_losses, config, cut, grams, back, losses),
                cost.expect_losses(config.factorization, shape_of_cut),
            )

    layers = f"000-{n_blocks - 1:03}"
    last: Path | None = None
    for cell in cells:
        config = _cut(study.config(model, cell.method, cell.ratio, cell.quantization), n_blocks)
        if config.factorization.searches_ranks:
            continue
        plain = replace(cell, quantization=NONE)
        factors = _factors(folder, plain)
        if not any(_factors(folder, before) == factors for before in cells[: cells.index(cell)]):
            yield Part(
                "factorization",
                plain.folder,
                partial(
                    factorization.factorize,
                    config,
                    cut,
                    grams,
                    layers,
                    factors,
                    _record(factors),
                    fisher=back,
                ),
                cost.factorize_model(config.factorization, shape_of_cut),
            )
        last = factors
        if cell.quantization != NONE:
            last = _factors(folder, cell)
            sizes = [size for size in shape.projections.values() for _ in range(n_blocks)]
            work = sum((cost.quantize(config, d_in, d_out) for d_in, d_out in sizes), Work())
            records = [_record(factors), last, _record(last)]
            yield Part(
                "quantization",
                cell.folder,
                partial(quantization.quantize, config, cut, grams, factors, *records, fisher=back),
                work,
            )
    if last is None:
        raise UserError(
            f"Every method of study {study.name} searches ranks, which is not measured here. Name another study."
        )
    numbers = shape_of_cut.compressed
    yield Part(
        "packing",
        last.stem,
        partial(pack_again, last, folder / "packed.safetensors"),
        count=len(cells),
        numbers=numbers,
    )
    yield Part("unpacking", last.stem, partial(unpack, last), count=len(cells), numbers=numbers)

    read = [texts[text.name] for text in root.evaluation.texts]
    reference = folder / "reference.safetensors"
    for name, factors, count in (
        (f"dense {root.evaluation.name}", [], 1),
        (f"compressed {root.evaluation.name}", [last], len(cells)),
    ):
        written = [reference, folder / f"{name}.json", folder / f"{name} samples"]
        stage = partial(
            evaluation.evaluate, study.config(model), dense, read[0], factors, *written, second_text=read[1:]
        )
        yield Part("evaluation", name, stage, cost.evaluate(root, shape, dense=not factors), count)


def _factors(folder: Path, cell: CellId) -> Path:
    return folder / f"{cell.folder}.safetensors"


def _record(factors: Path) -> Path:
    return factors.with_suffix(".json")


def _cut(config: Config, n_blocks: int) -> Config:
    return replace(config, model=replace(config.model, n_layers=n_blocks))


def keep_blocks(config: Config, folder: Path, n_blocks: int, out: Path) -> None:
    """The checkpoint of a model that ends after its first blocks, with a record of its preparation."""
    settings = read_json(folder / "config.json")
    settings["num_hidden_layers"] = n_blocks
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:n_blocks]
    out.mkdir(parents=True)
    for file in companions(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    write_json(out / "config.json", settings)
    checkpoint = Checkpoint(folder)
    prefix = f"{config.model.blocks}."
    kept = [
        n for n in checkpoint.names if not n.startswith(prefix) or int(n.removeprefix(prefix).split(".")[0]) < n_blocks
    ]
    write_tensors(out / "model.safetensors", {name: checkpoint.read(name) for name in kept})
    write_json(out.parent / "record.json", read_json(folder.parent / "record.json"))


def pack_again(file: Path, out: Path) -> None:
    """What a stage does with factors once it has them: their bits, and the tensors that hold them."""
    rows = {row["name"]: row for row in read_json(_record(file))["projections"]}
    packed = FactorsFile(list(rows))
    for name, factors in read_factors([file]):
        stored_bits(factors, shares(rows[name]))
        packed.add(rows[name], factors)
    packed.write(out)


def unpack(file: Path) -> None:
    """What an evaluation does with factors: the weights they stand for."""
    for _, factors in read_factors([file]):
        factors.weight()


def _apart(work: Callable[[], object], threads: int, log: Path) -> Row:
    """Seconds, core-seconds, bytes and memory of ``work``, in a process of its own that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, work, threads, log).result()


def _measured(work: Callable[[], object], threads: int, log: Path) -> Row:
    torch.set_num_threads(threads)
    process = psutil.Process()
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        before = _bytes(process)
        started = time.perf_counter(), time.process_time()
        work()
        seconds = time.perf_counter() - started[0]
        core_seconds = time.process_time() - started[1]
    return {
        "seconds": seconds,
        "core_seconds": core_seconds,
        "file_mb": (_bytes(process) - before) / 1e6,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1e6 if sys.platform == "darwin" else 1e3),
    }


def _bytes(process: psutil.Process) -> int:
    """Bytes read from files and written to them, cached or not; 0 where the system does not count them."""
    if not hasattr(process, "io_counters"):
        return 0
    counters = process.io_counters()
    return getattr(counters, "read_chars", counters.read_bytes) + getattr(counters, "write_chars", counters.write_bytes)


def rendered(rows: list[Row], head: str) -> str:
    """The rows as Markdown, with the sum over a whole study by stage."""
    header = [
        "Stage",
        "Part",
        "Seconds",
        "Core-seconds",
        "GFLOP/s",
        "Of the peak",
        "Files, MB",
        "Memory, MB",
        "Whole study, core-min",
    ]
    lines = [
        [
            row["stage"],
            row["part"],
            digits(row["seconds"]),
            digits(row["core_seconds"]),
            digits(row["gflops"]),
            MISSING if row["gflops"] is None else f"{row['gflops'] / row['peak_gflops']:.0%}",
            f"{row['file_mb']:.0f}",
            f"{row['peak_memory_mb']:.0f}",
            digits(row["study_core_seconds"] / 60),
        ]
        for row in rows
    ]
    stages = dict.fromkeys(row["stage"] for row in rows)
    sums = {stage: sum(row["study_core_seconds"] for row in rows if row["stage"] == stage) / 60 for stage in stages}
    packed = [f"{row['stage']} {row['ns_per_number']:.1f} ns" for row in rows if row["ns_per_number"]]
    return (
        f"{head}, best product {rows[0]['peak_gflops']:.0f} GFLOP/s\n\n"
        + table(header, lines, left=(0, 1))
        + "\n"
        + table(["Stage", "Whole study, core-minutes"], [[s, digits(m)] for s, m in sums.items()], left=(0,))
        + f"\nIn all {sum(sums.values()):.0f} core-minutes, {sum(sums.values()) / (os.cpu_count() or 1):.0f} minutes on the "
        f"{os.cpu_count()} cores of this machine. A coefficient of the dense weight: {', '.join(packed)}. GFLOP/s: operations counted from "
        "shapes and settings (`cospadi plan`) over seconds; the peak is that of a square float32 product in this run. Files: bytes "
        "read and written, cached or not. Not measured: searches of ranks, tables, tracking and the start of jobs.\n"
    )
