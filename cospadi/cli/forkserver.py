"""Jobs of a study without their start-up: one process imports everything, and every job is a fork of it.

Importing torch and transformers takes 2 to 5 seconds of a core, more than most jobs of a small study work. ``snakemake``
starts the server beside its first jobs, and a sweep before its first cell (`cospadi.pipeline.forks`); ``python -m cospadi <stage>``
then asks for a fork that has its arguments, environment, folder and open files, and ends with its exit code. Where there is no
server, and on other machines of a cluster, a job imports for itself: the work is the same.

Three processes: the server never computes, so that it may be forked; a warden for every job waits for its end, and stops it
when whoever asked is gone; the job is a child of the warden.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
from pathlib import Path

from cospadi import cli
from cospadi.pipeline.forks import Request

IMPORTS = (
    "cospadi.pipeline.stages.sources",
    "cospadi.pipeline.stages.calibration",
    "cospadi.pipeline.stages.rank_search",
    "cospadi.pipeline.stages.factorization",
    "cospadi.pipeline.stages.quantization",
    "cospadi.pipeline.stages.evaluation",
    "cospadi.pipeline.stages.tables",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",  # with what all models need
    "transformers.models.qwen3.modeling_qwen3",
)
"""What the server imports: what starts no thread and no GPU, and holds nothing that ends with a process. W&B is not among it:
its temporary folders, made by its import, would be removed by the first job that ends."""


def serve(listener: socket.socket, address: Path) -> Request | None:
    """Fork for every request. Returns a request in the job that shall do it, and ``None`` in the server at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # wardens leave nothing to be waited for
    has_imported = False
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(address.parent, ignore_errors=True)
            return None
        if not has_imported:  # with the first job in sight: there may be none at all
            _import_everything()
            has_imported = True
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _guarded(connection)
        connection.close()


def _import_everything() -> None:
    for module in IMPORTS:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # forks do not copy what is never freed


def _guarded(connection: socket.socket) -> Request:
    """Fork the job and wait for its end; returns in the job alone.

    Raises:
        SystemExit: in the warden, when the job has ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as asked:
        request = Request(*json.loads(asked.readline()))
    alive, held = os.pipe()  # the job holds the other end as long as it lives
    job = os.fork()
    if job == 0:
        os.close(alive)
        connection.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        return request
    os.close(held)
    for file in files:
        os.close(file)
    ready, _, _ = select.select([alive, connection], [], [])
    if connection in ready and alive not in ready:
        os.kill(job, signal.SIGTERM)
    _, status = os.waitpid(job, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):  # nobody may be there any more
        connection.sendall(f"{code if code >= 0 else 128 - code}\n".encode())
    os._exit(0)


def run(request: Request) -> int:
    """Do a job as if this process had been started for it; its exit code."""
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        threadpool_limits(int(threads))
    sys.argv[1:] = request.arguments
    return cli.main(request.arguments)


if __name__ == "__main__":
    wanted = serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
    sys.exit(0 if wanted is None else run(wanted))
