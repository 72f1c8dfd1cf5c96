"""Writing checkpoints: ``write`` streams a compressed one from a dense one and factors, ``densify`` an ordinary one again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoConfig

from cospadi.checkpoint.checksums import CHECKSUMS, checksum, verify_files
from cospadi.checkpoint.layers import SHARES
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.read import compression_of, opened, parts_of
from cospadi.checkpoint.specs import empty_layer, layer_of
from cospadi.checkpoint.transformers_plugin import METHOD, format_version
from cospadi.errors import UserError
from cospadi.experts import names_experts, stacked
from cospadi.factorization.factors import Dense, Factors, shared_matrix
from cospadi.models import Checkpoint, unread_tensors
from cospadi.records import check_output_folder, new_path, write_json, write_tensors
from cospadi.sources.architecture import auto_class, write_original_names
from cospadi.sources.files import INDEX, companions, weight_files

SHARD_BYTES = 2 * 2**30
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
    dtype: str | None = None,
) -> None:
    """The checkpoint ``source`` with the projections named in ``factors`` compressed, a shard in memory at a time.

    Factors that hold the same dictionary, or left factor, share it: the first stores it. Tensors that are not compressed
    keep their dtype, unless ``dtype`` names one; tokenizer and generation settings are copied. With ``stub`` a few lines of Python are put beside them that
    import cospadi, for programs that load with ``trust_remote_code=True`` and cannot import it themselves; nothing runs
    them unasked.

    Raises:
        UserError: ``folder`` is not ours to replace, the disk is full, or a name is not in ``source``.
    """
    checkpoint = Checkpoint(source)
    unread = unread_tensors(source)
    if unread:
        few = ", ".join(unread[:3]) + (" …" if len(unread) > 3 else "")
        print(f"Left out, as transformers does not load them: {len(unread)} tensors ({few}).", flush=True)
    modules = {}
    with new_path(folder) as partial:
        partial.mkdir()
        tensors = _compressed(checkpoint, factors, modules, set(unread), dtype)
        _write_shards(partial, tensors, shard_bytes)
        if not modules:
            raise UserError("No projection was compressed: every one was left dense. Choose another ratio or method.")
        config = _plain_config(checkpoint) | ({"dtype": dtype} if dtype else {})
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
    """The config without what belongs to a compression or to code that is not copied, its dtype under one key.

    transformers 4 wrote ``torch_dtype``, transformers 5 writes ``dtype`` and reads both.
    """
    left_out = ("quantization_config", "auto_map", "torch_dtype")
    config = {key: value for key, value in checkpoint.config.items() if key not in left_out}
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return config | ({"dtype": dtype} if dtype else {})


def _write_stub(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The ``auto_map`` that leads to it."""
    settings = AutoConfig.for_model(config["model_type"])
    kind = type(settings)
    model = auto_class(settings)._model_mapping[kind].__name__
    (folder / f"{STUB}.py").write_text(_STUB.format(config=kind.__name__, model=model), encoding="utf-8")
    return {"AutoConfig": f"{STUB}.{kind.__name__}", "AutoModelForCausalLM": f"{STUB}.{model}"}


def _compressed(
    checkpoint: Checkpoint,
    factors: Iterable[tuple[str, Factors]],
    modules: dict[str, dict[str, Any]],
    unread: set[str],
    dtype: str | None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the compressed checkpoint; fills ``modules`` with what the config has to say."""

    def other(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        return _cast(name, tensor, getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor

    replaced = set(unread)
    names = {*checkpoint.names, *checkpoint.parts}
    first = WeakTensorKeyDictionary()  # whatever several hold is alive until the last of them has come
    for name, compact in factors:
        if f"{name}.weight" not in names:
            raise UserError(
                f"The factors are of {name}, which {checkpoint.folder} does not hold. Factorize this model."
            )
        if isinstance(compact, Dense) and not compact.formats:
            continue
        bias = other(f"{name}.bias") if f"{name}.bias" in names else None
        layer = layer_of(compact, bias)
        shared = shared_matrix(compact)
        owner = name if shared is None else first.setdefault(shared, name)
        modules[name] = layer.spec | ({SHARES: owner} if owner != name else {})
        replaced |= {f"{name}.weight", f"{name}.bias"}
        tensors = layer.state_dict()
        parts = parts_of(name, modules[name])
        yield from ((full, tensors[part]) for part, full in parts.items() if full == f"{name}.{part}")
    rest = checkpoint.names_apart if names_experts(modules) else checkpoint.names
    yield from ((name, other(name)) for name in rest if name not in replaced)


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
    """Tokenizer, generation settings, licence: everything beside the weights that is not code."""
    for file in companions(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def refuse_taken(out: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: ``out`` holds a checkpoint, which is not to be replaced.
    """
    if (out / "config.json").is_file() and not overwrite:
        raise UserError(f"{out} holds a checkpoint. Add --overwrite to replace it, or name another folder.")


def densify(
    folder: Path, out: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES, overwrite: bool = False
) -> None:
    """An ordinary dense checkpoint with the same outputs, for runtimes that know nothing of cospadi.

    Args:
        folder: a compressed checkpoint.
        out: folder to write.
        dtype: of all its tensors; by default that of the compressed checkpoint's config.
        shard_bytes: at most, of a file.
        overwrite: replace a checkpoint that this project wrote to ``out``.

    Raises:
        UserError: see `compression_of`; a shard is damaged or missing; ``out`` is taken or cannot be written; a number does not fit.
    """
    folder = Path(folder)
    out = Path(out)
    compression = compression_of(folder)
    check_output_folder(out)
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the compressed checkpoint itself. Name another folder to write.")
    refuse_taken(out, overwrite)
    checkpoint = opened(folder, compression["modules"])
    verify_files(weight_files(folder))
    config = _plain_config(checkpoint)
    dtype = dtype or str(config.get("dtype") or "float32")
    with new_path(out) as partial:
        partial.mkdir()
        tensors = _dense(checkpoint, compression["modules"], getattr(torch, dtype))
        if names_experts(compression["modules"]):
            weights = {f"{name}.weight" for name in compression["modules"]}
            tensors = stacked(tensors, weights | set(checkpoint.names))
        _write_shards(partial, tensors, shard_bytes)
        write_json(partial / "config.json", config | {"dtype": dtype})
        write_original_names(partial, shard_bytes)
        _copy_companions(folder, partial)


def _dense(
    checkpoint: Checkpoint, modules: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    compressed = set()
    for name, spec in modules.items():
        layer: CompressedLinear = empty_layer(spec)
        parts = parts_of(name, spec)
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
