"""What a spiking program is compared with, and where the two cost the same.

The original network is costed on the same tokens in several arithmetics: as it is, in 8 bits, and with activations of
``ceil(log2(T + 1))`` bits, which hold what T binary steps can say (Shen et al. 2024, arXiv 2409.08290). Its operations are the same
in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ntc.energy.constants import Constants, load_constants
from ntc.energy.pricing import COLUMNS, Column, Pricing, reduction
from ntc.observe import NodeCounts

__all__ = ["Baseline", "at_rate", "at_steps", "baselines_of", "break_even", "compare", "equivalent_bits"]

_CLOSE = 1e-12
_MOST = 1e9
"""Times as many spikes as there are: beyond, more of them change nothing."""


@dataclass(frozen=True)
class Baseline:
    """The original network in one arithmetic.

    Attributes:
        name: ``fp32``, ``int8``, ``3 bits``, ...
        pricing: What its operations and its data cost.
    """

    name: str
    pricing: Pricing


def equivalent_bits(steps: int) -> int:
    """Bits of an activation that tells as many values apart as T binary steps do: ceil(log2(T + 1))."""
    return math.ceil(math.log2(steps + 1))


def baselines_of(pricing: Pricing, steps: int) -> list[Baseline]:
    """The baselines that a table of constants names, with the memory of the program; the last one that knows its multiplier gives the
    network with as many levels as T steps have.
    """
    tables = [load_constants(name) for name in pricing.constants.baselines]
    found = [Baseline(_arithmetic(table), Pricing(table, pricing.memory)) for table in tables]
    divisible = [table for table in tables if table.multiplier is not None]
    if divisible and steps:
        bits = equivalent_bits(steps)
        found.append(Baseline(f"{bits} bit{'s' if bits != 1 else ''}", Pricing(divisible[-1].quantised(bits), pricing.memory)))
    return found


def _arithmetic(table: Constants) -> str:
    return table.id.rpartition("-")[2]


def at_rate(node: NodeCounts, factor: float) -> NodeCounts:
    """A node when spikes come ``factor`` times as often: what they cause changes in proportion, all else stays."""
    counts, moved = node.counts, node.traffic
    more, summed = factor - 1, factor if node.steps else 1.0  # additions of real values, as of a Hadamard transform, are of no spikes
    rows = counts.acs + counts.graded_macs if node.kind == "projection" else 0.0  # weights that spikes read
    entries = moved.state - 2 * node.measured.get("leak", 0.0) if moved.state else 0.0  # what a leak touches it touches anyway
    return replace(
        node,
        counts=replace(counts, acs=counts.acs * summed, graded_macs=counts.graded_macs * factor, spikes=counts.spikes * factor),
        traffic=replace(moved, weights=moved.weights + more * rows, state=moved.state + more * max(entries, 0.0)),
    )


def at_steps(node: NodeCounts, factor: float) -> NodeCounts:
    """A node with ``factor`` times as many time steps at the same firing rate; one without time steps is as it was."""
    if not node.steps:
        return node
    counts, moved = node.counts, node.traffic
    rows = counts.acs + counts.graded_macs if node.kind == "projection" else 0.0
    return replace(
        node,
        counts=replace(counts * factor, dense_macs=counts.dense_macs, neurons=counts.neurons),
        traffic=replace(
            moved, weights=moved.weights + (factor - 1) * rows, membranes=moved.membranes * factor, spikes=moved.spikes * factor,
            spike_cache=moved.spike_cache * factor, state=moved.state * factor,
        ),
        steps=node.steps * factor,
    )  # fmt: skip


def break_even(energy: Callable[[float], float], target: float) -> float | None:
    """The factor f >= 0 at which ``energy(f)`` is the target, or None if even f = 0 costs more or no f is enough.

    Energies are linear in f, and then this is ``(target - E(0)) / (E(1) - E(0))``. Only where a matrix may be read whole rather than per
    spike they are linear in pieces, and the piece that holds the target is found by bisection.
    """
    silent, one = energy(0.0), energy(1.0)
    if target < silent or one <= silent:
        return None
    linear = (target - silent) / (one - silent)
    if abs(energy(linear) - target) <= _CLOSE * target:
        return linear
    low, high = 0.0, 1.0
    while energy(high) < target:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if energy(middle) < target else (low, middle)
    return high


def compare(
    ann: Sequence[NodeCounts], snn: Sequence[NodeCounts], pricing: Pricing, steps: int, rate: float | None
) -> list[dict[str, Any]]:  # fmt: skip
    """Every baseline against the spiking nodes, in both columns; nodes are those of one token.

    Args:
        ann: Nodes of the original.
        snn: Nodes of the spiking program, or those of a part that stands for the same part.
        pricing: What the spiking program is costed with.
        steps: Its T.
        rate: Its mean firing rate; None if nothing spikes.
    """
    rows = []
    for baseline in baselines_of(pricing, steps):
        columns = {_key(column): _column(column, baseline, ann, snn, pricing, steps, rate) for column in COLUMNS}
        constants = baseline.pricing.constants
        rows.append({"baseline": baseline.name, "constants": constants.id, "title": constants.title, **columns})
    return rows


def _key(column: Column) -> str:
    return column.replace(" ", "_")


def _column(
    column: Column, baseline: Baseline, ann: Sequence[NodeCounts], snn: Sequence[NodeCounts], pricing: Pricing, steps: int,
    rate: float | None,
) -> dict[str, Any]:  # fmt: skip
    target, cost = baseline.pricing.column(column, ann), pricing.column(column, snn)

    def factor(scaled: Callable[[NodeCounts, float], NodeCounts]) -> float | None:
        return break_even(lambda f: pricing.column(column, [scaled(node, f) for node in snn]), target)

    of_rate, of_steps = (factor(at_rate), factor(at_steps)) if rate is not None else (None, None)
    return {
        "ann_pj": target, "snn_pj": cost, "reduction": reduction(target, cost),
        "break_even_rate": None if of_rate is None or rate is None else of_rate * rate,
        "break_even_steps": None if of_steps is None else of_steps * steps,
    }  # fmt: skip
