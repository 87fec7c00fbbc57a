"""How far a figure rests on its constants: all of them low or high, and one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ntc.energy.numbers import LEVELS, Number
from ntc.energy.pricing import COLUMNS, Pricing, reduction
from ntc.observe import NodeCounts

__all__ = ["sensitivity"]


def sensitivity(ann: Sequence[NodeCounts], snn: Sequence[NodeCounts], pricing: Pricing) -> dict[str, Any]:
    """Both columns with all numbers low, nominal and high, and what each number moves by itself, the largest mover first.

    Both networks are costed with the same numbers, so a number that is in both moves the energies more than their ratio.
    """
    columns = COLUMNS[:1] if pricing.constants.device else COLUMNS
    levels = [
        {"level": level, "column": column, **_both(pricing.at(level), column, ann, snn)} for column in columns for level in LEVELS
    ]  # fmt: skip
    ranges: dict[str, Number] = {**pricing.constants.ranges, **pricing.memory.ranges}
    numbers = []
    for name, number in ranges.items():
        if number.certain:
            continue
        for column in columns:
            low, high = (_both(pricing.at(level, name), column, ann, snn)["reduction"] for level in ("low", "high"))
            if low is not None and high is not None and low != high:
                numbers.append(
                    {"number": name, "column": column, "low": number.low, "nominal": number.nominal, "high": number.high,
                     "reduction_low": low, "reduction_high": high}
                )  # fmt: skip
    numbers.sort(key=lambda row: -abs(row["reduction_high"] - row["reduction_low"]))
    return {"levels": levels, "numbers": numbers}


def _both(pricing: Pricing, column: Any, ann: Sequence[NodeCounts], snn: Sequence[NodeCounts]) -> dict[str, Any]:
    before, after = pricing.stated(column, ann), pricing.stated(column, snn)
    return {"ann_pj": before, "snn_pj": after, "reduction": reduction(before, after)}
