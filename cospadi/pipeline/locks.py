"""Who works in a folder. After a ``kill -9`` Snakemake leaves its lock behind: it is removed when its owner is dead.

A run signs in where it works. A lock is only removed when the run that signed in last was on this machine and is gone;
a lock of unknown origin, or of another machine on a shared disk, stays.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock

from cospadi.errors import UserError
from cospadi.records import write_json


def sign_in(folder: Path) -> None:
    """Note which process runs in ``folder``; called when jobs are about to start, never for a dry run."""
    process = psutil.Process(os.getpid())
    write_json(_signature(folder), {"host": platform.node(), "pid": process.pid, "started": process.create_time()})


def remove_stale(folder: Path) -> bool:
    """Remove Snakemake's locks in ``folder`` when the run that signed in there is dead; whether any were removed.

    Jobs that outlived their snakemake do no harm: every stage writes under a temporary name and renames.
    """
    locks = [lock for lock in (folder / ".snakemake" / "locks").glob("*") if lock.is_file()]
    if not locks or not _owner_is_dead(folder):
        return False
    for lock in locks:
        lock.unlink(missing_ok=True)
    return True


def is_locked(folder: Path) -> bool:
    """Whether another Snakemake works in ``folder``, or may: a lock of unknown origin counts."""
    remove_stale(folder)
    return any(lock.is_file() for lock in (folder / ".snakemake" / "locks").glob("*"))


def require_free(folder: Path) -> None:
    """Remove a dead run's lock, and refuse to start beside a living one.

    Raises:
        UserError: another run works in ``folder``.
    """
    if not is_locked(folder):
        return
    try:
        owner = json.loads(_signature(folder).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return  # nobody signed in: Snakemake says what its lock means
    since = datetime.fromtimestamp(owner["started"]).strftime("%Y-%m-%d %H:%M:%S")
    raise UserError(
        f"Another run works in {folder}: process {owner['pid']} on {owner['host']}, started {since}. "
        "Wait until it has ended, or stop it with Ctrl-C. Finished results are kept."
    )


@contextmanager
def held(files: Sequence[Path]) -> Iterator[None]:
    """Lock ``files`` one after another, waiting for whoever holds them; free again when the block, or the process, ends."""
    with ExitStack() as stack:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(file))
        yield


def _owner_is_dead(folder: Path) -> bool:
    try:
        owner = json.loads(_signature(folder).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if owner["host"] != platform.node():
        return False
    try:
        # Another process may have the same number by now, but not the same start.
        return psutil.Process(owner["pid"]).create_time() != owner["started"]
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _signature(folder: Path) -> Path:
    return folder / ".snakemake" / "last_run.json"
