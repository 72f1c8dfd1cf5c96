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
    run: Callable[[argparse.Namespace], int | None]
    """What it does; the exit code, where it can fail without an exception."""
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


def add_device_option(parser: argparse.ArgumentParser, what: str = "") -> None:
    """``--device``; its help begins with ``what``."""
    parser.add_argument("--device", default="auto", help=f"{what}auto, cpu or cuda (default %(default)s)")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """How a model is compressed; `recipe` makes settings of them."""
    parser.add_argument("--ratio", type=_fraction, help="fraction of 16-bit weights' bits to remove (default 0.2)")
    parser.add_argument("--method", help="a file in conf/factorization (default cospadi_plus)")
    parser.add_argument(
        "--quantize",
        metavar="BITS",
        help="a file in conf/quantization: int8, int4 … for what is stored after that (default none: 16 bits)",
    )
    parser.add_argument("--calibration", metavar="TEXT", help="a text file, a document a line, or a file in conf/text")
    add_settings_option(parser, "calibration.n_samples=16")


def _fraction(text: str) -> float:
    """
    Raises:
        argparse.ArgumentTypeError: it is not a number.
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a number. Write a fraction with a point: 0.3") from error


def recipe(o: argparse.Namespace) -> list[str]:
    """Settings of `add_recipe_options`, as Hydra takes them."""
    ratio = [] if o.ratio is None else [f"factorization.compression_ratio={o.ratio}"]
    chosen = [f"factorization={o.method or 'cospadi_plus'}", f"quantization={o.quantize or 'none'}"]
    return [*chosen, *ratio, *o.overrides]


def add_settings_option(parser: argparse.ArgumentParser, example: str) -> None:
    """Settings that have no option of their own."""
    parser.epilog = f"Any other setting is written as it is, anywhere among the options: {example}"
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"the same as KEY=VALUE without --set: {example}; may be repeated",
    )


def nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


def stage(name: str) -> ModuleType:
    """A file of ``cospadi.pipeline.stages``, loaded by its own commands alone: torch takes seconds."""
    return importlib.import_module(f"cospadi.pipeline.stages.{name}")
