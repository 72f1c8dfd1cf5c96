"""The measurements as a picture. Matplotlib comes with the extra ``study``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cospadi import records
from cospadi.bench.render import Row
from cospadi.tables.style import colours, style

PANELS = 12
"""Panels at most: so many problems are chosen evenly."""
COLOURED_LIKE = {"htp": "cospadi"}
"""The method whose colour a solver has; any other solver takes the next free colour."""


def write_figure(rows: Sequence[Row], file: Path) -> None:
    """Error over seconds: a panel per problem, a line per solver, its end marked."""
    solved = [row for row in rows if "curve" in row]
    names = list(dict.fromkeys(row["solver"] for row in solved))
    palette = dict(zip(names, colours([COLOURED_LIKE.get(name, name) for name in names]).values(), strict=True))
    panels = _evenly(list(dict.fromkeys((row["weight"], row["ratio"]) for row in solved)), PANELS)
    width = min(len(panels), 4)
    height = math.ceil(len(panels) / width)
    with style({"axes.titlesize": 10}):
        figure = Figure(figsize=(max(5.0, 2.9 * width), 0.7 + 2.4 * height), layout="constrained")
        axes = figure.subplots(height, width, squeeze=False)
        for axis, (weight, ratio) in zip(axes.flat, panels, strict=False):
            _draw(axis, [row for row in solved if (row["weight"], row["ratio"]) == (weight, ratio)], palette)
            axis.set_title(f"{weight}, ratio {ratio:g}")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for i in range(len(panels)):
            axes.flat[i].set_xlabel("Seconds" if i + width >= len(panels) else "")
            axes.flat[i].set_ylabel("" if i % width else "Output error ↓")
        entries = [Line2D([], [], color=palette[name], marker="o", markersize=5, label=name) for name in names]
        columns = min(len(entries), 3 if width < 3 else 6)
        figure.legend(handles=entries, loc="outside lower center", ncols=columns)
        with records.new_path(file) as partial:
            figure.savefig(partial, format=file.suffix[1:], dpi=150, facecolor="white")


def _draw(axis: Axes, rows: Sequence[Row], palette: dict[str, str]) -> None:
    axis.set_xscale("log")
    for row in rows:
        times, errors = zip(*row["curve"], strict=True)
        look = {"color": palette[row["solver"]], "zorder": 4 if row["solver"] == "htp" else 3}
        axis.plot(times, errors, **look)
        axis.plot(times[-1], errors[-1], "o", markersize=5, markeredgecolor="white", markeredgewidth=0.8, **look)
    axis.set_ylim(top=1.2 * max(row["output_error"] for row in rows))  # the ends matter, not where a round started
    axis.xaxis.set_major_locator(LogLocator(10, (1.0,) if _decades(rows) > 1.5 else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _decades(rows: Sequence[Row]) -> float:
    """How far the times are apart."""
    times = [second for row in rows for second, _ in row["curve"]]
    return math.log10(max(times) / min(times))


def _evenly(items: list, count: int) -> list:
    """
    >>> _evenly(list(range(10)), 4), _evenly([1, 2], 4)
    ([0, 2, 5, 7], [1, 2])
    """
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
