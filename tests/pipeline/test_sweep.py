"""Hydra's multirun over cells: the same results as a study's, computed once, whatever the launcher."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cases import cases

from cospadi.errors import UserError
from cospadi.pipeline import locks
from cospadi.pipeline.study import Study
from cospadi.pipeline.sweep import planned
from cospadi.tables.cells import read_summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ("study=smoke", "model=tiny_llama", "factorization.compression_ratio=0.3", "study.layers_per_job=2")


def sweep(folder: Path, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "cospadi.pipeline.sweep", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def test_a_sweep_files_its_factors_where_the_default_study_does():
    of_default = Study("default")
    cell = next(cell for cell in of_default.cells if cell.method == "svd_llm")
    settings = (f"model={cell.model}", "factorization=svd_llm", f"factorization.compression_ratio={cell.ratio}")
    _, (of_sweep,) = planned(settings, multirun=False)
    assert of_sweep.layers(cell) == of_default.layers(cell) == ["000-014", "015-029"]


def records(folder: Path) -> dict[Path, int]:
    rooms = ("sources", "calibration", "factorization", "evaluation")
    return {f: f.stat().st_mtime_ns for room in rooms for f in (folder / "results" / room).rglob("*.json")}


def methods(folder: Path, name: str) -> list[str]:
    return list(read_summary(folder / "results/tables" / name / "summary.csv")["method"])


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """One cell by itself, then two more side by side."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep(folder, *SMALL, "factorization=svd_llm", "hydra.job.name=single")
    assert methods(folder, "single") == ["dense", "svd_llm"]
    before = records(folder)
    launcher = "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.job.name=beside"
    sweep(folder, "-m", *SMALL, "factorization=svd_llm,svd,cospadi", *launcher)
    assert {file: when for file, when in records(folder).items() if file in before} == before
    return folder


@pytest.mark.xdist_group("sweep")
def test_parallel_jobs_share_what_they_have_in_common(swept):
    assert methods(swept, "beside") == ["dense", "svd_llm", "svd", "cospadi"]
    assert list((swept / "results/sweeps/beside").glob("*/multirun.yaml"))
    assert not list(swept.rglob("*.partial"))


@pytest.mark.xdist_group("sweep")
@pytest.mark.parametrize("launcher", cases(["basic", "submitit_local"], {"basic"}))
def test_finished_cells_are_not_computed_again(swept, launcher):
    before = records(swept)
    out = sweep(
        swept, "-m", *SMALL, "factorization=svd_llm,cospadi", f"hydra/launcher={launcher}", f"hydra.job.name={launcher}"
    )
    assert records(swept) == before
    assert f"Tables: results/tables/{launcher}" in out
    assert methods(swept, launcher) == ["dense", "svd_llm", "cospadi"]


@pytest.mark.xdist_group("sweep")
def test_snakemake_takes_the_cells_for_its_own(swept):
    overrides = "study.models=[tiny_llama] study.methods=[svd_llm,svd,cospadi] study.layers_per_job=2"
    overrides += " ++study.quantizations_of.cospadi=[none]"
    run = [sys.executable, "-m", "snakemake", "--cores", "1", "--directory", str(swept), "--config", "study=smoke"]
    done = subprocess.run([*run, f"overrides={overrides}"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rules = [
        line.split()[1].rstrip(":") for line in done.stderr.splitlines() if line.startswith(("rule ", "localrule "))
    ]
    assert rules == ["rulegraph", "tabulate", "track", "all"]  # no cell is computed again
    ours, theirs = (read_summary(swept / "results/tables" / name / "summary.csv") for name in ("beside", "smoke"))
    assert ours.equals(theirs)


def mistake(*arguments: str, multirun: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        planned(list(arguments), multirun)
    return str(caught.value)


def test_the_launcher_of_slurm_is_refused_where_no_slurm_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in mistake("model=tiny_llama", "hydra/launcher=submitit_slurm")


def test_mistakes_are_known_before_the_first_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "factorization=cospady does not exist. Did you mean cospadi?" in mistake(*SMALL, "factorization=svd,cospady")
    several = mistake("study=smoke", "factorization.compression_ratio=0.3,2,3")
    assert several.count("is not between 0 and 1") == 2
    assert "factorization.rho is swept" in mistake(*SMALL, "factorization=cospadi", "factorization.rho=2,3")
    assert "Add -m" in mistake(*SMALL, "factorization=svd,cospadi", multirun=False)
    assert "hydra/sweeper" in mistake(*SMALL, "hydra/sweeper=basic")
    assert "cannot name a sweep" in mistake(*SMALL, "hydra.job.name=smoke")
    assert "Write key=value" in mistake(*SMALL, "factorization==x")


def test_a_folder_where_snakemake_works_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lock = tmp_path / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert "Snakemake is at work" in mistake(*SMALL)


def test_a_sweep_is_a_study_of_its_cells_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = ["study=smoke", "model=tiny_llama,tiny_qwen3", "factorization=svd,cospadi_plus", "factorization.n_rounds=2"]
    with pytest.raises(UserError, match="n_rounds"):  # svd has none, and Hydra would refuse it too
        planned(grid, multirun=True)
    name, (study,) = planned([*grid[:3], "factorization.compression_ratio=0.2,0.4"], multirun=True)
    assert name == "sweep"
    assert len(study.cells) == 2 * 2 * 2
    assert {cell.quantization for cell in study.cells} == {"none"}  # although the smoke study quantizes cospadi_plus
    _, pair = planned([*SMALL, "factorization=svd", "calibration=smoke,news"], multirun=True)
    assert [study.calibration for study in pair] == ["smoke", "news"]


def test_a_held_lock_makes_others_wait(tmp_path):
    order: list[str] = []

    def second() -> None:
        with locks.held([tmp_path / "a"]):
            order.append("second")

    with locks.held([tmp_path / "a", tmp_path / "b"]):
        waiting = threading.Thread(target=second)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
