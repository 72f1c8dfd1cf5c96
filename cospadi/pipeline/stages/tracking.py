"""Stages of room 8: records -> W&B runs and a workspace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cospadi.errors import UserError
from cospadi.pipeline.stages.tables import study_cells
from cospadi.pipeline.study import Study
from cospadi.progress import Progress
from cospadi.records import Record, read_json, write_json
from cospadi.tracking import mode
from cospadi.tracking import workspace as view
from cospadi.tracking.logbook import Logbook
from cospadi.tracking.runs import Run, cell_runs, tables_run
from cospadi.tracking.settings import DISABLED


def track(study: Study, folder: Path) -> None:
    """Room 8: records, tables and figures -> a W&B run for every finished cell, and one for the tables.

    Whatever W&B does, this writes its records and ends well. A run is written again only when there is something new to
    log; what is not uploaded yet is uploaded when the server answers.

    Raises:
        UserError: with ``tracking.mode=online`` and no API key, or with ``disabled``.
    """
    tracking = study.root.tracking
    if tracking.mode == DISABLED:
        raise UserError("tracking.mode=disabled: there is nothing to do. Set tracking=offline, or auto.")
    mode.require_key(tracking)
    log = Record("tracking", asdict(tracking))
    if not study_cells(study, unfinished=True):
        raise UserError(
            f"Study {study.name} has no finished cell in {Path.cwd()}, so there is nothing to log. Run the study there, or change "
            "to the folder where it ran."
        )
    book = Logbook(_runs(study), folder, tracking)
    progress = Progress(len(book.new), f"W&B: {len(book.runs)} runs of study {study.name}; those to write")
    for name, where in book.write_new():
        progress.step(name, where)
    outcome = book.upload()
    print(outcome, flush=True)
    log.finish(folder / "record.json", told=outcome, runs=book.notes)


def _runs(study: Study) -> list[Run]:
    """What is to be logged: all finished cells, and the tables where there are some."""
    runs = cell_runs(study.name, study_cells(study, unfinished=True))
    summary = Path(study.summary)
    if summary.is_file():
        runs.append(tables_run(study.name, study.study.title, summary.parent))
    return runs


def workspace(study: Study, definition: Path) -> None:
    """The view that compares a study's runs in W&B: written to ``definition``, and saved there when the server answers."""
    mode.require_key(study.root.tracking)
    before = read_json(definition) if definition.is_file() else {}
    runs = [run for run in _runs(study) if run.job_type != "tables"]
    built = view.build(study.name, study.study.title, runs, study.root.tracking)
    reach = mode.reach(study.root.tracking)
    url = before.get("url")
    saved = view.save(built, url, reach) if reach.online else {"url": url, "why": reach.why}
    write_json(definition, saved | view.definition(built))
    print(saved["url"] or f"{definition}: kept as a file, as {reach.why}.", flush=True)
