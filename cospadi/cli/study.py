"""Commands for a study: what it takes, its tables, its W&B runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cospadi import records
from cospadi.cli.command import STUDIES, Command, overrides_and, stage


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}. Hours are counted operations over this machine's speed, measured in seconds, or over "
        "--tflops. On the default model they are within a factor of two of what was recorded; on GPUs nothing was compared, "
        "take a factor of three."
    )
    parser.add_argument("overrides", nargs="*", metavar="study=name|key=value", help="settings, as Hydra takes them")
    parser.add_argument("--study", help="the same as study=name (default: default)")
    parser.add_argument(
        "--tflops",
        type=float,
        help="of another machine, in TF32 products: 100 for an A100 (default: measure this one)",
    )
    parser.add_argument("--device", default="auto", help="device to measure: auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also the numbers, in seconds and bytes")


def _plan(o: argparse.Namespace) -> None:
    from cospadi.factorization.work import Speed
    from cospadi.pipeline import plan
    from cospadi.pipeline.speed import measure

    study = _study([*([f"study={o.study}"] if o.study else []), *o.overrides])
    dtypes = {config.model.dtype for config in map(study.config, study.study.models)}
    if o.tflops is not None:
        speed = Speed.of(o.tflops)
        machine = f"GPU of {o.tflops:g} TFLOPS"
    else:
        speed = measure(o.device, min(dtypes))
        machine = "device like this one, as it is now"
    plans = plan.plan(study, speed)
    print(plan.report(study, plans, speed, machine))
    if o.json:
        records.write_json(o.json, {"speed": asdict(speed), "models": [asdict(each) for each in plans]})


def _study(overrides: Sequence[str]):
    from cospadi.pipeline.study import Study

    names = [o.removeprefix("study=") for o in overrides if o.startswith("study=")]
    rest = [o for o in overrides if not o.startswith("study=")]
    return Study(names[0] if names else "default", rest)


def _tabulate(o: argparse.Namespace) -> None:
    stage("tables").tabulate(_study(o.overrides), o.folder)


def _track(o: argparse.Namespace) -> None:
    stage("tracking").track(_study(o.overrides), o.folder)


def _workspace(o: argparse.Namespace) -> None:
    stage("tracking").workspace(_study(o.overrides), o.definition)


COMMANDS = (
    Command(
        "plan",
        _plan,
        "what a study takes before its first job: cells, jobs, hours, disk, downloads",
        STUDIES,
        _plan_options,
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
