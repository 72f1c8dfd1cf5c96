"""What a model writes: the same prompts, always the most likely next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from cospadi.progress import Progress


def continuations(
    model: nn.Module, tokenizer: Callable[..., Any], prompts: Sequence[str], n_tokens: int
) -> list[dict[str, str]]:
    """``{"prompt", "continuation"}`` of every prompt: up to ``n_tokens`` tokens of greedy decoding, fewer where the model ends.

    A prompt at a time, so that no padding can change what is written; special tokens are not shown.
    """
    if not prompts:
        return []
    end = model.generation_config.eos_token_id if model.generation_config else None
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=n_tokens,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end,
    )
    progress = Progress(len(prompts), f"Continuing {len(prompts)} prompts by {n_tokens} tokens")
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with torch.inference_mode():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append({"prompt": prompt, "continuation": text})
        progress.step(prompt[:40])
    return texts
