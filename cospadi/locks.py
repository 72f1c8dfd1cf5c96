"""After a ``kill -9`` Snakemake leaves its lock behind: take it away when its owner is known to be dead.

A run signs in where it works. A lock is only removed when the run that signed in last was on this machine and is gone;
a lock of unknown origin, or of another machine on a shared disk, stays.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import psutil

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


def _owner_is_dead(folder: Path) -> bool:
    try:
        owner = json.loads(_signature(folder).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if owner["host"] != platform.node():
        return False
    try:
        return (
            psutil.Process(owner["pid"]).create_time() != owner["started"]
        )  # the number may have been given away again
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _signature(folder: Path) -> Path:
    return folder / ".snakemake" / "last_run.json"
