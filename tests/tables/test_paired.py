"""Paired comparisons: the same documents, the difference and its error."""

import json
import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import UserError
from cospadi.tables import latex, paired
from cospadi.tables.cells import Cell, summary
from cospadi.tables.render import paper_table, tables, write_tables

SCORES = {  # method -> task -> a score per document
    "dense": {"arc_easy": [1, 1, 1, 0], "mmlu_a": [1, 0], "mmlu_b": [1, 1, 0]},
    "wanda": {"arc_easy": [1, 0, 1, 0], "mmlu_a": [0, 0], "mmlu_b": [1, 0, 0]},
    "cospadi_plus": {"arc_easy": [1, 1, 0, 1], "mmlu_a": [1, 0], "mmlu_b": [1, 0, 1]},
}
WINDOWS = {"dense": [3.0, 3.2, 2.9], "wanda": [4.0, 4.4, 3.7], "cospadi_plus": [3.1, 3.3, 3.2]}
GROUPS = {"arc_easy": ["arc_easy"], "mmlu": ["mmlu_a", "mmlu_b"]}


def cell(folder, method, ratio=0.2, quantization=()):
    """A cell and its logs."""
    samples = folder / "-".join([method, str(ratio), *quantization])
    samples.mkdir(parents=True, exist_ok=True)
    for leaf, scores in SCORES[method].items():
        rows = [{"doc_id": i, "metrics": {"acc": score, "acc_norm": 0}} for i, score in enumerate(scores)]
        (samples / f"{leaf}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    def mean(leaves):
        scores = [score for leaf in leaves for score in SCORES[method][leaf]]
        return {"metric": "acc", "value": sum(scores) / len(scores), "stderr": 0.1, "logged_as": leaves}

    entries = {task: mean(leaves) | {"higher_is_better": True} for task, leaves in GROUPS.items()}
    average = sum(entry["value"] for entry in entries.values()) / len(entries)
    nll = sum(WINDOWS[method]) / 3
    record = {
        "tasks": entries,
        "average_accuracy": {"value": average, "stderr": 0.1, "tasks": list(GROUPS), "protocol": "mean"},
        "token_perplexity": {"value": math.exp(nll), "stderr": 1.0, "protocol": "t", "per_window": WINDOWS[method]},
        "text_hash": "abc",
    }
    title = {"dense": "Dense", "wanda": "Wanda", "cospadi_plus": "CoSpaDi+"}[method]
    nominal = None if method == "dense" else ratio
    return Cell("small", "Small", method, title, nominal, [], record, [], *quantization, samples=samples)


@pytest.fixture
def cells(tmp_path):
    return [cell(tmp_path, "dense"), cell(tmp_path, "wanda"), cell(tmp_path, "cospadi_plus")]


def difference_of(cells, **place):
    frame = paired.differences(cells, "cospadi_plus")
    for name, value in place.items():
        frame = frame[frame[name] == value]
    (row,) = frame.to_dict("records")
    return row


def naive(ours, theirs):
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(each) / len(each)
    return mean, math.sqrt(sum((d - mean) ** 2 for d in each) / (len(each) - 1) / len(each))


def test_differences_are_those_of_the_documents(cells):
    arc = difference_of(cells, method="wanda", against="cospadi_plus", measure="arc_easy")
    assert (arc["difference"], arc["stderr"]) == pytest.approx(naive([1, 0, 1, 0], [1, 1, 0, 1]))
    assert arc["n_documents"] == 4
    # The documents of all its tasks are compared as one set.
    mmlu = difference_of(cells, method="wanda", against="cospadi_plus", measure="mmlu")
    assert (mmlu["difference"], mmlu["stderr"]) == pytest.approx(naive([0, 0, 1, 0, 0], [1, 0, 1, 0, 1]))
    average = difference_of(cells, method="wanda", against="cospadi_plus", measure="average_accuracy")
    values = {c.method: c.evaluation["average_accuracy"]["value"] for c in cells}
    assert average["difference"] == pytest.approx(values["wanda"] - values["cospadi_plus"])
    assert average["stderr"] == pytest.approx(math.hypot(arc["stderr"], mmlu["stderr"]) / 2)
    assert average["n_documents"] == 9
    nll = difference_of(cells, method="cospadi_plus", against="dense", measure="nll")
    assert (nll["difference"], nll["stderr"]) == pytest.approx(naive(WINDOWS["cospadi_plus"], WINDOWS["dense"]))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=50))
def test_a_paired_error_is_that_of_a_loop(pairs):
    ours, theirs = zip(*pairs, strict=True)
    value, stderr, n = paired.paired_difference(ours, theirs)
    assert (value, stderr) == pytest.approx(naive(ours, theirs))
    assert n == len(pairs)


def test_models_that_agree_on_every_document_differ_by_nothing(tmp_path):
    """Two separate error bars would not say so."""
    SCORES["oats"], WINDOWS["oats"] = SCORES["cospadi_plus"], WINDOWS["cospadi_plus"]
    value, stderr, _ = paired.paired_difference(SCORES["oats"]["arc_easy"], SCORES["cospadi_plus"]["arc_easy"])
    assert (value, stderr) == (0.0, 0.0)


def test_a_method_meets_the_one_of_its_ratio_and_quantization(tmp_path):
    int8 = ("int8", "int8")
    cells = [
        cell(tmp_path, "dense"),
        *(cell(tmp_path, method, 0.2, int8) for method in ("wanda", "cospadi_plus")),
        cell(tmp_path, "wanda", 0.3),
    ]
    frame = paired.differences(cells, "cospadi_plus")
    assert set(zip(frame["method"], frame["compression_ratio"], frame["against"], strict=True)) == {
        ("wanda+int8", 0.2, "dense"),
        ("wanda+int8", 0.2, "cospadi_plus+int8"),
        ("cospadi_plus+int8", 0.2, "dense"),
        ("wanda", 0.3, "dense"),  # its ratio has no cospadi_plus
    }


def test_other_documents_are_not_compared(cells, tmp_path):
    (cells[1].samples / "mmlu_b.jsonl").write_text('{"doc_id": 0, "metrics": {"acc": 1}}\n')
    frame = paired.differences(cells, "cospadi_plus")
    measures = set(frame[(frame["method"] == "wanda") & (frame["against"] == "cospadi_plus")]["measure"])
    assert measures == {"arc_easy", "nll"}  # and no average of what is left
    cells[1].evaluation["text_hash"] = "another text"
    frame = paired.differences(cells, "cospadi_plus")
    assert set(frame[frame["method"] == "wanda"]["measure"]) == {"arc_easy"}


def test_a_damaged_log_names_its_file(cells):
    (cells[1].samples / "arc_easy.jsonl").write_text('{"doc_id": 0, "metr')
    with pytest.raises(UserError, match=r"arc_easy\.jsonl is damaged"):
        paired.differences(cells, "cospadi_plus")


def test_the_table_shows_differences_with_their_errors(cells, tmp_path):
    (table,) = tables(cells, "A study", paired.differences(cells, "cospadi_plus"))
    titles = [column.title for column in table.columns]
    assert titles[titles.index("Average") + 1] == "Δ Average"
    assert titles[titles.index("Token ppl") + 1] == "Δ NLL"
    rows = {row.method: dict(zip(titles, row.entries, strict=True)) for group in table.groups for row in group}
    assert rows["wanda"]["Δ Average"].text == "−32.5 ± 26.9"
    assert rows["wanda"]["Δ NLL"].text == "+0.833 ± 0.176"
    assert {rows[method]["Δ NLL"].text for method in ("dense", "cospadi_plus")} == {"–"}
    assert not any(entry["Δ Average"].best for entry in rows.values())
    assert any(note.startswith("Δ: this method minus CoSpaDi+ at the same ratio") for note in table.notes)
    for text in (table.markdown(), table.html()):
        assert text.count("+0.833 ± 0.176") == 1
    assert r"+0.833 \ensuremath{\pm} 0.176" in latex.wide(table)
    write_tables(cells, tmp_path / "tables", [table], paired.differences(cells, "cospadi_plus"))
    written = pd.read_csv(tmp_path / "tables" / "paired.csv")
    pd.testing.assert_frame_equal(written, paired.differences(cells, "cospadi_plus"))


def test_without_logs_there_are_no_columns(cells):
    for each in cells:
        each.samples = None
        each.evaluation["token_perplexity"].pop("per_window")
    frame = summary(cells)
    table = paper_table(frame, "small", differences=paired.differences(cells, "cospadi_plus"))
    assert not any("Δ" in column.title for column in table.columns)
    assert not any(note.startswith("Δ") for note in table.notes)
