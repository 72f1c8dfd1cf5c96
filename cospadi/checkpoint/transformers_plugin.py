"""How transformers learns about compressed checkpoints: registered by ``import cospadi`` when transformers is there.

``AutoModelForCausalLM.from_pretrained(folder)`` then builds the model with compressed layers in place of linear ones and
fills them from the safetensors, after every tensor has been checked against the checksum that was stored with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.checksums import CHECKSUMS, checksum, verify_files
from cospadi.checkpoint.layers import SHARES
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.specs import empty_layer, specs, ties
from cospadi.errors import UserError
from cospadi.experts import Experts, names_experts, unfuse

METHOD = "cospadi"
FORMAT_VERSION = 3
"""Newest format version of checkpoints that is read. Layers that share need 2, quantized ones 3."""


def format_version(modules: Mapping[str, Mapping[str, Any]]) -> int:
    """The oldest format that can say this.

    >>> format_version({"a": {}}), format_version({"a": {}, "b": {"shares": "a"}}), format_version({"a": {"formats": {}}})
    (1, 2, 3)
    """
    if any("formats" in spec for spec in modules.values()):
        return 3
    return 2 if any(SHARES in spec for spec in modules.values()) else 1


@register_quantization_config(METHOD)
class CoSpaDiQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed checkpoint's config.json.

    Args:
        modules: path of a linear layer -> `CompressedLinear.spec`.
        format_version: of the checkpoint.
        record: how it was made: method, settings, calibration.

    Raises:
        UserError: the checkpoint is of a newer format, or names no layers.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int | None = 1,
        record: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = modules or {}
        self.record = record or {}
        if not isinstance(format_version, int):
            raise UserError(
                f"The checkpoint's quantization_config was changed: its format_version is {format_version}. Copy it again."
            )
        if format_version > FORMAT_VERSION:
            raise UserError(
                f"This checkpoint has format_version {format_version}, this cospadi reads up to {FORMAT_VERSION}. "
                "Install a newer cospadi."
            )
        if not isinstance(self.modules, dict) or not self.modules:
            raise UserError("The checkpoint's quantization_config names no compressed modules. Write it again.")


@register_quantizer(METHOD)
class CoSpaDiQuantizer(HfQuantizer):
    """Swaps linear layers for compressed ones before their tensors are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        put_empty_layers(model, modules_of(model, self.quantization_config.modules))
        if checkpoint_files:
            refuse_gaps(model, verify_files(checkpoint_files))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """
        Raises:
            UserError: a layer is damaged, or on the disk while it shares with another.
        """
        refuse_offloaded_sharing(model, modules_of(model, self.quantization_config.modules))
        for layer in model.modules():
            if isinstance(layer, CompressedLinear):
                vars(layer).pop("weight")
                if not _is_offloaded(layer):  # its numbers are on the disk, and their checksums were right
                    layer.check()
                # Stored bits are not trained: transformers makes every floating parameter trainable when it loads.
                layer.requires_grad_(False)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Without those that would stack the experts, where `put_empty_layers` has taken them apart."""
        updated = super().update_weight_conversions(weight_conversions, model)
        if not any(isinstance(module, Experts) for module in model.modules()):
            return updated
        return [each for each in updated if not _stacks_experts(each)]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """For ``save_pretrained``: the checksums of what it is about to write.

        Compressed layers are stored under the names of modules, and so is all that is beside them: nothing that
        transformers renamed while it loaded is renamed again.
        """
        model._weight_conversions = []
        sums = {name: checksum(_in_memory(model, name, tensor)) for name, tensor in model.state_dict().items()}
        return None, {CHECKSUMS: json.dumps(sums)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Ordinary linear layers again, each with the weight multiplied out.

        Raises:
            UserError: a layer is offloaded to disk.
        """
        away = [n for n, layer in model.named_modules() if isinstance(layer, CompressedLinear) and _is_offloaded(layer)]
        if away:
            raise UserError(
                f"{away[0]} is offloaded to disk, so its weight cannot be multiplied out. Load the model without offloading, or "
                "run cospadi densify on its folder, which reads one layer at a time."
            )
        shared = ties(specs(model))
        for name, layer in list(model.named_modules()):
            if isinstance(layer, CompressedLinear):
                weight = layer.dense_weight()
                dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                dense.weight = nn.Parameter(weight.T.to(dtype or torch.float32).contiguous(), requires_grad=False)
                if layer.bias is not None:
                    dense.bias = nn.Parameter(layer.bias.to(dense.weight.dtype), requires_grad=False)
                model.set_submodule(name, dense)
        for keys in ("all_tied_weights_keys", "_tied_weights_keys") if shared else ():
            setattr(model, keys, {k: v for k, v in (getattr(model, keys, None) or {}).items() if k not in shared})
        return model


def _is_offloaded(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def _in_memory(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, read from the disk where accelerate keeps it there."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor


def refuse_offloaded_sharing(model: nn.Module, modules: Mapping[str, dict[str, Any]]) -> None:
    """
    Raises:
        UserError: layers that share a tensor are on the disk, where each would be given one of its own.
    """
    for name, owner in ties(modules).items():
        if any(_is_offloaded(model.get_submodule(part.rpartition(".")[0])) for part in (name, owner)):
            raise UserError(
                f"{name.rpartition('.')[0]} shares its dictionary or basis with another layer, and one of them is offloaded to disk. "
                "Keep layers that share in memory: give from_pretrained another device_map or more max_memory."
            )


def modules_of(model: nn.Module, modules: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Descriptions by the names that the layers have in ``model``: without a prefix where it is the decoder alone.

    A checkpoint is written under the names of the whole language model; `AutoModel` builds what is below its
    ``base_model_prefix``.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    is_base = prefix != "." and not hasattr(model, prefix[:-1])
    if not is_base:
        return dict(modules)

    def own(name: str) -> str:
        return name.removeprefix(prefix)

    return {own(name): spec | ({SHARES: own(spec[SHARES])} if SHARES in spec else {}) for name, spec in modules.items()}


def put_empty_layers(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Compressed layers without numbers, on the meta device, where the config names them.

    Raises:
        UserError: a name that is not a linear layer of this model, a size that does not match, or a broken description.
    """
    if names_experts(modules):
        unfuse(model)
    for name, spec in modules.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"The checkpoint's config.json names {name}, which this {type(model).__name__} does not have. "
                "Its config and its weights do not belong together: get the checkpoint again."
            ) from error
        if not isinstance(dense, nn.Linear):
            raise UserError(
                f"The checkpoint's config.json names {name}, which is a {type(dense).__name__}, not a Linear."
            )
        try:
            with torch.device("meta"):
                layer = empty_layer(spec, dense.weight.dtype)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"The checkpoint's config.json describes {name} in a way this cospadi does not know ({error}). "
                "Install a newer cospadi, or write the checkpoint again."
            ) from error
        sizes = (layer.in_features, layer.out_features)
        expected = (dense.in_features, dense.out_features)
        if sizes != expected or (layer.bias is None) != (dense.bias is None):
            raise UserError(
                f"The checkpoint's config.json makes {name} {sizes[0]}×{sizes[1]}, the model {expected[0]}×{expected[1]}. "
                "Its config and its weights do not belong together: get the checkpoint again."
            )
        layer.weight = _weight_to_initialize(dense)
        model.set_submodule(name, layer)
    declare_ties(model, modules)


def _weight_to_initialize(dense: nn.Linear) -> torch.Tensor:
    """What stands for a compressed layer's weight while transformers loads, and is in no state dict.

    Some families initialize the ``weight`` of what was a linear layer from the module around it, such as ``mlp.c_proj``.
    """
    weight = torch.empty_like(dense.weight, device="meta", requires_grad=False)
    weight._is_hf_initialized = True
    return weight


def _stacks_experts(conversion: Any) -> bool:
    return any(isinstance(step, MergeModulelist) for step in getattr(conversion, "operations", ()))


def declare_ties(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Tell transformers which parameters are one, so that it ties them on loading and saves each once.

    On the instance, and under both names: it saves by the one and loads by the other.

    Raises:
        UserError: a layer shares what no layer stores.
    """
    shared = ties(modules)
    for keys in ("all_tied_weights_keys", "_tied_weights_keys") if shared else ():
        setattr(model, keys, {**(getattr(model, keys, None) or {}), **shared})


def refuse_gaps(model: nn.Module, stored: set[str]) -> None:
    """Compare what a model needs with what its files hold: transformers would fill gaps with random numbers.

    The class that was saved must be whole. Another one may have a head of its own, which is trained later.

    Raises:
        UserError: naming what is missing.
    """
    prefix = f"{model.base_model_prefix}."
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    needed = set(model.state_dict()) - tied
    if type(model).__name__ not in (model.config.architectures or [type(model).__name__]):
        is_base = not hasattr(model, model.base_model_prefix)
        needed = {f"{prefix}{name}" for name in needed} if is_base else {n for n in needed if n.startswith(prefix)}
    missing = sorted(needed - stored)
    if missing:
        raise UserError(
            f"The checkpoint's files lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}, which its "
            "config.json asks for. Copy or download it again."
        )


def attach(model: nn.Module, record: dict[str, Any]) -> None:
    """Let ``save_pretrained`` of a model that holds compressed layers write a compressed checkpoint."""
    modules = specs(model)
    declare_ties(model, modules)
    config = CoSpaDiQuantizationConfig(modules, format_version(modules), record)
    model.config.quantization_config = config
    model.hf_quantizer = CoSpaDiQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
