"""Cases that `make test` leaves to `make test-all`."""

from collections.abc import Collection, Iterable

import pytest


def cases(values: Iterable, often: Collection) -> list:
    """Parameters of a test: those in ``often`` for every run, the others, which are more of the same kind, for ``make test-all``."""
    return [pytest.param(value, marks=[] if value in often else [pytest.mark.thorough]) for value in values]
