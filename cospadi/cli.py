"""The command line: ``cospadi <command>``. The rules of a study run the same commands.

Settings are Hydra overrides (``model=smollm2_135m factorization=cospadi factorization.compression_ratio=0.3``), files are
options. A mistake of the person typing ends in one sentence and exit code 1. Nothing heavy is imported before a command
is known: torch takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from cospadi import __version__, records
from cospadi.bench import arguments
from cospadi.errors import UserError, did_you_mean, require_extra

YOUR_MODEL = "your model"
STUDIES = "studies"
MEASURING = "measuring"
STAGES = "stages, which the rules of a study run"
DTYPES = ("float16", "bfloat16", "float32")
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Command:
    """A command: what it is called, what it does, and who needs it."""

    name: str
    run: Callable[[argparse.Namespace], None]
    summary: str
    group: str
    add_options: Callable[[argparse.ArgumentParser], None]
    extras: tuple[str, ...] = ()
    """Extras of the package that it cannot do without."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 when its files are written."""
    parser = _parser()
    _complete(parser)
    options = parser.parse_args(_stage_of_rules(sys.argv[1:] if arguments is None else arguments))
    try:
        for extra in options.extras:
            require_extra(extra, f"cospadi {options.command}")
        options.run(options)
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
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if os.environ.get("COSPADI_TRACEBACK"):
            raise
        print(f"error: {error.filename}: {error.strerror}. Check the paths of this command.", file=sys.stderr)
        return 1
    return 0


def _stage_of_rules(arguments: Sequence[str]) -> Sequence[str]:
    """``evaluate`` as the rules of a study call it is ``evaluate-cell``.

    Their text stays as it was: Snakemake compares it, and would measure every finished cell again.
    """
    is_of_rules = list(arguments[:1]) == ["evaluate"] and "--record" in arguments
    return ["evaluate-cell", *arguments[1:]] if is_of_rules else arguments


class _Parser(argparse.ArgumentParser):
    """argparse's, with the nearest command where one is mistyped."""

    def error(self, message: str) -> None:
        unknown = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if unknown:
            near = did_you_mean(unknown[1], [command.name for command in COMMANDS])
            message = f"{unknown[1]} is not a command{near} `{self.prog} --help` lists all of them."
        setting = re.match(r"unrecognized arguments: (\S+=\S*)", message)
        if setting:
            message = (
                f"{setting[1]} is not taken here. Settings stand together, before or after all options; `cospadi compress` "
                f"takes each with --set: --set {setting[1]}."
            )
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS, parser_class=_Parser)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, description=command.summary, allow_abbrev=False)
        sub.set_defaults(command=command.name, run=command.run, extras=command.extras)
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


# --- your model


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a hub id, or the name of a file in conf/model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--ratio", type=float, help="fraction of 16-bit weights' bits to remove (default 0.2)")
    parser.add_argument("--method", default="cospadi_plus", help="a file in conf/factorization (default %(default)s)")
    parser.add_argument(
        "--quantize",
        default="none",
        metavar="BITS",
        help="a file in conf/quantization: int8, int4 … for what is stored after that (default %(default)s: 16 bits)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--calibration", metavar="TEXT", help="a text file, a document a line, or a file in conf/text")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting, as Hydra takes it: --set calibration.n_samples=16; may be repeated",
    )
    parser.add_argument("--stub", action="store_true", help="add lines that import cospadi for trust_remote_code=True")
    parser.add_argument("--keep-work", action="store_true", help="keep <out>.work with grams and factors")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of embeddings, norms and head (default: that of the model; factors have 16 bits)",
    )
    parser.add_argument("--no-measure", action="store_true", help="do not load the models to measure what it cost")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that an earlier run wrote to OUT"
    )


def _compress(o: argparse.Namespace) -> None:
    from cospadi.api import compress_to
    from cospadi.checkpoint.ledger import ledger_text
    from cospadi.pipeline.outcome import Outcome, outcome_text

    overrides = [f"factorization={o.method}", f"quantization={o.quantize}"]
    overrides += [] if o.ratio is None else [f"factorization.compression_ratio={o.ratio}"]
    overrides += [f"{room}.device={o.device}" for room in ("calibration", "factorization", "quantization")]
    overrides += o.overrides
    measure = not o.no_measure
    sizes = compress_to(o.model, o.out, overrides, o.calibration, o.keep_work, o.stub, o.overwrite, measure, o.dtype)
    print(ledger_text(sizes))
    if sizes.get("outcome"):
        print("\n" + outcome_text(Outcome(**sizes["outcome"])))
    print(
        f'\nNext: cospadi generate {o.out} "The capital of France is", or cospadi evaluate {o.out} --dense {o.model}; '
        f"{o.out}/README.md says how it is loaded."
    )


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder that cospadi compress wrote")
    parser.add_argument("--json", action="store_true", help="as JSON, with every projection")


def _info(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.ledger import ledger, ledger_text

    sizes = ledger(o.checkpoint)
    print(json.dumps(sizes, indent=2, default=str) if o.json else ledger_text(sizes))


def _densify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder that cospadi compress wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: that of the compressed checkpoint)")


def _densify(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.write import densify

    densify(o.checkpoint, o.out, o.dtype)
    print(f"{o.out}: an ordinary checkpoint.")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder that cospadi compress wrote, any other model's folder, or a hub id")
    parser.add_argument("--dense", metavar="MODEL", help="the model that it is compared with, token by token")
    parser.add_argument(
        "--text",
        default="wikipedia_articles",
        metavar="TEXT",
        help="a text file, a document a line, or a file in conf/text (default %(default)s: the default study's)",
    )
    parser.add_argument("--tasks", default="", help="tasks of lm-eval as well: arc_easy,piqa; needs cospadi[study]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which both run (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further setting, as Hydra takes it: --set evaluation.n_windows=32; may be repeated",
    )


def _evaluate(o: argparse.Namespace) -> None:
    from cospadi.pipeline.measurement import evaluate, report_text
    from cospadi.settings import load, text_overrides

    settings = ["evaluation=embedded", *text_overrides("evaluation.text", o.text), "evaluation.n_windows=null"]
    settings += [f"evaluation.tasks=[{o.tasks}]", f"evaluation.device={o.device}"]
    report = evaluate(o.model, o.dense, load([*settings, *o.overrides]).evaluation, o.dtype, quiet=o.json)
    print(json.dumps(asdict(report), indent=2) if o.json else report_text(report))


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder that cospadi compress wrote")
    parser.add_argument("prompt", help="the text to go on from, in quotes")
    parser.add_argument("--tokens", type=int, default=100, help="tokens at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")


def _generate(o: argparse.Namespace) -> None:
    from cospadi import devices
    from cospadi.checkpoint.generate import write_on
    from cospadi.checkpoint.read import load

    device = devices.pick(o.device, "--device")
    write_on(load(o.checkpoint).to(device), o.checkpoint, o.prompt, o.tokens, o.temperature, o.seed)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}. It is transformers' own server: POST /v1/completions, /v1/chat/completions and /v1/responses, "
        "GET /health."
    )
    parser.add_argument("checkpoint", type=Path, help="a folder that cospadi compress wrote")
    parser.add_argument("--host", default="localhost", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default %(default)s)")


def _serve(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.serve import serve

    serve(o.checkpoint, o.host, o.port, o.device)


# --- studies


def _overrides_and(**files: str) -> Callable[[argparse.ArgumentParser], None]:
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
    _stage("tables").tabulate(_study(o.overrides), o.folder)


def _track(o: argparse.Namespace) -> None:
    _stage("tracking").track(_study(o.overrides), o.folder)


def _workspace(o: argparse.Namespace) -> None:
    _stage("tracking").workspace(_study(o.overrides), o.definition)


def _nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


def _list(group: str) -> Callable[[argparse.Namespace], None]:
    def run(o: argparse.Namespace) -> None:
        from cospadi.pipeline.listing import listing

        print(listing(group))

    return run


def _completion_options(parser: argparse.ArgumentParser) -> None:
    parser.description = 'Print what completes commands and options in a shell: eval "$(cospadi completion bash)"'
    parser.add_argument("shell", choices=SHELLS)


def _completion(o: argparse.Namespace) -> None:
    import argcomplete

    print(argcomplete.shellcode(["cospadi"], shell=o.shell))


# --- measuring


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


# --- stages


def _stage(name: str) -> ModuleType:
    """A file of ``cospadi.pipeline.stages``, loaded by its own commands alone: torch takes seconds."""
    return importlib.import_module(f"cospadi.pipeline.stages.{name}")


def _config(overrides: Sequence[str]):
    from cospadi.settings import load

    return load(overrides)


def _prepare_model(o: argparse.Namespace) -> None:
    _stage("sources").prepare_model(_config(o.overrides), o.folder, o.record)


def _prepare_text(o: argparse.Namespace) -> None:
    text, overrides = _named_text(o.overrides)
    config = _config(overrides)
    texts = {t.name: t for t in (config.calibration.text, *config.evaluation.texts)}
    if text not in texts:
        raise UserError(f"text={text} is neither the calibration's nor the evaluation's text: {', '.join(texts)}.")
    _stage("sources").prepare_text(texts[text], o.documents, o.record)


def _named_text(overrides: Sequence[str]) -> tuple[str, list[str]]:
    names = [o.removeprefix("text=") for o in overrides if o.startswith("text=")]
    if len(names) != 1:
        raise UserError("prepare-text needs text=<name>, the name of a file in conf/text.")
    return names[0], [o for o in overrides if not o.startswith("text=")]


def _calibrate(o: argparse.Namespace) -> None:
    _stage("calibration").calibrate(_config(o.overrides), o.model, o.documents, o.grams, o.record)


def _search_ranks(o: argparse.Namespace) -> None:
    _stage("rank_search").search_ranks(_config(o.overrides), o.model, o.documents, o.grams, o.sensitivity)


def _choose_ranks(o: argparse.Namespace) -> None:
    _stage("rank_search").choose_ranks(_config(o.overrides), o.model, o.documents, o.grams, o.sensitivity, o.ranks)


def _factorize(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    _stage("factorization").factorize(config, o.model, o.grams, o.layers, o.factors, o.record, o.ranks)


def _quantize(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    _stage("quantization").quantize(config, o.model, o.grams, o.factors, o.factorization, o.quantized, o.record)


def _evaluate_cell(o: argparse.Namespace) -> None:
    config = _config(o.overrides)
    _stage("evaluation").evaluate(
        config, o.model, o.documents, o.factors_files, o.reference, o.record, o.samples, o.second_text_files
    )


COMMANDS = (
    Command(
        "compress",
        _compress,
        "make one model smaller: load, calibrate, factorize, save",
        YOUR_MODEL,
        _compress_options,
    ),
    Command("info", _info, "the bytes of a compressed checkpoint, part by part", YOUR_MODEL, _info_options),
    Command(
        "evaluate",
        _evaluate,
        "perplexity, divergence from the dense model, tasks, bytes and speed of a model",
        YOUR_MODEL,
        _evaluate_options,
    ),
    Command("generate", _generate, "let a compressed model write on", YOUR_MODEL, _generate_options),
    Command(
        "densify",
        _densify,
        "an ordinary dense checkpoint from a compressed one, for any runtime",
        YOUR_MODEL,
        _densify_options,
    ),
    Command(
        "serve",
        _serve,
        "answer over HTTP with a compressed model, like OpenAI's API",
        YOUR_MODEL,
        _serve_options,
        ("serve",),
    ),
    Command("methods", _list("factorization"), "the methods that --method takes", YOUR_MODEL, _nothing),
    Command("models", _list("model"), "the models that have a name here", YOUR_MODEL, _nothing),
    Command("completion", _completion, "what completes commands in a shell", YOUR_MODEL, _completion_options),
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
        _overrides_and(folder="folder to write"),
        ("study",),
    ),
    Command(
        "track",
        _track,
        "a study's finished cells and tables as W&B runs",
        STUDIES,
        _overrides_and(folder="folder to write"),
        ("study", "track"),
    ),
    Command(
        "workspace",
        _workspace,
        "the W&B view that compares them",
        STUDIES,
        _overrides_and(definition="JSON to write"),
        ("study", "track"),
    ),
    Command("bench", lambda o: None, "measure on this machine", MEASURING, _bench_options),
    Command(
        "prepare-model",
        _prepare_model,
        "fetch a model",
        STAGES,
        _overrides_and(folder="checkpoint to write", record="record to write"),
    ),
    Command(
        "prepare-text",
        _prepare_text,
        "fetch a text",
        STAGES,
        _overrides_and(documents="JSON list to write", record="record to write"),
    ),
    Command(
        "calibrate",
        _calibrate,
        "collect one gram per shared input",
        STAGES,
        _overrides_and(
            model="checkpoint", documents="calibration text", grams="folder to write", record="record to write"
        ),
    ),
    Command(
        "search-ranks",
        _search_ranks,
        "asvd: perplexity with each projection truncated alone",
        STAGES,
        _overrides_and(model="checkpoint", documents="calibration text", grams="grams", sensitivity="JSON to write"),
    ),
    Command(
        "choose-ranks",
        _choose_ranks,
        "asvd: ranks that meet the ratio or the perplexity budget",
        STAGES,
        _overrides_and(
            model="checkpoint",
            documents="calibration text",
            grams="grams",
            sensitivity="of search-ranks",
            ranks="JSON to write",
        ),
    ),
    Command(
        "factorize",
        _factorize,
        "compress the projections of some layers",
        STAGES,
        _overrides_and(
            model="checkpoint",
            grams="grams",
            layers="first-last",
            factors="safetensors to write",
            record="record to write",
            ranks="(optional) of choose-ranks",
        ),
    ),
    Command(
        "quantize",
        _quantize,
        "factors in fewer bits",
        STAGES,
        _overrides_and(
            model="checkpoint",
            grams="grams",
            factors="factors of a block of layers",
            factorization="their record",
            quantized="safetensors to write",
            record="record to write",
        ),
    ),
    Command(
        "evaluate-cell",
        _evaluate_cell,
        "measure the dense model, or a compressed one",
        STAGES,
        _overrides_and(
            model="checkpoint",
            documents="held-out text",
            second_text_files="documents of evaluation.second_text; none: there is none",
            factors_files="factors; none: the dense model",
            reference="hidden states of the dense model: written by its own evaluation, read by all others",
            samples="folder to write",
            record="record to write",
        ),
        ("study",),
    ),
)
"""Every command, in the order of ``--help``."""


if __name__ == "__main__":
    sys.exit(main())
