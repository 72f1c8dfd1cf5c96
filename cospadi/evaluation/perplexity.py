"""Token perplexity on held-out text, and how far a compressed model is from the dense one on the same tokens.

The dense model runs once: its evaluation keeps the final hidden states (the inputs of ``lm_head``). Compression leaves
``lm_head`` alone, so the dense logits of every later comparison are one matrix product away.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.progress import Progress
from cospadi.records import write_tensors

_LOGITS_AT_ONCE = 2**24
"""Logits held at a time: 64 MiB in float32, whatever the vocabulary."""
_HEAD_TOLERANCE = 1e-3
"""Largest change of a window's dense negative log-likelihood (nats per token) when ``lm_head`` only changed its dtype."""


def token_windows(
    tokenizer: Callable[..., Any], documents: Sequence[str], window: int, n_windows: int | None = None
) -> Int[Tensor, "windows window"]:
    """Non-overlapping windows of ``window`` tokens over all documents.

    The protocol of GPTQ (arXiv:2210.17323) and SVD-LLM (arXiv:2403.07378): the documents are joined by a blank line,
    tokenized once with whatever special tokens the tokenizer adds by itself, and cut; a rest shorter than a window is
    dropped. ``n_windows`` keeps the first ones only.

    Raises:
        UserError: when the text has fewer tokens than asked for.
    """
    ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    whole = len(ids) // window
    if whole < (n_windows or 1):
        needed = f"{n_windows} windows of {window}" if n_windows else f"a single window of {window}"
        raise UserError(
            f"The evaluation text has {len(ids)} tokens, too few for {needed} tokens. "
            "Lower evaluation.n_windows or evaluation.window, or give a longer evaluation.text."
        )
    kept = n_windows or whole
    return torch.tensor(ids[: kept * window], dtype=torch.int64).reshape(kept, window)


def token_hash(windows: Int[Tensor, "windows window"]) -> str:
    """sha256 over the shape and the token ids."""
    content = repr(tuple(windows.shape)).encode() + windows.to(torch.int64).cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def exponential(exponent: float) -> float:
    """``e^exponent``, infinite where it does not fit a float.

    >>> exponential(0.0), exponential(1e6), exponential(math.nan)
    (1.0, inf, nan)
    """
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def mean_stderr(values: Float[Tensor, " n"]) -> tuple[float, float | None]:
    """Mean and its standard error ``sd / √n`` (``sd`` with n − 1); no error for a single or a non-finite value.

    >>> mean_stderr(torch.tensor([1.0, 3.0], dtype=torch.float64))
    (2.0, 1.0)
    """
    values = values.double()
    mean = values.mean().item()
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, values.std().item() / math.sqrt(len(values))


def ratio_stderr(totals: Sequence[float | int], sizes: Sequence[float | int]) -> tuple[float, float | None]:
    """Ratio of sums ``r = Σ totals / Σ sizes`` and its standard error by the delta method.

    ``se = √(n/(n−1) · Σ (totalᵢ − r·sizeᵢ)²) / Σ sizes`` with documents as independent units; equals the error of a mean
    when all sizes are 1.

    >>> ratio_stderr([1.0, 3.0], [1, 1])
    (2.0, 1.0)
    """
    ratio = sum(totals) / sum(sizes)
    n = len(totals)
    if n < 2 or not math.isfinite(ratio):
        return ratio, None
    squares = sum((total - ratio * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / sum(sizes)


def perplexity(mean_nll: float, stderr: float | None) -> tuple[float, float | None]:
    """``exp(mean_nll)`` and, by the delta method, its standard error ``exp(mean_nll) · stderr``."""
    value = exponential(mean_nll)
    return value, value * stderr if stderr is not None and math.isfinite(value) else None


class TokenMetric(NamedTuple):
    """A metric against the dense model: the mean over tokens of a value that `compare_tokens` computes."""

    name: str
    """Key in an evaluation record."""
    token_value: str
    """Key in what `compare_tokens` returns."""
    protocol: str
    """What is measured, as the protocol says it."""
    of_dense: float
    """Value of the dense model itself, by definition."""


TOKEN_METRICS = (
    TokenMetric("kl_to_dense", "kl", "KL(dense || model), nats per token", 0.0),
    TokenMetric("top1_agreement", "agrees", "same most likely token as the dense model", 1.0),
)


def compare_tokens(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    dense_logits: Float[Tensor, "tokens vocab"] | None = None,
) -> dict[str, Float[Tensor, " tokens"]]:
    """Per token: ``nll`` (nats), and given the dense logits ``kl`` = KL(dense ‖ model) (nats), ``agrees`` and ``dense_nll``.

    Log-softmax in float32, sums over the vocabulary in float64: ``KL = Σᵥ p(v)·(log p(v) − log q(v))`` with ``p`` the dense
    model's distribution. ``agrees`` is 1 where both rank the same token first; NaN logits agree with nothing.
    """
    log_q = logits.float().log_softmax(-1)
    nll = -log_q.gather(-1, targets[:, None])[:, 0].double()
    if dense_logits is None:
        return {"nll": nll}
    log_p = dense_logits.float().log_softmax(-1)
    dense_nll = -log_p.gather(-1, targets[:, None])[:, 0].double()
    p = log_p.exp()
    divergence = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1, dtype=torch.float64)
    agrees = (logits.argmax(-1) == dense_logits.argmax(-1)) & ~nll.isnan()
    return {"nll": nll, "kl": divergence, "agrees": agrees.double(), "dense_nll": dense_nll}


def measure_tokens(
    model: nn.Module,
    windows: Int[Tensor, "windows window"],
    reference: Path | None = None,
    write_reference: Path | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """Token perplexity ``exp(mean NLL)``, KL divergence from the dense model and top-1 agreement with it.

    Every window predicts its tokens 2 … ``window`` from the ones before. Standard errors are ``sd/√n`` of the window means
    (tokens within a window are correlated, windows are taken as independent), for perplexity by the delta method.

    Args:
        reference: written by the dense model's evaluation of the same windows; ``None``: no comparison.
        write_reference: keep this model's final hidden states there, in the model's dtype.

    Returns:
        ``token_perplexity``, ``kl_to_dense`` (nats per token) and ``top1_agreement`` (fraction of tokens), each with
        ``value``, ``stderr`` and ``protocol``, and what was measured also with ``per_window``: the window means (of the negative
        log-likelihood, for the perplexity), which models are compared by. A broken model gives ``inf`` or ``nan``, not an
        exception.

    Raises:
        UserError: when the reference is of other tokens or another model, or ``lm_head`` is no longer the dense one.
    """
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    device = model.device
    n_windows, window = windows.shape
    n_rows = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    model.eval()
    dense = _Reference(reference, windows, head) if reference is not None else None
    kept: list[Tensor] = []
    kept_nll: list[Tensor] = []
    means: list[list[float]] = []
    progress = None if quiet else Progress(n_windows, f"Token perplexity: {n_windows} windows of {window} tokens")
    with torch.no_grad():
        _check_head(model, decoder, head, windows[:1, :8].to(device))
        for index, ids in enumerate(windows):
            ids = ids.to(device)
            hidden = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            dense_hidden = dense.hidden_states(index).to(hidden) if dense else None
            parts = []
            for start in range(0, window - 1, n_rows):
                rows = slice(start, start + n_rows)
                dense_logits = head(dense_hidden[rows]) if dense else None
                parts.append(compare_tokens(head(hidden[rows]), ids[1:][rows], dense_logits))
            tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if dense:
                dense.check_nll(index, tokens["dense_nll"])
            if write_reference is not None:
                kept.append(hidden.cpu())
                kept_nll.append(tokens["nll"].float().cpu())
            values = ("nll", *(metric.token_value for metric in TOKEN_METRICS))
            means.append([tokens[name].mean().item() if name in tokens else math.nan for name in values])
            so_far = exponential(sum(m[0] for m in means) / len(means))
            if progress:
                progress.step(f"window {index + 1}", f"perplexity so far {so_far:.2f}")
    if write_reference is not None:
        tensors = {"hidden_states": torch.stack(kept), "token_nll": torch.stack(kept_nll)}
        write_tensors(write_reference, tensors, _identity(windows, head))
    return _summary(torch.tensor(means, dtype=torch.float64), window, dense is not None, write_reference is not None)


def _summary(
    means: Float[Tensor, "windows metrics"], window: int, compared: bool, is_reference: bool
) -> dict[str, dict[str, Any]]:
    n = len(means)
    tokens = f"{n} non-overlapping windows of {window} tokens, documents joined by a blank line"
    errors = "stderr from window means" if n > 1 else "one window: no stderr"
    value, stderr = perplexity(*mean_stderr(means[:, 0]))
    result = {
        "token_perplexity": {
            "value": value,
            "stderr": stderr,
            "protocol": f"token perplexity exp(mean NLL), {tokens} (GPTQ, SVD-LLM); {errors}, delta method",
            "per_window": means[:, 0].tolist(),
        }
    }
    for metric, of_windows in zip(TOKEN_METRICS, means.T[1:], strict=True):
        what = metric.protocol
        if compared:
            value, stderr = mean_stderr(of_windows)
            protocol = f"{what}, {tokens}; {errors}"
            per_window = {"per_window": of_windows.tolist()}
        elif is_reference:
            value, stderr = metric.of_dense, 0.0
            protocol = f"{what}: this is the dense model, exact by definition"
            per_window = {}
        else:
            value, stderr = None, None
            protocol = f"{what}: not measured, no reference was given"
            per_window = {}
        result[metric.name] = {"value": value, "stderr": stderr, "protocol": protocol, **per_window}
    return result


def _identity(windows: Int[Tensor, "windows window"], head: nn.Module) -> dict[str, str]:
    """What has to be the same for two evaluations to be comparable token by token."""
    vocabulary, width = head.weight.shape
    shape = "x".join(map(str, windows.shape))
    return {"tokens_sha256": token_hash(windows), "windows": shape, "vocabulary": str(vocabulary), "width": str(width)}


def _check_head(model: nn.Module, decoder: nn.Module, head: nn.Module, ids: Int[Tensor, "1 tokens"]) -> None:
    """Logits have to be ``lm_head`` of the final hidden states and nothing more (no soft-capping, no scaling)."""
    ours = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(ours, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(
            f"{type(model).__name__} changes its logits after lm_head, which the comparison with the dense model does not "
            "support. Use a model of the Llama or Qwen family."
        )


class _Reference:
    """The dense model's final hidden states, read one window at a time."""

    def __init__(self, path: Path, windows: Int[Tensor, "windows window"], head: nn.Module):
        self.path = path
        try:
            self.file = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The dense reference {path} cannot be read ({error}). Evaluate the dense model again to write it."
            ) from error
        stored = self.file.metadata() or {}
        expected = _identity(windows, head)
        differing = [
            f"{key} {stored.get(key, 'missing')} instead of {expected[key]}"
            for key in expected
            if stored.get(key) != expected[key]
        ]
        if differing:
            raise UserError(
                f"The dense reference {path} belongs to another text, evaluation.window, evaluation.n_windows or model "
                f"({'; '.join(differing)}). Evaluate the dense model again with these settings."
            )

    def hidden_states(self, index: int) -> Float[Tensor, "tokens width"]:
        return self.file.get_slice("hidden_states")[index]

    def check_nll(self, index: int, nll: Float[Tensor, " tokens"]) -> None:
        """The dense likelihoods seen through this model's ``lm_head`` have to be the ones that were recorded."""
        recorded = self.file.get_slice("token_nll")[index].double().mean().item()
        mean = nll.mean().item()
        if math.isfinite(recorded) and not abs(mean - recorded) <= _HEAD_TOLERANCE * max(1.0, abs(recorded)):
            raise UserError(
                f"The dense model's hidden states in {self.path} give a negative log-likelihood of {mean:.4f} through this "
                f"model's lm_head, but {recorded:.4f} through the dense one: lm_head was changed, or it is another model. "
                "Leave lm_head out of the compression, or give the reference of the right dense model."
            )
