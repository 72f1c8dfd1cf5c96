"""``cospadi bench``: measurements of this machine."""

from __future__ import annotations

import argparse

from cospadi.bench import arguments
from cospadi.cli.command import MEASURING, Command


def _bench_options(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    for name, run, summary, add_options in (
        ("solver", _bench_solver, "the solvers of cospadi: seconds and errors", arguments.add_solver_options),
        (
            "inference",
            _bench_inference,
            "compressed models beside the dense one: bytes, prefill and decode speed",
            arguments.add_inference_options,
        ),
        (
            "pipeline",
            _bench_pipeline,
            "every stage of a study on the first blocks of its model: time, operations, memory",
            arguments.add_pipeline_options,
        ),
    ):
        sub = benches.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_options(sub)
        sub.set_defaults(run=run)


def _bench_solver(o: argparse.Namespace) -> None:
    from cospadi.bench import solver

    solver.run(o)


def _bench_inference(o: argparse.Namespace) -> None:
    from cospadi.bench import inference

    inference.run(o)


def _bench_pipeline(o: argparse.Namespace) -> None:
    from cospadi.pipeline import profile

    profile.run(o)


COMMANDS = (Command("bench", lambda o: None, "measure on this machine", MEASURING, _bench_options),)
