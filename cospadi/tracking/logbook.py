"""A note on every run: the hash of what was written, and whether it is uploaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cospadi.records import read_json, text_hash, write_json
from cospadi.tracking import mode, offline
from cospadi.tracking.runs import Run
from cospadi.tracking.settings import OFFLINE, ONLINE, TrackingConfig

NOT_WRITTEN = "none"
"""Mode of a run that W&B did not even write as a file."""


class Logbook:
    """Runs of a study and a note on each, kept as ``<folder>/<place>/record.json``."""

    def __init__(self, runs: Sequence[Run], folder: Path, tracking: TrackingConfig) -> None:
        self.runs = runs
        self.folder = folder
        self.tracking = tracking
        self._notes = {run.place: self._note_before(run) for run in runs}

    @property
    def notes(self) -> list[dict[str, Any]]:
        return list(self._notes.values())

    @property
    def new(self) -> list[Run]:
        """Runs with something to log that was not written yet."""
        return [run for run in self.runs if self._notes[run.place].get("content") != self._content(run)]

    def write_new(self) -> Iterator[tuple[str, str]]:
        """Write what is `new` as W&B's offline files; yields each run's name and where it went, or what went wrong."""
        for run, files, trouble in offline.write(self.new, self.folder, self.tracking):
            before = self._notes[run.place].get("run", run.id)
            if files and before != run.id:  # the same cell, under other settings
                offline.remove(self.folder, before)
            note = {
                "place": run.place,
                "run": run.id,
                "name": run.name,
                "content": self._content(run) if files else None,
                "files": str(files.relative_to(self.folder.absolute())) if files else None,
                "mode": OFFLINE if files else NOT_WRITTEN,
                "why": trouble or "not uploaded yet",
                "url": None,
            }
            self._keep(run, note)
            yield run.name, trouble or note["files"]

    def upload(self) -> str:
        """Upload what is not uploaded yet, when the server answers; what came of it, in a sentence."""
        written = [(run, self.folder / files) for run in self.runs if (files := self._notes[run.place]["files"])]
        pending = [files for _, files in written if not offline.uploaded(files)]
        reach = mode.reach(self.tracking) if pending else mode.Reach(False, "nothing is left to upload")
        why = (reach.online and offline.upload(pending, self.tracking)) or reach.why
        for run, files in written:
            note = self._notes[run.place]
            if offline.uploaded(files):
                url = note["url"] or mode.page(reach.entity, self.tracking.project, run.id)
                self._keep(run, note | {"mode": ONLINE, "why": None, "url": url})
            else:
                self._keep(run, note | {"mode": OFFLINE, "why": why, "url": None})
        return self._outcome(why)

    def _outcome(self, why: str) -> str:
        count = Counter(note["mode"] for note in self.notes)
        outcome = f"W&B: {count[ONLINE]} of {len(self.runs)} runs are uploaded."
        if count[OFFLINE]:
            kept = self.folder / "wandb"
            outcome += f" {count[OFFLINE]} are kept as files, as {why}: `wandb sync {kept}` uploads them."
        if failed := [note["why"] for note in self.notes if note["mode"] == NOT_WRITTEN]:
            outcome += f" {len(failed)} were not written: {failed[0]}."
        return outcome

    def _content(self, run: Run) -> str:
        """Hash of all that is logged, and of where it is logged to."""
        return text_hash(f"{run.content} {self.tracking.entity} {self.tracking.project} {self.tracking.revision}")

    def _note_of(self, run: Run) -> Path:
        return self.folder / run.place / "record.json"

    def _note_before(self, run: Run) -> dict[str, Any]:
        """The note on a run; without its content when its files are gone, so that it is written again."""
        note = read_json(self._note_of(run)) if self._note_of(run).is_file() else {}
        has_files = note.get("files") and list((self.folder / note["files"]).glob("*.wandb"))
        return note if has_files else note | {"content": None}

    def _keep(self, run: Run, note: dict[str, Any]) -> None:
        self._notes[run.place] = note
        write_json(self._note_of(run), note)
