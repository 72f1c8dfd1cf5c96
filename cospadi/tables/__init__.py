"""Records in, tables and figures out: Markdown, LaTeX, HTML, CSV, PNG and SVG.

Every number comes from the records of the rooms before; nothing is measured here and nothing is typed in.
"""

from cospadi.tables.cells import Cell, projection_errors, read_summary, summary
from cospadi.tables.figures import write_figures
from cospadi.tables.overview import overview, write_overviews
from cospadi.tables.paired import differences
from cospadi.tables.render import PaperTable, notes, paper_table, tables, write_tables
from cospadi.tables.report import write_report

__all__ = [
    "Cell",
    "PaperTable",
    "differences",
    "notes",
    "overview",
    "paper_table",
    "projection_errors",
    "read_summary",
    "summary",
    "tables",
    "write_figures",
    "write_overviews",
    "write_report",
    "write_tables",
]
