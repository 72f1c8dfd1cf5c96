"""The look that all figures share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from cospadi import records

_KNOWN_COLOURS = {
    "svd": "#7F7F7F",
    "asvd": "#E69F00",
    "svd_llm": "#0072B2",
    "cospadi": "#D55E00",
    "cospadi_plus": "#1c2024",
}
_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733")
_COLOURS += ("#CC6677", "#88CCEE", "#661100")
MARKERS = "osD^v<>phd*8"
INK = "#1c2024"
SOFT = "#60646c"
LINE = "#d9d9e0"
GREY = "#a4a8ae"
"""Lines that do not stand out."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "cospadi",
    "figure.dpi": 150,
}


def colours(methods: Iterable[str]) -> dict[str, str]:
    """A colour per factorization, given by name: its own where it has one, else the next free one.

    Colour-blind readers can tell them apart.
    """
    methods = list(methods)
    free = iter(_COLOURS * (1 + len(methods) // len(_COLOURS)))
    return {method: _KNOWN_COLOURS[method] if method in _KNOWN_COLOURS else next(free) for method in methods}


@contextlib.contextmanager
def style(overrides: Mapping[str, Any] = MappingProxyType({})) -> Iterator[None]:
    """Figures that are drawn and saved inside have the common look; ``overrides`` are further matplotlib settings."""
    with rc_context(STYLE | dict(overrides)):
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """``<stem>.png`` and ``<stem>.svg``, the same bytes every time."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    # One layout for both, and no other for the second.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    # Matplotlib would write its version into the one and the time into the other.
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        with records.new_path(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata, facecolor="white")
    return paths


def label_logarithmic(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis whose limits are set: few enough not to touch, and at least three if possible.

    Over more than two decades the powers of ten have labels, below that as few digits of each decade as give three.
    """
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    if decades > 2.2:
        axis.set_major_locator(LogLocator(10, (1.0,), numticks=9))
        axis.set_minor_locator(LogLocator(10, range(2, 10), numticks=200))
    else:
        axis.set_minor_locator(NullLocator())
        for digits in ((1, 2, 5), (1, 2, 3, 5, 7), range(1, 10)):
            axis.set_major_locator(LogLocator(10, digits, numticks=50))
            if sum(low <= tick <= high for tick in axis.get_majorticklocs()) >= 3:
                break
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(_plain_number))


def _plain_number(value: float, position: object = None) -> str:
    """
    >>> _plain_number(0.05), _plain_number(2000.0), _plain_number(1e5)
    ('0.05', '2,000', '$10^{5}$')
    """
    if value >= 1e4 and math.log10(value).is_integer():
        return f"$10^{{{round(math.log10(value))}}}$"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
