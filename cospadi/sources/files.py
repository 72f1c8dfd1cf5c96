"""Files of a checkpoint: the ones transformers would load, and the ones that belong beside them.

Data only: no pickled weights (``*.bin``, ``*.pt``) and no code (``*.py``) is ever taken.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth")
TOKENIZER = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's named chat templates."""
LICENCES = ("LICEN[SC]E*", "COPYING*", "NOTICE*", "USE_POLICY*")
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt", *LICENCES)
ADAPTER = "adapter_config.json"


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers loads: ``model.safetensors``, otherwise those that the index names.

    Any other safetensors file of the folder is somebody's copy, an adapter or another layout of the same weights.
    Files that the index names and that are missing are among them. None where the folder has neither.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]


def companions(folder: Path) -> list[Path]:
    """Everything beside the weights and ``config.json`` that belongs to a model: tokenizer, templates, settings, licences."""
    folder = Path(folder)
    own = [file for file in sorted(folder.iterdir()) if file.is_file() and matches(file.name, COMPANIONS)]
    kept = [file for file in own if file.name not in ("config.json", ADAPTER) and not file.name.endswith(".index.json")]
    return [*kept, *sorted((folder / TEMPLATES).glob("*.jinja"))]


def refuse_other_kinds(config: dict[str, Any], named: str) -> None:
    """
    Args:
        config: ``config.json`` of a checkpoint.
        named: the setting that leads to it, for the sentence.

    Raises:
        UserError: its weights are not plain numbers: it is compressed or quantized.
    """
    compression = quantization_of(config)
    method = compression.get("quant_method", "unknown")
    if method == "cospadi":
        raise UserError(
            f"{named} is compressed by cospadi already. Compress the model that it was made from: its ratio is counted from "
            "16-bit weights."
        )
    if compression:
        raise UserError(
            f"{named} is quantized ({method}), so its stored weights are codes and not numbers. Name the 16-bit model that it "
            "was made from."
        )


def refuse_adapter(folder: Path, named: str) -> None:
    """
    Raises:
        UserError: the folder holds an adapter, alone or on top of weights.
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{named} holds an adapter ({ADAPTER}), which transformers would put on top of the weights. Merge it first "
            "(merge_and_unload of peft, then save_pretrained), and name the merged model."
        )


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of quantized weights, wherever it says it; empty where they are plain numbers.

    >>> quantization_of({"quantization_config": {"quant_method": "fp8"}}), quantization_of({"model_type": "llama"})
    ({'quant_method': 'fp8'}, {})
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                return dict(section[key])
    return {}


def is_pointer(file: Path) -> bool:
    """Whether a clone without git-lfs left a few lines of text in place of ``file``."""
    with open(file, "rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs")
