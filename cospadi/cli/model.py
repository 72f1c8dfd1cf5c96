"""Commands for one model: compress it, look at it, measure it, use it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cospadi.cli.command import (
    YOUR_MODEL,
    Command,
    add_device_option,
    add_recipe_options,
    add_settings_option,
    nothing,
    recipe,
)

DTYPES = ("float16", "bfloat16", "float32")
SHELLS = ("bash", "zsh", "fish")


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a hub id, or the name of a file in conf/model")
    parser.add_argument("out", type=Path, help="folder to write")
    add_recipe_options(parser)
    add_device_option(parser)
    parser.add_argument("--stub", action="store_true", help="add lines that import cospadi for trust_remote_code=True")
    parser.add_argument("--keep-work", action="store_true", help="keep <out>.work with grams and factors")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of embeddings, norms and head (default: that of the model; factors have 16 bits)",
    )
    parser.add_argument("--no-measure", action="store_true", help="do not load the models to measure what it cost")
    _add_overwrite(parser)


def _compress(o: argparse.Namespace) -> None:
    from cospadi.api import compress_to
    from cospadi.checkpoint.ledger import ledger_text
    from cospadi.pipeline.outcome import Outcome, outcome_text

    devices = [f"{room}.device={o.device}" for room in ("calibration", "factorization", "quantization")]
    overrides = [*devices, *recipe(o)]
    measure = not o.no_measure
    sizes = compress_to(o.model, o.out, overrides, o.calibration, o.keep_work, o.stub, o.overwrite, measure, o.dtype)
    print(ledger_text(sizes))
    if sizes.get("outcome"):
        print("\n" + outcome_text(Outcome(**sizes["outcome"])))
    out = shlex.quote(str(o.out))
    print(
        f'\nNext: cospadi generate {out} "The capital of France is", or cospadi evaluate {out} --dense {shlex.quote(o.model)}; '
        f"{o.out}/README.md says how it is loaded."
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder that cospadi compress wrote")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that an earlier run wrote to OUT"
    )


def _info_options(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, with every projection")


def _info(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.ledger import ledger, ledger_text

    sizes = ledger(o.checkpoint)
    print(json.dumps(sizes, indent=2, default=str) if o.json else ledger_text(sizes))


def _densify_options(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("out", type=Path, help="folder to write")
    _add_overwrite(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: that of the compressed checkpoint)")


def _densify(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.write import densify

    densify(o.checkpoint, o.out, o.dtype, overwrite=o.overwrite)
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
    parser.add_argument(
        "--tasks", default="", help="tasks of lm-eval as well: arc_easy,piqa; needs pip install '.[study]'"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which both run (default %(default)s)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings_option(parser, "evaluation.n_windows=32")


def _evaluate(o: argparse.Namespace) -> None:
    from cospadi.pipeline.measurement import evaluate, report_text
    from cospadi.settings import load, text_overrides

    settings = ["evaluation=embedded", *text_overrides("evaluation.text", o.text), "evaluation.n_windows=null"]
    settings += [f"evaluation.tasks=[{o.tasks}]", f"evaluation.device={o.device}"]
    report = evaluate(o.model, o.dense, load([*settings, *o.overrides]).evaluation, o.dtype, quiet=o.json)
    print(json.dumps(asdict(report), indent=2) if o.json else report_text(report))


def _generate_options(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("prompt", help="the text to go on from, in quotes")
    parser.add_argument("--tokens", type=int, default=100, help="tokens at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling (default %(default)s)")
    add_device_option(parser)


def _generate(o: argparse.Namespace) -> None:
    from cospadi import devices
    from cospadi.checkpoint.generate import write_on
    from cospadi.checkpoint.read import load

    device = devices.pick(o.device, "--device")
    write_on(load(o.checkpoint).to(device), o.checkpoint, o.prompt, o.tokens, o.temperature, o.seed)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description}. It is transformers' own server: POST /v1/completions, /v1/chat/completions and /v1/responses, "
        "GET /v1/models and /health."
    )
    _add_checkpoint(parser)
    parser.add_argument("--host", default="localhost", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    add_device_option(parser)


def _serve(o: argparse.Namespace) -> None:
    from cospadi.checkpoint.serve import serve

    serve(o.checkpoint, o.host, o.port, o.device)


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
    Command("methods", _list("factorization"), "the methods that --method takes", YOUR_MODEL, nothing),
    Command("models", _list("model"), "the models that have a name here", YOUR_MODEL, nothing),
    Command("completion", _completion, "what completes commands in a shell", YOUR_MODEL, _completion_options),
)
