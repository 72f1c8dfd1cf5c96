"""``cospadi plan MODEL``: memory, disk, time and the size of the result of one ``cospadi compress``, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from cospadi.factorization.budget import DENSE_BITS
from cospadi.factorization.settings import CoSpaDiConfig, MagnitudeConfig, OATSConfig, PruningConfig
from cospadi.factorization.work import Speed, Work
from cospadi.packing.formats import FORMATS, TRUNCATED
from cospadi.pipeline import cost
from cospadi.progress import duration
from cospadi.settings import Config
from cospadi.sources import checkpoints
from cospadi.sources.shapes import Shape, known_shape, shape_from

BLOCK_BYTES = 2 * 2**30
"""Bytes of dense 16-bit projections that one factorization takes at most: all it has packed stays in memory until it ends."""
MEASURED_WINDOWS = 8
"""Windows of the calibration's length that are measured at the end, where the text has as many left."""
START_BYTES = 1e9
"""Memory of Python, torch and transformers."""
COPIES = 6
"""Float64 copies of a gram that a solver holds at once, at most."""
GB = 1e9


@dataclass(frozen=True)
class CompressPlan:
    """What one compression takes: seconds of work, bytes of memory and disk."""

    calibration: int | float
    """Seconds; likewise the next three."""
    factorization: int | float
    quantization: int | float
    measuring: int | float
    memory: int | float
    """Bytes at the peak; likewise all that follow."""
    grams: int | float
    factors: int | float
    checkpoint: int | float
    dense: int | float
    """Of the whole model in 16 bits."""
    download: int | float
    """0 where the model is on this disk or drawn from a seed."""

    @property
    def seconds(self) -> int | float:
        return self.calibration + self.factorization + self.quantization + self.measuring

    @property
    def disk(self) -> int | float:
        """Bytes of the work folder, the checkpoint and what is fetched."""
        return self.grams + self.factors + self.checkpoint + self.download


def plan_compress(config: Config, speed: Speed, measure: bool = True) -> CompressPlan:
    """Count one compression.

    Args:
        config: model, calibration, method and quantization.
        speed: rates of the machine.
        measure: whether the models are measured at the end.

    Raises:
        UserError: the model is not there, or has other projections than Llama's.
    """
    shape = _shape(config)
    dense = 2 * shape.parameters
    factors = (1 - config.factorization.compression_ratio) * 2 * shape.compressed
    stored = quantized_bytes(config, factors, shape.compressed)
    quantization = Work()
    if config.quantization.changes:
        quantization = sum((cost.quantize(config, *size) for size in shape.projections.values()), Work()) * shape.layers
    calibration = cost.calibrate(config, shape)
    grams = cost.gram_bytes(config, shape)
    if config.factorization.needs_fisher:
        calibration += cost.fisher(config, shape)
        grams += cost.fisher_bytes(shape)
    factorization = cost.factorize_model(config.factorization, shape) + cost.expect_losses(config.factorization, shape)
    return CompressPlan(
        calibration=calibration.seconds(speed),
        factorization=factorization.seconds(speed),
        quantization=quantization.seconds(speed),
        measuring=_measuring(config, shape).seconds(speed) if measure else 0.0,
        memory=_memory(config, shape, measure),
        grams=shape.layers * grams,
        factors=factors + (stored if config.quantization.changes else 0),
        checkpoint=stored + dense - 2 * shape.compressed,
        dense=dense,
        download=cost.download_bytes(config, shape),
    )


def quantized_bytes(config: Config, factors: int | float, weights: int) -> int | float:
    """Bytes of projections with ``weights`` parameters once their factors, ``factors`` bytes in 16 bits, are quantized; masks stay bits."""
    if not config.quantization.changes:
        return factors
    name = config.quantization.values or config.quantization.dictionary
    bits = DENSE_BITS - 2 if name == TRUNCATED else FORMATS[name].bits + DENSE_BITS / config.quantization.group_size
    is_masked = isinstance(config.factorization, CoSpaDiConfig | MagnitudeConfig | OATSConfig | PruningConfig)
    mask = min(weights / 8, factors) if is_masked else 0.0
    return mask + (factors - mask) * bits / DENSE_BITS


def _shape(config: Config) -> Shape:
    source = config.model.source
    return known_shape(config.model) or shape_from(checkpoints.model_settings(config.model), source)


def _measuring(config: Config, shape: Shape) -> Work:
    """Windows through the model before and after, with the expected rows of the head before."""
    tokens = MEASURED_WINDOWS * config.calibration.sample_length
    head = 2 * shape.vocabulary * shape.hidden
    return Work(model=tokens * (2 * 2 * shape.compressed + 3 * head), memory=2 * tokens * shape.vocabulary * 4 * 6)


def _memory(config: Config, shape: Shape, measure: bool) -> int | float:
    """Bytes at the peak, which is in one of three stages."""
    value_bytes = cost.value_bytes(config)
    calibration = config.calibration
    embeddings = shape.vocabulary * shape.hidden * value_bytes
    block = shape.compressed / shape.layers * value_bytes
    hidden_states = calibration.n_samples * calibration.sample_length * shape.hidden * value_bytes
    if config.factorization.needs_fisher:  # what enters every block is kept until the gradient comes back
        kept = (calibration.fisher.n_samples or calibration.n_samples) / calibration.n_samples
        hidden_states *= max(1, kept * (shape.layers + 1))
    grams = cost.gram_bytes(config, shape)
    packed = min(2 * shape.compressed, BLOCK_BYTES)
    solver = COPIES * 8 * max(max(size) ** 2 for size in shape.projections.values())
    stages = [embeddings + block + hidden_states + grams, packed + solver]
    if measure:
        stages.append(shape.parameters * value_bytes)
    return START_BYTES + max(stages)


def report(config: Config, plan: CompressPlan, machine: str) -> str:
    """The plan as a Markdown table, and what it is worth."""
    quantized = f", {config.quantization.title}" if config.quantization.changes else ""
    rows = [
        ("Download", _gigabytes(plan.download) if plan.download else "none"),
        ("Disk, while it runs", f"{_gigabytes(plan.disk)}, of which grams {_gigabytes(plan.grams)}"),
        ("Memory", _gigabytes(plan.memory)),
        ("Calibration", duration(plan.calibration)),
        ("Factorization", duration(plan.factorization)),
        *([("Quantization", duration(plan.quantization))] if plan.quantization else []),
        *([("Measuring what it cost", duration(plan.measuring))] if plan.measuring else []),
        ("All stages", duration(plan.seconds)),
        ("Checkpoint", f"{_gigabytes(plan.checkpoint)}, {plan.checkpoint / plan.dense:.0%} of the model in 16 bits"),
    ]
    title = f"# {config.model.source}: {config.factorization.title}{quantized}, ratio {config.factorization.compression_ratio:g}"
    note = (
        f"Time on one {machine}. It is counted operations over measured rates: take it, and the memory, to a factor of three. The "
        "checkpoint is counted with embeddings and head in 16 bits."
    )
    return "\n".join(
        [title, "", "| | |", "| :-- | --: |", *(f"| {name} | {value} |" for name, value in rows), "", note]
    )


def _gigabytes(size: int | float) -> str:
    """
    >>> _gigabytes(70.3e9), _gigabytes(1.24e9), _gigabytes(3.1e6)
    ('70 GB', '1.2 GB', '3.1 MB')
    """
    if size < 0.1 * GB:
        return f"{size / 1e6:.1f} MB"
    return f"{size / GB:.1f} GB" if size < 10 * GB else f"{size / GB:.0f} GB"
