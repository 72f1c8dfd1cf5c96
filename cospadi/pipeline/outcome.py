"""What a compression cost: perplexity and divergence on text that calibration did not see, whole bytes, and speed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from cospadi import devices, models
from cospadi.calibration.collect import draw_samples
from cospadi.checkpoint.read import load
from cospadi.errors import UserError
from cospadi.evaluation.perplexity import measure_tokens
from cospadi.kernels.precision import float32_products
from cospadi.pipeline.compress_plan import MEASURED_WINDOWS
from cospadi.records import read_json
from cospadi.settings import Config

DECODED = 16
"""Tokens that are decoded to measure speed."""


@dataclass(frozen=True)
class Outcome:
    """Measured before and after, by the same protocol."""

    n_windows: int
    window: int
    text: str
    """Title of the calibration text, whose unseen part was read."""
    dense_perplexity: float
    perplexity: float
    kl_to_dense: float
    """Nats per token."""
    top1_agreement: float
    """Fraction of tokens."""
    dense_bytes: int
    """Bytes of the whole model's numbers in 16 bits."""
    file_bytes: int
    """Bytes of the compressed checkpoint's weight files."""
    dense_tokens_per_second: float
    """Decoded one by one, on this machine, by the dense model in the same dtype."""
    tokens_per_second: float

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def measured(config: Config, dense: Path, compressed: Path, documents: Path, work: Path) -> Outcome:
    """Measure a model before and after, on the tokens that follow those of the calibration.

    Raises:
        UserError: the text has no window left, or the model's logits are more than its head of its hidden states.
    """
    windows = unseen_windows(config, dense, documents)
    device = devices.pick(config.factorization.device, "factorization.device")
    reference = work / "reference.safetensors"
    with float32_products(exact=True):
        network = models.load(dense, config.model.dtype, device)
        before = measure_tokens(network, windows, write_reference=reference, quiet=True)
        speed_before = decoding_speed(network)
        dense_bytes = sum(2 * parameter.numel() for parameter in network.parameters())
        del network
        smaller = load(compressed, config.model.dtype).to(device)
        after = measure_tokens(smaller, windows, reference=reference, quiet=True)
        speed_after = decoding_speed(smaller)
    return Outcome(
        n_windows=windows.shape[0],
        window=windows.shape[1],
        text=config.calibration.text.title,
        dense_perplexity=before["token_perplexity"]["value"],
        perplexity=after["token_perplexity"]["value"],
        kl_to_dense=after["kl_to_dense"]["value"],
        top1_agreement=after["top1_agreement"]["value"],
        dense_bytes=dense_bytes,
        file_bytes=sum(file.stat().st_size for file in Path(compressed).glob("*.safetensors")),
        dense_tokens_per_second=speed_before,
        tokens_per_second=speed_after,
    )


def unseen_windows(config: Config, model: Path, documents: Path) -> Int[Tensor, "windows window"]:
    """Token sequences of the calibration text that come after those of the calibration.

    Raises:
        UserError: the text has no more.
    """
    calibration = config.calibration
    tokenizer = models.load_tokenizer(model)
    texts = read_json(documents)
    for more in range(MEASURED_WINDOWS, 0, -1):
        n_samples = calibration.n_samples + more
        try:
            drawn = draw_samples(tokenizer, texts, n_samples, calibration.sample_length, calibration.seed)
        except UserError:
            continue
        return drawn[calibration.n_samples :]
    raise UserError(f"{calibration.text.title} has no tokens that calibration did not see")


@torch.inference_mode()
def decoding_speed(network: PreTrainedModel) -> float:
    """Tokens per second, one by one with a cache, after a few that warm it up."""
    ids = torch.ones(1, 8, dtype=torch.int64, device=network.device)
    greedy = {"do_sample": False, "pad_token_id": 0}
    network.generate(ids, max_new_tokens=2, min_new_tokens=2, **greedy)
    devices.synchronize(network.device)
    started = time.perf_counter()
    network.generate(ids, max_new_tokens=DECODED, min_new_tokens=DECODED, **greedy)
    devices.synchronize(network.device)
    return DECODED / (time.perf_counter() - started)


def outcome_text(outcome: Outcome) -> str:
    """Some lines for a terminal."""
    change = outcome.perplexity / outcome.dense_perplexity - 1
    smaller = 1 - outcome.file_bytes / outcome.dense_bytes
    size = "smaller" if smaller >= 0 else "LARGER"
    before = outcome.dense_bytes / 1e6
    after = outcome.file_bytes / 1e6
    hint = ["  Add --dtype bfloat16 to store embeddings and head in 16 bits, too."] if smaller < 0 else []
    return "\n".join(
        [
            f"On {outcome.n_windows} × {outcome.window} tokens of {outcome.text} that calibration did not see:",
            f"  perplexity    {outcome.dense_perplexity:.2f} before, {outcome.perplexity:.2f} after ({change:+.1%})",
            f"  KL to dense   {outcome.kl_to_dense:.4f} nats a token; same first choice for {outcome.top1_agreement:.1%} of tokens",
            f"Whole model:    {before:.1f} MB in 16 bits before, {after:.1f} MB after ({abs(smaller):.1%} {size})",
            *hint,
            f"Decoding here:  {outcome.dense_tokens_per_second:.1f} tokens/s before, {outcome.tokens_per_second:.1f} after",
        ]
    )
