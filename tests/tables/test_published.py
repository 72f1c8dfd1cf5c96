"""Numbers of papers beside ours: every name resolves, rows are marked and never take part in a comparison."""

import csv
import io

import pytest
import yaml
from cases import cases

from cospadi.errors import UserError
from cospadi.pipeline.study import Study
from cospadi.settings import CONF, PUBLISHED, load
from cospadi.tables import PUBLISHED_FILE
from cospadi.tables.cells import Cell, read_summary
from cospadi.tables.metrics import METRICS
from cospadi.tables.published import PREFIX, results, sources, with_published
from cospadi.tables.render import tables, write_tables

pytestmark = pytest.mark.slow

FACTS = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))
STUDIES = {"paper_llama": 400, "paper_qwen": 560}
"""Factorization jobs: 10 methods, 4 ratios, 10 and 14 blocks of at most 8 layers."""
ROWS = [(model, row) for model, rows in FACTS["results"].items() for row in rows]
MODEL = "llama_3_2_1b"


def evaluation(perplexity: float, accuracy: float) -> dict:
    measured = {
        "value": accuracy,
        "stderr": 0.01,
        "protocol": "0-shot",
        "metric": "acc_norm,none",
        "higher_is_better": True,
    }
    return {
        "word_perplexity": {"value": perplexity, "stderr": None, "protocol": "words"},
        "average_accuracy": {"value": accuracy, "stderr": 0.01, "tasks": ["piqa"]},
        "tasks": {"piqa": measured},
        "seconds": 1.0,
        "peak_memory_mb": 1.0,
    }


def cells() -> list[Cell]:
    about = MODEL, "Llama-3.2-1B"
    return [
        Cell(*about, "dense", "Dense", None, [], evaluation(11.6, 0.576)),
        Cell(*about, "svd_llm", "SVD-LLM", 0.2, [], evaluation(171.0, 0.371)),
        Cell(*about, "cospadi", "CoSpaDi", 0.2, [], evaluation(40.0, 0.45)),
    ]


@pytest.mark.parametrize(("model", "row"), ROWS, ids=lambda given: given if isinstance(given, str) else given["method"])
def test_every_name_of_a_published_number_resolves(model, row):
    assert (CONF / "model" / f"{model}.yaml").is_file()
    assert row["source"] in sources()
    assert row["method"] in FACTS["methods"]
    columns = {*load(["evaluation=paper"]).evaluation.tasks, *METRICS}
    assert set(row) - {"source", "method", "ratio"} <= columns
    assert 0 <= row["ratio"] < 1
    assert (row["ratio"] == 0) == (row["method"] == "dense")


def test_methods_of_ours_exist_and_settings_know_all_sources():
    for about in FACTS["methods"].values():
        assert "ours" not in about or (CONF / "factorization" / f"{about['ours']}.yaml").is_file()
    assert set(PUBLISHED) == set(sources())


def test_no_number_stands_twice():
    places = [(model, row["source"], row["method"], row["ratio"]) for model, row in ROWS]
    assert len(set(places)) == len(places)


def test_averages_are_those_of_their_tasks():
    tasks = [task for task in load(["evaluation=paper"]).evaluation.tasks if task != "wikitext"]
    for model, row in ROWS:
        if "piqa" in row:
            mean = sum(row[task] for task in tasks) / len(tasks)
            assert mean == pytest.approx(row["average_accuracy"], abs=0.1), (model, row)


@pytest.mark.parametrize("name", cases(STUDIES, {"paper_llama"}))
def test_the_papers_studies_compare_with_what_is_published(name):
    study = Study(name)
    assert sum(len(study.layers(cell)) for cell in study.cells) == STUDIES[name]
    calibration = study.root.calibration
    assert (calibration.n_samples, calibration.sample_length, calibration.seed) == (256, 1024, 42)
    assert (calibration.text.name, calibration.attention) == ("refinedweb", False)
    ours = {FACTS["methods"][row["method"]].get("ours") for model, row in ROWS if model in study.study.models}
    assert {"svd_llm", "cospadi_paper"} <= ours & set(study.study.methods)
    assert all(study.config(model).model.n_layers for model in study.study.models)


def test_tables_show_reference_rows_that_never_are_the_best():
    (plain,), (table,) = tables(cells()), tables(cells(), published=PUBLISHED)
    assert with_published(plain, []) is plain
    rows = {(row.compression_ratio, row.method): row for group in table.groups for row in group}
    ours = {key: row for key, row in rows.items() if not row.method.startswith(PREFIX)}
    assert str(list(ours.values())) == str([row for group in plain.groups for row in group])
    theirs = [row for key, row in rows.items() if key not in ours]
    assert len(theirs) == len(results(MODEL, PUBLISHED))
    assert all("(published [" in row.label for row in theirs)
    assert not any(entry.best for row in theirs for entry in row.entries)
    assert rows[0.2, "cospadi"].entries[0].best  # although ROCKET's is better
    shown = dict(
        zip([column.name for column in table.columns], rows[0.2, f"{PREFIX}rocket:rocket"].entries, strict=True)
    )
    assert [shown[name].text for name in ("piqa", "average_accuracy", "word_perplexity", "kl_to_dense")] == [
        "71.9",
        "52.4",
        "18",
        "–",
    ]
    assert [group[0].compression_ratio for group in table.groups] == [0, 0.2, 0.3, 0.4, 0.5]
    page = table.markdown()
    assert "arXiv:2509.22075v6" in page
    assert "COMPOT" not in page  # nothing of this model
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert {line["value"] for line in lines if line["method"] == f"{PREFIX}rocket:rocket"} >= {"0.524", "18.0", ""}


def test_the_summary_holds_what_was_measured_alone(tmp_path):
    write_tables(cells(), tmp_path, tables(cells(), "Study", published=PUBLISHED))
    assert set(read_summary(tmp_path / "summary.csv")["method"]) == {"dense", "svd_llm", "cospadi"}
    for suffix in ("md", "tex", "html", "csv"):
        assert "ROCKET" in (tmp_path / f"{MODEL}.{suffix}").read_text(encoding="utf-8")


def test_a_third_partys_figure_says_so():
    assert "summary by others" in sources()["compot"].note
    assert "summary by others" not in sources()["cospadi"].note


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match=r"study.published=nobody is not known"):
        Study("smoke", ["study.published=[nobody]", "study.methods=[svd]"])


def test_a_study_without_them_has_the_recipe_it_always_had():
    plain, with_them = (Study("smoke", ["study.methods=[svd]", *more]) for more in ([], ["study.published=[rocket]"]))
    assert plain.recipe("tables") != with_them.recipe("tables")
    assert "published" not in plain.recipe("tables")
