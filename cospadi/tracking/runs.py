"""A cell's records -> what W&B gets of it. Values only: W&B itself is in ``offline.py``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from cospadi.quantization.settings import NONE
from cospadi.records import file_hash, text_hash
from cospadi.tables.cells import (
    PROJECTION_COLUMNS,
    QUANTIZED,
    Cell,
    measurements,
    projection_errors,
    summary,
    task_names,
)

_NAMING = ("model", "method", "compression_ratio")
"""Columns of the tables that are the same in all rows of a run."""


@dataclass(frozen=True)
class Run:
    """One run, before anything of W&B is loaded."""

    id: str
    """Id in W&B: the same for the same cell under the same settings, on any machine."""
    place: str
    """Where its record is below ``results/tracking/<study>``."""
    name: str
    group: str
    """The study."""
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    summary: dict[str, Any]
    """Final values, named like the columns of ``summary.csv``."""
    layers: list[dict[str, int | float]] = field(default_factory=list)
    """``layer``, ``output_error/mean`` and ``output_error/<projection>``, a line of the history each."""
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    """Name -> columns and rows."""
    files: list[Path] = field(default_factory=list)
    """Files of the run's artifact; pictures are shown as well."""

    @property
    def content(self) -> str:
        """A hash of all there is to log."""
        hashes = {path.name: file_hash(path) for path in self.files}
        return text_hash(_canonical(asdict(self) | {"files": hashes}))


def cell_runs(study: str, cells: dict[str, Cell]) -> list[Run]:
    """A run for every cell, ``cells`` by their places: ``<model>/<calibration>/<method>-<ratio>/<evaluation>``.

    Raises:
        UserError: where the tables of these cells would raise it.
    """
    rows = {tuple(row[name] for name in _NAMING): row for _, row in summary(list(cells.values())).iterrows()}
    several = len({cell.model for cell in cells.values()}) > 1
    runs = []
    for place, cell in cells.items():
        method, _, quantization = cell.method.partition(QUANTIZED)
        ratio = float(cell.compression_ratio or 0)
        parts = [method, *([] if cell.is_dense else [f"{ratio:g}"]), *([quantization] if quantization else [])]
        settings = _settings(cell)
        runs.append(
            Run(
                id=run_id(study, place, settings),
                place=place,
                name=" ".join([*([cell.model] if several else []), *parts]),
                group=study,
                job_type="dense" if cell.is_dense else "cell",
                tags=[cell.model, *parts],
                config={
                    "study": study,
                    "model": cell.model,
                    "method": method,
                    "method_title": cell.method_title,
                    "compression_ratio": ratio,
                    "quantization": quantization or NONE,
                    "settings": settings,
                    "protocols": _protocols(cell),
                    "versions": cell.evaluation.get("versions") or {},
                },
                summary=_numbers(rows[cell.model, cell.method, ratio]),
                layers=_layers(cell),
                tables={"projections": _projections(cell)} if cell.projections else {},
            )
        )
    return runs


def tables_run(study: str, title: str, folder: Path) -> Run:
    """The run that carries a study's tables and figures, as they are in ``folder``."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix != ".log" and not path.name.startswith("."))
    frame = pd.read_csv(Path(folder) / "summary.csv")
    return Run(
        id=run_id(study, "tables", {}),
        place="tables",
        name="tables",
        group=study,
        job_type="tables",
        tags=["tables"],
        config={"study": study, "title": title},
        summary={"cells": len(frame)},
        tables={"summary": _rows(frame)},
        files=files,
    )


def run_id(study: str, place: str, settings: dict[str, Any]) -> str:
    """
    >>> run_id("default", "small/news/svd-0.3/embedded", {"seed": 1})
    'e883d2a38ca0fd8a'
    """
    return text_hash(_canonical([study, place, settings]))[:16]


def _settings(cell: Cell) -> dict[str, Any]:
    """Settings of all rooms, as the records have them."""
    settings: dict[str, Any] = {}
    for record in (cell.evaluation, *cell.factorizations):
        settings |= record.get("settings") or {}
    return settings


def _protocols(cell: Cell) -> dict[str, str]:
    return {
        name: measured["protocol"]
        for name, measured in measurements(cell, task_names([cell]))
        if measured.get("protocol")
    }


def _numbers(row: pd.Series) -> dict[str, Any]:
    """Numbers of the table's row, what diverged, and reasons of fallbacks."""
    values = {name: _plain(value) for name, value in row.items() if name not in _NAMING}
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    numbers |= {name: values[name] for name in ("diverged", "fallback_reasons") if values.get(name)}
    if "stored_bits" in numbers:
        numbers["stored_mb"] = numbers["stored_bits"] / 8e6
    return numbers


def _layers(cell: Cell) -> list[dict[str, int | float]]:
    """Errors of each layer: their mean, and those of its projections."""
    if not cell.projections:
        return []
    rows = []
    for layer, of_layer in projection_errors([cell]).groupby("layer"):
        errors = {
            f"output_error/{p.rpartition('.')[2]}": e
            for p, e in zip(of_layer["projection"], of_layer["output_error"], strict=True)
        }
        rows.append({"layer": int(layer), "output_error/mean": float(of_layer["output_error"].mean()), **errors})
    return rows


def _projections(cell: Cell) -> tuple[list[str], list[list[Any]]]:
    return _rows(projection_errors([cell])[[name for name in PROJECTION_COLUMNS if name not in _NAMING]])


def _rows(frame: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
    rows = frame.astype(object).itertuples(index=False, name=None)
    return list(frame.columns), [[_plain(value) for value in row] for row in rows]


def _plain(value: Any) -> Any:
    """A data frame's value as Python's own; ``None`` where there is none."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, default=str)
