"""The short form of a study: one number per method and ratio, as Markdown that goes into a paper or a README."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from cospadi import records
from cospadi.records import DENSE
from cospadi.tables.cells import Cell, quantization_of, summary
from cospadi.tables.numbers import divergence, percent, perplexity

_METRICS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("token_perplexity", "Token perplexity ↓", perplexity, False),
    ("kl_to_dense", "KL to dense ↓", divergence, False),
    ("average_accuracy", "Average accuracy (%) ↑", percent, True),
)


def write_overviews(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """``<model>_overview.md`` of every model of a study."""
    frame, written = summary(cells), []
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
    compressed, dense = rows[rows["method"] != DENSE], rows[rows["method"] == DENSE]
    ratios = sorted(compressed["compression_ratio"].unique())
    parts = []
    for metric, title, text, higher in _METRICS:
        if not rows[metric].map(math.isfinite).any():
            continue
        alike = compressed.groupby(["compression_ratio", compressed["method"].map(quantization_of)])
        best = {key: _best(group, metric, text, higher) for key, group in alike}
        lines = [f"| {title} | {' | '.join(f'{ratio:g}' for ratio in ratios)} |", "| :-- |" + " --: |" * len(ratios)]
        if not dense.empty:
            lines.append(_line("Dense", [text(dense[metric].iloc[0])] + [""] * (len(ratios) - 1)))
        for method, of_method in compressed.groupby("method", sort=False):
            found = of_method.set_index("compression_ratio")[metric]
            printed = {ratio: text(found[ratio]) if ratio in found.index else "" for ratio in ratios}
            bits = quantization_of(str(method))
            marked = [f"**{p}**" if p and p == best[ratio, bits] else p for ratio, p in printed.items()]
            lines.append(_line(str(of_method["method_title"].iloc[0]), marked))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _best(rows: pd.DataFrame, metric: str, text: Callable[[float], str], higher: bool) -> str | None:
    """The best value as it is printed; nothing where one method stands alone."""
    finite = rows[metric][rows[metric].map(math.isfinite)]
    if len(rows) < 2 or finite.empty:
        return None
    return text(finite.max() if higher else finite.min())


def _line(title: str, entries: list[str]) -> str:
    return f"| {title} | {' | '.join(entries)} |"
