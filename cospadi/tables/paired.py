"""Two models on the same documents: how they differ, and the standard error of that.

What makes a document hard is hard for both models and cancels in the difference of a document's two scores, so that a
paired comparison settles what two separate error bars leave open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cospadi.errors import UserError
from cospadi.records import DENSE
from cospadi.tables.cells import QUANTIZED, Cell, number, ordered, quantization_of
from cospadi.tables.metrics import AVERAGE, METRICS

COLUMNS = ("model", "compression_ratio", "method", "against", "measure", "difference", "stderr", "n_documents")


def differences(cells: Sequence[Cell], against: str) -> pd.DataFrame:
    """Every compressed model minus the dense one, and minus the method ``against`` at its ratio and quantization.

    One row per ``measure``: each task of the average (fraction of documents), ``average_accuracy`` (their mean), ``nll`` and
    ``kl_to_dense`` (nats per token, windows taken as documents). With ``dᵢ`` the difference on document ``i`` of ``n``, the
    difference is ``mean(d)`` and its error ``sd(d)/√n``; that of the average over ``T`` tasks is ``√(Σ seₜ²)/T``.

    A measure that one of the two lacks, or that was not taken on the same documents, has no row.

    Raises:
        UserError: when a log of documents cannot be read.
    """
    rows = []
    for cell, other in _pairs(ordered(cells), against):
        measures = list(_task_differences(cell, other))
        if average := _average(cell, other, dict(measures)):
            measures.append((AVERAGE.name, average))
        measures += _window_differences(cell, other)
        head = (cell.model, cell.compression_ratio, cell.method, other.method)
        rows += [(*head, measure, *measured) for measure, measured in measures]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def paired_difference(ours: Sequence[float | int], theirs: Sequence[float | int]) -> tuple[float, float, int]:
    """Mean of ``ours − theirs``, its standard error ``sd/√n`` (NaN for a single document), and ``n``.

    >>> paired_difference([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])
    (0.5, 0.28867513459481287, 4)
    """
    each = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    stderr = float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return float(each.mean()), stderr, len(each)


def _pairs(cells: Sequence[Cell], against: str) -> Iterator[tuple[Cell, Cell]]:
    by_place = {(cell.model, cell.compression_ratio, cell.method): cell for cell in cells}
    for cell in cells:
        if cell.is_dense:
            continue
        quantization = quantization_of(cell.method)
        counterpart = f"{against}{QUANTIZED}{quantization}" if quantization else against
        for key in ((None, DENSE), (cell.compression_ratio, counterpart)):
            other = by_place.get((cell.model, *key))
            if other is not None and other is not cell:
                yield cell, other


def _task_differences(cell: Cell, other: Cell) -> Iterator[tuple[str, tuple[float, float, int]]]:
    for task in _averaged(cell):
        if task not in _averaged(other):
            continue
        ours = _scores(cell, task)
        theirs = _scores(other, task)
        if ours and ours.keys() == theirs.keys():
            yield task, paired_difference(list(ours.values()), [theirs[document] for document in ours])


def _average(cell: Cell, other: Cell, of_tasks: dict[str, tuple[float, float, int]]) -> tuple[float, float, int] | None:
    """Difference of the averages, if all their tasks have one: without some of them it would be another average."""
    tasks = _averaged(cell)
    if not tasks or tasks != _averaged(other) or set(tasks) - set(of_tasks):
        return None
    values, errors, documents = zip(*(of_tasks[task] for task in tasks), strict=True)
    return math.fsum(values) / len(tasks), math.sqrt(math.fsum(e**2 for e in errors)) / len(tasks), sum(documents)


def _averaged(cell: Cell) -> list[str]:
    return list((cell.evaluation.get(AVERAGE.name) or {}).get("tasks") or [])


def _scores(cell: Cell, task: str) -> dict[tuple[str, int], float]:
    """Score of every document of a task, or of all tasks of a group."""
    entry: dict[str, Any] = (cell.evaluation.get("tasks") or {}).get(task) or {}
    scores: dict[tuple[str, int], float] = {}
    for name in entry.get("logged_as") or [task]:
        for row in _log(cell.samples, name):
            if entry["metric"] in row["metrics"]:
                scores.setdefault((name, row["doc_id"]), number(row["metrics"][entry["metric"]]))
    return scores


def _log(folder: Path | None, name: str) -> list[dict[str, Any]]:
    file = None if folder is None else Path(folder) / f"{name}.jsonl"
    if file is None or not file.is_file():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}). Delete its folder and evaluate this cell again.") from error


def _window_differences(cell: Cell, other: Cell) -> Iterator[tuple[str, tuple[float, float, int]]]:
    if cell.evaluation.get("text_hash") != other.evaluation.get("text_hash"):
        return
    for metric in METRICS.values():
        if not metric.paired_as:
            continue
        ours, theirs = ((c.evaluation.get(metric.name) or {}).get("per_window") or [] for c in (cell, other))
        if ours and len(ours) == len(theirs):
            yield metric.paired_as, paired_difference([*map(number, ours)], [*map(number, theirs)])
