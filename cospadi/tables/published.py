"""Numbers that papers print, as reference rows of our tables: marked, never bold, in no ``summary.csv``.

They are in ``published.yaml`` beside this file, each with its source. A study shows those of the sources that its
``study.published`` names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml

from cospadi.records import DENSE
from cospadi.tables import PUBLISHED_FILE
from cospadi.tables.paper import MISSING, Column, Entry, PaperTable, Row

PREFIX = "published:"
"""Prefix of the method's name in a table's CSV: ``published:rocket:svd_llm`` is SVD-LLM as ROCKET's paper prints it."""
_PLACE = ("source", "method", "ratio")


@dataclass(frozen=True)
class Source:
    """A paper."""

    title: str
    reference: str
    """Place of the numbers: arXiv id with its version, and tables."""
    protocol: str
    third_party: bool = False
    """Whether the numbers are from a summary by others; the paper itself was not read."""

    @property
    def note(self) -> str:
        """The line under a table."""
        third_party_note = " Taken from a summary by others, not from the paper." if self.third_party else ""
        return (
            f"Published [{self.title}]: copied from {self.reference}, not measured here ({self.protocol}). Versions and "
            f"settings differ from ours: a reference, not a comparison.{third_party_note}"
        )


@dataclass(frozen=True)
class Result:
    """A method at a ratio as a source prints it."""

    source: str
    method: str
    title: str
    compression_ratio: float
    values: dict[str, float]
    """Column of the table -> value as printed: accuracies in percent."""


@cache
def _facts() -> dict[str, Any]:
    return yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))


def sources() -> dict[str, Source]:
    """All papers, by the names that ``study.published`` takes."""
    return {name: Source(**about) for name, about in _facts()["sources"].items()}


def results(model: str, named: Sequence[str]) -> list[Result]:
    """What the ``named`` sources print of ``model``, the name of its file in ``conf/model``."""
    methods = _facts()["methods"]
    return [
        Result(
            row["source"],
            row["method"],
            methods[row["method"]]["title"],
            float(row["ratio"]),
            {column: float(value) for column, value in row.items() if column not in _PLACE},
        )
        for row in _facts()["results"].get(model, ())
        if row["source"] in named
    ]


def with_published(table: PaperTable, named: Sequence[str]) -> PaperTable:
    """``table`` with reference rows below the rows of the same ratio, and a note on every source that has any."""
    published = results(table.name, named)
    if not published:
        return table
    groups = [list(group) for group in table.groups]
    for result in published:
        row = _published_row(result, table.columns)
        place = next((group for group in groups if _ratio(group[0]) == _ratio(row)), None)
        groups.append([row]) if place is None else place.append(row)
    groups.sort(key=lambda group: _ratio(group[0]))  # stable: groups of one ratio stay in their order
    notes = [about.note for name, about in sources().items() if any(result.source == name for result in published)]
    return replace(table, groups=groups, notes=[*table.notes, *notes])


def _ratio(row: Row) -> float:
    return -1.0 if _is_dense(row) else row.compression_ratio


def _is_dense(row: Row) -> bool:
    return row.method == DENSE or row.method.endswith(f":{DENSE}")


def _published_row(result: Result, columns: Sequence[Column]) -> Row:
    title = f"{result.title} (published [{sources()[result.source].title}])"
    method = f"{PREFIX}{result.source}:{result.method}"
    return Row(method, title, result.compression_ratio, False, [_entry(result, column) for column in columns])


def _entry(result: Result, column: Column) -> Entry:
    """The digits that the source prints, no more."""
    printed = result.values.get(column.name)
    if printed is None:
        return Entry(math.nan, MISSING, math.nan, "")
    if column.unit == "%":
        return Entry(printed / 100, f"{printed:.1f}", math.nan, "")
    return Entry(printed, f"{printed:g}", math.nan, "")
