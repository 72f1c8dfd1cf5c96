"""Records in, tables and figures out: Markdown, LaTeX, HTML, CSV, PNG and SVG.

Every number comes from the records of the rooms before; nothing is measured here and nothing is typed in.
"""

from pathlib import Path

PUBLISHED_FILE = Path(__file__).parent / "published.yaml"
"""Numbers that papers print, each with its source."""
