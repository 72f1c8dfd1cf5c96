"""The command line: ``cospadi <command>``. The rules of a study run the same commands.

Settings are Hydra overrides (``model=smollm2_135m factorization=cospadi factorization.compression_ratio=0.3``), files are
options. A mistake of the person typing ends in one sentence and exit code 1. Nothing heavy is imported before a command
is known: torch takes seconds.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Sequence

from cospadi import __version__
from cospadi.cli import bench, model, plan, stages, study
from cospadi.errors import UserError, did_you_mean, require_extra

# Threads that wait for others give their core away; torch reads this once, when it is imported. Spinning, which is OpenMP's
# default, they took four times the core-seconds beside another program, and alone on the machine no less (docs/solver-log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
COMMANDS = (*model.COMMANDS, *plan.COMMANDS, *study.COMMANDS, *bench.COMMANDS, *stages.COMMANDS)
"""Every command, in the order of ``--help``."""
ONLY_OPTIONS = ("ratio", "size", "method", "quantize", "device", "dtype")
"""Names of options that are not also names of settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 when its files are written."""
    _replace_unknown_letters()
    parser = _parser()
    _complete(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    _require_readable(parser, arguments)
    options, rest = parser.parse_known_args(_stage_of_rules(arguments))
    _take_settings(options, rest)
    try:
        for extra in options.extras:
            require_extra(extra, f"cospadi {options.command}")
        code = options.run(options) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe shows here, not when Python ends
    except KeyboardInterrupt:
        print("\nStopped. Finished work is kept: type the same command again to go on.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read it has seen enough
        return 0
    except UserError as error:
        if os.environ.get("COSPADI_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # The system's own errors name a file. transformers raises others, about what it found in one.
        is_output_full = error.filename is None and error.errno == errno.ENOSPC
        if os.environ.get("COSPADI_TRACEBACK") or not (error.filename or is_output_full):
            raise
        if is_output_full:
            print(f"error: {error.strerror} while writing the answer. Let it go to another place.", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
            return 1
        print(f"error: {error.filename}: {error.strerror}. Check the paths of this command.", file=sys.stderr)
        return 1
    return code


def _replace_unknown_letters() -> None:
    """A terminal that is not in UTF-8 shows a question mark for a letter it does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _require_readable(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """
    Raises:
        SystemExit: with the usage, when the locale has no letters for what was typed: Python then keeps bytes in their place.
    """
    unreadable = [word for word in arguments if re.search("[\udc80-\udcff]", word)]
    if unreadable:
        word = os.fsencode(unreadable[0]).decode(errors="replace")
        parser.error(f"the locale of this terminal has no letters for {word}. Set PYTHONUTF8=1, and type it again.")


def _stage_of_rules(arguments: Sequence[str]) -> Sequence[str]:
    """``evaluate`` as the rules of a study call it is ``evaluate-cell``.

    Their text stays as it was: Snakemake compares it, and would measure every finished cell again.
    """
    is_of_rules = list(arguments[:1]) == ["evaluate"] and "--record" in arguments
    return ["evaluate-cell", *arguments[1:]] if is_of_rules else arguments


def _take_settings(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Settings stand anywhere among the options of a command that takes some; argparse leaves them in ``rest``.

    Raises:
        SystemExit: with the usage, when something else is left.
    """
    settings = [word for word in rest if re.match(r"[+~]{0,2}[\w./@]+=", word)]
    if "overrides" not in options:
        settings = []
    for word in settings:
        name, _, value = word.partition("=")
        if name in ONLY_OPTIONS and name in options:
            options.parser.error(f"{word} is an option: --{name} {value}")
    unknown = [word for word in rest if word not in settings]
    if unknown:
        quotes = " Put quotes around a text that has blanks." if _takes_text(options) else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}.{quotes}")
    if settings:
        options.overrides = [*options.overrides, *settings]


def _takes_text(options: argparse.Namespace) -> bool:
    """Whether the command takes a text that a person writes in the line, or a folder whose name may have blanks."""
    return "prompt" in options or "out" in options


class _Parser(argparse.ArgumentParser):
    """argparse's, with the nearest command where one is mistyped."""

    def error(self, message: str) -> None:
        unknown = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if unknown:
            near = did_you_mean(unknown[1], [command.name for command in COMMANDS])
            message = f"{unknown[1]} is not a command{near} `{self.prog} --help` lists all of them."
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cospadi",
        usage="cospadi [--version] COMMAND …",
        description="Compress a language model, or run the stages of a study.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cospadi {__version__}")
    commands = parser.add_subparsers(
        prog=parser.prog, required=True, metavar="COMMAND", help=argparse.SUPPRESS, parser_class=_Parser
    )
    for command in COMMANDS:
        sub = commands.add_parser(command.name, description=command.summary, allow_abbrev=False)
        sub.set_defaults(command=command.name, run=command.run, extras=command.extras, parser=sub)
        command.add_options(sub)
    return parser


def _listing() -> str:
    """All commands by who needs them, for ``--help``."""
    width = max(len(command.name) for command in COMMANDS)
    lines = []
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += ["", f"{group}:"]
        lines += [f"  {c.name:<{width}}  {c.summary}" for c in COMMANDS if c.group == group]
    return "\n".join([*lines, "", "`cospadi COMMAND --help` explains one of them."]).lstrip("\n")


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell where it asks for completions, and end."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # only here: no other start waits for it

        argcomplete.autocomplete(parser)
