"""``cospadi evaluate``: any model on any text, beside the dense one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cospadi
from cospadi import cli, models
from cospadi.api import compress_to
from cospadi.evaluation.perplexity import measure_tokens, token_windows
from cospadi.pipeline import measurement
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.settings import ModelConfig

ROOT = Path(__file__).parents[2]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SETTINGS = [
    "factorization=svd_llm",
    "calibration.n_samples=8",
    "calibration.sample_length=32",
    "calibration.damping=1e-3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model, the same one smaller, and a text that neither has seen."""
    folder = tmp_path_factory.mktemp("measurement")
    prepare_model(ModelConfig("dense", "dense", "random:llama", architecture=TINY), folder / "dense")
    (folder / "seen.txt").write_text("A line is a document, and this one is repeated.\n" * 60)
    (folder / "unseen.txt").write_text("".join(f"Story {i} is about {i * i} birds that sing.\n" for i in range(60)))
    compress_to(str(folder / "dense"), folder / "small", SETTINGS, str(folder / "seen.txt"))
    return folder


@pytest.fixture
def evaluated(folder, monkeypatch, capsys):
    """A function: what the command prints as JSON."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        assert cli.main(["evaluate", *arguments, "--text", "unseen.txt", "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_it_measures_what_the_functions_of_a_study_measure(folder, evaluated, tmp_path):
    dense, small = evaluated("small", "--dense", "dense")["models"]
    documents = (folder / "unseen.txt").read_text().splitlines()
    windows = token_windows(models.load_tokenizer(folder / "dense"), documents, 64)[: measurement.MOST_WINDOWS]
    cpu = torch.device("cpu")
    before = measure_tokens(
        models.load(folder / "dense", "float32", cpu), windows, write_reference=tmp_path / "r", quiet=True
    )
    after = measure_tokens(cospadi.load(folder / "small", "float32"), windows, tmp_path / "r", quiet=True)
    assert (dense["n_windows"], dense["window"]) == (8, 64)  # the positions that the model has
    for measured, expected in ((dense, before), (small, after)):
        value, stderr = measured["token_perplexity"]
        assert value == pytest.approx(expected["token_perplexity"]["value"], rel=1e-5)
        assert stderr == pytest.approx(expected["token_perplexity"]["stderr"], rel=1e-3)
    assert small["kl_to_dense"][0] == pytest.approx(after["kl_to_dense"]["value"], rel=1e-3)
    assert small["kl_to_dense"][0] > 0
    log_ratio = math.log(small["token_perplexity"][0] / dense["token_perplexity"][0])
    assert small["nll_over_dense"][0] == pytest.approx(log_ratio, rel=1e-4)
    assert small["file_bytes"] == (folder / "small" / "model.safetensors").stat().st_size
    n_parameters = models.load(folder / "dense", "float32", cpu).num_parameters()
    assert small["bits16_bytes"] == dense["bits16_bytes"] == 2 * n_parameters


def test_a_model_is_as_good_as_itself_and_needs_no_other(evaluated):
    _, again = evaluated("dense", "--dense", "dense")["models"]
    assert again["kl_to_dense"][0] == pytest.approx(0, abs=1e-9)
    assert again["top1_agreement"][0] == 1
    assert again["nll_over_dense"] == [0, 0]
    (alone,) = evaluated("small")["models"]
    assert alone["kl_to_dense"] is alone["bits16_bytes"] is None


def test_settings_say_which_windows(evaluated):
    report = evaluated("small", "--set", "evaluation.window=32", "--set", "evaluation.n_windows=3")
    (small,) = report["models"]
    assert (small["n_windows"], small["window"]) == (3, 32)
    assert small["tasks"] == {}


def test_the_table_is_for_people(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(["evaluate", "small", "--dense", "./dense", "--text", "unseen.txt", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "| ./dense | small |" in table
    for row in ("Token perplexity", "KL to dense", "Same first choice", "Of the dense model in 16 bits", "Tokens/s"):
        assert f"| {row}" in table
    assert "8 × 64 tokens of" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--text", "unseen.txt"], "nowhere is neither an existing path nor a hub id"),
        (["small", "--text", "nowhere.txt"], "nowhere.txt"),
        (["small", "--text", "unseen.txt", "--set", "evaluation.n_windows=10000"], "too few for 10000 windows"),
        (["small", "--dense", "other", "--text", "unseen.txt"], "another text"),
        (["small", "--text", "unseen.txt", "--tasks", "no_such_task"], "no_such_task"),
    ],
)
def test_mistakes_are_one_sentence(folder, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(folder)
    if not (folder / "other").exists():
        other = TINY | {"hidden_size": 48}
        prepare_model(ModelConfig("other", "other", "random:llama", architecture=other), folder / "other")
    assert cli.main(["evaluate", *arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error


def test_the_rules_of_a_study_reach_their_own_stage(tmp_path):
    """Their text is what it was before this command had the name: Snakemake would run every finished cell again."""
    command = [
        sys.executable,
        "-m",
        "cospadi",
        "evaluate",
        "model=tiny_llama",
        "--model",
        "none",
        "--documents",
        "none",
    ]
    command += ["--reference", "none", "--samples", "none", "--record", str(tmp_path / "record.json")]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "unrecognized arguments" not in run.stderr
    assert "none" in run.stderr.splitlines()[-1]


def test_tasks_without_lm_eval_are_refused_in_a_sentence(folder):
    """In a process of its own, which has no lm-eval: nothing there has been imported or cached before."""
    hidden = """
import importlib.metadata, importlib.util, sys
installed, found = importlib.metadata.version, importlib.util.find_spec
def version(package):
    if package == "lm-eval":
        raise importlib.metadata.PackageNotFoundError(package)
    return installed(package)
importlib.metadata.version = version
importlib.util.find_spec = lambda name, package=None: None if name == "lm_eval" else found(name, package)
from cospadi import cli
sys.exit(cli.main(["evaluate", "small", "--text", "unseen.txt", "--tasks", "arc_eazy"]))
"""
    run = subprocess.run([sys.executable, "-c", hidden], cwd=folder, check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert "error: --tasks needs lm-eval, which is not installed." in run.stderr
    assert "Traceback" not in run.stderr
