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
from cospadi.settings import load
from cospadi.tables.style import colours, style

MATRICES = 4
"""Matrices at most, a row of panels each: so many are chosen evenly."""
DRAWN_AS = {"htp": "cospadi", "ksvd": "cospadi_ksvd", "orthogonal": "compot", "one_shot": "rocket"}
"""The method whose title and colour a solver has, as in tables and figures; any other solver keeps its own name."""


def write_figure(rows: Sequence[Row], file: Path) -> None:
    """Error over seconds: a row of panels per matrix, a column per ratio, a line per solver, its end marked."""
    with style({"axes.titlesize": 10}):
        figure = solver_figure([row for row in rows if "curve" in row])
        with records.new_path(file) as partial:
            figure.savefig(partial, format=file.suffix[1:], dpi=150, facecolor="white")


def solver_figure(rows: Sequence[Row]) -> Figure:
    """The figure of the ``rows`` that have a curve."""
    names = list(dict.fromkeys(row["solver"] for row in rows))
    palette = dict(zip(names, colours([DRAWN_AS.get(name, name) for name in names]).values(), strict=True))
    weights = _evenly(list(dict.fromkeys(row["weight"] for row in rows)), MATRICES)
    ratios = sorted({row["ratio"] for row in rows})
    size = (max(5.0, 2.9 * len(ratios)), 0.7 + 2.4 * len(weights))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(weights), len(ratios), squeeze=False)
    for i, weight in enumerate(weights):
        for panel, ratio in zip(panels[i], ratios, strict=True):
            of_panel = [row for row in rows if (row["weight"], row["ratio"]) == (weight, ratio)]
            panel.set_visible(bool(of_panel))
            if of_panel:
                _draw(panel, of_panel, palette)
            panel.set_title(f"{weight}, ratio {ratio:g}")
            panel.set_xlabel("Seconds" if i + 1 == len(weights) else "")
        panels[i, 0].set_ylabel("Output error ↓")
    entries = [
        Line2D([], [], color=palette[name], marker="o", markersize=5, label=solver_title(name)) for name in names
    ]
    columns = min(len(entries), max(2, len(ratios)))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns)
    return figure


def solver_title(name: str) -> str:
    """How the tables name the method that a solver is the heart of.

    >>> solver_title("one_shot"), solver_title("ksvd_plain")
    ('ROCKET factorization', 'CoSpaDi (K-SVD), plain')
    """
    solver = name.removesuffix("_plain")
    if solver not in DRAWN_AS:
        return name
    title = load([f"factorization={DRAWN_AS[solver]}"]).factorization.title
    return title if solver == name else f"{title}, plain"


def _draw(axis: Axes, rows: Sequence[Row], palette: dict[str, str]) -> None:
    axis.set_xscale("log")
    for row in rows:
        times, errors = zip(*sorted(row["curve"]), strict=True)  # by time
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
