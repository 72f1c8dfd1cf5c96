"""Room 2: calibration text -> one gram per shared input.

The dense model reads the calibration tokens block by block. For every input that projections share (q/k/v, o, gate/up,
down) the gram ``XᵀX`` and the mean absolute activation are summed over all tokens.

Keys and values are read by other tokens, and by far not equally often: a token that receives the attention ``a_j`` passes an error of
its value on to the outputs of all that look at it, ``a_j`` times in all. So these two have a second gram, ``Σ_j a_j x_jᵀx_j``, with
``a_j = Σ_i A_ij`` averaged over heads, which sums to the number of tokens like the weights of the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cospadi import devices
from cospadi.calibration import attention
from cospadi.calibration.experts import ExpertListener, shortage
from cospadi.calibration.settings import CalibrationConfig
from cospadi.calibration.statistics import InputStatistics
from cospadi.errors import UserError
from cospadi.experts import expanded, groups_of_block
from cospadi.models import BlockWalker, load_tokenizer
from cospadi.records import read_json
from cospadi.sources.settings import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def draw_samples(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], n_samples: int, sample_length: int, seed: int
) -> Int[Tensor, "n_samples sample_length"]:
    """Token sequences cut one after another from the documents in a seeded order, joined by blank lines.

    No token is used twice and no special token is added.

    Raises:
        UserError: when the documents hold too few tokens.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    needed = n_samples * sample_length
    tokens = []
    for index in order:
        tokens += tokenizer(documents[index] + "\n\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed]).reshape(n_samples, sample_length)
    few = len(tokens) // sample_length
    shorter = (
        f"calibration.n_samples to {few} or less"
        if few
        else "calibration.n_samples and calibration.sample_length lower"
    )
    raise UserError(
        f"The calibration text has {len(tokens)} tokens, {needed} are asked for. Set {shorter}"
        f" (n_samples={n_samples} of sample_length={sample_length} now), or take a longer calibration.text."
    )


def samples(
    calibration: CalibrationConfig, folder: Path, documents: Path, at_most: int | None = None
) -> Int[Tensor, "n_samples sample_length"]:
    """What ``draw_samples`` draws for these settings from a prepared text, ``at_most`` so many of them."""
    n_samples = min(at_most or calibration.n_samples, calibration.n_samples)
    length = calibration.sample_length
    seed = calibration.seed
    return draw_samples(load_tokenizer(folder), read_json(documents), n_samples, length, seed)


def collect(
    folder: Path, model: ModelConfig, calibration: CalibrationConfig, tokens: Int[Tensor, "n_samples sample_length"]
) -> Iterator[tuple[int, dict[str, InputStatistics]]]:
    """Statistics of every shared input, one block at a time: ``(layer, {shared_input: statistics})``.

    Raises:
        UserError: at the first layer whose inputs are not finite, naming it.
    """
    device = devices.pick(calibration.device, "calibration.device")
    weights_tokens = _weights_tokens(model, calibration)
    walker = BlockWalker(folder, model, device, attention="eager" if weights_tokens else None)
    if weights_tokens:
        attention.tell_received(walker.decoder)
    hidden, arguments = walker.embed(tokens.split(calibration.batch_size))
    for layer, block in walker.walk():
        statistics: dict[str, InputStatistics] = {}
        hooks, experts = _listen_all(block, model, calibration, statistics)
        with torch.no_grad():
            for i, states in enumerate(hidden):
                hidden[i] = walker.run(layer, states, arguments[i][layer])
        for hook in hooks:
            hook.remove()
        statistics |= experts.statistics()
        if (line := shortage(statistics)) is not None:
            print(f"{model.blocks}.{layer}: {line}.", flush=True)
        for shared_input, of_input in statistics.items():
            if not all(torch.isfinite(gram).all() for gram in of_input.grams):
                raise UserError(
                    f"The calibration activations of {model.blocks}.{layer}.{shared_input} are not finite (NaN or "
                    "infinite). Check the checkpoint, or set model.dtype=float32."
                )
        yield layer, statistics


@torch.no_grad()
def gather(
    network: nn.Module,
    model: ModelConfig,
    calibration: CalibrationConfig,
    tokens: Int[Tensor, "n_samples sample_length"],
) -> Iterator[tuple[list[str], InputStatistics]]:
    """Statistics of every shared input of a network in memory: ``(names of its projections, statistics)``.

    All layers at once, in one pass over the tokens.

    Raises:
        UserError: a projection is missing or no linear layer, or the inputs of one are not finite.
    """
    try:
        blocks = list(network.get_submodule(model.blocks))
        _require_all(blocks, model)
        groups_of = [_groups(block, model) for block in blocks]
        layers = [
            [block.get_submodule(name) for name in group]
            for block, groups in zip(blocks, groups_of, strict=True)
            for group in groups
        ]
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"This {type(network).__name__} lacks a projection: {error}. Set model.blocks and model.shared_inputs to match."
        ) from error
    if not all(isinstance(layer, nn.Linear) for group in layers for layer in group):
        raise UserError("A projection is not a linear layer: is this model compressed already? Compress the original.")
    of_blocks: list[dict[str, InputStatistics]] = [{} for _ in blocks]
    listening = [
        _listen_all(block, model, calibration, statistics) for block, statistics in zip(blocks, of_blocks, strict=True)
    ]
    device = next(network.parameters()).device
    implementation = network.config._attn_implementation
    weights_tokens = _weights_tokens(model, calibration)
    try:
        if weights_tokens:
            attention.tell_received(network)
        for batch in tokens.split(calibration.batch_size):
            network(input_ids=batch.to(device), use_cache=False)
    finally:
        if weights_tokens:
            network.set_attn_implementation(implementation)
        for hook in (hook for hooks, _ in listening for hook in hooks):
            hook.remove()
    for layer, statistics in enumerate(of_blocks):
        statistics |= listening[layer][1].statistics()
        if (line := shortage(statistics)) is not None:
            print(f"{model.blocks}.{layer}: {line}.", flush=True)
        for group in groups_of[layer]:
            names = [f"{model.blocks}.{layer}.{name}" for name in group]
            if not all(torch.isfinite(gram).all() for gram in statistics[group[0]].grams):
                raise UserError(f"The calibration activations of {names[0]} are not finite (NaN or infinite).")
            yield names, statistics.pop(group[0])


def _weights_tokens(model: ModelConfig, calibration: CalibrationConfig) -> bool:
    """Whether tokens are weighted by the attention they receive; says so where it is asked for and cannot be."""
    if calibration.attention and not model.attended:
        print(
            "No projection of this model reads keys or values alone (model.attended is empty), so no input is weighted by attention.",
            flush=True,
        )
    return calibration.attention and bool(model.attended)


def _listen_all(
    block: nn.Module, model: ModelConfig, calibration: CalibrationConfig, statistics: dict[str, InputStatistics]
) -> tuple[list[torch.utils.hooks.RemovableHandle], ExpertListener]:
    """Hooks that fill ``statistics`` when tokens run through the block; those of experts fill a listener of their own."""
    dtype = getattr(torch, calibration.gram_dtype)
    groups = _groups(block, model)
    experts = ExpertListener(block, groups, dtype)
    hooks = [_listen(block, group[0], statistics, dtype) for group in groups if group[0] not in experts.inputs]
    attended = [group[0] for group in groups if set(group) & set(model.attended)]
    if calibration.attention and attended:
        hooks += _listen_to_attention(block, model, attended, statistics, dtype)
    return [*hooks, *experts.hooks], experts


def _require_all(blocks: Sequence[nn.Module], model: ModelConfig) -> None:
    """
    Raises:
        AttributeError: no block has a projection of ``model.shared_inputs``.
    """
    names = {name for block in blocks for name, _ in block.named_modules()}
    for projection in (projection for group in expanded(model.shared_inputs, names) for projection in group):
        if projection not in names:
            raise AttributeError(f"no block has {projection}")


def _groups(block: nn.Module, model: ModelConfig) -> list[list[str]]:
    """``model.shared_inputs`` of this block: with those of every expert, and without what only other blocks have."""
    return groups_of_block(model.shared_inputs, (name for name, _ in block.named_modules()))


def _listen_to_attention(
    block: nn.Module,
    model: ModelConfig,
    attended: Sequence[str],
    statistics: dict[str, InputStatistics],
    dtype: torch.dtype,
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that weigh what ``attended`` inputs hold by the attention it receives: the inputs come first, then the weights."""
    read: dict[str, Tensor] = {}

    def keep(shared_input: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[shared_input] = args[0].reshape(-1, args[0].shape[-1])

        return take

    def weigh(module: nn.Module, _: Any, outputs: Any) -> None:
        weights = outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None
        if weights is None:
            raise UserError(
                f"{type(module).__name__} does not tell its attention weights, by which the inputs of {', '.join(model.attended)} "
                "are weighted. Set calibration.attention=false."
            )
        received = weights.float().mean(dim=1).sum(dim=1).flatten()  # batch × heads × queries × keys
        for shared_input in attended:
            statistics[shared_input].add_attended(read.pop(shared_input), received, dtype)

    try:
        module = block.get_submodule(model.attention)
    except AttributeError as error:
        raise UserError(
            f"This {type(block).__name__} has no {model.attention}. Set model.attention to match, or calibration.attention=false."
        ) from error
    hooks = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in attended]
    return [*hooks, module.register_forward_hook(weigh)]


def _listen(
    block: nn.Module, shared_input: str, statistics: dict[str, InputStatistics], dtype: torch.dtype
) -> torch.utils.hooks.RemovableHandle:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        if shared_input not in statistics:
            statistics[shared_input] = InputStatistics.zeros(inputs.shape[1], inputs.device)
        statistics[shared_input].add(inputs, dtype)

    return block.get_submodule(shared_input).register_forward_pre_hook(add)
