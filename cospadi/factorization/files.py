"""A factors file: what is stored of every projection in a block of layers, and in its metadata a line for each.

A line says kind, shape, who stores what the projection shares, and formats, the last two only where they apply:
``sparse_dictionary 576 1536 model.layers.0.mlp.gate_proj dictionary=int4:128 values=int4:128``. What a group shares is
written once, under its first member.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cospadi.factorization.factors import KINDS, Factors, private_tensors, shared_matrix, shared_names
from cospadi.records import read_json, write_json, write_tensors


@dataclass
class FactorsFile:
    """Collects projections in the order in which they are finished; written in that of ``names``."""

    names: Sequence[str]
    _rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _lines: dict[str, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any], factors: Factors) -> None:
        """``row``: what the record says of the projection, at least ``name``, ``kind``, ``d_in``, ``d_out``, ``group``."""
        name = row["name"]
        self._rows[name] = row
        self._lines[name] = _line(row, factors)
        self._tensors[name] = private_tensors(factors, shares(row))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the record, in the order of the file."""
        return [self._rows[name] for name in self.names]

    def write(self, file: Path) -> None:
        """All at once, or not at all."""
        tensors = {f"{name}.{part}": tensor for name in self.names for part, tensor in self._tensors[name].items()}
        write_tensors(file, tensors, {name: self._lines[name] for name in self.names})


class FinishedGroups:
    """Factors of the groups that are done, a file each, so that a factorization that was cut off goes on after them.

    They are used again as long as ``key`` is the same: whatever the factors depend on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = Path(folder)
        note = self.folder / "key"
        if not note.is_file() or note.read_text(encoding="utf-8") != key:
            self.remove()
            self.folder.mkdir(parents=True)
            note.write_text(key, encoding="utf-8")

    def read(self, names: Sequence[str]) -> list[tuple[dict[str, Any], Factors]] | None:
        """Rows and factors of a group, in the order of ``names``; ``None`` where it is not done."""
        rows = self.folder / f"{names[0]}.json"
        if not rows.is_file():
            return None
        factors = dict(read_factors([rows.with_suffix(".safetensors")], order=names))
        return [(row, factors[row["name"]]) for row in read_json(rows)]

    def keep(self, rows: Sequence[dict[str, Any]], factors: Sequence[Factors]) -> None:
        """Store a group; its rows come last, and say that it is whole."""
        file = FactorsFile([row["name"] for row in rows])
        for row, compact in zip(rows, factors, strict=True):
            file.add(row, compact)
        rows_file = self.folder / f"{rows[0]['name']}.json"
        file.write(rows_file.with_suffix(".safetensors"))
        write_json(rows_file, list(rows))

    def remove(self) -> None:
        """Once all factors are in one file."""
        shutil.rmtree(self.folder, ignore_errors=True)


def shares(row: dict[str, Any]) -> bool:
    """Whether a projection uses what the first of its group stores."""
    return row["group"] is not None and row["group"][0] != row["name"]


def read_factors(files: Sequence[Path], order: Sequence[str] = ()) -> Iterator[tuple[str, Factors]]:
    """Yield ``(projection name, factors)`` of every projection in the files, those of a group one after another.

    Those named in ``order`` come in it, all others by name. A group's hold one and the same tensor; the first of them is the
    one that stores it.
    """
    place = {name: number for number, name in enumerate(order)}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            entries = {name: _Entry.read(line) for name, line in tensors.metadata().items() if name != "format"}
            parts: dict[str, list[str]] = {name: [] for name in entries}
            for key in tensors.keys():  # noqa: SIM118
                name, _, part = key.rpartition(".")
                parts[name].append(part)
            stores = {name: entry.stores or name for name, entry in entries.items()}
            first = None
            shared = {}
            for name in sorted(entries, key=lambda n: (place.get(stores[n], 0), stores[n], stores[n] != n)):
                entry = entries[name]
                is_first = stores[name] == name
                stored = {part: tensors.get_tensor(f"{name}.{part}") for part in parts[name]}
                stored |= {"d_out": torch.tensor(entry.d_out)} | ({} if is_first else shared)
                factors = KINDS[entry.kind].from_tensors(stored, entry.formats)
                if is_first:
                    first = factors
                    shared = {part: stored[part] for part in shared_names(factors)}
                else:
                    factors = replace(factors, **{factors.shared_part: shared_matrix(first)})
                yield name, factors


def _line(row: dict[str, Any], factors: Factors) -> str:
    words = [row["kind"], str(row["d_in"]), str(row["d_out"]), *([row["group"][0]] if shares(row) else [])]
    return " ".join([*words, *(f"{part}={name}:{size}" for part, (name, size) in factors.formats.items())])


@dataclass(frozen=True)
class _Entry:
    kind: str
    d_out: int
    stores: str | None
    """The first of the group, for the others of it."""
    formats: dict[str, tuple[str, int]]

    @classmethod
    def read(cls, line: str) -> _Entry:
        """
        >>> _Entry.read("low_rank 576 192 a.q_proj right=int4:128")
        _Entry(kind='low_rank', d_out=192, stores='a.q_proj', formats={'right': ('int4', 128)})
        """
        words = line.split()
        kind, _, d_out, *stores = (word for word in words if "=" not in word)
        formats = {}
        for word in (word for word in words if "=" in word):
            part, how = word.split("=")
            name, size = how.split(":")
            formats[part] = (name, int(size))
        return cls(kind, int(d_out), stores[0] if stores else None, formats)
