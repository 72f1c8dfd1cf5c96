"""Pictures of a study's tables: perplexity and accuracy against size, errors per layer, the table itself.

Figures are built without pyplot, so that they share no state and need no display.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.cells import Cell, factorization_of, projection_errors, quantization_of, summary
from cospadi.tables.emphasis import factorizations, palette
from cospadi.tables.error_maps import error_maps
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
from cospadi.tables.metrics import AVERAGE, LOWER, METRICS, Metric
from cospadi.tables.paper import PaperTable
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.render import paper_table, tables
from cospadi.tables.style import SOFT, label_logarithmic, save, style
from cospadi.tables.table_picture import table_picture


def write_figures(
    source: Sequence[Cell] | tuple[pd.DataFrame, pd.DataFrame],
    folder: Path,
    printed: Sequence[PaperTable] | None = None,
) -> list[Path]:
    """Every figure of a study as PNG and SVG, under ``folder``.

    ``perplexity`` and ``accuracy`` against the stored ratio, ``pareto`` with perplexity and KL to dense against megabytes,
    ``output_error`` per layer and projection, and ``<model>_table`` for every model. ``source`` is the study's cells, or its ``summary`` and ``projection_errors``
    (then the tables go without the protocols, which only the records hold).
    """
    if isinstance(source, tuple):
        frame, errors = source
        titles = dict(zip(frame["model"], frame["model_title"], strict=True))
        printed = [paper_table(frame, model, title) for model, title in titles.items()]
    else:
        frame = summary(source)
        errors = projection_errors(source)
        printed = tables(source) if printed is None else printed
    with style():
        figures = {
            "perplexity": _against_size(frame, METRICS["token_perplexity"]),
            "accuracy": _against_size(frame, AVERAGE),
            "output_error": error_maps(frame, errors),
            "pareto": pareto_figure(frame),
        }
        figures |= {f"{table.name}_table": table_picture(table) for table in printed}
        return [path for name, figure in figures.items() for path in save(figure, Path(folder) / name)]


def _methods(frame: pd.DataFrame) -> list[str]:
    """The compressed methods, in the order of the rows."""
    return list(dict.fromkeys(frame.loc[frame["method"] != DENSE, "method"]))


def _against_size(frame: pd.DataFrame, metric: Metric) -> Figure:
    """A panel per model: ``metric`` against the stored ratio, a line per method, the uncompressed model as a level."""
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    width = min(len(models), 2)
    height = math.ceil(len(models) / width)
    panel_size = (7.6 if width == 1 else 5.4, panel_height(factorizations(frame)))
    figure = Figure(figsize=(panel_size[0] * width, 0.6 + panel_size[1] * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    unplaced = False
    named = []
    for panel, (model, title) in zip(panels.flat, models.items(), strict=False):
        rows = frame[frame["model"] == model]
        crosses, ends = _draw_lines(panel, rows, metric, frame)
        unplaced |= crosses
        named.append((panel, ends))
        panel.set_title(title)
        _label_megabytes(panel, rows)
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    for panel in panels[-1, :]:
        panel.set_xlabel("Stored ratio: fraction of the projections' bits removed" if width == 1 else "Stored ratio")
    cross = Line2D([], [], color=SOFT, marker="x", linestyle="none", markersize=7, label="not finite")
    add_legend(figure, frame, [cross] if unplaced else [])
    for panel, ends in named:
        name_lines(panel, ends)
    return figure


def _label_megabytes(panel: Axes, rows: pd.DataFrame) -> None:
    """A second axis at the top: what the projections take on disk, masks and indices counted."""
    dense = rows.loc[rows["dense_bits"] > 0, "dense_bits"].max() / 8e6
    if not dense > 0:
        return
    axis = panel.secondary_xaxis("top", functions=(lambda ratio: dense * (1 - ratio), lambda size: 1 - size / dense))
    axis.set_xlabel("Projections, MB stored", fontsize=9, color=SOFT)
    axis.tick_params(labelsize=8, colors=SOFT)


def _draw_lines(panel: Axes, rows: pd.DataFrame, metric: Metric, frame: pd.DataFrame) -> tuple[bool, list[LineEnd]]:
    """Draw the ``rows`` of a model; return whether some value was not finite and got a cross, and the ends of the lines."""
    values = rows[metric.name]
    finite = values.map(math.isfinite)
    if metric.is_logarithmic:
        finite &= values > 0
    bad = values.map(math.isinf) | rows["diverged"].map(lambda names: metric.name in names.split())
    compressed = rows["method"] != DENSE
    crosses = bool((bad & compressed).any())
    limit = upper_limit(rows, metric)
    panel.set_ylabel(axis_label(metric, limit))
    if not (finite | bad).any():
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=SOFT)
        panel.set(xticks=[], yticks=[])
        return False, []

    if metric.is_logarithmic:
        panel.set_yscale("log")
    largest = rows.loc[compressed, "stored_ratio"].max()
    reach = 0.5 if pd.isna(largest) else max(float(largest), 0.1)
    panel.set_xlim(0, 1.08 * reach)
    rows = _side_by_side(rows, reach).assign(shown=values * metric.scale)
    of_name = palette(frame)
    titles = factorizations(frame)
    shapes = markers(frame)
    leading = leading_lines(list(rows.loc[compressed & finite, "method"]))
    ends = []
    for method in _methods(rows):
        of_method = rows[rows["method"] == method].sort_values("stored_ratio")
        base = factorization_of(method)
        look = {"color": of_name[base], "zorder": layer(of_name[base])}
        look["clip_on"] = metric.is_logarithmic  # a mark of 0 % lies on the edge
        _draw_method(panel, of_method, metric, finite, bad, look, shapes[quantization_of(method)])
        if method in leading:
            line = of_method[finite.loc[of_method.index]]
            ends.append(LineEnd(line["place"].iloc[-1], line["shown"].iloc[-1], titles[base], of_name[base]))
    _draw_crosses(panel, rows[bad & compressed], metric, of_name, dodge=0.014 * reach)

    # Without a point the axis has its default limits, which must not count.
    low, high = panel.get_ylim() if (finite & compressed).any() else (math.inf, -math.inf)
    dense = rows[~compressed & finite]
    if not dense.empty:
        ends.append(draw_dense(panel, dense[metric.name].iloc[0], metric, dense["method_title"].iloc[0]))
        low = min(low, ends[-1].y)
        high = max(high, ends[-1].y)
    if math.isfinite(low):
        _stretch(panel, low, min(high, limit), metric, crosses)
    if metric.is_logarithmic:
        label_logarithmic(panel.yaxis)
    return crosses, ends


def _side_by_side(rows: pd.DataFrame, reach: float) -> pd.DataFrame:
    """``place``: the stored ratio, those of one nominal ratio moved apart so that marks and error bars can be told apart."""
    methods = _methods(rows)
    ratios = sorted({0.0, *rows["compression_ratio"]})
    gap = min((b - a for a, b in itertools.pairwise(ratios)), default=reach)
    step = 0.25 * min(gap, 0.2 * reach) / max(len(methods), 4)
    order = {method: i - (len(methods) - 1) / 2 for i, method in enumerate(methods)}
    return rows.assign(place=rows["stored_ratio"] + rows["method"].map(order).fillna(0.0) * step)


def _draw_method(
    panel: Axes,
    rows: pd.DataFrame,
    metric: Metric,
    finite: pd.Series,
    bad: pd.Series,
    look: dict[str, Any],
    marker: str,
) -> None:
    """The line of a method, broken where a value is not finite, and its standard errors."""
    line = rows[(finite | bad).loc[rows.index]]
    panel.plot(
        line["place"],
        line["shown"].where(finite.loc[line.index]),
        marker=marker,
        **MARK,
        **look,
    )
    good = rows[finite.loc[rows.index]]
    errors = (good[f"{metric.name}_stderr"] * metric.scale).where(lambda error: error.map(math.isfinite), 0.0)
    if not (errors > 0).any():
        return
    # A bar that reached below 0 could not be drawn on a logarithmic axis, and no accuracy is below 0.
    below = errors.clip(upper=(0.9 if metric.is_logarithmic else 1.0) * good["shown"])
    panel.errorbar(good["place"], good["shown"], [below, errors], fmt="none", capsize=2, elinewidth=0.9, **look)


def _draw_crosses(panel: Axes, rows: pd.DataFrame, metric: Metric, of_name: dict[str, str], dodge: float) -> None:
    """A cross at the worse edge for every value that is not finite; those of one ratio side by side."""
    edge = 0.965 if metric.better == LOWER else 0.035
    for _, of_ratio in rows.groupby("compression_ratio", sort=False):
        for place, (_, row) in enumerate(of_ratio.iterrows()):
            shifted = row["stored_ratio"] + dodge * (place - (len(of_ratio) - 1) / 2)
            colour = of_name[factorization_of(row["method"])]
            across = panel.get_xaxis_transform()
            panel.plot(shifted, edge, "x", transform=across, color=colour, markersize=7, zorder=5)


def _stretch(panel: Axes, low: float, high: float, metric: Metric, crosses: bool) -> None:
    """Leave room at the ends of the axis, and for crosses at the edge; an accuracy has no room below 0."""
    if metric.is_logarithmic:
        decades = max(math.log10(high / low), 0.3)
        panel.set_ylim(low / 10 ** (0.04 * decades), high * 10 ** ((0.14 if crosses else 0.04) * decades))
    else:
        span = max(high - low, 1.0)
        bottom = low - (0.14 if crosses else 0.04) * span
        panel.set_ylim(bottom if crosses else max(bottom, 0.0), high + 0.04 * span)
