"""A size asked for is met, or refused with the bounds."""

import argparse

import pytest

from cospadi import cli
from cospadi.api import compress_to
from cospadi.checkpoint.ledger import ledger
from cospadi.cli.model import _size
from cospadi.errors import UserError
from cospadi.models import find_projections
from cospadi.pipeline.size import HEADER, TENSORS, other_bytes, ratio_of_size
from cospadi.settings import load
from cospadi.sources.checkpoints import prepare_model

SMALL = ["calibration=smoke", "factorization=svd_llm"]
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sized") / "model"
    config = load(["model=tiny_llama"]).model
    config.architecture = config.architecture | ARCHITECTURE
    prepare_model(config, folder)
    return folder


def allowance(folder) -> int:
    """Bytes that are set aside for the headers of the files."""
    return (HEADER + 120) * (TENSORS * len(ledger(folder)["projections"]) + 30)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("method", ["svd_llm", "cospadi_fast", "wanda"])
def test_a_size_is_met_and_used(model, tmp_path, method, dtype):
    settings = ["calibration=smoke", f"factorization={method}"]
    size = 700_000 if dtype is None else 620_000
    sizes = compress_to(str(model), tmp_path / "out", settings, dtype=dtype, size=size)
    assert sizes["file_bytes"] <= size
    assert sizes["file_bytes"] >= 0.98 * size - allowance(tmp_path / "out")
    ratio = sizes["record"]["factorization"]["compression_ratio"]
    assert sizes["removed"] == pytest.approx(ratio, abs=0.02)
    assert sizes["removed"] >= ratio - 1e-9


@pytest.mark.parametrize("method", ["cospadi_fast", "oats"])
def test_an_estimate_for_fewer_bits_is_near(model, tmp_path, method):
    settings = ["calibration=smoke", f"factorization={method}", "quantization=int8"]
    sizes = compress_to(str(model), tmp_path / "out", settings, size=480_000)
    assert sizes["file_bytes"] == pytest.approx(480_000, rel=0.1)


@pytest.mark.parametrize("method", ["plain", "wanda_2_4"])
def test_a_method_of_one_ratio_is_refused_before_anything_is_done(method, tmp_path):
    with pytest.raises(UserError, match=f"{method} has one alone"):
        compress_to("tiny_llama", tmp_path / "out", [f"factorization={method}"], size=10**6)
    assert not list(tmp_path.iterdir())


def test_what_is_not_compressed_is_counted_as_it_is_written(model, tmp_path):
    projections = find_projections(model, load(["model=tiny_llama"]).model)
    for dtype in (None, "float16"):
        sizes = compress_to(
            str(model), tmp_path / f"out-{dtype}", [*SMALL, "factorization.compression_ratio=0.3"], dtype=dtype
        )
        counted = other_bytes(model, projections, dtype)
        assert 0 <= counted - sizes["other_bytes"] <= allowance(tmp_path / f"out-{dtype}")


def test_what_cannot_be_is_refused_with_the_bounds(model):
    config = load(["model=tiny_llama", *SMALL])
    projections = find_projections(model, config.model)
    with pytest.raises(UserError, match=r"is more than is left when 1% of .* Ask for less"):
        ratio_of_size(config, model, projections, 10**9)
    with pytest.raises(UserError, match=r"cannot be reached: .* Ask for (\d+\.\d)MB or more") as told:
        ratio_of_size(config, model, projections, 1000)
    assert "--quantize int4" in str(told.value)
    assert "--dtype bfloat16" in str(told.value)
    with pytest.raises(UserError, match=r"or more, or store the factors in fewer bits .--quantize int4.[.]$"):
        ratio_of_size(config, model, projections, 1000, "float16")
    smallest = float(str(told.value).partition("Ask for ")[2].partition("MB")[0])
    assert ratio_of_size(config, model, projections, int(smallest * 1e6)) <= 0.95
    with pytest.raises(UserError, match="Ask for"):
        ratio_of_size(config, model, projections, int((smallest - 0.2) * 1e6))


def test_a_larger_size_removes_less(model):
    config = load(["model=tiny_llama", *SMALL])
    projections = find_projections(model, config.model)
    ratios = [ratio_of_size(config, model, projections, size) for size in (600_000, 700_000, 750_000)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratio_of_size(config, model, projections, 600_000, "bfloat16") < ratios[0]


@pytest.mark.parametrize("text", ["many", "", "-3MB", "0", "3 XB", "1..5GB", "1e999"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(argparse.ArgumentTypeError, match="200MB"):
        _size(text)


@pytest.mark.parametrize("ratio", [["--ratio", "0.3"], ["factorization.compression_ratio=0.3"]])
def test_a_size_and_a_ratio_are_one_too_many(ratio, tmp_path, capsys):
    assert cli.main(["compress", "tiny_llama", str(tmp_path / "out"), "--size", "1MB", *ratio]) == 1
    assert "Both a size and a ratio are given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
