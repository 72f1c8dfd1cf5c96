"""Which device a setting names."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import torch

from cospadi.errors import UserError, is_device


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_HELD: dict[int, int] = {}
"""File descriptors of the GPUs this process has taken: closing one gives the GPU back, as does the end of the process."""


def pick(name: str, setting: str) -> torch.device:
    """``auto`` takes a free CUDA GPU when there is one; any other name is torch's.

    Several jobs on one machine share its GPUs out between them: ``auto`` takes the first that no other job holds, or the
    first one when all are held.

    Raises:
        UserError: naming ``setting``, when this project does not know the name or torch has no such device.
    """
    if name == "auto":
        return torch.device("cuda", _free_gpu()) if torch.cuda.is_available() else torch.device("cpu")
    if not is_device(name):
        raise UserError(f"{setting}={name} is not a device that this runs on. Set it to auto, cpu or cuda.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count()
        raise UserError(f"{setting}={name} is set, but torch sees {n_gpus} CUDA GPUs here. Set it to auto or cpu.")
    return device


def _free_gpu() -> int:
    if _HELD:
        return next(iter(_HELD))
    for index in range(torch.cuda.device_count()):
        lock = Path(tempfile.gettempdir()) / f"cospadi-{os.getuid()}-{_identity(index)}.lock"
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        _HELD[index] = descriptor
        return index
    return 0


def _identity(index: int) -> str:
    """The card itself: indices differ between processes with different CUDA_VISIBLE_DEVICES."""
    return str(torch.cuda.get_device_properties(index).uuid)
