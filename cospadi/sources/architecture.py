"""The class that a checkpoint is loaded with, and the names of its modules.

transformers renames and merges tensors while it loads some families, and undoes that while it saves them: files of GPT-NeoX hold
``embed_out``, its model ``lm_head``; files hold every expert, a model one tensor of all. Everything here goes by the names of modules, so
such a checkpoint is written once under these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from cospadi.errors import UserError
from cospadi.sources.files import INDEX, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def auto_class(settings: PreTrainedConfig) -> Any:
    """The ``Auto…`` class of transformers for a config: of causal language models, else of those that also read images.

    Raises:
        UserError: transformers has neither.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(settings) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(settings) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(
        f"transformers has no causal language model of model_type {settings.model_type}, so this type is not supported. Compress "
        "another model, or a part of this one that is a causal language model saved on its own."
    )


def auto_class_of(folder: Path) -> Any:
    """`auto_class` of a checkpoint."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder))


def write_module_names(folder: Path) -> bool:
    """Write the weights of a checkpoint anew under the names of modules, where its files have others.

    The whole model is in memory meanwhile, in the dtype that it is stored in.

    Returns:
        whether they had others.

    Raises:
        UserError: the files lack tensors of the model that transformers would fill with random numbers.
    """
    stored = _names(folder)
    model, missing = _on_meta(folder)
    if model is None or not _differ(model, stored):
        return False
    if missing:
        if stored & set(model.state_dict()):
            return False  # what is missing is told with the projections that were found
        raise UserError(
            f"The files lack {', '.join(missing[:3])}, which transformers would fill with random numbers. Save the whole "
            f"{type(model).__name__}, not a part of it."
        )
    print("Writing the weights under the names of the model's modules", flush=True)
    with quiet():
        whole = auto_class_of(folder).from_pretrained(folder, dtype="auto")
    for file in [*weight_files(folder), folder / INDEX]:
        file.unlink(missing_ok=True)  # links to the source, or files of ours
    whole.save_pretrained(folder, save_original_format=False)
    return True


def write_original_names(folder: Path, shard_bytes: int) -> bool:
    """The opposite: what transformers itself would write, which other runtimes know.

    Returns:
        whether the names are others than those of modules.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with quiet():
        on_meta = auto_class_of(folder).from_pretrained(folder, device_map="meta")
        on_meta._weight_conversions = None  # those of its type, and not the none that loading these files took
        if set(revert_weight_conversion(on_meta, on_meta.state_dict())) == set(on_meta.state_dict()):
            return False
        whole = auto_class_of(folder).from_pretrained(folder, dtype="auto")
    whole._weight_conversions = None
    for file in [*weight_files(folder), folder / INDEX]:
        file.unlink(missing_ok=True)
    whole.save_pretrained(folder, max_shard_size=shard_bytes)
    return True


def _on_meta(folder: Path) -> tuple[Any, list[str]]:
    """The model without numbers, and what it misses in the files; ``None`` where transformers cannot make it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            model, report = auto_class_of(folder).from_pretrained(folder, device_map="meta", output_loading_info=True)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, OSError, ImportError, StrictDataclassError):
        return None, []  # `cospadi.models.check_loadable` says why
    return model, sorted(report["missing_keys"])


def _differ(model: Any, stored: set[str]) -> bool:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return bool(set(model.state_dict()) - tied - stored)


def _names(folder: Path) -> set[str]:
    names = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its table of what was not loaded, and without its bar."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
