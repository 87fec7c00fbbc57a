"""What was counted, as plain data."""

from __future__ import annotations

from typing import Any

from ntc_backends import netlist_schema as schema
from ntc_backends.simulator.piece import Counter

__all__ = ["activity_of"]


def activity_of(netlist: schema.Netlist, counter: Counter, memory: dict[str, int]) -> dict[str, Any]:
    """Spikes, rates, membranes, operations, memory (docs/json.md, ``ntc simulate``)."""
    populations = [_population(p, counter) for p in netlist.populations]
    spikes, slots = sum(p["spikes"] for p in populations), sum(p.size * p.steps for p in netlist.populations) * counter.tokens
    on_chip = [*netlist.projections, *netlist.dynamic_products]
    synaptic, macs = counter.synaptic, counter.macs
    return {
        "tokens": counter.tokens,
        "steps": netlist.time.steps,
        "grade": netlist.conventions.rounding,
        "neurons": sum(p.size for p in netlist.populations),
        "spikes": spikes,
        "rate": spikes / slots if slots else 0.0,
        "synaptic_operations": sum(counter.synaptic.values()),
        "macs": sum(counter.macs.values()),
        "populations": populations,
        "operations": [
            {"name": e.name, "module": e.module, "synaptic_operations": synaptic.get(e.name, 0), "macs": macs.get(e.name, 0)}
            for e in on_chip
        ],
        "memory_bytes": memory,
    }  # fmt: skip


def _population(population: schema.Population, counter: Counter) -> dict[str, Any]:
    name, slots = population.name, population.size * population.steps * counter.tokens
    spikes = counter.spikes.get(name, 0)
    return {
        "name": name, "module": population.module, "role": population.role, "neurons": population.size, "spikes": spikes,
        "rate": spikes / slots if slots else 0.0,
        "membrane_minimum": counter.lowest.get(name), "membrane_maximum": counter.highest.get(name),
        "membrane_bits": population.membrane_bits,
    }  # fmt: skip
