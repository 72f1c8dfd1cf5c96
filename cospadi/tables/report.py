"""A study on one page that needs no network: tables, figures, what the models write, and how it was all made."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cospadi import records
from cospadi.tables.cells import Cell, ordered, quantization_of, summary
from cospadi.tables.metrics import METRICS
from cospadi.tables.paper import PaperTable, ratio_label, rendered
from cospadi.tables.rulegraph import drawn

FIGURES = {
    "pareto": "Token perplexity, and KL divergence to the dense model, against the megabytes that the compressed projections "
    "take on disk. Lower and further right is better; the grey steps join what nothing as small beats. In colour: the method of "
    "the paper, and the nearest to the dense model of every family of methods. An arrow at a name: the line ends above the axis.",
    "perplexity": "Token perplexity, with one standard error, against the fraction of bits that is gone. Marks of one ratio are "
    "moved sideways so that they can be told apart. The dashed line is the uncompressed model.",
    "accuracy": "Average accuracy, with one standard error, against the fraction of bits that is gone. Marks of one ratio are "
    "moved sideways.",
    "output_error": "Error of every projection's outputs on the calibration text, layer by layer: what a factorization "
    "minimises. Darker is better.",
}
"""Pictures beside the report, in its order, and what they show."""


def write_report(cells: Sequence[Cell], folder: Path, study_title: str, printed: Sequence[PaperTable]) -> Path:
    """``report.html`` in the folder of a study's figures, which it holds in itself; no scripts, nothing loaded.

    The rule graph is that of ``rulegraph.dot`` in the folder, where there is one.
    """
    folder = Path(folder)
    rulegraph = folder / "rulegraph.dot"
    page = rendered(
        "report.html",
        title=study_title,
        headlines=headlines(cells),
        tables=printed,
        shared_notes=shared_notes(printed),
        figures=[(name, caption, _data(folder / f"{name}.png")) for name, caption in FIGURES.items()],
        written=[(title, texts) for model, title in _titles(cells).items() if (texts := written(cells, model))],
        graph=drawn(rulegraph.read_text(encoding="utf-8")) if rulegraph.is_file() else None,
        made=_made(cells),
        ratio_label=ratio_label,
    )
    records.write_text(folder / "report.html", page)
    return folder / "report.html"


def shared_notes(printed: Sequence[PaperTable]) -> list[str]:
    """Notes that all tables have, where there are several: the report has them once."""
    if len(printed) < 2:
        return []
    first, *others = printed
    return [note for note in first.all_notes if all(note in table.all_notes for table in others)]


def headlines(cells: Sequence[Cell]) -> list[str]:
    """Who comes nearest to the dense model at every ratio, in 16 bits: a sentence per model and ratio.

    By KL divergence where it was measured, otherwise by token perplexity; nothing where a method has no rival.
    """
    frame = summary(cells)
    lines = []
    for (model, ratio), rows in frame[frame["compression_ratio"] > 0].groupby(
        ["model_title", "compression_ratio"], sort=False
    ):
        alike = rows[rows["method"].map(quantization_of) == ""]
        for metric in (METRICS["kl_to_dense"], METRICS["token_perplexity"]):
            measured = alike[alike[metric.name].map(math.isfinite)].sort_values(metric.name)
            if len(measured) < 2:
                continue
            first = measured.iloc[0]
            second = measured.iloc[1]
            unit = f" {metric.unit}" if metric.unit else ""
            lines.append(
                f"{model}, {ratio:.0%} of the bits removed: {first['method_title']} comes nearest to the dense model, "
                f"{metric.long_title} {metric.print(first[metric.name])}{unit}; next is {second['method_title']} with "
                f"{metric.print(second[metric.name])}."
            )
            break
    return lines


def written(cells: Sequence[Cell], model: str) -> list[tuple[str, list[str], list[tuple[str, list[str | None]]]]]:
    """Continuations of each prompt by every version of a model: ``(prompt, ratios, [(method, a text per ratio)])``, dense first.

    ``None`` where a method was not run at a ratio; the dense model has one text for all ratios.
    """
    cells = [cell for cell in ordered(cells) if cell.model == model]
    ratios = sorted({cell.compression_ratio for cell in cells if not cell.is_dense})
    texts: dict[str, dict[str, dict[float | int | None, str]]] = {}
    for cell in cells:
        for entry in cell.evaluation.get("continuations") or []:
            rows = texts.setdefault(entry["prompt"], {})
            rows.setdefault(cell.method_title, {})[cell.compression_ratio] = entry["continuation"]
    return [
        (
            prompt,
            [f"{ratio:g}" for ratio in ratios],
            [
                (title, [of_ratio[None]] if None in of_ratio else [of_ratio.get(ratio) for ratio in ratios])
                for title, of_ratio in rows.items()
            ],
        )
        for prompt, rows in texts.items()
    ]


def _titles(cells: Sequence[Cell]) -> dict[str, str]:
    return {cell.model: cell.model_title for cell in ordered(cells)}


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)


def _data(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def _made(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Versions, machine and time behind the numbers, as the records have them."""
    records = [record for cell in cells for record in (*cell.factorizations, *cell.earlier, cell.evaluation)]
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, version in (record.get("versions") or {}).items():
            versions.setdefault(package, set()).add(str(version))
    seconds = sum(float(record.get("seconds") or 0) for record in records)
    facts: list[tuple[str, Any]] = [
        ("Software", ", ".join(f"{package} {' or '.join(sorted(v))}" for package, v in versions.items())),
        ("Machine", "; ".join(dict.fromkeys(_machine(r["machine"]) for r in records if r.get("machine")))),
        ("Work", f"{seconds / 3600:.1f} hours over {len(records)} jobs" if seconds else ""),
    ]
    return [(name, text) for name, text in facts if text]
