"""Pages of the Python API, one per room, made from docstrings when the site is built.

MkDocs calls `on_files`, which adds a page per room with a mkdocstrings block per module. Griffe, which reads the
docstrings for mkdocstrings, calls `PlainDocstrings`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOMS = {
    "sources": "Sources",
    "calibration": "Calibration",
    "factorization": "Factorization",
    "factorization/solvers": "Solvers",
    "quantization": "Quantization",
    "packing": "Packing",
    "kernels": "Kernels",
    "checkpoint": "Checkpoint",
    "evaluation": "Evaluation",
    "tables": "Tables",
    "tracking": "Tracking",
    "pipeline": "Pipeline",
    "pipeline/stages": "Stages",
}
"""Folder below ``cospadi/`` and the title of its page."""
DOCTEST = re.compile(r"(?:^|(?<=\n))>>> .*(?:\n.+)*")
"""A doctest: from its first prompt to the next blank line."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page of every room to the pages that MkDocs found."""
    for room in ROOMS:
        files.append(File.generated(config, page_name(room), content=page(room)))
    return files


def page_name(room: str) -> str:
    """Name of a room's page.

    >>> page_name("factorization/solvers")
    'api/solvers.md'
    """
    return f"api/{room.rpartition('/')[2]}.md"


def modules(room: str) -> list[str]:
    """Public modules of a room with their full names. Settings have a page of their own."""
    files = sorted((ROOT / "cospadi" / room).glob("[a-z]*.py"))
    return [f"cospadi.{room.replace('/', '.')}.{file.stem}" for file in files if file.stem != "settings"]


def page(room: str) -> str:
    """The page as Markdown: the room's docstring, then every module."""
    package = f"cospadi.{room.replace('/', '.')}"
    intro = f"::: {package}\n    options:\n      members: false\n      show_root_heading: false\n      show_root_toc_entry: false"
    return "\n\n".join([f"# {ROOMS[room]}", intro, *(f"::: {module}" for module in modules(room))]) + "\n"


def as_markdown(docstring: str) -> str:
    """A docstring whose doctests and literal blocks are Markdown.

    Markdown takes a line that starts with ``>>>`` for a quotation, and prints the second colon of ``::``.
    """
    fenced = DOCTEST.sub(lambda example: f"~~~python\n{example[0]}\n~~~", docstring)
    return re.sub(r"::\n\n(?=    )", ":\n\n", fenced)


class PlainDocstrings(Extension):
    """Turns every docstring into Markdown before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
