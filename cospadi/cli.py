"""``cospadi <stage>``: what the rules run, and what can be pasted and run by hand.

Settings are Hydra overrides (``model=smollm2_135m factorization=cospadi factorization.compression_ratio=0.3``), files are
options. A mistake of the person typing ends in one sentence and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cospadi.bench import arguments
from cospadi.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage; the exit code is 0 when its files are written."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        if os.environ.get("COSPADI_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if os.environ.get("COSPADI_TRACEBACK"):
            raise
        print(f"error: {error.filename}: {error.strerror}. Check the paths of this command.", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cospadi", description=__doc__.split("\n")[0], allow_abbrev=False)
    stages = parser.add_subparsers(title="stages", required=True, metavar="STAGE")

    def stage(name: str, run, summary: str, **files: str) -> None:
        sub = stages.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("overrides", nargs="*", metavar="group=option|key=value", help="settings, as Hydra takes them")
        for file, meaning in files.items():
            many = file.endswith("_files")
            sub.add_argument(
                f"--{file.replace('_', '-')}",
                type=str if file == "layers" else Path,
                nargs="*" if many else None,
                default=[] if many else None,
                required=not many and not meaning.startswith("(optional)"),
                help=meaning,
            )

    stage("prepare-model", _prepare_model, "fetch a model", folder="checkpoint to write", record="record to write")
    stage("prepare-text", _prepare_text, "fetch a text", documents="JSON list to write", record="record to write")
    stage(
        "calibrate",
        _calibrate,
        "collect one gram per shared input",
        model="checkpoint",
        documents="calibration text",
        grams="folder to write",
        record="record to write",
    )
    stage(
        "search-ranks",
        _search_ranks,
        "asvd: perplexity with each projection truncated alone",
        model="checkpoint",
        documents="calibration text",
        grams="grams",
        sensitivity="JSON to write",
    )
    stage(
        "choose-ranks",
        _choose_ranks,
        "asvd: ranks that meet the ratio or the perplexity budget",
        model="checkpoint",
        documents="calibration text",
        grams="grams",
        sensitivity="of search-ranks",
        ranks="JSON to write",
    )
    stage(
        "factorize",
        _factorize,
        "compress the projections of some layers",
        model="checkpoint",
        grams="grams",
        layers="first-last",
        factors="safetensors to write",
        record="record to write",
        ranks="(optional) of choose-ranks",
    )
    stage(
        "evaluate",
        _evaluate,
        "measure the dense model, or a compressed one",
        model="checkpoint",
        documents="held-out text",
        factors_files="factors; none: the dense model",
        reference="hidden states of the dense model: written by its own evaluation, read by all others",
        samples="folder to write",
        record="record to write",
    )
    stage("tabulate", _tabulate, "tables and figures of a study", folder="folder to write")
    _add_benches(stages)
    return parser


def _add_benches(stages) -> None:
    """``bench <what>``: no stage of a study, so without settings."""
    summary = "measure on this machine"
    bench = stages.add_parser("bench", help=summary, description=summary, allow_abbrev=False)
    benches = bench.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    summary = "the solvers of cospadi: seconds and errors"
    solver = benches.add_parser("solver", help=summary, description=summary, allow_abbrev=False)
    arguments.add_solver_options(solver)
    solver.set_defaults(run=_bench_solver)


def _config(options: argparse.Namespace):
    from cospadi.config import load

    return load(options.overrides)


def _prepare_model(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.prepare_model(_config(o), o.folder, o.record)


def _prepare_text(o: argparse.Namespace) -> None:
    from cospadi import stages

    text, overrides = _named_text(o.overrides)
    config = _config(argparse.Namespace(overrides=overrides))
    texts = {t.name: t for t in (config.calibration.text, config.evaluation.text)}
    if text not in texts:
        raise UserError(f"text={text} is neither the calibration's nor the evaluation's text: {', '.join(texts)}.")
    stages.prepare_text(texts[text], o.documents, o.record)


def _named_text(overrides: Sequence[str]) -> tuple[str, list[str]]:
    named = [o.removeprefix("text=") for o in overrides if o.startswith("text=")]
    if len(named) != 1:
        raise UserError("prepare-text needs text=<name>, the name of a file in conf/text.")
    return named[0], [o for o in overrides if not o.startswith("text=")]


def _calibrate(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.calibrate(_config(o), o.model, o.documents, o.grams, o.record)


def _search_ranks(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.search_ranks(_config(o), o.model, o.documents, o.grams, o.sensitivity)


def _choose_ranks(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.choose_ranks(_config(o), o.model, o.documents, o.grams, o.sensitivity, o.ranks)


def _factorize(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.factorize(_config(o), o.model, o.grams, o.layers, o.factors, o.record, o.ranks)


def _evaluate(o: argparse.Namespace) -> None:
    from cospadi import stages

    stages.evaluate(_config(o), o.model, o.documents, o.factors_files, o.reference, o.record, o.samples)


def _tabulate(o: argparse.Namespace) -> None:
    from cospadi import stages
    from cospadi.study import Study

    named = [v.removeprefix("study=") for v in o.overrides if v.startswith("study=")]
    rest = [v for v in o.overrides if not v.startswith("study=")]
    stages.tabulate(Study(named[0] if named else "default", rest), o.folder)


def _bench_solver(o: argparse.Namespace) -> None:
    from cospadi.bench import solver

    solver.run(o)


if __name__ == "__main__":
    sys.exit(main())
