"""Pages of the Python API, one per room, made from docstrings when the site is built.

MkDocs calls `on_files`, which adds a page per room with a mkdocstrings block per module. Griffe, which reads the
docstrings for mkdocstrings, calls `PlainDocstrings`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from griffe import Extension, Module, NameResolutionError, Object
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
NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")
"""A name between single backticks."""


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


SHOWN = {module for room in ROOMS for module in modules(room)}
"""Modules that the pages show."""
ELSEWHERE = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.MULTILINE))
"""What ``docs/python.md`` shows as well: a link to it would have two targets."""


def page(room: str) -> str:
    """The page as Markdown: the room's docstring, then every module."""
    package = f"cospadi.{room.replace('/', '.')}"
    intro = f"::: {package}\n    options:\n      members: false\n      show_root_heading: false\n      show_root_toc_entry: false"
    return "\n\n".join([f"# {ROOMS[room]}", intro, *(f"::: {module}" for module in modules(room))]) + "\n"


def as_markdown(docstring: str, target_of: Callable[[str], str | None]) -> str:
    """A docstring whose doctests, literal blocks and names are Markdown.

    Markdown takes a line that starts with ``>>>`` for a quotation, and prints the second colon of ``::``. A name between
    single backticks becomes a link to what ``target_of`` gives.
    """

    def link(name: re.Match[str]) -> str:
        path = target_of(name[1])
        return name[0] if path is None else f"[{name[0]}][{path}]"

    fenced = DOCTEST.sub(lambda example: f"~~~python\n{example[0]}\n~~~", NAME.sub(link, docstring))
    return re.sub(r"::\n\n(?=    )", ":\n\n", fenced)


def target(name: str, scope: Object) -> str | None:
    """Full name of what a docstring of ``scope`` calls ``name``, if a page shows it."""
    try:
        path = scope.resolve(name)
    except NameResolutionError:
        path = name
    module, _, last = path.rpartition(".")
    is_shown = module in SHOWN or module.rpartition(".")[0] in SHOWN  # a function or class, or a member of a class
    return path if is_shown and not last.startswith("_") and path not in ELSEWHERE else None


def bare_attributes(scope: Object) -> list[str]:
    """Attributes with neither a docstring nor a type: what ``__init__`` keeps for itself, and plain constants."""
    members = [member for member in scope.members.values() if not member.is_alias and member.is_attribute]
    return [member.name for member in members if not member.docstring and member.annotation is None]


class PlainDocstrings(Extension):
    """Turns every docstring into Markdown before it is parsed, and names between single backticks into links."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        objects: list[Object] = [pkg]
        while objects:
            scope = objects.pop()
            for name in bare_attributes(scope):
                scope.del_member(name)
            objects += [member for member in scope.members.values() if not member.is_alias]
            if scope.docstring:
                scope.docstring.value = as_markdown(
                    scope.docstring.value, lambda name, scope=scope: target(name, scope)
                )
