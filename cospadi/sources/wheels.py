"""Single files out of published Python wheels, fetched with pip by exact version and sha256."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cospadi import records
from cospadi.errors import UserError
from cospadi.sources.addresses import WHEEL, brief

PIP_SECONDS = 1800
_PYTHON = "3.11"  # for wheels of any Python: the oldest that this project supports, the same on every machine
_ADDRESS = re.compile(r"wheel:(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[A-Za-z0-9][\w.+!-]*)/(?P<member>.+)")
_FETCHING = ".fetching-"


@dataclass(frozen=True)
class WheelFile:
    """One file inside one published wheel."""

    package: str
    version: str
    member: str
    tag: str
    sha256: str
    setting: str
    """Which setting named it, for messages: ``text`` or ``model``."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def parse(source: str, tag: str, sha256: str, setting: str) -> WheelFile:
    """
    >>> parse("wheel:gensim==4.4.0/gensim/a.txt", "py3-none-any", "0" * 64, "text").requirement
    'gensim==4.4.0'

    Raises:
        UserError: when the address is not ``wheel:<package>==<version>/<path inside>``, when its path would leave the
            wheel, or when the tag or the sha256 is malformed.
    """
    match = _ADDRESS.fullmatch(source)
    if match is None:
        raise UserError(f"{setting}.source={source} is malformed. Write {WHEEL}<package>==<version>/<path inside>.")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(
            f"{setting}.sha256={sha256!r} is not the 64-digit sha256 of a wheel. Copy it from the registry."
        )
    _check_member(match["member"], setting)
    pip_selection(tag, setting)
    return WheelFile(match["package"], match["version"], match["member"], tag, sha256.lower(), setting)


def pip_selection(tag: str, setting: str = "text") -> list[str]:
    """The pip options that select the wheel with ``tag`` on any operating system and any Python.

    >>> pip_selection("cp311-cp311-manylinux_2_28_x86_64")[:4]
    ['--python-version', '3.11', '--implementation', 'cp']
    >>> pip_selection("py2.py3-none-any")
    ['--python-version', '3.11', '--implementation', 'py', '--abi', 'none', '--platform', 'any']

    Raises:
        UserError: when ``tag`` is not ``<python>-<abi>-<platform>``.
    """
    match = re.fullmatch(r"(?:\w+\.)*([a-z]{2})(\d)(\d*)-([\w.]+)-([\w.]+)", tag)
    if match is None:
        raise UserError(f"{setting}.wheel_tag={tag} is not <python>-<abi>-<platform>, for instance py3-none-any.")
    implementation, major, minor, abis, platforms = match.groups()
    options = ["--python-version", f"{major}.{minor}" if minor else _PYTHON, "--implementation", implementation]
    for abi in abis.split("."):
        options += ["--abi", abi]
    for platform in platforms.split("."):
        options += ["--platform", platform]
    return options


def cache_folder() -> Path:
    """``$COSPADI_CACHE/wheels``, or ``~/.cache/cospadi/wheels``."""
    return Path(os.environ.get("COSPADI_CACHE") or Path.home() / ".cache" / "cospadi").expanduser() / "wheels"


def fetch(wheel: WheelFile) -> Path:
    """The wheel in the user's cache, with the right sha256; fetched when it is not there, or no longer right.

    Raises:
        UserError: when pip cannot fetch it, when what it fetched has another sha256, or when the disk is full. The
            cache then holds nothing of it.
    """
    cached = cache_folder() / f"{wheel.package}-{wheel.version}-{wheel.sha256[:16]}.whl"
    if cached.is_file() and records.file_hash(cached) == wheel.sha256:
        return cached
    with records.new_path(cached) as partial:
        _sweep(cached.parent)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=_FETCHING) as folder:
            fetched = _download(wheel, Path(folder))
            digest = records.file_hash(fetched)
            if digest != wheel.sha256:
                raise UserError(
                    f"The wheel {fetched.name} has sha256 {digest}, but {wheel.setting}.sha256 is {wheel.sha256}. "
                    "It is not the file that the settings describe: correct the setting only if you trust this file."
                )
            os.replace(fetched, partial)
    return cached


def _sweep(folder: Path) -> None:
    """Remove what fetches that were killed left behind: nobody downloads for a day."""
    for left in folder.glob(f"{_FETCHING}*"):
        with contextlib.suppress(OSError):  # another process may be sweeping too
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)


def _download(wheel: WheelFile, folder: Path) -> Path:
    """The one wheel that pip puts into ``folder``."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{wheel.setting}.source needs pip to fetch {wheel.requirement}, and this Python has none. "
            f"Install it with: {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(folder)]
    command += [*pip_selection(wheel.tag, wheel.setting), "--", wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Fetching {wheel.requirement} ({wheel.setting}.source) took more than {PIP_SECONDS} s and was stopped. "
            "Check the network and start again."
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise UserError(
            f"pip could not fetch {wheel.requirement} with tag {wheel.tag} ({wheel.setting}.source): "
            f"{_last_line(done)}. Check the network, the version, and {wheel.setting}.wheel_tag."
        )
    return wheels[0]


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    last = (errors or lines or [f"pip ended with {done.returncode} and said nothing"])[-1]
    return last.removeprefix("ERROR:").strip().rstrip(".")


def extract(wheel: WheelFile, archive: Path, target: Path) -> Path:
    """Write the wheel's one member to ``target``, whole or not at all, and return ``target``.

    Raises:
        UserError: when the archive is damaged, or has no such member (near names are listed).
    """
    _check_member(wheel.member, wheel.setting)
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(_member(wheel, opened)) as packed,
            records.new_path(target) as partial,
            open(partial, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(
            f"The wheel {archive.name} is damaged or truncated: {brief(error)}. Delete {archive} and start again."
        ) from error
    return target


def _member(wheel: WheelFile, opened: zipfile.ZipFile) -> zipfile.ZipInfo:
    names = [name for name in opened.namelist() if not name.endswith("/")]
    if wheel.member not in names:
        near = difflib.get_close_matches(wheel.member, names, n=4, cutoff=0.3) or names[:4]
        raise UserError(
            f"{wheel.setting}.source: the wheel {wheel.requirement} holds no {wheel.member}. "
            f"Correct the path; near names are: {', '.join(near)}."
        )
    return opened.getinfo(wheel.member)


def _check_member(member: str, setting: str) -> None:
    """Refuse a path that could lead out of the archive, on any operating system."""
    parts = PurePosixPath(member.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or re.match(r"[A-Za-z]:", member):
        raise UserError(
            f"{setting}.source: the path {member} would leave the wheel. Give a path inside it, without '..'."
        )
