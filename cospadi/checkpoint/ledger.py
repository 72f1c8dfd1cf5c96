"""The bytes of a compressed checkpoint, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cospadi.checkpoint.read import compression_of, opened, parts_of
from cospadi.factorization import budget


def ledger(folder: Path) -> dict[str, Any]:
    """Bytes of a compressed checkpoint, part by part and layer by layer, beside those of the dense one in 16 bits.

    Raises:
        UserError: see `compression_of`; or a shard is damaged.
    """
    folder = Path(folder)
    compression = compression_of(folder)
    rows = []
    checkpoint = opened(folder, compression["modules"])
    for name, spec in compression["modules"].items():
        parts = {part: full for part, full in parts_of(name, spec).items() if full == f"{name}.{part}"}  # not another's
        sizes = {part: checkpoint.n_bytes(full) for part, full in parts.items() if part != "bias"}
        dense = budget.dense_bits(spec["d_in"], spec["d_out"]) // 8
        rows.append({"name": name, **spec, "parts": sizes, "bytes": sum(sizes.values()), "dense_bytes": dense})
    files = sorted(folder.glob("*.safetensors"))
    compressed = sum(r["bytes"] for r in rows)
    dense = sum(r["dense_bytes"] for r in rows)
    everything = sum(checkpoint.n_bytes(name) for name in checkpoint.names)
    return {
        "folder": str(folder),
        "format_version": compression.get("format_version", 1),
        "record": compression.get("record", {}),
        "projection_bytes": compressed,
        "dense_projection_bytes": dense,
        "removed": 1 - compressed / dense if dense else 0.0,
        "other_bytes": everything - compressed,
        "file_bytes": sum(file.stat().st_size for file in files),
        "projections": rows,
    }


def ledger_text(sizes: Mapping[str, Any]) -> str:
    """A ledger as a short table."""
    kinds: dict[str, dict[str, int]] = {}
    for row in sizes["projections"]:
        kind = kinds.setdefault(row["name"].rpartition(".")[2], dict.fromkeys(("matrices", "bytes", "dense_bytes"), 0))
        kind["matrices"] += 1
        kind["bytes"] += row["bytes"]
        kind["dense_bytes"] += row["dense_bytes"]
        for part, size in row["parts"].items():
            kind[part] = kind.get(part, 0) + size
    parts = sorted({part for kind in kinds.values() for part in kind} - {"matrices", "bytes", "dense_bytes"})
    header = ["projection", "matrices", *parts, "together", "dense, 16 bits", "removed"]
    rows = [
        [
            *(name, str(kind["matrices"]), *(_megabytes(kind.get(part, 0)) for part in parts)),
            *(_megabytes(kind["bytes"]), _megabytes(kind["dense_bytes"])),
            f"{1 - kind['bytes'] / kind['dense_bytes']:.2%}",
        ]
        for name, kind in kinds.items()
    ]
    removed = f"{sizes['removed']:.2%}"
    all_parts = [_megabytes(sum(kind.get(part, 0) for kind in kinds.values())) for part in parts]
    together = [_megabytes(sizes["projection_bytes"]), _megabytes(sizes["dense_projection_bytes"]), removed]
    rows.append(["all", str(len(sizes["projections"])), *all_parts, *together])
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    dense = sizes["dense_projection_bytes"] + sizes["other_bytes"]
    lines.append(
        f"\n{sizes['folder']}: {_megabytes(sizes['file_bytes'])} MB of weights on disk; with dense 16-bit projections "
        f"{_megabytes(dense)} MB. Embeddings, norms and head take {_megabytes(sizes['other_bytes'])} MB of either. Sizes in MB."
    )
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
