"""The table of metrics: what an evaluation record measures besides its tasks, and how it is shown.

Summaries, printed tables, overviews, figures, paired differences and the W&B workspace read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cospadi.tables.numbers import divergence, percent, perplexity

HIGHER = "higher"
LOWER = "lower"
NLL = "nll"
"""Mean negative log-likelihood of a token (nats): the logarithm of the token perplexity."""
ARROWS = {HIGHER: "↑", LOWER: "↓"}


@dataclass(frozen=True)
class Metric:
    """A metric of a whole model."""

    name: str
    """Key in an evaluation record, and column of ``summary.csv``."""
    title: str
    """Heading of its column in a printed table."""
    long_title: str
    """Its name where there is more room: in figures and overviews."""
    unit: str
    """Unit as it is printed: ``nats``, ``%`` of a fraction, or nothing."""
    better: str
    """`HIGHER` or `LOWER`."""
    print: Callable[[float], str]
    """The number as papers print it."""
    is_optional: bool = False
    """Whether its column and its protocol are left out of studies that do not measure it."""
    in_overview: bool = False
    """Whether the overview of a study has a table of it."""
    is_logarithmic: bool = False
    """Whether its axis is logarithmic."""
    of_dense: float | None = None
    """Value of the dense model where the definition fixes it. Its protocol is then left out of the notes."""
    paired_as: str = ""
    """Name under which ``paired.csv`` compares two models by the values of this metric's windows; empty: not compared."""

    @property
    def scale(self) -> float:
        """Factor from the record's number to the unit that is printed."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def label(self) -> str:
        """``long_title`` with the unit of a fraction and the direction, for an axis or a heading.

        >>> METRICS["average_accuracy"].label, METRICS["kl_to_dense"].label
        ('Average accuracy (%) ↑', 'KL to dense ↓')
        """
        unit = " (%)" if self.unit == "%" else ""
        return f"{self.long_title}{unit} {ARROWS[self.better]}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "token_perplexity",
            title="Token ppl",
            long_title="Token perplexity",
            unit="",
            better=LOWER,
            print=perplexity,
            in_overview=True,
            is_logarithmic=True,
            paired_as=NLL,
        ),
        Metric(
            "second_perplexity",
            title="Second ppl",
            long_title="Token perplexity of the second text",
            unit="",
            better=LOWER,
            print=perplexity,
            is_optional=True,
        ),
        Metric(
            "word_perplexity",
            title="Word ppl",
            long_title="Word perplexity",
            unit="",
            better=LOWER,
            print=perplexity,
        ),
        Metric(
            "lambada_perplexity",
            title="LAMBADA ppl",
            long_title="Perplexity of LAMBADA's last words",
            unit="",
            better=LOWER,
            print=perplexity,
            is_optional=True,
        ),
        Metric(
            "kl_to_dense",
            title="KL",
            long_title="KL to dense",
            unit="nats",
            better=LOWER,
            print=divergence,
            in_overview=True,
            is_logarithmic=True,
            of_dense=0.0,
            paired_as="kl_to_dense",
        ),
        Metric(
            "top1_agreement",
            title="Top-1",
            long_title="Agreement with dense",
            unit="%",
            better=HIGHER,
            print=percent,
            of_dense=1.0,
        ),
        Metric(
            "average_accuracy",
            title="Average",
            long_title="Average accuracy",
            unit="%",
            better=HIGHER,
            print=percent,
            in_overview=True,
        ),
    )
}
"""Every metric by its name, in the order of the summary's columns."""
AVERAGE = METRICS["average_accuracy"]
"""The metric whose column is next to the tasks that it averages."""
