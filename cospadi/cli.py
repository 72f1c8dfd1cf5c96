"""``cospadi <stage>``: what the rules run, and what can be pasted and run by hand.

Settings are Hydra overrides (``model=smollm2_135m factorization=cospadi factorization.compression_ratio=0.3``), files are
options. A mistake of the person typing ends in one sentence and exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from cospadi import __version__, records
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
    parser.add_argument("--version", action="version", version=f"cospadi {__version__}")
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
        "quantize",
        _quantize,
        "factors -> fewer bits",
        model="checkpoint",
        grams="grams",
        factors="factors of a block of layers",
        factorization="their record",
        quantized="safetensors to write",
        record="record to write",
    )
    stage(
        "evaluate",
        _evaluate,
        "measure the dense model, or a compressed one",
        model="checkpoint",
        documents="held-out text",
        second_text_files="documents of evaluation.second_text; none: there is none",
        factors_files="factors; none: the dense model",
        reference="hidden states of the dense model: written by its own evaluation, read by all others",
        samples="folder to write",
        record="record to write",
    )
    stage("tabulate", _tabulate, "tables and figures of a study", folder="folder to write")
    stage("track", _track, "a study's finished cells and tables as W&B runs", folder="folder to write")
    stage("workspace", _workspace, "the W&B view that compares them", definition="JSON to write")
    _add_plan(stages)
    _add_tools(stages)
    _add_benches(stages)
    return parser


def _add_plan(stages) -> None:
    summary = "what a study takes before its first job: cells, jobs, hours, disk, downloads"
    told = (
        f"{summary}. Hours are counted operations over this machine's speed, measured in seconds, or over --tflops. On the "
        "default model they are within a factor of two of what was recorded; on GPUs nothing was compared, take a factor of three."
    )
    sub = stages.add_parser("plan", help=summary, description=told, allow_abbrev=False)
    sub.set_defaults(run=_plan)
    sub.add_argument("overrides", nargs="*", metavar="study=name|key=value", help="settings, as Hydra takes them")
    sub.add_argument("--study", help="the same as study=name (default: default)")
    sub.add_argument(
        "--tflops",
        type=float,
        help="of another machine, in TF32 products: 100 for an A100 (default: measure this one)",
    )
    sub.add_argument("--device", default="auto", help="that is measured: auto, cpu or cuda (default %(default)s)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="the numbers in seconds and bytes, too")


def _add_tools(stages) -> None:
    """``compress``, ``info``, ``densify``, ``generate``: one model, without a study."""

    def tool(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = stages.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    compress = tool("compress", _compress, "make one model smaller: load, calibrate, factorize, save")
    compress.add_argument("model", help="a folder, a hub id, or the name of a file in conf/model")
    compress.add_argument("out", type=Path, help="folder to write")
    compress.add_argument("--ratio", type=float, help="fraction of 16-bit weights' bits to remove (default 0.2)")
    compress.add_argument("--method", default="cospadi_plus", help="a file in conf/factorization (default %(default)s)")
    compress.add_argument(
        "--quantize",
        default="none",
        metavar="BITS",
        help="a file in conf/quantization: int8, int4 … for what is stored after that (default %(default)s: 16 bits)",
    )
    compress.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    compress.add_argument(
        "--calibration", metavar="TEXT", help="a text file, a document a line, or a file in conf/text"
    )
    compress.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting, as Hydra takes it: --set calibration.n_samples=16; may be repeated",
    )
    compress.add_argument(
        "--stub", action="store_true", help="add lines that import cospadi for trust_remote_code=True"
    )
    compress.add_argument("--keep-work", action="store_true", help="leave <out>.work with grams and factors behind")

    info = tool("info", _info, "the bytes of a compressed checkpoint, part by part")
    info.add_argument("checkpoint", type=Path)
    info.add_argument("--json", action="store_true", help="as JSON, with every projection")

    densify = tool("densify", _densify, "an ordinary dense checkpoint from a compressed one, for any runtime")
    densify.add_argument("checkpoint", type=Path)
    densify.add_argument("out", type=Path, help="folder to write")
    dtypes = ("float16", "bfloat16", "float32")
    densify.add_argument("--dtype", choices=dtypes, help="of all tensors (default: that of the compressed checkpoint)")

    generate = tool("generate", _generate, "let a compressed model write on")
    generate.add_argument("checkpoint", type=Path)
    generate.add_argument("prompt")
    generate.add_argument("--tokens", type=int, default=100, help="at most (default %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    generate.add_argument("--seed", type=int, default=42, help="of the sampling (default %(default)s)")
    generate.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")


def _add_benches(stages) -> None:
    """``bench <what>``: no stage of a study, so without settings."""
    summary = "measure on this machine"
    bench = stages.add_parser("bench", help=summary, description=summary, allow_abbrev=False)
    benches = bench.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    summary = "the solvers of cospadi: seconds and errors"
    solver = benches.add_parser("solver", help=summary, description=summary, allow_abbrev=False)
    arguments.add_solver_options(solver)
    solver.set_defaults(run=_bench_solver)
    summary = "compressed models beside the dense one: bytes, prefill and decode speed"
    inference = benches.add_parser("inference", help=summary, description=summary, allow_abbrev=False)
    arguments.add_inference_options(inference)
    inference.set_defaults(run=_bench_inference)


def _config(options: argparse.Namespace):
    from cospadi.settings import load

    return load(options.overrides)


def _stage(name: str) -> ModuleType:
    """A file of ``cospadi.pipeline.stages``, loaded by its own commands alone: torch takes seconds."""
    return importlib.import_module(f"cospadi.pipeline.stages.{name}")


def _prepare_model(o: argparse.Namespace) -> None:
    _stage("sources").prepare_model(_config(o), o.folder, o.record)


def _prepare_text(o: argparse.Namespace) -> None:
    text, overrides = _named_text(o.overrides)
    config = _config(argparse.Namespace(overrides=overrides))
    texts = {t.name: t for t in (config.calibration.text, *config.evaluation.texts)}
    if text not in texts:
        raise UserError(f"text={text} is neither the calibration's nor the evaluation's text: {', '.join(texts)}.")
    _stage("sources").prepare_text(texts[text], o.documents, o.record)


def _named_text(overrides: Sequence[str]) -> tuple[str, list[str]]:
    named = [o.removeprefix("text=") for o in overrides if o.startswith("text=")]
    if len(named) != 1:
        raise UserError("prepare-text needs text=<name>, the name of a file in conf/text.")
    return named[0], [o for o in overrides if not o.startswith("text=")]


def _calibrate(o: argparse.Namespace) -> None:
    _stage("calibration").calibrate(_config(o), o.model, o.documents, o.grams, o.record)


def _search_ranks(o: argparse.Namespace) -> None:
    _stage("rank_search").search_ranks(_config(o), o.model, o.documents, o.grams, o.sensitivity)


def _choose_ranks(o: argparse.Namespace) -> None:
    _stage("rank_search").choose_ranks(_config(o), o.model, o.documents, o.grams, o.sensitivity, o.ranks)


def _factorize(o: argparse.Namespace) -> None:
    _stage("factorization").factorize(_config(o), o.model, o.grams, o.layers, o.factors, o.record, o.ranks)


def _quantize(o: argparse.Namespace) -> None:
    _stage("quantization").quantize(_config(o), o.model, o.grams, o.factors, o.factorization, o.quantized, o.record)


def _evaluate(o: argparse.Namespace) -> None:
    _stage("evaluation").evaluate(
        _config(o), o.model, o.documents, o.factors_files, o.reference, o.record, o.samples, o.second_text_files
    )


def _study(overrides: Sequence[str]):
    from cospadi.pipeline.study import Study

    named = [v.removeprefix("study=") for v in overrides if v.startswith("study=")]
    rest = [v for v in overrides if not v.startswith("study=")]
    return Study(named[0] if named else "default", rest)


def _tabulate(o: argparse.Namespace) -> None:
    _stage("tables").tabulate(_study(o.overrides), o.folder)


def _plan(o: argparse.Namespace) -> None:
    from cospadi.factorization.work import Speed
    from cospadi.pipeline import plan
    from cospadi.pipeline.speed import measure

    study = _study([*([f"study={o.study}"] if o.study else []), *o.overrides])
    dtypes = {config.model.dtype for config in map(study.config, study.study.models)}
    if o.tflops is not None:
        speed, how = Speed.of(o.tflops), f"GPU of {o.tflops:g} TFLOPS"
    else:
        speed, how = measure(o.device, min(dtypes)), "device like this one, as it is now"
    plans = plan.plan(study, speed)
    print(plan.report(study, plans, speed, how))
    if o.json:
        records.write_json(o.json, {"speed": asdict(speed), "models": [asdict(each) for each in plans]})


def _track(o: argparse.Namespace) -> None:
    _stage("tracking").track(_study(o.overrides), o.folder)


def _workspace(o: argparse.Namespace) -> None:
    _stage("tracking").workspace(_study(o.overrides), o.definition)


def _compress(o: argparse.Namespace) -> None:
    from cospadi.api import compress_to
    from cospadi.checkpoint.ledger import ledger_text

    overrides = [f"factorization={o.method}", f"quantization={o.quantize}"]
    overrides += [] if o.ratio is None else [f"factorization.compression_ratio={o.ratio}"]
    overrides += [f"{room}.device={o.device}" for room in ("calibration", "factorization", "quantization")]
    overrides += o.overrides
    print(ledger_text(compress_to(o.model, o.out, overrides, o.calibration, o.keep_work, o.stub)))


def _info(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.ledger import ledger, ledger_text

    found = ledger(o.checkpoint)
    print(json.dumps(found, indent=2, default=str) if o.json else ledger_text(found))


def _densify(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.write import densify

    densify(o.checkpoint, o.out, o.dtype)
    print(f"{o.out}: an ordinary checkpoint.")


def _generate(o: argparse.Namespace) -> None:
    from cospadi import devices
    from cospadi.checkpoint.generate import write_on
    from cospadi.checkpoint.read import load

    device = devices.pick(o.device, "--device")
    write_on(load(o.checkpoint).to(device), o.checkpoint, o.prompt, o.tokens, o.temperature, o.seed)


def _bench_solver(o: argparse.Namespace) -> None:
    from cospadi.bench import solver

    solver.run(o)


def _bench_inference(o: argparse.Namespace) -> None:
    from cospadi.bench import inference

    inference.run(o)


if __name__ == "__main__":
    sys.exit(main())
