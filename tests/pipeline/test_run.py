"""``python -m cospadi.pipeline.run``: a study from its first line to its end, or to Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cospadi.errors import UserError
from cospadi.pipeline import locks, run

ROOT = Path(run.__file__).parents[2]
STUDY = ["--cores", "1", "--config", "study=smoke", "overrides=study.models=[tiny_llama] study.methods=[svd_llm]"]


def test_settings_that_do_not_compose_are_shown_without_a_traceback(capfd):
    assert run.main(["-n", "--cores", "1", "--config", "study=nope"]) != 0
    said = capfd.readouterr().err
    assert "study=nope does not exist" in said
    assert "Traceback" not in said


def test_a_second_run_is_refused_by_the_pid_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Snakefile").touch()
    lock = tmp_path / ".snakemake" / "locks" / "0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    locks.sign_in(tmp_path)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .*, started \d{{4}}-"):
        run.main(["--cores", "1"])
    assert lock.exists()


@pytest.mark.slow
def test_a_study_of_a_model_that_cannot_be_counted_runs_all_the_same(tmp_path):
    """Targets before the options, too: they are not taken for loggers."""
    uncounted = "model.source=random:mixtral +model.architecture.num_local_experts=4"
    target = "results/sources/models/tiny_llama/record.json"
    command = [sys.executable, "-m", "cospadi.pipeline.run", target, "--snakefile", str(ROOT / "Snakefile")]
    done = subprocess.run(
        [*command, *STUDY[:-1], f"{STUDY[-1]} {uncounted}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 jobs, roughly" in done.stdout
    assert (tmp_path / target).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_leaves_no_process_and_no_lock(number, tmp_path):
    for name in ("Snakefile", "workflow", "profiles"):
        source = ROOT / name
        if source.is_file():
            shutil.copy(source, tmp_path / name)
        else:
            shutil.copytree(source, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cospadi.pipeline.run", *STUDY]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as study:
        while "jobs, roughly" not in (line := study.stdout.readline()):
            assert line, "the study ended before its first job"
        # Wait until a job writes its log: it runs then.
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("results/**/*.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(study.pid).children(recursive=True)
        assert len(family) >= 2
        study.send_signal(number)
        study.send_signal(number)  # as a person in a hurry does
        said = study.stdout.read()
    assert study.returncode == 130
    assert "Stopped. Finished results are kept" in said
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list((tmp_path / ".snakemake" / "locks").glob("*"))


def test_a_user_without_a_name_gets_one(monkeypatch):
    """As in a container that runs under a number; Snakemake asks for the name and knows no other way on."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setattr("getpass.getuser", unknown)
    run._name_user()
    assert os.environ["USER"] == f"user{os.getuid()}"
