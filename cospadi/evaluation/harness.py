"""Running tasks of lm-evaluation-harness, and what is kept of each document."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.models.huggingface
import torch
from jaxtyping import Int
from lm_eval.api.metrics import perplexity, weighted_perplexity
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.evaluation.perplexity import exponential, mean_stderr, ratio_stderr
from cospadi.evaluation.perplexity import perplexity as perplexity_of
from cospadi.evaluation.settings import EMBEDDED_TASKS, EvaluationConfig
from cospadi.evaluation.task_names import KICK
from cospadi.progress import Progress

ACCURACIES = ("acc_norm", "acc")
"""What an average is made of: the first of the two that a task has."""
_MAIN_METRICS = (*ACCURACIES, "contains", "exact_match", "word_perplexity", "perplexity")
_BOOTSTRAP_ITERATIONS = 1000
_LOGGED_LETTERS = 200
_EXPECTED_WARNINGS = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
    "Custom kwargs can be passed",
    "exceeds model's maximum length",  # counted, and told in the protocol
    "Left truncation applied",  # likewise
    "is defined, but aggregation is not",
    "is defined, but higher_is_better is not",
)


class ReportingModel(HFLM):
    """HFLM that prints lines with the time left instead of moving bars, and makes no logits that nobody reads."""

    progress: Progress | None = None
    longest: int | None = None
    """Tokens of the longest answer, whose logits are read; ``None``: those of all tokens."""
    title = ""
    rolling = False
    cut = 0

    def start(self, n_requests: int, tokens: int) -> None:
        steps = max(1, min(10, n_requests // self.batch_size))
        self.share = tokens / steps
        self.seen = 0
        self.progress = Progress(steps, f"{self.title}: {n_requests} requests, {tokens} tokens")

    def advance(self, tokens: int) -> None:
        if self.progress is not None:
            self.seen += tokens
            while self.progress.done < self.progress.total and self.seen >= (self.progress.done + 1) * self.share:
                self.progress.step(f"{self.seen} tokens")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        self.start(len(requests), sum(len(self.tok_encode(request.args[0])) for request in requests))
        self.rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.rolling = False

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None):
        if not self.rolling:  # requests that differ in their last token alone share one forward pass
            longest = max(len(continuation) for _, _, continuation in requests)
            if longest > self.max_length:
                raise UserError(
                    f"Task {self.title} has an answer of {longest} tokens, longer than evaluation.max_length="
                    f"{self.max_length}. Set evaluation.max_length to {longest} or more."
                )
            self.cut = sum(
                len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
            )
            distinct = {tuple(context + continuation[:-1]) for _, context, continuation in requests}
            self.start(len(requests), sum(min(len(key), self.max_length) for key in distinct))
            self.longest = longest
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        finally:
            self.longest = None

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.longest is None or args or kwargs or not self._keeps_logits:
            logits = super()._model_call(inps, *args, **kwargs)
        else:
            # HFLM counts positions from the end, so that logits of the last ones are enough.
            with torch.no_grad():
                logits = self.model(inps, logits_to_keep=min(self.longest + padding(inps), inps.shape[1])).logits
        self.advance(inps.numel())
        return logits

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        room = self.max_length - max(new_tokens(request.args[1]) for request in requests)
        if room < 1:
            raise UserError(
                f"Task {self.title} writes {self.max_length - room} tokens, and evaluation.max_length={self.max_length} "
                f"leaves none for its prompt. Set evaluation.max_length to more than {self.max_length - room}."
            )
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self.cut = sum(length > room for length in lengths)
        self.start(len(requests), sum(min(length, room) for length in lengths))
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        written = super()._model_generate(context, *args, **kwargs)
        self.advance(int(kwargs["attention_mask"].sum()))
        return written


def padding(inps: Int[Tensor, "batch length"]) -> int:
    """At most so many tokens at the end of a row are padding, which HFLM writes as zeros.

    >>> padding(torch.tensor([[5, 0, 7, 8], [5, 6, 0, 0]])), padding(torch.tensor([[0, 0]]))
    (2, 2)
    """
    ends = torch.arange(1, inps.shape[1] + 1, device=inps.device) * (inps != 0)
    return inps.shape[1] - int(ends.amax(dim=1).min())


def harness_model(model: nn.Module, tokenizer: Callable[..., Any], config: EvaluationConfig) -> ReportingModel:
    """The model as lm-eval takes it."""
    return ReportingModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        max_length=config.max_length,
        device=str(model.device),
        softmax_dtype="float32",
    )


def new_tokens(settings: dict[str, Any]) -> int:
    """How many tokens a task lets a model write at most."""
    return normalize_gen_kwargs(settings)["max_gen_toks"]


def run_harness(
    language_model: ReportingModel, name: str, task: Any, limit: int | None, config: EvaluationConfig
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """One task or group: its entry and the rows of its documents."""
    for leaf in leaves_of(task):
        guard_overflow(leaf)
    language_model.title = name
    language_model.cut = 0
    result = lm_eval.simple_evaluate(
        model=language_model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        batch_size=config.batch_size,
        bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        log_samples=True,
    )
    leaves = [leaf.task_name for leaf in leaves_of(task)]
    logged = {leaf: result["samples"][leaf] for leaf in leaves}
    metrics = _metrics(result, name, logged)
    main = next((m for m in _MAIN_METRICS if m in metrics), None) or next(iter(metrics))
    entry = {
        "metric": main,
        "value": metrics[main]["value"],
        "stderr": metrics[main]["stderr"],
        "n_documents": sum(len({row["doc_id"] for row in rows}) for rows in logged.values()),
        "higher_is_better": metrics[main]["higher_is_better"],
        "in_average": False,
        "protocol": _protocol(language_model, name, task, result, metrics, main, limit, config),
        "all_metrics": metrics,
        "logged_as": leaves,
    }
    return entry, {leaf: [_row(row) for row in rows] for leaf, rows in logged.items()}


def _metrics(result: dict[str, Any], name: str, logged: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Every metric of a task, and how many documents have likelihoods that are not finite, if any."""
    of_leaves = result["higher_is_better"]
    better = of_leaves.get(name) or of_leaves.get(next(iter(logged))) or {}  # a group has none of its own
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in result["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        # lm-eval writes "N/A" where it has no formula: then the error is that of a mean over documents.
        stderr = result["results"][name].get(f"{metric}_stderr,{filtered}")
        if not isinstance(stderr, float | int):
            stderr = document_stderr(metric, logged[name]) if name in logged else None
        value = float(value)
        metrics[metric if filtered == "none" else f"{metric},{filtered}"] = {
            "value": value,
            "stderr": float(stderr) if stderr is not None and math.isfinite(value) else None,
            "higher_is_better": better.get(metric),
        }
    broken = sum(_is_broken(row) for rows in logged.values() for row in rows)
    if broken:
        metrics["non_finite_documents"] = {"value": broken, "stderr": None, "higher_is_better": False}
    return metrics


def _protocol(
    language_model: ReportingModel,
    name: str,
    task: Any,
    result: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
    main: str,
    limit: int | None,
    config: EvaluationConfig,
) -> str:
    """How a task was measured, in one line."""
    version = result["versions"].get(name)
    is_own = name in EMBEDDED_TASKS or (KICK / f"{name}.yaml").is_file()
    shots = {result["n-shot"].get(leaf.task_name) for leaf in leaves_of(task)}
    broken = metrics.get("non_finite_documents", {"value": 0})["value"]
    facts = [
        f"lm-eval {importlib.metadata.version('lm_eval')}",
        f"{name} version {version if version is not None else 'unknown'}" + (" (own task)" if is_own else ""),
        f"{'/'.join(str(s or 0) for s in sorted(shots, key=str))}-shot",
        main,
        *prompt_facts(leaves_of(task)[0]),
        f"max_length {config.max_length}",
        first_token(language_model, rolling="word_perplexity" in metrics),
        f"batch size {config.batch_size}",
        str(language_model.model.dtype).removeprefix("torch."),
        f"limit {limit}" if limit is not None else "all documents",
        *([f"{language_model.cut} requests cut from the left"] if language_model.cut else []),
        *([f"{broken} documents with non-finite likelihoods"] if broken else []),
    ]
    return ", ".join(facts)


def first_token(language_model: Any, rolling: bool) -> str:
    """The token before every text: perplexities by document start from lm-eval's prefix token, whatever the tokenizer."""
    tokenizer = language_model.tokenizer
    if rolling:
        return f"starting from {tokenizer.convert_ids_to_tokens(language_model.prefix_token_id)}"
    encoded = language_model.tok_encode("a")
    added = len(encoded) > 1 and encoded[0] == getattr(tokenizer, "bos_token_id", None)
    return "BOS added" if added else "no BOS"


def task_name(task: Any) -> str:
    """Name of a task or a group."""
    return task.name if hasattr(task, "get_all_tasks") else task.task_name


def leaves_of(task: Any) -> list[Any]:
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def prompt_facts(task: Any) -> list[str]:
    """What a generating task's protocol says beside the numbers that all have."""
    if task.OUTPUT_TYPE != "generate_until":
        return []
    settings = task.config.generation_kwargs
    protocol = (task.config.metadata or {}).get("protocol")
    how = "sampled" if settings.get("do_sample") else "greedy"
    return [f"{how}, at most {new_tokens(settings)} new tokens", *([protocol] if protocol else [])]


def guard_overflow(task: Any) -> None:
    """A broken model's perplexity is infinite; lm-eval's own ``math.exp`` would raise OverflowError.

    The guarded function is not on lm-eval's list for bootstrapping either: 100 000 resamples in a pool of processes.
    """

    def mean_perplexity(items: Sequence[float | int]) -> float:
        return exponential(-sum(items) / len(items))

    def ratio_perplexity(items: Sequence[tuple[float, float | int]]) -> float:
        return exponential(-sum(total for total, _ in items) / sum(size for _, size in items))

    guarded = {perplexity: mean_perplexity, weighted_perplexity: ratio_perplexity}
    aggregations = getattr(task, "_aggregation_list", {})
    for metric, aggregation in aggregations.items():
        aggregations[metric] = guarded.get(aggregation, aggregation)


def document_stderr(metric: str, rows: list[dict[str, Any]]) -> float | None:
    """Delta-method standard error of a perplexity from its documents; ``None`` for any other metric."""
    values = [row[metric] for row in rows if metric in row]
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        nll, stderr = ratio_stderr([-total for total, _ in values], [size for _, size in values])
        if metric == "bits_per_byte":
            return stderr / math.log(2) if stderr is not None else None
        return perplexity_of(nll, stderr)[1]
    if metric == "perplexity":
        return perplexity_of(*mean_stderr(-torch.tensor(values, dtype=torch.float64)))[1]
    return None


def _is_broken(row: dict[str, Any]) -> bool:
    """Whether the model gave this document a likelihood that is not a finite number."""
    numbers = [
        n
        for response in row["filtered_resps"]
        for n in (response if isinstance(response, list | tuple) else [response])
    ]
    return any(isinstance(number, float) and not math.isfinite(number) for number in numbers)


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """A document's line in the log: JSON-able."""
    return {
        "doc_id": sample["doc_id"],
        "target": _plain(sample["target"]),
        "metrics": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
        "responses": _plain(sample["filtered_resps"]),
        "prompt_hash": sample["prompt_hash"],
    }


def _plain(value: Any) -> Any:
    """Python's own types; a text (a rolling task's target is a whole page) is cut."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return value if len(value) <= _LOGGED_LETTERS else f"{value[:_LOGGED_LETTERS]}…"
    if value is None or isinstance(value, bool | int | float):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def first_line(error: BaseException) -> str:
    """The innermost cause's first line, without its full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _EXPECTED_WARNINGS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No moving bars, no notes about what is done on purpose; other warnings stay."""
    loggers = [logging.getLogger(name) for name in ("lm_eval.api.task", "lm_eval.models.huggingface")]
    bars = datasets.are_progress_bars_disabled()
    bar = lm_eval.api.task.tqdm
    environment = lm_eval.evaluator.add_env_info
    pools = os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.addFilter(_is_unexpected)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    lm_eval.evaluator.add_env_info = lambda storage: None  # 2 s a task; versions are in our own record
    os.environ["DISABLE_MULTIPROC"] = "1"  # no fork of a process that holds a model and its threads
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_unexpected)
        if not bars:
            datasets.enable_progress_bars()
        lm_eval.api.task.tqdm = bar
        lm_eval.evaluator.add_env_info = environment
        if pools is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pools
