"""Writing results: whole or not at all, with the settings, versions, hashes, seconds and memory behind them."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cospadi.errors import UserError

PACKAGES = ("cospadi", "torch", "transformers", "datasets", "lm_eval", "hydra-core", "snakemake", "numpy", "pandas")
DENSE = "dense"
"""The uncompressed model, in paths and tables."""
_MARK = ".cospadi"
_AS_WRITTEN = " as written: sha256 "
"""In a line of the mark, between a file and its hash."""
_MARK_TEXT = "Written by cospadi, which may replace this folder."
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the block ends well, and vanishes when it does not.

    Works for a file and for a folder. An existing file is replaced; an existing folder only when it is empty, or was
    written here before and holds nothing else. Its file ``.cospadi`` says so and lists its files, so that neither a
    mistyped path nor a second run ever deletes what somebody put there.

    Raises:
        UserError: when ``path`` is a folder that this project did not write, before the block runs; when the disk is full. What was at
            ``path`` before is untouched.
    """
    path = Path(path)
    _refuse_foreign_folder(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _told_when_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            yield partial
            if partial.is_dir():
                _mark(partial)
                _step_aside(path)
            os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def _told_when_full(path: Path) -> Iterator[None]:
    """
    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"No room left on the disk while writing {path} ({os.strerror(error.errno)}). "
                "Finished results are intact: free some space and start again."
            ) from error
        raise


def _mark(folder: Path) -> None:
    """Note in a folder that is about to appear which files are in it."""
    files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if not file.is_dir()]
    (folder / _MARK).write_text("\n".join([_MARK_TEXT, *files]) + "\n", encoding="utf-8")


def _refuse_foreign_folder(path: Path) -> None:
    """
    Raises:
        UserError: when ``path`` is a folder with something in it that was not written here.
    """
    if not path.is_dir() or next(path.iterdir(), None) is None:
        return
    mark = path / _MARK
    if not mark.is_file():
        raise UserError(f"{path} is a folder that this project did not write, so it is left alone. Name another path.")
    listed = mark.read_text(encoding="utf-8").splitlines()[1:]
    if not listed:  # a work folder, or one that an earlier version wrote
        return
    hashes = dict(line.partition(_AS_WRITTEN)[::2] for line in listed)
    foreign = []
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        is_edited = bool(hashes.get(name)) and file_hash(file) != hashes[name]
        if not file.is_dir() and name != _MARK and (name not in hashes or is_edited):
            foreign.append(name)
    if foreign:
        raise UserError(
            f"{path} holds files that this project did not write ({', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''}), "
            "so it is left alone. Move them, or name another path."
        )


def add_to_folder(folder: Path, name: str, text: str) -> None:
    """One more file of ours in a folder that was written here; edited by somebody, it is theirs."""
    write_text(Path(folder) / name, text)
    with (Path(folder) / _MARK).open("a", encoding="utf-8") as mark:
        mark.write(f"{name}{_AS_WRITTEN}{text_hash(text)}\n")


def own_folder(path: Path) -> Path:
    """``path`` as a folder of this project, made if needed: what is in it may be replaced or removed.

    Raises:
        UserError: when it is a folder that this project did not write, or not a folder.
    """
    path = Path(path)
    check_output_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / _MARK).write_text(f"{_MARK_TEXT}\n", encoding="utf-8")
    return path


def check_output_folder(path: Path) -> None:
    """Check a path before long work that ends in a folder there.

    Raises:
        UserError: when ``path`` is a file or a link, or a folder with something in it that this project did not write.
    """
    path = Path(path)
    _refuse_foreign_folder(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path} is a file or a link, and a folder is to be written there. Name another path.")


def _step_aside(path: Path) -> None:
    """Take away a folder of our own that is about to be replaced."""
    if path.is_dir() and not path.is_symlink():
        _refuse_foreign_folder(path)  # it may have come while the block ran
        shutil.rmtree(path)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while writing ``path`` left beside it."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if not pid.isdigit() or int(pid) == os.getpid() or _alive(int(pid)):
            continue
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    with new_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON; a non-finite number is written as a string (JSON has none)."""
    write_text(path, json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """``tensors`` (name -> torch tensor) as one safetensors file; the same content gives the same bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_path(path) as partial:
        try:
            save_file(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, dict(metadata or {})
            )
        except SafetensorError as error:  # hides the error number of the failed write in its text
            for number in _NO_SPACE:
                if f"os error {number}" in str(error).lower():
                    raise OSError(number, os.strerror(number)) from error
            raise
        _sort_metadata(partial)
        partial.chmod(0o666 & ~_umask())  # safetensors leaves 0600, which nobody else can read


def _sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in order: safetensors writes it in another one every time.

    The header, JSON after its length in 8 bytes, is as long in any order.
    """
    with file.open("r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
            if len(written) > length:
                raise OSError(f"The header of {file} grew from {length} to {len(written)} bytes when it was sorted.")
            content.seek(8)
            content.write(written.ljust(length))


def _umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def _jsonable(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_jsonable(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(float(content))
    if isinstance(content, Path):
        return str(content)
    return content


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MiB; plus that of the GPU when one was used."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak += torch.cuda.max_memory_allocated()
    return peak / 2**20


class Record:
    """Record of a stage: made before the work, written by ``finish``."""

    def __init__(self, room: str, settings: Any, inputs: Mapping[str, str] | None = None):
        self.started = time.time()
        self.content: dict[str, Any] = {"room": room, "settings": settings, "inputs": dict(inputs or {})}

    def finish(self, path: Path, **results: Any) -> dict[str, Any]:
        """Write settings, results, versions, seconds and peak memory to ``path`` and return them."""
        self.content |= results
        self.content |= {
            "seconds": time.time() - self.started,
            "peak_memory_mb": peak_memory_mb(),
            "versions": versions(),
            "machine": _machine(),
        }
        write_json(path, self.content)
        return self.content


def key_of(*parts: object) -> str:
    """Hash of what results depend on: ``parts``, as JSON, and the versions of what is installed."""
    return text_hash(json.dumps([*parts, versions()], sort_keys=True))


class FinishedRows:
    """What a stage has found out so far, a line for every name, so that a stage that was cut off goes on after it.

    The lines lie in a hidden file beside the result. They are used again as long as ``key`` is the same: whatever they depend on.
    """

    def __init__(self, result: Path, key: str) -> None:
        self.path = result.with_name(f".{result.name}.rows")
        self._rows: dict[str, Any] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        first, *lines = text.splitlines() or [""]
        for line in lines if first == key else []:
            with suppress(ValueError, TypeError):  # half a line: the process was killed while it wrote
                name, row = json.loads(line)
                self._rows[name] = row
        write_text(self.path, "".join(f"{line}\n" for line in (key, *map(json.dumps, self._rows.items()))))

    def get(self, name: str) -> Any:
        """The row of ``name``; ``None`` where there is none yet."""
        return self._rows.get(name)

    def keep(self, name: str, row: Any) -> None:
        with _told_when_full(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps((name, row)) + "\n")

    def remove(self) -> None:
        """Once the result is written."""
        self.path.unlink(missing_ok=True)


def _machine() -> dict[str, Any]:
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    torch = sys.modules.get("torch")
    return machine | ({"threads": torch.get_num_threads()} if torch is not None else {})


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a bare GPU box has torch and little else
    return installed


def file_hashes(*files: Path) -> dict[str, str]:
    return {str(file): file_hash(file) for file in files}


RESULTS = "results"
