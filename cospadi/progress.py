"""Progress as full lines with the time left: they end up in log files, so nothing moves."""

from __future__ import annotations

import sys
import time
from numbers import Real


class Progress:
    """Prints ``done/total  what  …  elapsed  left`` after every step.

    ``weight`` lets steps of unequal size give an honest estimate: pass each step's share of ``total_weight``.
    """

    def __init__(self, total: int, title: str, total_weight: Real | None = None):
        self.total = total
        self.total_weight = float(total_weight or total)
        self.done = 0
        self.done_weight = 0.0
        self.started = time.perf_counter()
        print(f"{title} ({total} steps)", flush=True)

    def step(self, what: str, detail: str = "", weight: Real = 1) -> None:
        self.done += 1
        self.done_weight += weight
        elapsed = time.perf_counter() - self.started
        left = elapsed / self.done_weight * max(self.total_weight - self.done_weight, 0.0)
        width = len(str(self.total))
        line = f"{self.done:{width}}/{self.total}  {what:<34} {detail}  {duration(elapsed)}  left {duration(left)}"
        print(line, file=sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(4.13), duration(312.0), duration(7300.0)
    ('4.1 s', '5.2 min', '2.03 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"
