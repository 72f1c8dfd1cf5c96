"""Stages of the pipeline: what the rules of a study run, a job each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cospadi.cli.command import STAGES, Command, overrides_and, stage
from cospadi.errors import UserError


def _config(overrides: Sequence[str]):
    from cospadi.settings import load

    return load(overrides)


def _prepare_model(o: argparse.Namespace) -> None:
    stage("sources").prepare_model(_config(o.overrides), o.folder, o.record)


def _prepare_text(o: argparse.Namespace) -> None:
    text, overrides = _named_text(o.overrides)
    config = _config(overrides)
    texts = {t.name: t for t in (config.calibration.text, *config.evaluation.texts)}
    if text not in texts:
        raise UserError(f"text={text} is neither the calibration's nor the evaluation's text: {', '.join(texts)}.")
    stage("sources").prepare_text(texts[text], o.documents, o.record)


def _named_text(overrides: Sequence[str]) -> tuple[str, list[str]]:
    names = [o.removeprefix("text=") for o in overrides if o.startswith("text=")]
    if len(names) != 1:
        raise UserError("prepare-text needs text=<name>, the name of a file in conf/text.")
    return names[0], [o for o in overrides if not o.startswith("text=")]


def _calibrate(o: argparse.Namespace) -> None:
    stage("calibration").calibrate(_config(o.overrides), o.model, o.documents, o.grams, o.record)


def _fisher(o: argparse.Namespace) -> None:
    stage("calibration").fisher(_config(o.overrides), o.model, o.documents, o.factors, o.record)


def _expect_losses(o: argparse.Namespace) -> None:
    stage("allocation").expect_losses(_config(o.overrides), o.model, o.grams, o.fisher, o.losses)


def _choose_ratios(o: argparse.Namespace) -> None:
    stage("allocation").choose_ratios(_config(o.overrides), o.losses, o.ratios)


def _search_ranks(o: argparse.Namespace) -> None:
    stage("rank_search").search_ranks(_config(o.overrides), o.model, o.documents, o.grams, o.sensitivity)


def _choose_ranks(o: argparse.Namespace) -> None:
    stage("rank_search").choose_ranks(_config(o.overrides), o.model, o.documents, o.grams, o.sensitivity, o.ranks)


def _factorize(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    stage("factorization").factorize(
        config, o.model, o.grams, o.layers, o.factors, o.record, o.ranks, o.fisher, o.ratios
    )


def _quantize(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    stage("quantization").quantize(
        config, o.model, o.grams, o.factors, o.factorization, o.quantized, o.record, o.fisher
    )


def _evaluate_cell(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    stage("evaluation").evaluate(
        config, o.model, o.documents, o.factors_files, o.reference, o.record, o.samples, o.second_text_files
    )


COMMANDS = (
    Command(
        "prepare-model",
        _prepare_model,
        "fetch a model",
        STAGES,
        overrides_and(folder="checkpoint to write", record="record to write"),
    ),
    Command(
        "prepare-text",
        _prepare_text,
        "fetch a text",
        STAGES,
        overrides_and(documents="JSON list to write", record="record to write"),
    ),
    Command(
        "calibrate",
        _calibrate,
        "collect one gram per shared input",
        STAGES,
        overrides_and(
            model="checkpoint", documents="calibration text", grams="folder to write", record="record to write"
        ),
    ),
    Command(
        "fisher",
        _fisher,
        "what the loss cares about: calibration tokens forward and back",
        STAGES,
        overrides_and(
            model="checkpoint", documents="calibration text", factors="folder to write", record="record to write"
        ),
    ),
    Command(
        "expect-losses",
        _expect_losses,
        "allocation: what every projection would lose at some ratios",
        STAGES,
        overrides_and(model="checkpoint", grams="grams", fisher="of fisher", losses="JSON to write"),
    ),
    Command(
        "choose-ratios",
        _choose_ratios,
        "allocation: the ratio of every projection",
        STAGES,
        overrides_and(losses="of expect-losses", ratios="JSON to write"),
    ),
    Command(
        "search-ranks",
        _search_ranks,
        "asvd: perplexity with each projection truncated alone",
        STAGES,
        overrides_and(model="checkpoint", documents="calibration text", grams="grams", sensitivity="JSON to write"),
    ),
    Command(
        "choose-ranks",
        _choose_ranks,
        "asvd: ranks that meet the ratio or the perplexity budget",
        STAGES,
        overrides_and(
            model="checkpoint",
            documents="calibration text",
            grams="grams",
            sensitivity="of search-ranks",
            ranks="JSON to write",
        ),
    ),
    Command(
        "factorize",
        _factorize,
        "compress the projections of some layers",
        STAGES,
        overrides_and(
            model="checkpoint",
            grams="grams",
            layers="first-last",
            factors="safetensors to write",
            record="record to write",
            ranks="(optional) of choose-ranks",
            fisher="(optional) of fisher, for objective=loss",
            ratios="(optional) of choose-ratios",
        ),
    ),
    Command(
        "quantize",
        _quantize,
        "factors in fewer bits",
        STAGES,
        overrides_and(
            model="checkpoint",
            grams="grams",
            factors="factors of a block of layers",
            factorization="their record",
            quantized="safetensors to write",
            record="record to write",
            fisher="(optional) of fisher, for objective=loss",
        ),
    ),
    Command(
        "evaluate-cell",
        _evaluate_cell,
        "measure the dense model, or a compressed one",
        STAGES,
        overrides_and(
            model="checkpoint",
            documents="held-out text",
            second_text_files="documents of evaluation.second_text; none: there is none",
            factors_files="factors; none: the dense model",
            reference="hidden states of the dense model: written by its own evaluation, read by all others",
            samples="folder to write",
            record="record to write",
        ),
        ("study",),
    ),
)
