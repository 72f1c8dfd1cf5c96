"""Commands for a study: what it takes, its tables, its W&B runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cospadi.cli.command import STUDIES, Command, overrides_and, stage


def study_of(overrides: Sequence[str]):
    from cospadi.pipeline.study import Study

    names = [o.removeprefix("study=") for o in overrides if o.startswith("study=")]
    rest = [o for o in overrides if not o.startswith("study=")]
    return Study(names[0] if names else "default", rest)


def _tabulate(o: argparse.Namespace) -> None:
    stage("tables").tabulate(study_of(o.overrides), o.folder)


def _track(o: argparse.Namespace) -> None:
    stage("tracking").track(study_of(o.overrides), o.folder)


def _workspace(o: argparse.Namespace) -> None:
    stage("tracking").workspace(study_of(o.overrides), o.definition)


COMMANDS = (
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
