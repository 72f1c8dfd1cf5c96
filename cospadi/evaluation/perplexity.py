"""Token perplexity on held-out text, and how far a compressed model is from the dense one on the same tokens.

The dense model runs once: its evaluation keeps the final hidden states (the inputs of ``lm_head``) and what its distributions come to
(`next_token`). Compression leaves ``lm_head`` alone, so no later comparison needs the dense logits again.
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
from cospadi.kernels.next_token import NextTokens, divergence, makes_all, next_tokens
from cospadi.progress import Progress
from cospadi.records import write_tensors

_CHECKED_EVERY = 16
"""Of so many tokens one is used to look whether ``lm_head`` is the dense model's."""
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
    """A metric against the dense model: the mean over tokens of a value that `_compared` computes."""

    name: str
    """Key in an evaluation record."""
    token_value: str
    """Key in what `_compared` returns."""
    protocol: str
    """What is measured, as the protocol says it."""
    of_dense: float
    """Value of the dense model itself, by definition."""


TOKEN_METRICS = (
    TokenMetric("kl_to_dense", "kl", "KL(dense || model), nats per token", 0.0),
    TokenMetric("top1_agreement", "agrees", "same most likely token as the dense model", 1.0),
)


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
    model.eval()
    dense = _Reference(reference, windows, head) if reference is not None else None
    kept: list[dict[str, Tensor]] = []
    means: list[list[float]] = []
    progress = None if quiet else Progress(n_windows, f"Token perplexity: {n_windows} windows of {window} tokens")
    with torch.no_grad():
        _check_head(model, decoder, head, windows[:1, :8].to(device))
        for index, ids in enumerate(windows):
            ids = ids.to(device)
            hidden = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
            found = next_tokens(hidden, head, ids[1:], with_expected=write_reference is not None)
            tokens = {"nll": found.nll} | (_compared(hidden, found, *dense.read(index, ids[1:])) if dense else {})
            if write_reference is not None:
                kept.append(_kept(hidden, found))
            values = ("nll", *(metric.token_value for metric in TOKEN_METRICS))
            means.append([tokens[name].mean().item() if name in tokens else math.nan for name in values])
            so_far = exponential(sum(m[0] for m in means) / len(means))
            if progress:
                progress.step(f"window {index + 1}", f"perplexity so far {so_far:.2f}")
    if write_reference is not None:
        tensors = {name: torch.stack([of_window[name] for of_window in kept]) for name in kept[0]}
        write_tensors(write_reference, tensors, _identity(windows, head))
    return _summary(torch.tensor(means, dtype=torch.float64), window, dense is not None, write_reference is not None)


def _compared(
    hidden: Float[Tensor, "tokens width"],
    found: NextTokens,
    dense_hidden: Float[Tensor, "tokens width"],
    dense: NextTokens,
) -> dict[str, Float[Tensor, " tokens"]]:
    """Per token: ``kl`` = KL(dense ‖ model) in nats, and ``agrees``, 1 where both rank the same token first.

    Logits that are not numbers agree with nothing.
    """
    agrees = (found.likeliest == dense.likeliest) & ~found.nll.isnan()
    return {"kl": divergence(dense_hidden, dense, hidden, found), "agrees": agrees.double()}


def _kept(hidden: Float[Tensor, "tokens width"], found: NextTokens) -> dict[str, Tensor]:
    """What a later comparison needs of the dense model."""
    return {
        "hidden_states": hidden.cpu(),
        "token_nll": found.nll.float().cpu(),
        "log_total": found.log_total.cpu(),
        "likeliest": found.likeliest.int().cpu(),
        "expected": found.expected.float().cpu(),
    }


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
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    if not makes_all(head, hidden, model(input_ids=ids, use_cache=False).logits):
        raise UserError(
            f"{type(model).__name__} changes its logits after lm_head, which the comparison with the dense model does not "
            "support. Use a model of the Llama or Qwen family."
        )


class _Reference:
    """What the dense model's evaluation kept, read one window at a time."""

    def __init__(self, path: Path, windows: Int[Tensor, "windows window"], head: nn.Module):
        self.path = path
        self.head = head
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

    def read(self, index: int, targets: Int[Tensor, " tokens"]) -> tuple[Float[Tensor, "tokens width"], NextTokens]:
        """Final hidden states of a window, and the distributions behind them.

        Raises:
            UserError: this model's ``lm_head`` makes other distributions of them.
        """
        hidden = self._part("hidden_states", index).to(self.head.weight)
        nll = self._part("token_nll", index).to(targets.device).double()
        self._check(hidden[::_CHECKED_EVERY], targets[::_CHECKED_EVERY], nll[::_CHECKED_EVERY])
        if "expected" not in self.file.keys():  # noqa: SIM118 - of a reference that version 0.1.0 wrote
            return hidden, next_tokens(hidden, self.head, targets, with_expected=True)
        log_total, likeliest, expected = (
            self._part(name, index).to(targets.device) for name in ("log_total", "likeliest", "expected")
        )
        return hidden, NextTokens(nll, log_total, likeliest, expected)

    def _part(self, name: str, index: int) -> Tensor:
        return self.file.get_slice(name)[index]

    def _check(
        self,
        hidden: Float[Tensor, "tokens width"],
        targets: Int[Tensor, " tokens"],
        recorded: Float[Tensor, " tokens"],
    ) -> None:
        mean = next_tokens(hidden, self.head, targets).nll.mean().item()
        expected = recorded.mean().item()
        if math.isfinite(expected) and not abs(mean - expected) <= _HEAD_TOLERANCE * max(1.0, abs(expected)):
            raise UserError(
                f"The dense model's hidden states in {self.path} give a negative log-likelihood of {mean:.4f} through this "
                f"model's lm_head, but {expected:.4f} through the dense one: lm_head was changed, or it is another model. "
                "Leave lm_head out of the compression, or give the reference of the right dense model."
            )
