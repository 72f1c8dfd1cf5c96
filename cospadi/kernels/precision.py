"""Which library multiplies dense float32 matrices, and with how many bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(exact: bool) -> Iterator[None]:
    """The fastest float32 products there are: with all their bits, or (not ``exact``) in TF32 on an NVIDIA GPU.

    On a CPU they are exact either way, but oneDNN's: on AMD's AVX-512 over twice as fast as MKL's, which is torch's choice.
    Asking for them by the name of bfloat16 gives float32 everywhere but on CPUs with AMX, which are left as they are.
    """
    settings = [(torch.backends.cuda.matmul, "ieee" if exact else "tf32")]
    if not _has_amx():
        settings.append((torch.backends.mkldnn.matmul, "bf16"))
    before = [setting.fp32_precision for setting, _ in settings]
    try:
        for setting, precision in settings:
            setting.fp32_precision = precision
        yield
    finally:
        for (setting, _), precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _has_amx() -> bool:
    """Whether bfloat16 would really be used: True too where torch does not say."""
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return is_supported is None or is_supported()
