"""Settings of a whole cell, composed by Hydra and checked before the first job; mistakes become sentences.

``conf/`` holds the values. Every room has a ``settings.py`` whose dataclasses hold names, types, bounds and meaning. Hydra
refuses a key that is not a field there. Nothing in this module imports torch, so that no command waits for its import to hear of a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cospadi.calibration.settings import CalibrationConfig
from cospadi.errors import UserError, did_you_mean, require, require_at_least, require_one_of
from cospadi.evaluation.settings import EvaluationConfig
from cospadi.factorization.settings import (
    METHODS,
    CoSpaDiConfig,
    FactorizationConfig,
    MagnitudeConfig,
    PlainConfig,
    PruningConfig,
)
from cospadi.packing.formats import TRUNCATED
from cospadi.quantization.settings import QuantizationConfig
from cospadi.sources.settings import EVERY, ModelConfig, TextConfig
from cospadi.tracking.settings import TrackingConfig

PROJECT = Path(__file__).resolve().parents[1]
CONF = PROJECT / "conf" if (PROJECT / "conf").is_dir() else Path(__file__).parent / "conf"
PUBLISHED = ("cospadi", "rocket", "geopair", "compot")


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
    layers_per_job: int | None = 15
    """Blocks that one factorization job covers; ``null``: all of the model. Its factors are filed under them."""
    against: str | None = None
    """The method that all others of a ratio are compared with, document by document; ``null``: the last of ``methods``."""
    published: list[str] = field(default_factory=list)
    """Papers whose numbers are printed below ours, as reference rows: sources in ``cospadi/tables/published.yaml``."""

    def __post_init__(self) -> None:
        require_at_least("study.layers_per_job", self.layers_per_job, 1)
        if self.against is not None:
            require_one_of("study.against", self.against, self.methods)
        for name in self.published:
            require_one_of("study.published", name, PUBLISHED)
        for setting in ("models", "methods", "compression_ratios", "quantizations"):
            values = getattr(self, setting)
            require(len(values) > 0, f"study.{setting} is empty: there is nothing to compare.")
            require(len(set(values)) == len(values), f"study.{setting} names an entry twice: {list(values)}.")
        methods = [*self.methods, *(file.stem for file in (CONF / "factorization").glob("*.yaml"))]
        for setting in ("ratios_of", "quantizations_of"):
            # A study that is narrowed down keeps what it says about the methods it has no longer.
            for method, chosen in getattr(self, setting).items():
                require(
                    method in methods,
                    f"study.{setting}.{method} names a method that does not exist{did_you_mean(method, methods)} "
                    f"study.methods are: {', '.join(self.methods)}.",
                )
                require(
                    len(chosen) > 0, f"study.{setting}.{method} is empty. Take {method} out of study.methods instead."
                )
                require(
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
        projections = self.model.projections
        for name in getattr(self.factorization, "grouped", None) or []:
            require(
                name in projections,
                f"factorization.grouped={name} is not a projection of model {self.model.name}{did_you_mean(name, projections)} "
                f"There are: {', '.join(projections)}.",
            )
            require(
                EVERY not in name,
                f"factorization.grouped={name} names experts, which cannot be chosen to share. Leave it out, or leave "
                "factorization.grouped empty.",
            )
        self._check_quantization()

    def _check_quantization(self) -> None:
        factorization = self.factorization
        values = self.quantization.values
        require(
            not isinstance(factorization, PlainConfig) or values is not None or not self.quantization.changes,
            f"quantization={self.quantization.name} has quantization.values=null, which leaves {factorization.name} as it is: "
            "its weights are values. Set their format.",
        )
        require(
            values != TRUNCATED or isinstance(factorization, CoSpaDiConfig | MagnitudeConfig | PruningConfig),
            f"quantization.values={TRUNCATED} is for the values of sparse methods, and {factorization.name} has none. "
            "Choose another quantization.",
        )
        require(
            factorization.accounting == "mask" or not self.quantization.changes,
            f"quantization={self.quantization.name} and factorization.accounting=paper both cut bits of the same values. "
            "Set accounting=mask, or quantization=none.",
        )


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
    OmegaConf.register_new_resolver("conf", lambda: str(CONF), replace=True)


_register()


def load(overrides: Sequence[str]) -> Config:
    """Compose ``conf/`` with Hydra ``overrides`` and return checked dataclasses.

    Raises:
        UserError: for an unknown key, option or value, naming it.
    """
    try:
        composed = _composed(tuple(overrides), CONF, _state_of(CONF))
        _refuse_added_keys(composed)
        return OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_without_package(overrides) or _one_sentence(error)) from error


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...], conf: Path, state: frozenset[tuple[str, int, int]]) -> DictConfig:
    """What Hydra makes of the files in ``conf``. It takes a third of a second, and a study asks for the same cells again and again."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=[_as_text(override) for override in overrides])


def _state_of(conf: Path) -> frozenset[tuple[str, int, int]]:
    """Name, size and time of change of every file of settings: with another one of these, what was composed is out of date."""
    stats = ((str(file), file.stat()) for file in conf.rglob("*.yaml"))
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _without_package(overrides: Sequence[str]) -> str | None:
    """What is wrong with a study's file that lacks the line by which Hydra knows that it overrides other rooms, too."""
    names = [o.removeprefix("study=") for o in overrides if o.startswith("study=")]
    file = CONF / "study" / f"{names[-1]}.yaml" if names else None
    if file is None or not file.is_file() or "@package _global_" in file.read_text(encoding="utf-8"):
        return None
    return (
        f"{file} lacks a line that Hydra reads, although it looks like a comment. Write at its top: # @package _global_"
    )


def model_overrides(source: str) -> list[str]:
    """Settings that take a model as a command line names it: a file of ``conf/model``, a folder, a hub id.

    Raises:
        UserError: the name is a file of ``conf/model`` and something in this folder, or nearly that of a file.
    """
    if _is_named("model", source):
        return [f"model={source}"]
    if not source.strip():
        raise UserError("The name of the model is empty. Name a folder, a hub id, or a model of `cospadi models`.")
    names = [file.stem for file in (CONF / "model").glob("*.yaml") if file.stem != PLACEHOLDERS["model"]]
    near = "" if set(source) & set("/:\\.") or Path(source).exists() else did_you_mean(source, names)
    if len(near) > 1:
        raise UserError(f"{source} is neither a model of `cospadi models` nor a folder here{near}")
    return ["model=any", literal("model.source", source)]


def text_overrides(place: str, text: str) -> list[str]:
    """Settings that put a text in ``place`` (``calibration.text``): a file of ``conf/text``, or a text file.

    Raises:
        UserError: the name is a file of ``conf/text`` and something in this folder.
    """
    if _is_named("text", text):
        return [f"text@{place}={text}"]
    return [f"text@{place}=file", literal(f"{place}.source", str(Path(text).resolve()))]


def literal(setting: str, value: str) -> str:
    """A Hydra override whose value is taken literally."""
    # Hydra takes a backslash as it is, unless quotes follow it.
    quoted = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"{setting}='{quoted}'"


PLACEHOLDERS = {"model": "any", "text": "file"}
"""Files of ``conf`` whose source the command line fills in; nobody names them."""


def _is_named(group: str, name: str) -> bool:
    """Whether ``name`` is that of a file in ``conf/<group>``. Whatever is written like a path is a path.

    Raises:
        UserError: ``name`` is also that of something in this folder.
    """
    is_bare = Path(name).name == name and name not in (".", "..", PLACEHOLDERS.get(group))
    if not is_bare or not (CONF / group / f"{name}.yaml").is_file():
        return False
    if Path(name).exists():
        raise UserError(
            f"{name} is both a file in {CONF / group} and something in this folder. Write ./{name} for what is here."
        )
    return True


def _as_text(override: str) -> str:
    """``override`` with a name that looks like a number in quotes: Hydra takes ``quantization=8`` for a count of files.

    >>> _as_text("quantization=8"), _as_text("calibration.damping=8")
    ("quantization='8'", 'calibration.damping=8')
    """
    group, _, value = override.partition("=")
    folder = CONF / group.lstrip("+").partition("@")[0]
    return f"{group}='{value}'" if re.fullmatch(r"[\d.]+", value) and folder.is_dir() else override


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
    if several := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", str(error)):
        return f"{several[1]}={several[2]} names several, and one is wanted. Run the command once for each."
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(_NOISE)]
    place = next((f"{CONF / m[1]}.yaml: " for line in lines if (m := re.match(r"In '([^']+)'", line))), "")
    at_fault = [c for c in causes if isinstance(c, OmegaConfBaseException) and not re.search(r"\$[A-Z]", str(c))]
    if at_fault and isinstance(at_fault[-1], ConfigKeyError | ConfigAttributeError):
        key = str(at_fault[-1].full_key)
        schema = at_fault[-1].object_type
        if is_dataclass(schema):
            return place + _no_such_setting(key, schema)
    if at_fault:
        lines += str(at_fault[-1]).splitlines()[:1]
    override = getattr(error, "override", None)  # of an override that cannot be parsed
    key = str(at_fault[-1].full_key or "") if at_fault else ""
    whole = " ".join(dict.fromkeys(line.strip() for line in lines))
    whole = re.sub(r"^In '\S+': \w+ raised while composing config: ", "", whole)
    whole = re.sub(r"^Error merging override (\S+)", r"\1:", whole)
    named = f"{override}: " if override else place + (f"{key}: " if key not in whole else "")
    if override:
        return f"{named}{whole}. Write key=value, and quotes around a value that holds = , [ or {{: key='a=b'."
    return f"{named}{whole.rstrip('.?')}. Correct the setting, or compare with the files in {CONF}."


RENAMED = {
    ("factorization", "cospadi_orthogonal"): "compot",
    ("factorization", "cospadi_one_shot"): "rocket",
    ("factorization", "cospadi_plus_private"): "cospadi_outputs_private",
}
"""Files of ``conf`` that have another name now."""


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if (group, option) in RENAMED:
        return f"{group}={option} is called {RENAMED[group, option]} now. Set {group}={RENAMED[group, option]}."
    options = [name for name in error.options or () if not name.endswith("_schema")]
    return (
        f"{group}={option} does not exist{did_you_mean(option, options)} "
        f"There are: {', '.join(options)} (the files in {CONF / group})."
    )


def _no_such_setting(full_key: str, schema: type) -> str:
    names = sorted(f.name for f in fields(schema))
    above, _, key = full_key.rpartition(".")
    below = [] if above else _settings_below(key, schema)
    near = f". Did you mean {' or '.join(below)}?" if below else did_you_mean(key, names)
    return f"{full_key} is not a setting{near} The settings{f' of {above}' if above else ''} are: {', '.join(names)}."


def _settings_below(key: str, schema: type) -> list[str]:
    """Settings of the rooms of ``schema`` whose last word is ``key``: ``factorization.compression_ratio`` for ``ratio``."""
    found = []
    for room, kind in get_type_hints(schema).items():
        kinds = _and_subclasses(kind) if is_dataclass(kind) else []  # a method may have settings of its own
        found += [f"{room}.{field.name}" for kind in kinds for field in fields(kind)]
    return [name for name in dict.fromkeys(found) if re.search(rf"[._]{re.escape(key)}$", name)]


def _and_subclasses(kind: type) -> list[type]:
    return [kind, *(each for child in kind.__subclasses__() for each in _and_subclasses(child))]
