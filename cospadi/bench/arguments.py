"""Options of ``cospadi bench``, apart from what they start so that the command line opens without torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_solver_options(parser: argparse.ArgumentParser) -> None:
    """Everything `cospadi.bench.solver.run` reads."""
    problems = parser.add_argument_group("what is solved (one of these; default: --results)")
    which = problems.add_mutually_exclusive_group()
    which.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="real projections, of a finished run"
    )
    which.add_argument("--matrix", metavar="D_INxD_OUT", help="a random target with a power-law spectrum: 576x1536")
    which.add_argument("--shape", metavar="NAME", help="a whole model of such targets, by htp alone: llama-3.2-1b")
    problems.add_argument("--layers", default="5,15,25", help="of the real projections (default %(default)s)")
    problems.add_argument("--projections", default="q,k,gate,down", help="of each layer (default %(default)s)")
    problems.add_argument("--ratios", help="compression ratios (default 0.2,0.3,0.4,0.5; for --shape 0.2)")
    problems.add_argument("--rho", type=float, default=2.0, help="atoms per non-zero (default %(default)s)")
    problems.add_argument("--seed", type=int, default=42, help="of every random number (default %(default)s)")

    how = parser.add_argument_group("how it is solved")
    how.add_argument("--solvers", metavar="A,B", help="default: all of them")
    how.add_argument("--rounds", type=int, default=60, help="of the K-SVD solvers (default %(default)s)")
    how.add_argument("--repeats", type=int, default=3, help="runs of a solver, unless slow (default %(default)s)")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    how.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's)")
    how.add_argument("--batch", type=int, help="matrices of --shape at a time (default: what fits; CPU: 1)")
    how.add_argument("--check", action="store_true", help="compare one matrix of --shape with float64 on the CPU")

    report = parser.add_argument_group("reports, besides the Markdown on stdout")
    report.add_argument("--json", type=Path, metavar="FILE", help="a list of measurements, kept up to date")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed")
    report.add_argument("--figure", type=Path, metavar="FILE", help="error over seconds, .png or .svg")


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Everything `cospadi.bench.inference.run` reads."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("checkpoints", nargs="*", type=Path, help="folders written by cospadi compress")
    what.add_argument("--dense", type=Path, metavar="FOLDER", help="the checkpoint that they were made from")
    what.add_argument("--shape", metavar="NAME", help="instead: the projections of a model, random: smollm2-135m")
    what.add_argument("--ratios", default="0.2,0.3,0.4,0.5", help="of --shape (default %(default)s)")
    what.add_argument("--rho", type=float, default=3.0, help="of --shape: atoms per non-zero (default %(default)s)")
    what.add_argument("--prefill", type=int, default=512, metavar="TOKENS", help="read at once (default %(default)s)")
    what.add_argument("--tokens", type=int, default=32, help="decoded one by one (default %(default)s)")

    how = parser.add_argument_group("how")
    how.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of activations")
    how.add_argument("--rounds", type=int, default=5, help="whose median counts (default %(default)s)")
    how.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    how.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's)")

    report = parser.add_argument_group("reports, besides the Markdown on stdout")
    report.add_argument("--json", type=Path, metavar="FILE", help="a list of measurements")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed")


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    """Everything `cospadi.pipeline.profile.run` reads."""
    what = parser.add_argument_group("what is measured")
    what.add_argument("--study", default="default", help="whose cells (default %(default)s)")
    what.add_argument(
        "--overrides",
        dest="of_study",  # ``overrides`` are settings typed one by one, which this command has none of
        metavar="SETTINGS",
        help="of the study, as for snakemake: 'study.methods=[svd]'",
    )
    what.add_argument("--model", help="one of the study's (default: its first)")
    what.add_argument("--blocks", type=int, default=1, help="of the model, from the first (default %(default)s)")
    what.add_argument("--threads", type=int, help="of torch on the CPU (default: torch's)")

    report = parser.add_argument_group("reports, besides the Markdown on stdout")
    report.add_argument("--json", type=Path, metavar="FILE", help="a list of measurements, kept up to date")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed")
