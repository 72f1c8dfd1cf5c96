"""Stage of room 7: records -> tables, figures, report."""

from __future__ import annotations

from pathlib import Path

from cospadi.errors import UserError
from cospadi.pipeline.study import Study
from cospadi.records import read_json
from cospadi.tables.cells import Cell
from cospadi.tables.figures import write_figures
from cospadi.tables.overview import write_overviews
from cospadi.tables.paired import differences
from cospadi.tables.render import tables, write_tables
from cospadi.tables.report import headlines, write_report


def tabulate(study: Study, folder: Path) -> None:
    """Room 7: records -> tables and figures.

    Raises:
        UserError: the study is not finished.
    """
    require_records(study)
    cells = list(study_cells(study).values())
    paired = differences(cells, study.study.against or study.study.methods[-1])
    printed = tables(cells, study.study.title, paired, study.study.published)
    write_tables(cells, folder, printed, paired)
    write_overviews(cells, folder)
    write_figures(cells, folder, printed)
    page = write_report(cells, folder, study.study.title, printed)
    # Whoever runs the study reads this last.
    for line in headlines(cells):
        print(line)
    print(f"Report: {page}")


def require_records(study: Study) -> None:
    """
    Raises:
        UserError: a cell of the study is not finished.
    """
    missing = [record for record in study.inputs_of_tables() if not Path(record).is_file()]
    if missing:
        raise UserError(
            f"Study {study.name} is not finished in {Path.cwd()}: {len(missing)} records are missing, the first is {missing[0]}. "
            f"Run it: snakemake --cores all --config study={study.name}"
        )


def study_cells(study: Study, unfinished: bool = False) -> dict[str, Cell]:
    """The cells of a study by their places; ``unfinished``: without those that lack a record.

    Titles are those of the settings, not of the records: no recipe has them, so a new title needs new tables alone.
    """
    cells = {}
    for model in study.study.models:
        title = study.config(model).model.title
        record = Path(study.dense_record(model))
        if record.is_file() or not unfinished:
            cells[study.place(model)] = Cell(
                model, title, "dense", "Dense", None, [], read_json(record), samples=record.parent / "samples"
            )
        for cell in (c for c in study.cells if c.model == model):
            if unfinished and not all(Path(record).is_file() for record in study.records(cell)):
                continue
            config = study.config(cell.model, cell.method, cell.ratio, cell.quantization)
            record = Path(study.evaluation_record(cell))
            cells[study.place(model, cell)] = Cell(
                model,
                title,
                cell.method,
                config.factorization.title,
                config.factorization.compression_ratio,
                [read_json(Path(record)) for record in study.factors(cell, "json")],
                read_json(record),
                [read_json(Path(record)) for record in study.earlier_records(cell)],
                *((cell.quantization, config.quantization.title) if config.quantization.changes else ("", "")),
                family=config.factorization.family,
                samples=record.parent / "samples",
            )
    return cells
