"""Counts and tables that the tests of energy share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ntc.energy import Constants, Memory, Pricing, load_constants, load_memory
from ntc.observe import NodeCounts
from ntc.ops import Counts, Traffic

__all__ = ["linear", "neurons", "pricing"]


def linear(inputs: int, outputs: int, steps: int = 0, rate: float = 0.0, name: str = "layer") -> NodeCounts:
    """A layer of one token: dense, or driven by a train of T steps at a firing rate."""
    dense = float(inputs * outputs)
    if not steps:
        counts = Counts(dense_macs=dense, macs=dense)
        return NodeCounts(name, "linear", "", "", "projection", counts, {}, True, Traffic(dense, dense, 0, inputs + outputs))
    acs = steps * rate * dense
    return NodeCounts(
        name, "linear", "", "", "projection", Counts(dense_macs=dense, acs=acs), {}, True,
        Traffic(weights=acs, sweep=dense, spikes=steps * inputs), steps,
    )  # fmt: skip


def neurons(number: int, steps: int, rate: float) -> NodeCounts:
    """A population of one token."""
    counts = Counts(neuron_updates=number * steps, spikes=number * steps * rate, neurons=number)
    moved = Traffic(membranes=2 * number * steps, spikes=number * steps)
    return NodeCounts("spikes", "integrate_fire", "", "", "neurons", counts, {}, True, moved, steps)


def pricing(constants: str = "horowitz-45nm-fp32", memory: str = "horowitz-45nm-sram", **changes: Any) -> Pricing:
    arithmetic: Constants = load_constants(constants)
    hierarchy: Memory = load_memory(memory)
    return Pricing(arithmetic, replace(hierarchy, **changes))
