"""A job that is a fork of the server behaves as if it had been started by itself."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cospadi.pipeline import forks

SERVER = """
import json, os, sys, time
from pathlib import Path
import cospadi.cli
from cospadi.errors import UserError
from cospadi.cli import forkserver

def main(arguments):
    if arguments[0] == "tell":
        print(json.dumps([arguments, os.getcwd(), os.environ.get("WHO"), os.environ.get("OMP_NUM_THREADS"), sys.stdin.read()]))
        print("to the other stream", file=sys.stderr)
    elif arguments[0] == "exit":
        sys.exit(int(arguments[1]))
    elif arguments[0] == "die":
        os.kill(os.getpid(), 9)
    elif arguments[0] == "fail":
        raise RuntimeError("a fault of the program")
    elif arguments[0] == "sleep":
        Path(arguments[1]).write_text(str(os.getpid()))
        time.sleep(600)
    return 0

cospadi.cli.main = main
forkserver.IMPORTS = ()
wanted = forkserver.serve(__import__("socket").socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
sys.exit(0 if wanted is None else forkserver.run(wanted))
"""
"""A server whose jobs do what the tests look at."""


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[subprocess.Popen, Path]]:
    address = tmp_path / "s" / "socket"
    address.parent.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    command = [sys.executable, "-c", SERVER, str(listener.fileno()), str(address)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]) as process:
        listener.close()
        yield process, address
        process.kill()


def client(address: Path, *arguments: str, **settings) -> subprocess.Popen:
    environment = {**os.environ, forks.ADDRESS: str(address), **settings.pop("env", {})}
    command = [sys.executable, "-m", "cospadi", *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **{**pipes, **settings})


def written(file: Path) -> str:
    for _ in range(600):
        if file.is_file() and (text := file.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{file} was not written")


def ends(pid: int) -> bool:
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_job_has_the_arguments_folder_environment_and_files_of_who_asked(server, tmp_path):
    given = tmp_path / "given.txt"
    given.write_text("what it reads")
    env = {"WHO": "somebody", "OMP_NUM_THREADS": "1"}
    with open(given) as stdin:
        job = client(server[1], "tell", "a b", "--c=d", cwd=tmp_path, env=env, stdin=stdin)
        out, err = job.communicate(timeout=60)
    assert job.returncode == 0
    assert json.loads(out) == [["tell", "a b", "--c=d"], str(tmp_path), "somebody", "1", "what it reads"]
    assert err == "to the other stream\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(("exit", "0"), 0), (("exit", "3"), 3), (("die",), 137), (("fail",), 1)]
)
def test_its_exit_code_is_the_jobs(server, arguments, code):
    job = client(server[1], *arguments)
    _, err = job.communicate(timeout=60)
    assert job.returncode == code
    assert ("RuntimeError: a fault of the program" in err) == (arguments == ("fail",))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_ends_with_who_asked(server, tmp_path, number):
    job = client(server[1], "sleep", str(tmp_path / "pid"))
    pid = int(written(tmp_path / "pid"))
    job.send_signal(number)
    job.communicate(timeout=60)
    assert ends(pid)


def test_jobs_run_side_by_side_and_outlive_none(server, tmp_path):
    jobs = [client(server[1], "sleep", str(tmp_path / str(i))) for i in range(3)]
    pids = [int(written(tmp_path / str(i))) for i in range(3)]
    for job in jobs:
        job.terminate()
        job.communicate(timeout=60)
    assert all(ends(pid) for pid in pids)


def test_the_server_ends_with_its_parent_and_leaves_nothing(server):
    process, address = server
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert not address.parent.exists()


def test_who_has_been_given_a_server_starts_none(server, monkeypatch):
    monkeypatch.setenv(forks.ADDRESS, str(server[1]))
    forks.start()
    assert forks._STARTED == []
    assert os.environ[forks.ADDRESS] == str(server[1])


def test_a_server_without_a_job_imports_nothing_and_ends_with_who_started_it(monkeypatch):
    monkeypatch.setenv(forks.ADDRESS, "")
    forks.start()
    (process,) = forks._STARTED
    address = Path(os.environ[forks.ADDRESS])
    try:
        assert address.is_socket()
        time.sleep(1)
        assert psutil.Process(process.pid).memory_info().rss < 150e6  # torch alone takes more
    finally:
        forks._STARTED.clear()
        process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert not address.parent.exists()


def test_without_a_server_a_job_imports_for_itself(tmp_path):
    for address in (tmp_path / "nobody", ""):
        job = client(address, "--version")
        out, _ = job.communicate(timeout=60)
        assert job.returncode == 0
        assert out.startswith("cospadi ")


def test_what_it_imports_starts_no_thread_and_holds_no_folder_that_a_fork_would_end():
    """A fork has only the thread that forks; the pools of linear algebra libraries start anew there.

    A temporary folder of the server would be removed by the first job that ends, under the feet of all others.
    """
    listed = (
        "import gc, importlib, json, tempfile, threading\n"
        "from cospadi.cli import forkserver\n"
        "for module in forkserver.IMPORTS: importlib.import_module(module)\n"
        "import torch\n"
        "folders = [o.name for o in gc.get_objects() if isinstance(o, tempfile.TemporaryDirectory)]\n"
        "print(json.dumps([threading.active_count(), torch.cuda.is_initialized(), folders]))"
    )
    run = subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [1, False, []]
