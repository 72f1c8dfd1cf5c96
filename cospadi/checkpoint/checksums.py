"""Checksums of a checkpoint's tensors: stored in the safetensors' own metadata, checked before a model is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cospadi.errors import UserError
from cospadi.sources.files import is_pointer

CHECKSUMS = "cospadi_checksums"
"""Key of the metadata: JSON, tensor name -> checksum, at least of the tensors in the same file."""


def checksum(tensor: Tensor) -> str:
    """The first 16 hexadecimal digits of the sha256 of a tensor's dtype, shape and bytes, on any device.

    >>> checksum(torch.zeros(3)) == checksum(torch.zeros(3)[None]), checksum(torch.zeros(2)) == checksum(torch.zeros(2))
    (False, True)
    """
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def verify_files(files: Iterable[Path | str]) -> set[str]:
    """Read every tensor of these safetensors and compare it with its checksum; the names of all.

    Raises:
        UserError: naming the file, when it is cut short or damaged, or carries no checksums.
    """
    names: set[str] = set()
    for file in map(Path, files):
        try:
            with safe_open(file, framework="pt") as tensors:
                expected = json.loads((tensors.metadata() or {}).get(CHECKSUMS, "{}"))
                if not expected:
                    raise UserError(f"{file} carries no checksums, so cospadi did not write it. Write it again.")
                names |= set(tensors.keys())
                damaged = [name for name in tensors.keys() if checksum(tensors.get_tensor(name)) != expected.get(name)]  # noqa: SIM118
        except UserError:
            raise
        except FileNotFoundError as error:
            if file.is_file():  # safetensors says so of files that it must not read, too
                raise UserError(f"{file} may not be read. Give yourself the right to: chmod u+r.") from error
            raise UserError(f"{file} is missing. Copy or download the checkpoint again.") from error
        except (SafetensorError, OSError, ValueError) as error:
            if is_pointer(file):
                raise UserError(f"{file} stands for a file that git-lfs holds. Fetch it: git lfs pull.") from error
            raise UserError(f"{file} is damaged or cut short ({error}). Copy or download it again.") from error
        if damaged:
            raise UserError(f"{file} is damaged: {', '.join(damaged[:3])} differ from their checksums. Copy it again.")
    return names
