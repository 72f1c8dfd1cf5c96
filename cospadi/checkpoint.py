"""Compressed checkpoints: a Hugging Face folder whose projections are stored as factors, and so is really smaller.

``write`` streams one from a dense checkpoint and factors, ``load`` opens it or says why not, ``ledger`` counts its bytes,
``densify`` turns it back into an ordinary one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cospadi.config import DTYPES
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import Dense, Factors, shared_matrix
from cospadi.integrity import CHECKSUMS, checksum, verify_files
from cospadi.layers import SHARES, CompressedLinear, empty_layer, layer_of, ties
from cospadi.models import Checkpoint
from cospadi.records import check_output_folder, new_path, read_json, write_json, write_tensors
from cospadi.sources.addresses import brief

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"
STUB = "modeling_cospadi"
_STUB = '''"""Makes transformers understand this compressed checkpoint, when it is loaded with trust_remote_code=True."""

try:
    import cospadi  # noqa: F401
except ImportError as error:
    raise ImportError("This checkpoint is compressed with cospadi. Install the cospadi package to load it.") from error

from transformers import {config}, {model}  # noqa: F401
'''


def write(
    folder: Path,
    source: Path,
    factors: Iterable[tuple[str, Factors]],
    record: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    stub: bool = False,
) -> None:
    """The checkpoint ``source`` with the projections named in ``factors`` compressed, a shard in memory at a time.

    Factors that hold the same dictionary, or left factor, share it: the first stores it. Tensors that are not compressed
    keep their dtype, as do tokenizer and generation settings. With ``stub`` a few lines of Python are put beside them that
    import cospadi, for programs that load with ``trust_remote_code=True`` and cannot import it themselves; nothing runs
    them unasked.

    Raises:
        UserError: ``folder`` is not ours to replace, the disk is full, or a name is not in ``source``.
    """
    from cospadi.quantizer import METHOD, format_version

    checkpoint, modules = Checkpoint(source), {}
    with new_path(folder) as partial:
        partial.mkdir()
        _write_shards(partial, _compressed(checkpoint, factors, modules), shard_bytes)
        if not modules:
            raise UserError("No projection was compressed: every one was left dense. Choose another ratio or method.")
        config = _plain_config(checkpoint)
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": format_version(modules),
            "modules": modules,
            "record": dict(record),
        }
        if stub:
            config["auto_map"] = _write_stub(partial, config)
        write_json(partial / "config.json", config)
        _copy_companions(source, partial)


def _plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config without what belongs to a compression or to code that is not copied."""
    return {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map")}


def _write_stub(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The ``auto_map`` that leads to it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = type(AutoConfig.for_model(config["model_type"]))
    model = AutoModelForCausalLM._model_mapping[kind].__name__
    (folder / f"{STUB}.py").write_text(_STUB.format(config=kind.__name__, model=model), encoding="utf-8")
    return {"AutoConfig": f"{STUB}.{kind.__name__}", "AutoModelForCausalLM": f"{STUB}.{model}"}


def _compressed(
    checkpoint: Checkpoint, factors: Iterable[tuple[str, Factors]], modules: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the compressed checkpoint; fills ``modules`` with what the config has to say."""
    replaced = set()
    names = set(checkpoint.names)
    first = WeakTensorKeyDictionary()  # whatever several hold is alive until the last of them has come
    for name, found in factors:
        if f"{name}.weight" not in names:
            raise UserError(
                f"The factors are of {name}, which {checkpoint.folder} does not hold. Factorize this model."
            )
        if isinstance(found, Dense) and not found.formats:
            continue
        bias = checkpoint.read(f"{name}.bias") if f"{name}.bias" in names else None
        layer = layer_of(found, bias)
        shared = shared_matrix(found)
        owner = name if shared is None else first.setdefault(shared, name)
        modules[name] = layer.spec | ({SHARES: owner} if owner != name else {})
        replaced |= {f"{name}.weight", f"{name}.bias"}
        tensors, parts = layer.state_dict(), _parts(name, modules[name])
        yield from ((full, tensors[part]) for part, full in parts.items() if full == f"{name}.{part}")
    yield from ((name, checkpoint.read(name)) for name in checkpoint.names if name not in replaced)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One safetensors file, or several and their index; each with the checksums of its tensors."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        sums = {CHECKSUMS: json.dumps({name: checksum(t) for name, t in shard.items()}), "format": "pt"}
        write_tensors(folder / f"{len(files)}.partial", shard, sums)
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and sum(t.numel() * t.element_size() for t in shard.values()) + size > shard_bytes:
            flush()
        shard[name] = tensor
        total += size
    flush()
    if len(files) == 1:
        (folder / "0.partial").rename(folder / "model.safetensors")
        return
    where = {}
    for i, names in enumerate(files):
        title = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.partial").rename(folder / title)
        where |= dict.fromkeys(names, title)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, licence: everything beside the weights that is no code."""
    for file in sorted(Path(source).iterdir()):
        known = file.suffix in {".json", ".txt", ".model", ".jinja", ".md"} or file.name.startswith("LICENSE")
        if file.is_file() and known and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def compression_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed checkpoint, checked.

    Raises:
        UserError: when ``folder`` is no folder, no checkpoint, not compressed by cospadi, or of a newer format.
    """
    from cospadi.quantizer import METHOD, CoSpaDiQuantizationConfig

    folder = Path(folder)
    try:
        config = read_json(folder / "config.json")
        found = config.get("quantization_config") or {}
        method = found.get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} holds no readable config.json, so it is no checkpoint. Name a folder written by cospadi compress."
        ) from error
    if method != METHOD:
        raise UserError(f"{folder} is not compressed by cospadi (quant_method: {method or 'none'}). Compress it first.")
    CoSpaDiQuantizationConfig(**found)
    return found


def load(folder: Path | str, dtype: str | torch.dtype = "auto", **options: Any) -> PreTrainedModel:
    """A compressed model, ready to use; ``options`` go to ``AutoModelForCausalLM.from_pretrained``.

    Everything is checked before a model is returned: format, checksums, and that no tensor is missing or left over.

    Raises:
        UserError: saying what is wrong with the checkpoint.
    """
    from transformers import AutoModelForCausalLM

    import cospadi.quantizer  # noqa: F401 - registers the format

    folder = Path(folder)
    compression_of(folder)
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype} is not known. Choose auto, {', '.join(DTYPES)}.")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(f"A safetensors file of {folder} is damaged or cut short ({error}). Copy it again.") from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"transformers cannot load {folder}: {brief(error)}. Copy or download it again.") from error
    wrong = {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        raise UserError(f"{folder} does not fill its model: {wrong}. Copy or download it again.")
    if getattr(model.config, "auto_map", None):
        del model.config.auto_map  # leads to a file that save_pretrained would not write
    return model.eval()


def ledger(folder: Path) -> dict[str, Any]:
    """Bytes of a compressed checkpoint, part by part and layer by layer, beside those of the dense one in 16 bits.

    Raises:
        UserError: see `compression_of`; or a shard is damaged.
    """
    folder = Path(folder)
    found = compression_of(folder)
    rows = []
    checkpoint = _readable(folder, found["modules"])
    for name, spec in found["modules"].items():
        parts = {part: full for part, full in _parts(name, spec).items() if full == f"{name}.{part}"}  # not another's
        sizes = {part: _bytes(checkpoint, full) for part, full in parts.items() if part != "bias"}
        dense = budget.dense_bits(spec["d_in"], spec["d_out"]) // 8
        rows.append({"name": name, **spec, "parts": sizes, "bytes": sum(sizes.values()), "dense_bytes": dense})
    files = sorted(folder.glob("*.safetensors"))
    compressed, dense = sum(r["bytes"] for r in rows), sum(r["dense_bytes"] for r in rows)
    everything = sum(_bytes(checkpoint, name) for name in checkpoint.names)
    return {
        "folder": str(folder),
        "format_version": found.get("format_version", 1),
        "record": found.get("record", {}),
        "projection_bytes": compressed,
        "dense_projection_bytes": dense,
        "removed": 1 - compressed / dense if dense else 0.0,
        "other_bytes": everything - compressed,
        "file_bytes": sum(file.stat().st_size for file in files),
        "projections": rows,
    }


def ledger_text(found: Mapping[str, Any]) -> str:
    """A ledger as a short table."""
    kinds: dict[str, dict[str, int]] = {}
    for row in found["projections"]:
        kind = kinds.setdefault(row["name"].rpartition(".")[2], dict.fromkeys(("matrices", "bytes", "dense_bytes"), 0))
        kind["matrices"] += 1
        kind["bytes"] += row["bytes"]
        kind["dense_bytes"] += row["dense_bytes"]
        for part, size in row["parts"].items():
            kind[part] = kind.get(part, 0) + size
    parts = sorted({part for kind in kinds.values() for part in kind} - {"matrices", "bytes", "dense_bytes"})
    header = ["projection", "matrices", *parts, "together", "dense, 16 bits", "removed"]
    rows = [
        [
            *(name, str(kind["matrices"]), *(_megabytes(kind.get(part, 0)) for part in parts)),
            *(_megabytes(kind["bytes"]), _megabytes(kind["dense_bytes"])),
            f"{1 - kind['bytes'] / kind['dense_bytes']:.2%}",
        ]
        for name, kind in kinds.items()
    ]
    removed = f"{found['removed']:.2%}"
    all_parts = [_megabytes(sum(kind.get(part, 0) for kind in kinds.values())) for part in parts]
    together = [_megabytes(found["projection_bytes"]), _megabytes(found["dense_projection_bytes"]), removed]
    rows.append(["all", str(len(found["projections"])), *all_parts, *together])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    dense = found["dense_projection_bytes"] + found["other_bytes"]
    lines.append(
        f"\n{found['folder']}: {_megabytes(found['file_bytes'])} MB of weights on disk; with dense 16-bit projections "
        f"{_megabytes(dense)} MB. Embeddings, norms and head take {_megabytes(found['other_bytes'])} MB of either. Sizes in MB."
    )
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def write_on(
    model: PreTrainedModel, folder: Path, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 42
) -> None:
    """Print ``prompt`` and what the model makes of it, token by token.

    Raises:
        UserError: the prompt has no tokens, or ``tokens`` or ``temperature`` is out of bounds.
    """
    from transformers import TextStreamer

    from cospadi.models import load_tokenizer

    if tokens < 1 or temperature < 0:
        raise UserError("--tokens must be 1 or more, --temperature 0 or more.")
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no tokenizer ({brief(error)}). Save it there: tokenizer.save_pretrained."
        ) from error
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not ids["input_ids"].numel():
        raise UserError("The prompt is empty. Write a few words to start from.")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        model.generate(
            **ids,
            max_new_tokens=tokens,
            streamer=TextStreamer(tokenizer),
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )


def densify(folder: Path, out: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """An ordinary dense checkpoint with the same outputs, for runtimes that know nothing of cospadi.

    Args:
        folder: a compressed checkpoint.
        out: folder to write.
        dtype: of all its tensors; by default that of the compressed checkpoint's config.
        shard_bytes: at most, of a file.

    Raises:
        UserError: see `compression_of`; a shard is damaged or missing; ``out`` cannot be written; a number does not fit.
    """
    folder, out = Path(folder), Path(out)
    found = compression_of(folder)
    check_output_folder(out)
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the compressed checkpoint itself. Name another folder to write.")
    checkpoint = _readable(folder, found["modules"])
    verify_files(_files(folder))
    dtype = dtype or str(checkpoint.config.get("dtype") or "float32")
    with new_path(out) as partial:
        partial.mkdir()
        _write_shards(partial, _dense(checkpoint, found["modules"], getattr(torch, dtype)), shard_bytes)
        write_json(partial / "config.json", _plain_config(checkpoint) | {"dtype": dtype})
        _copy_companions(folder, partial)


def _dense(
    checkpoint: Checkpoint, modules: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    compressed = set()
    for name, spec in modules.items():
        layer: CompressedLinear = empty_layer(spec)
        parts = _parts(name, spec)
        layer.load_state_dict({part: checkpoint.read(full) for part, full in parts.items()})
        layer.check()
        compressed |= set(parts.values())
        yield f"{name}.weight", _cast(f"{name}.weight", layer.dense_weight().T, dtype)
        if layer.bias is not None:
            yield f"{name}.bias", _cast(f"{name}.bias", layer.bias.detach(), dtype)
    for name in checkpoint.names:
        if name not in compressed:
            tensor = checkpoint.read(name)
            yield name, _cast(name, tensor, dtype) if tensor.is_floating_point() else tensor


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        largest = tensor.abs().max()
        raise UserError(f"{name} holds {largest:.1e}, which does not fit {dtype}. Take --dtype bfloat16 or float32.")
    return cast


def _parts(name: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The tensors of a compressed layer: part -> name in the checkpoint, which may be another layer's.

    Raises:
        UserError: when the description is not one of ours.
    """
    try:
        with torch.device("meta"):
            layer = empty_layer(spec)
            parts = {part: f"{name}.{part}" for part in layer.state_dict()}
        return parts | ({part: f"{spec[SHARES]}.{part}" for part in layer.shared_names} if SHARES in spec else {})
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.json describes {name} in a way this cospadi does not know ({error}).") from error


def _files(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint: those its index names."""
    if not (folder / INDEX).is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]


def _readable(folder: Path, modules: Mapping[str, dict[str, Any]]) -> Checkpoint:
    """The opened checkpoint, known to be whole.

    Raises:
        UserError: when a file or a tensor is missing, or a file is damaged.
    """
    missing = [file.name for file in _files(folder) if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}. Copy or download it again.")
    try:
        checkpoint = Checkpoint(folder)
    except SafetensorError as error:
        raise UserError(f"A safetensors file of {folder} is damaged or cut short ({error}). Copy it again.") from error
    wanted = {full for name, spec in modules.items() for full in _parts(name, spec).values()}
    ties(modules)  # refuses what cannot be shared
    if (folder / INDEX).is_file():
        wanted |= set(read_json(folder / INDEX)["weight_map"])
    gaps = sorted(wanted - set(checkpoint.names))
    if gaps:
        raise UserError(f"{folder} lacks the tensors {', '.join(gaps[:3])}. Copy or download it again.")
    return checkpoint


def _bytes(checkpoint: Checkpoint, name: str) -> int:
    """Of a tensor, without reading it."""
    piece = checkpoint._where[name].get_slice(name)
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
    size = widths[piece.get_dtype()]
    for side in piece.get_shape():
        size *= side
    return size
