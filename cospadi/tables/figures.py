"""Pictures of a study's tables: perplexity and accuracy against size, errors per layer, the table itself.

Figures are built without pyplot, so that they share no state and need no display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.cells import QUANTIZED, Cell, projection_errors, summary
from cospadi.tables.error_maps import error_maps
from cospadi.tables.metrics import AVERAGE, LOWER, METRICS, Metric
from cospadi.tables.paper import PaperTable
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.render import paper_table, tables
from cospadi.tables.style import INK, MARKERS, SOFT, colours, label_logarithmic, save, style
from cospadi.tables.table_picture import table_picture


def write_figures(
    source: Sequence[Cell] | tuple[pd.DataFrame, pd.DataFrame],
    folder: Path,
    printed: Sequence[PaperTable] | None = None,
) -> list[Path]:
    """Every figure of a study as PNG and SVG, under ``folder``.

    ``perplexity`` and ``accuracy`` against the stored ratio, ``pareto`` with perplexity against megabytes, ``output_error``
    per layer and projection, and ``<model>_table`` for every model. ``source`` is the study's cells, or its ``summary`` and ``projection_errors``
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
            "pareto": pareto_figure(frame, _base_colours(frame)),
        }
        figures |= {f"{table.name}_table": table_picture(table) for table in printed}
        return [path for name, figure in figures.items() for path in save(figure, Path(folder) / name)]


def _base_colours(frame: pd.DataFrame) -> dict[str, str]:
    """The same colour for a method in all its quantizations."""
    return colours(list(dict.fromkeys(method.partition(QUANTIZED)[0] for method in _methods(frame))))


def _methods(frame: pd.DataFrame) -> dict[str, str]:
    """Titles of the compressed methods by name, in the order of the rows."""
    rows = frame[frame["method"] != DENSE]
    return dict(zip(rows["method"], rows["method_title"], strict=True))


def _against_size(frame: pd.DataFrame, metric: Metric) -> Figure:
    """A panel per model: ``metric`` against the stored ratio, a line per method, the uncompressed model as a level."""
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    methods = _methods(frame)
    width = min(len(models), 3)
    height = math.ceil(len(models) / width)
    figure = Figure(figsize=(6.6 if width == 1 else 3.9 * width, 0.6 + 3.5 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    unplaced = False
    for panel, (model, title) in zip(panels.flat, models.items(), strict=False):
        rows = frame[frame["model"] == model]
        unplaced |= _draw_lines(panel, rows, metric, methods)
        panel.set_title(title)
        _label_megabytes(panel, rows)
    for panel in panels.flat[len(models) :]:
        panel.set_visible(False)
    for panel in panels[-1, :]:
        panel.set_xlabel("Stored ratio: fraction of the projections' bits removed" if width == 1 else "Stored ratio")
    for panel in panels[:, 0]:
        panel.set_ylabel(metric.label)
    _add_legend(figure, methods, unplaced)
    return figure


def _add_legend(figure: Figure, methods: dict[str, str], unplaced: bool) -> None:
    """Methods below the panels, in as many columns as fit; the figure grows by the rows."""
    palette = colours(list(methods))
    entries = [
        Line2D([], [], color=palette[method], marker=_marker(methods, method), markersize=6, label=title)
        for method, title in methods.items()
    ]
    if unplaced:
        entries.append(Line2D([], [], color=SOFT, marker="x", linestyle="none", markersize=7, label="not finite"))
    if not entries:
        return
    longest = max(len(str(entry.get_label())) for entry in entries) + 5
    fitting = max(1, int(figure.get_figwidth() * 12 / longest))
    columns = min(len(entries), fitting)
    figure.set_figheight(figure.get_figheight() + 0.21 * (math.ceil(len(entries) / columns) - 1))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns)


def _label_megabytes(panel: Axes, rows: pd.DataFrame) -> None:
    """A second axis at the top: what the projections take on disk, masks and indices counted."""
    dense = rows.loc[rows["dense_bits"] > 0, "dense_bits"].max() / 8e6
    if not dense > 0:
        return
    axis = panel.secondary_xaxis("top", functions=(lambda ratio: dense * (1 - ratio), lambda size: 1 - size / dense))
    axis.set_xlabel("Projections, MB stored", fontsize=9, color=SOFT)
    axis.tick_params(labelsize=8, colors=SOFT)


def _draw_lines(panel: Axes, rows: pd.DataFrame, metric: Metric, methods: dict[str, str]) -> bool:
    """Draw a panel; return whether some measured value was not finite and got a cross at the edge."""
    values = rows[metric.name]
    finite = values.map(math.isfinite)
    if metric.is_logarithmic:
        finite &= values > 0
    bad = values.map(math.isinf) | rows["diverged"].map(lambda names: metric.name in names.split())
    compressed = rows["method"] != DENSE
    crosses = bool((bad & compressed).any())
    if not (finite | bad).any():
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=SOFT)
        panel.set(xticks=[], yticks=[])
        return False

    if metric.is_logarithmic:
        panel.set_yscale("log")
    largest = rows.loc[compressed, "stored_ratio"].max()
    reach = 0.5 if pd.isna(largest) else max(float(largest), 0.1)
    panel.set_xlim(0, 1.08 * reach)
    palette = colours(list(methods))
    for i, method in enumerate(methods):
        of_method = rows[rows["method"] == method].sort_values("stored_ratio")
        look = {"color": palette[method], "marker": _marker(methods, method), "zorder": 3 + 0.01 * i}
        _draw_method(panel, of_method, metric, finite, bad, look)
    _draw_crosses(panel, rows[bad & compressed], metric, palette, dodge=0.014 * reach)

    # Without a point the axis has its default limits, which must not count.
    low, high = panel.get_ylim() if (finite & compressed).any() else (math.inf, -math.inf)
    dense = rows[~compressed & finite]
    if not dense.empty:
        level = dense[metric.name].iloc[0]
        _draw_dense(panel, level, dense["method_title"].iloc[0], metric)
        low = min(low, level * metric.scale)
        high = max(high, level * metric.scale)
    if math.isfinite(low):
        _stretch(panel, low, high, metric.is_logarithmic, crosses)
    if metric.is_logarithmic:
        label_logarithmic(panel.yaxis)
    return crosses


def _draw_method(
    panel: Axes, rows: pd.DataFrame, metric: Metric, finite: pd.Series, bad: pd.Series, look: dict[str, Any]
) -> None:
    """The line of a method, broken where a value is not finite, and its standard errors."""
    line = rows[(finite | bad).loc[rows.index]]
    panel.plot(
        line["stored_ratio"],
        (line[metric.name] * metric.scale).where(finite.loc[line.index]),
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.8,
        **look,
    )
    good = rows[finite.loc[rows.index]]
    errors = (good[f"{metric.name}_stderr"] * metric.scale).where(lambda error: error.map(math.isfinite), 0.0)
    if not (errors > 0).any():
        return
    # A bar that reached below 0 could not be drawn on a logarithmic axis.
    below = errors.clip(upper=0.9 * good[metric.name]) if metric.is_logarithmic else errors
    panel.errorbar(
        good["stored_ratio"],
        good[metric.name] * metric.scale,
        [below, errors],
        fmt="none",
        ecolor=look["color"],
        capsize=3,
    )


def _draw_crosses(panel: Axes, rows: pd.DataFrame, metric: Metric, palette: dict[str, str], dodge: float) -> None:
    """A cross at the worse edge for every value that is not finite; those of one ratio side by side."""
    edge = 0.965 if metric.better == LOWER else 0.035
    for _, of_ratio in rows.groupby("compression_ratio", sort=False):
        for place, (_, row) in enumerate(of_ratio.iterrows()):
            shifted = row["stored_ratio"] + dodge * (place - (len(of_ratio) - 1) / 2)
            colour = palette[row["method"]]
            across = panel.get_xaxis_transform()
            panel.plot(shifted, edge, "x", transform=across, color=colour, markersize=7, zorder=5)


def _draw_dense(panel: Axes, value: float, label: str, metric: Metric) -> None:
    """The uncompressed model as a dashed level, its value printed on the better side of it."""
    level = value * metric.scale
    below = metric.better == LOWER
    panel.axhline(level, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
    panel.annotate(
        f"{label} {metric.print(value)}",
        (0, level),
        xytext=(4, -4 if below else 4),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        zorder=2.5,
    )


def _stretch(panel: Axes, low: float, high: float, logarithmic: bool, crosses: bool) -> None:
    """Leave room for the label of the level, and for crosses at the edge."""
    if logarithmic:
        decades = max(math.log10(high / low), 0.3)
        panel.set_ylim(low / 10 ** (0.12 * decades), high * 10 ** ((0.14 if crosses else 0.04) * decades))
    else:
        span = max(high - low, 1.0)
        panel.set_ylim(low - (0.14 if crosses else 0.04) * span, high + 0.12 * span)


def _marker(methods: dict[str, str], method: str) -> str:
    return MARKERS[list(methods).index(method) % len(MARKERS)]
