"""``cospadi bench pipeline``."""

import json

import pytest

from cospadi import cli
from cospadi.errors import UserError
from cospadi.pipeline.profile import measure
from cospadi.pipeline.study import Study

OF_ONE = "study.models=[tiny_llama] study.methods=[svd,cospadi_fast] +study.quantizations_of.cospadi_fast=[int4] study.ratios_of={}"


def test_every_stage_of_a_study_is_measured(tmp_path, capsys):
    file = tmp_path / "rows.json"
    command = ["bench", "pipeline", "--study", "smoke", "--overrides", OF_ONE, "--threads", "1", "--json", str(file)]
    assert cli.main(command) == 0
    rows = json.loads(file.read_text())
    parts = [row["part"] for row in rows if row["stage"] in ("factorization", "quantization")]
    assert parts == ["losses of cospadi_fast", "svd-0.3", "cospadi_fast-0.3", "cospadi_fast-0.3-int4"]
    assert {row["stage"] for row in rows} == {
        *("sources", "calibration", "factorization", "quantization", "packing", "unpacking", "evaluation")
    }
    for row in rows:
        assert row["seconds"] > 0
        assert row["core_seconds"] > 0
        assert row["peak_memory_mb"] > 100
        assert row["gflops"] is None or 0 < row["gflops"] < row["peak_gflops"]
    calibrated, _ = [row for row in rows if row["stage"] == "calibration"]  # and going back
    assert calibrated["study_core_seconds"] == pytest.approx(2 * calibrated["core_seconds"])  # one block of two
    assert "minutes on the" in capsys.readouterr().out


@pytest.mark.parametrize("blocks", [0, 3])
def test_more_blocks_than_the_model_has_are_refused(blocks, tmp_path):
    with pytest.raises(UserError, match="tiny_llama has 2: set 1 to 2"):
        measure(Study("smoke"), "tiny_llama", blocks, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "x"], "--model x is not in study default"),
        (["a.b=1"], "unrecognized arguments: a.b=1"),
        (["--overrides", "study.methods=[nope]"], "nope"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    try:
        code = cli.main(["bench", "pipeline", *arguments])
    except SystemExit as error:
        code = error.code
    assert code
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
