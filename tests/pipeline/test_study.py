"""The grid: what it contains, what a job depends on, and that mistakes are known before the first job."""

import json
import shlex
import subprocess
import sys
import time

import pytest

from cospadi import settings as config
from cospadi.errors import UserError
from cospadi.pipeline import study
from cospadi.pipeline.study import CellId, Study, parse_overrides

pytestmark = pytest.mark.slow

SMALL = ("study.models=[tiny_llama,tiny_qwen3]", "study.methods=[svd,asvd_search,cospadi]")


def smoke(*overrides: str) -> Study:
    return Study("smoke", [*SMALL, *overrides])


def mistake(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        smoke(*overrides)
    return str(caught.value)


@pytest.fixture(scope="module")
def plain() -> Study:
    return smoke()


def recipes(grid: Study) -> dict[tuple[str, ...], str]:
    """Every recipe of a study by the job it belongs to."""
    found = {("tables",): grid.recipe("tables"), ("tracking",): grid.recipe("tracking")}
    for text in grid.texts:
        found["text", text] = grid.recipe("text", text=text)
    for cell in grid.cells:
        for room in ("model", "calibration"):
            found[room, cell.model] = grid.recipe(room, model=cell.model)
        found["evaluation", cell.model] = grid.recipe("evaluation", model=cell.model)
        found["factorization", *vars(cell).values()] = grid.recipe("factorization", **vars(cell))
        if grid.searches_ranks(cell.method):
            found["sensitivity", cell.model] = grid.recipe("sensitivity", model=cell.model, method=cell.method)
    return found


def changed(plain: Study, *overrides: str) -> set[tuple[str, ...]]:
    before, after = recipes(plain), recipes(smoke(*overrides))
    assert set(before) == set(after)
    return {job for job in before if before[job] != after[job]}


SMOKE_QUANTIZATIONS = {"cospadi_plus": "int4", "cospadi_group": "float8"}


def test_the_cells_are_the_grid(plain):
    models, methods = ("tiny_llama", "tiny_qwen3"), ("svd", "asvd_search", "cospadi")
    own = {"plain": ("0.0", ["int8"])} | {m: ("0.3", ["none", q]) for m, q in SMOKE_QUANTIZATIONS.items()}
    expected = [
        CellId(model, method, ratio, quantization)
        for model in models
        for method in methods
        for ratio, chosen in [own.get(method, ("0.3", ["none"]))]
        for quantization in chosen
    ]
    assert plain.cells == expected
    for cell in plain.cells:
        composed = plain.config(**vars(cell))
        assert (composed.model.name, composed.factorization.name) == (cell.model, cell.method)
        assert composed.factorization.compression_ratio == 0.3


def test_a_cell_on_the_command_line_is_the_cell_of_the_grid():
    grid = smoke("study.compression_ratios=[0.2,0.30000001]", "factorization.rho=2", "evaluation.n_windows=3")
    assert {cell.ratio for cell in grid.cells} == {"0.2", "0.30000001"}
    for cell in grid.cells:
        assert config.load(shlex.split(grid.overrides_for(**vars(cell)))) == grid.config(**vars(cell))


def test_a_tiny_ratio_is_a_path_that_the_rules_know():
    import re

    grid = smoke("study.compression_ratios=[1e-05]")
    assert re.fullmatch(grid.wildcards["ratio"], grid.cells[0].ratio)


@pytest.mark.parametrize(
    ("per_job", "blocks"),
    [
        (1, ["000-000", "001-001", "002-002", "003-003", "004-004"]),
        (2, ["000-001", "002-003", "004-004"]),
        (3, ["000-002", "003-004"]),
        (7, ["000-004"]),
        ("null", ["000-004"]),
    ],
)
def test_blocks_of_layers_cover_the_model_once(per_job, blocks):
    five = ("model.n_layers=5", "model.architecture.num_hidden_layers=5")
    grid = smoke("study.models=[tiny_llama]", f"study.layers_per_job={per_job}", *five)
    assert grid.layers(grid.cells[0]) == blocks
    assert len(grid.factors(grid.cells[0], "json")) == len(blocks)


def test_tables_are_made_of_every_cell(plain):
    inputs = plain.inputs_of_tables()
    assert (
        len(inputs) == len(set(inputs)) == 2 + 6 + 6 * 2 + 2 * 2
    )  # dense, evaluations, two blocks each, rank searches
    assert inputs[0] == "results/evaluation/tiny_llama/dense/smoke/record.json"


@pytest.mark.parametrize(
    ("override", "rooms"),
    [
        ("evaluation.n_windows=3", {"evaluation"}),
        ("evaluation.revision=9", {"evaluation"}),
        ("calibration.n_samples=15", {"calibration"}),
        ("calibration.revision=9", {"calibration"}),
        ("calibration.damping=0.01", {"factorization"}),
        ("calibration.text.max_documents=5", {"text"}),
        ("factorization.revision=9", {"factorization", "sensitivity"}),
        ("factorization.seed=1", {"factorization", "sensitivity"}),
        ("model.revision=2", {"model"}),
        ("model.seed=1", {"model"}),
        ("study.title=other", {"tables"}),
        ("model.title=other", {"tables"}),
        ("tracking.project=other", {"tracking"}),
        ("tracking=offline", {"tracking"}),
    ],
)
def test_a_setting_changes_only_the_rooms_that_read_it(plain, override, rooms):
    jobs = changed(plain, override)
    assert {job[0] for job in jobs} == rooms
    if "text" not in rooms:
        assert jobs == {job for job in recipes(plain) if job[0] in rooms}  # all jobs of these rooms


@pytest.mark.parametrize(
    ("override", "methods"),
    [
        ("factorization.rho=2", {"cospadi"}),
        ("factorization.n_rounds=3", {"cospadi"}),
        ("factorization.alpha=0.7", {"asvd_search"}),
    ],
)
def test_a_setting_of_one_method_changes_only_its_cells(plain, override, methods):
    cells = {job[2] for job in changed(plain, override) if job[0] == "factorization"}
    assert cells == methods


def test_another_ratio_leaves_the_rank_search_alone():
    found = [recipes(smoke(f"study.compression_ratios=[{ratio}]"))["sensitivity", "tiny_llama"] for ratio in (0.2, 0.3)]
    assert found[0] == found[1]


def test_a_method_may_have_ratios_of_its_own(plain):
    grid = smoke(
        "study.methods=[svd,wanda_2_4]", "study.compression_ratios=[0.2,0.3]", "+study.ratios_of.wanda_2_4=[0.4375]"
    )
    assert [(c.method, c.ratio) for c in grid.cells if c.model == "tiny_llama"] == [
        ("svd", "0.2"),
        ("svd", "0.3"),
        ("wanda_2_4", "0.4375"),
    ]
    for cell in grid.cells:
        assert f"{cell.ratio}" == f"{grid.config(**vars(cell)).factorization.compression_ratio}"
        assert grid.evaluation_record(cell) in grid.inputs_of_tables()
        assert config.load(shlex.split(grid.overrides_for(**vars(cell)))) == grid.config(**vars(cell))
    assert plain.study.ratios_of == {"plain": [0.0]}


def test_every_method_has_every_quantization_and_files_of_its_own():
    grid = smoke("study.methods=[svd]", "study.quantizations=[none,int8]", "study.models=[tiny_llama]")
    plain, quantized = grid.cells
    assert (plain.folder, quantized.folder) == ("svd-0.3", "svd-0.3-int8")
    assert grid.factors(quantized, "json")[0].startswith("results/quantization/tiny_llama/smoke/svd-0.3-int8/")
    assert grid.earlier_records(quantized) == grid.factors(plain, "json")
    assert grid.earlier_records(plain) == []
    assert grid.cell("tiny_llama", "svd", "0.3", "-int8") == quantized
    assert grid.cell("tiny_llama", "svd", "0.3", "") == plain
    assert {*grid.factors(plain, "json"), *grid.factors(quantized, "json")} <= set(grid.inputs_of_tables())
    assert "quantization=int8" in grid.overrides_for(**vars(quantized))
    named = {"model": "tiny_llama", "method": "svd", "ratio": "0.3"}
    coarse = smoke("study.methods=[svd]", "study.quantizations=[none,int8]", "quantization.group_size=64")
    for room in ("factorization", "evaluation", "calibration"):
        assert coarse.recipe(room, **named) == grid.recipe(room, **named)
    assert coarse.recipe("quantization", **named, quantization="int8") != grid.recipe(
        "quantization", **named, quantization="int8"
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantization=int8", "quantization=int8 has no effect on a whole study. Set study.quantizations=[int8]"),
        ("study.quantizations=[none,int99]", "quantization=int99 does not exist"),
        ("study.quantizations=[]", "study.quantizations is empty"),
        ("study.quantizations=[int8,int8]", "study.quantizations names an entry twice"),
        (
            "+study.quantizations_of.svdd=[int8]",
            "study.quantizations_of.svdd names a method that does not exist. Did you mean svd?",
        ),
        ("study.quantizations=[truncated14]", "quantization.values=truncated14 is for the values of sparse methods"),
    ],
)
def test_bad_quantizations_are_known_before_the_first_job(override, words):
    assert words in mistake("study.methods=[svd]", override)


def test_a_ratio_that_a_method_cannot_have_is_known_before_the_first_job():
    told = mistake("study.methods=[svd,wanda_2_4]", "study.compression_ratios=[0.2,0.5]")
    assert told.startswith("factorization.pattern=2:4 removes 0.4375")
    assert "factorization.compression_ratio=0.5" in told
    assert ".pattern=2:4 removes" in mistake("study.methods=[svd,wanda_2_4]", "+study.ratios_of.wanda_2_4=[0.45]")


@pytest.mark.parametrize(
    ("ratios_of", "sentence"),
    [
        ("svdd=[0.3]", "study.ratios_of.svdd names a method that does not exist. Did you mean svd?"),
        ("svd=[]", "study.ratios_of.svd is empty"),
        ("svd=[0.3,0.3]", "study.ratios_of.svd names an entry twice"),
        ("svd=[3]", "factorization.compression_ratio=3 is not between 0 and 1"),
    ],
)
def test_ratios_of_a_method_are_checked(ratios_of, sentence):
    assert mistake(f"+study.ratios_of.{ratios_of}").startswith(sentence)


def test_a_study_with_ratios_of_its_methods_can_be_narrowed_down():
    grid = Study("rivals", ["study.methods=[svd_llm,wanda]"])
    assert [(c.method, c.ratio) for c in grid.cells] == [
        *(("svd_llm", ratio) for ratio in ("0.2", "0.3", "0.4", "0.5")),
        *(("wanda", ratio) for ratio in ("0.2", "0.3", "0.4", "0.4375", "0.5")),
    ]


def test_a_recipe_is_canonical_json(plain):
    for recipe in recipes(plain).values():
        assert json.dumps(json.loads(recipe), sort_keys=True) == recipe


@pytest.mark.parametrize("title", ["my model", "it's", 'so "called"', "a $HOME * ; b", "ratio = 3"])
def test_any_text_survives_the_shell(title):
    value = "'" + title.replace("'", "\\'") + "'"
    given = parse_overrides(shlex.join([f"model.title={value}"]))
    grid = smoke(*given)
    typed = f"{sys.executable} -c 'import sys; print(sys.argv[1:])' {grid.overrides_for()}"
    seen = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=True).stdout
    assert config.load(eval(seen)).model.title == title


def test_overrides_come_as_a_string_or_a_list():
    assert parse_overrides(None) == []
    assert parse_overrides("a=1  b='x y'") == ["a=1", "b=x y"]
    assert parse_overrides(["a=1", "b=x y"]) == ["a=1", "b=x y"]


def test_all_mistakes_are_told_at_once():
    told = mistake(
        "study.compression_ratios=[0.2,20,-0.1]",
        "study.models=[tiny_llama,nope]",
        "study.methods=[svd,cospady,cospadi]",
        "factorization.rho=0",
    ).splitlines()
    assert len(told) == len(set(told)) == 5
    for wanted in ("ratio=20 ", "ratio=-0.1 ", "model=nope ", "cospady does not exist. Did you mean", ".rho=0"):
        assert sum(wanted in line for line in told) == 1


def test_a_setting_that_no_method_has_is_refused():
    told = mistake("factorization.rhoo=2")
    assert told.startswith("No method of study smoke has the setting factorization.rhoo. Did you mean rho?")
    assert "factorization.alpha" in mistake("study.methods=[svd]", "factorization.alpha=1")


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("factorization.compression_ratio=0.9", "study.compression_ratios=[0.9]"),
        ("model=tiny_llama", "study.models=[tiny_llama]"),
        ("factorization=svd", "study.methods=[svd]"),
        ("study=default", "study=default"),
    ],
)
def test_a_setting_that_the_grid_would_overrule_is_refused(override, instead):
    told = mistake(override)
    assert told.startswith(f"{override} has no effect")
    assert instead in told


def test_an_unknown_study_is_refused():
    with pytest.raises(
        UserError,
        match=r"study=nope does not exist.*default, groups, kick, paper_llama, paper_qwen, quantization, rivals, smoke",
    ):
        Study("nope")


def test_a_model_of_unknown_depth_is_refused():
    assert "model.n_layers" in mistake("model.source=someone/unseen", "model.n_layers=null")


def test_planning_loads_no_heavy_library():
    code = (
        "import sys; from cospadi.pipeline.study import Study; Study('default');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_planning_the_default_study_is_quick():
    started = time.process_time()
    Study("default")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("visible", "n"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2)])
def test_gpus_are_counted_as_they_are_shown(monkeypatch, visible, n):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert study.n_gpus() == n
