"""``cospadi plan``: what one compression, or a study, takes before it starts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cospadi import records
from cospadi.cli.command import YOUR_MODEL, Command, add_device_option, add_recipe_options, recipe
from cospadi.cli.study import study_of
from cospadi.errors import UserError

if TYPE_CHECKING:
    from cospadi.factorization.work import Speed


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}. Hours are counted operations over this machine's speed, measured in seconds, or over "
        "--tflops. On the default model they are within a factor of two of what was recorded; on GPUs nothing was compared, "
        "take a factor of three."
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="MODEL | study=name",
        help="a model, as cospadi compress takes it, with settings; or a study (default: study=default) with settings",
    )
    parser.add_argument("--study", help="the same as study=name")
    add_recipe_options(parser)
    parser.add_argument("--no-measure", action="store_true", help="of a model: as cospadi compress takes it")
    parser.add_argument(
        "--tflops",
        type=float,
        help="speed of another machine, in TF32 products: 100 for an A100 (default: measure this one)",
    )
    add_device_option(parser, "device to measure: ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also the numbers, in seconds and bytes")


def _plan(o: argparse.Namespace) -> None:
    models = [word for word in o.words if "=" not in word]
    o.overrides = [word for word in [*o.words, *o.overrides] if word not in models]
    if len(models) > 1:
        raise UserError(f"One model at a time: {', '.join(models)} are {len(models)}.")
    if models:
        _plan_model(o, models[0])
    else:
        _plan_study(o)


def _plan_model(o: argparse.Namespace, model: str) -> None:
    from cospadi.api import configured
    from cospadi.pipeline.compress_plan import plan_compress, report
    from cospadi.settings import CONF

    if (CONF / "study" / f"{model}.yaml").is_file() and not Path(model).exists():
        raise UserError(f"{model} is a study. Write study={model}.")
    config = configured(model, recipe(o), o.calibration)
    speed, machine = _speed(o, config.model.dtype)
    plan = plan_compress(config, speed, measure=not o.no_measure)
    print(report(config, plan, machine))
    if o.json:
        records.write_json(o.json, {"speed": asdict(speed), "plan": asdict(plan)})


def _plan_study(o: argparse.Namespace) -> None:
    from cospadi.pipeline import plan

    given = {"--ratio": o.ratio, "--method": o.method, "--quantize": o.quantize, "--calibration": o.calibration}
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise UserError(f"{unused[0]} is for one model, and none is named. Write cospadi plan MODEL {unused[0]} ….")
    study = study_of([*([f"study={o.study}"] if o.study else []), *o.overrides])
    dtypes = {config.model.dtype for config in map(study.config, study.study.models)}
    speed, machine = _speed(o, min(dtypes))
    plans = plan.plan(study, speed)
    print(plan.report(study, plans, speed, machine))
    if o.json:
        records.write_json(o.json, {"speed": asdict(speed), "models": [asdict(each) for each in plans]})


def _speed(o: argparse.Namespace, dtype: str) -> tuple[Speed, str]:
    """Rates of the machine that is asked about, and what it is."""
    from cospadi.factorization.work import Speed
    from cospadi.pipeline.speed import measure

    if o.tflops is not None:
        return Speed.of(o.tflops), f"GPU of {o.tflops:g} TFLOPS"
    return measure(o.device, dtype), "device like this one, as it is now"


COMMANDS = (
    Command(
        "plan",
        _plan,
        "what one compression, or a study, takes before it starts: memory, disk, hours, downloads",
        YOUR_MODEL,
        _plan_options,
    ),
)
