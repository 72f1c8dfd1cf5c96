"""How much each projection may lose: ASVD's sensitivity-based truncation rank search (arXiv:2312.05821, section 3.3).

Every projection is truncated alone at every ratio and the calibration perplexity is noted. All (projection, ratio) pairs
that cost at most some perplexity are accepted, each projection takes its smallest accepted ratio, and the threshold is
the lowest that meets the target: a number of bits, or the highest that keeps a perplexity budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cospadi import devices, models
from cospadi.calibration.collect import samples
from cospadi.calibration.statistics import read_statistics
from cospadi.errors import UserError
from cospadi.evaluation.perplexity import measure_tokens
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.rank_search import bits_of, fewest_that_fit, smallest_accepted, sortable, truncated_rank
from cospadi.factorization.settings import ASVDConfig, RankSearchConfig
from cospadi.models import Projection
from cospadi.pipeline import recipes
from cospadi.progress import Progress
from cospadi.records import FinishedRows, Record, file_hashes, key_of, read_json
from cospadi.settings import Config
from cospadi.sources.addresses import state_on_disk


def perplexities_alone(
    config: Config,
    folder: Path,
    grams: Path,
    tokens: Int[Tensor, "n_samples sample_length"],
    finished: FinishedRows,
) -> dict[str, Any]:
    """Calibration perplexity with one projection truncated at a time: ``{projection: {kept: perplexity}}``."""
    ratios = sorted(_search(config).truncation_ratios, reverse=True)
    projections = models.find_projections(folder, config.model)
    model = models.load(folder, config.model.dtype, devices.pick(config.calibration.device, "calibration.device"))
    progress = Progress(len(projections), f"Sensitivity of {len(projections)} projections at {len(ratios)} ratios each")
    dense = _perplexity(model, tokens)
    table: dict[str, dict[str, float]] = {}
    for projection in projections:
        row = finished.get(projection.name)
        if row is None:
            row = {}
            for kept in ratios:
                with _truncated(model, config, folder, grams, [projection], {projection.name: kept}):
                    row[f"{kept:g}"] = _perplexity(model, tokens)
            finished.keep(projection.name, row)
        table[projection.name] = row
        progress.step(projection.name)
    return {"dense_perplexity": dense, "perplexities": table}


def chosen_ranks(
    config: Config, folder: Path, documents: Path, grams: Path, sensitivity: Mapping[str, Any]
) -> dict[str, Any]:
    """Ranks (``None``: stays dense) of every projection that meet the ratio or the perplexity budget.

    Raises:
        UserError: when even the harshest choice does not meet the target.
    """
    projections = models.find_projections(folder, config.model)
    pairs = sorted(
        (sortable(float(perplexity)), name, float(kept))
        for name, row in sensitivity["perplexities"].items()
        for kept, perplexity in row.items()
    )
    if _search(config).perplexity_budget is None:
        accepted = fewest_that_fit(projections, pairs, config.factorization.compression_ratio)
    else:
        accepted = _most_within_perplexity(config, folder, documents, grams, projections, pairs)
    kept = smallest_accepted(pairs[:accepted])
    ranks = {p.name: truncated_rank(p, kept[p.name]) if p.name in kept else None for p in projections}
    return {
        "ranks": ranks,
        "threshold_perplexity": pairs[accepted - 1][0] if accepted else None,
        "stored_bits": bits_of(projections, kept),
    }


def _most_within_perplexity(
    config: Config,
    folder: Path,
    documents: Path,
    grams: Path,
    projections: Sequence[Projection],
    pairs: Sequence[tuple[float, str, float]],
) -> int:
    """Bisect for the largest count whose joint perplexity on the calibration tokens stays within the budget."""
    search = _search(config)
    calibration = config.calibration
    tokens = samples(calibration, folder, documents, at_most=search.n_samples)
    model = models.load(folder, config.model.dtype, devices.pick(calibration.device, "calibration.device"))
    low = 0
    high = len(pairs)
    while low < high:
        middle = (low + high + 1) // 2
        kept = smallest_accepted(pairs[:middle])
        with _truncated(model, config, folder, grams, [p for p in projections if p.name in kept], kept):
            measured = _perplexity(model, tokens)
        print(f"accepting {middle} of {len(pairs)} truncations: perplexity {measured:.2f}", flush=True)
        if measured <= search.perplexity_budget:
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise UserError(
            f"No truncation keeps the calibration perplexity within factorization.rank_search.perplexity_budget="
            f"{search.perplexity_budget:g}. Raise the budget, or add milder truncation_ratios."
        )
    return low


@contextmanager
def _truncated(
    model: nn.Module,
    config: Config,
    folder: Path,
    grams: Path,
    projections: Sequence[Projection],
    kept: Mapping[str, float],
) -> Iterator[None]:
    """The model with some projections truncated, and as it was afterwards."""
    checkpoint = models.Checkpoint(folder)
    plain = replace(config.factorization, rank_search=None)
    truncated = []
    for p in projections:
        weight = checkpoint.weight(p)
        absolute_mean = read_statistics(grams, p.layer, p.shared_input, weight.device)[1]
        identity = torch.eye(p.d_in, dtype=torch.float64)  # asvd needs no whitener
        problem = Problem(weight, identity, absolute_mean, truncated_rank(p, kept[p.name]))
        truncated.append((p.name, factorize(plain, problem).weight()))
    try:
        models.replace_weights(model, truncated)
        yield
    finally:
        models.replace_weights(model, ((p.name, checkpoint.weight(p)) for p in projections))


def _perplexity(model: nn.Module, tokens: Int[Tensor, "n_samples sample_length"]) -> float:
    return float(measure_tokens(model, tokens, quiet=True)["token_perplexity"]["value"])


def _search(config: Config) -> RankSearchConfig:
    if not isinstance(config.factorization, ASVDConfig) or config.factorization.rank_search is None:
        raise UserError("factorization.rank_search is not set: there is nothing to search.")
    return config.factorization.rank_search


def search_ranks(config: Config, model: Path, documents: Path, grams: Path, sensitivity: Path) -> None:
    """Room 3, asvd only: how much perplexity each projection costs when truncated alone."""
    search = _search(config)
    calibration = config.calibration
    log = Record("factorization", {"factorization": asdict(config.factorization), "damping": calibration.damping})
    tokens = samples(calibration, model, documents, at_most=search.n_samples)
    state = [file_hashes(documents), state_on_disk(str(grams)), state_on_disk(str(model))]
    finished = FinishedRows(sensitivity, key_of(recipes.of_stage("sensitivity", config), asdict(calibration), *state))
    perplexities = perplexities_alone(config, model, grams, tokens, finished)
    log.finish(sensitivity, n_tokens=tokens.numel(), **perplexities)
    finished.remove()


def choose_ranks(config: Config, model: Path, documents: Path, grams: Path, sensitivity: Path, ranks: Path) -> None:
    """Room 3, asvd only: the ranks that meet the ratio, or the perplexity budget."""
    log = Record("factorization", {"factorization": asdict(config.factorization)}, file_hashes(sensitivity))
    log.finish(ranks, **chosen_ranks(config, model, documents, grams, read_json(sensitivity)))
