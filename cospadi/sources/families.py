"""Where the projections of each model family are, by the ``model_type`` of its ``config.json``.

Families with the names of Llama need no row. A family is here when its blocks are alike and its projections are linear
layers. Names are those of transformers' modules, under which every checkpoint is prepared (`cospadi.sources.architecture`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cospadi.sources.settings import ModelConfig


@dataclass(frozen=True)
class Family:
    """Names that differ from Llama's."""

    blocks: str
    shared_inputs: tuple[tuple[str, ...], ...]
    """Projections of a block, those that read the same input together."""
    attention: str = "self_attn"
    attended: tuple[str, ...] = ()
    """Projections of keys and values. None where they are fused with the queries, which nobody looks at."""


_KEYS = ("self_attn.k_proj", "self_attn.v_proj")
_SEPARATE = ("self_attn.q_proj", *_KEYS)
_UP_DOWN = Family(
    "model.layers", (_SEPARATE, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",)), attended=_KEYS
)
_GATE_UP = Family(
    "model.layers",
    (_SEPARATE, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    attended=_KEYS,
)

_LLAMA = ModelConfig()
_EXPERTS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))
_SHARED_EXPERT = (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",))
_MIXTURE = Family("model.layers", (_SEPARATE, ("self_attn.o_proj",), *_EXPERTS), attended=_KEYS)
_ATTENTION_ALONE = Family("model.layers", (_SEPARATE, ("self_attn.o_proj",)), attended=_KEYS)
"""Of models with experts, which stay as they are."""
_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_LATENT_DENSE = Family(
    "model.layers",
    (
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
        *_MLP,
    ),
)
"""Of models with latent attention, in which keys and values come from a short vector."""
_LATENT = Family(
    "model.layers",
    (
        *_LATENT_DENSE.shared_inputs,
        *_EXPERTS,
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.shared_experts.down_proj",),
    ),
)
"""The same with experts, which the first blocks lack."""
_FUSED = (
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)


def _beside_images(blocks: str = "model.language_model.layers") -> Family:
    """Llama's names in the language model of a multimodal one."""
    return Family(blocks, tuple(map(tuple, _LLAMA.shared_inputs)), attended=tuple(_LLAMA.attended))


FAMILIES = {
    "gpt_neox": Family("gpt_neox.layers", _FUSED, attention="attention"),
    "qwen3_moe": _MIXTURE,
    "qwen2_moe": replace(_MIXTURE, shared_inputs=(*_MIXTURE.shared_inputs, *_SHARED_EXPERT)),
    "mixtral": _MIXTURE,
    "olmoe": _MIXTURE,
    "gpt_oss": _ATTENTION_ALONE,
    "deepseek_v3": _LATENT,
    "deepseek_v2": _LATENT,
    "lfm2": Family(
        "model.layers",
        (
            _SEPARATE,
            ("self_attn.out_proj",),
            ("conv.in_proj",),
            ("conv.out_proj",),
            ("feed_forward.w1", "feed_forward.w3"),
            ("feed_forward.w2",),
        ),
        attended=_KEYS,
    ),
    "qwen3_5_text": Family(
        "model.layers",
        (
            _SEPARATE,
            ("self_attn.o_proj",),
            ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
            ("linear_attn.out_proj",),
            *_MLP,
        ),
        attended=_KEYS,
    ),
    "olmo_hybrid": Family(
        "model.layers",
        (
            _SEPARATE,
            ("self_attn.o_proj",),
            ("linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.v_proj", "linear_attn.g_proj"),
            ("linear_attn.o_proj",),
            *_MLP,
        ),
        attended=_KEYS,
    ),
    "gemma3": _beside_images(),
    "qwen2_vl": _beside_images(),
    "qwen2_5_vl": _beside_images(),
    "qwen3_vl": _beside_images(),
    "llava": _beside_images(),
    "mistral3": _beside_images(),
    "smolvlm": _beside_images("model.text_model.layers"),
    "apertus": _UP_DOWN,
    "arcee": _UP_DOWN,
    "jais2": _UP_DOWN,
    "nemotron": _UP_DOWN,
    "nanochat": Family("model.layers", (_SEPARATE, ("self_attn.o_proj",), ("mlp.fc1",), ("mlp.fc2",)), attended=_KEYS),
    "modernbert-decoder": Family(
        "model.layers",
        (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("attn.Wo",), ("mlp.Wi",), ("mlp.Wo",)),
        attention="attn",
        attended=("attn.k_proj", "attn.v_proj"),
    ),
    "gpt_bigcode": Family(
        "transformer.h", (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)), attention="attn"
    ),
    "biogpt": Family("biogpt.layers", (_SEPARATE, ("self_attn.out_proj",), ("fc1",), ("fc2",)), attended=_KEYS),
    "glm": _GATE_UP,
    "glm4": _GATE_UP,
    "phi3": Family(
        "model.layers",
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    "phi": Family("model.layers", ((*_SEPARATE, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)), attended=_KEYS),
    "starcoder2": Family(
        "model.layers", (_SEPARATE, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)), attended=_KEYS
    ),
    "opt": Family("model.decoder.layers", (_SEPARATE, ("self_attn.out_proj",), ("fc1",), ("fc2",)), attended=_KEYS),
    "xglm": Family("model.layers", (_SEPARATE, ("self_attn.out_proj",), ("fc1",), ("fc2",)), attended=_KEYS),
    "gpt_neo": Family(
        "transformer.h",
        (
            ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            ("attn.attention.out_proj",),
            ("mlp.c_fc",),
            ("mlp.c_proj",),
        ),
        attention="attn",
        attended=("attn.attention.k_proj", "attn.attention.v_proj"),
    ),
    "falcon_h1": Family(
        "model.layers",
        (
            _SEPARATE,
            ("self_attn.o_proj",),
            ("feed_forward.gate_proj", "feed_forward.up_proj"),
            ("feed_forward.down_proj",),
        ),
        attended=_KEYS,
    ),
    "falcon": Family(
        "transformer.h",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        attention="self_attention",
    ),
    "bloom": Family(
        "transformer.h",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        attention="self_attention",
    ),
    "mpt": Family(
        "transformer.blocks",
        (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)),
        attention="attn",
    ),
    "gptj": Family(
        "transformer.h",
        (("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)),
        attention="attn",
        attended=("attn.k_proj", "attn.v_proj"),
    ),
    "minicpm3": _LATENT_DENSE,
    "youtu": _LATENT_DENSE,
    "codegen": Family(
        "transformer.h", (("attn.qkv_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)), attention="attn"
    ),
    "persimmon": Family(
        "model.layers",
        (
            ("self_attn.query_key_value",),
            ("self_attn.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
    ),
}
"""Rows by ``model_type``."""


def fitted(model: ModelConfig, model_type: str | None) -> ModelConfig:
    """``model`` with the names of its family, unless somebody has set names of his own."""
    unset = ModelConfig()
    family = FAMILIES.get(model_type or "")
    if family is None or (model.blocks, model.shared_inputs) != (unset.blocks, unset.shared_inputs):
        return model
    return replace(
        model,
        blocks=family.blocks,
        shared_inputs=[list(group) for group in family.shared_inputs],
        attention=family.attention,
        attended=list(family.attended),
    )
