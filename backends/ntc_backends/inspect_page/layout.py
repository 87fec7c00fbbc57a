"""Where the boxes and edges of a branch lie: layers along the flow, lanes across it.

The layered drawing of Sugiyama, Tagawa and Toda (1981): layer = longest way from the start; an edge that skips layers gets an empty place
in each of them, so that it never runs through a box; lanes are ordered by the mean place of the neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Placed", "Route", "arrange"]

_SWEEPS = 6


@dataclass(frozen=True)
class Placed:
    """Place of a box: layer 0, 1 ... along the flow; lane in units of a lane's width, 0 in the middle."""

    layer: int
    lane: float


@dataclass(frozen=True)
class Route:
    """An edge: its ends, its kind and the places that it passes, both ends included."""

    source: str
    target: str
    kind: str
    points: tuple[Placed, ...]


def arrange(names: Sequence[str], edges: Sequence[tuple[str, str, str]]) -> tuple[dict[str, Placed], list[Route]]:
    """Lay out a graph without cycles.

    Args:
        names: Boxes in an order in which they can run.
        edges: (from, to, kind) between them.

    Returns:
        Where each box lies, no two in the same place; and how the edges run.
    """
    before: dict[str, list[str]] = {n: [] for n in names}
    after: dict[str, list[str]] = {n: [] for n in names}
    for source, target, _ in edges:
        before[target].append(source)
        after[source].append(target)
    layer: dict[str, int] = {}
    for name in names:
        layer[name] = max((layer[a] + 1 for a in before[name]), default=0)
    for name in reversed(names):  # what starts a flow stands next to who reads it
        if not before[name] and after[name]:
            layer[name] = min(layer[u] for u in after[name]) - 1
    depth = max(layer.values(), default=-1) + 1
    rows: list[list[str]] = [[n for n in names if layer[n] == i] for i in range(depth)]
    chains: list[list[str]] = []
    up: dict[str, list[str]] = {n: [] for n in names}
    down: dict[str, list[str]] = {n: [] for n in names}
    for number, (source, target, _) in enumerate(edges):
        chain = [source, *(f"{number} {i}" for i in range(layer[source] + 1, layer[target])), target]
        for i, place in enumerate(chain[1:-1], layer[source] + 1):
            rows[i].append(place)
            up[place], down[place] = [], []
        for a, b in pairwise(chain):
            down[a].append(b)
            up[b].append(a)
        chains.append(chain)
    _untangle(rows, up, down)
    lane = {name: i - (len(row) - 1) / 2 for row in rows for i, name in enumerate(row)}
    level = {name: i for i, row in enumerate(rows) for name in row}
    routes = [
        Route(source, target, kind, tuple(Placed(level[n], lane[n]) for n in chain))
        for (source, target, kind), chain in zip(edges, chains, strict=True)
    ]
    return {n: Placed(level[n], lane[n]) for n in names}, routes


def _untangle(rows: list[list[str]], up: dict[str, list[str]], down: dict[str, list[str]]) -> None:
    """Order the lanes of each layer by the mean place of the neighbours, forth and back; what has none keeps its place."""
    for sweep in range(_SWEEPS):
        neighbours = up if sweep % 2 == 0 else down
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            place = {n: i - (len(other) - 1) / 2 for other in rows for i, n in enumerate(other)}
            means = {n: sum(place[a] for a in near) / len(near) if (near := neighbours[n]) else place[n] for n in row}
            row.sort(key=means.__getitem__)
