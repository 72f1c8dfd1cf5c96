"""Snakemake's rule graph as a picture that needs no Graphviz: rules left to right, in the order data walks through them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import networkx as nx

_BOX = (132, 30)
_STEP = (172, 46)
_LANE = 14
"""Pixels from one arrow below the boxes to the next."""


@dataclass(frozen=True)
class Graph:
    """A drawing: every box with its place, and the boxes that every arrow joins."""

    boxes: dict[str, tuple[float, float]]
    """Rule -> left and upper edge, in pixels."""
    arrows: list[tuple[str, str]]
    width: float | int
    height: float | int
    box: tuple[int, int] = _BOX

    def path(self, source: str, target: str) -> str:
        """SVG path from a rule's right side to another's left; below all boxes where there are some in between."""
        x1, y1 = self.boxes[source]
        x2, y2 = self.boxes[target]
        x1 = x1 + self.box[0]
        y1 = y1 + self.box[1] / 2
        y2 = y2 + self.box[1] / 2
        gap = _STEP[0] - _BOX[0]
        if (source, target) not in self.lanes:
            return f"M{x1:g},{y1:g} C{x1 + gap / 2:g},{y1:g} {x2 - gap / 2:g},{y2:g} {x2:g},{y2:g}"
        lane = self.lanes[source, target]
        down = f"C{x1 + gap:g},{y1:g} {x1:g},{lane:g} {x1 + gap:g},{lane:g}"
        up = f"C{x2:g},{lane:g} {x2 - gap:g},{y2:g} {x2:g},{y2:g}"
        return f"M{x1:g},{y1:g} {down} L{x2 - gap:g},{lane:g} {up}"

    @property
    def lanes(self) -> dict[tuple[str, str], float]:
        """How far down the arrows run that would cross a column of boxes."""
        lowest = max((y for _, y in self.boxes.values()), default=0.0) + self.box[1]
        far = [(a, b) for a, b in self.arrows if self.boxes[b][0] - self.boxes[a][0] > _STEP[0]]
        return {arrow: lowest + _LANE * (i + 1) for i, arrow in enumerate(far)}


def drawn(dot: str) -> Graph:
    """Layout of what ``snakemake --rulegraph`` printed.

    A rule is one column right of the last rule that it needs. An arrow is left out where a longer path has the same ends
    (the transitive reduction), so that the chain of rooms can be seen.

    >>> graph = drawn('0[label = "all"]; 1[label = "a"]; 2[label = "b"]; 1 -> 0; 2 -> 1; 2 -> 0')
    >>> graph.arrows, [x for x, _ in graph.boxes.values()]
    ([('a', 'all'), ('b', 'a')], [344.0, 172.0, 0.0])
    """
    names = dict(re.findall(r'(\d+)\s*\[label = "([^"\\]+)', dot))
    rules = nx.DiGraph()
    rules.add_nodes_from(names.values())
    rules.add_edges_from((names[a], names[b]) for a, b in re.findall(r"(\d+)\s*->\s*(\d+)", dot))
    columns = list(nx.topological_generations(rules))
    tallest = max(map(len, columns), default=0)
    places: dict[str, tuple[float, float]] = {}
    for number, column in enumerate(columns):
        above = (tallest - len(column)) / 2
        ideal = {rule: _middle([places[r][1] for r in rules.predecessors(rule)]) for rule in column}
        for row, rule in enumerate(sorted(column, key=lambda rule: (ideal[rule], rule))):
            places[rule] = (float(number * _STEP[0]), (above + row) * _STEP[1])
    arrows = sorted(nx.transitive_reduction(rules).edges)
    width = (len(columns) - 1) * _STEP[0] + _BOX[0] if columns else 0
    far = sum(places[b][0] - places[a][0] > _STEP[0] for a, b in arrows)
    height = max(0, tallest - 1) * _STEP[1] + _BOX[1] + _LANE * far
    return Graph({name: places[name] for name in names.values()}, arrows, width, height)


def _middle(heights: list[float]) -> float:
    return sum(heights) / len(heights) if heights else 0.0
