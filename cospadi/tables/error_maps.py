"""Output error of every projection, layer by layer, as a picture."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cospadi.tables.emphasis import middle, most_shared
from cospadi.tables.paper import join
from cospadi.tables.style import SOFT


def error_maps(frame: pd.DataFrame, errors: pd.DataFrame) -> Figure:
    """A panel per model and method at the middle ratio that most have: projections down, layers across, one colour scale."""
    at = middle(most_shared(errors))
    errors = errors[errors["compression_ratio"] == at]
    titles = dict(zip(frame["method"], frame["method_title"], strict=True))
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    parts = list(errors.groupby(["model", "method"], sort=False))
    if not parts:
        figure = Figure(figsize=(6.6, 2))
        figure.text(0.5, 0.5, "no compressed projection", ha="center", va="center", color=SOFT)
        return figure
    width = min(2, len(parts))
    if 2 <= len(models) <= 3:  # a column per model
        width = len(models)
        columns = [[part for part in parts if part[0][0] == model] for model in models]
        parts = [part for row in itertools.zip_longest(*columns) for part in row]
    has_column_per_model = width == len(models) > 1
    height = math.ceil(len(parts) / width)
    rows_down = errors.groupby("model")["projection"].nunique().max()
    panel_height = 0.65 + 0.2 * rows_down
    figure_width = 6.6 if width == 1 else 9.0
    # A column of one model names it once, at its head.
    named_models = models if len(models) > 1 and not has_column_per_model else {}
    headings = _headings(parts, titles, named_models, (figure_width - 1.2) / width - 0.4)
    panel_height += 0.17 * headings[0].count("\n")
    figure = Figure(figsize=(figure_width, 0.5 + panel_height * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    if has_column_per_model:
        headings[:width] = [f"{model}\n{heading}" for model, heading in zip(models.values(), headings, strict=False)]
    finite = errors["output_error"][errors["output_error"].map(math.isfinite)]
    norm, extend = _scale(finite)
    palette = colormaps["viridis"].with_extremes(bad="#e4e4e8")
    blank = False
    for panel, named_part, heading in itertools.zip_longest(panels.flat, parts, headings):
        if named_part is None:
            panel.set_visible(False)
            continue
        blank |= _draw_map(panel, named_part[1], heading, norm, palette)
    figure.supxlabel("Layer", fontsize=10)
    bar = figure.colorbar(
        ScalarMappable(norm, palette), ax=panels, extend=extend, aspect=max(12, 7 * height), shrink=0.9, pad=0.015
    )
    _plain_ticks(bar, norm)
    bar.outline.set_visible(False)
    bar.set_label(f"Output error at ratio {at:g} ↓" + ("\n(grey: none or not finite)" if blank else ""))
    return figure


def _headings(
    parts: Sequence[Any], titles: dict[str, str], models: dict[str, str], panel_width: float | int
) -> list[str]:
    """Titles of the panels, of as many lines as ``panel_width`` inches need beside the mean at the right of the last."""
    letters = max(12, int(11 * panel_width))  # bold, 10 points
    headings = []
    for part in parts:
        model, method = part[0] if part else ("", "")
        lines = textwrap.wrap(
            join(", ", models.get(model, ""), titles.get(method, "")), letters, break_long_words=False
        ) or [""]
        if len(lines[-1]) + len("  mean 0.000") > letters:
            lines.append("")
        headings.append(lines)
    # All of the same height, so that the panels of a row are level.
    highest = max(map(len, headings))
    return ["\n".join(lines + [""] * (highest - len(lines))) for lines in headings]


def _draw_map(panel: Axes, part: pd.DataFrame, title: str, norm: Normalize, palette: Colormap) -> bool:
    """Draw the map of one model and method; return whether it has blanks."""
    grid = part.pivot_table(
        index="projection", columns="layer", values="output_error", sort=False, aggfunc="mean", dropna=False
    )
    grid = grid.loc[list(dict.fromkeys(part["projection"])), sorted(grid.columns)]
    values = grid.where(grid.abs() < math.inf).to_numpy(dtype=float)
    left = int(grid.columns[0])
    right = int(grid.columns[-1])
    panel.imshow(
        values,
        cmap=palette,
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(left - 0.5, right + 0.5, len(grid) - 0.5, -0.5),
    )
    panel.grid(False)
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.tick_params(length=0)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    labels = [name.rpartition(".")[2].removesuffix("_proj") for name in grid.index]
    panel.set_yticks(range(len(labels)), labels, fontsize=9)
    mean = part["output_error"].mean()
    aside = f"mean {mean:.3f}" if math.isfinite(mean) else ""
    panel.set_title(title, fontsize=10)
    panel.set_title(aside, fontsize=9, loc="right", color=SOFT, weight="normal")
    return bool(pd.isna(values).any())


def _scale(finite: pd.Series):
    """Colours of the errors and which ends are open: a few outliers must not leave all others in one colour."""
    positive = finite[finite > 0]
    if positive.empty:
        return Normalize(0, 1), "neither"
    lowest, low, high, highest = (float(positive.quantile(share)) for share in (0, 0.02, 0.98, 1))
    top = highest if highest < 2 * high else high
    if top < 4 * low:
        return Normalize(0, top), "max" if highest > top else "neither"
    bottom = lowest if lowest > low / 2 else low
    below = bool((finite < bottom).any())
    above = highest > top
    return LogNorm(bottom, top), {(1, 1): "both", (1, 0): "min", (0, 1): "max", (0, 0): "neither"}[below, above]


def _plain_ticks(bar, norm) -> None:
    """Label a logarithmic colour bar with plain numbers."""
    if isinstance(norm, LogNorm):
        wide = norm.vmax > 300 * norm.vmin
        bar.ax.yaxis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 3.0, 5.0, 7.0), numticks=50))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
