"""The short form of a study: one number per method and ratio, as Markdown that goes into a paper or a README."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cospadi import records
from cospadi.records import DENSE
from cospadi.tables.cells import Cell, quantization_of, summary
from cospadi.tables.metrics import HIGHER, METRICS, Metric


def write_overviews(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """``<model>_overview.md`` of every model of a study."""
    frame = summary(cells)
    written = []
    for model in frame["model"].unique():
        written.append(Path(folder) / f"{model}_overview.md")
        records.write_text(written[-1], overview(frame, model))
    return written


def overview(frame: pd.DataFrame, model: str) -> str:
    """A table per metric: methods down, compression ratios across, the best printed value of a ratio bold, among
    those of one quantization.

    ``frame`` is a study's ``summary``. A method that was not run at a ratio has an empty cell there.
    """
    rows = frame[frame["model"] == model]
    compressed = rows[rows["method"] != DENSE]
    dense = rows[rows["method"] == DENSE]
    ratios = sorted(compressed["compression_ratio"].unique())
    parts = []
    for metric in METRICS.values():
        if not metric.in_overview or not rows[metric.name].map(math.isfinite).any():
            continue
        alike = compressed.groupby(["compression_ratio", compressed["method"].map(quantization_of)])
        best = {key: _best(group, metric) for key, group in alike}
        lines = [
            f"| {metric.label} | {' | '.join(f'{ratio:g}' for ratio in ratios)} |",
            "| :-- |" + " --: |" * len(ratios),
        ]
        if not dense.empty:
            lines.append(_line("Dense", [metric.print(dense[metric.name].iloc[0])] + [""] * (len(ratios) - 1)))
        for method, of_method in compressed.groupby("method", sort=False):
            values = of_method.set_index("compression_ratio")[metric.name]
            printed = {ratio: metric.print(values[ratio]) if ratio in values.index else "" for ratio in ratios}
            bits = quantization_of(str(method))
            marked = [f"**{p}**" if p and p == best[ratio, bits] else p for ratio, p in printed.items()]
            lines.append(_line(str(of_method["method_title"].iloc[0]), marked))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _best(rows: pd.DataFrame, metric: Metric) -> str | None:
    """The best value as it is printed; nothing where all are printed alike, as a single one is."""
    finite = rows[metric.name][rows[metric.name].map(math.isfinite)]
    if len(set(rows[metric.name].map(metric.print))) < 2 or finite.empty:
        return None
    return metric.print(finite.max() if metric.better == HIGHER else finite.min())


def _line(title: str, entries: list[str]) -> str:
    return f"| {title} | {' | '.join(entries)} |"
