"""Tasks of lm-evaluation-harness: stock ones, unmodified, those of ``kick``, and two of our own over the held-out text.

The only module that imports ``lm_eval``, and only inside functions.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.config import EMBEDDED_TASKS, EvaluationConfig
from cospadi.errors import UserError
from cospadi.evaluation import kick
from cospadi.evaluation.heldout import cloze_passages, perplexity_documents
from cospadi.evaluation.perplexity import exponential, mean_stderr, ratio_stderr
from cospadi.evaluation.perplexity import perplexity as perplexity_of
from cospadi.progress import Progress

ACCURACIES = ("acc_norm", "acc")
"""What an average is made of: the first of the two that a task has."""
_MAIN_METRICS = (*ACCURACIES, "contains", "exact_match", "word_perplexity", "perplexity")
KICK = Path(kick.__file__).parent
"""Tasks of the project in lm-eval's own form."""
_EMBEDDED_VERSION = 1
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
_NAMED = re.compile(rb"""^["']?(task|group)["']?[ ]*:[ ]*["']?([^\s"'#]+)["']?[ ]*\r?$""", re.MULTILINE)


@functools.cache
def stock_tasks() -> dict[str, Path]:
    """Names of lm-eval's stock tasks and of ours in ``kick``, and the files that define them, without importing lm-eval (2 s; its
    index takes 15 s).

    Groups (``mmlu``), tags (``ai2_arc``) and a few tasks written in Python are not among them.
    """
    return _stock_names()["task"]


@functools.cache
def _stock_names() -> dict[str, dict[str, Path]]:
    """Names of tasks and of groups that have a file of their own."""
    root = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    found: dict[str, dict[str, Path]] = {"task": {}, "group": {}}
    for path in [*sorted(KICK.glob("*.yaml")), *sorted(root.glob("**/*.yaml"), key=Path.as_posix)]:
        named = dict(_NAMED.findall(path.read_bytes()))
        kind = "group" if b"group" in named else "task"
        if name := named.get(kind.encode()):
            found[kind].setdefault(name.decode(), path)
    return found


@functools.cache
def _stock_manager() -> Any:
    from lm_eval.tasks import TaskManager

    print("Reading lm-eval's index of groups and tags (about 15 s)", flush=True)
    return TaskManager()


def check_tasks(config: EvaluationConfig) -> None:
    """Refuse task names that nobody knows, before anything runs.

    Raises:
        UserError: naming the closest known names.
    """
    for name in config.tasks:
        if not any(name in names for names in _stock_names().values()) and name not in _stock_manager().all_tasks:
            near = difflib.get_close_matches(name, {*_stock_manager().all_tasks, *stock_tasks(), *EMBEDDED_TASKS}, n=4)
            told = f" Did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"evaluation.tasks: lm-eval {importlib.metadata.version('lm_eval')} has no task {name}.{told} "
                "All names: lm-eval ls tasks."
            )


@contextlib.contextmanager
def prepared_tasks(
    model: nn.Module, tokenizer: Callable[..., Any], documents: Sequence[str], config: EvaluationConfig
) -> Iterator[Callable[[], tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]]]:
    """Load ``config.tasks`` and ``config.embedded_tasks`` with their data; the block may then run them on ``model``.

    Stock tasks come from lm-eval's own files, zero-shot unless a task says otherwise, on data of the hub or of
    ``config.mirror``. Log-softmax is taken in float32 whatever the model's dtype. Standard errors: lm-eval's analytic one for
    means; for perplexities the delta method over documents (lm-eval has none, or a slow bootstrap); ``None`` otherwise.

    Yields:
        A function that runs them and returns per task its entry (``metric``, ``value``, ``stderr``, ``n_documents``,
        ``higher_is_better``, ``in_average``, ``protocol``, ``all_metrics``), and per task the JSON-able rows of its documents.

    Raises:
        UserError: for an unknown task, missing data (unless it may be left out) or a too short text, before anything runs.
    """
    check_tasks(config)
    if not config.tasks and not config.embedded_tasks:
        yield lambda: ({}, {})
        return
    with _quiet(), _fresh_cache(config.mirror):
        loaded = {name: embedded_task(name, documents, config) for name in config.embedded_tasks}
        for name in config.tasks:
            try:
                loaded |= {_name(task): task for task in load_stock(name, config.mirror)}
            except MissingData as error:
                if not config.leave_out_missing or config.mirror is None:
                    raise
                print(f"Left out: {error}", flush=True)
                loaded[name] = error
        if all(isinstance(task, MissingData) for task in loaded.values()):
            raise UserError(
                f"evaluation.mirror={config.mirror} holds the data of none of evaluation.tasks. Correct one of them."
            )
        yield functools.partial(_run_all, model, tokenizer, loaded, config)


def _run_all(
    model: nn.Module, tokenizer: Callable[..., Any], loaded: dict[str, Any], config: EvaluationConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    entries: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[dict[str, Any]]] = {}
    language_model = _language_model(model, tokenizer, config)
    for name, task in loaded.items():
        if isinstance(task, MissingData):
            entries[name] = _left_out(task)
            continue
        entries[name], rows = _run(language_model, name, task, None if name in EMBEDDED_TASKS else config.limit, config)
        samples |= rows
    averaged = [n for n, entry in entries.items() if entry["metric"] in ACCURACIES and entry["value"] is not None]
    stock = [name for name in averaged if name not in EMBEDDED_TASKS]
    for name, entry in entries.items():
        entry["in_average"] = name in (stock or averaged)
    return entries, samples


def average_accuracy(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean of the accuracies ``in_average``; ``stderr = √(Σ seᵢ²) / n``, tasks taken as independent."""
    names = [name for name, entry in entries.items() if entry["in_average"]]
    if not names:
        return {"value": None, "stderr": None, "tasks": [], "protocol": "not measured: no accuracy task was configured"}
    errors = [entries[name]["stderr"] for name in names]
    told = ", ".join(f"{name} ({entries[name]['metric']})" for name in names)
    own = "; no stock accuracy task was configured" if all(name in EMBEDDED_TASKS for name in names) else ""
    missing = [name for name, entry in entries.items() if entry["value"] is None]
    own += f"; without {', '.join(missing)}, whose data was not there" if missing else ""
    return {
        "value": sum(entries[name]["value"] for name in names) / len(names),
        "stderr": None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(names),
        "tasks": names,
        "protocol": f"mean of {told}: acc_norm where lm-eval has it, else acc; stderr of independent tasks{own}",
    }


class MissingData(UserError):
    """The data of a task is not to be had."""


def _left_out(missing: MissingData) -> dict[str, Any]:
    """The entry of a task that could not be run."""
    return {
        "metric": "",
        "value": None,
        "stderr": None,
        "n_documents": 0,
        "higher_is_better": None,
        "in_average": False,
        "protocol": f"left out, and out of the average. {missing}",
        "all_metrics": {},
        "logged_as": [],
    }


def load_stock(name: str, mirror: str | None) -> list[Any]:
    """Stock task (or group, or the tasks of a tag) from lm-eval's own files, with its data.

    Raises:
        MissingData: naming task, data set and ``evaluation.mirror`` when the data is not to be had.
        UserError: when the task needs a package that is not installed.
    """
    import httpx
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    wanted: list[str] = []
    try:
        with _data_from(mirror, wanted):
            if name in stock_tasks():
                built = TaskManager(include_defaults=False).load([str(stock_tasks()[name])])
            else:
                built = _stock_manager().load([name])
    except ImportError as error:
        raise UserError(f"The task {name} needs a package that is not installed ({_first_line(error)}).") from error
    except (OSError, ValueError, DatasetsError, httpx.HTTPError) as error:
        if not wanted:
            raise  # not about data
        place = f"in evaluation.mirror={mirror}" if mirror else "on the hub or in its cache"
        mend = (
            "Put the data set there"
            if mirror
            else "Connect to the hub, or set evaluation.mirror to a folder that holds it"
        )
        raise MissingData(
            f"The data of task {name} ({wanted[-1]}) was not found {place}: {_first_line(error)}. "
            f"{mend}, or take {name} out of evaluation.tasks."
        ) from error
    children = {child for members in built.get("group_map", {}).values() for child in members}
    groups = [group for group_name, group in built.get("groups", {}).items() if group_name not in children]
    if groups and all(getattr(group, "aggregate_metric_list", None) for group in groups):
        return groups
    return list(built["tasks"].values())


def embedded_task(name: str, documents: Sequence[str], config: EvaluationConfig) -> Any:
    """``heldout_perplexity`` (rolling) or ``heldout_cloze`` (LAMBADA-like) over ``documents``, held in memory.

    Raises:
        UserError: when the documents are too few or too short.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    if name == "heldout_perplexity":
        texts = perplexity_documents(documents, config.n_perplexity_documents, config.document_words)
        rows = [{"text": text} for text in texts]
        settings = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda doc: doc["text"],
            "metric_list": [
                {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
                for metric, aggregation in (
                    ("word_perplexity", "weighted_perplexity"),
                    ("byte_perplexity", "weighted_perplexity"),
                    ("bits_per_byte", "bits_per_byte"),
                )
            ],
        }
    else:
        rows = cloze_passages(
            documents,
            config.n_cloze_documents,
            config.cloze_words,
            config.n_perplexity_documents,
            config.document_words,
        )
        settings = {
            "output_type": "loglikelihood",
            "doc_to_text": lambda doc: doc["context"],
            "doc_to_target": lambda doc: doc["target"],
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    dataset = {"test": Dataset.from_list(rows)}
    metadata = {"version": _EMBEDDED_VERSION}
    fixed = {"task": name, "custom_dataset": lambda **_: dataset, "test_split": "test", "metadata": metadata}
    return ConfigurableTask(config={**fixed, **settings})


def _language_model(model: nn.Module, tokenizer: Callable[..., Any], config: EvaluationConfig) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):
        """HFLM that prints lines with the time left instead of moving bars; what it computes is untouched."""

        progress: Progress | None = None
        title = ""
        rolling = False
        cut = 0

        def start(self, n_requests: int, tokens: int) -> None:
            steps = max(1, min(10, n_requests // self.batch_size))
            self.share, self.seen = tokens / steps, 0
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

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ):
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
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = super()._model_call(inps, *args, **kwargs)
            self.advance(inps.numel())
            return logits

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
            room = self.max_length - max(_new_tokens(request.args[1]) for request in requests)
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

    return Reporting(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        max_length=config.max_length,
        device=str(model.device),
        softmax_dtype="float32",
    )


def _new_tokens(settings: dict[str, Any]) -> int:
    """How many tokens a task lets a model write at most."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs(settings)["max_gen_toks"]


def _run(
    language_model: Any, name: str, task: Any, limit: int | None, config: EvaluationConfig
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """One task or group: its entry and the rows of its documents."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    for leaf in _leaves(task):
        _guard_overflow(leaf)
    language_model.title, language_model.cut = name, 0
    result = simple_evaluate(
        model=language_model,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        batch_size=config.batch_size,
        bootstrap_iters=_BOOTSTRAP_ITERATIONS,
        log_samples=True,
    )
    leaves = [leaf.task_name for leaf in _leaves(task)]
    logged = {leaf: result["samples"][leaf] for leaf in leaves}
    better = result["higher_is_better"].get(name) or result["higher_is_better"].get(leaves[0]) or {}  # a group has none
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in result["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = result["results"][name].get(f"{metric}_stderr,{filtered}")
        if not isinstance(stderr, float | int):  # "N/A"
            stderr = _document_stderr(metric, logged[name]) if name in logged else None
        value = float(value)
        metrics[metric if filtered == "none" else f"{metric},{filtered}"] = {
            "value": value,
            "stderr": float(stderr) if stderr is not None and math.isfinite(value) else None,
            "higher_is_better": better.get(metric),
        }
    broken = sum(_is_broken(row) for rows in logged.values() for row in rows)
    if broken:
        metrics["non_finite_documents"] = {"value": broken, "stderr": None, "higher_is_better": False}
    main = next((m for m in _MAIN_METRICS if m in metrics), None) or next(iter(metrics))
    n_documents = sum(len({row["doc_id"] for row in rows}) for rows in logged.values())
    version, shots = result["versions"].get(name), {result["n-shot"].get(leaf) for leaf in leaves}
    protocol = [
        f"lm-eval {importlib.metadata.version('lm_eval')}",
        f"{name} version {version if version is not None else 'unknown'}"
        + (" (own task)" if name in EMBEDDED_TASKS or (KICK / f"{name}.yaml").is_file() else ""),
        f"{'/'.join(str(s or 0) for s in sorted(shots, key=str))}-shot",
        main,
        *_told(_leaves(task)[0]),
        f"max_length {config.max_length}",
        _first_token(language_model, rolling="word_perplexity" in metrics),
        f"batch size {config.batch_size}",
        str(language_model.model.dtype).removeprefix("torch."),
        f"limit {limit}" if limit is not None else "all documents",
        *([f"{language_model.cut} requests cut from the left"] if language_model.cut else []),
        *([f"{broken} documents with non-finite likelihoods"] if broken else []),
    ]
    entry = {
        "metric": main,
        "value": metrics[main]["value"],
        "stderr": metrics[main]["stderr"],
        "n_documents": n_documents,
        "higher_is_better": metrics[main]["higher_is_better"],
        "in_average": False,
        "protocol": ", ".join(protocol),
        "all_metrics": metrics,
        "logged_as": leaves,
    }
    return entry, {leaf: [_row(row) for row in rows] for leaf, rows in logged.items()}


def _first_token(language_model: Any, rolling: bool) -> str:
    """What stands before every text: perplexities by document start from lm-eval's prefix token, whatever the tokenizer."""
    tokenizer = language_model.tokenizer
    if rolling:
        return f"starting from {tokenizer.convert_ids_to_tokens(language_model.prefix_token_id)}"
    encoded = language_model.tok_encode("a")
    added = len(encoded) > 1 and encoded[0] == getattr(tokenizer, "bos_token_id", None)
    return "BOS added" if added else "no BOS"


def _name(task: Any) -> str:
    """Of a task or a group."""
    return task.name if hasattr(task, "get_all_tasks") else task.task_name


def _leaves(task: Any) -> list[Any]:
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def _told(task: Any) -> list[str]:
    """What a generating task's protocol says beside the numbers that all have."""
    if task.OUTPUT_TYPE != "generate_until":
        return []
    settings, told = task.config.generation_kwargs, (task.config.metadata or {}).get("protocol")
    how = "sampled" if settings.get("do_sample") else "greedy"
    return [f"{how}, at most {_new_tokens(settings)} new tokens", *([told] if told else [])]


def _guard_overflow(task: Any) -> None:
    """A broken model's perplexity is infinite; lm-eval's own ``math.exp`` would raise OverflowError.

    The guarded function is not on lm-eval's list for bootstrapping either: 100 000 resamples in a pool of processes.
    """
    from lm_eval.api.metrics import perplexity, weighted_perplexity

    def mean_perplexity(items: Sequence[float | int]) -> float:
        return exponential(-sum(items) / len(items))

    def ratio_perplexity(items: Sequence[tuple[float, float | int]]) -> float:
        return exponential(-sum(total for total, _ in items) / sum(size for _, size in items))

    guarded = {perplexity: mean_perplexity, weighted_perplexity: ratio_perplexity}
    aggregations = getattr(task, "_aggregation_list", {})
    for metric, aggregation in aggregations.items():
        aggregations[metric] = guarded.get(aggregation, aggregation)


def _document_stderr(metric: str, rows: list[dict[str, Any]]) -> float | None:
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


def _first_line(error: BaseException) -> str:
    """The innermost cause's first line, without its full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _data_from(mirror: str | None, wanted: list[str]) -> Iterator[None]:
    """Let stock tasks find ``<owner>/<name>`` in the mirror: ``load_dataset`` takes an existing folder before it asks the hub.

    ``wanted`` collects the data sets asked for. The working directory of the whole process is the mirror meanwhile.
    """
    import datasets

    load_dataset = datasets.load_dataset
    if mirror is not None and not Path(mirror).is_dir():
        raise UserError(f"evaluation.mirror={mirror} is not a folder. It holds data sets as <owner>/<name>.")

    @functools.wraps(load_dataset)
    def watched(path: str, *args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("name")
        wanted.append(f"{path}, {config}" if config else str(path))
        if mirror is not None and not Path(path).is_dir():  # relative to the mirror
            raise FileNotFoundError(f"there is no folder {path}")
        if mirror is None and (path, config) in kick.HUB_SOURCES:
            return load_dataset(**kick.HUB_SOURCES[path, config])
        return load_dataset(path, *args, **kwargs)

    with contextlib.chdir(mirror or "."):
        datasets.load_dataset = watched
        try:
            yield
        finally:
            datasets.load_dataset = load_dataset


@contextlib.contextmanager
def _fresh_cache(mirror: str | None) -> Iterator[None]:
    """``datasets`` caches a local folder under its last name and would reuse it after the files changed."""
    import datasets

    if mirror is None:
        yield
        return
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="cospadi-datasets-", ignore_cleanup_errors=True) as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before


def _is_unexpected(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _EXPECTED_WARNINGS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No moving bars, no notes about what is done on purpose; other warnings stay."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    loggers = [logging.getLogger(name) for name in ("lm_eval.api.task", "lm_eval.models.huggingface")]
    bars = datasets.are_progress_bars_disabled()
    bar, environment = lm_eval.api.task.tqdm, lm_eval.evaluator.add_env_info
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
        lm_eval.api.task.tqdm, lm_eval.evaluator.add_env_info = bar, environment
        if pools is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pools
