"""What a model expects as the next token, over its whole vocabulary but a few thousand tokens of it at a time.

Logits ``z = h Wᵀ + b`` of a window are 200 MB, and every pass over them goes to memory. Part after part they stay in the cache: the
maximum and the sum of exponentials so far are all that is carried on (Milakov and Gimelshein, arXiv:1805.02867, algorithm 3).

Two models with one head need the logits of one of them to be compared: with ``p`` the dense model's distribution,

    KL(p ‖ q) = Σᵥ pᵥ (log pᵥ − log qᵥ) = (h_p − h_q) · Σᵥ pᵥ Wᵥ − log Σᵥ exp z_p + log Σᵥ exp z_q,

and the expected row of the head ``Σᵥ pᵥ Wᵥ`` is kept with the dense model's hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

VOCABULARY_AT_ONCE = 1024
"""Tokens of the vocabulary: with a window of 1024 tokens 4 MiB of logits, which stay in a core's cache."""


@dataclass(frozen=True)
class NextTokens:
    """The distributions behind hidden states, one row each."""

    nll: Float[Tensor, " tokens"]
    """Of the token that came, in nats; float64."""
    log_total: Float[Tensor, " tokens"]
    """``log Σᵥ exp zᵥ``; float64."""
    likeliest: Int[Tensor, " tokens"]
    """The first of those with the largest logit."""
    expected: Float[Tensor, "tokens width"] | None = None
    """``Σᵥ pᵥ Wᵥ``, where it was asked for; float64."""


def next_tokens(
    hidden: Float[Tensor, "tokens width"],
    head: nn.Module,
    targets: Int[Tensor, " tokens"],
    with_expected: bool = False,
) -> NextTokens:
    """The distributions that ``head``, a linear layer over the vocabulary, makes of final hidden states.

    Products are in float32 whatever the model's dtype, sums over the vocabulary in float64.
    """
    hidden = hidden.float()
    largest = hidden.new_full((len(hidden),), -torch.inf)
    total = hidden.new_zeros(len(hidden), dtype=torch.float64)
    likeliest = targets.new_zeros(len(hidden))
    of_target = hidden.new_empty(len(hidden))
    expected = hidden.new_zeros(hidden.shape, dtype=torch.float64) if with_expected else None
    for first in range(0, len(head.weight), VOCABULARY_AT_ONCE):
        part = slice(first, first + VOCABULARY_AT_ONCE)
        rows = head.weight[part].float()
        logits = _logits(hidden, head, part)

        # The logit of the token that came, where it is in this part.
        place = targets - first
        inside = (place >= 0) & (place < len(rows))
        found = logits.gather(-1, place.clamp(0, len(rows) - 1)[:, None])[:, 0]
        of_target = torch.where(inside, found, of_target)

        # What was summed up so far belongs to an older maximum.
        maximum, index = logits.max(dim=-1)
        likeliest = torch.where(maximum > largest, first + index, likeliest)
        larger = torch.maximum(largest, maximum)
        shrinking = (largest - larger).double().exp()
        largest = larger
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = total * shrinking + exponentials.sum(dim=-1, dtype=torch.float64)
        if expected is not None:
            expected = expected * shrinking[:, None] + (exponentials @ rows).double()
    log_total = largest.double() + total.log()
    expected = None if expected is None else expected / total[:, None]
    return NextTokens(log_total - of_target.double(), log_total, likeliest, expected)


def drawn(
    hidden: Float[Tensor, "tokens width"], head: nn.Module, draw: torch.Generator
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens width"]]:
    """A label for every token, drawn from its distribution, and the gradient of ``−log p(label)`` at the hidden state.

    That is ``Σᵥ pᵥ Wᵥ − W_label``. First a part of the vocabulary is drawn, then a token of it: its logits alone are made once more.
    """
    hidden = hidden.float()
    parts = [slice(first, first + VOCABULARY_AT_ONCE) for first in range(0, len(head.weight), VOCABULARY_AT_ONCE)]
    largest = hidden.new_full((len(hidden),), -torch.inf)
    total = hidden.new_zeros(len(hidden), dtype=torch.float64)
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    of_parts = []
    for part in parts:
        rows = head.weight[part].float()
        logits = _logits(hidden, head, part)
        maximum = logits.max(dim=-1).values
        larger = torch.maximum(largest, maximum)
        shrinking = (largest - larger).double().exp()
        largest = larger
        exponentials = logits.sub_(largest[:, None]).exp_()
        sums = exponentials.sum(dim=-1, dtype=torch.float64)
        of_parts.append(largest.double() + sums.log())
        total = total * shrinking + sums
        expected = expected * shrinking[:, None] + (exponentials @ rows).double()
    expected /= total[:, None]

    chosen = torch.multinomial(torch.stack(of_parts, dim=1).softmax(dim=1), 1, generator=draw)[:, 0]
    labels = torch.zeros_like(chosen)
    for number, part in enumerate(parts):
        here = (chosen == number).nonzero()[:, 0]
        if len(here):
            p = _logits(hidden[here], head, part).softmax(dim=-1)
            labels[here] = part.start + torch.multinomial(p, 1, generator=draw)[:, 0]
    return labels, (expected - head.weight[labels].double()).float()


def _logits(hidden: Float[Tensor, "tokens width"], head: nn.Module, part: slice) -> Float[Tensor, "tokens part"]:
    """Those of a part of the vocabulary, in float32."""
    logits = hidden @ head.weight[part].float().T
    bias = getattr(head, "bias", None)
    return logits if bias is None else logits.add_(bias[part].float())


def divergence(
    dense_hidden: Float[Tensor, "tokens width"],
    dense: NextTokens,
    hidden: Float[Tensor, "tokens width"],
    model: NextTokens,
) -> Float[Tensor, " tokens"]:
    """KL(dense ‖ model) of every token, in nats; both have the same head, and ``dense`` its expected rows."""
    moved = dense_hidden.double() - hidden.double()
    return (moved * dense.expected.double()).sum(dim=-1) - dense.log_total + model.log_total
