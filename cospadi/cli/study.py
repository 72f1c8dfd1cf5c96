"""Commands for a study: computing it, its tables, its W&B runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from cospadi import records
from cospadi.cli.command import STUDIES, Command, overrides_and, stage


def study_of(overrides: Sequence[str]):
    from cospadi.pipeline.study import Study

    names = [o.removeprefix("study=") for o in overrides if o.startswith("study=")]
    rest = [o for o in overrides if not o.startswith("study=")]
    return Study(names[0] if names else "default", rest)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute a study with Snakemake: what is finished is kept, and only what is missing or out of date is computed."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="study=name|key=value", help="a study (default: study=default) and settings"
    )
    parser.add_argument("--cores", default="all", metavar="N", help="processor cores to use (default %(default)s)")
    parser.add_argument("-n", "--dry-run", action="store_true", help="say how many jobs would run")
    parser.add_argument(
        "--snakemake",
        default="",
        metavar="OPTIONS",
        help="further options of Snakemake in one pair of quotes: --snakemake='--keep-going --until calibrate'",
    )


def _run(o: argparse.Namespace) -> int:
    from cospadi.pipeline import run

    run.require_snakefile([])
    dry_run = ["--dry-run"] if o.dry_run else []
    further = shlex.split(o.snakemake)
    return run.main(["--cores", o.cores, *dry_run, *further, "--config", *study_of(o.overrides).snakemake_config])


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute every combination of the values that are listed: cospadi sweep model=a,b factorization=svd_llm,cospadi"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="group=a,b|key=value", help="values and settings, as Hydra takes them"
    )


def _sweep(o: argparse.Namespace) -> int:
    from cospadi.pipeline.sweep import main

    return main(["--multirun", *o.overrides])


def _tabulate(o: argparse.Namespace) -> None:
    _require_results()
    stage("tables").tabulate(study_of(o.overrides), o.folder)


def _track(o: argparse.Namespace) -> None:
    _require_results()
    stage("tracking").track(study_of(o.overrides), o.folder)


def _workspace(o: argparse.Namespace) -> None:
    _require_results()
    stage("tracking").workspace(study_of(o.overrides), o.definition)


def _require_results() -> None:
    """
    Raises:
        UserError: there are neither results nor a Snakefile in this folder.
    """
    from cospadi.pipeline import run

    # A study computed with `snakemake --directory` has its results where no Snakefile is.
    if not Path(records.RESULTS).is_dir():
        run.require_snakefile([])


COMMANDS = (
    Command("run", _run, "compute a study, whole or what is missing of it", STUDIES, _run_options, ("study",)),
    Command(
        "sweep",
        _sweep,
        "compute every combination of models, methods, ratios and quantizations",
        STUDIES,
        _sweep_options,
        ("study",),
    ),
    Command(
        "tabulate",
        _tabulate,
        "tables and figures of a study",
        STUDIES,
        overrides_and(folder="folder to write"),
        ("study",),
    ),
    Command(
        "track",
        _track,
        "a study's finished cells and tables as W&B runs",
        STUDIES,
        overrides_and(folder="folder to write"),
        ("study", "track"),
    ),
    Command(
        "workspace",
        _workspace,
        "the W&B view that compares them",
        STUDIES,
        overrides_and(definition="JSON to write"),
        ("study", "track"),
    ),
)
