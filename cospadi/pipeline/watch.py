"""What a person sees of a running study: its jobs, how far each is, where it logs, and the time left.

On a terminal the picture changes in place; in a file it is a line per finished job and, at least once a minute, a line
per running one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cospadi.pipeline.pace import Pace
from cospadi.progress import duration

SILENCE = 50.0
"""Seconds after which running jobs are told again in a file."""
TAIL = 8192
"""Bytes at the end of a job's log in which its last line is looked for."""
TOLD = {"tabulate"}
"""Rules whose words are for people: who won, and where the report is."""
TOLD_LINES = 40
"""Lines of such a job's log that are shown."""
FAILED_LINES = 20
"""Lines of a failed job's log that are shown."""


@dataclass
class Job:
    rule: str
    name: str
    log: Path | None
    threads: int
    started: float

    def line(self) -> str:
        """What runs, for how long, its own last line, and its log."""
        said = last_lines(self.log, 1) if self.log else []
        parts = (self.name, duration(time.monotonic() - self.started), *said, f"log: {self.log}" if self.log else "")
        return "  ".join(part for part in parts if part)


class Watch:
    """Prints the events of a run. Its methods may be called from several threads."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.pace = Pace()
        self.cores = 1
        self.waiting: dict[str, int] = {}
        self.running: dict[int, Job] = {}
        self.total = 0
        self.done = 0
        self.started = time.monotonic()
        self._last_said = self.started
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._live: Live | None = None
        self._reminder: threading.Thread | None = None

    def begin(self, stats: Mapping[str, int]) -> None:
        """The rules that will run and their number of jobs, as Snakemake counts them."""
        self.waiting = {rule: count for rule, count in stats.items() if rule not in ("all", "total")}
        self.total = sum(self.waiting.values())

    def expect(self, seconds: Mapping[str, float], cores: int) -> None:
        """The counted core-seconds of a job of every rule, on ``cores`` cores; jobs start now."""
        self.pace.expected = dict(seconds)
        self.cores = cores
        self.say(f"{self.total} jobs, roughly {duration(self.left())} on {cores} cores")
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._picture, refresh_per_second=1, transient=True)
            self._live.start()
        else:
            self._reminder = threading.Thread(target=self._remind, daemon=True)
            self._reminder.start()

    def start(
        self, number: int, rule: str, wildcards: Mapping[str, str] | None, logs: Sequence[str] | None, threads: int
    ) -> None:
        cell = " ".join((wildcards or {}).values())
        log = Path(str(logs[0])) if logs else None
        with self._lock:
            self.running[number] = Job(rule, f"{rule:<15} {cell}".rstrip(), log, threads, time.monotonic())

    def finish(self, number: int) -> None:
        with self._lock:
            job = self.running.pop(number, None)
            if job is None or job.rule not in self.waiting:
                return
            seconds = time.monotonic() - job.started
            self.pace.learn(job.rule, seconds * min(job.threads, self.cores))
            self.waiting[job.rule] -= 1
            self.done += 1
            took = f"took {duration(seconds)}"
        self.say(
            f"{self.done:{len(str(self.total))}}/{self.total}  {job.name:<60} {took:<13} left {duration(self.left())}"
        )
        if job.rule in TOLD and job.log:
            self.say("\n".join(("", *last_lines(job.log, TOLD_LINES), "")))

    def fail(self, number: int, rule: str, logs: Sequence[str] | None) -> None:
        """Say that a job failed, with the end of its log."""
        with self._lock:
            job = self.running.pop(number, None)
        self.say(f"Failed: {job.name if job else rule}")
        for log in logs or ():
            self.say("\n".join((*last_lines(Path(str(log)), FAILED_LINES), f"Its log: {log}")))

    def left(self) -> float:
        """Seconds until all jobs are done, should the cores never idle."""
        with self._lock:
            core_seconds = sum(self.pace.job(rule) * count for rule, count in self.waiting.items())
            for job in self.running.values():
                spent = (time.monotonic() - job.started) * min(job.threads, self.cores)
                core_seconds -= min(spent, self.pace.job(job.rule)) if job.rule in self.waiting else 0.0
        return max(core_seconds, 0.0) / self.cores

    def say(self, text: str) -> None:
        if text:
            self.console.print(text, markup=False)
            self._last_said = time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()

    def _jobs(self) -> list[str]:
        with self._lock:
            return [job.line() for job in self.running.values()]

    def _picture(self) -> Text:
        elapsed = duration(time.monotonic() - self.started)
        heading = f"{self.done}/{self.total} jobs  {elapsed}  left {duration(self.left())}"
        return Text("\n".join((heading, *(f"  {line}" for line in self._jobs()))), no_wrap=True, overflow="ellipsis")

    def _remind(self) -> None:
        while not self._ended.wait(1.0):
            if time.monotonic() - self._last_said > SILENCE:
                self.say("\n".join(f"running  {line}" for line in self._jobs()) or "waiting for Snakemake")


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty; none where there is no log yet."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - TAIL, 0))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-count:]
