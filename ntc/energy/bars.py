"""Stacked bars, one per block and network, as numbers that the template of the report draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Bar", "stacked"]

_WIDTH, _LEFT, _RIGHT = 1000, 190, 150
_ROW, _GAP = 19, 9
_COLOURS = 9


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: What stands before it.
        parts: Energies by name [pJ].
        follows: Whether it belongs to the bar above: drawn nearer to it, and its name lighter.
    """

    name: str
    parts: Mapping[str, float]
    follows: bool = False


def stacked(bars: Sequence[Bar], unit: str, size: float, label: str) -> dict[str, Any]:
    """Places and widths of all pieces, the axis and the legend.

    Args:
        bars: From top to bottom.
        unit: Unit of the axis.
        size: That unit in pJ.
        label: What a screen reader says of the whole.
    """
    names = list(dict.fromkeys(name for bar in bars for name, value in bar.parts.items() if value))
    colours = {name: i % _COLOURS for i, name in enumerate(names)}
    largest = max((sum(bar.parts.values()) for bar in bars), default=0.0) / size
    step = _step(largest)
    scale = (_WIDTH - _LEFT - _RIGHT) / (largest or 1.0)
    y, rows = 4, list[dict[str, Any]]()
    for bar in bars:
        y += 0 if bar.follows or not rows else _GAP
        x, pieces = float(_LEFT), []
        for name in names:
            width = bar.parts.get(name, 0.0) / size * scale
            if width > 0:
                title = f"{bar.name}, {name}: {bar.parts[name] / size:,.3g} {unit}"
                pieces.append({"x": round(x, 2), "width": round(width, 2), "colour": colours[name], "title": title})
                x += width
        total = sum(bar.parts.values()) / size
        rows.append(
            {"y": y, "name": bar.name, "soft": bar.follows, "pieces": pieces, "end": round(x, 2), "text": f"{total:,.3g} {unit}"}
        )  # fmt: skip
        y += _ROW
    places = range(int(largest / step) + 1 if largest else 1)
    return {
        "width": _WIDTH, "height": y + 24, "left": _LEFT, "label": label, "rows": rows,
        "legend": [{"name": name, "colour": colours[name]} for name in names],
        "ticks": [
            {"x": round(_LEFT + i * step * scale, 2), "text": f"{i * step:g}" + (f" {unit}" if not i else ""), "anchor": "middle"}
            for i in places
        ],
    }  # fmt: skip


def _step(largest: float) -> float:
    """Distance of ticks: 1, 2 or 5 times a power of ten, four to nine of them."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(power * f for f in (1, 2, 5, 10) if largest / (power * f) <= 8)
