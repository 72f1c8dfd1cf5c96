"""One function per rule: reads files, calls a room, writes files. The only place where rooms meet the disk."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cospadi.config import DISABLED, ASVDConfig, Config, TextConfig
from cospadi.errors import UserError
from cospadi.progress import Progress
from cospadi.records import Record, file_hash, new_path, read_json, text_hash, write_json, write_tensors


def prepare_model(config: Config, folder: Path, record: Path) -> None:
    """Room 1: an address -> an ordinary checkpoint whose projections are known to be there."""
    from cospadi.models import check_loadable, find_projections
    from cospadi.sources import prepare_model

    log = Record("sources", asdict(config.model))
    print(f"Preparing {config.model.title} from {config.model.source}", flush=True)
    provenance = prepare_model(config.model, folder)
    projections = find_projections(folder, config.model)
    check_loadable(folder, config.model)
    log.finish(record, provenance=provenance, projections=[asdict(p) for p in projections])


def prepare_text(config: TextConfig, documents: Path, record: Path) -> None:
    """Room 1: an address -> a list of plain documents."""
    from cospadi.sources import read_documents

    log = Record("sources", asdict(config))
    print(f"Preparing the text {config.title} from {config.source}", flush=True)
    texts = read_documents(config)
    write_json(documents, texts)
    log.finish(
        record,
        n_documents=len(texts),
        n_words=sum(len(text.split()) for text in texts),
        text_hash=text_hash("\n\n".join(texts)),
    )


def calibrate(config: Config, model: Path, documents: Path, grams: Path, record: Path) -> None:
    """Room 2: tokens through the dense model, one gram per shared input, a file per layer."""
    from cospadi.calibration import collect, samples, statistics_file, tensors_of
    from cospadi.models import find_projections

    calibration = config.calibration
    settings = {"model": asdict(config.model), "calibration": asdict(calibration)}
    log = Record("calibration", settings, _hashes(documents) | _weights(model))
    longest = read_json(model / "config.json").get("max_position_embeddings")
    if longest and calibration.sample_length > longest:
        raise UserError(
            f"calibration.sample_length={calibration.sample_length} is longer than the model reads ({longest} tokens, "
            f"max_position_embeddings). Set it to {longest} or less."
        )
    tokens = samples(calibration, model, documents)
    n_layers = 1 + max(p.layer for p in find_projections(model, config.model))
    progress = Progress(n_layers, f"Calibration: {tokens.numel()} tokens through {config.model.title}")
    conditioning = {}
    with new_path(grams) as partial:
        for layer, statistics in collect(model, config.model, calibration, tokens):
            for shared_input, found in statistics.items():
                diagonal = found.gram.diagonal()
                conditioning[f"{layer}.{shared_input}"] = float(diagonal.max() / diagonal.mean())
            write_tensors(statistics_file(partial, layer), tensors_of(statistics))
            progress.step(f"layer {layer}", f"{len(statistics)} grams")
    log.finish(
        record,
        n_tokens=tokens.numel(),
        token_hash=text_hash(str(tokens.tolist())),
        special_tokens="none added",
        peak_channel=conditioning,
    )


def search_ranks(config: Config, model: Path, documents: Path, grams: Path, sensitivity: Path) -> None:
    """Room 3, asvd only: how much perplexity each projection costs when truncated alone."""
    from cospadi.allocation import perplexities_alone
    from cospadi.calibration import samples

    factorization = config.factorization
    if not isinstance(factorization, ASVDConfig) or factorization.rank_search is None:
        raise UserError("factorization.rank_search is not set: there is nothing to search.")
    calibration, search = config.calibration, factorization.rank_search
    log = Record("factorization", {"factorization": asdict(factorization), "damping": calibration.damping})
    tokens = samples(calibration, model, documents, at_most=search.n_samples)
    found = perplexities_alone(config, model, grams, tokens)
    log.finish(sensitivity, n_tokens=tokens.numel(), **found)


def choose_ranks(config: Config, model: Path, documents: Path, grams: Path, sensitivity: Path, ranks: Path) -> None:
    """Room 3, asvd only: the ranks that meet the ratio, or the perplexity budget."""
    from cospadi.allocation import choose_ranks

    log = Record("factorization", {"factorization": asdict(config.factorization)}, _hashes(sensitivity))
    log.finish(ranks, **choose_ranks(config, model, documents, grams, read_json(sensitivity)))


def factorize(
    config: Config, model: Path, grams: Path, layers: str, factors: Path, record: Path, ranks: Path | None
) -> None:
    """Room 3: gram and weights -> factors of every projection in a block of layers."""
    from cospadi.calibration import statistics_file
    from cospadi.factorization.files import FactorsFile
    from cospadi.factorization.groups import require_whole_groups
    from cospadi.models import Checkpoint, find_projections

    block = re.fullmatch(r"(\d+)-(\d+)", layers)
    if block is None:
        raise UserError(f"--layers {layers} is no block of layers. Write first-last, counted from 0: 000-014.")
    first, last = int(block[1]), int(block[2])
    settings = {"factorization": asdict(config.factorization), "calibration": asdict(config.calibration)}
    log = Record("factorization", settings)
    checkpoint = Checkpoint(model)
    everything = find_projections(model, config.model)
    projections = [p for p in everything if first <= p.layer <= last]
    if not projections:
        raise UserError(
            f"{model} has no layers {layers}. Set model.n_layers to {1 + max(p.layer for p in everything)}."
        )
    require_whole_groups(config.factorization, first, last, 1 + max(p.layer for p in everything))
    chosen = read_json(ranks)["ranks"] if ranks else None
    size = [p.d_in * p.d_out for p in projections]
    progress = Progress(len(projections), f"{config.factorization.title}, layers {layers}", float(sum(size)))
    file = FactorsFile([p.name for p in projections])  # their order; a GPU takes them by shape
    for compact, row in _factorized(config, checkpoint, projections, grams, chosen):
        file.add(row, compact)
        progress.step(row["name"], _told(row), float(row["d_in"] * row["d_out"]))
    file.write(factors)
    statistics = [statistics_file(grams, layer) for layer in sorted({p.layer for p in projections})]
    inputs = _hashes(*statistics, *([ranks] if ranks else [])) | _weights(model)
    log.finish(record, inputs=inputs, projections=file.rows)


def _factorized(config: Config, checkpoint: Any, projections: Sequence[Any], grams: Path, ranks: dict[str, Any] | None):
    """Yield ``(factors, row of the record)``; projections that share an input share its whitener.

    ``seconds`` of a row are those since the one before: the first matrix of a batch carries the time of all.
    """
    from cospadi import devices
    from cospadi.calibration import read_statistics
    from cospadi.factorization.groups import factorize_projections, problems_from

    factorization = config.factorization
    device = devices.pick(factorization.device, "factorization.device")
    problem_of = problems_from(
        lambda p: checkpoint.weight(p).to(device),
        lambda p: read_statistics(grams, p.layer, p.shared_input, device, p.attended),
        config.calibration.damping,
        ranks,
    )

    def batches(groups: Sequence[Any]):
        return _batches(groups, factorization, device)

    last = time.perf_counter()
    for projection, group, problem, factors in factorize_projections(factorization, projections, problem_of, batches):
        row = _row(projection, group, factors, problem, factorization.compression_ratio)
        if ranks is not None and factorization.rank_search.perplexity_budget is not None:
            row["fallback"] = "rank chosen by factorization.rank_search.perplexity_budget, whatever the ratio"
        row["seconds"], last = time.perf_counter() - last, time.perf_counter()
        yield factors, row


def _batches(groups: Sequence[Any], factorization: Any, device: Any):
    """Groups to hold in memory together: those of one shared input, or of as many layers as a GPU has room for.

    On a GPU those of one shape stand side by side, so that they are solved as one batch.
    """
    import torch

    from cospadi.config import MATCHED
    from cospadi.factorization.groups import by_shared_input

    if device.type != "cuda" or getattr(factorization, "pairing", None) == MATCHED:
        yield from by_shared_input(factorization, groups)
        return
    size = getattr(factorization, "group_size", 1)
    layers = [list(run) for _, run in itertools.groupby(groups, lambda group: group[0].layer // size)]
    free, _ = torch.cuda.mem_get_info(device)
    # gram and whitener in float64, then weight, target, factors and the solver's state
    needed = max(sum(16 * p.d_in**2 + 64 * p.d_in * p.d_out for group in layer for p in group) for layer in layers)
    at_once = max(1, int(free / 2 // needed))
    for first in range(0, len(layers), at_once):
        window = itertools.chain.from_iterable(layers[first : first + at_once])
        yield sorted(window, key=lambda group: (len(group), group[0].d_in, group[0].d_out))


def _row(projection: Any, group: Sequence[Any], factors: Any, problem: Any, compression_ratio: float) -> dict[str, Any]:
    """What the record keeps of one projection; what a group shares is counted at its first member."""
    from cospadi.factorization import budget
    from cospadi.factorization.files import shares

    row = asdict(projection) | {"group": [p.name for p in group] if len(group) > 1 else None}
    row |= {
        "dense_bits": budget.dense_bits(projection.d_in, projection.d_out),
        "budget_bits": budget.budget_bits(projection.d_in, projection.d_out, compression_ratio),
    }
    return row | _measured(factors, problem, shares(row)) | {"fallback": None}


def _measured(factors: Any, problem: Any, shares: bool) -> dict[str, Any]:
    """Sizes and errors of factors."""
    from cospadi.factorization.factors import stored_bits
    from cospadi.factorization.whitening import output_error, weight_error

    approximation = factors.weight()
    return {
        "kind": factors.kind,
        **factors.sizes,
        "value_bits": factors.value_bits,
        "stored_bits": stored_bits(factors, shares),
        "output_error": output_error(problem.whitener, problem.weight, approximation),
        "weight_error": weight_error(problem.weight, approximation),
    }


def quantize(
    config: Config, model: Path, grams: Path, factors: Path, factorization: Path, out: Path, record: Path
) -> None:
    """Room 4: factors of a block of layers -> the same in fewer bits.

    ``factorization`` is the record of ``factors``; what it says of every projection goes on, sizes and errors new.
    """
    from cospadi import devices
    from cospadi.calibration import read_statistics
    from cospadi.factorization.files import FactorsFile, read_factors, shares
    from cospadi.factorization.groups import problems_from
    from cospadi.models import Checkpoint, find_projections
    from cospadi.quantization.methods import quantize

    log = Record(
        "quantization",
        {
            "quantization": asdict(config.quantization),
            "factorization": asdict(config.factorization),
            "calibration": asdict(config.calibration),
        },
    )
    before = {row["name"]: row for row in read_json(factorization)["projections"]}
    projections = {p.name: p for p in find_projections(model, config.model)}
    device, checkpoint = devices.pick(config.quantization.device, "quantization.device"), Checkpoint(model)
    problem_of = problems_from(
        lambda p: checkpoint.weight(p).to(device),
        lambda p: read_statistics(grams, p.layer, p.shared_input, device, p.attended),
        config.calibration.damping,
    )
    title = f"{config.factorization.title} in {config.quantization.title}"
    progress = Progress(len(before), title, float(sum(row["d_in"] * row["d_out"] for row in before.values())))
    file = FactorsFile(list(before))
    for group in _groups_of(read_factors([factors], order=list(before)), before):
        started = time.perf_counter()
        problems = [problem_of(projections[name]) for name, _ in group]
        found = quantize(config.quantization, [f for _, f in group], problems)
        seconds = (time.perf_counter() - started) / len(group)
        for (name, _), smaller, problem in zip(group, found, problems, strict=True):
            row = before[name] | _measured(smaller, problem, shares(before[name])) | {"seconds": seconds}
            file.add(row, smaller)
            progress.step(name, _told(row), float(row["d_in"] * row["d_out"]))
    file.write(out)
    log.finish(record, inputs=_hashes(factors, factorization) | _weights(model), projections=file.rows)


def _groups_of(factors: Iterable[tuple[str, Any]], rows: dict[str, dict[str, Any]]) -> Iterable[list[tuple[str, Any]]]:
    """Factors that share, together."""
    for _, group in itertools.groupby(factors, lambda found: (rows[found[0]]["group"] or [found[0]])[0]):
        yield list(group)


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
    import json

    from cospadi import devices, models
    from cospadi.evaluation import evaluate
    from cospadi.factorization.files import read_factors
    from cospadi.kernels.products import products

    settings = {"model": asdict(config.model), "evaluation": asdict(config.evaluation)}
    if factors:
        settings["factorization"] = asdict(config.factorization)
    compared_with = [reference] if factors else []
    log = Record("evaluation", settings, _hashes(documents, *second_text, *factors, *compared_with) | _weights(model))
    device = devices.pick(config.evaluation.device, "evaluation.device")
    network = models.load(model, config.model.dtype, device)
    models.replace_weights(network, ((name, f.weight()) for name, f in read_factors(factors)))
    with products(exact=True):
        result, rows = evaluate(
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


def tabulate(study: Any, folder: Path) -> None:
    """Room 7: records -> tables and figures."""
    from cospadi.tables import differences, tables, write_figures, write_overviews, write_report, write_tables

    cells = list(_cells(study).values())
    paired = differences(cells, study.study.against or study.study.methods[-1])
    printed = tables(cells, study.study.title, paired, study.study.published)
    write_tables(cells, folder, printed, paired)
    write_overviews(cells, folder)
    write_figures(cells, folder, printed)
    write_report(cells, folder, study.study.title, printed)


def _cells(study: Any, unfinished: bool = False) -> dict[str, Any]:
    """The cells of a study by their places; ``unfinished``: without those that lack a record."""
    from cospadi.tables import Cell

    cells = {}
    for model in study.study.models:
        title = study.config(model).model.title
        record = Path(study.dense_record(model))
        if record.is_file() or not unfinished:
            cells[study.place(model)] = Cell(
                model, title, "dense", "Dense", None, [], read_json(record), samples=record.parent / "samples"
            )
        for cell in (c for c in study.cells if c.model == model):
            if unfinished and not all(Path(record).is_file() for record in study.records(cell)):
                continue
            config = study.config(cell.model, cell.method, cell.ratio, cell.quantization)
            record = Path(study.evaluation_record(cell))
            cells[study.place(model, cell)] = Cell(
                model,
                title,
                cell.method,
                config.factorization.title,
                config.factorization.compression_ratio,
                [read_json(Path(record)) for record in study.factors(cell, "json")],
                read_json(record),
                [read_json(Path(record)) for record in study.earlier_records(cell)],
                *((cell.quantization, config.quantization.title) if config.quantization.changes else ("", "")),
                samples=record.parent / "samples",
            )
    return cells


def track(study: Any, folder: Path) -> None:
    """Room 8: records, tables and figures -> a W&B run for every finished cell, and one for the tables.

    Whatever W&B does, this writes its records and ends well. A run is written again only when there is something new to
    log; what is not uploaded yet is uploaded when the server answers.

    Raises:
        UserError: with ``tracking.mode=online`` and no API key, or with ``disabled``.
    """
    from cospadi.tracking import mode
    from cospadi.tracking.logbook import Logbook

    tracking = study.root.tracking
    if tracking.mode == DISABLED:
        raise UserError("tracking.mode=disabled: there is nothing to do. Set tracking=offline, or auto.")
    mode.require_key(tracking)
    log = Record("tracking", asdict(tracking))
    book = Logbook(_runs(study), folder, tracking)
    progress = Progress(len(book.new), f"W&B: {len(book.runs)} runs of study {study.name}; those to write")
    for name, where in book.write_new():
        progress.step(name, where)
    told = book.upload()
    print(told, flush=True)
    log.finish(folder / "record.json", told=told, runs=book.notes)


def _runs(study: Any) -> list[Any]:
    """What is to be logged: all finished cells, and the tables where there are some."""
    from cospadi.tracking.runs import cell_runs, tables_run

    runs, tables = cell_runs(study.name, _cells(study, unfinished=True)), Path(study.summary).parent
    return [*runs, *([tables_run(study.name, study.study.title, tables)] if Path(study.summary).is_file() else [])]


def workspace(study: Any, definition: Path) -> None:
    """The view that compares a study's runs in W&B: written to ``definition``, and saved there when the server answers."""
    from cospadi.tracking import mode, workspace

    mode.require_key(study.root.tracking)
    before = read_json(definition) if definition.is_file() else {}
    runs = [run for run in _runs(study) if run.job_type != "tables"]
    built = workspace.build(study.name, study.study.title, runs, study.root.tracking)
    reach = mode.reach(study.root.tracking)
    found = (
        workspace.save(built, before.get("url"), reach)
        if reach.online
        else {"url": before.get("url"), "why": reach.why}
    )
    write_json(definition, found | workspace.definition(built))
    print(found["url"] or f"{definition}: kept as a file, as {reach.why}.", flush=True)


def _told(row: dict[str, Any]) -> str:
    sizes = "  ".join(f"{name} {row[name]}" for name in ("rank", "atoms", "sparsity") if row[name])
    kept = "kept dense" if row["value_bits"] == 16 else f"dense, {row['value_bits']} bits"
    return f"{sizes or kept:<26} error {row['output_error']:.4f}  {row['seconds']:5.2f} s"


def _weights(model: Path) -> dict[str, str]:
    """Hash of the model's weights, as its preparation noted it."""
    noted = model.parent / "record.json"
    return {str(model): read_json(noted)["provenance"]["weights_sha256"]} if noted.is_file() else {}


def _hashes(*files: Path) -> dict[str, str]:
    return {str(file): file_hash(file) for file in files}
