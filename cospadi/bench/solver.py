"""``cospadi bench solver``: every solver on every case, error against seconds."""

from __future__ import annotations

import argparse
import contextlib
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cospadi import devices
from cospadi.bench import render, whole_model
from cospadi.bench.cases import Case, at_ratios, power_law, random_cases, real_cases
from cospadi.bench.solvers import (
    MEASURED,
    OMP,
    OMP_SPARSITY,
    Settings,
    Timed,
    expected_seconds,
    named,
    omp_codings,
    output_error,
    suited,
    timed,
)
from cospadi.bench.usage import machine, product_peaks, usage
from cospadi.errors import UserError, require_extra
from cospadi.factorization.solvers.ksvd import first_atoms
from cospadi.progress import Progress
from cospadi.records import write_json, write_text

Row = dict[str, Any]
"""A measurement as it is written to the JSON file."""
SLOW = 10.0
"""Seconds after which a run is not repeated."""
ROUNDING = 1e-6
"""Relative difference at which an error still counts as reached, since solvers compute it in another way."""


def run(options: argparse.Namespace) -> None:
    """Measure what the options of `cospadi.bench.arguments` ask for, and report.

    Raises:
        UserError: when an option names what does not exist, or an output is not a regular file.
    """
    for file in filter(None, (options.json, options.markdown, options.figure)):
        _refuse_irregular(file)
    _refuse_counts(options)
    names = named(_list("--solvers", options.solvers or ",".join([*MEASURED, OMP])))
    if options.figure:
        _check_figure(options.figure, drawn=not options.shape and names != [OMP])
    device = devices.pick(options.device, "--device")
    if options.threads:
        torch.set_num_threads(options.threads)
    with contextlib.redirect_stdout(sys.stderr):  # the report alone goes to stdout
        if options.shape:
            report = _whole_model(options, device)
        else:
            report = _cases(options, names, device)
    print(report, end="")
    if options.markdown:
        write_text(options.markdown, report)


def _whole_model(options: argparse.Namespace, device: torch.device) -> str:
    ratios = _numbers("--ratios", options.ratios or "0.2", float)
    todo = whole_model.jobs(options.shape, ratios, options.rho)
    rows: list[Row] = []
    for row in whole_model.measure(options.shape, todo, options.seed, device, options.batch):
        rows.append(row)
        _keep(rows, options.json)
    smallest = min(todo, key=lambda job: job.work / job.count)
    difference = whole_model.check(smallest, options.seed, device) if options.check else None
    return render.whole_model_report(options.shape, rows, machine(device), difference)


def _cases(options: argparse.Namespace, names: Sequence[str], device: torch.device) -> str:
    ratios = _numbers("--ratios", options.ratios or "0.2,0.3,0.4,0.5", float)
    if options.matrix:
        cases = random_cases(options.matrix, ratios, options.rho, options.seed, device)
    else:
        layers = _numbers("--layers", options.layers, int)
        projections = _list("--projections", options.projections)
        cases = real_cases(options.results, layers, projections, ratios, options.rho, device)
    settings = Settings(options.rounds, options.seed)
    rows: list[Row] = []
    for measured in measure(cases, names, settings, options.repeats):
        rows += measured
        _keep(rows, options.json)
    if options.figure:
        from cospadi.bench.figure import write_figure  # the one part that needs matplotlib

        write_figure(rows, options.figure)
    return render.report(rows, machine(device))


def measure(cases: Sequence[Case], names: Sequence[str], settings: Settings, repeats: int) -> Iterator[list[Row]]:
    """The rows of one case after the other, then those of the comparison with scikit-learn."""
    solvers = [name for name in names if name != OMP]
    device = cases[0].target.device
    _warm_up(names, settings, device)
    costs = {(i, name): expected_seconds(name, case, settings) for i, case in enumerate(cases) for name in solvers}
    progress = Progress(len(costs) + (OMP in names), "bench solver", sum(costs.values()) or 1)
    for i, case in enumerate(cases):
        rows = []
        for name in solvers:
            rows.append(_solved(name, case, settings, repeats))
            label = f"{case.weight} at {case.ratio:g}, {name}"
            outcome = f"{rows[-1]['seconds']:.3g} s, error {rows[-1]['output_error']:.4f}"
            progress.step(label, outcome, costs[i, name])
        _compare(rows)
        yield rows
    if OMP in names:
        yield _omp_rows(max(cases, key=lambda p: p.target.numel()), settings)
        progress.step(OMP, weight=0.0 if costs else 1.0)


def _warm_up(names: Sequence[str], settings: Settings, device: torch.device) -> None:
    """A first call compiles, loads and allocates, which is not part of any time."""
    target = power_law(32, 48, torch.Generator().manual_seed(0)).to(device)
    (tiny,) = at_ratios("warm-up", target, [0.3], rho=2.0)
    for name in names:
        if name == OMP:
            _omp_rows(tiny, settings)
        else:
            timed(name, suited(name, tiny), replace(settings, rounds=2))


def _solved(solver: str, case: Case, settings: Settings, repeats: int) -> Row:
    """The run that took the median time of all repeats."""
    case = suited(solver, case)
    runs: list[Timed] = []
    while len(runs) < repeats and (not runs or runs[-1].seconds < SLOW):
        runs.append(timed(solver, case, settings))
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    row = _row(solver, case, middle.rounds, middle.seconds, middle.output_error)
    row |= {"repeats": len(runs), "curve": middle.curve}
    return row | (_efficiency(case, middle.seconds, settings) if solver == "htp" else {})


def _row(solver: str, case: Case, rounds: int, seconds: float, error: float) -> Row:
    return {
        "solver": solver,
        "weight": case.weight,
        "d_in": case.d_in,
        "d_out": case.d_out,
        "ratio": case.ratio,
        "atoms": case.atoms,
        "sparsity": case.sparsity,
        "rounds": rounds,
        "seconds": seconds,
        "output_error": error,
    }


def _efficiency(case: Case, seconds: float, settings: Settings) -> Row:
    """How well ``htp`` uses the machine: see the notes under the table."""
    device = case.target.device
    used = usage(lambda: MEASURED["htp"](case, settings, lambda done, error: None), device)
    return {
        "gflops": used.flops / seconds / 1e9,
        "peak_gflops": {k: v / 1e9 for k, v in product_peaks(case.d_out, case.d_in, case.atoms, device).items()},
        "product_share": used.product_share,
        "memory_multiple": used.peak_bytes / (case.target.numel() * 4),
    }


def _compare(rows: list[Row]) -> None:
    """Add to every row of a case when it reached the yardsticks' final errors, and in what share of their time."""
    by_solver = {row["solver"]: row for row in rows}
    for short, name in render.YARDSTICKS.items():
        if name not in by_solver:
            continue
        yardstick = by_solver[name]
        for row in rows:
            level = yardstick["output_error"] * (1 + ROUNDING)
            reached = next((seconds for seconds, error in row["curve"] if error <= level), None)
            row[f"seconds_to_{short}"] = reached
            row[f"time_to_{short}"] = None if reached is None else reached / yardstick["seconds"]


def _omp_rows(case: Case, settings: Settings) -> list[Row]:
    case = replace(case, sparsity=min(OMP_SPARSITY, max(case.atoms // 2, 1)))
    dictionary = first_atoms(case.target, case.atoms, settings.seed)
    codings = omp_codings(case, dictionary)
    supports = [coding.coefficients != 0 for coding in codings.values()]
    equal = float((supports[0] == supports[1]).all(dim=0).float().mean())
    return [
        _row(name, case, 1, coding.seconds, output_error(case.target, dictionary, coding.coefficients))
        | {"repeats": 1, "equal_supports": equal}
        for name, coding in codings.items()
    ]


def _keep(rows: list[Row], file: Path | None) -> None:
    """After each case, so that a run that is killed keeps what it has."""
    if file:
        write_json(file, rows)


def _check_figure(file: Path, drawn: bool) -> None:
    """Refuse now what could only fail after everything was measured.

    Raises:
        UserError: when there is nothing to draw, or nothing to draw it with.
    """
    if not drawn:
        raise UserError("--figure draws errors over seconds, and nothing of that is measured here. Leave it out.")
    if file.suffix not in (".png", ".svg"):
        raise UserError(f"--figure {file} is neither .png nor .svg. Give it one of these endings.")
    require_extra("study", "--figure")


def _refuse_irregular(file: Path) -> None:
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{file} is not a regular file, so it is left alone. Name another path.")


def _refuse_counts(options: argparse.Namespace) -> None:
    for name in ("rounds", "repeats", "threads", "batch"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise UserError(f"--{name} {count} is too small. Set 1 or more, or leave it out.")


def _list(option: str, text: str) -> list[str]:
    """
    >>> _list("--solvers", "htp, ksvd")
    ['htp', 'ksvd']
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError(f"{option} is empty. Name one or more, with commas between.")
    return names


def _numbers(option: str, text: str, kind: type) -> list:
    parts = _list(option, text)
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        message = f"{option} {text} is not a list of numbers. Write them with commas between, as in 1,2."
        raise UserError(message) from error
