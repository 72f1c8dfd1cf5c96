"""Work in operations and bytes, and the seconds that a machine needs for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from cospadi.errors import UserError

REACHED = 0.6
"""Fraction of a machine's best rates that whole jobs reach, fitted to finished records of the default model on a CPU."""
EIGEN = 9
"""Operations of an eigendecomposition, in cubes of its size."""


@dataclass(frozen=True)
class Speed:
    """The best rates of a machine, per second."""

    product: int | float
    """Operations in float32 products; in TF32 on a GPU, as the solvers compute there."""
    model: int | float
    """Operations in products of the model's dtype."""
    double: int | float
    """Operations in float64 products."""
    eigen: int | float
    """Operations of an eigendecomposition in float64, `EIGEN` times its size cubed."""
    memory: int | float
    """Bytes read or written."""

    @classmethod
    def of(cls, tflops: int | float) -> Speed:
        """Rates of a data-centre GPU with so many TFLOPS in TF32 products; the others are in an A100's proportions.

        Raises:
            UserError: ``tflops`` is not positive.
        """
        if not tflops > 0:
            raise UserError(
                f"--tflops {tflops:g} is not a speed. Set what the GPU reaches in TF32 products: about 100 for an A100."
            )
        rate = tflops * 1e12
        return cls(rate, 1.5 * rate, rate / 7, rate / 200, rate / 70)


ONE_CORE = Speed(product=2e11, model=1e11, double=5e10, eigen=3e10, memory=6e9)
"""Rates of a CPU core, for the time left and nothing else."""


@dataclass(frozen=True)
class Work:
    """Operations of each kind that a job takes. Works add up, and are multiplied by a count."""

    product: int | float = 0.0
    model: int | float = 0.0
    double: int | float = 0.0
    eigen: int | float = 0.0
    memory: int | float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int | float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))

    def seconds(self, speed: Speed) -> float:
        """Seconds of one kind after the other, at `REACHED` of the machine's best rates."""
        return sum(getattr(self, f.name) / getattr(speed, f.name) for f in fields(self)) / REACHED
