"""A table like a paper's, and its writers: Markdown, HTML, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from cospadi.records import DENSE
from cospadi.tables.metrics import ARROWS

MISSING = "–"
DAGGER = "†"
STDERR_NOTE = "±: one standard error."


@dataclass
class Column:
    """A column of a printed table."""

    name: str
    """Its column in the summary."""
    title: str
    unit: str
    better: str
    """``higher``, ``lower``, or nothing: then no value is bold."""
    print: Callable[[float], str]
    is_difference: bool = False
    """Whether its standard error is printed beside it everywhere: a difference says nothing without it."""

    @property
    def arrow(self) -> str:
        return ARROWS.get(self.better, "")


@dataclass
class Entry:
    """A printed value."""

    value: float
    text: str
    stderr: float
    stderr_text: str
    best: bool = False


@dataclass
class Row:
    """A method at a ratio."""

    method: str
    method_title: str
    compression_ratio: float
    dagger: bool
    entries: list[Entry]

    @property
    def label(self) -> str:
        return self.method_title + (DAGGER if self.dagger else "")


def rendered(template: str, **values: object) -> str:
    """A page made of a file in ``templates``; all values are escaped."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=PackageLoader("cospadi.tables"),
    )
    return environment.get_template(template).render(**values) + "\n"


@dataclass
class PaperTable:
    """A table of one model: what it says, before it takes a format."""

    name: str
    title: str
    columns: list[Column]
    groups: list[list[Row]]
    """Rows that share a ratio; the uncompressed model is a group of its own."""
    notes: list[str]

    def markdown(self, stderr: bool = False) -> str:
        """A pipe table; with ``stderr``, every value is followed by its ± where there is one."""
        lines = [["Ratio", "Method", *(join(" ", column.title, column.unit, column.arrow) for column in self.columns)]]
        for first, row in self._rows():
            entries = [f"**{entry.text}**" if entry.best else entry.text for entry in row.entries]
            if stderr:
                entries = [join(" ± ", text, e.stderr_text) for text, e in zip(entries, row.entries, strict=True)]
            lines.append([ratio_label(row) if first else "", row.label, *entries])
        lines = [[_escape_markdown(text) for text in line] for line in lines]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
        rule = [":" + "-" * (w - 1) if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        body = [
            [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        table = "\n".join("| " + " | ".join(line) + " |" for line in (body[0], rule, *body[1:]))
        notes = self.all_notes if stderr else self.notes
        notes = "\n".join(f"- {_escape_markdown(note)}" for note in notes)
        return f"### {_escape_markdown(self.title)}\n\n{table}\n\n{notes}\n"

    def html(self) -> str:
        """A page of its own: no scripts, no fonts and no styles from elsewhere."""
        return rendered("page.html", table=self, ratio_label=ratio_label)

    def csv(self) -> str:
        """One line per value: exact value and standard error beside the printed text."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            (
                "model",
                "compression_ratio",
                "method",
                "method_title",
                "column",
                "unit",
                "value",
                "stderr",
                "text",
                "best",
            )
        )
        for _, row in self._rows():
            for column, entry in zip(self.columns, row.entries, strict=True):
                value = "" if entry.text == MISSING else repr(entry.value)
                stderr = "" if math.isnan(entry.stderr) else repr(entry.stderr)
                head = (self.name, repr(row.compression_ratio), row.method, row.method_title, column.name, column.unit)
                writer.writerow((*head, value, stderr, entry.text, entry.best))
        return stream.getvalue()

    @property
    def all_notes(self) -> list[str]:
        """The notes, with one on standard errors where they are shown."""
        return [*self.notes, STDERR_NOTE] if self.has_stderr else self.notes

    @property
    def has_stderr(self) -> bool:
        """Whether some value has a standard error."""
        return any(entry.stderr_text for _, row in self._rows() for entry in row.entries)

    def _rows(self) -> list[tuple[bool, Row]]:
        return [(row is group[0], row) for group in self.groups for row in group]


def ratio_label(row: Row) -> str:
    return (
        MISSING
        if row.compression_ratio == 0 and row.method.rpartition(":")[2] == DENSE
        else f"{row.compression_ratio:g}"
    )


def join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())
