"""``python -m cospadi.pipeline.run --cores N …``: snakemake with one line per finished job and the time left.

Arguments go to snakemake as they are. Its own output is in ``.snakemake/log``; what it says about a failure is shown here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cospadi.errors import UserError, require_extra
from cospadi.progress import duration

SECONDS = {
    "prepare_model": 40,
    "prepare_text": 10,
    "calibrate": 930,
    "search_ranks": 600,
    "choose_ranks": 10,
    "factorize": 130,
    "quantize": 60,
    "evaluate_dense": 65,
    "evaluate": 80,
    "rulegraph": 8,
    "tabulate": 15,
    "track": 15,
}
"""Core-seconds of a job, measured on the default study; only their proportions matter."""
SNAKEFILES = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")
"""Where Snakemake looks for its rules."""
PATIENCE = 120
"""Seconds at the expected pace that are averaged in, so that the first jobs do not decide the estimate alone."""


@dataclass
class Narrator:
    """Turns snakemake's log lines into progress lines; keeps what belongs to a failure."""

    cores: int
    remaining: dict[str, int] = field(default_factory=dict)
    total: int = 0
    done: int = 0
    done_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    jobs: dict[str, str] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    _in_stats: bool = False
    _job: dict[str, str] = field(default_factory=dict)

    def read(self, line: str) -> str | None:
        """The progress line that ``line`` gives rise to, if any."""
        line = line.rstrip()
        if self.trouble or re.match(r"\S*(Error|Exception)\b|error: ", line) or line.startswith("Exiting because"):
            self.trouble.append(line)
        if line.startswith("Job stats:"):
            self._in_stats = True
            self.remaining = {}
        elif self._in_stats:
            return self._stats(line)
        elif match := re.match(r"(?:local)?rule (\w+):", line):
            self._job = {"rule": match[1]}
        elif match := re.match(r"\s+(jobid|wildcards): (.+)", line):
            self._job[match[1]] = match[2]
            if "jobid" in self._job:
                cell = " ".join(re.sub(r"\w+=", "", self._job.get("wildcards", "")).replace(",", "").split())
                self.jobs[self._job["jobid"]] = f"{self._job['rule']:<15} {cell}"
        elif match := re.match(r"Finished jobid: (\d+) \(Rule: (\w+)\)", line):
            return self._finished(match[1], match[2])
        elif line.startswith("Nothing to be done"):
            return line
        return None

    def _stats(self, line: str) -> str | None:
        match = re.match(r"(\w+)\s+(\d+)$", line.strip())
        if match and match[1] == "total":
            self._in_stats = False
            self.total = sum(self.remaining.values())
            return f"{self.total} jobs, roughly {duration(self._left())} on {self.cores} cores like those of the README"
        if match and match[1] not in ("all", "count"):
            self.remaining[match[1]] = int(match[2])
        return None

    def _finished(self, job: str, rule: str) -> str | None:
        if rule not in self.remaining:
            return None
        self.remaining[rule] -= 1
        self.done += 1
        self.done_seconds += SECONDS.get(rule, 30)
        elapsed = time.perf_counter() - self.started
        pace = (elapsed + PATIENCE) / (self.done_seconds / self.cores + PATIENCE)
        width = len(str(self.total))
        label = self.jobs.get(job, rule)
        return (
            f"{self.done:{width}}/{self.total}  {label:<60} {duration(elapsed)}  left {duration(self._left() * pace)}"
        )

    def _left(self) -> float:
        return sum(SECONDS.get(rule, 30) * count for rule, count in self.remaining.items()) / self.cores


def narrate(lines: Iterable[str], cores: int) -> list[str]:
    """Print progress for snakemake's ``lines``; returns what was said about a failure."""
    narrator = Narrator(cores)
    for line in lines:
        if progress := narrator.read(line):
            print(progress, flush=True)
    return narrator.trouble


def main(arguments: Sequence[str]) -> int:
    """Run snakemake; its exit code.

    Raises:
        UserError: Snakemake is not installed, or there is no Snakefile.
    """
    require_extra("study", "A study")
    require_snakefile(arguments)
    cores = _cores(arguments)
    command = [sys.executable, "-m", "snakemake", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        trouble = narrate(run.stdout or [], cores)
    if run.returncode:
        print("\n".join(_relevant(trouble)), file=sys.stderr)
        print("Finished results are kept: mend the cause and type the same command again.", file=sys.stderr)
    return run.returncode


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


def _relevant(trouble: Sequence[str], most: int = 60) -> list[str]:
    """The lines of a failed job's log that a person needs: no progress, and of a long log the beginning and the end."""
    lines = [line for line in trouble if not re.match(r"\s*\d+/\d+  ", line)]
    return lines if len(lines) <= most else [*lines[:20], "…", *lines[20 - most :]]


def _cores(arguments: Sequence[str]) -> int:
    option = re.search(r"(?:--cores|-c)[ =]?(\d+|all)\b", " ".join(arguments))
    if option is None:
        return 1
    return int(option[1]) if option[1].isdigit() else os.cpu_count() or 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nStopped. Finished results are kept: type the same command again to go on.", file=sys.stderr)
        sys.exit(130)
