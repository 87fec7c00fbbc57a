"""Which points no other dominates, as a table and as a picture.

Of two points a and b with perplexity p and energy e,

    a dominates b:   p_a <= p_b,  e_a <= e_b,  and one of the two is smaller               (Pareto)

and the front is what no point dominates.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntc.energy import load_constants
from ntc.errors import ConfigError
from ntc.figures import Point, write_scatter
from ntc.sweep.plan import COSTS, Plan, Setting, sha256_of
from ntc.sweep.points import POINTS

__all__ = ["RESULT", "dominating", "result_of", "write_result"]

RESULT, FIGURE = "sweep.json", "front"


def dominating(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, from the least of the first coordinate; equal points all stay.

    Points with a coordinate that is not finite are left out.
    """
    known = [i for i, p in enumerate(points) if all(map(math.isfinite, p))]
    front: list[int] = []
    for i in sorted(known, key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def result_of(plan: Plan, settings: Sequence[Setting], found: Mapping[str, Mapping[str, Any]], cost: str) -> dict[str, Any]:
    """All points with their labels, from the least energy, those that failed last; and which of them are the front.

    Args:
        plan: What they share.
        settings: The points, in any order.
        found: Figures by the key of the setting, or the sentence that says why there are none.
        cost: ``total`` or ``attention``.

    Raises:
        ConfigError: If there are no figures of any point.
    """
    measured = [s for s in settings if "error" not in found[s.key]]
    if not measured:
        raise ConfigError(f"none of the {len(settings)} settings could be measured; the first one says: {found[settings[0].key]['error']}")
    labels = _labels(settings)
    points = [(found[s.key]["energy"][cost]["snn_pj"], found[s.key]["perplexity"]) for s in measured]
    front = {measured[i].key for i in dominating([(x, math.nan if y is None else y) for x, y in points])}
    rows = [{"label": labels[s.key], **asdict(s), **found[s.key], "front": s.key in front} for s in settings]
    rows.sort(key=lambda row: row["energy"][cost]["snn_pj"] if "error" not in row else math.inf)
    return {
        "model": plan.model, "data": str(plan.data), "data_sha256": sha256_of(plan.data), "tokens": plan.max_tokens,
        "energy_tokens": plan.energy_tokens, "cost": cost, "unit": "pJ per token", "constants": _constants(),
        "front": [row["label"] for row in rows if row["front"]], "points": rows,
    }  # fmt: skip


def _constants() -> dict[str, str]:
    table = load_constants()
    return {"id": table.id, "title": table.title, "source": table.source, "scope": table.scope}


def _labels(settings: Sequence[Setting]) -> dict[str, str]:
    """Of each setting, by key: what distinguishes it from the others."""
    recipes = {s.recipe for s in settings if not s.folder}
    names = dict.fromkeys(name for s in settings for name in s.options)
    vary = [name for name in names if len({json.dumps(s.options.get(name)) for s in settings if not s.folder}) > 1]
    result = {}
    for s in settings:
        words = [s.recipe] if len(recipes) > 1 else []
        words += [f"{'T' if name == 'steps' else name} = {s.options[name]}" for name in vary if name in s.options]
        result[s.key] = s.folder or ", ".join(words) or s.recipe
    return result


def write_result(folder: Path, result: Mapping[str, Any]) -> list[str]:
    """The table and the picture; names of all files of the folder."""
    beside = folder / f"{RESULT}.part"
    beside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, folder / RESULT)
    cost, rows = result["cost"], [row for row in result["points"] if "error" not in row and row["perplexity"]]
    ann = {row["energy"][cost]["ann_pj"]: row["perplexity_ann"] for row in rows}
    groups = [("not dominated", True), ("dominated", False)]
    points = [
        Point(Path(row["label"]).name if row["folder"] else row["label"], row["energy"][cost]["snn_pj"] / 1e6, row["perplexity"], name)
        for name, front in groups
        for row in rows
        if row["front"] is front
    ]
    points += [Point("", energy / 1e6, perplexity, "original network") for energy, perplexity in ann.items()]
    paths = write_scatter(
        points, folder / FIGURE, x_label=f"energy of the {COSTS[cost]} [µJ per token]", y_label="perplexity", join=("not dominated",)
    )
    return [POINTS, RESULT, *(p.name for p in paths)]
