"""Which device a setting names."""

from __future__ import annotations

import torch

from cospadi.errors import UserError


def pick(name: str, setting: str) -> torch.device:
    """``auto`` takes a CUDA GPU when there is one; any other name is torch's.

    Raises:
        UserError: naming ``setting``, when torch does not know the name or has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{setting}={name} is no device. Set it to auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{setting}={name} is set, but torch sees no CUDA GPU here. Set it to auto or cpu.")
    return device
