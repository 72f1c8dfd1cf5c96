"""What version 0.1.0 wrote before its modules moved is still good: checkpoints of every kind, and a study."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cospadi
from cospadi.checkpoint.ledger import ledger

ROOT = Path(__file__).parents[2]
EARLIER = ROOT / "tests" / "data" / "earlier"
CHECKPOINTS = EARLIER / "checkpoints"
STUDY = (
    "study.models=[tiny_llama] study.methods=[svd,cospadi_plus] study.quantizations_of={cospadi_plus:[none,int4]} "
    "study.ratios_of={} tracking=disabled"
)
"""The overrides under which `smoke_study.tar.gz` was computed."""
EVERY_STAGE = ("prepare_model", "prepare_text", "calibrate", "factorize", "quantize", "evaluate_dense", "evaluate")


@pytest.fixture
def one_thread():
    """As the logits were computed: another number of threads changes the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", sorted(folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()))
def test_an_earlier_checkpoint_gives_the_logits_it_gave(kind, one_thread):
    tokens = torch.arange(5, 41)[None]
    with torch.inference_mode():
        logits = cospadi.load(CHECKPOINTS / kind)(tokens).logits[0, ::7]
    expected = load_file(CHECKPOINTS / "logits.safetensors")[kind]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # CPUs differ in the last digits
    assert ledger(CHECKPOINTS / kind)["projection_bytes"] > 0


def test_the_earlier_checkpoints_are_of_every_kind():
    specs = [
        spec
        for config in CHECKPOINTS.glob("*/config.json")
        for spec in json.loads(config.read_text())["quantization_config"]["modules"].values()
    ]
    assert {spec["kind"] for spec in specs} == {"low_rank", "sparse_dictionary", "sparse_plus_low_rank", "dense"}
    assert {spec.get("value_bits", 16) for spec in specs} >= {14, 16, 4, 3}
    assert any("shares" in spec for spec in specs)
    assert {how[0] for spec in specs for how in spec.get("formats", {}).values()} == {"int3", "int4", "int8", "float8"}


@pytest.fixture
def earlier_study(tmp_path) -> Path:
    """The study's folder, its paths and times those of this checkout."""
    with tarfile.open(EARLIER / "smoke_study.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")

    def time(match: re.Match) -> str:
        return str((ROOT / "conf" / "text" / match[1]).stat().st_mtime_ns)

    for note in (tmp_path / ".snakemake" / "metadata").iterdir():
        text = note.read_text(encoding="utf-8").replace("@PROJECT@/tests/data", str(ROOT / "conf" / "text"))
        note.write_text(re.sub(r"@TIME:([\w.]+)@", time, text), encoding="utf-8")
    return tmp_path


def planned(folder: Path, overrides: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--directory", str(folder), "-n", "--cores", "1"]
    command += ["--config", "study=smoke", f"overrides={overrides}"]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def jobs_of(plan: str) -> dict[str, int]:
    """Rule -> number of jobs that a dry run counts."""
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", plan, re.MULTILINE)}


@pytest.mark.xdist_group("workflow")
def test_an_earlier_study_computes_again_what_has_another_revision_alone(earlier_study):
    """It had `cospadi_plus` of revision 2, which did not go by the loss: its two blocks of layers are factorized, quantized and measured again."""
    plan = planned(earlier_study, STUDY)
    of_cells = {rule: count for rule, count in jobs_of(plan).items() if rule in EVERY_STAGE}
    assert of_cells == {"factorize": 2, "quantize": 2, "evaluate": 2}
    assert "method=svd" not in plan


@pytest.mark.xdist_group("workflow")
def test_an_earlier_study_goes_on_from_what_it_has(earlier_study):
    jobs = jobs_of(planned(earlier_study, f"{STUDY} study.compression_ratios=[0.3,0.4]"))
    assert "calibrate" not in jobs
    assert "prepare_model" not in jobs
    assert jobs["factorize"] == 2 + 4  # two blocks of layers: of SVD the new ratio alone, of CoSpaDi+ both
