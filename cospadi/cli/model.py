"""Commands for one model: compress it, look at it, measure it, use it."""

from __future__ import annotations

import argparse
import json
import math
import re
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
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
"""Bytes of a unit. MB are those of every table here: a million."""
SHELLS = ("bash", "zsh", "fish")


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder, a hub id, or the name of a file in conf/model")
    parser.add_argument("out", type=Path, help="folder to write")
    add_recipe_options(parser)
    parser.add_argument(
        "--size",
        type=_size,
        help="bytes that the files of weights may take, in the place of a ratio: 200MB, 1.5GB (millions and billions)",
    )
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


def _size(text: str) -> int:
    """Bytes of a size as people write it.

    >>> _size("200MB"), _size("1.5 GB"), _size("180MiB"), _size("1e6")
    (200000000, 1500000000, 188743680, 1000000)

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text} is not a size. Write a number with a unit: 200MB, 1.5GB")
    size = float(found[1]) * UNITS[found[2]]
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no bytes at all. Write a number with a unit: 200MB, 1.5GB")
    return int(size)


def _compress(o: argparse.Namespace) -> None:
    from cospadi.api import compress_to
    from cospadi.checkpoint.ledger import ledger_text
    from cospadi.pipeline.outcome import Outcome, outcome_text

    devices = [f"{room}.device={o.device}" for room in ("calibration", "factorization", "quantization")]
    overrides = [*devices, *recipe(o)]
    measure = not o.no_measure
    sizes = compress_to(
        o.model,
        o.out,
        overrides,
        o.calibration,
        keep_work=o.keep_work,
        stub=o.stub,
        overwrite=o.overwrite,
        measure=measure,
        dtype=o.dtype,
        size=o.size,
    )
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
