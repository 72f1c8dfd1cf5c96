"""The one exception that means "the person running this can mend it"."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from numbers import Real

AUTO = "auto"


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def require_one_of(setting: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, f"{setting}={value} is not known. Choose one of: {', '.join(allowed)}.")


def require_at_least(setting: str, value: Real | None, least: Real) -> None:
    require(value is None or value >= least, f"{setting}={value} is too small. Set {least} or more.")
    require(value is None or math.isfinite(value), f"{setting}={value} is not finite. Set a number.")


def require_device(setting: str, value: str) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    require(known, f"{setting}={value} is not known. Choose one of: auto, cpu, cuda, cuda:<number>.")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that does not exist.

    >>> did_you_mean("rhoo", ["rho", "solver"]), did_you_mean("x", ["rho"])
    ('. Did you mean rho?', '.')
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {close[0]}?" if close else "."


class UserError(ValueError):
    """A mistake in settings or input: one sentence saying what, why and how to mend.

    The command line prints the sentence and exits with 1; everything else keeps its traceback.
    """
