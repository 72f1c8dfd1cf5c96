"""``python -m cospadi.pipeline.run --cores N …``: Snakemake with the logger of `snakemake_logger_plugin_cospadi`.

Arguments go to Snakemake as they are. Its own words are in ``.snakemake/log``.
"""

from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cospadi.errors import UserError, require_extra
from cospadi.pipeline import locks
from cospadi.progress import duration

SNAKEFILES = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")
"""Where Snakemake looks for its rules."""
NOT_RUNNING = {"-n", "--dry-run", "--dryrun", "--unlock"}
"""Options with which Snakemake starts no job."""
GRACE = 10.0
"""Seconds that Snakemake and its jobs have to end by themselves once they are stopped."""


class Stopped(Exception):
    """Somebody asked this process to end."""


def main(arguments: Sequence[str]) -> int:
    """Run Snakemake; its exit code, or 130 when it was stopped by Ctrl-C or SIGTERM.

    Raises:
        UserError: Snakemake is not installed, there is no Snakefile, or another run works in this folder.
    """
    require_extra("study", "A study")
    require_snakefile(arguments)
    runs_jobs = not NOT_RUNNING.intersection(arguments)
    if runs_jobs:
        locks.require_free(Path.cwd())
    started = time.monotonic()
    # The logger comes last, as its option takes every word after it that is none; so would targets be loggers.
    command = [sys.executable, "-m", "snakemake", *arguments, "--logger", "cospadi"]
    _name_user()
    # A process group of its own: what is stopped is Snakemake with all its jobs, whoever sent the signal.
    run = subprocess.Popen(command, process_group=0)
    with _stopped_by(signal.SIGINT, signal.SIGTERM):
        try:
            code = run.wait()
        except Stopped:
            _stop(run)
            locks.remove_stale(Path.cwd())
            print("\nStopped. Finished results are kept: type the same command again to go on.", file=sys.stderr)
            return 130
    if code:
        print("Finished results are kept: mend the cause and type the same command again.", file=sys.stderr)
    elif runs_jobs:
        print(f"Done in {duration(time.monotonic() - started)}.")
    return code


def _name_user() -> None:
    """Give a user without an entry in the system's list (``docker run --user 12345``) the name that Snakemake asks for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"


def require_snakefile(arguments: Sequence[str]) -> None:
    """
    Raises:
        UserError: when ``arguments`` name no Snakefile and there is none in this folder.
    """
    is_named = any(re.match(r"(-s|--snakefile)(=|$)", argument) for argument in arguments)
    if not is_named and not any(Path(file).is_file() for file in SNAKEFILES):
        raise UserError(
            f"There is no Snakefile in {Path.cwd()}. Studies need the project's repository, not its package alone: "
            "change to the folder of your clone, and run this again."
        )


@contextmanager
def _stopped_by(*signals: signal.Signals) -> Iterator[None]:
    """Raise `Stopped` in the block when the first of ``signals`` comes; later ones do not cut the tidying short."""

    def stop(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    earlier = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _stop(run: subprocess.Popen) -> None:
    """End Snakemake and its jobs, which share a process group: first as by Ctrl-C, then by force."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(run.pid, number)
            run.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    run.wait()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
