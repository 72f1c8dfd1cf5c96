"""A study as Snakemake sees it: the grid of cells, and the settings that every job depends on.

Hydra owns the values. This module puts every cell together from compositions, checks all of them before the first job, and hands
out wildcards, overrides and recipes. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from cospadi.errors import UserError, did_you_mean
from cospadi.evaluation.task_names import check_tasks
from cospadi.factorization.settings import layer_blocks
from cospadi.pipeline import recipes
from cospadi.quantization.settings import NONE, QuantizationConfig
from cospadi.records import DENSE, RESULTS, file_hash
from cospadi.settings import Config, load
from cospadi.sources.addresses import local_path
from cospadi.sources.checkpoints import n_layers
from cospadi.sources.settings import ModelConfig, TextConfig
from cospadi.tables import PUBLISHED_FILE
from cospadi.tracking.settings import DISABLED


def n_gpus() -> int:
    """NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@dataclass(frozen=True)
class CellId:
    """One point of the grid."""

    model: str
    method: str
    ratio: str
    quantization: str = NONE

    @property
    def folder(self) -> str:
        """Its name among those of one model and calibration."""
        return f"{self.method}-{self.ratio}" + (f"-{self.quantization}" if self.quantization != NONE else "")


def parse_overrides(overrides: str | Sequence[str] | None) -> list[str]:
    """Hydra overrides from ``snakemake --config overrides=…``: one string split like a shell does, or a list.

    >>> parse_overrides("evaluation.limit=50 factorization.rho=2")
    ['evaluation.limit=50', 'factorization.rho=2']

    Raises:
        UserError: when quotes do not pair up; snakemake takes them off at either end.
    """
    if overrides is None:
        return []
    if isinstance(overrides, list | tuple):
        return [str(item) for item in overrides]
    try:
        return shlex.split(str(overrides))
    except ValueError as error:
        raise UserError(
            f"overrides={overrides}: {error}. A value with blanks or quotes belongs into a file of conf/, not on the command line."
        ) from error


class Study:
    """The cells of ``conf/study/<name>.yaml`` under further overrides.

    Raises:
        UserError: naming every bad setting of every cell, at once.
    """

    def __init__(self, name: str = "default", overrides: Sequence[str] = ()):
        _refuse_axes(overrides)
        self.overrides = [f"study={name}", *overrides]
        self._common = [o for o in self.overrides if not _factorization_field(o)]
        self.root = load(self._common)
        self.study = self.root.study
        self.name = name
        self._configs: dict[CellId, Config] = {}
        self._overrides: dict[CellId, list[str]] = {}
        self._compose()

    def _compose(self) -> None:
        """Settings of every cell; all mistakes are collected, so that they are corrected in one go."""
        errors: dict[str, None] = {}
        used: set[str] = set()
        for model, method in product(self.study.models, self.study.methods):
            try:
                overrides = self._overrides_of(method, used)
                # A composition takes a third of a second: one for each model and each method, not for each pair.
                config = replace(load([*overrides, f"model={self.study.models[0]}"]), model=self._part("model", model))
                n_layers(config.model)
            except UserError as error:
                errors[str(error)] = None
                continue
            ratios = self.study.ratios_of.get(method, self.study.compression_ratios)
            for ratio, name in product(ratios, self.study.quantizations_of.get(method, self.study.quantizations)):
                cell = CellId(model, method, digits(ratio), name)
                try:
                    factorization = replace(config.factorization, compression_ratio=ratio)
                    quantization = self._part("quantization", name)
                    composed = replace(config, factorization=factorization, quantization=quantization)
                except UserError as error:
                    errors[str(error)] = None
                    continue
                self._configs[cell] = composed
                self._overrides[cell] = [
                    *overrides,
                    f"model={model}",
                    f"factorization.compression_ratio={cell.ratio}",
                    f"quantization={name}",
                ]
        errors |= dict.fromkeys(self._mistakes())
        if errors:
            raise UserError("\n".join(errors))
        self._refuse_unused(used)

    def _refuse_unused(self, used: set[str]) -> None:
        """
        Raises:
            UserError: an override of ``factorization`` that none of the methods has.
        """
        unused = [field for o in self.overrides if (field := _factorization_field(o)) and o not in used]
        if unused:
            settings = sorted(set().union(*map(_fields_of, self.study.methods)))
            named = ", ".join(f"factorization.{field}" for field in unused)
            raise UserError(
                f"No method of study {self.name} has the setting {named}{did_you_mean(unused[0], settings)} "
                f"Methods: {', '.join(self.study.methods)}; their settings: {', '.join(settings)}."
            )

    @cache  # noqa: B019 - lives as long as the study
    def _part(self, group: str, name: str) -> ModelConfig | QuantizationConfig:
        """What ``conf/<group>/<name>.yaml`` says under the study's overrides."""
        of_root = getattr(self.root, group)
        if of_root.name == name and not any(o.startswith(f"{group}.name=") for o in self._common):
            return of_root
        return getattr(load([*self._common, f"{group}={name}"]), group)

    def _mistakes(self) -> Iterator[str]:
        """What no single setting shows: names that do not match their files, texts that overlap, unknown tasks."""
        named_files = [(self.name, self.study.name, "study")]
        for cell, config in self._configs.items():
            named_files += [
                (cell.model, config.model.name, "model"),
                (cell.method, config.factorization.name, "factorization"),
                (cell.quantization, config.quantization.name, "quantization"),
            ]
        for option, name, group in dict.fromkeys(named_files):
            if option != name:
                yield f"conf/{group}/{option}.yaml says name: {name}. Set it to {option}: results are filed under it."
        calibration = self.root.calibration.text
        parts = [self.root.calibration, self.root.evaluation, calibration, *self.root.evaluation.texts]
        for name in dict.fromkeys([*(name for _, name, _ in named_files), *(part.name for part in parts)]):
            if not re.fullmatch(r"\w+", name):
                yield f"name: {name} is not made of letters, digits and underscores only, and results are filed under it."
        for evaluation in self.root.evaluation.texts:
            if _place(calibration) == _place(evaluation):
                yield (
                    f"Calibration and evaluation both read {calibration.source}: a model must not be measured on the text "
                    "it was fitted to. Choose another text@calibration.text or text@evaluation.text."
                )
            elif calibration.name == evaluation.name:
                yield f"Calibration and evaluation texts differ but are both named {calibration.name}. Rename one."
        if len({text.name for text in self.root.evaluation.texts}) < len(self.root.evaluation.texts):
            yield f"evaluation.text and evaluation.second_text are both named {self.root.evaluation.text.name}. Name two texts, or one."
        if self.root.evaluation.tasks:
            try:
                check_tasks(self.root.evaluation)
            except UserError as error:
                yield str(error)

    def _overrides_of(self, method: str, used: set[str]) -> list[str]:
        """What composes the method's cells, but for their model; ``factorization.x=…`` goes only to methods that have a field ``x``."""
        fitting = [o for o in self.overrides if not _factorization_field(o) or _has(_fields_of(method), o)]
        used.update(fitting)
        return [*fitting, f"factorization={method}"]

    @property
    def cells(self) -> list[CellId]:
        return list(self._configs)

    @property
    def calibration(self) -> str:
        return self.root.calibration.name

    @property
    def evaluation(self) -> str:
        return self.root.evaluation.name

    @cached_property
    def texts(self) -> dict[str, TextConfig]:
        return {text.name: text for text in (self.root.calibration.text, *self.root.evaluation.texts)}

    def config(
        self,
        model: str | None = None,
        method: str | None = None,
        ratio: str | None = None,
        quantization: str | None = None,
    ) -> Config:
        """The composition of a cell; of the first that fits when not every part is named."""
        return self._configs[self._first(model, method, ratio, quantization)]

    def overrides_for(
        self,
        model: str | None = None,
        method: str | None = None,
        ratio: str | None = None,
        quantization: str | None = None,
    ) -> str:
        """The cell's Hydra overrides as they are typed on a command line."""
        return shlex.join(self._overrides[self._first(model, method, ratio, quantization)])

    @property
    def typed(self) -> str:
        """The study's own overrides as they are typed on a command line."""
        return shlex.join(self.overrides)

    @property
    def snakemake_config(self) -> list[str]:
        """What follows ``snakemake --config`` for this study."""
        return [f"study={self.name}", f"overrides={json.dumps(self.overrides[1:])}"]

    def cell(self, model: str, method: str, ratio: str, quantized: str = "") -> CellId:
        """The cell with these wildcards: ``quantized`` is ``-int8``, or nothing."""
        return self._first(model, method, ratio, quantized.removeprefix("-") or NONE)

    def _first(
        self, model: str | None, method: str | None, ratio: str | None, quantization: str | None = None
    ) -> CellId:
        asked_for = (model, method, ratio, quantization)
        for cell in self._configs:
            named = (cell.model, cell.method, cell.ratio, cell.quantization)
            if all(part in (None, its) for part, its in zip(asked_for, named, strict=True)):
                return cell
        raise UserError(
            f"Study {self.name} has no cell with model {model}, method {method}, ratio {ratio}, quantization {quantization}."
        )

    def layers(self, cell: CellId) -> list[str]:
        """The blocks of layers that factorization jobs cover, as ``first-last``; none cuts layers apart that share."""
        config = self.config(cell.model, cell.method, cell.ratio)
        depth = n_layers(config.model)
        return layer_blocks(config.factorization, depth, self.study.layers_per_job or depth)

    def searches_ranks(self, method: str) -> bool:
        return self.config(method=method).factorization.searches_ranks

    def needs_fisher(self, method: str) -> bool:
        return self.config(method=method).factorization.needs_fisher

    def allocates(self, method: str) -> bool:
        return self.config(method=method).factorization.allocates

    def recipe(self, room: str, **wildcards: str) -> str:
        """The settings a job of ``room`` depends on, as canonical JSON: a change re-runs just that job."""
        if room == "text":
            return recipes.of_text(self.texts[wildcards["text"]])
        if room == "tables":
            return recipes.canonical(self._titles)
        if room == "tracking":
            return recipes.canonical(asdict(self.root.tracking))
        named = (wildcards.get(name) for name in ("model", "method", "ratio", "quantization"))
        return recipes.of_stage(room, self.config(*named))

    @property
    def _titles(self) -> list[object]:
        """What its tables print beside the records: titles, and published numbers."""
        return [
            self.study.title,
            {c.model.name: c.model.title for c in self._configs.values()},
            {c.factorization.name: c.factorization.title for c in self._configs.values()},
            {c.quantization.name: c.quantization.title for c in self._configs.values()},
            {name: text.title for name, text in self.texts.items()},
            *self._published,
        ]

    @property
    def _published(self) -> list[object]:
        """The reference numbers that its tables show, as a hash."""
        return [self.study.published, file_hash(PUBLISHED_FILE)] if self.study.published else []

    @property
    def wildcards(self) -> dict[str, str]:
        """Constraints that keep paths unambiguous."""
        return {
            "model": r"[^/]+",
            "text": r"[^/]+",
            "calibration": r"[^/]+",
            "method": r"[^/-]+",
            "ratio": r"0\.\d+",
            "quantization": r"\w+",
            "quantized": r"(-\w+)?",
            "layers": r"\d+-\d+",
            "evaluation": r"[^/]+",
            "study": r"[^/]+",
        }

    # Paths: one place that knows where every room puts its results.

    def documents(self, text: TextConfig | None) -> list[str]:
        """The file of a text's documents; none of no text."""
        return [] if text is None else [f"{RESULTS}/sources/texts/{text.name}/documents.json"]

    def factors(self, cell: CellId, suffix: str) -> list[str]:
        """What a cell's model is made of: its factors, quantized where it is."""
        room = "factorization" if cell.quantization == NONE else "quantization"
        folder = f"{RESULTS}/{room}/{cell.model}/{self.calibration}/{cell.folder}"
        return [f"{folder}/{layers}.{suffix}" for layers in self.layers(cell)]

    def evaluation_record(self, cell: CellId) -> str:
        return f"{RESULTS}/evaluation/{self.place(cell.model, cell)}/record.json"

    def dense_record(self, model: str) -> str:
        return f"{RESULTS}/evaluation/{self.place(model)}/record.json"

    def earlier_records(self, cell: CellId) -> list[str]:
        """Records of what was done before the cell's factors: a rank search, and of quantized ones their factorization."""
        records = []
        if cell.quantization != NONE:
            records += self.factors(replace(cell, quantization=NONE), "json")
        if self.searches_ranks(cell.method):
            folder = f"{RESULTS}/factorization/{cell.model}/{self.calibration}"
            records += [f"{folder}/{cell.method}/sensitivity.json", f"{folder}/{cell.method}-{cell.ratio}/ranks.json"]
        if self.needs_fisher(cell.method):
            records.append(f"{RESULTS}/calibration/{cell.model}/{self.calibration}/fisher.json")
        if self.allocates(cell.method):
            folder = f"{RESULTS}/factorization/{cell.model}/{self.calibration}"
            records += [f"{folder}/{cell.method}/losses.json", f"{folder}/{cell.method}-{cell.ratio}/ratios.json"]
        return records

    def records(self, cell: CellId) -> list[str]:
        """Every record that a cell's row is made of."""
        return [self.evaluation_record(cell), *self.factors(cell, "json"), *self.earlier_records(cell)]

    def inputs_of_tables(self) -> list[str]:
        """Every record a study's tables are made of."""
        return [
            *(self.dense_record(model) for model in self.study.models),
            *(record for cell in self.cells for record in self.records(cell)),
        ]

    @property
    def summary(self) -> str:
        return f"{RESULTS}/tables/{self.name}/summary.csv"

    def place(self, model: str, cell: CellId | None = None) -> str:
        """Where a cell's results are below a room's folder; without a cell, the dense model's."""
        return f"{model}/{f'{self.calibration}/{cell.folder}' if cell else DENSE}/{self.evaluation}"

    @property
    def outputs(self) -> list[str]:
        """What a whole run is for."""
        tracked = self.root.tracking.mode != DISABLED
        return [self.summary, *([f"{RESULTS}/tracking/{self.name}/record.json"] if tracked else [])]


def _refuse_axes(overrides: Sequence[str]) -> None:
    """The grid sets these for every cell: another value would be dropped without a word."""
    axes = {
        "model": "study.models",
        "factorization": "study.methods",
        "quantization": "study.quantizations",
        "factorization.compression_ratio": "study.compression_ratios",
        "study": "--config study=<name>",
    }
    for override in overrides:
        key, _, value = override.partition("=")
        if axis := axes.get(key.lstrip("+~")):
            raise UserError(
                f"{override} has no effect on a whole study. Set {axis.replace('<name>', value)}"
                + ("." if "--" in axis else f"=[{value}].")
            )


def _factorization_field(override: str) -> str | None:
    """
    >>> _factorization_field("factorization.rho=3"), _factorization_field("factorization=svd")
    ('rho', None)
    """
    key = override.split("=")[0].lstrip("+~")
    return key.split(".")[1] if key.startswith("factorization.") else None


def digits(ratio: float) -> str:
    """All digits and no exponent, so that two ratios never share a folder.

    >>> digits(0.3), digits(0.1234567), digits(1e-05)
    ('0.3', '0.1234567', '0.00001')
    """
    return format(Decimal(repr(ratio)), "f")


@cache
def _fields_of(method: str) -> dict[str, object]:
    """Fields of the settings class behind ``conf/factorization/<method>.yaml``, and their values there."""
    composed = load([f"factorization={method}"]).factorization
    return {field.name: getattr(composed, field.name) for field in fields(composed)}


def _has(settings: dict[str, object], override: str) -> bool:
    """Whether a method has the setting. It does not have those inside a part that it leaves out (``null``)."""
    field = _factorization_field(override)
    inside = override.split("=")[0].count(".") > 1
    return field in settings and not (inside and settings[field] is None)


def _place(text: TextConfig) -> tuple[str | None, ...]:
    path = local_path(text.source)
    source = text.source if path is None else str(path.resolve())
    return source, text.dataset_config, text.split if text.parser == "dataset" else None
