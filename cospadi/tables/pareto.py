"""Quality against megabytes: every method in every number of bits on one plot, and the front that no other is below."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.cells import factorization_of, quantization_of
from cospadi.tables.emphasis import factorizations, palette
from cospadi.tables.lines import (
    MARK,
    LineEnd,
    add_legend,
    axis_label,
    draw_dense,
    layer,
    leading_lines,
    markers,
    name_lines,
    panel_height,
    upper_limit,
)
from cospadi.tables.metrics import METRICS, Metric
from cospadi.tables.style import SOFT, label_logarithmic

SHOWN = (METRICS["token_perplexity"], METRICS["kl_to_dense"])
"""The metrics that have a panel."""


def pareto_figure(frame: pd.DataFrame) -> Figure:
    """A row per model: stored megabytes of the projections against perplexity and against KL to dense, all logarithmic.

    Smaller models are further right, as in the figures against the ratio. A colour is a factorization, a marker a
    quantization, a line joins the ratios of one of each. The grey steps are the front: a point on them is the best of all
    that are as small.
    """
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    metrics = [metric for metric in SHOWN if _drawn(frame, metric).any()] or list(SHOWN[:1])
    names = factorizations(frame)
    size = (5.4 * len(metrics), panel_height(names) * len(models) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(models), len(metrics), squeeze=False)
    named = []
    for row, (model, title) in zip(panels, models.items(), strict=True):
        for panel, metric in zip(row, metrics, strict=True):
            ends = _draw(panel, frame, model, metric)
            panel.set(title=title if panel is row[0] else "", xlabel="Projections, MB stored (smaller →)")
            named.append((panel, ends))
    front_entry = Line2D([], [], color=SOFT, alpha=0.3, linewidth=5, label="Pareto front: the best of all as small")
    add_legend(figure, frame, [front_entry])
    for panel, ends in named:
        name_lines(panel, ends)
    return figure


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


def _drawn(rows: pd.DataFrame, metric: Metric) -> pd.Series:
    """Compressed rows whose size and loss were measured, and are numbers."""
    loss = rows[metric.name]
    return (rows["method"] != DENSE) & (rows["stored_bits"].fillna(0) > 0) & loss.map(math.isfinite) & (loss > 0)


def _draw(panel: Axes, frame: pd.DataFrame, model: str, metric: Metric) -> list[LineEnd]:
    """Draw the front and a line per method into a panel; returns the ends of the lines that have a name."""
    of_model = frame[frame["model"] == model]
    rows = of_model[_drawn(of_model, metric)]
    panel.set_ylabel(metric.label)
    if rows.empty:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=SOFT)
        return []
    panel.set(xscale="log", yscale="log")
    rows = rows.assign(megabytes=rows["stored_bits"].astype(float) / 8e6)
    best = front(list(zip(rows["megabytes"], rows[metric.name], strict=True)))
    panel.step(*zip(*best, strict=True), where="post", color=SOFT, alpha=0.3, linewidth=5, zorder=1)

    limit = upper_limit(of_model, metric)
    titles = factorizations(frame)
    of_name = palette(frame)
    shapes = markers(frame)
    leading = leading_lines(list(rows["method"]))
    ends = []
    for method, of_method in rows.groupby("method", sort=False):
        base = factorization_of(str(method))
        line = of_method.sort_values("megabytes", ascending=False)
        panel.plot(
            line["megabytes"],
            line[metric.name],
            color=of_name[base],
            marker=shapes[quantization_of(str(method))],
            zorder=layer(of_name[base]),
            **MARK,
        )
        if method in leading:
            ends.append(LineEnd(line["megabytes"].iloc[-1], line[metric.name].iloc[-1], titles[base], of_name[base]))

    panel.invert_xaxis()
    if math.isfinite(limit):
        panel.set_ylim(top=limit)
    panel.set_ylabel(axis_label(metric, limit))
    dense = of_model.loc[of_model["method"] == DENSE]
    if not dense.empty and metric.of_dense is None and math.isfinite(dense[metric.name].iloc[0]):
        ends.append(draw_dense(panel, dense[metric.name].iloc[0], metric, dense["method_title"].iloc[0]))
    label_logarithmic(panel.xaxis)
    label_logarithmic(panel.yaxis)
    return ends
