"""Experts of a mixture as linear layers: transformers fuses those of a block into two parameters of three dimensions.

Calibration reads the inputs of single experts, and compressed experts differ in size, so both need them apart: `unfuse` puts
`Experts` in place of the fused modules. Its layers (``mlp.experts.3.gate_proj``) are the projections. In files, `parts` finds
their weights in the fused parameters (``mlp.experts.gate_up_proj``), and `stacked` makes these from them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.sources.settings import EVERY

_GATE = "gate_proj"
_UP = "up_proj"
_DOWN = "down_proj"
_FUSED = "gate_up_proj"
_OF_EXPERT = re.compile(rf"(.+\.experts)\.(\d+)\.({_GATE}|{_UP}|{_DOWN})")


class Expert(nn.Module):
    """One gated expert."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act_fn: nn.Module):
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)
        self.act_fn = act_fn

    def forward(
        self, states: Float[Tensor, "tokens d"], weights: Float[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d"]:
        """``w_t · down(act(gate(x_t)) ∘ up(x_t))``"""
        hidden = self.act_fn(self.gate_proj(states)) * self.up_proj(states)
        return self.down_proj(hidden) * weights[:, None]


class Experts(nn.ModuleList):
    """The experts of a block; computes what transformers' ``eager`` implementation does."""

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens d"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens d"]:
        """``Σ_e w_te · expert_e(x_t)`` over the ``k`` experts of every token.

        Args:
            hidden_states: inputs of the block's experts.
            top_k_index: the experts of every token.
            top_k_weights: their router weights.
        """
        outputs = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            place, token = torch.where((top_k_index == number).T)
            of_expert = self[number](hidden_states[token], top_k_weights[token, place])
            outputs.index_add_(0, token, of_expert.to(outputs.dtype))
        return outputs


def names_experts(projections: Iterable[str]) -> bool:
    """Whether any is of experts, by its number or by `EVERY`."""
    return any(EVERY in name or _OF_EXPERT.fullmatch(name) for name in projections)


def expanded(shared_inputs: Sequence[Sequence[str]], names: Iterable[str]) -> list[list[str]]:
    """``shared_inputs`` with a group for each expert in place of one for every expert.

    A group that matches none of ``names``, the layers of a block, stays as it is.

    >>> expanded([["o"], ["e.*.gate", "e.*.up"]], ["e.0.gate", "e.1.gate"])
    [['o'], ['e.0.gate', 'e.0.up'], ['e.1.gate', 'e.1.up']]
    """
    names = set(names)
    groups = []
    for group in shared_inputs:
        pattern = re.compile(re.escape(group[0]).replace(re.escape(EVERY), r"(\d+)"))
        numbers = sorted({int(m[1]) for m in map(pattern.fullmatch, names) if m}) if EVERY in group[0] else []
        groups += [[name.replace(EVERY, str(number)) for name in group] for number in numbers] or [list(group)]
    return groups


def groups_of_block(shared_inputs: Sequence[Sequence[str]], names: Iterable[str]) -> list[list[str]]:
    """``shared_inputs`` of a block with the layers ``names``: a group for each of its experts, and nothing that it lacks.

    >>> groups_of_block([["q", "k"], ["e.*.gate"], ["up"]], ["q", "e.0.gate", "e.1.gate"])
    [['q'], ['e.0.gate'], ['e.1.gate']]
    """
    names = set(names)
    groups = ([name for name in group if name in names] for group in expanded(shared_inputs, names))
    return [group for group in groups if group]


def unfuse(model: nn.Module) -> dict[str, nn.Module]:
    """Put `Experts` in place of all fused ones, and return these by their paths. The numbers are not copied.

    Raises:
        UserError: the experts are not gated linear layers without biases, as those of GPT-OSS.
    """
    fused = {path: module for path, module in model.named_modules() if _is_fused(module)}
    for path, module in fused.items():
        if not _is_plain(module):
            raise UserError(
                f"The experts of {type(module).__name__} are transposed, have biases or another activation, and are not compressed. "
                "Leave them out of model.shared_inputs."
            )
        stacks = _stacks(module)
        apart = Experts(
            Expert(gate, up, down, module.act_fn)
            for gate, up, down in zip(stacks[_GATE], stacks[_UP], stacks[_DOWN], strict=True)
        )
        model.set_submodule(path, apart.train(module.training))
    return fused


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """The experts of ``model`` apart, and fused again when the block ends with an error.

    Raises:
        UserError: see `unfuse`.
    """
    fused = unfuse(model)
    try:
        yield
    except BaseException:
        for path, module in fused.items():
            model.set_submodule(path, module)
        raise
    for path in fused:
        for layer in model.get_submodule(path).modules():
            if isinstance(layer, nn.Linear):  # left dense: no longer a part of the fused matrix, which goes
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)


def weight_of(model: nn.Module, name: str) -> Float[Tensor, "d_out d_in"]:
    """The weight of a projection in memory: of a linear layer, or the part of the fused matrix that is an expert's.

    Raises:
        AttributeError: the model has no such layer.
    """
    of_expert = _OF_EXPERT.fullmatch(name)
    experts = model.get_submodule(of_expert[1]) if of_expert else None
    if experts is None or not _is_fused(experts):
        return model.get_submodule(name).weight
    return _stacks(experts)[of_expert[3]][int(of_expert[2])]


def _stacks(fused: nn.Module) -> dict[str, Float[Tensor, "experts _ _"]]:
    """Weights of all experts by projection, as parts of the fused parameters."""
    gate, up = fused.gate_up_proj.chunk(2, dim=1)
    return {_GATE: gate, _UP: up, _DOWN: fused.down_proj}


def _is_fused(module: nn.Module) -> bool:
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in (_FUSED, _DOWN))


def _is_plain(fused: nn.Module) -> bool:
    """Whether the experts compute what `Expert` does; the flags are those of ``use_experts_implementation``."""
    from transformers.integrations.moe import _default_apply_gate

    flags = ("has_gate", "is_concatenated", "is_transposed", "has_bias", "has_post_expert_norm")
    said = [getattr(fused, flag, None) for flag in flags]
    return said == [True, True, False, False, False] and type(fused)._apply_gate is _default_apply_gate


def _linear(weight: Tensor) -> nn.Linear:
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return layer


@dataclass(frozen=True)
class Part:
    """The weight of one expert's projection in a fused parameter of a file."""

    fused: str
    """``model.layers.0.mlp.experts.gate_up_proj``"""
    expert: int
    rows: slice
    shape: tuple[int, int]
    """``(d_out, d_in)``"""


def parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
    """Weights of experts by their names apart, of all fused parameters among ``shapes``.

    >>> found = parts({"m.experts.gate_up_proj": (1, 6, 4), "m.experts.down_proj": (1, 4, 3)})
    >>> {name: part.shape for name, part in found.items()}
    {'m.experts.0.gate_proj.weight': (3, 4), 'm.experts.0.up_proj.weight': (3, 4), 'm.experts.0.down_proj.weight': (4, 3)}
    """
    found = {}
    for name, shape in shapes.items():
        path, _, parameter = name.rpartition(".")
        if parameter not in (_FUSED, _DOWN) or len(shape) != 3 or f"{path}.{_FUSED}_bias" in shapes:
            continue
        experts, rows, columns = shape
        half = rows // 2
        of_parameter = (
            {_GATE: slice(0, half), _UP: slice(half, rows)} if parameter == _FUSED else {_DOWN: slice(0, rows)}
        )
        for expert in range(experts):
            for projection, where in of_parameter.items():
                size = where.stop - where.start, columns
                found[f"{path}.{expert}.{projection}.weight"] = Part(name, expert, where, size)
    return found


def stacked(tensors: Iterable[tuple[str, Tensor]], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """``tensors``, those of experts fused as in transformers' modules. The experts of a block are in memory meanwhile.

    Args:
        tensors: names and tensors.
        names: all names that will come.
    """
    expected = Counter(m[1] for name in names if (m := _OF_EXPERT.fullmatch(name.removesuffix(".weight"))))
    waiting: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors:
        of_expert = _OF_EXPERT.fullmatch(name.removesuffix(".weight"))
        if of_expert is None:
            yield name, tensor
            continue
        path = of_expert[1]
        of_block = waiting.setdefault(path, {})
        of_block[int(of_expert[2]), of_expert[3]] = tensor
        if len(of_block) == expected[path]:
            numbers = range(expected[path] // 3)
            yield f"{path}.{_FUSED}", torch.stack([torch.cat([of_block[e, _GATE], of_block[e, _UP]]) for e in numbers])
            yield f"{path}.{_DOWN}", torch.stack([of_block[e, _DOWN] for e in numbers])
            del waiting[path], of_block
