"""A compressed model writes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from cospadi.errors import UserError, require_seed
from cospadi.models import load_tokenizer
from cospadi.sources.addresses import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_TEMPERATURE = 0.001
"""Logits divided by less than this are no longer finite in 16 bits."""


def write_on(
    model: PreTrainedModel, folder: Path, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 42
) -> None:
    """Print ``prompt`` and what the model makes of it, token by token.

    Raises:
        UserError: the prompt has no tokens, or ``tokens``, ``temperature`` or ``seed`` is out of bounds.
    """
    if tokens < 1 or not (temperature == 0 or LEAST_TEMPERATURE <= temperature < float("inf")):
        raise UserError(f"--tokens must be 1 or more, --temperature 0, or {LEAST_TEMPERATURE} or more.")
    require_seed("--seed", seed)
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tokenizer ({brief(error)}). Save it there: tokenizer.save_pretrained."
        ) from error
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not ids["input_ids"].numel():
        raise UserError("The prompt is empty. Write a few words to start from.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        model.generate(
            **ids,
            max_new_tokens=tokens,
            streamer=TextStreamer(tokenizer),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
