"""A lock goes only when the run that held it is known to be dead."""

import json
import os
import platform
import subprocess
import sys

import psutil
import pytest

from cospadi.pipeline import locks


@pytest.fixture
def locked(tmp_path):
    (tmp_path / ".snakemake" / "locks").mkdir(parents=True)
    (tmp_path / ".snakemake" / "locks" / "0.output.lock").write_text("results/a")
    return tmp_path


def sign(folder, **changes):
    owner = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    (folder / ".snakemake" / "last_run.json").write_text(json.dumps(owner | changes))


def is_locked(folder) -> bool:
    return any((folder / ".snakemake" / "locks").iterdir())


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_run_goes(locked):
    sign(locked, pid=dead_process())
    assert locks.remove_stale(locked)
    assert not is_locked(locked)


def test_so_does_one_whose_number_was_given_to_another_process(locked):
    sign(locked, started=1.0)
    assert locks.remove_stale(locked)


def test_a_living_run_keeps_its_lock(locked):
    locks.sign_in(locked)
    assert not locks.remove_stale(locked)
    assert is_locked(locked)


def test_a_lock_of_unknown_origin_or_of_another_machine_stays(locked):
    assert not locks.remove_stale(locked)
    sign(locked, host="another-machine", pid=dead_process())
    assert not locks.remove_stale(locked)
    (locked / ".snakemake" / "last_run.json").write_text("{half")
    assert not locks.remove_stale(locked)
    assert is_locked(locked)


def test_nothing_happens_where_nothing_is_locked(tmp_path):
    assert not locks.remove_stale(tmp_path)
