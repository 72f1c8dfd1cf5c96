"""A checkpoint's projections: found by name, read one at a time, turned once into ``(d_in, d_out)``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.experts import Part, expanded, groups_of_block, names_experts, parts, unfuse, weight_of
from cospadi.sources.addresses import brief
from cospadi.sources.architecture import auto_class, auto_class_of, quiet
from cospadi.sources.files import weight_files
from cospadi.sources.settings import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are numbers themselves, as safetensors names them."""


@dataclass(frozen=True)
class Projection:
    """One linear layer that is compressed."""

    name: str
    """``model.layers.0.self_attn.q_proj``"""
    layer: int
    projection: str
    """``self_attn.q_proj``"""
    shared_input: str
    """First projection of the block that reads the same input: the gram is filed under it."""
    d_in: int
    d_out: int
    attended: bool = False
    """Other tokens read its outputs through the attention (`ModelConfig.attended`)."""


WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""Bytes of a number, by the name that safetensors has for its dtype."""


class Checkpoint:
    """The tensors that transformers loads from a folder, read one at a time.

    Raises:
        UserError: when the folder holds no safetensors, or a file is missing.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        files = weight_files(self.folder)
        missing = [file.name for file in files if not file.is_file()]
        if not files or missing:
            what = f"lacks {', '.join(missing[:3])}" if missing else "holds no model.safetensors"
            raise UserError(
                f"{self.folder} {what}, so it is not a checkpoint. Point model.source at a folder written by save_pretrained."
            )
        self._open = [safe_open(file, framework="pt") for file in files]
        self._where = {name: handle for handle in self._open for name in handle.keys()}  # noqa: SIM118

    @property
    def names(self) -> list[str]:
        """Names of the tensors as they are stored. Those of `parts` can be read, too."""
        return list(self._where)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Weights of single experts, by the names that they have when experts are apart."""
        return parts({name: self.shape(name) for name in self._where if ".experts." in name})

    @property
    def names_apart(self) -> list[str]:
        """`names` with those of `parts` in place of the fused parameters."""
        fused = {part.fused for part in self.parts.values()}
        return [*(name for name in self._where if name not in fused), *self.parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._where:
            return self.parts[name].shape
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        if name in self._where:
            return self._where[name].get_tensor(name)
        part = self.parts[name]
        return self._where[part.fused].get_slice(part.fused)[part.expert, part.rows]

    def dtype(self, name: str) -> str:
        """Dtype as safetensors names it: ``BF16``."""
        stored = name if name in self._where else self.parts[name].fused
        return self._where[stored].get_slice(stored).get_dtype()

    def n_bytes(self, name: str, dtype: str | None = None) -> int:
        """Bytes of a tensor, without reading it: as it is stored, or once floats are in ``dtype`` (``bfloat16``)."""
        stored = self.dtype(name)
        is_cast = dtype is not None and stored.startswith(("F", "BF"))
        width = getattr(torch, dtype).itemsize if is_cast else WIDTHS[stored]
        return math.prod(self.shape(name)) * width

    def weight(self, projection: Projection) -> Float[Tensor, "d_in d_out"]:
        """The projection's weight in float32: ``outputs = inputs @ weight``."""
        return self.read(f"{projection.name}.weight").T.float()

    @cached_property
    def config(self) -> dict[str, object]:
        return json.loads((self.folder / "config.json").read_text())


def find_projections(folder: Path, config: ModelConfig) -> list[Projection]:
    """All projections named by ``config.shared_inputs`` in every block, in the order in which data meets them.

    Blocks of one model may differ: some attend, others hold a convolution or a recurrence. A projection is left out where a block
    has none of its name (`check_loadable` tells that from a damaged file).

    Raises:
        UserError: when no block has one, listing the weights that were found instead; when a block has none at all.
    """
    checkpoint = Checkpoint(folder)
    pattern = re.compile(re.escape(config.blocks) + r"\.(\d+)\.(.+)\.weight")
    matches = [m for m in map(pattern.fullmatch, [*checkpoint.names, *checkpoint.parts]) if m]
    layers = range(1 + max((int(m[1]) for m in matches), default=-1))  # a block that is missing whole is missing, too
    present = {(int(m[1]), m[2]) for m in matches}
    names = {projection for _, projection in present}
    expected = [projection for group in expanded(config.shared_inputs, names) for projection in group]
    groups = [
        groups_of_block(config.shared_inputs, {projection for i, projection in present if i == layer})
        for layer in layers
    ]
    missing = expected if not all(groups) else [projection for projection in expected if projection not in names]
    if not layers or missing:
        raise UserError(_nothing_found(checkpoint, config, missing or expected))
    projections = []
    for layer in layers:
        for shared_input, projection in ((group[0], projection) for group in groups[layer] for projection in group):
            name = f"{config.blocks}.{layer}.{projection}"
            if checkpoint.dtype(f"{name}.weight") not in PLAIN:
                raise UserError(
                    f"{name}.weight holds {checkpoint.dtype(f'{name}.weight')} numbers, so {folder} is quantized. Name the 16-bit "
                    "model that it was made from."
                )
            d_out, d_in = checkpoint.shape(f"{name}.weight")
            attended = projection in config.attended
            projections.append(Projection(name, layer, projection, shared_input, d_in, d_out, attended))
    return projections


TRANSPOSED = ("gpt2", "openai-gpt")
"""Families whose matrices are ``Conv1D`` layers, which keep them the other way round."""


def _nothing_found(checkpoint: Checkpoint, config: ModelConfig, missing: list[str]) -> str:
    linear = [n.removesuffix(".weight") for n in checkpoint.names if n.endswith(".weight")]
    kinds = sorted({re.sub(r"\.\d+\.", ".<i>.", n) for n in linear if len(checkpoint.shape(f"{n}.weight")) == 2})
    family = checkpoint.config.get("model_type", "unknown")
    found = (
        f"{checkpoint.folder} (model_type {family}) lacks the projections {', '.join(missing)} under {config.blocks}. "
        f"Matrices found: {', '.join(kinds)}."
    )
    if family in TRANSPOSED:
        return (
            f"{found} Its matrices are Conv1D layers of transformers, and only linear layers are compressed: whatever model.blocks "
            "and model.shared_inputs say, this family is not supported."
        )
    return f"{found} Set model.blocks and model.shared_inputs to match, in conf/model or for one compress{_suggested(kinds)}."


def _suggested(kinds: list[str]) -> str:
    """Options that name every matrix of the largest list of blocks, each with an input of its own, ready to paste."""
    of_blocks: dict[str, list[str]] = {}
    for kind in kinds:
        blocks, found, projection = kind.partition(".<i>.")
        if found and ".<i>." not in projection:
            of_blocks.setdefault(blocks, []).append(projection)
    if not of_blocks:
        return ""
    blocks, projections = max(of_blocks.items(), key=lambda item: len(item[1]))
    inputs = ",".join(f"[{projection}]" for projection in projections)
    return (
        f": --set model.blocks={blocks} --set 'model.shared_inputs=[{inputs}]' --set 'model.attended=[]' (write those that "
        "read the same input in one pair of brackets)"
    )


def check_loadable(folder: Path, config: ModelConfig) -> list[Projection]:
    """Build the model without its weights, and its tokenizer, to learn now whether transformers can.

    Returns:
        its projections, as `find_projections`.

    Raises:
        UserError: when it cannot, or when a projection of the checkpoint has another shape than the model's.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder)
        with init_empty_weights():
            model = auto_class(settings).from_config(settings)
        load_tokenizer(folder)
        projections = find_projections(folder, config)
        if names_experts(p.projection for p in projections):
            unfuse(model)
        for p in projections:
            layer = model.get_submodule(p.name)
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"{p.name} is a {type(layer).__name__}, and only linear layers are compressed")
            built = tuple(layer.weight.shape)
            stored = (p.d_out, p.d_in)
            if built != stored:
                raise ValueError(f"{p.name}.weight is {stored}, config.json makes it {built}")
        n_built = len(model.get_submodule(config.blocks))
        n_stored = 1 + projections[-1].layer
        if n_built != n_stored:
            raise ValueError(f"config.json has {n_built} blocks, the weights have {n_stored}")
        _require_stored(model, config, projections)
        return projections
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, OSError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"transformers cannot load model.source={config.source}: {lines[0].rstrip('.')}. "
            "Check its config.json, its tokenizer files and that the download is whole."
        ) from error


def _require_stored(model: nn.Module, config: ModelConfig, projections: Sequence[Projection]) -> None:
    """
    Raises:
        ValueError: a block of ``model`` has a projection that its file lacks.
    """
    names = {p.projection for p in projections}
    stored = {p.name for p in projections}
    for layer, block in enumerate(model.get_submodule(config.blocks)):
        for name in names & {name for name, _ in block.named_modules()}:
            if f"{config.blocks}.{layer}.{name}" not in stored:
                raise ValueError(f"the files lack {config.blocks}.{layer}.{name}.weight")


def unread_tensors(folder: Path) -> list[str]:
    """Names of stored tensors that transformers does not load: heads its class lacks, and copies of tied weights.

    What transformers itself reports is the reference: it renames tensors while it loads.
    """
    with quiet():
        model, report = auto_class_of(folder).from_pretrained(folder, device_map="meta", output_loading_info=True)
    checkpoint = Checkpoint(folder)
    names = set(checkpoint.names)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    copies = [
        copy
        for copy, owner in tied.items()
        if copy in names and owner in names and torch.equal(checkpoint.read(copy), checkpoint.read(owner))
    ]
    return sorted({*(set(report["unexpected_keys"]) & names), *copies})


def load(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The whole dense model, ready to evaluate."""
    model = auto_class_of(folder).from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def replace_weights(model: nn.Module, weights: Iterable[tuple[str, Float[Tensor, "_ _"]]]) -> None:
    """Overwrite projections, named as in ``Projection.name``, in place; each weight is ``(d_in, d_out)`` of its own."""
    for name, weight in weights:
        weight_of(model, name).copy_(weight.T)


class _LastBlock(Exception):
    """All blocks have been called."""


class Arguments(NamedTuple):
    """What a block receives beside the hidden states."""

    further: tuple[object, ...]
    named: Mapping[str, object]


class BlockWalker:
    """Runs token sequences through a checkpoint block by block, with one block's weights in memory at a time.

    Only the hidden states of all samples are kept. Embeddings and everything around the blocks stay loaded; a block's
    weights are read when its turn comes and dropped after it.
    """

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device, attention: str | None = None):
        from accelerate import init_empty_weights
        from transformers import AutoConfig

        self.checkpoint = Checkpoint(folder)
        self.config = config
        self.device = device
        self.dtype = getattr(torch, config.dtype)
        with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are computed, not stored
            settings = AutoConfig.from_pretrained(folder)
            model = auto_class(settings).from_config(settings, dtype=self.dtype, attn_implementation=attention)
        if names_experts(config.projections):
            unfuse(model)
        self.model = model.requires_grad_(False)
        decoder_path, _, blocks_name = config.blocks.rpartition(".")
        self.decoder = model.get_submodule(decoder_path).eval()
        self.blocks: nn.ModuleList = self.decoder.get_submodule(blocks_name)
        self.gives_tuples = False
        """Whether blocks hand on a tuple, whose first element are the hidden states."""
        around = [n for n, _ in self.decoder.named_parameters() if not n.startswith(f"{blocks_name}.")]
        self._read(self.decoder, decoder_path, around)
        for buffer_name, buffer in list(self.decoder.named_buffers()):
            owner, _, leaf = buffer_name.rpartition(".")
            self.decoder.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)

    def _read(self, module: nn.Module, path: str, names: Iterable[str]) -> None:
        state = {n: self.checkpoint.read(f"{path}.{n}").to(self.device, self.dtype) for n in names}
        module.load_state_dict(state, assign=True, strict=False)

    @torch.no_grad()
    def embed(self, batches: Iterable[Tensor]) -> tuple[list[Tensor], list[list[Arguments]]]:
        """Hidden states that enter the first block, and the further arguments that every block receives, per batch.

        Raises:
            UserError: a block hands on more than hidden states to the next one.

        Blocks are stood in for by recorders that hand on their input, so that whatever the model computes per layer
        (rotary tables, masks, sliding windows) is taken from the model itself.
        """
        hidden = []
        arguments = []
        with self._stood_in():
            for tokens in batches:
                calls: list[tuple[Tensor, Arguments]] = []

                def recorder(states: Tensor, *further: object, calls: list = calls, **named: object) -> Tensor:
                    calls.append((states, Arguments(further, named)))
                    if len(calls) == len(self.blocks):
                        raise _LastBlock
                    return states

                for block in self.blocks:
                    block.forward = recorder
                # What comes after the blocks is not needed, and would meet their inputs where it expects outputs.
                try:
                    self.decoder(input_ids=tokens.to(self.device), use_cache=False)
                except _LastBlock:
                    pass
                except (TypeError, ValueError, IndexError) as error:
                    if not calls:
                        raise  # not what a block handed on
                    raise UserError(
                        f"The blocks of {type(self.decoder).__name__} hand on more than hidden states ({brief(error)}), so they "
                        "cannot be calibrated one by one. Compress the model in memory with cospadi.compress."
                    ) from error
                hidden.append(calls[0][0])
                arguments.append([of_block for _, of_block in calls])
        return hidden, arguments

    def walk(self) -> Iterator[tuple[int, nn.Module]]:
        """Each block in turn, its weights loaded for the time of one step."""
        for index in range(len(self.blocks)):
            with self.loaded(index) as block:
                yield index, block

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, which do not ask for gradients."""
        from accelerate.utils import set_module_tensor_to_device

        block = self.blocks[index]
        names = [n for n, _ in block.named_parameters()]
        self._read(block, f"{self.config.blocks}.{index}", names)
        yield block.requires_grad_(False)
        for name in names:  # buffers stay: they are computed, and not in the file
            set_module_tensor_to_device(block, name, "meta")

    def run(self, index: int, states: Tensor, arguments: Arguments) -> Tensor:
        """Hidden states behind a block that is `loaded`, called as its model calls it.

        Raises:
            UserError: the block asks for more than that; naming it.
        """
        block = self.blocks[index]
        try:
            out = block(states, *arguments.further, **arguments.named)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
            raise UserError(
                f"{self.config.blocks}.{index}, a {type(block).__name__}, does not run on its own ({type(error).__name__}: "
                f"{brief(error)}), so this model cannot be calibrated block by block. Compress the model in memory with "
                "cospadi.compress."
            ) from error
        self.gives_tuples = isinstance(out, tuple)
        return out[0] if self.gives_tuples else out

    def load_head(self) -> None:
        """Read the weights of what comes after the decoder, which ``logits`` needs; a tied head has those of the embeddings."""
        stored = set(self.checkpoint.names)
        holds_decoder = self.config.blocks.partition(".")[0]
        for name, module in self.model.named_children():
            if name != holds_decoder:
                self._read(module, name, [n for n, _ in module.named_parameters() if f"{name}.{n}" in stored])
        if self.head.weight.is_meta:
            self.head.weight = self.model.get_input_embeddings().weight
        self.model.requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        """The output layer; after `load_head` with its weights."""
        return self.model.get_output_embeddings()

    def finished(
        self, tokens: Int[Tensor, "batch length"], states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        """What enters the output layer when ``states`` leave the last block, as the model's class computes it; after a `run`."""
        with self._handing_on(states):
            return self.decoder(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state

    def logits(
        self, tokens: Int[Tensor, "batch length"], states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """What the model makes of ``states`` that leave its last block; after `load_head` and a `run`."""
        with self._handing_on(states):
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits

    @contextmanager
    def _handing_on(self, states: Tensor) -> Iterator[None]:
        with self._stood_in():
            for block in self.blocks:
                block.forward = lambda *_, **__: (states,) if self.gives_tuples else states
            yield

    @contextmanager
    def _stood_in(self) -> Iterator[None]:
        """Blocks whose ``forward`` may be replaced: afterwards it is their own again."""
        originals = [block.forward for block in self.blocks]
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, originals, strict=True):
                block.forward = forward
