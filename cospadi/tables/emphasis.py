"""Which methods of a study stand out, and the colour that each has in all figures."""

from __future__ import annotations

import math

import pandas as pd

from cospadi.records import DENSE
from cospadi.tables.cells import factorization_of
from cospadi.tables.style import GREY, colours

PAPER = "cospadi"
"""The method of the paper that this project is named after."""
ALL = 5
"""Up to so many methods, every one stands out."""


def palette(frame: pd.DataFrame) -> dict[str, str]:
    """Factorization -> colour, the same in all its quantizations; grey for those that do not stand out."""
    of_all = colours(factorizations(frame))
    chosen = standing_out(frame)
    return {name: colour if name in chosen else GREY for name, colour in of_all.items()}


def factorizations(frame: pd.DataFrame) -> dict[str, str]:
    """Titles of the compressed methods without their quantization, by name, in the order of the rows."""
    rows = frame[frame["method"] != DENSE]
    titles: dict[str, str] = {}
    for method, title, bits in zip(rows["method"], rows["method_title"], rows["quantization_title"], strict=True):
        titles.setdefault(factorization_of(method), title.removesuffix(f", {bits}"))
    return titles


def standing_out(frame: pd.DataFrame) -> set[str]:
    """The method of the paper, and of every family the one that comes nearest to the dense model.

    Nearest is the lowest KL divergence (token perplexity where that was not measured), averaged over the models, at the
    middle one of the ratios that most methods have. With `ALL` methods or fewer, all of them.
    """
    names = factorizations(frame)
    if len(names) <= ALL:
        return set(names)
    rows = frame[frame["method"] != DENSE]
    rows = rows.assign(factorization=rows["method"].map(factorization_of))
    rows = rows[rows["compression_ratio"] == middle(most_shared(rows))]
    metric = next(
        (name for name in ("kl_to_dense", "token_perplexity") if rows[name].map(math.isfinite).any()), "kl_to_dense"
    )
    rows = rows[rows[metric].map(math.isfinite)]
    distance = rows.groupby(["family", "factorization"], sort=False)[metric].mean()
    nearest = distance.groupby("family").idxmin()
    return {name for _, name in nearest} | ({PAPER} & set(names))


def most_shared(rows: pd.DataFrame) -> pd.Series:
    """The ratios that most models and methods have."""
    pairs = rows.drop_duplicates(["model", "method", "compression_ratio"])
    times = pairs["compression_ratio"].value_counts()
    return pd.Series(times[times == times.max()].index, dtype=float)


def middle(ratios: pd.Series) -> float:
    """The middle one of the ratios that occur (the lower of two).

    >>> middle(pd.Series([0.2, 0.5, 0.3, 0.4, 0.2]))
    0.3
    """
    measured = sorted(set(ratios.dropna()))
    return float(measured[(len(measured) - 1) // 2]) if measured else math.nan
