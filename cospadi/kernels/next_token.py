"""What a model expects as the next token, over its whole vocabulary but a thousand tokens of it at a time.

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
    totals = _Totals(hidden, with_expected)
    likeliest = targets.new_zeros(len(hidden))
    of_target = hidden.new_empty(len(hidden))
    for part in _parts(head):
        rows = head.weight[part].float()
        logits = _logits(hidden, head, part)

        # The logit of the token that came, where it is in this part.
        place = targets - part.start
        inside = (place >= 0) & (place < len(rows))
        found = logits.gather(-1, place.clamp(0, len(rows) - 1)[:, None])[:, 0]
        of_target = torch.where(inside, found, of_target)

        maximum, index = logits.max(dim=-1)
        likeliest = torch.where(maximum > totals.largest, part.start + index, likeliest)
        totals.add(logits, rows, maximum)
    return NextTokens(totals.log - of_target.double(), totals.log, likeliest, totals.expected)


def drawn(
    hidden: Float[Tensor, "tokens width"], head: nn.Module, draw: torch.Generator
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens width"]]:
    """A label for every token, drawn from its distribution, and the gradient of ``−log p(label)`` at the hidden state.

    That is ``Σᵥ pᵥ Wᵥ − W_label``. First a part of the vocabulary is drawn, then a token of it: its logits alone are made once more.
    """
    hidden = hidden.float()
    totals = _Totals(hidden, with_expected=True)
    of_parts = []
    for part in _parts(head):
        logits = _logits(hidden, head, part)
        of_parts.append(totals.add(logits, head.weight[part].float(), logits.max(dim=-1).values))

    chosen = torch.multinomial(torch.stack(of_parts, dim=1).softmax(dim=1), 1, generator=draw)[:, 0]
    labels = torch.zeros_like(chosen)
    for number, part in enumerate(_parts(head)):
        here = (chosen == number).nonzero()[:, 0]
        if len(here):
            p = _logits(hidden[here], head, part).softmax(dim=-1)
            labels[here] = part.start + torch.multinomial(p, 1, generator=draw)[:, 0]
    return labels, (totals.expected - head.weight[labels].double()).float()


class _Totals:
    """Sums over the parts of a vocabulary seen so far, relative to the largest logit among them."""

    def __init__(self, hidden: Float[Tensor, "tokens width"], with_expected: bool) -> None:
        self.largest = hidden.new_full((len(hidden),), -torch.inf)
        self._total = hidden.new_zeros(len(hidden), dtype=torch.float64)
        self._expected = torch.zeros_like(hidden, dtype=torch.float64) if with_expected else None

    def add(
        self,
        logits: Float[Tensor, "tokens part"],
        rows: Float[Tensor, "part width"],
        maximum: Float[Tensor, " tokens"],
    ) -> Float[Tensor, " tokens"]:
        """Add a part, whose logits are overwritten; the logarithm of its own total."""
        # What was summed up so far belongs to an older maximum.
        larger = torch.maximum(self.largest, maximum)
        shrinking = (self.largest - larger).double().exp()
        self.largest = larger
        exponentials = logits.sub_(larger[:, None]).exp_()
        sums = exponentials.sum(dim=-1, dtype=torch.float64)
        self._total = self._total * shrinking + sums
        if self._expected is not None:
            self._expected = self._expected * shrinking[:, None] + (exponentials @ rows).double()
        return larger.double() + sums.log()

    @property
    def log(self) -> Float[Tensor, " tokens"]:
        """``log Σᵥ exp zᵥ``"""
        return self.largest.double() + self._total.log()

    @property
    def expected(self) -> Float[Tensor, "tokens width"] | None:
        """``Σᵥ pᵥ Wᵥ``"""
        return None if self._expected is None else self._expected / self._total[:, None]


def _parts(head: nn.Module) -> list[slice]:
    return [slice(first, first + VOCABULARY_AT_ONCE) for first in range(0, len(head.weight), VOCABULARY_AT_ONCE)]


def makes_all(
    head: nn.Module, hidden: Float[Tensor, "*batch width"], logits: Float[Tensor, "*batch vocabulary"]
) -> bool:
    """Whether a model's ``logits`` are what its head makes of final hidden states and nothing more: no capping, no scaling."""
    return torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-3, equal_nan=True)


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
