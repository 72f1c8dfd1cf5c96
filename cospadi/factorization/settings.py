"""Settings of every factorization method: a dataclass each. No torch here: every start composes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import ClassVar

from omegaconf import MISSING

from cospadi.errors import AUTO, UserError, require, require_at_least, require_device, require_one_of
from cospadi.factorization.budget import pattern_ratio, pattern_too_large
from cospadi.factorization.solver_table import SOLVERS

OUTPUT = "output"
LOSS = "loss"
OBJECTIVES = (OUTPUT, LOSS)
UNIFORM = "uniform"
ALLOCATIONS = (UNIFORM, LOSS)
RHOS = (2.0, 2.5, 3.0, 3.5)
"""Atoms per non-zero that ``rho=auto`` tries."""
LEARNED_FRACTIONS = (0.0, 1 / 16, 1 / 8, 1 / 4)
"""Learned atoms beside identity atoms that ``learned_atoms=auto`` tries, in fractions of the shorter side."""
PROBE_ROUNDS = 6
"""Rounds of each of these trials: enough to tell which of them ends lowest, to about a percent of the error."""
TRIAL_ROUNDS = 1
TRIAL_CG_STEPS = 3
"""Of a trial for an allocation: losses of projections are compared with each other, and all end about as much too high."""
PROBE_COLUMNS = 768
"""Columns of a trial at least, where a matrix has twice as many or more: sizes are ranked there, not solved."""
OWN_ROUNDS = 16
"""Rounds under every projection's own gram with ``metric=own``."""
NO_FIXED_ATOMS = "none"
IDENTITY = "identity"
FIXED_ATOMS = (NO_FIXED_ATOMS, IDENTITY)
SUPPORTS = ("column", "matrix")
ACCOUNTINGS = ("mask", "paper")
METRICS = ("own", "mean")
CONSECUTIVE = "consecutive"
SAME_INPUT = "same_input"
MATCHED = "matched"
LOW_RANK = "low rank"
DICTIONARY = "dictionary"
PRUNING = "pruning"
FAMILIES = (LOW_RANK, DICTIONARY, PRUNING, "")
"""What a method makes of a weight, in the order of the rows of a table; the last is none of these."""


def probe_step(d_out: int) -> int:
    """A trial beside identity atoms takes every so many-th of ``d_out`` columns.

    >>> probe_step(576), probe_step(1536), probe_step(3072)
    (1, 2, 4)
    """
    return max(1, d_out // PROBE_COLUMNS)


@dataclass
class FactorizationConfig:
    """Settings that every factorization method has."""

    family: ClassVar[str] = ""
    """Which of `FAMILIES` it belongs to: tables group their rows by it. Not a setting."""
    name: str = MISSING
    """The file name in ``conf/factorization``: the row's method in the tables."""
    title: str = MISSING
    """How tables and figures name it."""
    compression_ratio: float = 0.2
    """Fraction of a projection's bits removed: 0.2 keeps 80 %."""
    accounting: str = "mask"
    """``mask``: every stored bit counts. ``paper``: the mask is paid for by 14-bit values (arXiv:2509.22075, eq. 11)."""
    storage_dtype: str = "float16"
    """Dtype of stored dictionaries, values and factors: ``float16``, or ``bfloat16`` for its exponent range."""
    device: str = "auto"
    """``auto`` (a GPU when there is one), ``cpu`` or ``cuda``."""
    seed: int = 42
    revision: int = 1
    """Raise it when a code change alters the numbers: finished cells become stale."""

    def __post_init__(self) -> None:
        self._check_ratio()
        require_device("factorization.device", self.device)
        require_one_of("factorization.accounting", self.accounting, ACCOUNTINGS)
        require_one_of("factorization.storage_dtype", self.storage_dtype, ("float16", "bfloat16"))

    @property
    def searches_ranks(self) -> bool:
        """Whether ranks come from a search of their own, before the factorization."""
        return False

    @property
    def needs_fisher(self) -> bool:
        """Whether it asks what the loss cares about, beside what the inputs are."""
        return False

    @property
    def allocates(self) -> bool:
        """Whether every projection has a compression ratio of its own, found before the factorization."""
        return False

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
        require(
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
        require_at_least("factorization.group_size", self.group_size, 1)
        require(
            self.grouped is None or len(self.grouped) > 0,
            "factorization.grouped is empty, so nothing would share. Set null for the default, or group_size=1.",
        )
        require_one_of("factorization.pairing", self.pairing, (CONSECUTIVE, SAME_INPUT, MATCHED))
        require(
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

    family: ClassVar[str] = LOW_RANK


@dataclass
class SVDLLMConfig(FactorizationConfig):
    """Truncated SVD of the whitened weight (SVD-LLM, arXiv:2403.07378)."""

    family: ClassVar[str] = LOW_RANK


@dataclass
class BasisSharingConfig(GroupedConfig):
    """Truncated SVD of the whitened weights of a group, one basis for all (Basis Sharing, arXiv:2410.03765)."""

    family: ClassVar[str] = LOW_RANK


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
        require(
            len(self.truncation_ratios) > 0 and all(0 < r < 1 for r in self.truncation_ratios),
            "factorization.rank_search.truncation_ratios must be fractions between 0 and 1 of the parameters kept.",
        )
        require_at_least("factorization.rank_search.n_samples", self.n_samples, 1)
        require_at_least("factorization.rank_search.perplexity_budget", self.perplexity_budget, 1)


@dataclass
class ASVDConfig(FactorizationConfig):
    """Truncated SVD of the activation-scaled weight (ASVD, arXiv:2312.05821)."""

    family: ClassVar[str] = LOW_RANK
    alpha: float = 0.5
    """Exponent of the mean absolute activation."""
    rank_search: RankSearchConfig | None = None
    """``null``: every projection at the same ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("factorization.alpha", self.alpha, 0)

    @property
    def searches_ranks(self) -> bool:
        return self.rank_search is not None


@dataclass
class CoSpaDiConfig(GroupedConfig):
    """Sparse dictionary learning on the whitened weight (CoSpaDi, arXiv:2509.22075)."""

    family: ClassVar[str] = DICTIONARY
    solver: str = "htp"
    """``htp`` (default), ``ksvd`` (the paper's), ``orthogonal`` (COMPOT's) or ``one_shot`` (ROCKET's)."""
    fixed_atoms: str = NO_FIXED_ATOMS
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
    """ksvd: power iterations of an atom update."""
    first_step: float = 2.8
    """htp: length of the first round's gradient step, which ranks candidates for the support."""
    last_step: float = 1.3
    """htp: length of the last round's."""
    cg_steps: int = 2
    """htp: conjugate-gradient steps of a round's least squares."""
    tolerance: float = 2e-4
    """htp: stop early when two rounds lower the error by less than twice this fraction."""
    metric: str = "mean"
    """Metric of a group: ``mean``, one gram for all its layers (arXiv:2509.22075, eq. 30); ``own`` (htp only), every layer its
    own, which is the error that is reported."""
    objective: str = OUTPUT
    """What is kept the same: ``output``, the outputs of the projection; ``loss``, the model's predictions, by the Fisher information
    of a backward pass (`cospadi.calibration.fisher`)."""
    allocation: str = UNIFORM
    """``uniform``: ``compression_ratio`` for every projection. ``loss`` (with ``objective=loss``): it is that of all projections
    together, and each gets the ratio at which the expected loss of all is lowest."""
    revision: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("factorization.solver", self.solver, SOLVERS)
        require_one_of("factorization.objective", self.objective, OBJECTIVES)
        require_one_of("factorization.allocation", self.allocation, ALLOCATIONS)
        require(
            self.objective == OUTPUT or not self.shares,
            "factorization.objective=loss weighs every projection by itself, so none can share. Set "
            "factorization.group_size=1 and factorization.pairing=consecutive, or objective=output.",
        )
        require(
            self.allocation == UNIFORM or self.objective == LOSS,
            "factorization.allocation=loss needs factorization.objective=loss, whose errors of different projections can be compared. "
            "Set both, or allocation=uniform.",
        )
        require_one_of("factorization.fixed_atoms", self.fixed_atoms, FIXED_ATOMS)
        require_one_of("factorization.support", self.support, SUPPORTS)
        self._check_rho()
        self._check_fixed_atoms()
        require_at_least("factorization.n_rounds", self.n_rounds, 1)
        require_at_least("factorization.power_iterations", self.power_iterations, 1)
        require_at_least("factorization.cg_steps", self.cg_steps, 1)
        require_at_least("factorization.first_step", self.first_step, 1e-3)
        require_at_least("factorization.last_step", self.last_step, 1e-3)
        require_at_least("factorization.tolerance", self.tolerance, 0)
        require(self.tolerance < 1, f"factorization.tolerance={self.tolerance:g} is not a fraction. Set less than 1.")
        require_one_of("factorization.metric", self.metric, METRICS)
        require(
            self.metric == "mean" or not self.shares or (self.solver == "htp" and self._size_is_given),
            "factorization.metric=own of a group needs factorization.solver=htp and a number for factorization.rho, with "
            "fixed_atoms=identity for factorization.learned_atoms. Set them, or metric=mean.",
        )

    @property
    def needs_fisher(self) -> bool:
        return self.objective == LOSS

    @property
    def allocates(self) -> bool:
        return self.allocation != UNIFORM

    @property
    def rough(self) -> CoSpaDiConfig:
        """The same method for a trial: a few steps, and no learned atoms beside the identity's."""
        learned = {"learned_atoms": 0} if self.fixed_atoms == IDENTITY else {}
        return replace(self, n_rounds=TRIAL_ROUNDS, cg_steps=TRIAL_CG_STEPS, allocation=UNIFORM, **learned)

    @property
    def rounds(self) -> int:
        """Alternations at most."""
        return self.n_rounds or SOLVERS[self.solver].rounds

    @property
    def balanced(self) -> bool:
        """Whether every column has the same number of non-zeros."""
        return self.support == "column"

    @property
    def _size_is_given(self) -> bool:
        return (self.learned_atoms if self.fixed_atoms == IDENTITY else self.rho) != AUTO

    def _check_fixed_atoms(self) -> None:
        for setting, plain in (("fixed_atoms", NO_FIXED_ATOMS), ("support", "column")):
            value = getattr(self, setting)
            require(
                value == plain or (self.solver == "htp" and self.accounting == "mask"),
                f"factorization.{setting}={value} needs factorization.solver=htp and factorization.accounting=mask. "
                f"Set {setting}={plain}, or these two.",
            )
        if self.fixed_atoms == IDENTITY:
            # Not read here. A study hands it to all its methods, and this one's results do not become stale by it.
            self.rho = CoSpaDiConfig.rho
        else:
            self.learned_atoms = AUTO  # for the same reason
        if self.learned_atoms == AUTO:
            return
        require(
            not isinstance(self.learned_atoms, str) and 0 <= self.learned_atoms < 1,
            f"factorization.learned_atoms={self.learned_atoms} is not a fraction of the shorter side. "
            "Set 0 or more and less than 1, or auto.",
        )
        self.learned_atoms = float(self.learned_atoms)

    def _check_rho(self) -> None:
        if self.rho == AUTO:
            require(
                self.solver == "htp" and self.accounting == "mask",
                "factorization.rho=auto needs factorization.solver=htp and factorization.accounting=mask. Set a number.",
            )
            return
        require(
            not isinstance(self.rho, str),
            f"factorization.rho={self.rho!r} is not a number. Correct the setting: 1 or more, or auto.",
        )
        self.rho = float(self.rho)
        require_at_least("factorization.rho", self.rho, 1)
        require(
            self.accounting != "paper" or self.rho <= 2,
            f"factorization.accounting=paper is only exact up to factorization.rho=2, and rho={self.rho:g}: 14-bit values "
            "would not pay for the mask. Set factorization.rho=2 too, or accounting=mask.",
        )


@dataclass
class MagnitudeConfig(FactorizationConfig):
    """The largest weights and a 1-bit mask: needs no data."""

    family: ClassVar[str] = PRUNING


@dataclass
class PruningConfig(FactorizationConfig):
    """Settings of the pruning methods that use calibration data."""

    family: ClassVar[str] = PRUNING

    pattern: str | None = None
    """``N:M``, such as ``"2:4"``: N of every M consecutive inputs of an output stay. ``null``: any of them may."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is None:
            return
        require(
            re.fullmatch(r"\d+:\d+", self.pattern) is not None,
            f"factorization.pattern={self.pattern} is not N:M. Write it in quotes in a file, as YAML takes 2:4 for a time.",
        )
        kept, group = self.kept_of_group
        require(
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
        require_at_least("factorization.block_size", self.block_size, 1)
        require_at_least("factorization.damping", self.damping, 0)
        if self.pattern is not None:
            _, group = self.kept_of_group
            require(
                self.block_size % group == 0,
                f"factorization.block_size={self.block_size} is not a multiple of the {group} in factorization.pattern="
                f"{self.pattern}. Set it to {max(self.block_size // group, 1) * group}.",
            )


@dataclass
class OATSConfig(FactorizationConfig):
    """A sparse plus a low-rank weight by alternating thresholding (OATS, arXiv:2409.13652)."""

    family: ClassVar[str] = PRUNING

    rank_ratio: float = 0.25
    """Fraction of the values kept that goes to the low-rank part."""
    n_rounds: int = 80
    """Alternations of the two thresholds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.rank_ratio < 1,
            f"factorization.rank_ratio={self.rank_ratio:g} is not between 0 and 1. Without a low-rank part OATS is Wanda, "
            "without a sparse one a truncated SVD: take factorization=wanda or asvd for those.",
        )
        require_at_least("factorization.n_rounds", self.n_rounds, 1)


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


def layer_blocks(config: FactorizationConfig, n_layers: int, per_block: int) -> list[str]:
    """Consecutive layers that one job takes, as ``first-last``: ``per_block`` of them, more where that would cut a group.

    >>> layer_blocks(SVDConfig(), 5, per_block=2), layer_blocks(BasisSharingConfig(group_size=4), 5, per_block=1)
    (['000-001', '002-003', '004-004'], ['000-003', '004-004'])
    """
    together = layers_together(config, n_layers)
    step = -(-per_block // together) * together
    return [f"{first:03d}-{min(first + step, n_layers) - 1:03d}" for first in range(0, n_layers, step)]
