"""LaTeX tables: what a paper takes in compiles, fits the page and can be read."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import rivals
from test_tables import cell, dense, study

from cospadi.tables import latex
from cospadi.tables.render import tables

needs_latex = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex here: apt install texlive-latex-recommended"
)
ODD = r"50 % of A_B & #1 {x} $y ~z^2 \w Δ ± × · ↑ ↓ → ≤ ≥ ≈ − ‖ ∞ … † – — < > | é 中"


def odd_table():
    """A table whose titles and notes have everything that LaTeX acts on."""
    cells = [dense(), cell("svd", 0.2, fallback="damping raised"), cell("cospadi", 0.2)]
    for renamed in cells:
        renamed.model_title = ODD
    (table,) = tables(cells, "Odd")
    return replace(table, name="50%_A&B", notes=[*table.notes, ODD])


def test_the_narrow_table_has_at_most_nine_columns_and_the_values_of_the_wide_one():
    (table,) = tables(rivals.cells(), "Rivals")
    text = latex.narrow(table)
    columns = re.search(r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}", text)[1]
    assert len(columns) <= 9 < 2 + len(table.columns)
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
    assert len(lines) == 2 + sum(map(len, table.groups))
    best = min(row[0.3][0] for row in rivals.numbers().values())
    assert rf"\textbf{{{best:.2f}}}" in body


def test_everything_that_latex_acts_on_is_escaped():
    text = latex.wide(odd_table())
    assert text.isascii()
    assert r"50 \% of A\_B \& \#1 \{x\} \$y {\textasciitilde}z{\textasciicircum}2 {\textbackslash}w" in text
    assert r"SVD{\textdagger}" in text
    assert r"\label{tab:50--A-B}" in text


@needs_latex
@pytest.mark.parametrize("form", [latex.wide, latex.narrow])
@pytest.mark.parametrize("of", ["small", "rivals", "odd"])
def test_a_paper_that_takes_the_table_in_compiles_and_nothing_sticks_out(form, of, tmp_path):
    table = odd_table() if of == "odd" else tables(study() if of == "small" else rivals.cells(), "A study")[0]
    written = form(table)
    (tmp_path / "table.tex").write_text(written, encoding="utf-8")
    packages = re.search(r"\\usepackage\{.*\}", written)[0]
    paper = rf"\documentclass{{article}}{packages}\begin{{document}}\input{{table}}\end{{document}}"
    (tmp_path / "paper.tex").write_text(paper, encoding="utf-8")
    command = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:]
    log = (tmp_path / "paper.log").read_text(encoding="utf-8", errors="replace")
    assert "Missing character" not in log
    assert not re.search(r"Overfull \\hbox", log), log
