"""Pictures of a study's tables: perplexity and accuracy against size, errors per layer, the table itself.

Figures are built without pyplot, so that they share no state and need no display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from cospadi.records import DENSE
from cospadi.tables.cells import QUANTIZED, Cell, projection_errors, summary
from cospadi.tables.error_maps import error_maps
from cospadi.tables.numbers import perplexity
from cospadi.tables.paper import PaperTable
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.render import paper_table, tables
from cospadi.tables.style import INK, MARKERS, SOFT, colours, save, style
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
        frame, errors = summary(source), projection_errors(source)
        printed = tables(source) if printed is None else printed
    with style():
        figures = {
            "perplexity": _against_size(frame, "token_perplexity"),
            "accuracy": _against_size(frame, "average_accuracy"),
            "output_error": error_maps(frame, errors),
            "pareto": pareto_figure(frame, _base_colours(frame), INK, SOFT),
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


def _against_size(frame: pd.DataFrame, metric: str):
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
    name = "Token perplexity ↓" if metric == "token_perplexity" else "Average accuracy (%) ↑"
    for panel in panels[:, 0]:
        panel.set_ylabel(name)
    palette = colours(list(methods))
    entries = [
        Line2D([], [], color=palette[method], marker=_marker(methods, method), markersize=6, label=title)
        for method, title in methods.items()
    ]
    if unplaced:
        entries.append(Line2D([], [], color=SOFT, marker="x", linestyle="none", markersize=7, label="not finite"))
    if entries:
        longest = max(len(str(entry.get_label())) for entry in entries) + 5
        fitting = max(1, int(figure.get_figwidth() * 12 / longest))
        columns = min(len(entries), fitting)
        figure.set_figheight(figure.get_figheight() + 0.21 * (math.ceil(len(entries) / columns) - 1))
        figure.legend(handles=entries, loc="outside lower center", ncols=columns)
    return figure


def _label_megabytes(panel, rows: pd.DataFrame) -> None:
    """A second axis at the top: what the projections take on disk, masks and indices counted."""
    dense = rows.loc[rows["dense_bits"] > 0, "dense_bits"].max() / 8e6
    if not dense > 0:
        return
    axis = panel.secondary_xaxis("top", functions=(lambda ratio: dense * (1 - ratio), lambda size: 1 - size / dense))
    axis.set_xlabel("Projections, MB stored", fontsize=9, color=SOFT)
    axis.tick_params(labelsize=8, colors=SOFT)


def _draw_lines(panel, rows: pd.DataFrame, metric: str, methods: dict[str, str]) -> bool:
    """Draw a panel; return whether some measured value was not finite and got a cross at the edge."""
    scale = 100.0 if metric == "average_accuracy" else 1.0
    palette = colours(list(methods))
    bad_at_top = metric == "token_perplexity"
    finite = rows[metric].map(math.isfinite)
    if bad_at_top:
        finite &= rows[metric] > 0
    bad = rows[metric].map(math.isinf) | rows["diverged"].map(lambda names: metric in names.split())
    compressed = rows["method"] != DENSE
    if not (finite | bad).any():
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=SOFT)
        panel.set(xticks=[], yticks=[])
        return False
    if bad_at_top:
        panel.set_yscale("log")
    reach = rows.loc[compressed, "stored_ratio"].max()
    reach = 0.5 if pd.isna(reach) else max(float(reach), 0.1)
    panel.set_xlim(0, 1.08 * reach)
    dodge = 0.014 * reach
    for i, method in enumerate(methods):
        of_method = rows[(rows["method"] == method)].sort_values("stored_ratio")
        good = of_method[finite.loc[of_method.index]]
        errors = (good[f"{metric}_stderr"] * scale).where(lambda error: error.map(math.isfinite), 0.0)
        look = {"color": palette[method], "marker": _marker(methods, method), "zorder": 3 + 0.01 * i}
        line = of_method[(finite | bad).loc[of_method.index]]  # a value that is not finite breaks the line
        panel.plot(
            line["stored_ratio"],
            (line[metric] * scale).where(finite.loc[line.index]),
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            **look,
        )
        if (errors > 0).any():
            below = errors if not bad_at_top else errors.clip(upper=0.9 * good[metric])
            panel.errorbar(
                good["stored_ratio"],
                good[metric] * scale,
                [below, errors],
                fmt="none",
                ecolor=palette[method],
                capsize=3,
            )
        for _, row in of_method[bad.loc[of_method.index]].iterrows():
            beside = list(rows.loc[bad & (rows["compression_ratio"] == row["compression_ratio"]), "method"])
            shifted = row["stored_ratio"] + dodge * (beside.index(method) - (len(beside) - 1) / 2)
            edge = 0.965 if bad_at_top else 0.035
            panel.plot(
                shifted, edge, "x", transform=panel.get_xaxis_transform(), color=palette[method], markersize=7, zorder=5
            )
    dense = rows[~compressed & finite]
    low, high = panel.get_ylim() if (finite & compressed).any() else (math.inf, -math.inf)
    if not dense.empty:
        level, label = dense[metric].iloc[0] * scale, dense["method_title"].iloc[0]
        panel.axhline(level, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
        printed = perplexity(level) if bad_at_top else f"{level:.1f}"
        panel.annotate(
            f"{label} {printed}",
            (0, level),
            xytext=(4, -4 if bad_at_top else 4),
            textcoords="offset points",
            va="top" if bad_at_top else "bottom",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            zorder=2.5,
        )
        low, high = min(low, level), max(high, level)
    if math.isfinite(low):
        _stretch(panel, low, high, bad_at_top, bool((bad & compressed).any()))
    if bad_at_top:
        _label_decades(panel)
    return bool((bad & compressed).any())


def _stretch(panel, low: float, high: float, logarithmic: bool, crosses: bool) -> None:
    """Leave room for the label of the level, and for crosses at the edge."""
    if logarithmic:
        decades = max(math.log10(high / low), 0.3)
        panel.set_ylim(low / 10 ** (0.12 * decades), high * 10 ** ((0.14 if crosses else 0.04) * decades))
    else:
        span = max(high - low, 1.0)
        panel.set_ylim(low - (0.14 if crosses else 0.04) * span, high + 0.12 * span)


def _label_decades(panel) -> None:
    low, high = panel.get_ylim()
    wide = math.log10(high / low) > 2.2
    panel.yaxis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 5.0), numticks=20))
    panel.yaxis.set_minor_locator(LogLocator(10, range(2, 10), numticks=200) if wide else NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(_power))
    if not wide and sum(low <= tick <= high for tick in panel.yaxis.get_majorticklocs()) < 2:
        panel.yaxis.set_major_locator(LogLocator(10, range(1, 10), numticks=50))


def _power(value: float, position: object = None) -> str:
    if value >= 1e4 and math.log10(value).is_integer():
        return f"$10^{{{round(math.log10(value))}}}$"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _marker(methods: dict[str, str], method: str) -> str:
    return MARKERS[list(methods).index(method) % len(MARKERS)]
