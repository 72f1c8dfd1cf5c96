"""What every stage depends on: its recipe is compared with the one it ran with, and a difference runs it again.

Snakemake compares recipes for a study, `cospadi.pipeline.chain` for one model. Titles are in none of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from cospadi.factorization.settings import OUTPUT, UNIFORM, FactorizationConfig
from cospadi.settings import Config
from cospadi.sources.addresses import state_on_disk
from cospadi.sources.settings import TextConfig


def of_text(text: TextConfig) -> str:
    """Settings of a text, and its files where they are on this disk."""
    return canonical([without(asdict(text), "title"), state_on_disk(text.source)])


def of_stage(stage: str, config: Config) -> str:
    """Settings that ``stage`` of one cell depends on. What its inputs depend on is not repeated."""
    sections = {
        "model": lambda: [without(asdict(config.model), "title"), state_on_disk(config.model.source)],
        "calibration": lambda: without(asdict(config.calibration), "text", "damping", "fisher"),
        "fisher": lambda: [of_stage("calibration", config), without(asdict(config.calibration.fisher), "blend")],
        "sensitivity": lambda: _sensitivity(config.factorization),
        "losses": lambda: [without(_factorization(config.factorization), "compression_ratio"), *_metric(config)],
        "factorization": lambda: [_factorization(config.factorization), *_metric(config)],
        "quantization": lambda: [without(asdict(config.quantization), "title"), *_metric(config)],
        "evaluation": lambda: without(asdict(config.evaluation), "text", "second_text"),
    }
    return canonical(sections[stage]())


def without(settings: dict[str, object], *names: str) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in names}


def canonical(settings: object) -> str:
    return json.dumps(settings, sort_keys=True)


def _sensitivity(factorization: FactorizationConfig) -> dict[str, object]:
    """What a rank search's measurements depend on: not on the target it is later asked to meet."""
    settings = without(asdict(factorization), "title", "compression_ratio")
    return settings | {"rank_search": without(settings["rank_search"] or {}, "perplexity_budget")}


LATER = {"objective": OUTPUT, "allocation": UNIFORM}
"""Settings that came after the first studies, and the value that says what was done before: at it, they are left out."""


def _factorization(factorization: FactorizationConfig) -> dict[str, object]:
    settings = without(asdict(factorization), "title")
    return {name: value for name, value in settings.items() if name not in LATER or LATER[name] != value}


def _metric(config: Config) -> list[dict[str, float]]:
    """What a whitener is made with, beside its gram."""
    damping = {"damping": config.calibration.damping}
    return [damping, {"blend": config.calibration.fisher.blend}] if config.factorization.needs_fisher else [damping]
