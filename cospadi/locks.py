"""After a ``kill -9`` Snakemake leaves its lock behind: take it away when nobody can be holding it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def remove_stale(folder: Path) -> bool:
    """Remove Snakemake's locks in ``folder`` unless another living snakemake works there; whether any were removed.

    Jobs that outlived their snakemake do no harm: every stage writes under a temporary name and renames.
    """
    locks = [lock for lock in (folder / ".snakemake" / "locks").glob("*") if lock.is_file()]
    if not locks or any(_is_snakemake(process, folder) for process in psutil.process_iter()):
        return False
    for lock in locks:
        lock.unlink(missing_ok=True)
    return True


def _is_snakemake(process: psutil.Process, folder: Path) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        programs = [Path(word).name for word in process.cmdline()[:4]]
        return "snakemake" in programs and Path(process.cwd()) == folder.resolve()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
