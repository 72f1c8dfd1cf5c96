"""Stage of room 2: grams."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cospadi.calibration.collect import collect, samples
from cospadi.calibration.experts import routed_tokens
from cospadi.calibration.fisher import fisher_factors
from cospadi.calibration.fisher import tensors_of as tensors_of_fisher
from cospadi.calibration.statistics import statistics_file, tensors_of
from cospadi.errors import UserError
from cospadi.models import find_projections
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.progress import Progress
from cospadi.records import Record, file_hashes, new_path, read_json, text_hash, write_tensors
from cospadi.settings import Config


def calibrate(config: Config, model: Path, documents: Path, grams: Path, record: Path) -> None:
    """Room 2: tokens through the dense model, one gram per shared input, a file per layer."""
    calibration = config.calibration
    settings = {"model": asdict(config.model), "calibration": asdict(calibration)}
    log = Record("calibration", settings, file_hashes(documents) | weights_hash(model))
    longest = read_json(model / "config.json").get("max_position_embeddings")
    if longest and calibration.sample_length > longest:
        raise UserError(
            f"calibration.sample_length={calibration.sample_length} is longer than the model reads ({longest} tokens, "
            f"max_position_embeddings). Set it to {longest} or less."
        )
    tokens = samples(calibration, model, documents)
    n_layers = _n_layers(config, model)
    progress = Progress(n_layers, f"Calibration: {tokens.numel()} tokens through {config.model.title}")
    conditioning = {}
    of_experts = {}
    with new_path(grams) as partial:
        for layer, statistics in collect(model, config.model, calibration, tokens):
            for shared_input, of_input in statistics.items():
                diagonal = of_input.gram.diagonal()
                conditioning[f"{layer}.{shared_input}"] = float(diagonal.max() / diagonal.mean())
            of_experts |= {f"{layer}.{expert}": n for expert, n in routed_tokens(statistics).items()}
            write_tensors(statistics_file(partial, layer), tensors_of(statistics))
            progress.step(f"layer {layer}", f"{len(statistics)} grams")
    log.finish(
        record,
        n_tokens=tokens.numel(),
        token_hash=text_hash(str(tokens.tolist())),
        special_tokens="none added",
        peak_channel=conditioning,
        **({"tokens_of_experts": of_experts} if of_experts else {}),
    )


def fisher(config: Config, model: Path, documents: Path, factors: Path, record: Path) -> None:
    """Room 2: calibration tokens forward and back through the dense model -> what the loss cares about, a file per layer."""
    calibration = config.calibration
    settings = {"model": asdict(config.model), "calibration": asdict(calibration)}
    log = Record("fisher", settings, file_hashes(documents) | weights_hash(model))
    tokens = samples(calibration, model, documents, at_most=calibration.fisher.n_samples)
    n_layers = _n_layers(config, model)
    progress = Progress(n_layers, f"Fisher information: {tokens.numel()} tokens back through {config.model.title}")
    with new_path(factors) as partial:
        for layer, of_layer in fisher_factors(model, config.model, calibration, tokens):
            write_tensors(statistics_file(partial, layer), tensors_of_fisher(of_layer))
            progress.step(f"layer {layer}", f"{len(of_layer)} projections")
    log.finish(record, n_tokens=tokens.numel(), token_hash=text_hash(str(tokens.tolist())))


def _n_layers(config: Config, model: Path) -> int:
    return 1 + max(p.layer for p in find_projections(model, config.model))
