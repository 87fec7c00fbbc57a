"""Points in a plane as numbers that the template of the page draws: x linear from zero, y logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Dot", "scatter"]

_WIDTH, _HEIGHT = 1000, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 16, 52
_LETTER, _LINE = 7.2, 15.0  # width of a letter and height of a line of text
_FEWEST_TICKS, _MOST_TICKS = 3, 8


@dataclass(frozen=True)
class Dot:
    """One point.

    Attributes:
        x: Not negative.
        y: Positive.
        label: Written beside it if there is room.
        title: What it says when pointed at.
        group: ``front``, ``beaten`` or ``original``: how it looks.
    """

    x: float
    y: float
    label: str
    title: str
    group: str


def scatter(dots: Sequence[Dot], x_label: str, y_label: str, label: str) -> dict[str, Any]:
    """Places of all points, of the line through the front, of axes and labels.

    Args:
        dots: At least one.
        x_label: Of the x axis, with its unit.
        y_label: Of the y axis.
        label: What a screen reader says of the whole.
    """
    right = 1.08 * max((dot.x for dot in dots), default=0.0) or 1.0
    logs = [math.log(dot.y) for dot in dots]
    margin = 0.08 * (max(logs) - min(logs)) or 0.1
    low, high = min(logs) - margin, max(logs) + margin

    def across(x: float) -> float:
        return round(_LEFT + x / right * (_WIDTH - _LEFT - _RIGHT), 1)

    def down(y: float) -> float:
        return round(_TOP + (high - math.log(y)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    placed = [{"x": across(d.x), "y": down(d.y), "label": d.label, "title": d.title, "group": d.group} for d in dots]
    front = sorted((p["x"], p["y"]) for p in placed if p["group"] == "front")
    _place_labels(placed)
    step = _round_step(right / _MOST_TICKS)
    return {
        "width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM,
        "x_label": x_label, "y_label": y_label, "label": label, "dots": placed, "line": " ".join(f"{x},{y}" for x, y in front),
        "x_ticks": [{"x": across(i * step), "text": f"{i * step:.10g}"} for i in range(int(right / step) + 1)],
        "y_ticks": [{"y": down(y), "text": f"{y:,.10g}"} for y in _levels(math.exp(low), math.exp(high))],
    }  # fmt: skip


def _place_labels(placed: list[dict[str, Any]]) -> None:
    """Right, left, above or below of its point, wherever nothing else is; one without room is left out, its title still says it."""
    taken = [(p["x"] - 7, p["y"] - 7, p["x"] + 7, p["y"] + 7) for p in placed]
    for p in sorted(placed, key=lambda p: p["group"] != "front"):
        width, x, y = _LETTER * len(p["label"]), p["x"], p["y"]
        spots = (
            ("start", x + 11, y + 4, (x + 9, x + 11 + width)), ("end", x - 11, y + 4, (x - 11 - width, x - 9)),
            ("middle", x, y - 12, (x - width / 2, x + width / 2)), ("middle", x, y + 22, (x - width / 2, x + width / 2)),
        )  # fmt: skip
        p["text"] = None
        for anchor, at, base, (first, last) in spots:
            box = (first, base - _LINE + 3, last, base + 3)
            inside = box[0] > _LEFT and box[2] < _WIDTH - 2 and box[1] > 0 and box[3] < _HEIGHT - _BOTTOM
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                p["text"] = {"x": round(at, 1), "y": round(base, 1), "anchor": anchor}
                taken.append(box)
                break


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= least * (1 - 1e-9))


def _levels(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, three to eight of them: of powers of ten, or evenly where those are too few."""
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [d * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for d in digits]
        if len(inside := [y for y in found if low <= y <= high]) >= _FEWEST_TICKS:
            return inside[-_MOST_TICKS:]
    step = _round_step((high - low) / 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
