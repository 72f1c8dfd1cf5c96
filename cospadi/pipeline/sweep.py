"""``python -m cospadi.pipeline.sweep -m model=a,b factorization=svd_llm,cospadi factorization.compression_ratio=0.2,0.3``

Hydra's multirun over the cells of the pipeline, with any of its launchers (``hydra/launcher=joblib``, ``submitit_local``,
``submitit_slurm``); without ``-m`` one cell. A job runs Snakemake for its own cell, so results lie where those of a study
lie, carry the same notes of what they depend on, and are computed once, whoever asks. What cells have in common is
computed under a lock while other jobs wait. Tables over all cells go to ``results/tables/<name>``, where
``hydra.job.name=<name>`` names the sweep (default: sweep).
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from cospadi.errors import UserError
from cospadi.pipeline import forks, locks, run
from cospadi.pipeline.study import CellId, Study, digits, n_gpus
from cospadi.records import RESULTS
from cospadi.settings import CONF, PROJECT, Config, load

AXES = ("model", "factorization", "factorization.compression_ratio", "quantization")
"""Settings that name a cell within a table."""
PER_TABLE = ("calibration", "evaluation")
"""Settings that a table has one of: each combination of these has tables of its own."""
MULTIRUN = {"-m", "--multirun"}
LOCKS = Path(RESULTS) / ".locks"


def main(arguments: Sequence[str]) -> int:
    """Check every cell, compute them all, write the tables; the exit code.

    Raises:
        SystemExit: by Hydra, once all cells are through, when one of them failed.
    """
    flags = {a for a in arguments if a.startswith("-")}
    if flags - MULTIRUN:  # --help, --cfg …: Hydra's alone
        job()
        return 0
    try:
        run.require_snakefile(["--snakefile"] if (PROJECT / "Snakefile").is_file() else [])
        name, studies = planned(arguments, multirun=bool(flags))
        if not n_gpus():
            forks.start()
        for study in studies:
            _snakemake(study, _sources(study), os.cpu_count() or 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sys.argv[1:] = [*arguments, *_log_folders(arguments)]
    job()
    for folder, study in zip(_table_folders(name, studies), studies, strict=True):
        from cospadi.pipeline.stages.tables import tabulate

        tabulate(study, folder)
        print(f"Tables: {folder}")
    return 0


def planned(arguments: Sequence[str], multirun: bool) -> tuple[str, list[Study]]:
    """The sweep's name, and its cells as studies: one per calibration and evaluation.

    Raises:
        UserError: naming every bad setting of every cell, or what cannot be swept; or another run works in this folder.
    """
    overrides = _parsed([a for a in arguments if a not in MULTIRUN])
    name = next((o.value() for o in overrides if o.get_key_element() == "hydra.job.name"), "sweep")
    _check(overrides, name, multirun)
    tables: dict[tuple[str, str], list[Config]] = {}
    overrides_of: dict[tuple[str, str], list[str]] = {}
    errors: dict[str, None] = {}
    for cell in itertools.product(*map(_values, (o for o in overrides if not o.is_hydra_override()))):
        try:
            config = load(cell)
        except UserError as error:
            errors[str(error)] = None
            continue
        table = config.calibration.name, config.evaluation.name
        tables.setdefault(table, []).append(config)
        overrides_of.setdefault(table, list(cell))
    if errors:
        raise UserError("\n".join(errors))
    title = [] if any(o.get_key_element() == "study.title" for o in overrides) else [f"study.title={name}"]
    return name, [_study(cells, [*overrides_of[table], *title]) for table, cells in tables.items()]


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def job(config: DictConfig) -> None:
    """Compute one cell.

    Raises:
        UserError: its Snakemake failed.
    """
    study = _study([config], HydraConfig.get().overrides.task)
    (cell,) = study.cells
    cores = _cores(HydraConfig.get().launcher)
    _in_common(study, cell, cores)
    own = [f"{cell.model}-{study.calibration}-{cell.method}-{cell.ratio}"]  # quantizations of a cell share its factors
    if study.searches_ranks(cell.method) or study.allocates(cell.method):
        own.insert(0, f"{cell.model}-{study.calibration}-{cell.method}")  # ratios share the search
    with locks.held([LOCKS / name for name in own]):
        _snakemake(study, [study.evaluation_record(cell)], cores)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(
            f"{str(error).splitlines()[0].rstrip('.')}. Write key=value, or key=a,b for several."
        ) from error


def _values(override: Override) -> Iterable[str]:
    """The overrides of one cell after the other that it stands for."""
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _check(overrides: Sequence[Override], name: object, multirun: bool) -> None:
    """Refuse sweeps in which one cell would overwrite another, and other sweepers than Hydra's."""
    swept = [o.get_key_element() for o in overrides if o.is_sweep_override()]
    if swept and not multirun:
        raise UserError(f"{swept[0]} has several values. Add -m to compute all of them.")
    for key in swept:
        if key not in AXES + PER_TABLE:
            raise UserError(
                f"{key} is swept, but results are filed under the names of {', '.join(AXES + PER_TABLE)} alone: one cell would "
                f"overwrite the other. Give each value a file of its own in {CONF}, and sweep over their names."
            )
    if any(o.get_key_element() == "hydra/sweeper" for o in overrides):
        raise UserError(
            "hydra/sweeper is set, but cells are known before the first job only to Hydra's own. Leave it out."
        )
    launchers = [o.value() for o in overrides if o.get_key_element() == "hydra/launcher"]
    if "submitit_slurm" in launchers and shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs Slurm, and there is no sbatch here. Start the sweep on a login node of the "
            "cluster, or set hydra/launcher=joblib."
        )
    if not re.fullmatch(r"\w+", str(name)) or (CONF / "study" / f"{name}.yaml").is_file():
        raise UserError(
            f"hydra.job.name={name} cannot name a sweep: tables are filed under it. Take letters, digits and underscores, "
            "and not the name of a study."
        )
    if locks.is_locked(Path.cwd()):
        raise UserError(f"Snakemake is at work in {Path.cwd()}. Wait for it to end, or work in another folder.")


def _study(cells: Sequence[Config | DictConfig], overrides: Sequence[str]) -> Study:
    """The study of exactly these cells, which are a grid; ``overrides`` are those of any of them."""
    models, methods, quantizations = (
        list(dict.fromkeys(getattr(cell, room).name for cell in cells))
        for room in ("model", "factorization", "quantization")
    )
    ratios = list(dict.fromkeys(digits(cell.factorization.compression_ratio) for cell in cells))
    rest = [o for o in overrides if _key(o) not in ("study", *AXES)]
    grid = {"models": models, "methods": methods, "compression_ratios": ratios, "quantizations": quantizations}
    only = {"ratios_of": ratios, "quantizations_of": quantizations}  # whatever the study has for a method
    return Study(
        cells[0].study.name,
        [
            *rest,
            *(f"study.{field}=[{','.join(values)}]" for field, values in grid.items()),
            *(f"++study.{field}.{method}=[{','.join(values)}]" for field, values in only.items() for method in methods),
        ],
    )


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _sources(study: Study) -> list[str]:
    """Records of the models and texts: fetched once, where the sweep is started, which may be the only place with a network."""
    return [
        *(f"{RESULTS}/sources/models/{model}/record.json" for model in study.study.models),
        *(f"{RESULTS}/sources/texts/{text}/record.json" for text in study.texts),
    ]


def _in_common(study: Study, cell: CellId, cores: int) -> None:
    """Calibration and the dense model's evaluation, which all cells of a model share: one job makes them, others wait."""
    model = cell.model
    targets = [f"{RESULTS}/calibration/{model}/{study.calibration}/record.json", study.dense_record(model)]
    settings = study.recipe("calibration", model=model), study.recipe("evaluation", model=model)
    if study.needs_fisher(cell.method):
        targets.insert(1, f"{RESULTS}/calibration/{model}/{study.calibration}/fisher.json")
        settings = *settings, study.recipe("fisher", model=model)
    if (*targets, *settings) not in _made:
        with locks.held([LOCKS / model]):
            _snakemake(study, targets, cores)
        _made.add((*targets, *settings))


_made: set[tuple[str, ...]] = set()
"""Targets that this process has made, so that it does not ask Snakemake again for every cell."""


def _snakemake(study: Study, targets: Sequence[str], cores: int) -> None:
    where = ["--snakefile", str(PROJECT / "Snakefile"), "--nolock"]  # locks of ours instead: jobs run side by side
    if run.main([*targets, *where, "--cores", str(cores), "--config", *study.snakemake_config]):
        raise UserError(f"{targets[-1]} could not be made: what failed stands above.")


def _cores(launcher: Any) -> int:
    """Cores of one job: what its queue reserves for it, or its share of this machine."""
    if (reserved := launcher.get("cpus_per_task")) is not None:
        return int(reserved)
    beside = int(launcher.get("n_jobs") or 1)
    return max(1, (os.cpu_count() or 1) // beside) if beside > 0 else 1


def _log_folders(arguments: Sequence[str]) -> Iterator[str]:
    """Where Hydra keeps the settings and the output of every job, unless somebody says so."""
    for kind in ("run", "sweep"):
        setting = f"hydra.{kind}.dir"
        if not any(_key(a) == setting for a in arguments):
            yield f"{setting}={RESULTS}/sweeps/${{hydra.job.name}}/${{now:%Y-%m-%d_%H-%M-%S}}"


def _table_folders(name: str, studies: Sequence[Study]) -> list[Path]:
    names = [name if len(studies) == 1 else f"{name}_{s.calibration}_{s.evaluation}" for s in studies]
    return [Path(RESULTS) / "tables" / each for each in names]


if __name__ == "__main__":
    # by its module's name, under which other processes find the job
    from cospadi.pipeline.sweep import main as sweep

    try:
        sys.exit(sweep(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nStopped. Finished cells are kept: type the same command again to go on.", file=sys.stderr)
        sys.exit(130)
