"""What a job takes: operations counted from shapes and settings, over what a machine manages per second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from cospadi.errors import AUTO, UserError
from cospadi.factorization import budget
from cospadi.factorization.settings import (
    IDENTITY,
    LEARNED_FRACTIONS,
    OWN_ROUNDS,
    PROBE_ROUNDS,
    RHOS,
    SAME_INPUT,
    ASVDConfig,
    BasisSharingConfig,
    CoSpaDiConfig,
    FactorizationConfig,
    GroupedConfig,
    MagnitudeConfig,
    OATSConfig,
    PlainConfig,
    SparseGPTConfig,
    SVDConfig,
    SVDLLMConfig,
    WandaConfig,
)
from cospadi.settings import Config
from cospadi.sources.shapes import Shape

REACHED = 0.6
"""Part of a machine's best rates that whole jobs reach, fitted to finished records of the default model on a CPU."""
TRIED = 1 / 8
"""Learned atoms beside identity atoms, in fractions of the shorter side, where they are searched: the middle of what is tried."""
EIGEN = 9
"""Operations of an eigendecomposition, in cubes of its size."""
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
"""Of an evaluation text that is read whole: about those of WikiText-2."""


@dataclass(frozen=True)
class Speed:
    """What a machine manages per second at best."""

    product: int | float
    """Operations in float32 products; in TF32 on a GPU, as the solvers compute there."""
    model: int | float
    """Operations in products of the model's dtype."""
    double: int | float
    """Operations in float64 products."""
    eigen: int | float
    """Operations of an eigendecomposition in float64, `EIGEN` times its size cubed."""
    memory: int | float
    """Bytes read or written."""

    @classmethod
    def of(cls, tflops: int | float) -> Speed:
        """Of a data-centre GPU with so many TFLOPS in TF32 products; the other rates in an A100's proportions.

        Raises:
            UserError: not positive.
        """
        if not tflops > 0:
            raise UserError(
                f"--tflops {tflops:g} is no speed. Set what the GPU reaches in TF32 products: about 100 for an A100."
            )
        rate = tflops * 1e12
        return cls(rate, 1.5 * rate, rate / 7, rate / 200, rate / 70)


@dataclass(frozen=True)
class Work:
    """What there is to do; adds up, and is multiplied by a count."""

    product: int | float = 0.0
    model: int | float = 0.0
    double: int | float = 0.0
    eigen: int | float = 0.0
    memory: int | float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: int | float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))

    def seconds(self, speed: Speed) -> float:
        """One after the other, at `REACHED` of the machine's best."""
        return sum(getattr(self, f.name) / getattr(speed, f.name) for f in fields(self)) / REACHED


def factorize(config: FactorizationConfig, d_in: int, d_out: int, members: int = 1) -> Work:
    """A group of ``members`` projections of one shape that share a dictionary, from gram to record; one alone.

    The whitener (a Cholesky factor), the whitened weight and its error afterwards are of every method.

    Raises:
        TypeError: a method whose work nobody has counted.
    """
    common = Work(double=d_in**3 / 3 + 4 * d_in**2 * d_out) * members
    m, n = d_in, members * d_out
    short = min(m, n)
    if isinstance(config, SVDConfig | SVDLLMConfig | ASVDConfig | BasisSharingConfig):
        rank = m * n / (m + n)
        return common + Work(double=2 * m * n * short + 2 * m * n * rank + m**2 * rank, eigen=EIGEN * short**3)
    if isinstance(config, SparseGPTConfig):
        return common + Work(double=4 * m**3 + 4 * m**2 * n)  # in small blocks: at half the speed
    if isinstance(config, OATSConfig):
        rank = config.rank_ratio * (1 - config.compression_ratio) * m * n / (m + n)
        return common + Work(
            product=config.n_rounds * 3 * 6 * m * n * rank
        )  # narrow products and QR: a third of the speed
    if isinstance(config, CoSpaDiConfig):
        return common + _cospadi(config, d_in, d_out, members)
    if isinstance(config, PlainConfig | MagnitudeConfig | WandaConfig):
        return common  # one pass over the weight, next to nothing beside its error
    raise TypeError(
        f"Nothing is known about the work of {type(config).__name__}. Add it to cospadi.pipeline.cost.factorize."
    )


def _cospadi(config: CoSpaDiConfig, d_in: int, d_out: int, members: int) -> Work:
    m, n = d_in, members * d_out
    rounds = config.rounds
    if config.fixed_atoms == IDENTITY:
        work = _htp(config, m, n, 0, m, max(1, rounds // 3))
        if config.learned_atoms == 0:
            return work
        atoms = (TRIED if config.learned_atoms == AUTO else float(config.learned_atoms)) * min(m, n)
        probes = len(LEARNED_FRACTIONS) - 1 if config.learned_atoms == AUTO else 0
        return work + _htp(config, m, n, atoms, m, PROBE_ROUNDS) * probes + _htp(config, m, n, atoms, m, rounds)
    rho = 3.0 if config.rho == AUTO else float(config.rho)
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, config.compression_ratio, rho, config.accounting, members)
    unwhitened = Work(double=m**2 * atoms)
    if config.solver == "ksvd":
        return unwhitened + _ksvd(m, n, atoms, sparsity, config.power_iterations) * rounds
    if config.solver == "orthogonal":
        return unwhitened + Work(product=4 * m * n * atoms, eigen=EIGEN * atoms**3) * rounds
    work = unwhitened + _htp(config, m, n, atoms, 0, rounds)
    if config.rho == AUTO:
        work += _htp(config, m, n, atoms, 0, PROBE_ROUNDS) * len(RHOS)
    if members > 1 and config.metric == "own":
        work += _htp(config, m, n, atoms, 0, OWN_ROUNDS) + Work(double=12 * OWN_ROUNDS * members * m**2 * atoms)
    return work


def _htp(config: CoSpaDiConfig, m: int, n: int, learned: int | float, fixed: int, rounds: int) -> Work:
    """Codings over all atoms, the dictionary between them, and the polish at the end (`htp_batch`)."""
    atoms = learned + fixed
    coding = 2 * m * atoms**2 + 2 * m * n * atoms + 2 * n * atoms**2 * (2 + config.cg_steps)
    update = 2 * n * atoms * learned + 2 * m * n * learned + learned**3 / 3 + 2 * m * learned**2
    polish = 2 * m * atoms**2 + 2 * m * n * atoms * 3 + 2 * n * atoms**2 * 6
    start = EIGEN * min(m, n) ** 3 if learned else 0.0
    return Work(product=(rounds + 1) * coding + rounds * update + polish, eigen=start)


def _ksvd(m: int, n: int, atoms: int, sparsity: int, power_iterations: int) -> Work:
    """A round: matching pursuit in full float32, then every atom with the columns that use it, bound by memory."""
    pursuit = n * (sparsity**2 * atoms + sparsity**3)  # full float32 is no faster than float64 on a GPU
    users = n * sparsity / atoms
    sweep = atoms * 4 * users * m * (2 * power_iterations + 4)
    return Work(product=2 * m * atoms * (n + atoms), double=pursuit, memory=sweep)


def quantize(config: Config, d_in: int, d_out: int) -> Work:
    """One projection in fewer bits: its error again and, compensated, a pass down the rows and the sweeps."""
    passes = 2 + 2 * config.quantization.sweeps if config.quantization.rounding == "compensated" else 0
    return Work(double=(4 + passes) * d_in**2 * d_out + d_in**3 / 3)


def calibrate(config: Config, shape: Shape) -> Work:
    """Tokens through all blocks, and a gram of every shared input; the attention's weights are kept for a second one."""
    calibration, model = config.calibration, config.model
    tokens = calibration.n_samples * calibration.sample_length
    grams = sum(gram**2 for gram in gram_sizes(config, shape))
    per_token = 2 * shape.compressed / shape.layers + 4 * calibration.sample_length * shape.queries
    heads = shape.queries / 64
    softmax = 4 * 8 * calibration.sample_length * heads if calibration.attention and model.attended else 0
    # full float32, which on a GPU is no faster than float64
    return Work(model=tokens * per_token, double=tokens * 2 * grams, memory=tokens * softmax) * shape.layers


def gram_sizes(config: Config, shape: Shape) -> list[int]:
    """Sizes of a block's grams."""
    sizes = []
    for group in config.model.shared_inputs:
        known = [shape.projections[name][0] for name in group if name in shape.projections]
        attended = config.calibration.attention and set(group) & set(config.model.attended)
        sizes += known[:1] * (2 if attended else 1)
    return sizes


def evaluated_tokens(config: Config) -> tuple[int, int]:
    """Of perplexity windows, and of tasks."""
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
    """Windows and tasks through the model; of a compressed one the dense logits of the windows once more."""
    windows, tasks = evaluated_tokens(config)
    head = 2 * shape.vocabulary * shape.hidden
    forward = (windows + tasks) * (2 * shape.compressed + head) + (0 if dense else windows * head)
    return Work(model=forward, memory=(windows + tasks) * shape.vocabulary * 4 * 6)


def factorize_model(config: FactorizationConfig, shape: Shape) -> Work:
    """All projections of a model; of a rank search the last step alone."""
    work = Work()
    for names, (d_in, d_out), members in _groups(config, shape):
        work += factorize(config, d_in, d_out, members) * (shape.layers * names / members)
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
