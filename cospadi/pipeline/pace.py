"""Time left of a study: counted work at first, then what finished jobs of the same rule took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

UNKNOWN = 10.0
"""Core-seconds of a job that nobody counted: little more than its start."""
PATIENCE = 30.0
"""Core-seconds at the counted pace that are averaged in, so that the first jobs do not decide the estimate alone."""


@dataclass
class Pace:
    """Core-seconds per job of every rule.

    A rule with finished jobs costs their mean. Any other costs what was counted for it, times how much longer than
    counted the finished jobs of all rules took.
    """

    expected: Mapping[str, float] = field(default_factory=dict)
    finished: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)

    def learn(self, rule: str, core_seconds: float) -> None:
        self.finished[rule] += 1
        self.spent[rule] += core_seconds

    def job(self, rule: str) -> float:
        """Core-seconds that a job of ``rule`` is likely to take."""
        if self.finished[rule]:
            return self.spent[rule] / self.finished[rule]
        counted = sum(count * self._counted(name) for name, count in self.finished.items())
        slowdown = (sum(self.spent.values()) + PATIENCE) / (counted + PATIENCE)
        return self._counted(rule) * slowdown

    def _counted(self, rule: str) -> float:
        return self.expected.get(rule, UNKNOWN)
