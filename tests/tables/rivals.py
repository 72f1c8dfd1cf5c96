"""A study of many methods, made of the numbers in ``docs/results.md``, to draw.

``python tests/tables/rivals.py`` draws the figure of the first page.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from test_tables import factorization, measured

from cospadi.settings import load
from cospadi.tables.cells import Cell, summary
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.style import save, style

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results.md"
DENSE_BITS = 1698693120
"""Of the default model's projections. Every row of the table removes its ratio of them, or a few thousandths more."""


def numbers() -> dict[str, dict[float, tuple[float, float]]]:
    """Perplexity and KL of every method at 0.2, 0.3, 0.4 and 0.5; a dash stands for a cell that was not measured."""
    text = RESULTS.read_text(encoding="utf-8").partition("## Every method at equal bytes")[2].partition("*`make")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    return {name: dict(_measured(row)) for name, row in rows}


def _measured(row: str) -> Iterator[tuple[float, tuple[float, float]]]:
    for ratio, pair in zip((0.2, 0.3, 0.4, 0.5), row.split(" | "), strict=True):
        if pair != "–":
            perplexity, divergence = pair.replace("*", "").split(" / ")
            yield ratio, (float(perplexity), float(divergence))


def cells() -> list[Cell]:
    """A cell per method and ratio, and the dense model."""
    made = [_cell("dense", "Dense", None, 21.67, 0.0, "")]
    for name, row in numbers().items():
        config = load([f"factorization={name}"]).factorization
        made += [_cell(name, config.title, ratio, *pair, config.family) for ratio, pair in row.items()]
    return made


def _cell(method, title, ratio, perplexity, divergence, family):
    evaluation = {
        "token_perplexity": measured(perplexity, 0.02 * perplexity),
        "kl_to_dense": measured(divergence, 0.03 * divergence),
        "average_accuracy": measured(0.25 / (1 + divergence), 0.014, tasks=["cloze"]),
    }
    made = [] if ratio is None else [factorization(method, ratio, range(4), title=title)]
    return Cell("smollm2", "SmolLM2-135M", method, title, ratio, made, evaluation, family=family)


def draw(stem: Path) -> list[Path]:
    """The figure of the first page: every row of the table, at the megabytes of its ratio."""
    frame = summary(cells())
    frame["model_title"] = load(["model=smollm2_135m"]).model.title
    frame["stored_bits"] = DENSE_BITS * (1 - frame["compression_ratio"].fillna(0))
    with style():
        return save(pareto_figure(frame), stem)


if __name__ == "__main__":
    _, vector = draw(DOCS / "rivals_pareto")
    vector.unlink()
