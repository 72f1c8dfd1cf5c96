"""One model's rows as a table like a paper's: Markdown, LaTeX (booktabs), HTML, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cospadi import records
from cospadi.errors import UserError
from cospadi.tables.cells import (
    DENSE,
    Cell,
    measurements,
    ordered,
    projection_errors,
    quantization_of,
    second_text,
    summary,
    task_names,
    tasks_of,
)

MISSING = "–"
DAGGER = "†"
STDERR_NOTE = "±: one standard error."
TASK_TITLES = {
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "heldout_cloze": "Cloze",
    "heldout_perplexity": "Held-out ppl",
    "hellaswag": "HellaSwag",
    "kick_factoid": "FreebaseQA",
    "kick_summarization": "CNN/DM",
    "kick_triviaqa_closed": "TriviaQA",
    "kick_triviaqa_open": "TriviaQA (open)",
    "lambada_openai": "LAMBADA",
    "lambada_standard": "LAMBADA (std)",
    "mmlu": "MMLU",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "race": "RACE",
    "sciq": "SciQ",
    "wikitext": "WikiText",
    "winogrande": "WinoGrande",
}
"""How papers abbreviate stock tasks; any other task keeps its own name."""

METRIC_TITLES = {
    "average_accuracy": "Average",
    "token_perplexity": "Token ppl",
    "second_perplexity": "Second ppl",
    "word_perplexity": "Word ppl",
    "lambada_perplexity": "LAMBADA ppl",
    "kl_to_dense": "KL",
    "top1_agreement": "Top-1",
}
_OPTIONAL = ("second_perplexity", "lambada_perplexity")
"""Columns of the studies that measure them."""
_FRACTIONS = ("acc", "exact_match", "em", "f1", "mc1", "mc2", "pass", "contains", "rouge")


def perplexity(value: float) -> str:
    """Digits as papers print them.

    >>> [perplexity(value) for value in (22.551, 99.996, 249.3, 999.7, 1649.0, float("inf"))]
    ['22.55', '100', '249', '1.0e3', '1.6e3', 'inf']
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 99.995:
        return f"{value:.2f}"
    if abs(value) < 999.5:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float) -> str:
    """A fraction in percent, one decimal.

    >>> percent(0.5764)
    '57.6'
    """
    return f"{100 * value:.1f}"


def divergence(value: float) -> str:
    """Two decimals from 0.1 on, two significant digits below.

    >>> [divergence(value) for value in (1.234, 0.0712, 0.00042, 0.0)]
    ['1.23', '0.071', '4.2e-4', '0']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 0.0995:
        return perplexity(value)
    if abs(value) >= 0.00995:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio(value: float) -> str:
    """A bits-removed fraction, three decimals.

    >>> ratio(0.20004)
    '0.200'
    """
    return f"{value:.3f}"


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign.

    >>> points(-0.0123), points(0.02)
    ('−1.2', '+2.0')
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def nats(value: float) -> str:
    """A difference of log-likelihoods, with its sign.

    >>> nats(-0.0123), nats(0.5)
    ('−0.012', '+0.500')
    """
    return f"{value:+.3f}".replace("-", "−")


def size(value: float) -> str:
    """Megabytes or seconds: three significant digits, at most one decimal.

    >>> [size(value) for value in (0.26, 4.13, 212.4, 3141.5)]
    ['0.3', '4.1', '212', '3142']
    """
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


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
    """Printed with its standard error wherever it stands: a difference says nothing without it."""

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")


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
    """A page made of a file in ``templates``; whatever is put in is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

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
        lines = [["Ratio", "Method", *(_join(" ", column.title, column.unit, column.arrow) for column in self.columns)]]
        for first, row in self._rows():
            entries = [f"**{entry.text}**" if entry.best else entry.text for entry in row.entries]
            if stderr:
                entries = [_join(" ± ", text, e.stderr_text) for text, e in zip(entries, row.entries, strict=True)]
            lines.append([ratio_label(row) if first else "", row.label, *entries])
        lines = [[_escape_markdown(text) for text in line] for line in lines]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
        rule = [":" + "-" * (w - 1) if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        body = [
            [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        table = "\n".join("| " + " | ".join(line) + " |" for line in (body[0], rule, *body[1:]))
        notes = [*self.notes, STDERR_NOTE] if stderr and self.has_stderr else self.notes
        notes = "\n".join(f"- {_escape_markdown(note)}" for note in notes)
        return f"### {_escape_markdown(self.title)}\n\n{table}\n\n{notes}\n"

    def latex(self) -> str:
        """A ``table`` environment for ``booktabs``; ``graphicx`` shrinks it to the text width."""
        rows = []
        for group in self.groups:
            rows.append(r"\midrule")
            for first, row in zip([True] + [False] * (len(group) - 1), group, strict=True):
                texts = [_escape_latex(ratio_label(row)) if first else "", _escape_latex(row.label)]
                texts += [
                    rf"\textbf{{{_escape_latex(entry.text)}}}" if entry.best else _escape_latex(entry.text)
                    for entry in row.entries
                ]
                rows.append(" & ".join(texts) + r" \\")
        heads = ["Ratio", "Method", *(_escape_latex(_join(" ", column.title, column.arrow)) for column in self.columns)]
        units = ["", "", *(f"({_escape_latex(column.unit)})" if column.unit else "" for column in self.columns)]
        return "\n".join(
            [
                r"% Needs \usepackage{booktabs,graphicx} and \usepackage[utf8]{inputenc}.",
                r"\begin{table}[t]",
                r"\centering",
                rf"\caption{{{_escape_latex(self.title)}}}",
                rf"\label{{tab:{_label(self.name)}}}",
                r"\resizebox{\textwidth}{!}{%",
                rf"\begin{{tabular}}{{ll{'r' * len(self.columns)}}}",
                r"\toprule",
                " & ".join(heads) + r" \\",
                " & ".join(units) + r" \\",
                *rows,
                r"\bottomrule",
                r"\end{tabular}}",
                r"\par\smallskip",
                r"\begin{minipage}{\textwidth}\footnotesize",
                "\\\\\n".join(_escape_latex(note) for note in self.notes),
                r"\end{minipage}",
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        """A page of its own: no scripts, no fonts and no styles from elsewhere."""
        return rendered("page.html", table=self, ratio_label=ratio_label, stderr_note=STDERR_NOTE)

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
    def has_stderr(self) -> bool:
        """Whether some value has a standard error."""
        return any(entry.stderr_text for _, row in self._rows() for entry in row.entries)

    def _rows(self) -> list[tuple[bool, Row]]:
        return [(row is group[0], row) for group in self.groups for row in group]


def paper_table(
    frame: pd.DataFrame,
    model: str,
    title: str | None = None,
    protocol_notes: Sequence[str] = (),
    differences: pd.DataFrame | None = None,
) -> PaperTable:
    """The rows of ``model`` in a ``summary``, grouped by ratio and quantization, the best printed value of each group bold.

    Values that are printed alike are bold together; NaN and infinity are never bold, nor is anything where only one
    method stands. Seconds and sizes are not compared. ``title`` defaults to the model's; ``protocol_notes`` go below.
    With ``differences`` of ``paired``, how a method differs from the one they were taken against stands beside its values.

    Raises:
        UserError: when the summary has no row of that model.
    """
    rows = frame[frame["model"] == model]
    if rows.empty:
        raise UserError(
            f"The summary has no row of model {model}. It has: {', '.join(frame['model'].unique()) or 'none'}."
        )
    columns = _columns(rows)
    if differences is not None:
        rows, columns = _with_differences(rows, columns, differences[differences["model"] == model])
    groups = []
    for _, group in rows.groupby("compression_ratio", sort=True):
        for dense in (True, False):
            part = group[(group["method"] == DENSE) == dense]
            for _, alike in part.groupby(part["method"].map(quantization_of), sort=False):
                groups.append([_row(row, columns) for _, row in alike.iterrows()])
    for group in groups:
        if group[0].method != DENSE:
            for i, column in enumerate(columns):
                _mark_best([row.entries[i] for row in group], column)
    limits = sorted({int(limit) for limit in rows["limit"].dropna()})
    limited = f" (limit: first {' or '.join(map(str, limits))} documents per task)" if limits else ""
    title = (rows["model_title"].iloc[0] if title is None else title) + limited
    own = [*_own_notes(rows, groups), *_difference_notes(rows, columns, differences)]
    return PaperTable(model, title, columns, groups, [*own, *protocol_notes])


_DIFFERENCES = {
    "average_accuracy": Column("average_accuracy_difference", "Δ Average", "points", "", points, is_difference=True),
    "nll": Column("nll_difference", "Δ NLL", "nats", "", nats, is_difference=True),
}
_STAND_AFTER = {"average_accuracy": "average_accuracy", "nll": "token_perplexity"}


def _with_differences(
    rows: pd.DataFrame, columns: list[Column], differences: pd.DataFrame
) -> tuple[pd.DataFrame, list[Column]]:
    """Rows and columns with those of ``_DIFFERENCES`` that were measured."""
    rows, columns = rows.copy(), list(columns)
    for measure, column in _DIFFERENCES.items():
        found = differences[(differences["measure"] == measure) & (differences["against"] != DENSE)]
        if found.empty:
            continue
        found = found.set_index(["compression_ratio", "method"])
        keys = pd.MultiIndex.from_frame(rows[["compression_ratio", "method"]])
        rows[column.name] = found["difference"].reindex(keys).to_numpy()
        rows[f"{column.name}_stderr"] = found["stderr"].reindex(keys).to_numpy()
        names = [c.name for c in columns]
        columns.insert(names.index(_STAND_AFTER[measure]) + 1, column)
    return rows, columns


def _difference_notes(rows: pd.DataFrame, columns: Sequence[Column], differences: pd.DataFrame | None) -> list[str]:
    if not any(column.is_difference for column in columns):
        return []
    against = set(differences["against"]) - {DENSE}
    titles = dict(zip(rows["method"], rows["method_title"], strict=True))
    named = " or ".join(title for method, title in titles.items() if method in against)
    told = (
        f"Δ: this method minus {named} at the same ratio, over the same documents (average) and the same windows "
        "(negative log-likelihood of a token, the logarithm of the token perplexity), ± the standard error of that difference."
    )
    return [told]


def notes(cells: Sequence[Cell], model: str) -> list[str]:
    """What the records of a model say about how they were made: calibration text, averaged tasks, protocols."""
    cells = [cell for cell in ordered(cells) if cell.model == model]
    found = [_calibration(record.get("settings", {})) for cell in cells for record in cell.factorizations]
    for cell in cells:
        average = cell.evaluation.get("average_accuracy") or {}
        if average.get("tasks"):
            found.append(f"Average over {', '.join(map(_task_title, average['tasks']))}.")
    tasks = task_names(cells)
    protocols: dict[str, list[str]] = {}
    for cell in cells:
        for name, measured in measurements(cell, tasks):
            if cell.is_dense and name in ("kl_to_dense", "top1_agreement"):
                continue  # 0 and 1 by definition
            if name in _OPTIONAL and measured.get("value") is None:
                continue
            if measured.get("protocol"):
                title = f"{second_text(cell)} ppl" if name == "second_perplexity" else METRIC_TITLES.get(name)
                title = title or _task_title(name)
                protocols.setdefault(str(measured["protocol"]).strip().rstrip("."), []).append(title)
    found += [f"{', '.join(dict.fromkeys(titles))}: {text}." for text, titles in protocols.items()]
    return list(dict.fromkeys(note for note in found if note))


def tables(
    cells: Sequence[Cell],
    study_title: str = "",
    differences: pd.DataFrame | None = None,
    published: Sequence[str] = (),
) -> list[PaperTable]:
    """A printed table per model, with the notes of its records and what the ``published`` sources print of it."""
    from cospadi.tables.published import with_published

    frame = summary(cells)
    titles = dict(zip(frame["model"], frame["model_title"], strict=True))
    found = [
        paper_table(
            frame,
            model,
            study_title if title in study_title else _join(": ", study_title, title),
            notes(cells, model),
            differences,
        )
        for model, title in titles.items()
    ]
    return [with_published(table, published) for table in found]


def write_tables(
    cells: Sequence[Cell], folder: Path, printed: Sequence[PaperTable], differences: pd.DataFrame | None = None
) -> list[Path]:
    """``summary.csv``, ``projections.csv``, and each ``printed`` table as ``.md``, ``.tex``, ``.html`` and ``.csv``.

    With ``differences`` also ``paired.csv``. Rows of published sources are in the printed tables alone.
    """
    texts = {
        "summary.csv": summary(cells).to_csv(index=False, lineterminator="\n"),
        "projections.csv": projection_errors(cells).to_csv(index=False, lineterminator="\n"),
    }
    if differences is not None:
        texts["paired.csv"] = differences.to_csv(index=False, lineterminator="\n")
    for table in printed:
        if table.name in ("summary", "projections", "paired"):
            raise UserError(f"A model named {table.name} would overwrite {table.name}.csv. Rename it in conf/model.")
        texts[f"{table.name}.md"] = table.markdown()
        texts[f"{table.name}.tex"] = table.latex()
        texts[f"{table.name}.html"] = table.html()
        texts[f"{table.name}.csv"] = table.csv()
    for name, text in texts.items():
        records.write_text(Path(folder) / name, text)
    return [Path(folder) / name for name in texts]


def _columns(rows: pd.DataFrame) -> list[Column]:
    columns = []
    for task in tasks_of(rows.columns):
        if rows[task].isna().all() and not any(task in diverged.split() for diverged in rows["diverged"]):
            continue  # a task of another model of the study, or one that was left out, which a note says
        if rows[task].equals(rows["word_perplexity"].rename(task)):
            continue  # the same number, under its own heading
        metric = next((m for m in rows[f"{task}_metric"] if m), "").split(",")[0]
        higher = rows[f"{task}_higher_is_better"].dropna()
        better = "" if higher.empty else ("higher" if higher.iloc[0] else "lower")
        fraction = metric.startswith(_FRACTIONS)
        columns.append(
            Column(task, _task_title(task), "%" if fraction else "", better, percent if fraction else perplexity)
        )
    second = next((title for title in rows["second_text"] if title), "")
    optional = {
        name: [] if rows[name].isna().all() else [Column(name, title, "", "lower", perplexity)]
        for name, title in (
            ("second_perplexity", f"{second} ppl"),
            ("lambada_perplexity", METRIC_TITLES["lambada_perplexity"]),
        )
    }
    return [
        *columns,
        Column("average_accuracy", METRIC_TITLES["average_accuracy"], "%", "higher", percent),
        Column("token_perplexity", METRIC_TITLES["token_perplexity"], "", "lower", perplexity),
        *optional["second_perplexity"],
        Column("word_perplexity", METRIC_TITLES["word_perplexity"], "", "lower", perplexity),
        *optional["lambada_perplexity"],
        Column("kl_to_dense", METRIC_TITLES["kl_to_dense"], "nats", "lower", divergence),
        Column("top1_agreement", METRIC_TITLES["top1_agreement"], "%", "higher", percent),
        Column("stored_ratio", "Stored ratio", "", "", ratio),
        Column("stored_bits", "Stored", "MB", "", lambda bits: size(bits / 8e6)),
        Column("factorize_seconds", "Time", "s", "", size),
    ]


def _row(row: pd.Series, columns: Sequence[Column]) -> Row:
    diverged = row["diverged"].split()
    entries = []
    for column in columns:
        value = math.nan if pd.isna(row[column.name]) else float(row[column.name])
        missing = math.isnan(value) and column.name not in diverged
        stderr = row.get(f"{column.name}_stderr", math.nan)
        text = MISSING if missing else column.print(value)
        stderr_text = "" if math.isnan(stderr) else _like(text, stderr, column)
        if column.is_difference and stderr_text:
            text, stderr_text = f"{text} ± {stderr_text}", ""
        entries.append(Entry(value, text, float(stderr), stderr_text))
    return Row(row["method"], row["method_title"], row["compression_ratio"], bool(row["fallbacks"] > 0), entries)


def _like(text: str, stderr: float, column: Column) -> str:
    """A standard error with as many decimals as the value it belongs to."""
    if "e" in text or not math.isfinite(stderr) or "n" in text:
        return column.print(stderr)
    decimals = len(text.partition(".")[2])
    return f"{stderr * (100 if column.unit in ('%', 'points') else 1):.{decimals}f}"


def _mark_best(entries: Sequence[Entry], column: Column) -> None:
    finite = [entry for entry in entries if math.isfinite(entry.value)]
    if len(entries) < 2 or not finite or not column.better:
        return
    best = (max if column.better == "higher" else min)(finite, key=lambda entry: entry.value)
    for entry in finite:
        entry.best = entry.text == best.text


def _own_notes(rows: pd.DataFrame, groups: Sequence[Sequence[Row]]) -> list[str]:
    found = []
    if any(entry.best for group in groups for row in group for entry in row.entries):
        found.append("Bold: best value of its ratio and quantization (↑ higher, ↓ lower is better).")
    found.append(
        "Ratio: fraction of the projections' bits that was asked to go. Stored ratio: fraction that is gone in the "
        "checkpoint, indices and masks counted. Stored: bytes of the projections alone. Time: of the factorization."
    )
    of_bits: dict[int, list[str]] = {}
    for _, row in rows.iterrows():
        if not pd.isna(row["bits"]):
            of_bits.setdefault(int(row["bits"]), []).append(row["method_title"])
    if len(of_bits) == 1:
        found.append(f"Stored values have {next(iter(of_bits))} bits.")
    elif of_bits:
        parts = [f"{bits} bits ({', '.join(dict.fromkeys(titles))})" for bits, titles in of_bits.items()]
        found.append(f"Stored values have {'; '.join(parts)}.")
    for _, row in rows[rows["fallbacks"] > 0].iterrows():
        place = f"{row['method_title']} at {row['compression_ratio']:g}"
        found.append(f"{DAGGER} {place}: not as asked for in some projections: {row['fallback_reasons']}.")
    return found


def _calibration(settings: dict) -> str:
    calibration = settings.get("calibration") or {}
    text = calibration.get("text") or {}
    title = text.get("title") or text.get("name") if isinstance(text, dict) else str(text)
    if not title:
        return ""
    parts = [f"Calibration: {title}"]
    if calibration.get("n_samples") and calibration.get("sample_length"):
        parts.append(f"{calibration['n_samples']} samples × {calibration['sample_length']} tokens")
    if calibration.get("seed") is not None:
        parts.append(f"seed {calibration['seed']}")
    return ", ".join(parts) + "."


def _task_title(task: str) -> str:
    return TASK_TITLES.get(task, task.replace("_", " "))


def ratio_label(row: Row) -> str:
    return (
        MISSING
        if row.compression_ratio == 0 and row.method.rpartition(":")[2] == DENSE
        else f"{row.compression_ratio:g}"
    )


def _join(separator: str, *parts: str) -> str:
    return separator.join(part for part in parts if part)


def _label(name: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)


def _escape_markdown(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "&": r"\&",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "†": r"\textsuperscript{\dag}",
    "–": "--",
    "—": "---",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "−": r"$-$",
    "‖": r"$\|$",
    "∞": r"$\infty$",
    "…": r"\ldots{}",
    "\n": " ",
}


def _escape_latex(text: str) -> str:
    """Every character that LaTeX would act on, made printable.

    >>> print(_escape_latex("50 % of A_b & c"))
    50 \\% of A\\_b \\& c
    """
    return "".join(_LATEX.get(letter, letter) for letter in text)
