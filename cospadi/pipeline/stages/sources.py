"""Stages of room 1: models and texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cospadi.models import check_loadable
from cospadi.records import Record, read_json, text_hash, write_json
from cospadi.settings import Config
from cospadi.sources import checkpoints
from cospadi.sources.families import fitted
from cospadi.sources.settings import TextConfig
from cospadi.sources.texts import read_documents


def prepare_model(config: Config, folder: Path, record: Path) -> None:
    """Room 1: an address -> an ordinary checkpoint whose projections are known to be there."""
    log = Record("sources", asdict(config.model))
    print(f"Preparing {config.model.title} from {config.model.source}", flush=True)
    provenance = checkpoints.prepare_model(config.model, folder)
    model = fitted(config.model, provenance["model_type"])
    projections = check_loadable(folder, model)
    log.finish(record, provenance=provenance, projections=[asdict(p) for p in projections])


def prepare_text(config: TextConfig, documents: Path, record: Path) -> None:
    """Room 1: an address -> a list of plain documents."""
    log = Record("sources", asdict(config))
    print(f"Preparing {config.title} from {config.source}", flush=True)
    texts = read_documents(config)
    write_json(documents, texts)
    log.finish(
        record,
        n_documents=len(texts),
        n_words=sum(len(text.split()) for text in texts),
        text_hash=text_hash("\n\n".join(texts)),
    )


def weights_hash(model: Path) -> dict[str, str]:
    """Hash of the model's weights, as its preparation noted it."""
    noted = model.parent / "record.json"
    return {str(model): read_json(noted)["provenance"]["weights_sha256"]} if noted.is_file() else {}
