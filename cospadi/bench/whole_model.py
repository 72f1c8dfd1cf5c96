"""How long ``htp`` takes for a whole model: random targets of every projection's size, equal sizes together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.bench.cases import SHAPES, atoms_and_sparsity, power_law
from cospadi.bench.solvers import output_error
from cospadi.bench.usage import product_peaks, usage
from cospadi.devices import synchronize
from cospadi.errors import UserError
from cospadi.factorization.solvers.htp import htp_batch
from cospadi.progress import Progress

MEMORY_MULTIPLE = 16
"""Times its own float32 bytes that a matrix is taken to need on a GPU while it is solved."""


@dataclass(frozen=True)
class Job:
    """All projections of one size, at one ratio."""

    d_in: int
    d_out: int
    count: int
    ratio: float
    atoms: int
    sparsity: int

    @property
    def work(self) -> float:
        """Operations of all rounds, up to a constant factor."""
        return float(self.count * self.d_out * self.atoms * (self.d_in + self.atoms))

    def targets(self, first: int, count: int, seed: int, device: torch.device) -> Float[Tensor, "count d_in d_out"]:
        """Some of them, drawn on the device."""
        draws = (torch.Generator(device).manual_seed(seed + i) for i in range(first, first + count))
        return torch.stack([power_law(self.d_in, self.d_out, draw) for draw in draws])


def jobs(shape: str, ratios: Sequence[float], rho: float) -> list[Job]:
    """What there is to do for a model.

    Raises:
        UserError: when there is no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--shape {shape} does not exist. Choose from {', '.join(SHAPES)}.")
    sizes = SHAPES[shape].sizes.items()
    return [
        Job(*size, count, ratio, *atoms_and_sparsity(*size, ratio, rho)) for ratio in ratios for size, count in sizes
    ]


def measure(
    shape: str, todo: Sequence[Job], seed: int, device: torch.device, batch: int | None
) -> Iterator[dict[str, Any]]:
    """A row per job, with the columns of `cospadi.bench.solver`: ``seconds`` are those of all ``matrices`` together."""
    htp_batch(torch.randn(1, 32, 48, device=device), 16, 8)  # what is compiled or loaded on a first call is in no time
    progress = Progress(len(todo), f"bench solver {shape}", sum(job.work for job in todo))
    for job in todo:
        row = _row(shape, job, seed, device, min(batch or _that_fit(job, device), job.count))
        progress.step(f"{job.count} of {job.d_in}x{job.d_out} at {job.ratio:g}", f"{row['seconds']:.3g} s", job.work)
        yield row


def check(job: Job, seed: int, device: torch.device) -> float:
    """By how much of it the output error of one matrix differs from that of float64 on the CPU."""
    target = job.targets(0, 1, seed, device)
    (fast,) = htp_batch(target, job.atoms, job.sparsity)
    (exact,) = htp_batch(target.double().cpu(), job.atoms, job.sparsity)
    reference = output_error(target[0].cpu(), exact.dictionary, exact.coefficients)
    return abs(output_error(target[0], fast.dictionary, fast.coefficients) - reference) / reference


def _row(shape: str, job: Job, seed: int, device: torch.device, at_a_time: int) -> dict[str, Any]:
    seconds = 0.0
    rounds = 0
    errors: list[float] = []
    for first in range(0, job.count, at_a_time):
        targets = job.targets(first, min(at_a_time, job.count - first), seed, device)
        synchronize(device)
        started = time.perf_counter()
        solutions = htp_batch(targets, job.atoms, job.sparsity)
        synchronize(device)
        seconds += time.perf_counter() - started
        rounds = max(rounds, *(len(fit.errors) - 2 for fit in solutions))
        errors += [output_error(y, f.dictionary, f.coefficients) for y, f in zip(targets, solutions, strict=True)]
        del solutions
    targets = job.targets(0, at_a_time, seed, device)
    used = usage(lambda: htp_batch(targets, job.atoms, job.sparsity), device)
    peaks = product_peaks(job.d_out, job.d_in, job.atoms, device)
    return {
        "solver": "htp",
        "weight": shape,
        "d_in": job.d_in,
        "d_out": job.d_out,
        "ratio": job.ratio,
        "atoms": job.atoms,
        "sparsity": job.sparsity,
        "rounds": rounds,
        "seconds": seconds,
        "output_error": fmean(errors),
        "matrices": job.count,
        "batch": at_a_time,
        "gflops": used.flops / at_a_time * job.count / seconds / 1e9,
        "peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
        "product_share": used.product_share,
        "memory_multiple": used.peak_bytes / (4 * job.d_in * job.d_out * at_a_time),
        "peak_bytes": used.peak_bytes,
    }


def _that_fit(job: Job, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // (MEMORY_MULTIPLE * 4 * job.d_in * job.d_out))
