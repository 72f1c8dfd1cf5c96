"""Pictures of a study's tables: perplexity and accuracy against size, errors per layer, the table itself.

Figures are built without pyplot, so that they share no state and need no display.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from cospadi import records
from cospadi.tables.cells import DENSE, QUANTIZED, Cell, projection_errors, summary
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.render import PaperTable, paper_table, perplexity, tables

_KNOWN_COLOURS = {
    "svd": "#7F7F7F",
    "asvd": "#E69F00",
    "svd_llm": "#0072B2",
    "cospadi": "#D55E00",
    "cospadi_plus": "#1c2024",
}
_COLOURS = ("#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733")
_COLOURS += ("#CC6677", "#88CCEE", "#661100")
_MARKERS = "osD^v<>phd*8"
_INK, _SOFT, _LINE = "#1c2024", "#60646c", "#d9d9e0"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "cospadi",
    "figure.dpi": 150,
}


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
    with _style():
        figures = {
            "perplexity": _against_size(frame, "token_perplexity"),
            "accuracy": _against_size(frame, "average_accuracy"),
            "output_error": _error_maps(frame, errors),
            "pareto": pareto_figure(frame, _base_colours(frame), _INK, _SOFT),
        }
        figures |= {f"{table.name}_table": _table(table) for table in printed}
        return [path for name, figure in figures.items() for path in _save(figure, Path(folder) / name)]


def colours(methods: Sequence[str]) -> dict[str, str]:
    """A colour per method: its own where it has one, else the next free one; told apart by colour-blind readers too."""
    free = iter(_COLOURS * (1 + len(methods) // len(_COLOURS)))
    return {method: _KNOWN_COLOURS[method] if method in _KNOWN_COLOURS else next(free) for method in methods}


def _base_colours(frame: pd.DataFrame) -> dict[str, str]:
    """The same colour for a method in all its quantizations."""
    return colours(list(dict.fromkeys(method.partition(QUANTIZED)[0] for method in _methods(frame))))


@contextlib.contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def _save(figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):  # same bytes every time
        with records.new_path(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata, facecolor="white")
    return paths


def _methods(frame: pd.DataFrame) -> dict[str, str]:
    """Titles of the compressed methods by name, in the order of the rows."""
    rows = frame[frame["method"] != DENSE]
    return dict(zip(rows["method"], rows["method_title"], strict=True))


def _against_size(frame: pd.DataFrame, metric: str):
    """A panel per model: ``metric`` against the stored ratio, a line per method, the uncompressed model as a level."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
        entries.append(Line2D([], [], color=_SOFT, marker="x", linestyle="none", markersize=7, label="not finite"))
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
    axis.set_xlabel("Projections, MB stored", fontsize=9, color=_SOFT)
    axis.tick_params(labelsize=8, colors=_SOFT)


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
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", va="center", color=_SOFT)
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
        panel.axhline(level, color=_INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=2)
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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

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
    return _MARKERS[list(methods).index(method) % len(_MARKERS)]


def _error_maps(frame: pd.DataFrame, errors: pd.DataFrame):
    """A panel per model and method at the middle ratio that most have: projections down, layers across, one colour scale."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    at = middle(_most_shared(errors))
    errors = errors[errors["compression_ratio"] == at]
    titles = dict(zip(frame["method"], frame["method_title"], strict=True))
    models = dict(zip(frame["model"], frame["model_title"], strict=True))
    parts = list(errors.groupby(["model", "method"], sort=False))
    if not parts:
        figure = Figure(figsize=(6.6, 2))
        figure.text(0.5, 0.5, "no compressed projection", ha="center", va="center", color=_SOFT)
        return figure
    width = min(2, len(parts))
    if 2 <= len(models) <= 3:  # a column per model
        width = len(models)
        columns = [[part for part in parts if part[0][0] == model] for model in models]
        parts = [part for row in itertools.zip_longest(*columns) for part in row]
    height = math.ceil(len(parts) / width)
    rows_down = errors.groupby("model")["projection"].nunique().max()
    panel_height = 0.65 + 0.2 * rows_down
    figure = Figure(figsize=(6.6 if width == 1 else 9.0, 0.5 + panel_height * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False)
    finite = errors["output_error"][errors["output_error"].map(math.isfinite)]
    norm, extend = _scale(finite)
    palette = colormaps["viridis"].with_extremes(bad="#e4e4e8")
    blank = False
    for panel, found in itertools.zip_longest(panels.flat, parts):
        if found is None:
            panel.set_visible(False)
            continue
        (model, method), part = found
        grid = part.pivot_table(
            index="projection", columns="layer", values="output_error", sort=False, aggfunc="mean", dropna=False
        )
        grid = grid.loc[list(dict.fromkeys(part["projection"])), sorted(grid.columns)]
        values = grid.where(grid.abs() < math.inf).to_numpy(dtype=float)
        blank |= bool(pd.isna(values).any())
        left, right = int(grid.columns[0]), int(grid.columns[-1])
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
        whole = f"{models[model]}, " if len(models) > 1 else ""
        mean = part["output_error"].mean()
        panel.set_title(f"{whole}{titles[method]}", fontsize=10)
        panel.set_title(
            f"mean {mean:.3f}" if math.isfinite(mean) else "", fontsize=9, loc="right", color=_SOFT, weight="normal"
        )
    figure.supxlabel("Layer", fontsize=10)
    bar = figure.colorbar(
        ScalarMappable(norm, palette), ax=panels, extend=extend, aspect=max(12, 7 * height), shrink=0.9, pad=0.015
    )
    _plain_ticks(bar, norm)
    bar.outline.set_visible(False)
    bar.set_label(f"Output error at ratio {at:g} ↓" + ("\n(grey: none or not finite)" if blank else ""))
    return figure


def _most_shared(errors: pd.DataFrame) -> pd.Series:
    """The ratios at which most models and methods stand."""
    pairs = errors.drop_duplicates(["model", "method", "compression_ratio"])
    times = pairs["compression_ratio"].value_counts()
    return pd.Series(times[times == times.max()].index, dtype=float)


def middle(ratios: pd.Series) -> float:
    """The middle one of the ratios that occur (the lower of two).

    >>> middle(pd.Series([0.2, 0.5, 0.3, 0.4, 0.2]))
    0.3
    """
    found = sorted(set(ratios.dropna()))
    return float(found[(len(found) - 1) // 2]) if found else math.nan


def _scale(finite: pd.Series):
    """Colours of the errors and which ends are open: a few outliers must not leave all others in one colour."""
    from matplotlib.colors import LogNorm, Normalize

    positive = finite[finite > 0]
    if positive.empty:
        return Normalize(0, 1), "neither"
    lowest, low, high, highest = (float(positive.quantile(share)) for share in (0, 0.02, 0.98, 1))
    top = highest if highest < 2 * high else high
    if top < 4 * low:
        return Normalize(0, top), "max" if highest > top else "neither"
    bottom = lowest if lowest > low / 2 else low
    below, above = bool((finite < bottom).any()), highest > top
    return LogNorm(bottom, top), {(1, 1): "both", (1, 0): "min", (0, 1): "max", (0, 0): "neither"}[below, above]


def _plain_ticks(bar, norm) -> None:
    """Label a logarithmic colour bar with plain numbers."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if isinstance(norm, LogNorm):
        wide = norm.vmax > 300 * norm.vmin
        bar.ax.yaxis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 3.0, 5.0, 7.0), numticks=50))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))


def _table(table: PaperTable):
    """The printed table as a picture: rules above, below and between ratios, notes underneath."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    heads = [("Ratio", ""), ("Method", "")]
    heads += [
        (column.title, " ".join(part for part in (column.unit, column.arrow) if part)) for column in table.columns
    ]
    lines = [
        (["" if k else ("–" if row.method == DENSE else f"{row.compression_ratio:g}"), row.label], row, k == 0)
        for group in table.groups
        for k, row in enumerate(group)
    ]
    body, small = 10.0, 8.5

    figure = Figure(figsize=(4, 4))
    renderer = FigureCanvasAgg(figure).get_renderer()

    def wide(text: str, size: float, weight: str = "normal") -> float:
        """Width of a text in inches."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
        return renderer.get_text_width_height_descent(text, font, False)[0] / figure.dpi if text else 0.0

    widths = []
    for i, (first, second) in enumerate(heads):
        column = [labels[i] for labels, _, _ in lines] if i < 2 else [row.entries[i - 2].text for _, row, _ in lines]
        widths.append(
            max(
                wide(first, body, "bold"),
                wide(second, small),
                *(wide(text, body, "bold" if i > 1 else "normal") for text in column),
            )
        )
    gap, edge, step, note_step = 0.2, 0.2, 0.25, 0.175
    total = max(sum(widths) + gap * (len(widths) - 1), wide(table.title, body + 1, "bold"), 5.0)
    per_line = max(40, int(total / (wide("abcdefghijklmnopqrstuvwxyz ", small) / 27)))
    wrapped = [line for note in table.notes for line in textwrap.wrap(note, per_line, subsequent_indent="   ")]
    full_width = total + 2 * edge
    texts: list[
        tuple[float, float, str, dict]
    ] = []  # in inches from the top left corner, drawn once the height is known
    rules: list[tuple[float, float, str]] = []

    def put(x: float, y: float, text: str, align: str, size: float = body, **look: object) -> None:
        texts.append((x, y, text, {"ha": align, "va": "baseline", "fontsize": size, "parse_math": False, **look}))

    def rule(y: float, thickness: float, colour: str = _INK) -> None:
        rules.append((y, thickness, colour))

    spare = (total - sum(widths) - gap * (len(widths) - 1)) / (len(widths) - 1)
    lefts = [edge + sum(widths[:i]) + (gap + spare) * i for i in range(len(widths))]

    def put_cell(i: int, y: float, text: str, size: float = body, **look: object) -> None:
        put(lefts[i] + (0 if i < 2 else widths[i]), y, text, "left" if i < 2 else "right", size, **look)

    y = edge + 0.14
    put(edge, y, table.title, "left", body + 1, weight="bold")
    y += 0.16
    rule(y, 1.6)
    y += 0.2
    for i, (first, second) in enumerate(heads):
        put_cell(i, y, first, weight="bold")
        put_cell(i, y + 0.18, second, small, color=_SOFT)
    y += 0.18 + 0.09
    for labels, row, first in lines:
        if first:
            rule(y, 0.9 if row is lines[0][1] else 0.6, _INK if row is lines[0][1] else _SOFT)
            y += 0.05
        y += step - 0.06
        for i, label in enumerate(labels):
            put_cell(i, y, label)
        for i, entry in enumerate(row.entries, start=2):
            put_cell(i, y, entry.text, weight="bold" if entry.best else "normal")
        y += 0.06
        if any(group[-1] is row for group in table.groups):
            y += 0.05
    rule(y, 1.6)
    y += 0.06
    for line in wrapped:
        y += note_step
        put(edge, y, line, "left", small, color=_SOFT)
    full_height = y + edge
    figure.set_size_inches(full_width, full_height)
    for x, y, text, look in texts:
        figure.text(x / full_width, 1 - y / full_height, text, **look)
    for y, thickness, colour in rules:
        height = 1 - y / full_height
        across = (edge / full_width, 1 - edge / full_width)
        figure.add_artist(Line2D(across, (height, height), color=colour, linewidth=thickness))
    return figure
