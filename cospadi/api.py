"""``cospadi compress`` and ``cospadi.compress``: one model, smaller, in one call."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cospadi import devices
from cospadi.calibration.collect import draw_samples, gather
from cospadi.calibration.fisher import FisherFactors, gather_fisher, loss_metric
from cospadi.calibration.statistics import InputStatistics
from cospadi.checkpoint.card import card
from cospadi.checkpoint.ledger import ledger
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.specs import layer_of
from cospadi.checkpoint.transformers_plugin import METHOD, attach
from cospadi.checkpoint.write import refuse_taken, write
from cospadi.errors import AUTO, UserError
from cospadi.experts import experts_apart, names_experts
from cospadi.factorization.allocation import allocate
from cospadi.factorization.factors import Dense, Factors
from cospadi.factorization.files import read_factors
from cospadi.factorization.groups import factorized, groups_of, problems_from, runs_in_memory
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import IDENTITY, CoSpaDiConfig
from cospadi.factorization.trials import tried
from cospadi.models import TRANSPOSED, Projection
from cospadi.pipeline import chain, outcome
from cospadi.pipeline.size import require_free_ratio
from cospadi.quantization.methods import quantize
from cospadi.records import add_to_folder, check_output_folder, own_folder, read_json
from cospadi.settings import Config, load, model_overrides, text_overrides
from cospadi.sources.addresses import local_path
from cospadi.sources.families import fitted
from cospadi.sources.files import quantization_of
from cospadi.sources.texts import read_documents

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Statistics = tuple[list[str], InputStatistics]
"""Names of the projections that read an input, and its statistics."""


def compress_to(
    source: str,
    out: Path,
    overrides: Sequence[str] = (),
    text: str | None = None,
    keep_work: bool = False,
    stub: bool = False,
    overwrite: bool = False,
    measure: bool = False,
    dtype: str | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Load, calibrate, factorize, save. What is finished waits in ``<out>.work`` until the checkpoint is written.

    Args:
        source: name of a file in ``conf/model``, a folder, a hub id or another address of `ModelConfig.source`.
        out: folder to write.
        overrides: settings, as Hydra takes them: ``factorization=cospadi factorization.compression_ratio=0.3``.
        text: for calibration: name of a file in ``conf/text``, or a text file with a document a line.
        keep_work: leave ``<out>.work`` behind.
        stub: see `cospadi.checkpoint.write`.
        overwrite: replace a checkpoint that an earlier call wrote to ``out``.
        dtype: of embeddings, norms and head; by default that of the model.
        size: bytes that the files of weights may take, in the place of a ratio: see `cospadi.pipeline.size`.
        measure: load the model before and after and measure what it cost, on text that calibration did not see.

    Returns:
        the ledger (`cospadi.checkpoint.ledger`) of what was written.

    Raises:
        UserError: a setting, the model or the text is invalid, ``out`` is taken, another run writes it, or the disk is full.
    """
    config = configured(source, overrides, text)
    for room in ("calibration", "factorization", "quantization"):
        if (device := getattr(config, room).device) != AUTO:
            devices.pick(device, f"{room}.device")  # now, and not when the model and the text are there
    if size is not None:
        require_free_ratio(config)
        if any("factorization.compression_ratio=" in override for override in overrides):
            raise UserError("Both a size and a ratio are given, and one follows from the other. Leave one out.")
    out = Path(out).absolute()
    check_output_folder(out)
    if Path(source).exists() and Path(source).resolve() == out.resolve():
        raise UserError(f"{out} is the model itself. Name another folder to write.")
    refuse_taken(out, overwrite)
    if Path(source).is_dir() and Path(source).resolve() in out.resolve().parents:
        raise UserError(
            f"{out} is inside the model's folder {source}, whose files would change. Name a folder outside it."
        )
    work = own_folder(out.with_name(f"{out.name}.work"))
    with _alone(work, out):
        made = chain.compress(config, work, size, dtype)
        config = made.config
        summary = _summary(config, [read_json(record) for record in made.records])
        write(out, made.model, read_factors(made.factors), summary, stub=stub, dtype=dtype)
        sizes = ledger(out)
        if measure:
            sizes["outcome"] = _outcome(config, made.model, out, work)
        add_to_folder(out, "README.md", _card(config, source, sizes))
        if not keep_work:
            shutil.rmtree(work)
    return sizes


def _outcome(config: Config, model: Path, out: Path, work: Path) -> dict[str, Any] | None:
    """What the compression cost; ``None``, and a line that says why, where it cannot be measured."""
    print("Measuring what it cost", flush=True)
    try:
        return outcome.measured(config, model, out, work / "documents.json", work).as_record()
    except KeyboardInterrupt:
        print(f"\nNot measured: stopped. {out} is whole; cospadi evaluate measures it at any time.", flush=True)
        return None
    except UserError as error:
        print(f"Not measured: {str(error).rstrip('.')}.", flush=True)
        return None


def _card(config: Config, source: str, sizes: dict[str, Any]) -> str:
    is_hub_id = (
        local_path(config.model.source) is None and "/" in config.model.source and ":" not in config.model.source
    )
    quantization = f" and {config.quantization.title}" if config.quantization.changes else ""
    return card(
        title=_public_name(source),
        base=config.model.source if is_hub_id else None,
        method=f"{config.factorization.name}{quantization}",
        calibration=config.calibration.text.title,
        removed=sizes["removed"],
        outcome=sizes.get("outcome"),
    )


@contextmanager
def _alone(work: Path, out: Path) -> Iterator[None]:
    """
    Raises:
        UserError: another run works in this folder.
    """
    lock = work.with_name(f".{work.name}.lock")
    try:
        with FileLock(lock, blocking=False):
            yield
            lock.unlink(
                missing_ok=True
            )  # while it is held: another run is refused at once, and does not wait with the file open
    except Timeout as error:
        raise UserError(f"Another cospadi compress is writing {out}. Wait for it, or name another folder.") from error


def configured(source: str, overrides: Sequence[str], text: str | None) -> Config:
    """The settings of one compression.

    Raises:
        UserError: naming the setting that is invalid.
    """
    chosen = model_overrides(source)
    if text is not None:
        chosen += text_overrides("calibration.text", text)
    config = load([*chosen, *overrides])
    factorization = config.factorization
    beside_identity = isinstance(factorization, CoSpaDiConfig) and factorization.fixed_atoms == IDENTITY
    if beside_identity and any("factorization.rho=" in override for override in overrides):
        raise UserError(
            f"factorization.rho has no effect on {factorization.name}, which has fixed atoms. "
            "Set factorization.learned_atoms, or take --method cospadi."
        )
    if factorization.searches_ranks:
        raise UserError("compress has no rank search. Take factorization=asvd, or run the study that has asvd_search.")
    return config


def _summary(config: Config, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the checkpoint was made: what goes into its config. ``records`` are those of its blocks of layers."""
    projections = [row for record in records for row in record["projections"]]
    inputs = {file: digest for record in records for file, digest in record["inputs"].items()}
    factorization = {k: v for k, v in asdict(config.factorization).items() if k != "device"}
    calibration = {k: v for k, v in asdict(config.calibration).items() if k not in ("device", "text")}
    quantization = {k: v for k, v in asdict(config.quantization).items() if k != "device"}
    return {
        "factorization": factorization,
        **({"quantization": quantization} if config.quantization.changes else {}),
        "calibration": calibration | {"text": _public_name(config.calibration.text.source)},
        "inputs": {Path(file).name: digest for file, digest in inputs.items()},
        "versions": records[0]["versions"],
        "output_error_mean": sum(row["output_error"] for row in projections) / len(projections),
    }


def _public_name(source: str) -> str:
    """A source as it may be published: of a place on this disk the last part alone."""
    path = local_path(source)
    return source if path is None else path.name


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    compression_ratio: float | None = None,
    method: str = "cospadi_plus",
    texts: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    quantization: str = "none",
) -> PreTrainedModel:
    """Compress a loaded model in place, and return it: ``save_pretrained`` then writes a compressed checkpoint.

    The calibration tokens run through the whole model at once, with the grams of all its layers in memory; for a model
    that hardly fits, ``cospadi compress`` goes block by block.

    Args:
        model: a causal language model in float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        compression_ratio: fraction of the projections' bits removed, before quantization; by default that of the method's
            file, 0.2.
        method: name of a file in ``conf/factorization``.
        texts: documents for calibration; by default those of ``conf/text/lee_news``.
        overrides: further settings, as Hydra takes them: ``calibration.n_samples=16``.
        quantization: name of a file in ``conf/quantization``: ``int8``, ``int4``.

    Raises:
        UserError: a setting or the text is invalid, a projection is missing, or activations are not finite.
    """
    _require_kinds(model, tokenizer, texts, overrides)
    settings = [f"factorization={method}", f"quantization={quantization}", *overrides]
    settings += [] if compression_ratio is None else [f"factorization.compression_ratio={compression_ratio}"]
    config = configured("any", ["model.source=./in-memory", *settings], None)
    config = replace(config, model=fitted(config.model, model.config.model_type))
    calibration = config.calibration
    _require_plain(model)
    texts = read_documents(calibration.text) if texts is None else list(texts)
    tokens = draw_samples(tokenizer, texts, calibration.n_samples, calibration.sample_length, calibration.seed)
    with experts_apart(model) if names_experts(config.model.projections) else nullcontext():
        # All layers are replaced at the end, so that an interruption before leaves the model as it was.
        for name, layer in _smaller_layers(config, model, tokens).items():
            model.set_submodule(name, layer)
    attach(model, {"factorization": asdict(config.factorization), "quantization": asdict(config.quantization)})
    return model


def _smaller_layers(
    config: Config, model: PreTrainedModel, tokens: Int[Tensor, "n_samples sample_length"]
) -> dict[str, CompressedLinear]:
    """The compressed layers by their names; the model is not changed.

    Raises:
        UserError: see `compress`.
    """
    calibration = config.calibration
    inputs: dict[tuple[int, str], InputStatistics] = {}
    projections: list[Projection] = []
    with _eval_mode(model):
        gathered = list(gather(model, config.model, calibration, tokens))
        fisher = _fisher(config, model, tokens) if config.factorization.needs_fisher else None
    for names, statistics in gathered:
        layer, shared_input = names[0].removeprefix(f"{config.model.blocks}.").split(".", maxsplit=1)
        inputs[int(layer), shared_input] = statistics
        for name in names:
            d_out, d_in = model.get_submodule(name).weight.shape
            projection = name.removeprefix(f"{config.model.blocks}.{layer}.")
            attended = projection in config.model.attended
            projections.append(Projection(name, int(layer), projection, shared_input, d_in, d_out, attended))

    def statistics_of(projection: Projection) -> tuple[Tensor, Tensor]:
        statistics = inputs[projection.layer, projection.shared_input]
        attended = projection.attended and fisher is None  # whoever reads keys and values is in the gradients already
        return statistics.gram_of(attended), statistics.absolute_mean

    def weight_of(projection: Projection) -> Tensor:
        return model.get_submodule(projection.name).weight.detach().T.float()

    def metric_of(projection: Projection, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        of_loss = fisher[projection.layer][projection.projection].per_token
        return loss_metric(gram, *of_loss, calibration.fisher.blend)

    metric = metric_of if fisher else None
    problem_of = problems_from(weight_of, statistics_of, calibration.damping, metric_of=metric)
    if config.factorization.allocates:
        losses = {p.name: tried(config.factorization, problem_of(p)) for p in projections}
        sizes = {p.name: p.d_in * p.d_out for p in projections}
        ratios = allocate(losses, sizes, config.factorization.compression_ratio)
        problem_of = problems_from(weight_of, statistics_of, calibration.damping, metric_of=metric, ratios=ratios)
    groups = groups_of(config.factorization, projections, problem_of)
    runs = runs_in_memory(config.factorization, groups, model.device)
    smaller: dict[str, CompressedLinear] = {}
    for group, problems, factors in factorized(config.factorization, runs, problem_of):
        smaller |= _layers(config, model, group, problems, factors)
    if not smaller:
        raise UserError(
            "No projection was compressed: every one was left dense. Choose another ratio, method or quantization."
        )
    return smaller


def _fisher(
    config: Config, model: PreTrainedModel, tokens: Int[Tensor, "n_samples sample_length"]
) -> list[dict[str, FisherFactors]]:
    """What the loss cares about, of every block."""
    return gather_fisher(model, config.model, config.calibration, tokens[: config.calibration.fisher.n_samples])


def _require_kinds(model: object, tokenizer: object, texts: object, overrides: object) -> None:
    """
    Raises:
        UserError: an argument is of another kind than `compress` takes: a path for a model, say.
    """
    if not hasattr(model, "config") or not hasattr(model, "named_parameters"):
        raise UserError(
            f"model is a {type(model).__name__}. Give a loaded model; `cospadi compress` takes names and folders."
        )
    if not callable(tokenizer):
        raise UserError(f"tokenizer is a {type(tokenizer).__name__}. Give a loaded one: AutoTokenizer.from_pretrained.")
    if isinstance(texts, str):
        raise UserError("texts is one string, which would be read letter by letter. Give a list of documents.")
    if isinstance(overrides, str | Mapping):
        raise UserError(f"overrides is a {type(overrides).__name__}. Give a list: ['calibration.n_samples=16'].")
    if isinstance(texts, Sequence) and (other := [text for text in texts if not isinstance(text, str)]):
        raise UserError(f"texts holds a {type(other[0]).__name__}. Give a list of strings, a document each.")


def _require_plain(model: PreTrainedModel) -> None:
    """
    Raises:
        UserError: the weights are codes, an adapter is on top of them, or they are not in memory.
    """
    compression = quantization_of(model.config.to_dict())
    if compression or getattr(model, "is_quantized", False):
        method = compression.get("quant_method", "unknown")
        state = "compressed already" if method == METHOD else f"quantized ({method})"
        raise UserError(f"This model is {state}. Load the 16-bit model that it was made from, and compress that.")
    if hasattr(model, "peft_config"):
        raise UserError("This model has an adapter of peft. Call merge_and_unload first, and compress what it returns.")
    if model.config.model_type in TRANSPOSED:
        raise UserError(
            f"Models of type {model.config.model_type} have Conv1D layers. Only linear layers are compressed, so this family is not "
            "supported."
        )
    if model.get_output_embeddings() is None:
        raise UserError(
            f"This {type(model).__name__} has no head for tokens. Load the model with AutoModelForCausalLM, and compress that."
        )
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise UserError(
            f"{away[0]} is not in memory: this model is offloaded. Load it without device_map, or use cospadi compress, which "
            "reads one block at a time."
        )


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """A model without dropout, and every module in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _layers(
    config: Config,
    model: PreTrainedModel,
    group: Sequence[Projection],
    problems: Sequence[Problem],
    factors: Sequence[Factors],
) -> dict[str, CompressedLinear]:
    """The layers of a group of projections by their names; none for what stays dense."""
    if config.quantization.changes:
        factors = quantize(config.quantization, factors, problems)
    layers: dict[str, CompressedLinear] = {}
    for projection, compact in zip(group, factors, strict=True):
        if isinstance(compact, Dense) and not compact.formats:
            continue
        dense = model.get_submodule(projection.name)
        layer = layer_of(compact, dense.bias).to(dense.weight.device)
        if layers:
            layer.share_with(next(iter(layers.values())))
        layers[projection.name] = layer
    return layers
