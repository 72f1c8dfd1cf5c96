"""Printed tables for LaTeX, as a file that a paper takes in with ``\\input``: all columns, or as many as a page has room for."""

from __future__ import annotations

from dataclasses import replace

from pylatexenc.latexencode import unicode_to_latex

from cospadi.tables.paper import MISSING, Entry, PaperTable, Row, join, ratio_label

NARROW = (
    "token_perplexity",
    "second_perplexity",
    "word_perplexity",
    "kl_to_dense",
    "top1_agreement",
    "average_accuracy",
    "stored_bits",
)
"""Columns of the table that fits a page, beside ratio and method."""


def wide(table: PaperTable) -> str:
    """A ``table`` of every column, with notes no larger than what a page of columns shrinks to."""
    return _environment(table, table.name, r"\tiny")


def narrow(table: PaperTable) -> str:
    """A ``table`` of at most nine columns: those of ``NARROW`` that were measured."""
    rows = [row for group in table.groups for row in group]
    kept = [
        i
        for i, column in enumerate(table.columns)
        if column.name in NARROW and any(row.entries[i].text != MISSING for row in rows)
    ]
    columns = [table.columns[i] for i in kept]
    groups = [[replace(row, entries=[row.entries[i] for i in kept]) for row in group] for group in table.groups]
    return _environment(replace(table, columns=columns, groups=groups), f"{table.name}-paper", r"\scriptsize")


def escaped(text: str) -> str:
    r"""Every character that LaTeX would act on, or that its fonts lack, written out.

    >>> print(escaped("Δ of 50 % of A_b"))
    \ensuremath{\Delta} of 50 \% of A\_b
    """
    return unicode_to_latex(" ".join(text.split()), unknown_char_policy="replace", unknown_char_warning=False).replace(
        "|", r"\textbar{}"
    )


def _environment(table: PaperTable, label: str, notes_size: str) -> str:
    """The table in the size of footnotes, and smaller where it would be wider than the text."""
    plain_label = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in label)
    notes = [escaped(note) for note in table.notes]
    lines = [
        r"% Needs \usepackage{booktabs,graphicx}.",
        r"\begin{table}[t]",
        r"\centering\footnotesize",
        rf"\caption{{{escaped(table.title)}}}",
        rf"\label{{tab:{plain_label}}}",
        r"\setlength{\tabcolsep}{3pt}",
        r"\sbox0{%",
        *_tabular(table),
        "}%",
        r"\ifdim\wd0>\textwidth\resizebox{\textwidth}{!}{\usebox0}\else\usebox0\fi",
        r"\par\smallskip",
        rf"\begin{{minipage}}{{\textwidth}}{notes_size}\raggedright",
        "\\\\\n".join(notes),
        r"\end{minipage}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tabular(table: PaperTable) -> list[str]:
    heads = ["Ratio", "Method", *(escaped(column.title) for column in table.columns)]
    units = ["", "", *(escaped(join(" ", column.unit, column.arrow)) for column in table.columns)]
    lines = [rf"\begin{{tabular}}{{@{{}}ll{'r' * len(table.columns)}@{{}}}}", r"\toprule", _line(heads), _line(units)]
    for group in table.groups:
        lines.append(r"\midrule")
        lines += [_line(_texts(row, is_first=row is group[0])) for row in group]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _texts(row: Row, is_first: bool) -> list[str]:
    ratio = escaped(ratio_label(row)) if is_first else ""
    return [ratio, escaped(row.label), *map(_value, row.entries)]


def _value(entry: Entry) -> str:
    text = escaped(entry.text)
    return rf"\textbf{{{text}}}" if entry.best else text


def _line(texts: list[str]) -> str:
    return " & ".join(texts) + r" \\"
