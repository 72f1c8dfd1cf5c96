"""What a stranger typed at a wheel of this project, and got wrong answers to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import cospadi
from cospadi import api, cli
from cospadi.api import compress_to
from cospadi.errors import UserError
from cospadi.models import load_tokenizer
from cospadi.pipeline import outcome
from cospadi.settings import load, model_overrides
from cospadi.sources.checkpoints import prepare_model

SETTINGS = ["calibration.n_samples=4", "calibration.sample_length=64", "calibration.damping=1e-3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("A line is a document, and this one is repeated.\n" * 60)
    return str(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text) -> Path:
    """``dense`` and ``small`` in a folder."""
    folder = tmp_path_factory.mktemp("made")
    compress_to("tiny_llama", folder / "small", ["factorization=svd_llm", *SETTINGS], text, keep_work=True)
    shutil.copytree(folder / "small.work" / "model", folder / "dense", ignore=lambda *_: [".cospadi"])
    return folder


@pytest.fixture
def answer(capsys, monkeypatch):
    """The one sentence, with the usage or without, of a command that must fail."""
    monkeypatch.delenv("COSPADI_TRACEBACK", raising=False)

    def run(*arguments: str) -> str:
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
        assert code
        told = capsys.readouterr().err
        assert "Traceback" not in told
        return told.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--temperature", "0.8", "--seed", "99999999999999999999"], "--seed=99999999999999999999 is not a seed"),
        (["--temperature", "0.8", "--seed", "-1"], "--seed=-1 is not a seed"),
        (["--temperature", "nan"], "--temperature 0, or 0.001 or more"),
        (["--temperature", "inf"], "--temperature 0, or 0.001 or more"),
        (["--temperature", "1e-40"], "--temperature 0, or 0.001 or more"),
        (["--device", "mps"], "--device=mps is not a device that this runs on. Set it to auto, cpu or cuda."),
        (["--device", "meta"], "--device=meta is not a device"),
    ],
)
def test_generation_out_of_bounds_is_a_sentence(answer, made, options, sentence):
    assert sentence in answer("generate", str(made / "small"), "hi", "--tokens", "2", *options)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tiny_llama", "out", "--ratio", "30%"], "30% is not a number. Write a fraction with a point: 0.3"),
        (["tiny_llama", "out", "--ratio", "0,3"], "0,3 is not a number"),
        (["tiny_llama", "out", "--method", "SVD-LLM"], "Did you mean svd_llm?"),
        (["tiny_llama", "out", "--method", "cospadi+"], "Did you mean cospadi_plus?"),
        (["tiny_llama", "out", "--quantize", "int8,int4"], "quantization=int8,int4 names several, and one is wanted"),
        (["tiny_llama", "out", "--device", "cuda:7"], "calibration.device=cuda:7 is set, but torch sees"),
        (["tiny-llama", "out"], "tiny-llama is neither a model of `cospadi models` nor a folder here. Did you mean tiny_llama?"),
        (["Tiny_Llama", "out"], "Did you mean tiny_llama?"),
        (["any", "out"], "model.source=any is neither an existing path nor a hub id"),
        (["", "out"], "The name of the model is empty"),
        (["https://huggingface.co/Qwen/Qwen3-0.6B", "out"], "is the page of a hub id. Write Qwen/Qwen3-0.6B."),
        (["https://huggingface.co/Qwen/Qwen3-0.6B/tree/main", "out"], "Write Qwen/Qwen3-0.6B."),
        (["tiny_llama", "x" * 300], "File name too long. Check the paths of this command."),
        (["tiny_llama", "out", "--calibration", "file"], "does not exist"),
    ],
)  # fmt: skip
def test_a_mistyped_compression_is_a_sentence_whose_advice_holds(answer, tmp_path, monkeypatch, text, words, sentence):
    monkeypatch.chdir(tmp_path)
    given = [] if "--calibration" in words else ["--calibration", text]
    assert sentence in answer("compress", *words, *given, *SETTINGS)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"adapter_config.json": "{}"}, "holds an adapter"),
        ({"config.json": None, "adapter_config.json": "{}"}, "holds an adapter"),
    ],
)
def test_a_model_that_was_changed_by_hand_is_a_sentence(answer, made, tmp_path, text, edit, sentence):
    shutil.copytree(made / "dense", tmp_path / "edited")
    for name, value in edit.items():
        file = tmp_path / "edited" / name
        if not name.endswith(".json"):
            config = tmp_path / "edited" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
        elif value is None:
            file.unlink()
        else:
            file.write_text(value)
    told = answer("compress", str(tmp_path / "edited"), str(tmp_path / "out"), "--calibration", text, *SETTINGS)
    assert sentence in told


def test_a_gguf_file_is_told_apart(answer, tmp_path, text):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    told = answer("compress", str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--calibration", text)
    assert "is a GGUF file, whose weights are nearly always quantized" in told


def test_files_of_git_lfs_are_told_apart(answer, made, tmp_path, text):
    for folder in ("dense", "small"):
        shutil.copytree(made / folder, tmp_path / folder)
        (tmp_path / folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
    assert "git lfs pull" in answer("generate", str(tmp_path / "small"), "hi")
    told = answer("compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--calibration", text, *SETTINGS)
    assert "git lfs pull" in told


def test_a_config_that_is_no_json_is_not_called_another_folder(answer, made, tmp_path):
    shutil.copytree(made / "small", tmp_path / "edited")
    (tmp_path / "edited" / "config.json").write_text('{"a": 1,}')
    assert "config.json cannot be read as JSON (" in answer("info", str(tmp_path / "edited"))


def test_gpt_2_is_refused_without_advice_that_leads_nowhere(answer, tmp_path, text):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=257, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "gpt2")
    prepare_model(load(["model=tiny_llama"]).model, tmp_path / "llama")
    tokenizer = load_tokenizer(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    told = answer("compress", str(tmp_path / "gpt2"), str(tmp_path / "out"), "--calibration", text, *SETTINGS)
    assert "matrices are Conv1D layers" in told
    assert "--set" not in told
    with pytest.raises(UserError, match="gpt2 have Conv1D layers"):
        cospadi.compress(model, tokenizer, texts=["a"])


def test_a_model_without_a_head_is_named(made):
    model = AutoModel.from_pretrained(made / "dense")
    with pytest.raises(
        UserError, match=r"This LlamaModel has no head for tokens\. Load the model with AutoModelForCausalLM"
    ):
        cospadi.compress(model, load_tokenizer(made / "dense"), texts=["a"])


def test_a_compressed_model_is_neither_planned_nor_compared_with(answer, made, text):
    small = str(made / "small")
    assert "is compressed by cospadi already" in answer("plan", small)
    told = answer("evaluate", small, "--dense", small, "--text", text, "evaluation.n_windows=1")
    assert f"--dense {small} is a compressed model" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": torch.int8}, r"dtype=torch\.int8 holds no fractions"),
        ({"quantization_config": {}}, "says itself how"),
    ],
)
def test_loading_in_another_way_is_not_called_damage(made, options, sentence):
    with pytest.raises(UserError, match=sentence):
        cospadi.load(made / "small", **options)


def test_quotes_are_advised_where_a_text_is_typed(answer, made):
    assert answer("generate", str(made / "small"), "hello", "world").endswith(
        "Put quotes around a text that has blanks."
    )
    assert answer("info", str(made / "small"), "dense").endswith("unrecognized arguments: dense.")
    assert "calibration.seed=-1 is not a seed" in answer("compress", "tiny_llama", "x", "calibration.seed=-1")


def test_an_edited_format_version_does_not_ask_for_a_newer_program(answer, made, tmp_path):
    shutil.copytree(made / "small", tmp_path / "edited")
    config = tmp_path / "edited" / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"]["format_version"] = None
    config.write_text(json.dumps(content))
    assert "quantization_config was changed: its format_version is None. Copy it again." in answer(
        "info", str(tmp_path / "edited")
    )


def test_what_to_type_next_can_be_pasted(made, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "dense", "my model")
    command = ["compress", "./my model", "it's small", "--method", "svd_llm", "--no-measure", "--calibration", text]
    assert cli.main([*command, *SETTINGS]) == 0
    told = capsys.readouterr().out
    assert "cospadi generate 'it'\"'\"'s small' \"The" in told
    assert "cospadi evaluate 'it'\"'\"'s small' --dense './my model'" in told
    assert sorted(os.listdir()) == ["it's small", "my model"]  # no lock is left, and no work


def test_ctrl_c_while_measuring_leaves_a_whole_checkpoint(tmp_path, text, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(outcome, "measured", stopped)
    out = tmp_path / "out"
    compress_to("tiny_llama", out, ["factorization=svd_llm", *SETTINGS], text, measure=True)
    assert f"Not measured: stopped. {out} is whole" in capsys.readouterr().out
    assert (out / "README.md").is_file()
    assert os.listdir(tmp_path) == ["out"]
    cospadi.load(out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "tiny_llama"}, r"model is a str\. Give a loaded model"),
        ({"tokenizer": None}, r"tokenizer is a NoneType\. Give a loaded one"),
        ({"tokenizer": "m"}, r"tokenizer is a str"),
        ({"texts": [{"text": "a"}]}, r"texts holds a dict\. Give a list of strings"),
        ({"texts": [None]}, r"texts holds a NoneType"),
        ({"texts": [b"a"]}, r"texts holds a bytes"),
        ({"overrides": "calibration.n_samples=4"}, r"overrides is a str\. Give a list"),
        ({"overrides": {"calibration.n_samples": 4}}, r"overrides is a dict"),
    ],
)
def test_an_argument_of_another_kind_is_named(made, arguments, sentence):
    model = AutoModelForCausalLM.from_pretrained(made / "dense")
    given = {"model": model, "tokenizer": load_tokenizer(made / "dense"), **arguments}
    with pytest.raises(UserError, match=sentence):
        api._require_kinds(
            **{"texts": None, "overrides": (), **given}
        )  # what `compress` asks first; its types are checked here


def test_swapped_arguments_are_named(made):
    model = AutoModelForCausalLM.from_pretrained(made / "dense")
    with pytest.raises(UserError, match=r"model is a \w+\. Give a loaded model"):
        api.compress(load_tokenizer(made / "dense"), model)


def program(made: Path, *words: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cospadi", *words]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, errors="replace", **settings)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_answer_is_a_sentence(made):
    with open("/dev/full", "w") as full:
        run = program(made, "methods", stdout=full)
    assert (run.returncode, run.stderr) == (
        1,
        "error: No space left on device while writing the answer. Let it go to another place.\n",
    )


def test_no_output_at_all_is_no_fault(made):
    run = program(made, "methods", preexec_fn=lambda: os.close(1))
    assert (run.returncode, run.stderr) == (0, "")


def test_a_locale_without_the_letters_is_named(made):
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    words = ["generate", str(made / "small"), "café"]
    run = program(made, *words, env={**os.environ, **locale}, stdout=subprocess.PIPE)
    assert run.returncode == 2
    assert "Set PYTHONUTF8=1, and type it again." in run.stderr
    again = {**os.environ, **locale, "PYTHONUTF8": "1"}
    assert program(made, *words, "--tokens", "2", env=again, stdout=subprocess.PIPE).returncode == 0


def test_a_bad_address_of_the_hub_is_a_sentence(answer, tmp_path, monkeypatch, text):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "not a url")
    told = answer("compress", "Qwen/Qwen3-0.6B", str(tmp_path / "out"), "--calibration", text, *SETTINGS)
    assert "the hub cannot be reached from here" in told


def test_placeholders_are_no_models(capsys):
    assert cli.main(["models"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "any" not in names
    assert "tiny_llama" in names
    assert model_overrides("any")[0] == "model=any"  # a folder or hub id of that name
