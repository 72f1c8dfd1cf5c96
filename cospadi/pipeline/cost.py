"""The work of every stage: operations counted from shapes and settings. `cospadi.factorization.cost` counts methods."""

from __future__ import annotations

from collections.abc import Iterator

from cospadi.factorization import cost as method_cost
from cospadi.factorization.settings import SAME_INPUT, FactorizationConfig, GroupedConfig
from cospadi.factorization.work import Work
from cospadi.settings import Config
from cospadi.sources.addresses import RANDOM, local_path
from cospadi.sources.shapes import Shape

TOKENS = {
    "piqa": (1838, 2 * 40),
    "hellaswag": (10042, 4 * 100),
    "lambada_openai": (5153, 85),
    "arc_easy": (2376, 4 * 35),
    "arc_challenge": (1172, 4 * 40),
    "sciq": (1000, 4 * 150),
    "race": (1045, 4 * 450),
    "mmlu": (14042, 110),
    "winogrande": (1267, 2 * 30),
    "openbookqa": (500, 4 * 20),
    "wikitext": (62, 5500),
}
"""Documents of a stock task, and about how many tokens a model reads for one, all choices together."""
UNKNOWN_TASK = (1500, 300)
WIKITEXT_TOKENS = 300_000
"""Tokens of an evaluation text that is read whole: about those of WikiText-2."""


def quantize(config: Config, d_in: int, d_out: int) -> Work:
    """One projection in fewer bits: its error again and, compensated, a pass down the rows and the sweeps."""
    passes = 2 + 2 * config.quantization.sweeps if config.quantization.rounding == "compensated" else 0
    return Work(double=(4 + passes) * d_in**2 * d_out + d_in**3 / 3)


def calibrate(config: Config, shape: Shape) -> Work:
    """Tokens through all blocks, and a gram of every shared input; the attention's weights are kept for a second one."""
    calibration = config.calibration
    model = config.model
    tokens = calibration.n_samples * calibration.sample_length
    grams = sum(gram**2 for gram in gram_sizes(config, shape))
    per_token = 2 * shape.compressed / shape.layers + 4 * calibration.sample_length * shape.queries
    heads = shape.queries / 64
    softmax = 4 * 8 * calibration.sample_length * heads if calibration.attention and model.attended else 0
    # full float32, which on a GPU is no faster than float64
    return Work(model=tokens * per_token, double=tokens * 2 * grams, memory=tokens * softmax) * shape.layers


def fisher(config: Config, shape: Shape) -> Work:
    """Tokens forward, and back with every block computed again; a weighted gram of every projection."""
    calibration = config.calibration
    tokens = (calibration.fisher.n_samples or calibration.n_samples) * calibration.sample_length
    forward = 2 * shape.compressed / shape.layers + 4 * calibration.sample_length * shape.queries
    grams = sum(d_in**2 for d_in, _ in shape.projections.values())
    blocks = Work(model=3 * tokens * forward, double=tokens * 2 * grams) * shape.layers
    head = 2 * shape.vocabulary * shape.hidden
    return blocks + Work(model=2 * tokens * head, memory=tokens * shape.vocabulary * 4 * 8)


def fisher_bytes(shape: Shape) -> int:
    """Bytes of a block's factors of the Fisher information, in float32."""
    return 4 * sum(d_in**2 for d_in, _ in shape.projections.values())


def gram_bytes(config: Config, shape: Shape) -> int:
    """Bytes of a block's grams, in float64."""
    return 8 * sum(size**2 for size in gram_sizes(config, shape))


def value_bytes(config: Config) -> int:
    """Bytes of a number in the dtype in which the model runs."""
    return 4 if config.model.dtype == "float32" else 2


def download_bytes(config: Config, shape: Shape) -> int:
    """Bytes of a model in 16 bits that is fetched; 0 where it is on this disk or drawn from a seed."""
    is_remote = local_path(config.model.source) is None and not config.model.source.startswith(RANDOM)
    return 2 * shape.parameters if is_remote else 0


def gram_sizes(config: Config, shape: Shape) -> list[int]:
    """Sizes of a block's grams."""
    sizes = []
    for group in config.model.shared_inputs:
        widths = [shape.projections[name][0] for name in group if name in shape.projections]
        attended = config.calibration.attention and set(group) & set(config.model.attended)
        sizes += widths[:1] * (2 if attended else 1)
    return sizes


def evaluated_tokens(config: Config) -> tuple[int, int]:
    """Tokens of perplexity windows, and of tasks."""
    evaluation = config.evaluation
    windows = evaluation.n_windows * evaluation.window if evaluation.n_windows else WIKITEXT_TOKENS
    tasks = 0
    for task in evaluation.tasks:
        documents, each = TOKENS.get(task, UNKNOWN_TASK)
        tasks += min(documents, evaluation.limit or documents) * each
    if "heldout_perplexity" in evaluation.embedded_tasks:
        tasks += int(1.5 * evaluation.n_perplexity_documents * evaluation.document_words)
    if "heldout_cloze" in evaluation.embedded_tasks:
        tasks += int(1.5 * evaluation.n_cloze_documents * evaluation.cloze_words)
    return windows, tasks


def evaluate(config: Config, shape: Shape, dense: bool) -> Work:
    """Windows and tasks through the model; of a dense one the expected rows of its head, a product more."""
    windows, tasks = evaluated_tokens(config)
    head = 2 * shape.vocabulary * shape.hidden
    forward = (windows + tasks) * (2 * shape.compressed + head) + (windows * head if dense else 0)
    return Work(model=forward, memory=(windows + tasks) * shape.vocabulary * 4 * 6)


def expect_losses(config: FactorizationConfig, shape: Shape) -> Work:
    """Every projection solved roughly at every ratio that an allocation tries; nothing where it divides nothing."""
    if not config.allocates:
        return Work()
    each = sum((method_cost.trials(config, *size) for size in shape.projections.values()), Work())
    return each * shape.layers


def factorize_model(config: FactorizationConfig, shape: Shape) -> Work:
    """All projections of a model; of a rank search the last step alone."""
    work = Work()
    for names, (d_in, d_out), members in _groups(config, shape):
        work += method_cost.factorize(config, d_in, d_out, members) * (shape.layers * names / members)
    return work


def _groups(config: FactorizationConfig, shape: Shape) -> Iterator[tuple[int, tuple[int, int], int]]:
    """Projections of a block alike: how many, their shape, and how many share a dictionary."""
    grouped = isinstance(config, GroupedConfig) and config.shares
    for name, size in shape.projections.items():
        beside = ("mlp.gate_proj", "mlp.up_proj")
        wide = name == "self_attn.q_proj" or (name.endswith(("k_proj", "v_proj")) and shape.keys == shape.queries)
        named = grouped and (name in config.grouped if config.grouped else name in beside or wide)
        siblings = 2 if named and config.pairing == SAME_INPUT and name in beside else 1
        yield 1, size, (config.group_size if named else 1) * siblings
