"""``cospadi bench inference``: compressed models beside the dense one, and stacks of random projections."""

import json

import pytest

from cospadi import cli
from cospadi.bench import cases
from cospadi.sources.shapes import Shape

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense tiny checkpoint and a compressed one of it."""
    parent = tmp_path_factory.mktemp("inference")
    command = ["compress", "tiny_llama", str(parent / "small"), "--ratio", "0.3", "--keep-work"]
    assert cli.main([*command, "--set", "calibration=smoke"]) == 0
    return parent / "small.work" / "model", parent / "small"


def test_models_are_compared(folders, tmp_path, capsys):
    dense, small = folders
    command = ["bench", "inference", str(small), "--dense", str(dense), "--rounds", "1", "--tokens", "3"]
    files = ["--prefill", "32", "--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md")]
    assert cli.main([*command, *files]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["model"] for row in rows] == ["dense", "small"]
    assert rows[0]["decode_1_to_dense"] == 1
    assert 0.3 <= rows[1]["removed"] < 0.4
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"]
    assert rows[1]["tensor_bytes"] < rows[0]["tensor_bytes"]
    assert all(rows[1][f"{job}_tokens_per_s"] > 0 for job in ("prefill", "decode_1", "decode_16"))
    assert (tmp_path / "b.md").read_text() in capsys.readouterr().out


def test_a_shape_is_measured_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cases.SHAPES, "tiny", Shape(32, 48, 32, 16, layers=1, vocabulary=64, tied=True))
    command = ["bench", "inference", "--shape", "tiny", "--ratios", "0.3,0.5", "--rounds", "1", "--prefill", "20"]
    assert cli.main([*command, "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [(row["model"], row["ratio"]) for row in rows] == [
        ("dense", 0.0), ("svd_llm", 0.3), ("cospadi", 0.3), ("svd_llm", 0.5), ("cospadi", 0.5)
    ]  # fmt: skip
    weights = 4 * 32 * (2 * 32 + 2 * 16 + 3 * 48)
    assert rows[0]["tensor_bytes"] == weights
    for row in rows[1:]:
        assert row["tensor_bytes"] <= (1 - row["ratio"]) * weights / 2  # 16 bits against 32
    assert "Decode 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name checkpoints and --dense"),
        (["--shape", "huge"], "--shape huge does not exist"),
        (["--shape", "smollm2-135m", "--ratios", "a"], "--ratios a is not a list"),
        (["--shape", "smollm2-135m", "--rounds", "0"], "--rounds 0 is too small"),
        (["nowhere", "--dense", "nowhere"], "not a checkpoint"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, sentence, capsys):
    assert cli.main(["bench", "inference", *words]) == 1
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
