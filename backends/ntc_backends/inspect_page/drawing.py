"""One branch as boxes and paths with coordinates: along the residual stream, which stands upright at the left, x = 0.

On wide screens a branch leaves the stream to the right and comes back below; on narrow ones it runs downwards beside it. The left
edge of a drawing is the middle of the stream, so that drawings of any size lie at the same stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ntc_backends.inspect_page.flow import Branch
from ntc_backends.inspect_page.layout import Placed, Route, arrange

__all__ = ["Drawing", "DrawnBox", "draw"]

_WIDE, _NARROW = 1080, 344
_BOX, _LINE = 42, 15  # height of a box with one line under its title; of each further line
_GAP, _ROW_GAP = 16, 26
_LEFT = 34


@dataclass(frozen=True)
class DrawnBox:
    """A box: corner, size, class, and what stands in it, cut to its width."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    colour: str
    title: str
    lines: tuple[str, ...]
    hint: str
    link: str


@dataclass(frozen=True)
class Drawing:
    """A branch with coordinates [CSS pixels].

    Attributes:
        width: Of the whole drawing.
        height: Likewise.
        layers: How many boxes lie behind one another.
        boxes: All boxes.
        paths: (kind, SVG path): ``spikes``, ``current``, ``value``, ``index``, ``tap``, ``return``.
        join: y of the place where the branch enters the stream; None if it does not.
        joins: ``sum`` or ``start``.
        stream: (from, to) y of the stream in this drawing; None if there is none.
        upright: Whether it runs downwards.
    """

    width: float
    height: float
    layers: int
    boxes: tuple[DrawnBox, ...]
    paths: tuple[tuple[str, str], ...]
    join: float | None
    joins: str
    stream: tuple[float, float] | None
    upright: bool


class _Space:
    """From layers and lanes to pixels."""

    def __init__(self, places: list[Placed], lines: list[int], upright: bool) -> None:
        """Room for boxes with up to ``lines[i]`` lines in layer i."""
        low, high, layers = min(p.lane for p in places), max(p.lane for p in places), len(lines)
        self.low, lanes = low, high - low + 1
        self.upright = upright
        # Upright, each layer is as high as its boxes; else all boxes are, since lanes run through all layers.
        self.heights = [_BOX + _LINE * max(0, most - 1) for most in (lines if upright else [max(lines)] * layers)]
        self.tops = [30 + sum(self.heights[:i]) + i * _ROW_GAP for i in range(layers)]
        if upright:
            self.pitch = (_NARROW - _LEFT) / max(lanes, 2)
            self.width = self.pitch - 10
            self.left = _LEFT + (0 if lanes > 1 else self.pitch / 2)
            self.far = float(self.tops[-1] + self.heights[-1])  # end of the last layer
        else:
            self.pitch = min(168.0, (_WIDE - _LEFT - 20) / layers)
            self.width = self.pitch - 24
            self.left = _LEFT
            self.far = _LEFT + layers * self.pitch - 24
        self.across = lanes * (self.heights[0] + _GAP) - _GAP

    def corner(self, place: Placed) -> tuple[float, float]:
        """Upper left corner of the box there."""
        if self.upright:
            return self.left + (place.lane - self.low) * self.pitch, self.tops[place.layer]
        return self.left + place.layer * self.pitch, 14 + (place.lane - self.low) * (self.heights[0] + _GAP)

    def ends(self, place: Placed) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where edges enter the box there, and where they leave it."""
        (x, y), height = self.corner(place), self.heights[place.layer]
        if self.upright:
            return (x + self.width / 2, y), (x + self.width / 2, y + height)
        return (x, y + height / 2), (x + self.width, y + height / 2)


def draw(
    branch: Branch, labels: Mapping[str, Mapping[str, Any]], outside: Mapping[str, str], has_stream: bool, *, upright: bool
) -> Drawing:
    """Lay out a branch.

    Args:
        branch: Boxes and edges.
        labels: Title, lines, hint, colour and link of each box.
        outside: Titles of boxes of other sections that it reads.
        has_stream: Whether the network has a residual stream.
        upright: For narrow screens.
    """
    inlets = list(dict.fromkeys(source for source, _ in branch.inlets))
    names = [*(f"from {source}" for source in inlets), *(box.name for box in branch.boxes)]
    edges = [*((f"from {source}", name, "value") for source, name in branch.inlets), *branch.edges]
    if not names:  # something that is computed elsewhere is added to the stream
        return Drawing(_NARROW if upright else _WIDE, 40, 0, (), (), 20, "sum", (0, 40), upright)
    places, routes = arrange(names, edges)
    layers = max(p.layer for p in places.values()) + 1
    every = [point for route in routes for point in route.points] + list(places.values())
    lines = [max((len(labels[n]["lines"]) if n in labels else 1 for n in names if places[n].layer == i), default=1) for i in range(layers)]
    space = _Space(every, lines, upright)
    kinds = {box.name: box.kind for box in branch.boxes}
    boxes = [_inlet(space, places[f"from {source}"], outside[source]) for source in inlets]
    boxes += [_box(space, places[name], kinds[name], labels[name]) for name in kinds]
    paths = [(route.kind, _path(space, route)) for route in routes]
    paths += [("tap", _tap(space, places[name])) for name in branch.taps]
    bottom = space.far + 22 if upright else 14 + space.across + 22
    join = bottom if branch.joins else None
    if join is not None:
        paths.append(("return", _return(space, places[branch.joins], join)) if branch.joins in places else ("return", f"M 30 {join:g} H 0"))
    height = bottom + 18 if join is not None else bottom - 8
    joins = "" if join is None else "sum" if branch.sum else "start"
    stream = None
    if has_stream and (join is not None or branch.taps):
        taps = [space.ends(places[name])[0][1] - (14 if upright else 0) for name in branch.taps]
        stream = (join if joins == "start" and join is not None else 0.0, height if join is not None else max(taps, default=0.0))
    width = _NARROW if upright else max(space.far + 24, _LEFT + 200)
    return Drawing(width, height, layers, tuple(boxes), tuple(paths), join, joins, stream, upright)


def _fit(text: str, width: float, character: float) -> str:
    """A text cut to a width, by the mean width of a character."""
    most = max(3, int(width / character))
    return text if len(text) <= most else text[: most - 1] + "…"


def _box(space: _Space, place: Placed, kind: str, label: Mapping[str, Any]) -> DrawnBox:
    x, y = space.corner(place)
    inner = space.width - 8
    lines = tuple(_fit(line, inner, 5.6) for line in label["lines"])
    title, height = _fit(label["title"], inner, 6.9), space.heights[place.layer]
    return DrawnBox(x, y, space.width, height, kind, label["colour"], title, lines, label["hint"], label["link"])


def _inlet(space: _Space, place: Placed, title: str) -> DrawnBox:
    x, y = space.corner(place)
    cut, height = _fit(title, space.width - 8, 6.9), space.heights[place.layer]
    return DrawnBox(x, y, space.width, height, "inlet", "", cut, ("from outside",), title, "")


def _path(space: _Space, route: Route) -> str:
    """A smooth line through the places of an edge, straight where it passes a layer."""
    x, y = space.ends(route.points[0])[1]
    text = f"M {x:g} {y:g}"
    for i, place in enumerate(route.points[1:], 1):
        (a, b), (c, d) = space.ends(place)
        if space.upright:
            half = (y + b) / 2
            text += f" C {x:g} {half:g} {a:g} {half:g} {a:g} {b:g}"
        else:
            half = (x + a) / 2
            text += f" C {half:g} {y:g} {half:g} {b:g} {a:g} {b:g}"
        if i < len(route.points) - 1:
            text += f" L {c:g} {d:g}"
        x, y = c, d
    return text


def _tap(space: _Space, place: Placed) -> str:
    x, y = space.ends(place)[0]
    return f"M 0 {y - 14:g} H {x - 6:g} Q {x:g} {y - 14:g} {x:g} {y - 8:g} V {y:g}" if space.upright else f"M 0 {y:g} H {x:g}"


def _return(space: _Space, place: Placed, join: float) -> str:
    x, y = space.ends(place)[1]
    if space.upright:
        return f"M {x:g} {y:g} V {join - 8:g} Q {x:g} {join:g} {x - 8:g} {join:g} H 8"
    turn = max(x, space.far) + 14
    return f"M {x:g} {y:g} H {turn - 8:g} Q {turn:g} {y:g} {turn:g} {y + 8:g} V {join - 8:g} Q {turn:g} {join:g} {turn - 8:g} {join:g} H 8"
