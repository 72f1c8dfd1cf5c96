"""A printed table as a picture."""

from __future__ import annotations

import textwrap
from functools import cached_property

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from cospadi.tables.paper import PaperTable, Row, join, ratio_label
from cospadi.tables.style import INK, SOFT

BODY = 10.0
"""Points of the entries."""
SMALL = 8.5
"""Points of units and notes."""
ERROR = 7.0
"""Points of standard errors, below their values."""
ERROR_LINE = 0.13
"""Inches from a value to its standard error."""
GAP = 0.2
"""Inches between columns at least."""
EDGE = 0.2
"""Inches around the table."""
LINE = 0.25
"""Inches from a row to the next."""
NOTE_LINE = 0.175
"""Inches from a line of the notes to the next."""


def table_picture(table: PaperTable) -> Figure:
    """The printed table as a picture: rules above, below and between ratios, notes underneath."""
    return _Picture(table).drawn()


class _Picture:
    """A table that is set from top to bottom, in inches, and drawn once its height is known."""

    def __init__(self, table: PaperTable) -> None:
        self.table = table
        self.figure = Figure(figsize=(4, 4))
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.texts: list[tuple[float, float, str, dict[str, object]]] = []
        """Inches from the top left corner, the text, and its look."""
        self.rules: list[tuple[float, float, str]] = []
        """Inches from the top, thickness in points, colour."""
        self.y = EDGE

    def drawn(self) -> Figure:
        self._set_head()
        for group in self.table.groups:
            self._set_group(group, is_first=group is self.table.groups[0])
        self._rule(1.6)
        self._set_notes()

        width = self.width + 2 * EDGE
        height = self.y + EDGE
        self.figure.set_size_inches(width, height)
        for x, y, text, look in self.texts:
            self.figure.text(x / width, 1 - y / height, text, **look)
        for y, thickness, colour in self.rules:
            across = (EDGE / width, 1 - EDGE / width)
            level = 1 - y / height
            self.figure.add_artist(Line2D(across, (level, level), color=colour, linewidth=thickness))
        return self.figure

    @cached_property
    def heads(self) -> list[tuple[str, str]]:
        """Heading of every column, and what is below it: unit and direction."""
        of_values = [(column.title, join(" ", column.unit, column.arrow)) for column in self.table.columns]
        return [("Ratio", ""), ("Method", ""), *of_values]

    @cached_property
    def widths(self) -> list[float]:
        """Inches of every column: its widest text."""
        rows = [row for group in self.table.groups for row in group]
        widths = []
        for i, (title, unit) in enumerate(self.heads):
            texts = [_texts(row)[i] for row in rows]
            weight = "bold" if i > 1 else "normal"  # any value may be the best one
            widest = max((self._inches(text, BODY, weight) for text in texts), default=0.0)
            errors = [_error_texts(row)[i] for row in rows]
            widest = max([widest, *(self._inches(text, ERROR) for text in errors)])
            widths.append(max(self._inches(title, BODY, "bold"), self._inches(unit, SMALL), widest))
        return widths

    @cached_property
    def width(self) -> float:
        """Inches of the table."""
        columns = sum(self.widths) + GAP * (len(self.widths) - 1)
        return max(columns, self._inches(self.table.title, BODY + 1, "bold"), 5.0)

    def _set_head(self) -> None:
        self.y += 0.14
        self._put(EDGE, self.table.title, "left", BODY + 1, weight="bold")
        self.y += 0.16
        self._rule(1.6)
        self.y += 0.2
        for i, (title, _) in enumerate(self.heads):
            self._put_cell(i, title, weight="bold")
        self.y += 0.18
        for i, (_, unit) in enumerate(self.heads):
            self._put_cell(i, unit, SMALL, color=SOFT)
        self.y += 0.09

    def _set_group(self, group: list[Row], is_first: bool) -> None:
        """Rows of one ratio below a rule; the ratio is in the first of them."""
        self._rule(0.9 if is_first else 0.6, INK if is_first else SOFT)
        self.y += 0.05
        for row in group:
            self.y += LINE - 0.06
            ratio, label, *values = _texts(row)
            self._put_cell(0, ratio if row is group[0] else "")
            self._put_cell(1, label)
            for i, (text, entry) in enumerate(zip(values, row.entries, strict=True), start=2):
                self._put_cell(i, text, weight="bold" if entry.best else "normal")
            if self.table.has_stderr:
                self.y += ERROR_LINE
                for i, text in enumerate(_error_texts(row)):
                    self._put_cell(i, text, ERROR, color=SOFT)
            self.y += 0.06
        self.y += 0.05

    def _set_notes(self) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz "
        per_line = max(40, int(self.width / (self._inches(letters, SMALL) / len(letters))))
        self.y += 0.06
        for note in self.table.all_notes:
            for line in textwrap.wrap(note, per_line, subsequent_indent="   "):
                self.y += NOTE_LINE
                self._put(EDGE, line, "left", SMALL, color=SOFT)

    def _put_cell(self, column: int, text: str, size: float = BODY, **look: object) -> None:
        """A text in a column: labels on the left, numbers on the right."""
        spare = (self.width - sum(self.widths) - GAP * (len(self.widths) - 1)) / (len(self.widths) - 1)
        left = EDGE + sum(self.widths[:column]) + (GAP + spare) * column
        if column < 2:
            self._put(left, text, "left", size, **look)
        else:
            self._put(left + self.widths[column], text, "right", size, **look)

    def _put(self, x: float, text: str, align: str, size: float, **look: object) -> None:
        look = {"ha": align, "va": "baseline", "fontsize": size, "parse_math": False, **look}
        self.texts.append((x, self.y, text, look))

    def _rule(self, thickness: float, colour: str = INK) -> None:
        self.rules.append((self.y, thickness, colour))

    def _inches(self, text: str, size: float, weight: str = "normal") -> float:
        """Width of a text."""
        if not text:
            return 0.0
        font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
        return self.renderer.get_text_width_height_descent(text, font, False)[0] / self.figure.dpi


def _texts(row: Row) -> list[str]:
    """The texts of a row: ratio, method, values."""
    return [ratio_label(row), row.label, *(entry.text for entry in row.entries)]


def _error_texts(row: Row) -> list[str]:
    """What is below the texts of a row."""
    return ["", "", *(f"± {entry.stderr_text}" if entry.stderr_text else "" for entry in row.entries)]
