"""Pages of the notebooks, made from `notebooks/*.py` when the site is built: their text and their code, not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page per notebook to the pages that MkDocs found."""
    for notebook in notebooks():
        files.append(File.generated(config, page_name(notebook), content=page(notebook)))
    return files


def notebooks() -> list[Path]:
    """The files of notebooks, in jupytext's percent format."""
    return sorted(NOTEBOOKS.glob("*.py"))


def page_name(notebook: Path) -> str:
    """Name of a notebook's page."""
    return f"notebooks/{notebook.stem}.md"


def page(notebook: Path) -> str:
    """A notebook as Markdown. Where to run it stands under its title."""
    cells = [
        cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```"
        for cell in jupytext.read(notebook).cells
    ]
    return "\n\n".join([_with_note(cells[0], notebook), *cells[1:]]) + "\n"


def _with_note(first_cell: str, notebook: Path) -> str:
    title, _, text = first_cell.partition("\n")
    return (
        f"{title}\n\nThe code of `notebooks/{notebook.name}`. Open the file in Jupyter with jupytext to run it.\n{text}"
    )
