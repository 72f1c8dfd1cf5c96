"""What a command of ``cospadi`` is, and the options that several of them have."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

YOUR_MODEL = "your model"
STUDIES = "studies"
MEASURING = "measuring"
STAGES = "stages, which the rules of a study run"


@dataclass(frozen=True)
class Command:
    """A command: what it is called, what it does, and who needs it."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    group: str
    add_options: Callable[[argparse.ArgumentParser], None]
    extras: tuple[str, ...] = ()
    """Extras of the package that it cannot do without."""


def overrides_and(**files: str) -> Callable[[argparse.ArgumentParser], None]:
    """Options of a command that takes settings, and files to read and write."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "overrides", nargs="*", metavar="group=option|key=value", help="settings, as Hydra takes them"
        )
        for file, meaning in files.items():
            several = file.endswith("_files")
            parser.add_argument(
                f"--{file.replace('_', '-')}",
                type=str if file == "layers" else Path,
                nargs="*" if several else None,
                default=[] if several else None,
                required=not several and not meaning.startswith("(optional)"),
                help=meaning,
            )

    return add


def nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


def stage(name: str) -> ModuleType:
    """A file of ``cospadi.pipeline.stages``, loaded by its own commands alone: torch takes seconds."""
    return importlib.import_module(f"cospadi.pipeline.stages.{name}")
