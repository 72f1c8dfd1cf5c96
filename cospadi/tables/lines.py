"""What the figures with a line per method share: names at the ends of the lines, markers, the limit of an axis."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.cells import factorization_of, quantization_of
from cospadi.tables.metrics import METRICS, Metric
from cospadi.tables.style import GREY, INK, MARKERS, SOFT

FAR = 10.0
"""An axis of perplexity ends at so many times the dense model's."""
ROOM = 1.5
"""It shows the best method of every ratio, and so many times the worst of these."""
NAME_SIZE = 8.5
"""Points of the names at the lines."""


MARK = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8, "linewidth": 1.4}
"""Look of a line and of the marks on it."""


@dataclass(frozen=True)
class LineEnd:
    """Where a line ends, and its name."""

    x: float
    y: float
    name: str
    colour: str


def name_lines(panel: Axes, ends: Sequence[LineEnd]) -> None:
    """Write names right of ``panel``, level with the ends of their lines as far as no two touch.

    A line that ends above the panel has an arrow behind its name. Call it when limits, legend and size of the figure are
    final.
    """
    figure = panel.get_figure()
    figure.draw_without_rendering()
    box = panel.get_window_extent()
    top = panel.get_ylim()[1]
    height = 1.3 * NAME_SIZE * figure.dpi / 72
    ends = sorted(ends, key=lambda end: end.y)
    levels = [float(panel.transData.transform((end.x, min(end.y, top)))[1]) for end in ends]
    for end, level in zip(ends, apart(levels, height, box.y0, box.y1), strict=True):
        is_above = end.y > top
        recedes = end.colour == GREY
        pointer = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.7, "linestyle": ":", "shrinkB": 4}
        panel.annotate(
            f"{end.name} ↑" if is_above else end.name,
            (end.x, end.y),
            xytext=(1.06, (level - box.y0) / box.height),
            textcoords="axes fraction",
            va="center",
            fontsize=NAME_SIZE,
            color=SOFT if recedes else end.colour,
            weight="normal" if recedes else "bold",
            arrowprops=None if is_above else pointer | {"relpos": (0, 0.5)},
            annotation_clip=False,
        )


def layer(colour: str) -> int:
    """Where a line of this colour is drawn: the grey ones below all others."""
    return 3 if colour == GREY else 4


def apart(levels: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending levels moved so that any two are ``gap`` apart, none above ``high``, and below ``low`` only if need be.

    >>> apart([1.0, 1.2, 5.0], 1.0, 0.0, 5.0), apart([4.9, 5.0], 1.0, 0.0, 5.0)
    ([1.0, 2.0, 5.0], [4.0, 5.0])
    """
    placed = list(levels)
    for i in range(len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap if i else low)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], placed[i + 1] - gap if i + 1 < len(placed) else high)
    return placed


def upper_limit(rows: pd.DataFrame, metric: Metric) -> float:
    """Where the axis of a perplexity ends; infinite where nothing is above.

    Otherwise the worst methods take the axis, and all others lie in its lowest corner.
    """
    dense = rows.loc[rows["method"] == DENSE, metric.name]
    values = rows[metric.name][rows[metric.name].map(math.isfinite)]
    if metric is not METRICS["token_perplexity"] or dense.empty or not math.isfinite(dense.iloc[0]):
        return math.inf
    compressed = rows[rows["method"] != DENSE].loc[lambda part: part.index.isin(values.index)]
    best = compressed.groupby("compression_ratio")[metric.name].min()
    limit = max(FAR * dense.iloc[0], ROOM * best.max()) if len(best) else math.inf
    return float(limit) if values.max() > limit else math.inf


def axis_label(metric: Metric, limit: float) -> str:
    """The metric, and where its axis ends if there is something above."""
    return metric.label if math.isinf(limit) else f"{metric.label} (up to {limit:.0f})"


def draw_dense(panel: Axes, value: float, metric: Metric, title: str) -> LineEnd:
    """The uncompressed model as a dashed level; returns its end, named with its value."""
    level = value * metric.scale
    panel.axhline(level, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
    right = panel.get_xlim()[1]
    return LineEnd(right, level, f"{title} {metric.print(value)}", INK)


def markers(frame: pd.DataFrame) -> dict[str, str]:
    """Quantization -> marker, of all that the study has; 16 bits is the empty name."""
    of_study = dict.fromkeys(["", *map(quantization_of, frame["method"])])
    return dict(zip(of_study, MARKERS * (1 + len(of_study) // len(MARKERS)), strict=False))


def add_legend(figure: Figure, frame: pd.DataFrame, more: Sequence[Line2D] = ()) -> None:
    """What the markers mean, where there is more than one, below the panels; the names of the methods are at the lines."""
    rows = frame[frame["method"] != DENSE]
    bits = dict(zip(rows["method"].map(quantization_of), rows["quantization_title"], strict=True))
    shapes = markers(frame)
    entries = [
        Line2D([], [], color=SOFT, marker=shapes[name], linestyle="none", label=bits[name] or "16 bits")
        for name in shapes
        if name in bits and len(bits) > 1
    ]
    entries += more
    if entries:
        inches = [0.6 + 0.085 * len(str(entry.get_label())) for entry in entries]
        fits = sum(inches) < figure.get_figwidth()
        columns = len(entries) if fits else max(1, int(figure.get_figwidth() / max(inches)))
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=9)
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(entries) / columns))


def panel_height(names: Collection[str]) -> float:
    """Inches of a panel that has room for the names of all lines, and of the dense model, at its side."""
    return max(3.5, 1.0 + 1.35 * NAME_SIZE / 72 * (len(names) + 1))


def leading_lines(methods: Sequence[str]) -> set[str]:
    """The line of every factorization that has its name: that in 16 bits, else its first."""
    leading: dict[str, str] = {}
    for method in methods:
        base = factorization_of(method)
        if base not in leading or not quantization_of(method):
            leading[base] = method
    return set(leading.values())
