"""Grams of single experts: the tokens that the router sends to one, each times the square of its router weight.

The output of expert ``e`` enters that of the block times the router weight ``w_te``, so an error of its projections costs
``w_te²`` times as much at token ``t``. A gram is therefore ``n_e · Σ_t w_te² x_t x_tᵀ / Σ_t w_te²`` over the ``n_e`` tokens of
the expert: its weights sum to the number of tokens, as everywhere.

An expert that sees fewer tokens than its input has channels has no gram of full rank. The missing tokens then count as
average ones: as the mean of all tokens that enter the block's experts, for the inputs of gate and up; as noise of the same
mean square in every channel for those of down, whose channels mean something to this expert alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cospadi.calibration.statistics import InputStatistics, add_weighted
from cospadi.experts import Expert, Experts


class ExpertListener:
    """Hooks on the experts of one block, and what they have heard.

    Args:
        block: a decoder block, its weights loaded.
        groups: names of projections that read the same input; those that are not in `Experts` are left to others.
        dtype: of the products.
    """

    def __init__(self, block: nn.Module, groups: Sequence[Sequence[str]], dtype: torch.dtype):
        self.dtype = dtype
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._of_input: dict[str, InputStatistics] = {}
        """Sums over the tokens of an expert, the gram weighted."""
        self._weight: dict[str, float] = {}
        """``Σ w²`` of the same tokens."""
        self._average: dict[str, InputStatistics] = {}
        """Sums over all tokens that enter the experts which a projection is one of, where they are its input."""
        for path, experts in block.named_modules():
            if isinstance(experts, Experts):
                names = [group[0] for group in groups if group[0].startswith(f"{path}.")]
                self._listen(block, path, names)

    def _listen(self, block: nn.Module, path: str, names: Sequence[str]) -> None:
        """Hooks on the experts at ``path`` and on the layers ``names`` in them."""
        for name in names:
            layer = block.get_submodule(name)
            self._of_input[name] = InputStatistics.zeros(layer.in_features, layer.weight.device)
            self._weight[name] = 0.0
            self._listen_to_layer(block.get_submodule(name.rpartition(".")[0]), layer, name)
        reading = [name for name in names if not name.endswith("down_proj")]
        if not reading:
            return
        average = InputStatistics.zeros(
            block.get_submodule(reading[0]).in_features, self._of_input[reading[0]].gram.device
        )
        self._average |= dict.fromkeys(reading, average)

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            average.add(args[0], self.dtype)

        self.hooks.append(block.get_submodule(path).register_forward_pre_hook(add))

    def _listen_to_layer(self, expert: Expert, layer: nn.Linear, name: str) -> None:
        """The expert is called first, with its tokens' router weights; then the layer, with its inputs."""
        of_input = self._of_input[name]
        squares = torch.empty(0)

        def keep(_: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            nonlocal squares
            squares = args[1].detach().double().square()

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach()
            add_weighted(of_input.gram, inputs, squares, self.dtype)
            of_input.absolute += inputs.abs().sum(dim=0).double()
            of_input.n_tokens += len(inputs)
            self._weight[name] += float(squares.sum())

        self.hooks += [expert.register_forward_pre_hook(keep), layer.register_forward_pre_hook(add)]

    @property
    def inputs(self) -> set[str]:
        """First projections of the inputs that are listened to."""
        return set(self._of_input)

    def statistics(self) -> dict[str, InputStatistics]:
        """Statistics by the first projection that reads an input, missing tokens filled up. The listener has none afterwards."""
        names = list(self._of_input)  # one at a time, so that the grams of all experts are not in memory twice
        return {
            name: _filled_up(self._of_input.pop(name), self._weight[name], self._average.get(name)) for name in names
        }


def _filled_up(seen: InputStatistics, weight: float, average: InputStatistics | None) -> InputStatistics:
    """What an expert saw, and average tokens for those that its gram lacks for full rank."""
    d_in = len(seen.gram)
    n = seen.n_tokens
    missing = max(d_in - n, 0)
    gram = seen.gram * (n / weight) if weight else seen.gram
    absolute = seen.absolute
    if missing and average is not None:
        gram = gram + average.gram * (missing / average.n_tokens)
        absolute = absolute + average.absolute * (missing / average.n_tokens)
    elif missing:
        square = float(gram.trace()) / (n * d_in) if n else 0.0
        level = float(absolute.mean()) / n if n else 0.0
        gram = gram + missing * (square or 1.0) * torch.eye(d_in, dtype=gram.dtype, device=gram.device)
        absolute = absolute + missing * (level or 1.0)
    return InputStatistics(gram, absolute, n + missing, routed=n)


def shortage(statistics: Mapping[str, InputStatistics]) -> str | None:
    """A line on the experts of a layer that saw too few tokens; ``None`` where all saw enough."""
    routed = {name: s.routed for name, s in statistics.items() if s.routed is not None}
    short = sorted({name.rpartition(".")[0] for name, n in routed.items() if n < len(statistics[name].gram)})
    if not short:
        return None
    fewest = min(routed, key=lambda name: routed[name])
    n_experts = len({name.rpartition(".")[0] for name in routed})
    return (
        f"{len(short)} of {n_experts} experts saw fewer tokens than their inputs have channels (fewest: "
        f"{fewest.rpartition('.')[0]}, {routed[fewest]} of {len(statistics[fewest].gram)}); average tokens stand in for the "
        "missing ones. Raise calibration.n_samples for grams of their own"
    )


def routed_tokens(statistics: Mapping[str, InputStatistics]) -> dict[str, int]:
    """Tokens that each expert of a layer saw."""
    return {name.rpartition(".")[0]: s.routed for name, s in statistics.items() if s.routed is not None}
