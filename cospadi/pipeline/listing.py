"""What there is to choose from: the files of ``conf``, a line each."""

from __future__ import annotations

import yaml

from cospadi.settings import CONF, PLACEHOLDERS


def listing(group: str) -> str:
    """Name, title and first comment of every file in ``conf/<group>``, in the order of their names.

    >>> [line.split()[0] for line in listing("calibration").splitlines()][-1]
    'smoke'
    """
    rows = []
    for file in sorted((CONF / group).glob("*.yaml")):
        if file.stem == PLACEHOLDERS.get(group):
            continue
        text = file.read_text(encoding="utf-8")
        title = str(yaml.safe_load(text).get("title") or "")
        first = text.splitlines()[0]
        comment = first.removeprefix("#").strip() if first.startswith("#") else ""
        rows.append((file.stem, title, comment))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {title:<{widths[1]}}  {comment}".rstrip() for name, title, comment in rows)
