"""Stage of room 6: the dense model, or a compressed one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cospadi import devices, models
from cospadi.evaluation import measure
from cospadi.factorization.files import read_factors
from cospadi.kernels.precision import float32_products
from cospadi.pipeline.stages.sources import weights_hash
from cospadi.records import Record, file_hashes, new_path, read_json
from cospadi.settings import Config


def evaluate(
    config: Config,
    model: Path,
    documents: Path,
    factors: Sequence[Path],
    reference: Path,
    record: Path,
    samples: Path,
    second_text: Sequence[Path] = (),
) -> None:
    """Room 6: the dense model (no factors; writes the reference) or a compressed one (compared with it)."""
    settings = {"model": asdict(config.model), "evaluation": asdict(config.evaluation)}
    if factors:
        settings["factorization"] = asdict(config.factorization)
    compared_with = [reference] if factors else []
    log = Record(
        "evaluation", settings, file_hashes(documents, *second_text, *factors, *compared_with) | weights_hash(model)
    )
    device = devices.pick(config.evaluation.device, "evaluation.device")
    network = models.load(model, config.model.dtype, device)
    models.replace_weights(network, ((name, f.weight()) for name, f in read_factors(factors)))
    with float32_products(exact=True):
        result, rows = measure.evaluate(
            network,
            models.load_tokenizer(model),
            read_json(documents),
            config.evaluation,
            reference=reference if factors else None,
            write_reference=None if factors else reference,
            second_documents=[document for file in second_text for document in read_json(file)],
        )
    with new_path(samples) as partial:
        partial.mkdir()
        for task, documents_rows in rows.items():
            lines = [json.dumps(row, default=str) for row in documents_rows]
            (partial / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    log.finish(record, **result)
