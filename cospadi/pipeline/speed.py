"""The rates of this machine, measured in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cospadi import devices
from cospadi.devices import synchronize
from cospadi.errors import AUTO
from cospadi.factorization.work import EIGEN, Speed
from cospadi.kernels.precision import float32_products


def measure(device: str = AUTO, dtype: str = "float32") -> Speed:
    """The rates of this machine, in a few seconds: the best of some short runs each, at sizes like those of a projection.

    Raises:
        UserError: there is no such device.
    """
    where = devices.pick(device, "--device")
    size = 4096 if where.type == "cuda" else 1024

    def rate(amount: int | float, run: Callable[[], object]) -> float:
        best = float("inf")
        # Ten short runs: on a busy machine some of them are alone.
        for _ in range(10):
            synchronize(where)
            started = time.perf_counter()
            started_cpu = time.process_time()
            run()
            synchronize(where)
            best = min(best, time.perf_counter() - started)
            # CPU seconds per thread do not count what other processes took.
            if where.type == "cpu":
                best = min(best, (time.process_time() - started_cpu) / torch.get_num_threads())
        return amount / best

    def squares(kind: torch.dtype) -> float:
        left = torch.randn(size, size, device=where).to(kind)
        return rate(2 * size**3, lambda: left @ left)

    with torch.no_grad():
        with float32_products(exact=False):
            product = squares(torch.float32)
        model = squares(getattr(torch, dtype))
        double = squares(torch.float64)
        half = torch.randn(size // 2, size // 2, device=where, dtype=torch.float64)
        eigen = rate(EIGEN * (size // 2) ** 3, lambda: torch.linalg.eigh(half @ half.T))
        long = torch.randn(2**25, device=where)
        memory = rate(3 * 4 * 2**25, lambda: long + long)
    return Speed(product, model, double, eigen, memory)
