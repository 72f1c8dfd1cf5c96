"""Jobs of a study without their start-up: whoever starts jobs starts a server beside them, and a job asks it for a fork.

The server is `cospadi.cli.forkserver`. Here is what its users need, which imports nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SERVER = "cospadi.cli.forkserver"
ADDRESS = "COSPADI_FORKSERVER"
"""Environment variable with the path of the server's socket."""
CONNECTIONS = 1024
"""Jobs that may wait while the server still imports."""

_STARTED: list[subprocess.Popen] = []
"""The server of this process, whose pipe stays open."""


class Request(NamedTuple):
    """A job as it was asked for."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def start() -> None:
    """Start a server that ends with this process, and name it to the jobs that this process starts.

    Where one is named already, that one is theirs: a sweep has one for all its cells.
    """
    if Path(os.environ.get(ADDRESS, "")).is_socket():
        return
    address = Path(tempfile.mkdtemp(prefix="cospadi-")) / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))  # before the imports, so that the first jobs find it and wait
    listener.listen(CONNECTIONS)
    # The server reads a pipe that nobody writes to: it ends when this process does, however that ends.
    server = subprocess.Popen(
        [sys.executable, "-m", SERVER, str(listener.fileno()), str(address)],
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    _STARTED.append(server)
    listener.close()
    os.environ[ADDRESS] = str(address)


def ask(arguments: list[str]) -> int | None:
    """Run ``cospadi <arguments>`` as a fork of the server: its exit code, or ``None`` when there is no server here."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.environ[ADDRESS])
    except (KeyError, OSError):
        return None
    request = Request(arguments, dict(os.environ), os.getcwd())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the job, too, which says so and ends
    try:
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as answers:
            code = answers.readline()
    except ConnectionError:
        return None  # the server could not import, and ended
    return int(code) if code else 128 + signal.SIGKILL
