"""The cells of a study as data frames: one row per cell (``summary``), one per projection (``projection_errors``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cospadi.errors import UserError
from cospadi.factorization.settings import FAMILIES
from cospadi.tables.metrics import METRICS

QUANTIZED = "+"
"""Separator of factorization and quantization in a method's name: ``cospadi_plus+int8``."""
LEADING_COLUMNS = (
    "model",
    "method",
    "solver",
    "compression_ratio",
    "stored_ratio",
    "bits",
    *METRICS,
    "output_error_mean",
    "factorize_seconds",
    "peak_memory_mb",
)
PROJECTION_COLUMNS = (
    "model",
    "method",
    "compression_ratio",
    "layer",
    "projection",
    "d_in",
    "d_out",
    "kind",
    "atoms",
    "sparsity",
    "rank",
    "stored_bits",
    "budget_bits",
    "output_error",
    "weight_error",
    "seconds",
    "fallback",
)
_COUNTS = ("bits", "stored_bits", "budget_bits", "dense_bits", "fallbacks", "limit")
_TEXTS = (
    "model",
    "method",
    "solver",
    "second_text",
    "fallback_reasons",
    "diverged",
    "model_title",
    "method_title",
    "quantization_title",
    "family",
)


@dataclass
class Cell:
    """One row of a study: a model, a method, a ratio, and the records of what was done and measured."""

    model: str
    """Name of the ``conf/model`` file."""
    model_title: str
    """How tables and figures name the model."""
    method: str
    """Name of the ``conf/factorization`` file; ``dense`` for the uncompressed model."""
    method_title: str
    """How tables and figures name the method."""
    compression_ratio: float | int | None = None
    """Nominal fraction of bits removed; ``None`` for the uncompressed model."""
    factorizations: list[dict[str, Any]] = field(default_factory=list)
    """Factorization records, one per job; empty for the uncompressed model."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """The evaluation record."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Records of what had to be done before: a rank search, the factors that were quantized. Their time counts."""
    quantization: str = ""
    """Name of the ``conf/quantization`` file; empty for 16 bits."""
    quantization_title: str = ""
    """How tables and figures name it, behind the method."""
    family: str = ""
    """What its method makes of a weight, one of `FAMILIES` (`cospadi/factorization/settings.py`)."""
    samples: Path | None = None
    """Folder of the evaluation's logs, a JSON line per document; ``None``: not kept."""

    def __post_init__(self) -> None:
        if self.quantization:
            self.method = f"{self.method}{QUANTIZED}{self.quantization}"
            self.method_title = f"{self.method_title}, {self.quantization_title}"

    @property
    def is_dense(self) -> bool:
        return self.compression_ratio is None

    @property
    def projections(self) -> list[dict[str, Any]]:
        """Entries of all projections, over all jobs."""
        return [projection for record in self.factorizations for projection in record.get("projections", [])]


def quantization_of(method: str) -> str:
    """
    >>> quantization_of("cospadi_plus+int8"), quantization_of("svd")
    ('int8', '')
    """
    return method.partition(QUANTIZED)[2]


def factorization_of(method: str) -> str:
    """
    >>> factorization_of("cospadi_plus+int8"), factorization_of("svd")
    ('cospadi_plus', 'svd')
    """
    return method.partition(QUANTIZED)[0]


def number(value: object) -> float:
    """A record's number as a float: ``null`` is NaN, and so is the text ``"nan"``, which JSON needs; likewise ``"inf"``.

    >>> number("inf"), number(None), number(3)
    (inf, nan, 3.0)
    """
    return math.nan if value is None else float(value)  # type: ignore[arg-type]


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """By model, then the dense row, then ratio, then family; models and methods keep the study's order."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    return sorted(
        cells,
        key=lambda cell: (
            models.index(cell.model),
            not cell.is_dense,
            cell.compression_ratio or 0.0,
            FAMILIES.index(cell.family),
            methods.index(cell.method),
        ),
    )


def task_names(cells: Iterable[Cell]) -> list[str]:
    """Names of all tasks, in the order of the records."""
    return list(dict.fromkeys(task for cell in cells for task in cell.evaluation.get("tasks") or {}))


def summary(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per cell.

    The leading columns are ``LEADING_COLUMNS``, then a column per task (accuracies as fractions, perplexities as they
    are), then bits, standard errors, each task's metric and direction, and titles. What was not measured is empty;
    a measured NaN is empty too, and its column is named in ``diverged``.

    Raises:
        UserError: when two cells claim the same row, or a task is named like another column.
    """
    cells = ordered(cells)
    rows = [(cell.model, cell.method, cell.compression_ratio) for cell in cells]
    twice = [row for row, times in Counter(rows).items() if times > 1]
    if twice:
        raise UserError(f"Two cells claim the same row of the table: {twice[0]}. Give each cell its own records.")
    tasks = task_names(cells)
    taken = sorted(set(tasks) & {*LEADING_COLUMNS, *_COUNTS, *_TEXTS})
    if taken:
        raise UserError(f"A task is named like a column of the table: {', '.join(taken)}. Rename the task.")
    dense_sizes = {cell.model: _dense_sizes(cells, cell.model) for cell in cells}
    columns = [
        *LEADING_COLUMNS,
        *tasks,
        *("stored_bits", "budget_bits", "dense_bits"),
        *(f"{name}_stderr" for name in (*METRICS, *tasks)),
        *("weight_error_mean", "fallbacks", "evaluate_seconds", "limit"),
        *(f"{task}_{detail}" for task in tasks for detail in ("metric", "higher_is_better")),
        *("fallback_reasons", "diverged", "second_text", "model_title", "method_title", "quantization_title"),
        "family",
    ]
    frame = pd.DataFrame([_summary_row(cell, tasks, dense_sizes[cell.model]) for cell in cells], columns=columns)
    return _typed(frame, tasks)


def read_summary(path: Path) -> pd.DataFrame:
    """A ``summary.csv`` exactly as it was written: same values to the last bit, same types."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    tasks = tasks_of(frame.columns)
    flags = {f"{task}_higher_is_better" for task in tasks}
    for name in frame.columns.difference([*_TEXTS, *(f"{task}_metric" for task in tasks)]):
        if name in flags:
            parse = {"True": True, "False": False}.get
        else:
            parse = int if name in _COUNTS else float
        frame[name] = pd.Series([parse(text) if text else None for text in frame[name]], dtype=object)
    return _typed(frame, tasks)


def tasks_of(columns: Iterable[str]) -> list[str]:
    """The task columns of a summary: those that have a ``<task>_metric`` beside them."""
    names = list(columns)
    return [name for name in names if f"{name}_metric" in names]


def projection_errors(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per projection of every compressed cell: its size, what it became, and its errors."""
    rows = [
        {"model": cell.model, "method": cell.method, "compression_ratio": cell.compression_ratio, **projection}
        for cell in ordered(cells)
        for projection in cell.projections
    ]
    frame = pd.DataFrame(rows, columns=list(PROJECTION_COLUMNS))
    for name in ("layer", "d_in", "d_out", "atoms", "sparsity", "rank", "stored_bits", "budget_bits"):
        frame[name] = frame[name].astype("Int64")
    for name in ("output_error", "weight_error", "seconds"):
        frame[name] = frame[name].map(number).astype(float)
    for name in ("model", "method", "projection", "kind", "fallback"):
        frame[name] = frame[name].map(lambda value: value if isinstance(value, str) else "").astype("str")
    return frame


def _summary_row(cell: Cell, tasks: Sequence[str], dense_sizes: dict[str, int]) -> dict[str, Any]:
    projections = cell.projections
    row: dict[str, Any] = {
        "model": cell.model,
        "method": cell.method,
        "solver": _solver(cell),
        "compression_ratio": 0.0 if cell.is_dense else float(cell.compression_ratio),
        "model_title": cell.model_title,
        "method_title": cell.method_title,
        "quantization_title": cell.quantization_title,
        "family": cell.family,
        "second_text": second_text(cell),
        "evaluate_seconds": number(cell.evaluation.get("seconds")),
        "limit": cell.evaluation.get("limit"),
        "fallbacks": sum(projection.get("fallback") is not None for projection in projections),
        "fallback_reasons": "; ".join(f"{times} × {reason}" for reason, times in _fallbacks(projections).items()),
    }
    if cell.is_dense:
        row |= dense_sizes | {"stored_ratio": 0.0, "peak_memory_mb": number(cell.evaluation.get("peak_memory_mb"))}
    elif projections:
        row |= _compression(cell)
    diverged = []
    for name, measured in measurements(cell, tasks):
        row[name] = number(measured.get("value"))
        row[f"{name}_stderr"] = number(measured.get("stderr"))
        if measured.get("value") is not None and math.isnan(row[name]):
            diverged.append(name)
    for task in tasks:
        measured = (cell.evaluation.get("tasks") or {}).get(task, {})
        row[f"{task}_metric"] = measured.get("metric") or ""
        row[f"{task}_higher_is_better"] = measured.get("higher_is_better")
    return row | {"diverged": " ".join(diverged)}


def _compression(cell: Cell) -> dict[str, Any]:
    """Columns that say what compression made of the projections, and what it took."""
    projections = cell.projections
    records = [*cell.factorizations, *cell.earlier]
    bits = {name: sum(p[name] for p in projections) for name in ("stored_bits", "budget_bits", "dense_bits")}
    return {
        **bits,
        "stored_ratio": 1 - bits["stored_bits"] / bits["dense_bits"],
        "bits": Counter(p["value_bits"] for p in projections).most_common(1)[0][0],
        "output_error_mean": _mean(p.get("output_error") for p in projections),
        "weight_error_mean": _mean(p.get("weight_error") for p in projections),
        "factorize_seconds": sum(number(record.get("seconds")) for record in records),
        "peak_memory_mb": max(number(record.get("peak_memory_mb")) for record in records),
    }


def measurements(cell: Cell, tasks: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(column, {"value", "stderr", "protocol", …})`` of everything the cell's evaluation measured."""
    for name in METRICS:
        yield name, cell.evaluation.get(name) or {}
    for name in tasks:
        yield name, (cell.evaluation.get("tasks") or {}).get(name) or {}


def second_text(cell: Cell) -> str:
    """Title of the text behind ``second_perplexity``; empty where there is none."""
    settings = (cell.evaluation.get("settings") or {}).get("evaluation") or {}
    return (settings.get("second_text") or {}).get("title") or ""


def _solver(cell: Cell) -> str:
    settings = cell.factorizations[0].get("settings", {}) if cell.factorizations else {}
    return settings.get("factorization", {}).get("solver") or ""


def _fallbacks(projections: Iterable[dict[str, Any]]) -> Counter[str]:
    return Counter(str(p["fallback"]) for p in projections if p.get("fallback") is not None)


def _dense_sizes(cells: Iterable[Cell], model: str) -> dict[str, int]:
    """Bits of the uncompressed projections, as the compressed cells of the same model report them."""
    for cell in cells:
        if cell.model == model and cell.projections:
            dense = sum(p["dense_bits"] for p in cell.projections)
            entries = sum(p["d_in"] * p["d_out"] for p in cell.projections)
            return {"stored_bits": dense, "dense_bits": dense, "bits": round(dense / entries)}
    return {}


def _mean(values: Iterable[object]) -> float:
    """Mean of the values that are not ``None``: NaN without any, not finite where one of them is not."""
    numbers = [number(value) for value in values if value is not None]
    if numbers and all(map(math.isfinite, numbers)):
        return math.fsum(numbers) / len(numbers)
    # fsum refuses infinities of both signs; a plain sum gives NaN.
    return sum(numbers or [math.nan])


def _typed(frame: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    texts = {*_TEXTS, *(f"{task}_metric" for task in tasks)}
    flags = {f"{task}_higher_is_better" for task in tasks}
    for name in frame.columns:
        if name in texts:
            frame[name] = frame[name].astype("str")
        elif name in flags:
            frame[name] = frame[name].astype("boolean")
        else:
            frame[name] = frame[name].astype("Int64" if name in _COUNTS else float)
    return frame
