"""An energy report in a few sentences: every figure stands beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ntc.energy.wording import count, energy, percent

__all__ = ["headline"]

_OPERATIONS = {
    "macs": "multiply-accumulates", "graded_macs": "multiply-accumulates of graded spikes", "elementwise": "elementwise operations",
    "additions_of_real_values": "additions of real values",
}  # fmt: skip

_NAMED = 2
"""Baselines that a sentence names, the first ones; the table has all."""


def headline(data: Mapping[str, Any]) -> tuple[str, str]:
    """The attention block by arithmetic, which is the field's figure, in the first sentence; with memory, and everything, in the others.

    Args:
        data: ``EnergyReport.to_json``.
    """
    if data["constants"]["device"]:
        return _of_a_chip(data)
    attention, total = (
        {column: _compared(data, part, column) for column in ("compute", "compute_and_memory")} for part in ("attention", "total")
    )
    arithmetic = str(data["constants"]["title"]).removesuffix(", compute only")
    return f"Spiking attention takes {attention['compute']}, by arithmetic alone.", (
        f"With memory it takes {attention['compute_and_memory']}. The whole network takes {total['compute']}, by arithmetic alone; "
        f"{total['compute_and_memory']}, with memory. The spiking program is costed as {arithmetic}; per token, {data['phase']}."
    )


def _of_a_chip(data: Mapping[str, Any]) -> tuple[str, str]:
    """Published figures of a chip times counts: said to be no more than that, with what they leave out."""
    device, total, attention = data["constants"]["device"], data["total"]["snn_pj"], data["attention"]["ssa_pj"]
    if total is None:
        return (
            f"Nothing in this program has a figure published for {device}.",
            "The table has figures of what spikes cause, and nothing spikes.",
        )
    left_out = ", ".join(_left_out(row) for row in data["unpriced"] if row["side"] == "snn")
    block = f"The attention block is {energy(attention)} of it. " if attention else ""
    return (
        f"What spikes cause in this program comes to {energy(total)} per token at figures published for {device}: counts times constants. "
        "Nothing was mapped to that chip or run on it.",
        f"{block}Not in it: {f'{left_out}, which the table has no figures for; ' if left_out else ''}{data['constants']['scope']}. "
        "The original has no figure on this table, and no saving is stated.",
    )


def _left_out(row: Mapping[str, Any]) -> str:
    share = row["share_of_dense_macs"]
    beside = f" ({percent(share)} of the dense ones)" if share is not None else ""
    return f"{count(row['number'])} {_OPERATIONS[row['operation']]}{beside}"


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
