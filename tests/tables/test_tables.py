"""Tables and figures: what the records say, and nothing else."""

import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from cospadi.errors import UserError
from cospadi.tables import figures
from cospadi.tables.cells import LEADING_COLUMNS, PROJECTION_COLUMNS, Cell, projection_errors, read_summary, summary
from cospadi.tables.error_maps import error_maps as _error_maps
from cospadi.tables.figures import write_figures
from cospadi.tables.metrics import METRICS
from cospadi.tables.numbers import divergence, percent, perplexity, size
from cospadi.tables.overview import write_overviews
from cospadi.tables.render import notes, paper_table, tables, write_tables
from cospadi.tables.style import colours, label_logarithmic, style
from cospadi.tables.table_picture import table_picture

TITLES = {"svd": "SVD", "svd_llm": "SVD-LLM", "cospadi": "CoSpaDi"}
PERPLEXITY = {
    "svd": {0.2: 112345.6, 0.3: "inf", 0.4: "nan"},
    "svd_llm": {0.2: 249.3, 0.3: 523.1, 0.4: 1209.9},
    "cospadi": {0.2: 74.4, 0.3: 142.2, 0.4: 401.0},
}


def measured(value, stderr=None, protocol="windows of 1024 tokens", **more):
    return {"value": value, "stderr": stderr, "protocol": protocol, **more}


def evaluation(ppl, accuracy, tasks=("arc_easy", "heldout_cloze"), limit=None):
    return {
        "room": "evaluation",
        "token_perplexity": measured(ppl, 0.5),
        "word_perplexity": measured(None if ppl is None else ppl if isinstance(ppl, str) else 1.7 * ppl, None, "words"),
        "kl_to_dense": measured(0.25, 0.01, "nats per token"),
        "top1_agreement": measured(0.75, 0.02, "same most likely token"),
        "average_accuracy": measured(accuracy, 0.01, "mean of the tasks", tasks=list(tasks)),
        "tasks": {
            task: {
                **measured(accuracy, 0.015, "0-shot_acc 50 %"),
                "metric": "acc,none",
                "n_documents": 100,
                "higher_is_better": True,
                "in_average": True,
                "all_metrics": {},
            }
            for task in tasks
        },
        "limit": limit,
        "seconds": 12.5,
        "peak_memory_mb": 900.25,
    }


def factorization(method, compression_ratio, layers, fallback=None, title=""):
    projections = [
        {
            "name": f"model.layers.{layer}.{projection}",
            "layer": layer,
            "projection": projection,
            "d_in": d_in,
            "d_out": 64,
            "kind": "sparse_dictionary" if method == "cospadi" else "low_rank",
            "atoms": 16 if method == "cospadi" else None,
            "sparsity": 8 if method == "cospadi" else None,
            "rank": None if method == "cospadi" else 12,
            "dense_bits": 16 * d_in * 64,
            "budget_bits": int(16 * d_in * 64 * (1 - compression_ratio)),
            "stored_bits": int(16 * d_in * 64 * (1 - compression_ratio)) - 5,
            "value_bits": 14 if method == "cospadi" else 16,
            "output_error": 0.1 * (layer + 1),
            "weight_error": 0.3,
            "seconds": 0.5,
            "fallback": fallback if layer == 0 and projection == "self_attn.q_proj" else None,
        }
        for layer in layers
        for projection, d_in in (("self_attn.q_proj", 64), ("mlp.down_proj", 192))
    ]
    settings = {"name": method, "title": title or TITLES[method], "compression_ratio": compression_ratio}
    settings |= {"solver": "htp"} if method == "cospadi" else {}
    calibration = {"n_samples": 64, "sample_length": 1024, "seed": 42, "text": {"title": "Lee news"}}
    return {
        "room": "factorization",
        "settings": {"factorization": settings, "calibration": calibration},
        "projections": projections,
        "seconds": 3.25,
        "peak_memory_mb": 500.0 + layers[0],
    }


def cell(method, compression_ratio, ppl=None, accuracy=0.4, model="small", fallback=None, **more):
    return Cell(
        model,
        {"small": "Small-1M"}.get(model, model),
        method,
        TITLES[method],
        compression_ratio,
        [factorization(method, compression_ratio, layers, fallback) for layers in ([0, 1], [2, 3])],
        evaluation(PERPLEXITY[method][compression_ratio] if ppl is None else ppl, accuracy, **more),
    )


def dense(model="small", **more):
    return Cell(
        model, {"small": "Small-1M"}.get(model, model), "dense", "Dense", None, [], evaluation(22.55, 0.5, **more)
    )


def study(models=("small",), methods=tuple(TITLES), ratios=(0.2, 0.3, 0.4)):
    accuracies = {"svd": 0.25, "svd_llm": 0.36, "cospadi": 0.43}
    cells = [cell(m, r, accuracy=accuracies[m], model=model) for model in models for m in methods for r in ratios]
    return [*cells, *map(dense, models)]


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return summary(study())


def row(frame, method, compression_ratio):
    rows = frame[(frame["method"] == method) & (frame["compression_ratio"] == compression_ratio)]
    assert len(rows) == 1
    return rows.iloc[0]


def bold(table, column):
    i = [c.name for c in table.columns].index(column)
    return {(r.compression_ratio, r.method) for group in table.groups for r in group if r.entries[i].best}


def texts(table, column):
    i = [c.name for c in table.columns].index(column)
    return {(r.compression_ratio, r.method): r.entries[i].text for group in table.groups for r in group}


def pipe_rows(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[text.strip() for text in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


# the summary


def test_columns_and_order_of_rows(frame):
    assert tuple(frame.columns[: len(LEADING_COLUMNS)]) == LEADING_COLUMNS
    assert list(frame.columns[len(LEADING_COLUMNS) :][:2]) == ["arc_easy", "heldout_cloze"]
    assert list(frame["method"]) == ["dense", *["svd", "svd_llm", "cospadi"] * 3]
    assert list(frame["compression_ratio"]) == [0, *[0.2] * 3, *[0.3] * 3, *[0.4] * 3]


def test_values_are_those_of_the_records(frame):
    values = row(frame, "cospadi", 0.2)
    stored = 4 * ((int(16 * 64 * 64 * 0.8) - 5) + (int(16 * 192 * 64 * 0.8) - 5))
    assert (values["solver"], values["bits"], values["stored_bits"]) == ("htp", 14, stored)
    assert values["stored_ratio"] == 1 - stored / (16 * 64 * (64 + 192) * 4)
    assert values["output_error_mean"] == pytest.approx(0.25, abs=1e-15)
    assert (values["factorize_seconds"], values["peak_memory_mb"]) == (6.5, 502.0)
    assert (values["token_perplexity"], values["token_perplexity_stderr"], values["arc_easy"]) == (74.4, 0.5, 0.43)
    assert (values["evaluate_seconds"], values["fallbacks"]) == (12.5, 0)
    assert row(frame, "svd", 0.3)["token_perplexity"] == math.inf
    assert math.isnan(row(frame, "svd", 0.4)["token_perplexity"])
    assert row(frame, "svd", 0.2)["solver"] == ""


def test_the_dense_row_has_no_errors_and_its_own_memory(frame):
    values = row(frame, "dense", 0)
    assert (values["stored_ratio"], values["peak_memory_mb"], values["bits"]) == (0, 900.25, 16)
    assert values["stored_bits"] == values["dense_bits"] == 16 * 64 * (64 + 192) * 4
    assert pd.isna(values["output_error_mean"])
    assert pd.isna(values["factorize_seconds"])


def test_reads_back_from_csv_to_the_last_bit(tmp_path):
    cells = study(models=("small", "other"))
    cells[0].evaluation["token_perplexity"]["value"] = 1 / 3 * 1e5
    cells[1].evaluation["limit"] = 100
    cells[2].evaluation["tasks"]["arc_easy"]["value"] = 0.1 + 0.2
    frame = summary(cells)
    write_tables(cells, tmp_path, tables(cells, "Study"))
    pd.testing.assert_frame_equal(read_summary(tmp_path / "summary.csv"), frame, check_exact=True)


def test_every_projection_is_a_row():
    cells = [cell("cospadi", 0.2, fallback="damping raised"), dense()]
    errors = projection_errors(cells)
    assert tuple(errors.columns) == PROJECTION_COLUMNS
    assert len(errors) == 8
    assert list(errors["fallback"]) == ["damping raised", *[""] * 7]
    assert errors["rank"].isna().all()
    assert list(errors["output_error"]) == [0.1, 0.1, 0.2, 0.2, pytest.approx(0.3), pytest.approx(0.3), 0.4, 0.4]


def test_two_cells_of_one_row_are_refused():
    with pytest.raises(UserError, match="same row"):
        summary([cell("svd", 0.2), cell("svd", 0.2)])


def test_a_model_without_rows_is_named(frame):
    with pytest.raises(UserError, match=r"no row of model large\. It has: small"):
        paper_table(frame, "large")


# best values


def test_best_per_ratio_is_bold(frame):
    table = paper_table(frame, "small")
    assert bold(table, "token_perplexity") == {(0.2, "cospadi"), (0.3, "cospadi"), (0.4, "cospadi")}
    assert bold(table, "average_accuracy") == {(0.2, "cospadi"), (0.3, "cospadi"), (0.4, "cospadi")}
    assert bold(table, "stored_ratio") == bold(table, "factorize_seconds") == set()


def test_ties_are_bold_together_but_not_all_of_them(frame):
    assert bold(paper_table(frame, "small"), "kl_to_dense") == set()
    cells = study(ratios=(0.2,))
    cells[0].evaluation["kl_to_dense"] = measured(0.5, 0.01)
    assert bold(paper_table(summary(cells), "small"), "kl_to_dense") == {(0.2, "svd_llm"), (0.2, "cospadi")}


def test_what_is_not_finite_is_never_bold():
    cells = [cell("svd", 0.2, ppl="inf"), cell("svd_llm", 0.2, ppl="nan"), cell("cospadi", 0.2, ppl=74.4)]
    cells += [cell("svd", 0.3, ppl="inf"), cell("svd_llm", 0.3, ppl="nan")]
    table = paper_table(summary(cells), "small")
    assert bold(table, "token_perplexity") == {(0.2, "cospadi")}
    assert texts(table, "token_perplexity")[0.2, "svd"] == "inf"
    assert texts(table, "token_perplexity")[0.2, "svd_llm"] == "nan"


def test_a_lone_method_is_not_best_of_anything():
    table = paper_table(summary([cell("cospadi", 0.3)]), "small")
    assert bold(table, "token_perplexity") == set()
    assert len(table.groups) == 1
    assert "Bold" not in table.markdown()


def test_what_was_not_measured_is_a_dash():
    cells = [cell("svd", 0.2, tasks=("arc_easy",)), cell("cospadi", 0.2)]
    table = paper_table(summary(cells), "small")
    assert texts(table, "heldout_cloze") == {(0.2, "svd"): "–", (0.2, "cospadi"): "40.0"}
    cells[0].evaluation["kl_to_dense"] = {"value": None, "stderr": None, "protocol": None}
    assert texts(paper_table(summary(cells), "small"), "kl_to_dense")[0.2, "svd"] == "–"


def test_tasks_of_another_model_leave_no_empty_column():
    cells = [cell("svd", 0.2, tasks=("arc_easy",)), cell("svd", 0.2, model="other", tasks=("piqa",))]
    assert "piqa" not in [column.name for column in paper_table(summary(cells), "small").columns]


# titles and notes


def test_the_title_tells_a_limit():
    cells = [cell("svd", 0.2, limit=100), cell("cospadi", 0.2, limit=100)]
    assert paper_table(summary(cells), "small").title == "Small-1M (limit: first 100 documents per task)"
    assert "limit" not in paper_table(summary([cell("svd", 0.2)]), "small").title


def test_a_fallback_gets_a_dagger_and_a_note():
    frame = summary([cell("svd", 0.2, fallback="damping raised to 1e-3"), cell("cospadi", 0.2)])
    assert row(frame, "svd", 0.2)["fallbacks"] == 1
    table = paper_table(frame, "small")
    assert [r.label for r in table.groups[0]] == ["SVD†", "CoSpaDi"]
    assert "† SVD at 0.2" in table.markdown()
    assert "1 × damping raised to 1e-3" in table.markdown()
    assert "†" not in paper_table(summary([cell("cospadi", 0.2)]), "small").markdown()


def test_notes_tell_each_protocol_once_and_the_calibration():
    note_lines = notes(study(), "small")
    assert note_lines.count("Calibration: Lee news, 64 samples × 1024 tokens, seed 42.") == 1
    assert "Token ppl: windows of 1024 tokens." in note_lines
    assert "ARC-e, Cloze: 0-shot_acc 50 %." in note_lines
    assert "Average over ARC-e, Cloze." in note_lines
    assert len(note_lines) == len(set(note_lines)) == 8


def test_notes_tell_whose_values_have_how_many_bits_only_where_they_differ():
    table = paper_table(summary(study()), "small").markdown()
    assert "Stored values have 16 bits (Dense; SVD; SVD-LLM), 14 bits (CoSpaDi)." in table
    assert "Stored values have 16 bits." in paper_table(summary(study(methods=("svd", "svd_llm"))), "small").markdown()


# formats


def test_markdown_says_the_same_numbers(frame):
    table = paper_table(frame, "small")
    head, *body = pipe_rows(table.markdown())
    assert head[:3] == ["Ratio", "Method", "ARC-e % ↑"]
    assert [line[0] for line in body] == ["–", "0.2", "", "", "0.3", "", "", "0.4", "", ""]
    at = head.index("Token ppl ↓")
    for line, (_, expected) in zip(body, frame.iterrows(), strict=True):
        assert line[1] == expected["method_title"]
        shown = float(line[at].strip("*"))
        assert shown == pytest.approx(expected["token_perplexity"], rel=0.05, nan_ok=True)
        assert float(line[2].strip("*")) == pytest.approx(100 * expected["arc_easy"], abs=0.05)
    assert body[3][at] == "**74.40**"
    assert "74.40** ± 0.50" in table.markdown(stderr=True)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.best = [], 0, 0

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        self.best += ("class", "best") in attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_escaped_and_alone(frame):
    table = paper_table(frame, "small", title="A <b> & c")
    page, tags = table.html(), Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.cells == 10 * (2 + len(table.columns))
    assert tags.best == page.count('class="best"') == table.markdown().count("**") // 2
    assert "A &lt;b&gt; &amp; c" in page
    assert "± 0.50" in page
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)


def test_csv_holds_exact_values(frame):
    lines = list(csv.DictReader(io.StringIO(paper_table(frame, "small").csv())))
    line_of = {(line["compression_ratio"], line["method"], line["column"]): line for line in lines}
    line = line_of["0.2", "svd", "token_perplexity"]
    assert (line["value"], line["stderr"], line["text"], line["best"]) == ("112345.6", "0.5", "1.1e5", "False")
    assert line_of["0.2", "cospadi", "token_perplexity"]["best"] == "True"
    assert line_of["0.3", "svd", "token_perplexity"]["value"] == "inf"
    assert line_of["0.4", "svd", "token_perplexity"]["value"] == "nan"


def test_writes_every_format_of_every_model(tmp_path):
    cells = study(models=("small", "other"))
    paths = write_tables(cells, tmp_path / "tables", tables(cells, "A study"))
    formats = [
        f"{model}{kind}" for model in ("small", "other") for kind in (".md", ".tex", "_paper.tex", ".html", ".csv")
    ]
    assert [path.name for path in paths] == ["summary.csv", "projections.csv", *formats]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    assert (tmp_path / "tables/small.md").read_text(encoding="utf-8").startswith("### A study: Small-1M\n")


# digits


@given(st.floats(min_value=1.0, max_value=1e30))
def test_a_printed_perplexity_is_near_and_short(value):
    shown = perplexity(value)
    assert float(shown) == pytest.approx(value, rel=0.0501)
    assert len(shown) <= 6
    assert float(shown) >= 100 or abs(float(shown) - value) <= 0.00501


@given(st.floats(min_value=1.0, max_value=1e12), st.floats(min_value=1.0, max_value=1e12))
def test_printing_keeps_the_order(one, other):
    for shown in (perplexity, divergence, size):
        assert (float(shown(one)) <= float(shown(other))) or one > other


@given(st.floats(min_value=0, max_value=1))
def test_percent_is_within_half_a_digit(value):
    assert abs(float(percent(value)) - 100 * value) <= 0.05 + 1e-9


@given(st.floats(min_value=1e-9, max_value=100))
def test_a_printed_divergence_is_near(value):
    assert float(divergence(value)) == pytest.approx(value, rel=0.0501)


@pytest.mark.parametrize("shown", [perplexity, divergence, size])
def test_what_is_not_finite_prints_as_it_is(shown):
    assert (shown(math.inf), shown(math.nan)) == ("inf", "nan")


# figures


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def check_pictures(paths):
    for path in paths:
        if path.suffix == ".png":
            image = pixels(path)
            assert image.shape[0] > 200
            assert image.shape[1] > 500
            assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20, path
        else:
            assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_figures_are_pictures_of_something(tmp_path):
    paths = write_figures(study(("small", "other"), ("svd", "cospadi"), (0.2, 0.4)), tmp_path)
    names = ["perplexity", "accuracy", "output_error", "pareto", "small_table", "other_table"]
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    check_pictures(paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_figures_of_one_method_at_one_ratio_from_frames(tmp_path):
    cells = study(methods=("cospadi",), ratios=(0.3,))
    check_pictures(write_figures((summary(cells), projection_errors(cells)), tmp_path))


def test_a_method_with_ratios_of_its_own_has_rows_of_its_own(tmp_path):
    cells = [*study(ratios=(0.2, 0.3)), cell("svd", 0.4375, ppl=99.0, model="small")]
    cells = [c for c in cells if c.method != "svd" or c.compression_ratio == 0.4375]
    frame = summary(cells)
    table = paper_table(frame, "small")
    assert [(r.compression_ratio, r.method) for group in table.groups[1:] for r in group] == [
        *((ratio, method) for ratio in (0.2, 0.3) for method in ("svd_llm", "cospadi")),
        (0.4375, "svd"),
    ]
    assert (0.4375, "svd") not in bold(table, "token_perplexity")  # nothing to compare it with
    assert {path.name for path in write_tables(cells, tmp_path, tables(cells, "Study"))} >= {
        "summary.csv",
        "small.md",
        "small.html",
    }
    check_pictures(write_figures(cells, tmp_path))
    assert "0.4375" in (tmp_path / "small.md").read_text()


def test_the_upper_axis_tells_what_projections_take_on_disk():
    cells = [dense(), *(cell("svd", ratio, model="small") for ratio in (0.2, 0.4))]
    frame = summary(cells)
    figure = figures._against_size(frame, METRICS["token_perplexity"])
    figure.draw_without_rendering()
    (panel,) = figure.axes
    (upper,) = panel.child_axes
    megabytes = frame["dense_bits"].max() / 8e6
    low, high = panel.get_xlim()
    assert sorted(upper.get_xlim()) == pytest.approx([megabytes * (1 - high), megabytes * (1 - low)])


def test_the_overview_has_methods_down_ratios_across_and_the_best_bold(tmp_path):
    cells = [
        dense(),
        cell("svd", 0.2, ppl=40.0, accuracy=0.25, model="small"),
        cell("svd", 0.3, ppl=50.0, accuracy=0.25, model="small"),
        cell("cospadi", 0.2, ppl=30.0, accuracy=0.375, model="small"),
    ]
    (path,) = write_overviews(cells, tmp_path)
    assert path.name == "small_overview.md"
    first, _, third = path.read_text(encoding="utf-8").strip().split("\n\n")
    titles = {c.method: c.method_title for c in cells}
    assert first.splitlines() == [
        "| Token perplexity ↓ | 0.2 | 0.3 |",
        "| :-- | --: | --: |",
        "| Dense | 22.55 |  |",
        f"| {titles['svd']} | 40.00 | 50.00 |",
        f"| {titles['cospadi']} | **30.00** |  |",
    ]
    assert third.splitlines()[-1] == f"| {titles['cospadi']} | **37.5** |  |"


def test_the_error_maps_are_at_a_ratio_that_most_methods_have(tmp_path):
    ratios = {"svd": (0.2,), "svd_llm": (0.3, 0.4), "cospadi": (0.3, 0.4)}
    cells = [cell(method, ratio, model="small") for method in ratios for ratio in ratios[method]]
    with_all = _error_maps(summary(cells), projection_errors(cells))
    titles = {panel.get_title() for panel in with_all.axes} - {""}
    assert titles == {"SVD-LLM", "CoSpaDi"}
    assert "ratio 0.3" in with_all.axes[-1].get_ylabel()


def test_figures_where_nothing_is_finite_or_measured(tmp_path):
    cells = [cell("svd", 0.3, ppl="nan", accuracy=None), cell("cospadi", 0.3, ppl="inf", accuracy=None)]
    cells[0].factorizations[0]["projections"][0]["output_error"] = "nan"
    cells[1].factorizations[0]["projections"][0]["output_error"] = None
    paths = write_figures(cells, tmp_path)
    assert all(path.stat().st_size > 1000 for path in paths)


def test_the_same_records_give_the_same_bytes(tmp_path):
    cells = study(methods=("cospadi",), ratios=(0.3,))
    one, other = (write_figures(cells, tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_a_method_keeps_its_colour_and_shares_it_with_none():
    methods = ["svd", "cospadi", *(f"method_{i}" for i in range(10))]
    assert len(set(colours(methods).values())) == 12
    assert colours(["cospadi"])["cospadi"] == colours(methods)["cospadi"]


def overlapping(boxes):
    """Pairs of texts' boxes that overlap."""
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@pytest.mark.parametrize("limits", [(0.078, 0.105), (0.03, 0.11), (14, 90), (22, 120_000), (1e-4, 1e9), (226, 258)])
def test_labels_of_a_logarithmic_axis_do_not_touch(limits):
    figure = Figure(figsize=(4.4, 4.3), layout="constrained")
    panel = figure.subplots()
    panel.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    for axis in (panel.xaxis, panel.yaxis):
        label_logarithmic(axis)
        figure.draw_without_rendering()
        labels = [
            label
            for tick, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            if limits[0] <= tick <= limits[1] and label.get_text()
        ]
        assert len(labels) >= 3
        assert not overlapping([label.get_window_extent() for label in labels])


@pytest.mark.parametrize("model", ["llama3_1b", "a_model_with_a_long_name"])
def test_titles_of_error_maps_leave_the_means_room(model):
    cells = study(("small", model, "third"))
    with style():
        figure = _error_maps(summary(cells), projection_errors(cells))
        figure.draw_without_rendering()
    panels = [panel for panel in figure.axes if panel.get_title("right")]
    assert len(panels) == 9
    for panel in panels:
        texts = [child for child in panel.get_children() if isinstance(child, Text)]
        title, mean = (
            next(text for text in texts if text.get_text() == panel.get_title(side)) for side in ("left", "right")
        )
        assert title.get_window_extent().x1 <= panel.get_window_extent().x1
        title.set_text(title.get_text().rpartition("\n")[2])  # the mean is at the right of the last line
        assert not title.get_text() or not overlapping([title.get_window_extent(), mean.get_window_extent()])


def test_the_picture_of_a_table_has_the_standard_errors(frame):
    drawn = {text.get_text() for text in table_picture(paper_table(frame, "small")).texts}
    assert {"74.40", "± 0.50", "±: one standard error."} <= drawn
