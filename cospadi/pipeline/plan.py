"""``cospadi plan study=…``: cells, jobs, hours, disk and downloads of a study before its first job.

Hours are operations, counted from the shapes of the projections and the settings of every solver, over what the machine
manages per second (`Speed`). What is counted are matrix products, decompositions and the passes over memory that the K-SVD
sweep is made of; rounds that a solver saves by stopping early are counted, data that only moves is not. Nothing here
imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from cospadi.errors import UserError
from cospadi.factorization.work import Speed
from cospadi.pipeline.cost import (
    calibrate,
    download_bytes,
    evaluate,
    evaluated_tokens,
    expect_losses,
    factorize_model,
    fisher,
    fisher_bytes,
    gram_bytes,
    quantize,
    value_bytes,
)
from cospadi.pipeline.study import CellId, Study
from cospadi.quantization.settings import NONE
from cospadi.sources.shapes import shape_of

START = 10.0
"""Seconds that a job takes to start: Python, torch, snakemake."""
GB = 1e9


@dataclass
class ModelPlan:
    """What a model of a study takes."""

    model: str
    cells: int = 0
    jobs: int = 0
    calibration: int | float = 0.0
    """Seconds of calibration; likewise the next three."""
    factorization: int | float = 0.0
    quantization: int | float = 0.0
    evaluation: int | float = 0.0
    gradients: int | float = 0.0
    """Seconds, of those of calibration, of the pass that goes by the loss."""
    trials: int | float = 0.0
    """Seconds, of those of factorization, of what an allocation tries."""
    grams: int | float = 0.0
    """Bytes of all grams; likewise the next three."""
    factors: int | float = 0.0
    reference: int | float = 0.0
    """Bytes of the dense model's hidden states, which all others are compared with."""
    download: int | float = 0.0
    """Bytes to fetch; 0 where the model is on this disk or drawn from a seed."""

    @property
    def seconds(self) -> int | float:
        return self.calibration + self.factorization + self.quantization + self.evaluation

    @property
    def disk(self) -> int | float:
        """Bytes of results and downloads."""
        return self.grams + self.factors + self.reference + self.download


def plan(study: Study, speed: Speed) -> list[ModelPlan]:
    """What every model of the study takes, finished cells included.

    Raises:
        UserError: a model's shape is not known.
    """
    return [_plan_model(study, model, speed) for model in study.study.models]


def _plan_model(study: Study, model: str, speed: Speed) -> ModelPlan:
    config = study.config(model)
    shape = shape_of(config.model)
    takes = ModelPlan(model, jobs=3)  # prepare, calibrate, evaluate the dense model
    takes.calibration = START + calibrate(config, shape).seconds(speed)
    takes.evaluation = START + evaluate(config, shape, dense=True).seconds(speed)
    takes.grams = shape.layers * gram_bytes(config, shape)
    takes.reference = evaluated_tokens(config)[0] * shape.hidden * value_bytes(config)
    takes.download = download_bytes(config, shape)
    methods = {c.method: study.config(model, c.method).factorization for c in study.cells if c.model == model}
    if any(method.needs_fisher for method in methods.values()):
        takes.jobs += 1
        takes.gradients = START + fisher(config, shape).seconds(speed)
        takes.calibration += takes.gradients
        takes.grams += shape.layers * fisher_bytes(shape)
    for method in (method for method in methods.values() if method.allocates):
        takes.jobs += 1
        takes.trials += START + expect_losses(method, shape).seconds(speed)
    takes.factorization += takes.trials
    factored: set[CellId] = set()
    for cell in (cell for cell in study.cells if cell.model == model):
        composed = study.config(model, cell.method, cell.ratio, cell.quantization)
        blocks = len(study.layers(cell))
        takes.cells += 1
        takes.jobs += 1
        takes.evaluation += START + evaluate(composed, shape, dense=False).seconds(speed)
        plain = CellId(model, cell.method, cell.ratio)
        if plain not in factored:
            factored.add(plain)
            takes.jobs += blocks + composed.factorization.allocates
            takes.factorization += blocks * START + factorize_model(composed.factorization, shape).seconds(speed)
            takes.factors += (1 - composed.factorization.compression_ratio) * 2 * shape.compressed
        if cell.quantization != NONE:
            takes.jobs += blocks
            each = (quantize(composed, *size) for size in shape.projections.values())
            takes.quantization += blocks * START + shape.layers * sum(work.seconds(speed) for work in each)
            takes.factors += (1 - composed.factorization.compression_ratio) * shape.compressed  # about a byte a value
    return takes


def seconds_per_job(study: Study, speed: Speed) -> dict[str, float]:
    """Rule -> seconds of one of its jobs, on average over the study; rules whose jobs are little more than their start
    are left out. Empty where a model cannot be counted: its study can be computed all the same.
    """
    try:
        plans = plan(study, speed)
    except UserError:
        return {}
    factorized = {(cell.model, cell.method, cell.ratio): len(study.layers(cell)) for cell in study.cells}
    quantized = sum(len(study.layers(cell)) for cell in study.cells if cell.quantization != NONE)
    evaluation = sum(one.evaluation for one in plans) / (len(study.cells) + len(plans))
    allocated = {(cell.model, cell.method) for cell in study.cells if study.allocates(cell.method)}
    gradients = sum(one.gradients for one in plans)
    trials = sum(one.trials for one in plans)
    return {
        "calibrate": (sum(one.calibration for one in plans) - gradients) / len(plans),
        "fisher": gradients / max(sum(one.gradients > 0 for one in plans), 1),
        "expect_losses": trials / max(len(allocated), 1),
        "factorize": (sum(one.factorization for one in plans) - trials) / max(sum(factorized.values()), 1),
        "quantize": sum(one.quantization for one in plans) / max(quantized, 1),
        "evaluate_dense": evaluation,
        "evaluate": evaluation,
    }


def hours_of_methods(study: Study, speed: Speed) -> dict[str, list[float]]:
    """Method -> hours of its factorizations, at all ratios together, of every model."""
    hours = {method: [0.0] * len(study.study.models) for method in study.study.methods}
    for model, method, ratio in dict.fromkeys((cell.model, cell.method, cell.ratio) for cell in study.cells):
        config = study.config(model, method, ratio)
        seconds = factorize_model(config.factorization, shape_of(config.model)).seconds(speed)
        hours[method][study.study.models.index(model)] += seconds / 3600
    return hours


def report(study: Study, plans: Sequence[ModelPlan], speed: Speed, how: str) -> str:
    """The plan as a Markdown table, with its totals and what it is worth."""
    heads = ("Model", "Cells", "Jobs", "Calibration h", "Factorization h", "Quantization h", "Evaluation h", "Hours")
    disk = ("Grams GB", "Factors GB", "Reference GB", "Download GB", "Disk GB")
    total = ModelPlan("all")
    for one in plans:
        for field in fields(ModelPlan)[1:]:
            setattr(total, field.name, getattr(total, field.name) + getattr(one, field.name))
    lines = [f"| {' | '.join((*heads, *disk))} |", f"| :-- |{' --: |' * (len(heads) + len(disk) - 1)}"]
    for one in (*plans, total):
        hours = (one.calibration, one.factorization, one.quantization, one.evaluation, one.seconds)
        sizes = (one.grams, one.factors, one.reference, one.download, one.disk)
        counts = (one.model, str(one.cells), str(one.jobs))
        lines.append(
            f"| {' | '.join((*counts, *(_short(s / 3600) for s in hours), *(_short(b / GB) for b in sizes)))} |"
        )
    rates = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in asdict(speed).items())
    methods = [
        f"| Factorization h of | {' | '.join(study.study.models)} |",
        f"| :-- |{' --: |' * len(study.study.models)}",
    ]
    for method, hours in hours_of_methods(study, speed).items():
        methods.append(f"| {method} | {' | '.join(map(_short, hours))} |")
    note = (
        f"Hours of one {how}, jobs one after another. Rates in G/s: {rates}. An estimate from counted operations: take it to a "
        "factor of three. Downloads and their time depend on the hub; finished cells are counted like all others."
    )
    return "\n".join(
        [
            f"# {study.study.title} (study {study.name})",
            "",
            *lines,
            "",
            *methods,
            "",
            note,
            "",
        ]
    )


def _short(value: int | float) -> str:
    """
    >>> _short(0.0), _short(0.0314), _short(3.14159), _short(1234.5)
    ('0', '0.031', '3.1', '1234')
    """
    if value == 0:
        return "0"
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
