"""From a study's summary to its printed tables and their notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cospadi import records
from cospadi.errors import UserError
from cospadi.records import DENSE
from cospadi.tables import latex
from cospadi.tables.cells import (
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
from cospadi.tables.metrics import AVERAGE, METRICS, NLL, Metric
from cospadi.tables.numbers import nats, percent, perplexity, points, ratio, size
from cospadi.tables.paper import DAGGER, MISSING, Column, Entry, PaperTable, Row, join
from cospadi.tables.published import with_published

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
_FRACTIONS = ("acc", "exact_match", "em", "f1", "mc1", "mc2", "pass", "contains", "rouge")


def paper_table(
    frame: pd.DataFrame,
    model: str,
    title: str | None = None,
    protocol_notes: Sequence[str] = (),
    differences: pd.DataFrame | None = None,
) -> PaperTable:
    """The rows of ``model`` in a ``summary``, grouped by ratio and quantization, the best printed value of each group bold.

    Values that are printed alike are bold together, unless all are; NaN and infinity are never bold, nor is anything where
    only one method was run. Seconds and sizes are not compared. ``title`` defaults to the model's; ``protocol_notes`` go below.
    With ``differences`` of ``paired``, columns beside the values show how a method differs from the one compared with.

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
                groups.append([_printed_row(row, columns) for _, row in alike.iterrows()])
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
    AVERAGE.name: Column("average_accuracy_difference", "Δ Average", "points", "", points, is_difference=True),
    NLL: Column("nll_difference", "Δ NLL", "nats", "", nats, is_difference=True),
}
"""Measures of ``paired.csv`` that printed tables show, and their columns."""
_METRIC_OF = {metric.paired_as: metric for metric in METRICS.values()} | {AVERAGE.name: AVERAGE}
"""The metric whose column a difference follows."""


def _with_differences(
    rows: pd.DataFrame, columns: list[Column], differences: pd.DataFrame
) -> tuple[pd.DataFrame, list[Column]]:
    """Rows and columns with those of ``_DIFFERENCES`` that were measured."""
    rows = rows.copy()
    columns = list(columns)
    for measure, column in _DIFFERENCES.items():
        measured = differences[(differences["measure"] == measure) & (differences["against"] != DENSE)]
        if measured.empty:
            continue
        measured = measured.set_index(["compression_ratio", "method"])
        keys = pd.MultiIndex.from_frame(rows[["compression_ratio", "method"]])
        rows[column.name] = measured["difference"].reindex(keys).to_numpy()
        rows[f"{column.name}_stderr"] = measured["stderr"].reindex(keys).to_numpy()
        names = [c.name for c in columns]
        columns.insert(names.index(_METRIC_OF[measure].name) + 1, column)
    return rows, columns


def _difference_notes(rows: pd.DataFrame, columns: Sequence[Column], differences: pd.DataFrame | None) -> list[str]:
    if not any(column.is_difference for column in columns):
        return []
    against = set(differences["against"]) - {DENSE}
    titles = dict(zip(rows["method"], rows["method_title"], strict=True))
    named = " or ".join(title for method, title in titles.items() if method in against)
    note = (
        f"Δ: this method minus {named} at the same ratio, over the same documents (average) and the same windows "
        "(negative log-likelihood of a token, the logarithm of the token perplexity), ± the standard error of that difference."
    )
    return [note]


def notes(cells: Sequence[Cell], model: str) -> list[str]:
    """What the records of a model say about how they were made: calibration text, averaged tasks, protocols."""
    cells = [cell for cell in ordered(cells) if cell.model == model]
    lines = [_calibration(record.get("settings", {})) for cell in cells for record in cell.factorizations]
    for cell in cells:
        average = cell.evaluation.get(AVERAGE.name) or {}
        if average.get("tasks"):
            lines.append(f"Average over {', '.join(map(_task_title, average['tasks']))}.")
    tasks = task_names(cells)
    protocols: dict[str, list[str]] = {}
    for cell in cells:
        for name, measured in measurements(cell, tasks):
            metric = METRICS.get(name)
            if metric and cell.is_dense and metric.of_dense is not None:
                continue
            if metric and metric.is_optional and measured.get("value") is None:
                continue
            if measured.get("protocol"):
                title = _metric_title(metric, second_text(cell)) if metric else _task_title(name)
                protocols.setdefault(str(measured["protocol"]).strip().rstrip("."), []).append(title)
    lines += [f"{', '.join(dict.fromkeys(titles))}: {text}." for text, titles in protocols.items()]
    return list(dict.fromkeys(line for line in lines if line))


def tables(
    cells: Sequence[Cell],
    study_title: str = "",
    differences: pd.DataFrame | None = None,
    published: Sequence[str] = (),
) -> list[PaperTable]:
    """A printed table per model, with the notes of its records and what the ``published`` sources print of it."""
    frame = summary(cells)
    titles = dict(zip(frame["model"], frame["model_title"], strict=True))
    of_models = [
        paper_table(
            frame,
            model,
            study_title if title in study_title else join(": ", study_title, title),
            notes(cells, model),
            differences,
        )
        for model, title in titles.items()
    ]
    return [with_published(table, published) for table in of_models]


def write_tables(
    cells: Sequence[Cell], folder: Path, printed: Sequence[PaperTable], differences: pd.DataFrame | None = None
) -> list[Path]:
    """``summary.csv``, ``projections.csv``, and each ``printed`` table as ``.md``, ``.tex``, ``.html`` and ``.csv``,
    and as ``<model>_paper.tex`` with as many columns as a page has room for.

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
        texts[f"{table.name}.tex"] = latex.wide(table)
        texts[f"{table.name}_paper.tex"] = latex.narrow(table)
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
    # The average comes right after the tasks it averages.
    for metric in (AVERAGE, *(metric for metric in METRICS.values() if metric is not AVERAGE)):
        if not (metric.is_optional and rows[metric.name].isna().all()):
            title = _metric_title(metric, second)
            columns.append(Column(metric.name, title, metric.unit, metric.better, metric.print))
    return [
        *columns,
        Column("stored_ratio", "Stored ratio", "", "", ratio),
        Column("stored_bits", "Stored", "MB", "", lambda bits: size(bits / 8e6)),
        Column("factorize_seconds", "Time", "s", "", size),
    ]


def _printed_row(row: pd.Series, columns: Sequence[Column]) -> Row:
    diverged = row["diverged"].split()
    entries = []
    for column in columns:
        value = math.nan if pd.isna(row[column.name]) else float(row[column.name])
        missing = math.isnan(value) and column.name not in diverged
        stderr = row.get(f"{column.name}_stderr", math.nan)
        text = MISSING if missing else column.print(value)
        stderr_text = "" if math.isnan(stderr) else _like(text, stderr, column)
        if column.is_difference and stderr_text:
            text = f"{text} ± {stderr_text}"
            stderr_text = ""
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
    if len({entry.text for entry in entries}) < 2 or not finite or not column.better:
        return
    best = (max if column.better == "higher" else min)(finite, key=lambda entry: entry.value)
    for entry in finite:
        entry.best = entry.text == best.text


def _own_notes(rows: pd.DataFrame, groups: Sequence[Sequence[Row]]) -> list[str]:
    lines = []
    if any(entry.best for group in groups for row in group for entry in row.entries):
        lines.append("Bold: best value of its ratio and quantization (↑ higher, ↓ lower is better).")
    lines.append(
        "Ratio: fraction of the projections' bits that was asked to go. Stored ratio: fraction that is gone in the "
        "checkpoint, indices and masks counted. Stored: bytes of the projections alone. Time: of the factorization."
    )
    of_bits: dict[int, list[str]] = {}
    for _, row in rows.iterrows():
        if not pd.isna(row["bits"]):
            of_bits.setdefault(int(row["bits"]), []).append(row["method_title"])
    if len(of_bits) == 1:
        lines.append(f"Stored values have {next(iter(of_bits))} bits.")
    elif of_bits:
        parts = [f"{bits} bits ({'; '.join(dict.fromkeys(titles))})" for bits, titles in of_bits.items()]
        lines.append(f"Stored values have {', '.join(parts)}.")
    for _, row in rows[rows["fallbacks"] > 0].iterrows():
        place = f"{row['method_title']} at {row['compression_ratio']:g}"
        lines.append(f"{DAGGER} {place}: not as asked for in some projections: {row['fallback_reasons']}.")
    return lines


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


def _metric_title(metric: Metric, second_text: str) -> str:
    """A metric's heading; the second text's perplexity is named after the text."""
    return f"{second_text} ppl" if metric.name == "second_perplexity" else metric.title


def _task_title(task: str) -> str:
    return TASK_TITLES.get(task, task.replace("_", " "))
