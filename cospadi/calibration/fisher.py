"""What the loss cares about: one backward pass over the calibration tokens, block by block.

A change ``ΔW`` of a projection changes its outputs ``y_t = Wᵀ x_t``, and with them the distribution of the next token. To second
order the expected divergence from the model as it was is ``½ vec(ΔW)ᵀ F vec(ΔW)``, with the Fisher information ``F`` of labels that
the model itself predicts. Of that, two factors are kept (the diagonal of the Kronecker factor of the outputs):

    H = Σ_t s_t x_t x_tᵀ,  s_t = mean_j g_tj²,   c_j = Σ_t g_tj²,   ½ Σ_j (c_j / mean c) Δw_jᵀ H Δw_j,

where ``g_tj`` is the gradient of ``−log p(label)`` at output ``j`` for token ``t``, the labels drawn from the model's own predictions.
Terms of two tokens or of two outputs are left out, so of what is expected only ratios are to be trusted.
Relatives: K-FAC (arXiv:1503.05671), the LLM Surgeon (arXiv:2312.17244), GuidedQuant (arXiv:2505.07004).

Blocks are computed twice: once forward, keeping only what enters each of them, and once more when the gradient comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from cospadi import devices
from cospadi.calibration.settings import CalibrationConfig
from cospadi.calibration.statistics import add_weighted, existing_file
from cospadi.errors import UserError
from cospadi.experts import groups_of_block
from cospadi.kernels.next_token import drawn, makes_all
from cospadi.models import BlockWalker
from cospadi.sources.settings import ModelConfig

GRAM = "gram"
COLUMNS = "columns"
"""Names of the two factors in a layer's file."""
COMPARED = 8
"""Tokens of which it is looked whether their logits are the head's."""


@dataclass
class FisherFactors:
    """The two factors of one projection, summed over tokens."""

    gram: Float[Tensor, "d_in d_in"]
    """float64, ``H = Σ_t s_t x_t x_tᵀ``"""
    columns: Float[Tensor, " d_out"]
    """float64, ``c_j = Σ_t g_tj²``"""
    n_tokens: int = 0

    @classmethod
    def zeros(cls, layer: nn.Linear) -> FisherFactors:
        d_out, d_in = layer.weight.shape
        device = layer.weight.device
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in ((d_in, d_in), (d_out,))))

    def add(
        self,
        inputs: Float[Tensor, "tokens d_in"],
        gradient: Float[Tensor, "tokens d_out"],
        dtype: torch.dtype,
    ) -> None:
        """Add tokens and the gradients at their outputs; products run in ``dtype``, sums in float64."""
        squares = gradient.float().square()
        self.columns += squares.sum(dim=0, dtype=torch.float64)
        add_weighted(self.gram, inputs, squares.mean(dim=1), dtype)
        self.n_tokens += len(inputs)

    @property
    def per_token(self) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, " d_out"]]:
        """Both factors, divided by the number of tokens."""
        n_tokens = max(self.n_tokens, 1)
        return self.gram / n_tokens, self.columns / n_tokens

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all() and torch.isfinite(self.columns).all())


Factors = dict[str, FisherFactors]
"""Of the projections of a block, by their names in it."""


def fisher_factors(
    folder: Path, model: ModelConfig, calibration: CalibrationConfig, tokens: Int[Tensor, "n_samples sample_length"]
) -> Iterator[tuple[int, Factors]]:
    """Factors of every projection, one block at a time from the last to the first: ``(layer, {projection: factors})``.

    What enters each block is in memory for all tokens: ``layers × tokens × width`` numbers in the model's dtype.

    Raises:
        UserError: at the first layer whose gradients are not finite, naming it.
    """
    device = devices.pick(calibration.device, "calibration.device")
    walker = BlockWalker(folder, model, device)
    walker.load_head()
    sequences = tokens.split(1)  # logits of one at a time
    states, arguments = walker.embed(sequences)
    entering = []
    with torch.no_grad():
        for layer, _ in walker.walk():
            entering.append(states)
            states = [walker.run(layer, s, of_block[layer]) for s, of_block in zip(states, arguments, strict=True)]

    def onwards(forward: Callable[[Tensor, Tensor], Tensor], ids: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaving.detach().requires_grad_()
        return forward(ids, leaf), leaf

    gradient_of = LossGradient(walker.head, calibration.fisher.seed, device)
    gradients = [
        gradient_of(partial(onwards, walker.finished, ids, leaving), partial(onwards, walker.logits, ids, leaving))
        for ids, leaving in zip(sequences, states, strict=True)
    ]
    for layer in reversed(range(len(entering))):
        with walker.loaded(layer) as block:
            factors, remove = _listen(block, model, calibration)
            for i, (states, of_block) in enumerate(zip(entering.pop(), arguments, strict=True)):
                with torch.enable_grad():
                    leaf = states.detach().requires_grad_()
                    out = walker.run(layer, leaf, of_block[layer])
                (gradients[i],) = torch.autograd.grad(out, leaf, gradients[i])
            remove()
        _require_finite(factors, f"{model.blocks}.{layer}")
        yield layer, factors


def gather_fisher(
    network: nn.Module,
    model: ModelConfig,
    calibration: CalibrationConfig,
    tokens: Int[Tensor, "n_samples sample_length"],
) -> list[Factors]:
    """Factors of every block of a network in memory, all at once."""
    blocks = list(network.get_submodule(model.blocks))
    listening = [_listen(block, model, calibration) for block in blocks]
    device = next(network.parameters()).device
    embedded: list[Tensor] = []

    def start(_: nn.Module, __: object, out: Tensor) -> Tensor:
        embedded[:] = [out.detach().requires_grad_()]
        return embedded[0]

    def finished(ids: Tensor) -> tuple[Tensor, Tensor]:
        return network.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, embedded[0]

    def logits(ids: Tensor) -> tuple[Tensor, Tensor]:
        return network(input_ids=ids, use_cache=False).logits, embedded[0]

    gradient_of = LossGradient(network.get_output_embeddings(), calibration.fisher.seed, device)
    hook = network.get_input_embeddings().register_forward_hook(start)
    try:
        for ids in tokens.to(device).split(1):
            gradient_of(partial(finished, ids), partial(logits, ids))
    finally:
        hook.remove()
        for _, remove in listening:
            remove()
    for layer, (factors, _) in enumerate(listening):
        _require_finite(factors, f"{model.blocks}.{layer}")
    return [factors for factors, _ in listening]


Forward = Callable[[], tuple[Tensor, Tensor]]
"""A pass through the model: its end, and the tensor at which the gradient is wanted."""


class LossGradient:
    """Gradients of ``−Σ log p(label)`` over the tokens of a sequence, the labels drawn from ``p`` itself."""

    def __init__(self, head: nn.Module, seed: int, device: torch.device) -> None:
        self.head = head
        self.draw = torch.Generator(device).manual_seed(seed)
        self.is_plain: bool | None = None
        """Whether logits are what the head makes and nothing more; found out with the first sequence."""

    def __call__(self, finished: Forward, logits: Forward) -> Tensor:
        """Gradient of one sequence.

        Args:
            finished: a pass that ends with what enters the head, ``1 × length × width``.
            logits: the same pass, as the model's own class ends it.

        Raises:
            UserError: the predictions are not finite.
        """
        if self.is_plain is None:
            with torch.no_grad():
                self.is_plain = makes_all(self.head, finished()[0][:, :COMPARED], logits()[0][:, :COMPARED])
        with torch.enable_grad():
            if self.is_plain:
                end, leaf = finished()
                _require_finite_predictions(end)
                _, gradient = drawn(end.detach()[0], self.head, self.draw)
                return torch.autograd.grad(end, leaf, gradient[None].to(end))[0]
            # Capped or scaled logits: by way of all of them.
            all_logits, leaf = logits()
            log_p = all_logits[0].float().log_softmax(dim=-1)
            _require_finite_predictions(log_p)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=self.draw)
            return torch.autograd.grad(-log_p.gather(-1, labels).sum(), leaf)[0]


def _require_finite_predictions(end: Tensor) -> None:
    if end.isnan().any():
        raise UserError(
            "The model's predictions on the calibration text are not finite (NaN or infinite). Check the checkpoint, or set "
            "model.dtype=float32."
        )


def _listen(block: nn.Module, model: ModelConfig, calibration: CalibrationConfig) -> tuple[Factors, Callable[[], None]]:
    """Factors that fill when gradients come back through the block, and what ends that."""
    dtype = getattr(torch, calibration.gram_dtype)
    names = {name for name, _ in block.named_modules()}
    projections = [name for group in groups_of_block(model.shared_inputs, names) for name in group]
    factors = {name: FisherFactors.zeros(block.get_submodule(name)) for name in projections}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def wait(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs = args[0].detach().flatten(0, -2)

            def take(gradient: Tensor) -> None:
                factors[name].add(inputs, gradient.detach().flatten(0, -2), dtype)

            if out.requires_grad:
                out.register_hook(take)

        return wait

    hooks = [block.get_submodule(name).register_forward_hook(listen(name)) for name in projections]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return factors, remove


def _require_finite(factors: Factors, block: str) -> None:
    for name, of_projection in factors.items():
        if not of_projection.is_finite:
            raise UserError(
                f"The gradients at {block}.{name} are not finite (NaN or infinite). Check the checkpoint, set "
                "model.dtype=float32, or take factorization.objective=output, which needs none."
            )


def tensors_of(factors: Factors) -> dict[str, Tensor]:
    """What is written of a layer, per token."""
    tensors = {}
    for name, of_projection in factors.items():
        gram, columns = of_projection.per_token
        tensors[f"{name}.{GRAM}"] = gram.float()
        tensors[f"{name}.{COLUMNS}"] = columns.float()
    return tensors


def read_fisher(
    folder: Path, layer: int, projection: str, device: torch.device
) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, " d_out"]]:
    """Both factors of one projection, per token, from the folder that ``fisher`` left.

    Raises:
        UserError: when the layer's file is missing.
    """
    file = existing_file(folder, layer, "Compute it again: run fisher for this model.")
    with safe_open(file, framework="pt") as tensors:
        gram, columns = (tensors.get_tensor(f"{projection}.{part}") for part in (GRAM, COLUMNS))
    return gram.double().to(device), columns.double().to(device)


def loss_metric(
    gram: Float[Tensor, "d_in d_in"],
    fisher_gram: Float[Tensor, "d_in d_in"],
    fisher_columns: Float[Tensor, " d_out"],
    blend: float,
) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, " d_out"] | None]:
    """Gram and roots of column weights such that ``½ tr(Cᵀ ΔWᵀ G ΔW C)`` is the expected loss per token, in nats.

    ``blend`` of the plain gram is mixed in, at the size of the Fisher's: gradients of a few thousand tokens are noisy, and the plain
    gram is not. Mean of the squared column weights is 1. Of an expert that no token chose nothing is known: then there are none.
    """
    size = fisher_gram.diagonal().mean()
    plain_size = gram.diagonal().mean()
    if size <= 0 or plain_size <= 0:
        return gram, None
    blended = blend * gram * (size / plain_size) + (1 - blend) * fisher_gram
    weights = fisher_columns / fisher_columns.mean()
    return blended, weights.clamp_min(LEAST_COLUMN).sqrt()


LEAST_COLUMN = 1e-4
"""Least weight of an output, of a mean of 1: those that seem not to matter are still to be what they were."""
