"""The one exception that means "the person running this can mend it", and the checks of settings that raise it."""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import re
from collections.abc import Collection, Sequence
from numbers import Real

from packaging.requirements import Requirement

AUTO = "auto"
"""The value of a setting that leaves the choice to the program."""


class UserError(ValueError):
    """A mistake in settings or input: one sentence saying what, why and how to mend.

    The command line prints the sentence and exits with 1; everything else keeps its traceback.
    """


def require(condition: bool, sentence: str) -> None:
    """
    Raises:
        UserError: with ``sentence``, unless ``condition`` holds.
    """
    if not condition:
        raise UserError(sentence)


def require_one_of(setting: str, value: str, allowed: Collection[str]) -> None:
    """
    Raises:
        UserError: when ``value`` is not one of those allowed, naming all of them.
    """
    require(value in allowed, f"{setting}={value} is not known. Choose one of: {', '.join(allowed)}.")


def require_at_least(setting: str, value: Real | None, least: Real) -> None:
    """
    Raises:
        UserError: when ``value`` is below ``least`` or not finite; ``None`` passes.
    """
    require(value is None or value >= least, f"{setting}={value} is too small. Set {least} or more.")
    require(value is None or math.isfinite(value), f"{setting}={value} is not finite. Set a number.")


def require_seed(setting: str, value: int) -> None:
    """
    Raises:
        UserError: when torch would not take ``value`` as a seed.
    """
    require(0 <= value < 2**63, f"{setting}={value} is not a seed. Set a number from 0 to {2**63 - 1}.")


def require_device(setting: str, value: str) -> None:
    """
    Raises:
        UserError: when ``value`` is neither ``auto`` nor a name of torch's that this project runs on.
    """
    require(is_device(value), f"{setting}={value} is not known. Choose one of: auto, cpu, cuda, cuda:<number>.")


def is_device(name: str) -> bool:
    """Whether ``name`` is ``auto``, or a device of torch's that this project runs on."""
    return re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None


def require_extra(extra: str, what: str) -> None:
    """
    Args:
        extra: extra of this package: ``study``, ``serve`` or ``track``.
        what: the command that needs it.

    Raises:
        UserError: when a package of ``extra`` is not installed, naming it.
    """
    for package in packages_of(extra):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"{what} needs {package}, which is not installed. Install what it needs, in the folder of the repository: "
                f"pip install '.[{extra}]'."
            ) from error


def packages_of(extra: str) -> list[str]:
    """Packages that ``cospadi[extra]`` adds; none where the project runs from its folder without being installed."""
    try:
        lines = importlib.metadata.requires("cospadi") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    required = map(Requirement, lines)
    return [r.name for r in required if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate()]


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of a sentence about a name that does not exist. Titles are understood, too: SVD-LLM, CoSpaDi+.

    >>> did_you_mean("rhoo", ["rho", "solver"]), did_you_mean("x", ["rho"])
    ('. Did you mean rho?', '.')
    >>> did_you_mean("SVD-LLM", ["svd", "svd_llm"]), did_you_mean("CoSpaDi+", ["cospadi", "cospadi_plus"])
    ('. Did you mean svd_llm?', '. Did you mean cospadi_plus?')
    """
    written = name.lower().replace("-", "_").replace("+", "_plus")
    close = difflib.get_close_matches(written, names, n=1) or difflib.get_close_matches(name, names, n=1)
    return f". Did you mean {close[0]}?" if close else "."
