"""A printed table as a picture."""

from __future__ import annotations

import textwrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from cospadi.records import DENSE
from cospadi.tables.paper import PaperTable
from cospadi.tables.style import INK, SOFT


def table_picture(table: PaperTable):
    """The printed table as a picture: rules above, below and between ratios, notes underneath."""
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

    def rule(y: float, thickness: float, colour: str = INK) -> None:
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
        put_cell(i, y + 0.18, second, small, color=SOFT)
    y += 0.18 + 0.09
    for labels, row, first in lines:
        if first:
            rule(y, 0.9 if row is lines[0][1] else 0.6, INK if row is lines[0][1] else SOFT)
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
        put(edge, y, line, "left", small, color=SOFT)
    full_height = y + edge
    figure.set_size_inches(full_width, full_height)
    for x, y, text, look in texts:
        figure.text(x / full_width, 1 - y / full_height, text, **look)
    for y, thickness, colour in rules:
        height = 1 - y / full_height
        across = (edge / full_width, 1 - edge / full_width)
        figure.add_artist(Line2D(across, (height, height), color=colour, linewidth=thickness))
    return figure
