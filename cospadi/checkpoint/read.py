"""Opening a compressed checkpoint, or saying why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from cospadi.checkpoint.layers import SHARES
from cospadi.checkpoint.specs import empty_layer, ties
from cospadi.checkpoint.transformers_plugin import METHOD, CoSpaDiQuantizationConfig
from cospadi.errors import UserError
from cospadi.models import Checkpoint
from cospadi.records import read_json
from cospadi.sources.addresses import brief
from cospadi.sources.architecture import auto_class_of
from cospadi.sources.files import INDEX, WEIGHTS, weight_files
from cospadi.sources.settings import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compression_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed checkpoint, checked.

    Raises:
        UserError: when ``folder`` is not a folder, not a checkpoint, not compressed by cospadi, or of a newer format.
    """
    folder = Path(folder)
    try:
        config = read_json(folder / "config.json")
        section = config.get("quantization_config") or {}
        method = section.get("quant_method")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder}/config.json cannot be read as JSON ({brief(error)}). Mend it, or copy the folder again."
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} holds no readable config.json, so it is not a checkpoint. Name a folder written by cospadi compress."
        ) from error
    if method != METHOD:
        raise UserError(f"{folder} is not compressed by cospadi (quant_method: {method or 'none'}). Compress it first.")
    CoSpaDiQuantizationConfig(**section)
    return section


def load(folder: Path | str, dtype: str | torch.dtype = "auto", **options: Any) -> PreTrainedModel:
    """A compressed model, ready to use; ``options`` go to ``from_pretrained``.

    Everything is checked before a model is returned: format, checksums, and that no tensor is missing or left over.

    Raises:
        UserError: saying what is wrong with the checkpoint.
    """
    folder = Path(folder)
    compression_of(folder)
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype} is not known. Choose auto, {', '.join(DTYPES)}.")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise UserError(f"dtype={dtype} holds no fractions. Choose auto, {', '.join(DTYPES)}.")
    if "quantization_config" in options:
        raise UserError(f"{folder} is compressed, and says itself how. Load it without quantization_config.")
    try:
        model, report = auto_class_of(folder).from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(f"A safetensors file of {folder} is damaged or cut short ({error}). Copy it again.") from error
    except UserError:
        raise  # says all there is to say
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"transformers cannot load {folder}: {brief(error)}. Copy or download it again.") from error
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        raise UserError(f"{folder} does not fill its model: {wrong}. Copy or download it again.")
    if getattr(model.config, "auto_map", None):
        del model.config.auto_map  # leads to a file that save_pretrained would not write
    return model.eval()


def parts_of(name: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The tensors of a compressed layer: part -> name in the checkpoint, which may be another layer's.

    Raises:
        UserError: when the description is not one of ours.
    """
    try:
        with torch.device("meta"):
            layer = empty_layer(spec)
            parts = {part: f"{name}.{part}" for part in layer.state_dict()}
        return parts | ({part: f"{spec[SHARES]}.{part}" for part in layer.shared_names} if SHARES in spec else {})
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.json describes {name} in a way this cospadi does not know ({error}).") from error


def opened(folder: Path, modules: Mapping[str, dict[str, Any]]) -> Checkpoint:
    """The opened checkpoint, known to be whole.

    Raises:
        UserError: when a file or a tensor is missing, or a file is damaged.
    """
    missing = [file.name for file in weight_files(folder) or [folder / WEIGHTS] if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}. Copy or download it again.")
    try:
        checkpoint = Checkpoint(folder)
    except SafetensorError as error:
        raise UserError(f"A safetensors file of {folder} is damaged or cut short ({error}). Copy it again.") from error
    names = {full for name, spec in modules.items() for full in parts_of(name, spec).values()}
    ties(modules)  # refuses what cannot be shared
    if (folder / INDEX).is_file():
        names |= set(read_json(folder / INDEX)["weight_map"])
    gaps = sorted(names - set(checkpoint.names))
    if gaps:
        raise UserError(f"{folder} lacks the tensors {', '.join(gaps[:3])}. Copy or download it again.")
    return checkpoint
