"""Attention that tells how much each token received, without weights of all queries and keys in memory.

transformers' ``eager`` attention tells its weights ``A_ij``, and makes them for all pairs of tokens: at 1024 tokens most of
calibration's traffic, half of it for keys that a causal mask hides. Here only ``a_j = Σ_i A_ij``, averaged over heads, is
wanted. A few queries at a time, the weights stay in the cache and the keys that none of these queries sees are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "cospadi_received"
QUERIES = 128
"""Queries at a time."""


def tell_received(model: PreTrainedModel) -> None:
    """Have the attentions of ``model`` tell what each token received: by `received_attention`, with the masks of ``eager``
    attention, or by that itself where the family takes no other attention than transformers' own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, received_attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME if model._supports_attention_backend else "eager")


def received_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Float[Tensor, "#batch #heads queries keys"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **further: object,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], Float[Tensor, "batch _ _ keys"] | None]:
    """Outputs, and in place of the weights what every key received of them, ``batch × 1 × 1 × keys``.

    That is their mean over heads and sum over queries, so taking mean and sum once more changes nothing. A model whose own
    attention is not the plain one (soft caps, sinks, other biases) computes it by itself and tells all its weights.
    """
    own = _eager_of(type(module))
    if not _is_plain(own) or attention_mask is None or scaling is None or dropout:
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **further)
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = (query * scaling).unflatten(1, (kv_heads, heads // kv_heads))
    outputs = torch.empty(*grouped.shape[:-1], value.shape[-1], dtype=value.dtype, device=value.device)
    received = torch.zeros(len(query), key.shape[2], dtype=torch.float32, device=key.device)
    for start in range(0, query.shape[2], QUERIES):
        some = slice(start, start + QUERIES)
        mask = attention_mask[:, :, some]
        seen = _keys_seen(mask)
        mask = mask[..., :seen].unsqueeze(2) if mask.shape[1] == 1 else mask[..., :seen].unflatten(1, (kv_heads, -1))
        for i in range(len(query)):
            asking = grouped[i, :, :, some]
            scores = asking.flatten(1, 2) @ key[i, :, :seen].mT  # all heads of a group in one product
            scores = scores.unflatten(1, asking.shape[1:3]).add_(mask[i if len(mask) > 1 else 0])
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
            received[i, :seen] += weights.sum(dim=(0, 1, 2))
            told = weights.to(value.dtype).flatten(1, 2) @ value[i, :, :seen]
            outputs[i, :, :, some] = told.unflatten(1, asking.shape[1:3])
    return outputs.flatten(1, 2).transpose(1, 2).contiguous(), (received / heads)[:, None, None]


def _keys_seen(mask: Float[Tensor, "batch heads queries keys"]) -> int:
    """How many keys, from the first on, hold all that these queries see; all keys where a query sees none."""
    visible = mask > torch.finfo(mask.dtype).min / 2
    if not visible.any(dim=-1).all():
        return mask.shape[-1]
    return int(visible.flatten(0, -2).any(dim=0).nonzero().max()) + 1


@cache
def _eager_of(attention: type[nn.Module]) -> Callable:
    """The ``eager`` attention that modules of this class call when no other is named."""
    return inspect.unwrap(attention.forward).__globals__["eager_attention_forward"]


@cache
def _is_plain(eager: Callable) -> bool:
    """Whether it is, word by word, that of Llama: softmax of scaled products and a mask, no more. 153 other families have it."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return inspect.getsource(eager) == inspect.getsource(eager_attention_forward)
