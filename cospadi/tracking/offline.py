"""Runs as W&B's offline files, and their upload. The only module that talks to W&B about runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cospadi.tracking.mode import base_url
from cospadi.tracking.runs import Run
from cospadi.tracking.settings import TrackingConfig

STAGING = "staging"
"""Folder beside ``wandb`` with copies of tables and artifacts, a folder per run. ``wandb sync`` reads them."""


def write(runs: Sequence[Run], folder: Path, tracking: TrackingConfig) -> Iterator[tuple[Run, Path | None, str]]:
    """Yield every run with the folder it was written to, or ``None`` and what went wrong.

    The first run takes seconds, as it starts W&B's own process; each further one some tenths of a second. After a failure
    the others are not tried: each might wait for as long.
    """
    folder = Path(folder).absolute()
    trouble = ""
    with _quiet_environment(folder):
        for run in runs:
            path = None
            if not trouble:
                try:
                    path = _write(run, folder, tracking)
                except Exception as error:  # noqa: BLE001 - whatever W&B raises, the results it mirrors are complete
                    trouble = f"W&B failed on {run.name}: {type(error).__name__}: {error}"
            yield run, path, trouble
        if "wandb" in sys.modules and runs:
            sys.modules["wandb"].teardown()


@contextmanager
def _quiet_environment(folder: Path) -> Iterator[None]:
    """No ``WANDB_…`` variable changes what is logged, and no key is at hand."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ.update(kept)


def _write(run: Run, folder: Path, tracking: TrackingConfig) -> Path:
    import wandb

    remove(folder, run.id)
    os.environ["WANDB_DATA_DIR"] = str(folder / STAGING / run.id)  # where W&B copies artifacts to
    logged = wandb.init(
        mode="offline",
        dir=str(folder),
        project=tracking.project,
        entity=tracking.entity,
        id=run.id,
        name=run.name,
        group=run.group,
        job_type=run.job_type,
        tags=run.tags,
        config=run.config,
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=60,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_save_requirements=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        ),
    )
    try:
        logged.define_metric("layer", summary="none")
        logged.define_metric("output_error/*", step_metric="layer", summary="none")
        for step, layer in enumerate(run.layers):
            logged.log(layer, step=step)
        shown = {name: wandb.Table(columns=columns, data=rows) for name, (columns, rows) in run.tables.items()}
        shown |= {f"figures/{f.stem}": wandb.Image(str(f)) for f in run.files if f.suffix == ".png"}
        if shown:
            logged.log(shown, step=len(run.layers))
        logged.summary.update(run.summary)
        if run.files:
            artifact = wandb.Artifact(f"{run.group}-{run.name}", type=run.job_type)
            for file in run.files:
                artifact.add_file(str(file))
            logged.log_artifact(artifact)
    finally:
        logged.finish()
    return Path(logged.settings.sync_dir)


def uploaded(files: Path) -> bool:
    """Whether ``wandb sync`` has left its mark in a run's folder."""
    return any(Path(files).glob("*.wandb.synced"))


def remove(folder: Path, run: str) -> None:
    """Take away the files of a run."""
    for left in (*folder.glob(f"wandb/offline-run-*-{run}"), folder / STAGING / run):
        shutil.rmtree(left, ignore_errors=True)


def upload(runs: Sequence[Path], tracking: TrackingConfig) -> str:
    """``wandb sync`` of runs, for at most ``tracking.upload_timeout`` seconds; what went wrong, or nothing.

    A process of its own can be ended when the network hangs, and what it has not uploaded can be tried again.
    """
    environment = os.environ | {"WANDB_BASE_URL": base_url(), "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, runs)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=tracking.upload_timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the upload took longer than tracking.upload_timeout={tracking.upload_timeout:g} s"
    left = sum(not uploaded(run) for run in runs)
    return (
        "" if not left else f"wandb sync left {left} of {len(runs)} runs (exit code {done.returncode}, see its output)"
    )
