"""``cospadi evaluate``: what any folder or hub model is worth on any text, beside the dense model."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from cospadi import devices, models
from cospadi.checkpoint.read import load
from cospadi.checkpoint.transformers_plugin import METHOD
from cospadi.errors import UserError, require_extra
from cospadi.evaluation.perplexity import mean_stderr, measure_tokens, token_windows
from cospadi.evaluation.settings import EvaluationConfig
from cospadi.evaluation.task_names import check_tasks
from cospadi.kernels.precision import float32_products
from cospadi.pipeline.outcome import decoding_speed
from cospadi.records import read_json
from cospadi.settings import load as load_settings
from cospadi.settings import model_overrides
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.files import quantization_of, weight_files
from cospadi.sources.texts import read_documents

MOST_WINDOWS = 8
"""Windows that are measured unless ``evaluation.n_windows`` says so: those of the default study."""

Estimate = tuple[float, float | None]
"""A value and its standard error."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model."""

    name: str
    n_windows: int
    window: int
    """Tokens of a window."""
    token_perplexity: Estimate
    file_bytes: int
    """Bytes of the weight files."""
    tokens_per_second: float
    """Decoded one by one."""
    tasks: dict[str, tuple[str, Estimate]] = field(default_factory=dict)
    """Task -> metric, and its value."""
    kl_to_dense: Estimate | None = None
    """Nats per token; this and the following ``None`` where no dense model was named."""
    top1_agreement: Estimate | None = None
    """Fraction of tokens."""
    nll_over_dense: Estimate | None = None
    """Mean of the windows' differences: nats per token."""
    bits16_bytes: int | None = None
    """Bytes of the dense model's numbers in 16 bits."""


@dataclass(frozen=True)
class Report:
    """Measurements by one protocol."""

    text: str
    """Title of the text."""
    dtype: str
    device: str
    models: list[Measurement]
    """The dense model first, where it was named."""


@dataclass(frozen=True)
class _Protocol:
    """What is the same for both models."""

    config: EvaluationConfig
    documents: list[str]
    dtype: str
    device: torch.device
    is_quiet: bool


def evaluate(folder: str, dense: str | None, config: EvaluationConfig, dtype: str, quiet: bool = False) -> Report:
    """Measure a model, and the dense one before it where it is named.

    Args:
        folder: a compressed checkpoint, or any model: a folder, a hub id, a file of ``conf/model``.
        dense: the model that it is compared with, likewise.
        config: text, windows, tasks and device.
        dtype: in which both run, whatever they are stored in.
        quiet: print no progress.

    Raises:
        UserError: no model, text or task of that name, a text too short for one window, or models of other tokens.
    """
    if config.tasks:
        require_extra("study", "--tasks")  # before lm-eval is asked for its tasks
    check_tasks(config)
    device = devices.pick(config.device, "--device")
    protocol = _Protocol(config, read_documents(config.text), dtype, device, quiet)
    with tempfile.TemporaryDirectory(prefix="cospadi-") as work, float32_products(exact=True):
        measured = _both(protocol, folder, dense, Path(work)) if dense else [_alone(protocol, folder, Path(work))]
    return Report(config.text.title, dtype, str(device), measured)


def _alone(protocol: _Protocol, name: str, work: Path) -> Measurement:
    place, network = _opened(name, work / "model", protocol)
    windows = _windows(protocol, place, network)
    result = measure_tokens(network, windows, quiet=protocol.is_quiet)
    return _measurement(protocol, name, place, network, windows, result)


def _both(protocol: _Protocol, name: str, dense_name: str, work: Path) -> list[Measurement]:
    """The dense model, whose hidden states are kept in a file meanwhile, and the other one."""
    reference = work / "reference.safetensors"
    if _is_compressed(Path(dense_name).expanduser()):
        raise UserError(f"--dense {dense_name} is a compressed model. Name the one that it was made from.")
    place, network = _opened(dense_name, work / "dense", protocol)
    windows = _windows(protocol, place, network)
    dense_result = measure_tokens(network, windows, write_reference=reference, quiet=protocol.is_quiet)
    bits16_bytes = sum(2 * parameter.numel() for parameter in network.parameters())
    dense = _measurement(protocol, dense_name, place, network, windows, dense_result)
    del network  # before the other is loaded

    place, network = _opened(name, work / "model", protocol)
    windows = _windows(protocol, place, network)  # by its own tokenizer: the reference says where they are not the same
    result = measure_tokens(network, windows, reference=reference, quiet=protocol.is_quiet)
    ours = _measurement(protocol, name, place, network, windows, result)
    ours = replace(
        ours,
        kl_to_dense=_estimate(result["kl_to_dense"]),
        top1_agreement=_estimate(result["top1_agreement"]),
        nll_over_dense=_over(result, dense_result),
    )
    return [replace(each, bits16_bytes=bits16_bytes) for each in (dense, ours)]


def _measurement(
    protocol: _Protocol,
    name: str,
    place: Path,
    network: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    result: dict[str, Any],
) -> Measurement:
    """What needs no other model."""
    return Measurement(
        name=name,
        n_windows=windows.shape[0],
        window=windows.shape[1],
        token_perplexity=_estimate(result["token_perplexity"]),
        file_bytes=sum(file.stat().st_size for file in weight_files(place)),
        tokens_per_second=decoding_speed(network),
        tasks=_task_values(protocol, place, network),
    )


def _opened(name: str, work: Path, protocol: _Protocol) -> tuple[Path, PreTrainedModel]:
    """Where the files of a model are, and the model in evaluation mode."""
    folder = Path(name).expanduser()
    if _is_compressed(folder):
        return folder, load(folder, protocol.dtype).to(protocol.device)
    prepare_model(load_settings(model_overrides(name)).model, work)
    return work, models.load(work, protocol.dtype, protocol.device)


def _is_compressed(folder: Path) -> bool:
    settings = folder / "config.json"
    if not settings.is_file():
        return False
    try:
        return quantization_of(read_json(settings)).get("quant_method") == METHOD
    except json.JSONDecodeError:
        return False  # whoever loads it says so


def _windows(protocol: _Protocol, place: Path, network: PreTrainedModel) -> Int[Tensor, "windows window"]:
    """Token windows of the text: as many as the settings say, or `MOST_WINDOWS` where the text has room for them.

    Raises:
        UserError: the text is too short.
    """
    n_windows = protocol.config.n_windows
    tokenizer = models.load_tokenizer(place)
    window = min(protocol.config.window, _positions(network))
    windows = token_windows(tokenizer, protocol.documents, window, n_windows)
    return windows[: n_windows or MOST_WINDOWS]


def _positions(network: PreTrainedModel) -> int:
    """Tokens that the model was made for."""
    return getattr(network.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _estimate(metric: dict[str, Any]) -> Estimate:
    return metric["value"], metric["stderr"]


def _over(result: dict[str, Any], dense: dict[str, Any]) -> Estimate:
    """Negative log-likelihood over that of the dense model, window by window."""
    per_window = zip(result["token_perplexity"]["per_window"], dense["token_perplexity"]["per_window"], strict=True)
    return mean_stderr(torch.tensor([ours - theirs for ours, theirs in per_window], dtype=torch.float64))


def _task_values(protocol: _Protocol, place: Path, network: PreTrainedModel) -> dict[str, tuple[str, Estimate]]:
    if not protocol.config.tasks:
        return {}
    from cospadi.evaluation.tasks import prepared_tasks  # lm-eval is an extra

    longest = min(protocol.config.max_length, _positions(network))
    stock_alone = replace(protocol.config, embedded_tasks=[], max_length=longest)
    with prepared_tasks(network, models.load_tokenizer(place), protocol.documents, stock_alone) as run_tasks:
        entries, _ = run_tasks()
    return {name: (entry["metric"], (entry["value"], entry["stderr"])) for name, entry in entries.items()}


def report_text(report: Report) -> str:
    """A Markdown table: a row per metric, a column per model."""
    rows = [("", [each.name for each in report.models])]
    rows += [("Token perplexity", [_printed(each.token_perplexity, "{:.2f}") for each in report.models])]
    if any(each.kl_to_dense for each in report.models):
        rows += [
            ("Nats a token over dense", [_printed(each.nll_over_dense, "{:+.4f}") for each in report.models]),
            ("KL to dense, nats a token", [_printed(each.kl_to_dense, "{:.4f}") for each in report.models]),
            ("Same first choice as dense", [_printed(each.top1_agreement, "{:.1%}") for each in report.models]),
        ]
    for task in report.models[0].tasks:
        metric = report.models[0].tasks[task][0]
        rows += [(f"{task} ({metric})", [_printed(each.tasks[task][1], "{:.4f}") for each in report.models])]
    rows += [("Weight files, MB", [f"{each.file_bytes / 1e6:.1f}" for each in report.models])]
    if report.models[0].bits16_bytes:
        shares = [f"{each.file_bytes / each.bits16_bytes:.1%}" for each in report.models]
        rows += [("Of the dense model in 16 bits", shares)]
    speeds = [f"{each.tokens_per_second:.1f}" for each in report.models]
    rows += [(f"Tokens/s, {report.dtype} on {report.device}", speeds)]
    lines = [f"| {label} | " + " | ".join(values) + " |" for label, values in rows]
    lines.insert(1, "| :-- |" + " --: |" * len(report.models))
    first = report.models[0]
    how = f"{first.n_windows} × {first.window} tokens of {report.text}; ± standard error over these windows."
    return "\n".join([*lines, "", how])


def _printed(estimate: Estimate | None, form: str) -> str:
    """A value and its standard error in the digits of ``form``."""
    if estimate is None or estimate[0] is None:
        return "–"
    value, stderr = estimate
    error = "" if stderr is None else " ± " + form.replace("+", "").format(stderr)
    return form.format(value) + error
