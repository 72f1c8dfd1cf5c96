"""``cospadi bench inference``: bytes and tokens per second of compressed models, beside the dense one in the same run.

Models take turns, round after round, so that whatever else the machine does falls on all of them alike; a figure is the
median over the rounds, and a ratio compares within the run.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from cospadi import devices
from cospadi.bench.cases import SHAPES, atoms_and_sparsity
from cospadi.bench.render import seconds, table
from cospadi.bench.usage import machine
from cospadi.checkpoint.layers import LowRankLinear, SparseDictionaryLinear
from cospadi.checkpoint.ledger import ledger
from cospadi.checkpoint.read import load
from cospadi.devices import synchronize
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.progress import Progress
from cospadi.records import read_json, write_json, write_text
from cospadi.sources.architecture import auto_class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Row = dict[str, Any]
PROMPT = 16
"""Tokens before the first decoded one."""
DENSE = "dense"


def run(options: argparse.Namespace) -> None:
    """Measure what the options of `cospadi.bench.arguments` ask for, and report.

    Raises:
        UserError: an option or a checkpoint is invalid.
    """
    for name in ("prefill", "tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is too small. Set 1 or more.")
    device = devices.pick(options.device, "--device")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.shape:
        rows = _stacks(options, device, dtype)
        report = _stack_report(options, rows, device)
    else:
        if not options.dense or not options.checkpoints:
            raise UserError(
                "bench inference compares: name checkpoints and --dense FOLDER, or take --shape smollm2-135m."
            )
        rows = _models(options, device, dtype)
        report = _model_report(options, rows, device)
    print(report, end="")
    if options.json:
        write_json(options.json, rows)
    if options.markdown:
        write_text(options.markdown, report)


# --- whole models


def _models(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    named = [folder.name for folder in options.checkpoints]
    folders = {DENSE: options.dense}
    for folder in options.checkpoints:
        unique = named.count(folder.name) == 1 and folder.name != DENSE
        folders[folder.name if unique else str(folder)] = folder
    rows = {}
    for name, folder in folders.items():
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        memory = _apart(_resident, folder, options.dtype, str(device), torch.get_num_threads())
        removed = 0.0 if name == DENSE else ledger(folder)["removed"]
        rows[name] = {"model": name, "file_bytes": files, "removed": removed, **memory}
    networks = {name: _opened(folder, dtype).to(device) for name, folder in folders.items()}
    jobs: dict[str, Callable[[PreTrainedModel], float]] = {
        "prefill": lambda m: _prefill(m, options.prefill, device),
        "decode_1": lambda m: _decode(m, 1, options.tokens, device),
        "decode_16": lambda m: _decode(m, 16, options.tokens, device),
    }
    _add_speeds(rows, networks, jobs, options.rounds)
    return list(rows.values())


def _opened(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A dense or a compressed model.

    Raises:
        UserError: when it is neither.
    """
    try:
        compressed = "quantization_config" in read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no readable config.json, so it is not a checkpoint. Correct the path."
        ) from error
    if compressed:
        return load(folder, dtype)
    return auto_class_of(folder).from_pretrained(folder, dtype=dtype).eval()


def _apart(work: Callable[..., Row], *arguments: Any) -> Row:
    """``work`` in a process of its own, whose memory is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _resident(folder: Path, dtype: str, device: str, threads: int) -> Row:
    """Bytes of the model's tensors, and those that the process gives back when the model is dropped after decoding."""
    torch.set_num_threads(threads)
    network = _opened(Path(folder), getattr(torch, dtype)).to(device)
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()]}
    _prefill(network, 32, torch.device(device))
    _decode(network, 1, 4, torch.device(device))
    with_model = psutil.Process().memory_info().rss
    del network
    gc.collect()
    freed = with_model - psutil.Process().memory_info().rss
    return {"tensor_bytes": sum(tensors.values()), "resident_bytes": freed}


@torch.inference_mode()
def _prefill(network: PreTrainedModel, length: int, device: torch.device) -> float:
    """Tokens per second of one sequence read at once."""
    ids = _tokens(network, 1, length, device)
    synchronize(device)
    started = time.perf_counter()
    network(input_ids=ids, use_cache=True, logits_to_keep=1)
    synchronize(device)
    return length / (time.perf_counter() - started)


@torch.inference_mode()
def _decode(network: PreTrainedModel, batch: int, length: int, device: torch.device) -> float:
    """Tokens per second, all sequences of the batch together, of greedy decoding with a cache."""
    out = network(input_ids=_tokens(network, batch, PROMPT, device), use_cache=True, logits_to_keep=1)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(length):
        newest = out.logits[:, -1:].argmax(dim=-1)
        out = network(input_ids=newest, past_key_values=out.past_key_values, use_cache=True)
    synchronize(device)
    return batch * length / (time.perf_counter() - started)


def _tokens(network: PreTrainedModel, batch: int, length: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, network.config.vocab_size, (batch, length), generator=draw).to(device)


def _model_report(options: argparse.Namespace, rows: Sequence[Row], device: torch.device) -> str:
    header = ["Model", "Removed", "Weights on disk, MB", "Tensors, MB", "Resident, MB"]
    header += [
        f"Prefill {options.prefill}, tok/s",
        "× dense",
        "Decode 1, tok/s",
        "× dense",
        "Decode 16, tok/s",
        "× dense",
    ]
    lines = [
        [
            row["model"],
            f"{row['removed']:.1%}",
            *(f"{row[key] / 1e6:.1f}" for key in ("file_bytes", "tensor_bytes", "resident_bytes")),
            *(
                cell
                for job in ("prefill", "decode_1", "decode_16")
                for cell in (f"{row[f'{job}_tokens_per_s']:.1f}", f"{row[f'{job}_to_dense']:.2f}")
            ),
        ]
        for row in rows
    ]
    return (
        f"Inference, {machine(device)}, {options.dtype}, median of {options.rounds} rounds\n\n"
        + table(header, lines, left=(0,))
        + "\nRemoved: of the projections' 16-bit bytes. Resident: what a process of its own gave back when the model was "
        "dropped after decoding. × dense: speed over that of the dense model in this run.\n"
    )


# --- stacks of projections, without a model


def _stacks(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Every projection of a model's shape, random: only sizes matter for speed."""
    if options.shape not in SHAPES:
        raise UserError(f"--shape {options.shape} does not exist. Choose from {', '.join(SHAPES)}.")
    try:
        ratios = [float(ratio) for ratio in options.ratios.split(",")]
    except ValueError as error:
        raise UserError(f"--ratios {options.ratios} is not a list of numbers. Write 0.2,0.3.") from error
    kinds = [(DENSE, 0.0)] + [(kind, ratio) for ratio in ratios for kind in ("svd_llm", "cospadi")]
    rows = {kind: {"model": kind[0], "ratio": kind[1]} for kind in kinds}
    stacks = {kind: _stack(options.shape, *kind, options.rho, device, dtype) for kind in kinds}
    for kind, stack in stacks.items():
        held = (t.numel() * t.element_size() for layer in stack for t in [*layer.parameters(), *layer.buffers()])
        rows[kind]["tensor_bytes"] = sum(held)
    jobs = {
        "decode_1": lambda stack: _pass_rate(stack, 1, device, dtype),
        "decode_16": lambda stack: _pass_rate(stack, 16, device, dtype),
        "prefill": lambda stack: _pass_rate(stack, options.prefill, device, dtype),
    }
    _add_speeds(rows, stacks, jobs, options.rounds)
    for row in rows.values():
        row["decode_1_gb_per_s"] = row["tensor_bytes"] * row["decode_1_tokens_per_s"] / 1e9
    return list(rows.values())


def _stack(
    shape: str, kind: str, ratio: float, rho: float, device: torch.device, dtype: torch.dtype
) -> list[nn.Module]:
    layers = []
    for (d_in, d_out), count in SHAPES[shape].sizes.items():
        for seed in range(count):
            layers.append(_layer(kind, d_in, d_out, ratio, rho, dtype, seed).to(device))
    return layers


def _layer(kind: str, d_in: int, d_out: int, ratio: float, rho: float, dtype: torch.dtype, seed: int) -> nn.Module:
    storage = "bfloat16" if dtype == torch.bfloat16 else "float16"
    """A layer with random factors of the right sizes and storage dtype."""
    draw = torch.Generator().manual_seed(seed)
    if kind == DENSE:
        dense = nn.Linear(d_in, d_out, bias=False, device="meta").to_empty(device="cpu").to(dtype)
        dense.weight.data.normal_(std=d_in**-0.5, generator=draw)
        return dense.requires_grad_(False)
    if kind == "svd_llm":
        layer: nn.Module = LowRankLinear(d_in, d_out, budget.rank(d_in, d_out, ratio), storage)
        for factor in layer.parameters():
            factor.data.normal_(std=factor.shape[0] ** -0.5, generator=draw)
        return layer
    atoms, sparsity = atoms_and_sparsity(d_in, d_out, ratio, rho)
    layer = SparseDictionaryLinear(d_in, d_out, atoms, sparsity * d_out, storage)
    layer.dictionary.data.normal_(std=d_in**-0.5, generator=draw)
    layer.values.normal_(std=sparsity**-0.5, generator=draw)
    chosen = torch.rand(d_out, atoms, generator=draw).argsort(dim=1)[:, :sparsity]
    bits = torch.zeros(d_out, atoms, dtype=torch.uint8).scatter_(1, chosen, 1).flatten()
    bits = nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    layer.mask.copy_((bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8))
    return layer


@torch.inference_mode()
def _pass_rate(stack: Sequence[nn.Module], rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Tokens per second through all layers, one after the other; on a GPU as one CUDA graph, as servers do."""
    inputs = {layer.in_features: torch.randn(rows, layer.in_features, device=device, dtype=dtype) for layer in stack}

    def through() -> None:
        for layer in stack:
            layer(inputs[layer.in_features])

    through()  # compile, derive, warm up
    with _replayed(through, device) as once:
        synchronize(device)
        started = time.perf_counter()
        passes = 0
        while passes < 3 or time.perf_counter() - started < 0.5:
            once()
            synchronize(device)
            passes += 1
        return rows * passes / (time.perf_counter() - started)


@contextmanager
def _replayed(work: Callable[[], None], device: torch.device) -> Iterator[Callable[[], None]]:
    if device.type != "cuda":
        yield work
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    yield graph.replay


def _stack_report(options: argparse.Namespace, rows: Sequence[Row], device: torch.device) -> str:
    header = ["Method", "Ratio", "Tensors, MB", "Decode 1, tok/s", "× dense", "GB/s", "Decode 16, tok/s", "× dense"]
    header += [f"Prefill {options.prefill}, tok/s", "× dense"]
    lines = [
        [
            *(row["model"], f"{row['ratio']:g}", f"{row['tensor_bytes'] / 1e6:.1f}"),
            *(
                seconds(row["decode_1_tokens_per_s"]),
                f"{row['decode_1_to_dense']:.2f}",
                f"{row['decode_1_gb_per_s']:.1f}",
            ),
            *(seconds(row["decode_16_tokens_per_s"]), f"{row['decode_16_to_dense']:.2f}"),
            *(seconds(row["prefill_tokens_per_s"]), f"{row['prefill_to_dense']:.2f}"),
        ]
        for row in rows
    ]
    return (
        f"All projections of {options.shape}, {machine(device)}, {options.dtype}, median of {options.rounds} rounds\n\n"
        + table(header, lines, left=(0,))
        + "\nRandom factors of the right sizes, one layer after the other; attention, norms and head are not in it. GB/s: bytes "
        "of the layers' tensors read per second in decoding.\n"
    )


def _add_speeds(
    rows: dict[Any, Row], models: dict[Any, Any], jobs: dict[str, Callable[[Any], float]], rounds: int
) -> None:
    """Tokens per second of every job into the row of every model, and what they are of the first one's, the dense."""
    for (name, job), value in _in_turn(models, jobs, rounds).items():
        rows[name][f"{job}_tokens_per_s"] = value
    dense = next(iter(rows.values()))
    for row in rows.values():
        for job in jobs:
            row[f"{job}_to_dense"] = row[f"{job}_tokens_per_s"] / dense[f"{job}_tokens_per_s"]


def _in_turn(models: dict[Any, Any], jobs: dict[str, Callable[[Any], float]], rounds: int) -> dict[Any, float]:
    """Median of every job for every model, all models in turn in each round; the first round only warms up."""
    progress = Progress((1 + rounds) * len(models) * len(jobs), "bench inference")
    rates: dict[Any, list[float]] = {(name, job): [] for name in models for job in jobs}
    for number in range(1 + rounds):
        for job, measure in jobs.items():
            for name, model in models.items():
                rate = measure(model)
                if number:
                    rates[name, job].append(rate)
                label = name if isinstance(name, str) else " ".join(map(str, name))
                progress.step(f"{label}, {job}", f"{rate:.1f} tok/s")
    return {key: median(several) for key, several in rates.items()}
