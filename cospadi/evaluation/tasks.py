"""Tasks of lm-evaluation-harness: stock ones, unmodified, those of ``kick``, and two of our own over the held-out text.

This module and ``harness`` import ``lm_eval``; names are checked without it, in ``task_names``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from torch import nn

from cospadi.errors import UserError
from cospadi.evaluation import kick
from cospadi.evaluation.harness import ACCURACIES, first_line, harness_model, quiet, run_harness, task_name
from cospadi.evaluation.heldout import cloze_passages, perplexity_documents
from cospadi.evaluation.settings import EMBEDDED_TASKS, EvaluationConfig
from cospadi.evaluation.task_names import check_tasks, stock_manager, stock_tasks
from cospadi.sources.addresses import http_errors

_EMBEDDED_VERSION = 1


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
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has neither a BOS nor an EOS token, and lm-eval starts a text from one of them. Set eos_token in "
            "tokenizer_config.json, or leave out all tasks: evaluation.tasks=[] evaluation.embedded_tasks=[]."
        )
    with quiet(), _fresh_cache(config.mirror):
        loaded = {name: embedded_task(name, documents, config) for name in config.embedded_tasks}
        for name in config.tasks:
            try:
                loaded |= {task_name(task): task for task in load_stock(name, config.mirror)}
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
    language_model = harness_model(model, tokenizer, config)
    for name, task in loaded.items():
        if isinstance(task, MissingData):
            entries[name] = _left_out(task)
            continue
        entries[name], rows = run_harness(
            language_model, name, task, None if name in EMBEDDED_TASKS else config.limit, config
        )
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
    named = ", ".join(f"{name} ({entries[name]['metric']})" for name in names)
    own = "; no stock accuracy task was configured" if all(name in EMBEDDED_TASKS for name in names) else ""
    missing = [name for name, entry in entries.items() if entry["value"] is None]
    own += f"; without {', '.join(missing)}, whose data was not there" if missing else ""
    return {
        "value": sum(entries[name]["value"] for name in names) / len(names),
        "stderr": None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(names),
        "tasks": names,
        "protocol": f"mean of {named}: acc_norm where lm-eval has it, else acc; stderr of independent tasks{own}",
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
    files: list[str] = []
    try:
        with _data_from(mirror, files):
            if name in stock_tasks():
                built = TaskManager(include_defaults=False).load([str(stock_tasks()[name])])
            else:
                built = stock_manager().load([name])
    except ImportError as error:
        raise UserError(f"The task {name} needs a package that is not installed ({first_line(error)}).") from error
    except (OSError, ValueError, DatasetsError, *http_errors()) as error:
        if not files:
            raise  # not about data
        place = f"in evaluation.mirror={mirror}" if mirror else "on the hub or in its cache"
        mend = (
            "Put the data set there"
            if mirror
            else "Connect to the hub, or set evaluation.mirror to a folder that holds it"
        )
        raise MissingData(
            f"The data of task {name} ({files[-1]}) was not found {place}: {first_line(error)}. "
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


@contextlib.contextmanager
def _data_from(mirror: str | None, files: list[str]) -> Iterator[None]:
    """Let stock tasks find ``<owner>/<name>`` in the mirror: ``load_dataset`` takes an existing folder before it asks the hub.

    ``wanted`` collects the data sets asked for. The working directory of the whole process is the mirror meanwhile.
    """
    load_dataset = datasets.load_dataset
    if mirror is not None and not Path(mirror).is_dir():
        raise UserError(f"evaluation.mirror={mirror} is not a folder. It holds data sets as <owner>/<name>.")

    @functools.wraps(load_dataset)
    def watched(path: str, *args: Any, **kwargs: Any) -> Any:
        config = args[0] if args else kwargs.get("name")
        files.append(f"{path}, {config}" if config else str(path))
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
