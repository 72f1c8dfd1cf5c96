"""Received attention against the ``eager`` attention of transformers, whose weights are all there to be summed."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama

from cospadi.calibration import attention
from cospadi.calibration.attention import received_attention

LENGTH = 300
"""Tokens: two times `attention.QUERIES` and a rest."""


def mask_of(kind: str) -> torch.Tensor:
    """Masks as `eager_mask` of transformers makes them: 0 where a key is seen, the least number where it is not."""
    i, j = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    seen = {
        "causal": j <= i,
        "window": (j <= i) & (j > i - 40),
        "none": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
        "padded": (j <= i) & (j >= 20),  # the first queries see nothing
    }[kind]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def module_of(modeling, heads: int, kv_heads: int) -> nn.Module:
    """An attention as models have it, for its class and its number of groups."""
    name = next(name for name in vars(modeling) if name.endswith("Attention"))
    module = nn.Module.__new__(vars(modeling)[name])
    nn.Module.__init__(module)
    module.num_key_value_groups = heads // kv_heads
    return module.eval()


def drawn(heads: int, kv_heads: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(heads)
    query = torch.randn(batch, heads, LENGTH, 16)
    return query, torch.randn(batch, kv_heads, LENGTH, 16), torch.randn(batch, kv_heads, LENGTH, 8)


@pytest.mark.parametrize("kind", ["causal", "window", "none", "padded"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_outputs_and_received_attention_are_those_of_all_weights(kind, heads, kv_heads):
    query, key, value = drawn(heads, kv_heads)
    module = module_of(modeling_llama, heads, kv_heads)
    mask = mask_of(kind)
    expected, weights = modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling=0.25)
    outputs, received = received_attention(module, query, key, value, mask, scaling=0.25)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    assert received.shape == (2, 1, 1, LENGTH)
    torch.testing.assert_close(received[:, 0, 0], weights.mean(dim=1).sum(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1), (1, 6), (2, 6)])
def test_masks_of_a_sample_or_a_head_each_are_taken(shape):
    query, key, value = drawn(6, 2)
    mask = mask_of("causal") + torch.randn(*shape, LENGTH, LENGTH)
    module = module_of(modeling_llama, 6, 2)
    expected, weights = modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling=0.25)
    outputs, received = received_attention(module, query, key, value, mask, scaling=0.25)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received[:, 0, 0], weights.mean(dim=1).sum(dim=1), rtol=1e-5, atol=1e-6)


def test_an_attention_that_is_not_plain_is_the_models_own():
    query, key, value = drawn(4, 2)
    module = module_of(modeling_gemma2, 4, 2)
    given = (module, query, key, value, mask_of("causal"))
    outputs, weights = received_attention(*given, scaling=0.25, softcap=0.5)
    expected, of_all = modeling_gemma2.eager_attention_forward(*given, scaling=0.25, softcap=0.5)
    assert torch.equal(outputs, expected)
    assert torch.equal(weights, of_all)
    plain, _ = modeling_gemma2.eager_attention_forward(*given, scaling=0.25)
    assert not torch.allclose(outputs, plain)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97, "intermediate_size": 96}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "attn_logit_softcapping": 0.5, "sliding_window": 5},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "falcon": {"num_kv_heads": 4, "alibi": True},
    "gpt_neox": {},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 97},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_computes_what_it_computes_with_eager_attention(family):
    config = AutoConfig.for_model(family, **({} if family == "gptj" else SIZES), **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = model(tokens, use_cache=False).logits
        attention.tell_received(model)
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
