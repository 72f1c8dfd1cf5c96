"""Perplexity against megabytes: every method in every number of bits on one plot, and the front that no other is below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.cells import QUANTIZED
from cospadi.tables.metrics import METRICS
from cospadi.tables.style import INK, MARKERS, SOFT, label_logarithmic


def pareto_figure(frame: pd.DataFrame, palette: dict[str, str]) -> Figure:
    """A panel per model: stored megabytes of the projections and token perplexity, both logarithmic.

    A colour is a factorization, a marker a quantization, a line joins the ratios of one of each. The grey steps are the
    front: a point on them has the lowest perplexity of all that are as small.
    """
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    compressed = frame[frame["method"] != DENSE]
    titles = zip(compressed["method"], compressed["method_title"], compressed["quantization_title"], strict=True)
    bases = {}
    bits = {"": "16 bits"}
    for method, title, quantization_title in titles:
        base, _, quantization = method.partition(QUANTIZED)
        bases[base] = title.removesuffix(f", {quantization_title}")
        bits[quantization] = quantization_title or bits[""]
    markers = dict(zip(bits, MARKERS * (1 + len(bits) // len(MARKERS)), strict=False))
    figure = Figure(figsize=(max(6.6, 4.4 * len(models)), 4.3), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (model, title) in zip(panels, models.items(), strict=True):
        rows = frame[frame["model"] == model]
        _draw(panel, rows[_drawn(rows)], palette, markers)
        dense = rows[rows["method"] == DENSE]
        if not dense.empty and math.isfinite(dense["token_perplexity"].iloc[0]):
            panel.axhline(dense["token_perplexity"].iloc[0], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
        if panel.get_yscale() == "log":
            label_logarithmic(panel.xaxis)
            label_logarithmic(panel.yaxis)
        panel.set(title=title, xlabel="Projections, MB stored")
    panels[0].set_ylabel(METRICS["token_perplexity"].label)
    entries = [Line2D([], [], color=palette[name], label=title) for name, title in bases.items()]
    entries += [
        Line2D([], [], color=SOFT, marker=markers[name], linestyle="none", label=title) for name, title in bits.items()
    ]
    entries.append(Line2D([], [], color=SOFT, alpha=0.6, linewidth=5, label="none smaller is better"))
    columns = _legend_columns([entry.get_label() for entry in entries], figure.get_figwidth())
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=9)
    figure.set_figheight(4.3 + 0.19 * (math.ceil(len(entries) / columns) - 1))
    return figure


def _legend_columns(titles: Sequence[str], width: float | int) -> int:
    """As many columns as fit beside one another into ``width`` inches, at most 4.

    >>> _legend_columns(["SVD", "Wanda"], 6.6), _legend_columns(["CoSpaDi+, no learned atoms"], 6.6)
    (4, 2)
    """
    widest = 0.6 + 0.085 * max(map(len, titles))
    return max(1, min(4, int(width / widest)))


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (size, loss) with a lower loss than all that are not larger, from the smallest on.

    >>> front([(3.0, 1.0), (1.0, 5.0), (2.0, 6.0), (2.0, 2.0)])
    [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]
    """
    best: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return best


def _drawn(rows: pd.DataFrame) -> pd.Series:
    """Compressed rows whose size and perplexity were measured, and are numbers."""
    loss = rows["token_perplexity"]
    return (rows["method"] != DENSE) & (rows["stored_bits"].fillna(0) > 0) & loss.map(math.isfinite) & (loss > 0)


def _draw(panel: Axes, rows: pd.DataFrame, palette: dict[str, str], markers: dict[str, str]) -> None:
    """Draw the front and a line per method into a panel."""
    if rows.empty:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=SOFT)
        return
    panel.set(xscale="log", yscale="log")
    size = rows["stored_bits"].astype(float) / 8e6
    best = front(list(zip(size, rows["token_perplexity"], strict=True)))
    panel.step(*zip(*best, strict=True), where="post", color=SOFT, alpha=0.3, linewidth=5, zorder=1)
    for method, of_method in rows.groupby("method", sort=False):
        base, _, quantization = str(method).partition(QUANTIZED)
        ordered = of_method.sort_values("stored_bits")
        panel.plot(
            size[ordered.index],
            ordered["token_perplexity"],
            color=palette[base],
            marker=markers[quantization],
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linewidth=1.2,
            zorder=3,
        )
