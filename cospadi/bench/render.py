"""The measurements as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]
MISSING = "–"
YARDSTICKS = {"plain": "ksvd_plain", "ksvd": "ksvd"}
"""Solvers whose final error all others are timed to, by their name in ``seconds_to_…`` and ``time_to_…``."""


def report(rows: Sequence[Row], machine: str) -> str:
    """Every measurement, how ``htp`` used the machine, the comparison with scikit-learn and a summary, as Markdown."""
    solved = [row for row in rows if "curve" in row]
    parts = [f"Solvers, {machine}\n"]
    if solved:
        parts.append(_solved_table(solved))
    if any("gflops" in row for row in solved):
        parts.append(_machine_table([row for row in solved if "gflops" in row]))
    parts += _omp_line(rows)
    parts += _summary(solved)
    return "\n".join(parts)


def whole_model_report(shape: str, rows: Sequence[Row], machine: str, difference: float | None) -> str:
    """Seconds per size and in all, as Markdown."""
    parts = [f"{shape}, every projection by htp, {machine}\n"]
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        at_ratio = [row for row in rows if row["ratio"] == ratio]
        parts += [f"Ratio {ratio:g}\n", _whole_model_table(at_ratio)]
    parts.append(_PRODUCT_NOTE.format("seconds") + " Peak memory: beyond the targets, of one batch.")
    if difference is not None:
        parts.append(
            f"\nOne matrix against float64 on the CPU: output errors differ by {difference:.1e} of their value."
        )
    return "\n".join(parts) + "\n"


_PRODUCT_NOTE = (
    "GFLOP/s: operations of all matrix products over {}. Peaks: the best that a product of target size (d_out × d_in "
    "times d_in × atoms) reached on this machine in this run; fast: with "
    "the precision or library that htp's rounds use. Products: share of the time that is spent in them."
)


def _solved_table(rows: Sequence[Row]) -> str:
    header = ["Weight", "Size", "Ratio", "Solver", "Atoms", "Non-zeros", "Rounds", "Seconds", "Output error"]
    yardsticks = [short for short in YARDSTICKS if any(f"seconds_to_{short}" in row for row in rows)]
    for short in yardsticks:
        header += [f"To {YARDSTICKS[short]}'s error, s", f"× {YARDSTICKS[short]}"]
    lines = [
        [
            row["weight"],
            _size(row),
            f"{row['ratio']:g}",
            row["solver"],
            row["atoms"],
            row["sparsity"],
            row["rounds"],
            seconds(row["seconds"]),
            f"{row['output_error']:.4f}",
            *(seconds(row[f"{what}_{short}"]) for short in yardsticks for what in ("seconds_to", "time_to")),
        ]
        for row in rows
    ]
    note = "Output error: ‖Y − DS‖ / ‖Y‖ of what is returned, Y the whitened weight."
    if yardsticks:
        note += (
            f" To {YARDSTICKS[yardsticks[0]]}'s error: seconds until the error was as low as the one that "
            f"{YARDSTICKS[yardsticks[0]]} ended with, and these as a part of all of its seconds; {MISSING}: never."
        )
    return table(header, lines, left=(0, 1, 3)) + "\n" + note + "\n"


def _machine_table(rows: Sequence[Row]) -> str:
    header = ["Weight", "Ratio", *_flops_header(rows), "Memory × weight"]
    lines = [[row["weight"], f"{row['ratio']:g}", *_flops(row), f"{row['memory_multiple']:.1f}"] for row in rows]
    note = (
        _PRODUCT_NOTE.format("all seconds")
        + " Memory: most that was allocated beyond the target, in its float32 bytes."
    )
    return "How htp uses the machine\n\n" + table(header, lines, left=(0,)) + "\n" + note + "\n"


def _whole_model_table(rows: Sequence[Row]) -> str:
    header = ["Size", "Matrices", "At a time", "Atoms", "Non-zeros", "Seconds", "Matrices/s", "Output error"]
    header += [*_flops_header(rows), "Peak memory, GiB"]
    lines = [
        [
            _size(row),
            row["matrices"],
            row["batch"],
            row["atoms"],
            row["sparsity"],
            seconds(row["seconds"]),
            f"{row['matrices'] / row['seconds']:.3g}",
            f"{row['output_error']:.4f}",
            *_flops(row),
            _gibibytes(row["peak_bytes"]),
        ]
        for row in rows
    ]
    matrices = sum(row["matrices"] for row in rows)
    total = sum(row["seconds"] for row in rows)
    gflops = sum(row["gflops"] * row["seconds"] for row in rows) / total
    peak = max(row["peak_bytes"] for row in rows)
    rates = [f"{gflops:.0f}", *("" for _ in _flops_header(rows)[1:])]
    rate = f"{matrices / total:.3g}"
    lines.append(["All", matrices, "", "", "", seconds(total), rate, "", *rates, _gibibytes(peak)])
    return table(header, lines, left=(0,))


def _gibibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f}"


def _flops_header(rows: Sequence[Row]) -> list[str]:
    return ["GFLOP/s", *(f"Of {kind} peak" for kind in rows[0]["peak_gflops"]), "Products", "GFLOP/s in them"]


def _flops(row: Row) -> list[str]:
    shares = [f"{100 * row['gflops'] / peak:.0f} % of {peak:.0f}" for peak in row["peak_gflops"].values()]
    inside = row["gflops"] / max(row["product_share"], 1e-9)
    return [f"{row['gflops']:.0f}", *shares, f"{100 * row['product_share']:.0f} %", f"{inside:.0f}"]


def _omp_line(rows: Sequence[Row]) -> list[str]:
    codings = {row["solver"]: row for row in rows if "equal_supports" in row}
    if not codings:
        return []
    theirs = codings["sklearn_omp"]
    ours = codings["sparse_code"]
    line = (
        f"Orthogonal matching pursuit, {ours['weight']} ({_size(ours)}), {ours['atoms']} atoms, "
        f"{ours['sparsity']} non-zeros: scikit-learn {seconds(theirs['seconds'])} s, sparse_code "
        f"{seconds(ours['seconds'])} s, {theirs['seconds'] / ours['seconds']:.1f} times as fast; equal supports in "
        f"{100 * ours['equal_supports']:.1f} % of the columns; errors {theirs['output_error']:.4f} and "
        f"{ours['output_error']:.4f}.\n"
    )
    return [line]


def _summary(rows: Sequence[Row]) -> list[str]:
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = []
    for short, yardstick in YARDSTICKS.items():
        for solver in solvers:
            shares = [row[f"time_to_{short}"] for row in rows if row["solver"] == solver and f"time_to_{short}" in row]
            if shares and solver not in YARDSTICKS.values():
                lines.append(f"- {solver} to the last error of {yardstick}, × its seconds: {_spread(shares)}.")
    shares = _shares_of_plain(rows)
    if shares:  # the same rounds but for rounding, which alone decides whose last error is the lower one
        lines.append(f"- ksvd, all rounds, × the seconds of ksvd_plain: {_spread(shares)}.")
    lines += _comparisons_with_htp(rows)
    return ["Summary\n", *lines, ""] if lines else []


def _comparisons_with_htp(rows: Sequence[Row]) -> list[str]:
    """A line per other solver: in how many problems ``htp`` ends with the lower error."""
    by_problem: dict[tuple, dict[str, float]] = {}
    for row in rows:
        by_problem.setdefault((row["weight"], row["ratio"]), {})[row["solver"]] = row["output_error"]
    lines = []
    both = [errors for errors in by_problem.values() if "htp" in errors]
    for other in dict.fromkeys(name for errors in both for name in errors if name != "htp"):
        pairs = [(errors["htp"], errors[other]) for errors in both if other in errors]
        better = sum(ours < theirs for ours, theirs in pairs)
        lines.append(f"- htp ends below the error of {other} in {better} of {len(pairs)} problems.")
    return lines


def _shares_of_plain(rows: Sequence[Row]) -> list[float]:
    """Seconds of ``ksvd`` over those of ``ksvd_plain`` where both were run."""
    spent = {(row["weight"], row["ratio"], row["solver"]): row["seconds"] for row in rows}
    both = [(*problem, "ksvd_plain") for *problem, solver in spent if solver == "ksvd"]
    return [spent[(*plain[:2], "ksvd")] / spent[plain] for plain in both if plain in spent]


def _spread(shares: Sequence[float | None]) -> str:
    """
    >>> _spread([0.01, 0.03, None])
    'median 0.0300, worst 0.0300, never in 1 of 3'
    """
    reached = [share for share in shares if share is not None]
    never = f", never in {len(shares) - len(reached)} of {len(shares)}" if len(reached) < len(shares) else ""
    if not reached:
        return never.removeprefix(", ")
    middle = median(math.inf if share is None else share for share in shares)
    middle = seconds(middle) if math.isfinite(middle) else "never"
    return f"median {middle}, worst {seconds(max(reached))}{never}"


def seconds(value: float | None) -> str:
    """Three significant digits, never in powers of ten; seconds, or a ratio of them.

    >>> [seconds(value) for value in (0.012345, 1.0, 123.456, 4321.0, None)]
    ['0.0123', '1.00', '123', '4321', '–']
    """
    if value is None:
        return MISSING
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[object]], left: Sequence[int]) -> str:
    """Markdown, the columns in ``left`` aligned there and all others to the right."""
    rule = [":--" if i in left else "--:" for i in range(len(header))]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (header, rule, *lines))


def _size(row: Row) -> str:
    return f"{row['d_in']}×{row['d_out']}"
