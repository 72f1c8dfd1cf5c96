"""Room 6: how good a model still is. Dense and compressed models go through the same function.

Token perplexity, KL divergence from the dense model and top-1 agreement on held-out text (``perplexity``), stock tasks of
lm-evaluation-harness and two embedded ones over the same text (``tasks``, ``heldout``). Every number comes with its
standard error, or ``None`` where there is none, and with a line that says how it was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi import devices
from cospadi.errors import UserError
from cospadi.evaluation.continuations import continuations
from cospadi.evaluation.perplexity import measure_tokens, token_windows
from cospadi.evaluation.settings import EvaluationConfig
from cospadi.evaluation.task_names import check_tasks
from cospadi.evaluation.tasks import average_accuracy, prepared_tasks
from cospadi.records import text_hash

__all__ = ["check_tasks", "continuations", "evaluate", "measure_tokens", "token_windows"]


def evaluate(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    documents: Sequence[str],
    config: EvaluationConfig,
    reference: Path | None = None,
    write_reference: Path | None = None,
    second_documents: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Measure a causal language model on held-out ``documents`` and on the configured tasks.

    The model is moved to ``config.device`` and put into evaluation mode. The same inputs, batch size and threads give the
    same numbers to the last bit.

    Args:
        reference: the dense model's final hidden states, for KL divergence and agreement.
        write_reference: write this (dense) model's final hidden states there.
        second_documents: of ``config.second_text``.

    Returns:
        The result: ``token_perplexity``, ``second_perplexity``, ``word_perplexity``, ``lambada_perplexity``, ``kl_to_dense``
        (nats per token), ``top1_agreement`` (fraction) and ``average_accuracy`` (fraction), each with ``value``, ``stderr`` and
        ``protocol``; ``tasks``; ``continuations`` of the prompts; ``tokens`` (predicted ones); ``text_hash``;
        ``limit``. And per task the rows of its documents, JSON-able.

    Raises:
        UserError: for an unknown task, missing data, a too short text, a window longer than the model's positions, or a
            reference of something else.
    """
    check_tasks(config)
    _check_positions(model, config)
    windows = token_windows(tokenizer, documents, config.window, config.n_windows)
    second = token_windows(tokenizer, second_documents, config.window, config.n_windows) if second_documents else None
    with (
        _threads(config, _move(model, config.device)),
        prepared_tasks(model, tokenizer, documents, config) as run_tasks,
    ):
        result = measure_tokens(model, windows, reference, write_reference)
        result["second_perplexity"] = _second_perplexity(model, second)
        entries, samples = run_tasks()
        written = continuations(model, tokenizer, config.prompts, config.continuation_tokens)
    result |= {
        "word_perplexity": _metric_of(entries, ("wikitext", "heldout_perplexity"), "word_perplexity"),
        "lambada_perplexity": _metric_of(entries, ("lambada_openai",), "perplexity"),
        "average_accuracy": average_accuracy(entries),
        "tasks": entries,
        "continuations": written,
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
        "text_hash": text_hash("\n\n".join(documents)),
        "limit": config.limit,
    }
    return result, samples


def _check_positions(model: nn.Module, config: EvaluationConfig) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    for setting in ("window", "max_length"):
        length = getattr(config, setting)
        if positions is not None and length > positions:
            raise UserError(
                f"evaluation.{setting}={length} is more than the {positions} positions this model was made for. "
                f"Set evaluation.{setting} to {positions} or less."
            )


def _metric_of(entries: dict[str, dict[str, Any]], tasks: Sequence[str], metric: str) -> dict[str, Any]:
    """``metric`` of the first of these tasks that was run."""
    for name in tasks:
        if measured := entries.get(name, {}).get("all_metrics", {}).get(metric):
            return {"value": measured["value"], "stderr": measured["stderr"], "protocol": entries[name]["protocol"]}
    return _not_measured(f"{' or '.join(tasks)} was not run")


def _second_perplexity(model: nn.Module, windows: Any) -> dict[str, Any]:
    if windows is None:
        return _not_measured("no evaluation.second_text is configured")
    return measure_tokens(model, windows)["token_perplexity"]


def _not_measured(why: str) -> dict[str, Any]:
    return {"value": None, "stderr": None, "protocol": f"not measured: {why}"}


def _move(model: nn.Module, device: str) -> torch.device:
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        return model.device  # spread over several devices on purpose
    picked = devices.pick(device, "evaluation.device")
    model.to(picked)
    return picked


@contextlib.contextmanager
def _threads(config: EvaluationConfig, device: torch.device) -> Iterator[None]:
    """``config.threads`` while running on the CPU: the number changes the last digits."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
