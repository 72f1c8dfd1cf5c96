"""A mistake of the person typing is one sentence and exit code 1, never a traceback."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import cospadi
from cospadi import cli, settings
from cospadi.cli.command import STAGES
from cospadi.cli.model import SHELLS
from cospadi.errors import UserError, packages_of
from cospadi.factorization.files import read_factors
from cospadi.pipeline import run, sweep
from cospadi.records import read_json, write_json
from cospadi.settings import CONF

FILES = ["--grams", "g", "--factors", "f", "--record", "r"]
TINY = ["study=smoke", "model=tiny_llama"]


def options(folder, *names: str, **given: object) -> list[str]:
    """``--name folder/name`` for each name, and what is given as it is."""
    pairs = {**{name: folder / name for name in names}, **given}
    return [word for name, value in pairs.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run the command line and return its one sentence."""
    monkeypatch.delenv("COSPADI_TRACEBACK", raising=False)

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 1
        told = capsys.readouterr().err
        lines = [line for line in told.splitlines() if line.startswith("error: ")]
        assert told.splitlines()[-1:] == lines
        assert "Traceback" not in told
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny Llama of the smoke study, and its texts."""
    folder = tmp_path_factory.mktemp("sources")
    assert cli.main(["prepare-model", *TINY, *options(folder, "folder", "record")]) == 0
    text = ["prepare-text", "study=smoke", "text=smoke_calibration"]
    assert cli.main([*text, *options(folder, "documents", record=folder / "text.json")]) == 0
    return folder


def factorize(folder, *overrides: str, **given: object) -> list[str]:
    files = {"model": folder / "folder", "grams": folder / "grams", "layers": "000-000"} | given
    return ["factorize", *overrides, *options(folder, **files), *options(folder / "out", "factors", "record")]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("factorization.rhoo=3", "factorization.rhoo is not a setting. Did you mean rho?"),
        ("factorization.compression_ratio=20", "factorization.compression_ratio=20 is not between 0 and 1."),
        ("factorization=nope", "factorization=nope does not exist."),
    ],
)
def test_bad_settings_are_a_sentence(refused, tmp_path, override, sentence):
    assert refused(*factorize(tmp_path, override)).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_the_program_itself_exits_with_1(tmp_path):
    command = [sys.executable, "-m", "cospadi", *factorize(tmp_path, "factorization.rho=0")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: factorization.rho=0.0 is too small. Set 1 or more.\n"


def test_a_traceback_is_shown_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("COSPADI_TRACEBACK", "1")
    with pytest.raises(UserError, match=r"factorization\.rho"):
        cli.main(factorize(tmp_path, "factorization.rho=0"))


@pytest.mark.parametrize("arguments", [["nope"], [], ["factorize", "model=tiny_llama"], ["tabulate", "--fold", "x"]])
def test_an_unknown_stage_or_a_missing_file_option_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_missing_model_is_named(refused, tmp_path):
    assert str(tmp_path / "folder") in refused(*factorize(tmp_path, *TINY))


def test_missing_grams_are_named(refused, checkpoint):
    told = refused(*factorize(checkpoint, *TINY, "factorization=cospadi_outputs"))
    assert str(checkpoint / "grams") in told
    assert not (checkpoint / "out" / "factors").exists()


@pytest.mark.parametrize("layers", ["007-009", "abc", "1"])
def test_layers_that_the_model_does_not_have_are_named(refused, checkpoint, layers):
    assert layers in refused(*factorize(checkpoint, *TINY, layers=layers))


def test_an_unknown_family_lists_what_was_found(refused, checkpoint, tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(gpt2)
    AutoTokenizer.from_pretrained(checkpoint / "folder").save_pretrained(gpt2)
    settings = [*TINY, f"model.source={gpt2}", "model.n_layers=null"]
    told = refused("prepare-model", *settings, *options(tmp_path, "folder", "record"))
    assert "self_attn.q_proj" in told
    assert "attn.c_attn" in told
    assert not (tmp_path / "record").exists()


def test_a_hub_that_cannot_be_reached_is_a_sentence(refused, tmp_path):
    settings = [*TINY, "model.source=nobody-at-all/no-such-model"]  # tests run with HF_HUB_OFFLINE=1
    told = refused("prepare-model", *settings, *options(tmp_path, "folder", "record"))
    assert told.startswith("model.source=nobody-at-all/no-such-model could not be fetched")
    assert not list(tmp_path.iterdir())


def test_a_text_that_the_cell_does_not_use_is_refused(refused, tmp_path):
    told = refused("prepare-text", "study=smoke", "text=lee_news", *options(tmp_path, "documents", "record"))
    assert "smoke_calibration, smoke_evaluation" in told
    assert "text=<name>" in refused("prepare-text", "study=smoke", *options(tmp_path, "documents", "record"))


def calibrate(checkpoint, out, *overrides: str, **given: object) -> list[str]:
    files = {"model": checkpoint / "folder", "documents": checkpoint / "documents"} | given
    return ["calibrate", *TINY, *overrides, *options(out, **files), *options(out, "grams", "record")]


def test_a_text_too_short_says_what_would_fit(refused, checkpoint, tmp_path):
    told = refused(*calibrate(checkpoint, tmp_path, "calibration.n_samples=100000"))
    assert "12800000 are asked for" in told
    assert "calibration.n_samples" in told
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "none.json", [])
    assert "0 tokens" in refused(*calibrate(checkpoint, tmp_path, documents=tmp_path / "none.json"))


def test_activations_that_are_not_finite_are_named(refused, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "folder")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(broken)
    AutoTokenizer.from_pretrained(checkpoint / "folder").save_pretrained(broken)
    told = refused(*calibrate(checkpoint, tmp_path, model=broken))
    assert "model.layers.1.mlp.down_proj are not finite" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_the_stages_end_in_factors(checkpoint, tmp_path):
    assert cli.main(calibrate(checkpoint, tmp_path, "calibration.n_samples=2")) == 0
    assert len(list((tmp_path / "grams").glob("*.safetensors"))) == 2
    settings = [*TINY, "factorization=cospadi", "factorization.compression_ratio=0.4", "factorization.n_rounds=1"]
    assert cli.main(factorize(checkpoint, *settings, "calibration.damping=0.01", grams=tmp_path / "grams")) == 0
    record = read_json(checkpoint / "out" / "record")
    assert len(record["projections"]) == 7
    assert len(list(read_factors([checkpoint / "out" / "factors"]))) == 7
    assert json.dumps(record)


# --- manners


def test_help_groups_every_command_by_who_needs_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:") for group in ("your model", "studies", "measuring", STAGES)]
    assert places == sorted(places)
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command.name} +{re.escape(command.summary)}$", text, re.MULTILINE)


def test_a_mistyped_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compres", "a", "b"])
    assert ended.value.code == 2
    assert "compres is not a command. Did you mean compress?" in capsys.readouterr().err


def test_settings_stand_anywhere_among_the_options(refused, tmp_path):
    told = refused("compress", "tiny_llama", str(tmp_path / "out"), "--ratio", "0.3", "calibration.n_sampels=3")
    assert "Did you mean n_samples?" in told
    told = refused("factorize", "--layers", "0-0", "--model", "m", "calibration.n_sampels=3", *FILES)
    assert "Did you mean n_samples?" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compress", "a", "b", "ratio=0.3"], "ratio=0.3 is an option: --ratio 0.3"),
        (["generate", "a", "The", "capital"], "Put quotes around a text that has blanks."),
        (["info", "a", "calibration.n_samples=3"], "unrecognized arguments: calibration.n_samples=3"),
    ],
)
def test_what_a_command_does_not_take_is_named_under_its_own_usage(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.startswith(f"usage: cospadi {words[0]} ")


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_get_their_completion(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "cospadi" in capsys.readouterr().out


def test_commands_are_completed(tmp_path):
    """As a shell asks: the line in the environment, the answer in a file."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": "cospadi den",
        "COMP_POINT": "11",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }
    code = "from cospadi.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=False, capture_output=True)
    assert answer.read_text().strip() == "densify"


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        (["tabulate", "--folder", "t"], "pandas", "study"),
        (["track", "--folder", "t"], "wandb", "track"),
        (["evaluate-cell"], "lm-eval", "study"),
    ],
)
def test_a_command_names_the_extra_it_needs_before_it_starts(refused, monkeypatch, command, missing, extra):
    installed = importlib.metadata.version

    def version(package):
        if package == missing:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    if command == ["evaluate-cell"]:
        files = ("model", "documents", "reference", "samples", "record")
        command = [*command, *(word for name in files for word in (f"--{name}", "x"))]
    told = refused(*command)
    assert told.startswith(f"cospadi {command[0]} needs {missing}, which is not installed.")
    assert told.endswith(f"pip install '.[{extra}]'.")


def test_the_light_install_has_no_package_of_the_extras():
    light = {Requirement(line).name for line in importlib.metadata.requires("cospadi") if "extra ==" not in line}
    assert {"torch", "transformers", "numba", "hydra-core"} <= light
    assert not light & {*packages_of("study"), *packages_of("track")}


@pytest.mark.parametrize("program", ["cospadi.pipeline.run", "cospadi.pipeline.sweep"])
def test_a_study_away_from_the_repository_is_one_sentence(program, tmp_path):
    package = tmp_path / "site" / "cospadi"
    shutil.copytree(Path(cospadi.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CONF, package / "conf")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", program, *(["--cores", "1"] if program.endswith("run") else [])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: There is no Snakefile in ")
    assert "Studies need the project's repository" in line


@pytest.mark.parametrize(
    "words",
    [
        ["run", "study=smoke"],
        ["tabulate", "--folder", "t"],
        ["track", "--folder", "t"],
        ["workspace", "--definition", "w"],
    ],
)
def test_commands_for_studies_say_where_they_belong(refused, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert refused(*words).startswith(f"There is no Snakefile in {tmp_path}. Studies need the project's repository")
    assert not list(tmp_path.iterdir())


def test_run_hands_a_study_to_snakemake(monkeypatch):
    handed = []
    monkeypatch.chdir(CONF.parent)
    monkeypatch.setattr(run, "main", lambda arguments: handed.append(list(arguments)) or 3)
    study = ["study=smoke", "study.models=[tiny_llama]", "study.methods=[svd_llm]"]
    assert cli.main(["run", *study, "--cores", "2", "evaluation.n_windows=4", "--snakemake=--until calibrate"]) == 3
    (arguments,) = handed
    assert arguments[:4] == ["--cores", "2", "--until", "calibrate"]
    name, overrides = arguments[arguments.index("--config") + 1 :]
    assert name == "study=smoke"
    assert json.loads(overrides.removeprefix("overrides=")) == [*study[1:], "evaluation.n_windows=4"]


def test_sweep_is_a_multirun_of_hydra(monkeypatch):
    handed = []
    monkeypatch.setattr(sweep, "main", lambda arguments: handed.append(list(arguments)) or 0)
    assert cli.main(["sweep", "model=a,b", "factorization=svd_llm"]) == 0
    assert handed == [["--multirun", "model=a,b", "factorization=svd_llm"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8_shows_help_and_text(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(cospadi.__file__).parents[1])}
    for words in (["compress", "--help"], ["info", "Москва"]):
        command = [sys.executable, "-m", "cospadi", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        assert b"compress" in done.stdout + done.stderr


def test_a_folder_inside_the_model_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    told = refused("compress", str(tmp_path), str(tmp_path / "small"))
    assert "is inside the model's folder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_study_without_its_first_line_is_told_so(tmp_path, monkeypatch):
    folder = tmp_path / "conf"
    shutil.copytree(CONF, folder)
    study = folder / "study" / "smoke.yaml"
    study.write_text(study.read_text(encoding="utf-8").replace("# @package _global_", "#"), encoding="utf-8")
    monkeypatch.setattr(settings, "CONF", folder)
    with pytest.raises(UserError, match=r"smoke.yaml lacks a line that Hydra reads.* # @package _global_"):
        settings.load(["study=smoke"])


def test_a_closed_pipe_is_a_quiet_end(tmp_path):
    command = f"{sys.executable} -m cospadi plan study=smoke --tflops 100 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(Path(cospadi.__file__).parents[1])}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("# ")
    assert done.stderr == ""


def test_ctrl_c_is_a_sentence(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    commands = [replace(c, run=interrupted) if c.name == "info" else c for c in cli.COMMANDS]
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main(["info", "x"]) == 130
    assert "type the same command again" in capsys.readouterr().err


def test_methods_and_models_are_listed(capsys):
    assert cli.main(["methods"]) == 0
    methods = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in methods) == sorted(
        file.stem for file in (CONF / "factorization").glob("*.yaml")
    )
    assert any(line.startswith("svd_llm") and "SVD-LLM" in line for line in methods)
    assert cli.main(["models"]) == 0
    assert "smollm2_135m" in capsys.readouterr().out
