"""What a machine did while something ran: operations, memory, and how fast it can multiply at best.

Each is measured in a run of its own, since looking slows down what is looked at.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from cospadi.devices import synchronize
from cospadi.kernels.precision import float32_products

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's notes on start and stop
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


@dataclass(frozen=True)
class Usage:
    """Operations, time and memory of one run."""

    flops: int
    """Operations in matrix products; a multiplication and an addition are two."""
    product_share: float
    """Time in matrix products over all time: of the run on a CPU, of the busy device on a GPU."""
    peak_bytes: int
    """Most that torch had allocated at once, beyond what was there before."""


def usage(run: Callable[[], object], device: torch.device) -> Usage:
    """Run twice, once counting operations, once under the profiler."""
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with (
        _cuda_peak(device) as cuda_peak,
        profile(activities=activities, profile_memory=True) as profiled,
        record_function("run"),  # time outside of torch's operations counts as its own
    ):
        run()
        synchronize(device)
    peak = cuda_peak[0] if device.type == "cuda" else _cpu_peak(profiled)
    return Usage(counter.get_total_flops(), _product_share(profiled, device), peak)


KINDS = ("float32", "fast", "bfloat16")
"""Arithmetic of `product_peaks`."""


def product_peaks(
    rows: int, inner: int, columns: int, device: torch.device, of: Sequence[str] = KINDS
) -> dict[str, float]:
    """Best floating-point operations per second of ``(rows × inner) @ (inner × columns)``, by arithmetic.

    ``fast`` is what htp's rounds use (`float32_products`): TF32 on a GPU; on a CPU another library's float32.
    """
    kinds = {
        "float32": (torch.float32, nullcontext()),
        "fast": (torch.float32, float32_products(exact=False)),
        "bfloat16": (torch.bfloat16, nullcontext()),
    }
    rates = {}
    for name, (dtype, precision) in ((name, kinds[name]) for name in of):
        left = torch.randn((rows, inner), device=device).to(dtype)
        right = torch.randn((inner, columns), device=device).to(dtype)
        with precision:
            rates[name] = 2 * rows * inner * columns / _best_seconds(lambda a=left, b=right: a @ b, device)
    return rates


def machine(device: torch.device) -> str:
    """Device, threads and version, for the head of a report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{name}, torch {torch.__version__}"


def _best_seconds(run: Callable[[], object], device: torch.device, trials: int = 10, calls: int = 5) -> float:
    """Least mean of some calls in a row, over some trials; the first is only a warm-up."""
    seconds = []
    for _ in range(trials):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / calls)
    return min(seconds[1:])


def _product_share(profiled: profile, device: torch.device) -> float:
    events = profiled.key_averages()
    if device.type != "cuda":
        times = {event.key: event.self_cpu_time_total for event in events}
        return sum(times[name] for name in PRODUCTS & times.keys()) / max(sum(times.values()), 1e-9)
    cuda = torch.autograd.DeviceType.CUDA  # a kernel is listed by itself, and again under the operation that started it
    busy = sum(e.self_device_time_total for e in events if e.device_type == cuda and not e.is_user_annotation)
    inside = sum(e.self_device_time_total for e in events if e.key in PRODUCTS and e.device_type != cuda)
    return inside / max(busy, 1e-9)


def _cpu_peak(profiled: profile) -> int:
    """The highest running sum of what was allocated and freed."""
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    held = 0
    peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += size
        peak = max(peak, held)
    return peak


def _product_flops(_: object, left: tuple, right: tuple, **__: object) -> int:
    return 2 * math.prod(left) * right[-1]


_IN_PLACE = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}
"""Operations that torch's counter does not know, and how many each takes."""


@contextmanager
def _cuda_peak(device: torch.device) -> Iterator[list[int]]:
    """A list that holds the peak once the block is over; empty on a CPU."""
    peaks: list[int] = []
    if device.type != "cuda":
        yield peaks
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peaks
    peaks.append(torch.cuda.max_memory_allocated(device) - before)
