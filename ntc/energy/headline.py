"""An energy report in a few sentences: every figure stands beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["headline"]

_NAMED = 2
"""Baselines that a sentence names, the first ones; the table has all."""


def headline(data: Mapping[str, Any]) -> tuple[str, str]:
    """The attention block by arithmetic, which is the field's figure, in the first sentence; with memory, and everything, in the others.

    Args:
        data: ``EnergyReport.to_json``.
    """
    attention, total = (
        {column: _compared(data, part, column) for column in ("compute", "compute_and_memory")} for part in ("attention", "total")
    )
    arithmetic = str(data["constants"]["title"]).removesuffix(", compute only")
    return f"Spiking attention takes {attention['compute']}, by arithmetic alone.", (
        f"With memory it takes {attention['compute_and_memory']}. The whole network takes {total['compute']}, by arithmetic alone; "
        f"{total['compute_and_memory']}, with memory. The spiking program is costed as {arithmetic}; per token, {data['phase']}."
    )


def _compared(data: Mapping[str, Any], part: str, column: str) -> str:
    """As in ``69 % less energy than the original in fp32 and 4.7 times as much as in int8``."""
    place = 0 if column == "compute" else 1
    rows = [(row["baseline"], row[column]["reduction"]) for row in data["baselines"][part][:_NAMED]]
    rows = rows or [("the same arithmetic", data[part]["columns"][place]["reduction"])]
    said: list[str] = []
    for name, share in rows:
        if share is not None:
            said.append(f"{_times(share)} {'that' if said else 'the original'} in {name}")
    return " and ".join(said) if said else "energy that nothing can be compared with"


def _times(share: float) -> str:
    if share >= 0:
        return f"{100 * share:.1f} % less energy than"
    return f"{-100 * share:.1f} % more energy than" if share > -1 else f"{1 - share:.1f} times the energy of"
