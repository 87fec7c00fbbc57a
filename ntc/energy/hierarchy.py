"""Energies of moving data: levels of memory, what lies where, and what is read once for several uses.

A table (``ntc/data/memory``, or a file of the user's) states all of it; nothing about memory is in code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ntc.energy.constants import Bits
from ntc.energy.numbers import Level, Number, number, shipped, table_of, whole
from ntc.observe import NodeCounts

__all__ = ["CLASSES", "DEFAULT_MEMORY", "Memory", "MemoryLevel", "list_memories", "load_memory"]

DEFAULT_MEMORY = "horowitz-45nm-sram"

CLASSES = ("weights", "membranes", "activations", "spikes", "cache", "state", "partial_sums")
"""What data is; ``cache`` holds the keys and values of attention, spikes or not."""


@dataclass(frozen=True)
class MemoryLevel:
    """A memory.

    Attributes:
        bits: Width of one access.
        picojoules: Energy of one access.
    """

    bits: int
    picojoules: float


@dataclass(frozen=True)
class Memory:
    """A hierarchy.

    Attributes:
        id: Name of the table.
        title: What it is, in a line.
        source: Where its numbers come from.
        scope: What they leave out.
        levels: Memories by name.
        holds: Level of each class of data.
        tokens: Tokens that share one read of a weight or a cached key.
        steps: Whether the time steps of a token are taken together.
        accesses: Reads and writes for each accumulate that a spike causes.
        ranges: Low and high values with their sources: of a level by its name, and of ``partial sums``.
    """

    id: str
    title: str
    source: str
    scope: str
    levels: Mapping[str, MemoryLevel]
    holds: Mapping[str, str]
    tokens: int = 1
    steps: bool = False
    accesses: float = 0.0
    ranges: Mapping[str, Number] = field(default_factory=dict)

    def bytes_moved(self, node: NodeCounts, bits: Bits) -> dict[str, float]:
        """Bytes that a node moves, by class.

        A weight is read for each operation that uses it, or the whole matrix is read once for ``tokens`` tokens (and, if steps are not
        taken together, once per step), whichever is less.
        """
        moved = node.traffic
        passes = 1 if self.steps else max(1, node.steps)
        weights = min(moved.weights, moved.sweep * passes / self.tokens)
        return {
            "weights": weights * bits.weights / 8,
            "membranes": 0.0 if self.steps else moved.membranes * bits.membranes / 8,
            "activations": moved.activations * bits.activations / 8,
            "spikes": moved.spikes / 8,
            "cache": (moved.cache * bits.activations + moved.spike_cache) / 8 / self.tokens,
            "state": moved.state * bits.state / 8,
            "partial_sums": self.accesses * (node.counts.graded_macs + (node.counts.acs if node.steps else 0.0)) * bits.membranes / 8,
        }

    def cost(self, bytes_moved: Mapping[str, float]) -> float:
        """Energy of the bytes [pJ]."""
        return sum(number * self.per_byte(name) for name, number in bytes_moved.items())

    def per_byte(self, name: str) -> float:
        """Energy of one byte of a class [pJ]."""
        level = self.levels[self.holds[name]]
        return 8 * level.picojoules / level.bits

    def at(self, level: Level, only: str | None = None) -> Memory:
        """The table with its low or high values, or with that of one number alone."""
        chosen = {name: n.at(level) for name, n in self.ranges.items() if only in (None, name)}
        levels = {name: replace(m, picojoules=chosen.get(name, m.picojoules)) for name, m in self.levels.items()}
        return replace(self, levels=levels, accesses=chosen.get("partial sums", self.accesses))

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys (docs/json.md)."""
        used = dict.fromkeys(self.holds[name] for name in CLASSES)
        return {
            "id": self.id, "title": self.title, "source": self.source, "scope": self.scope,
            "levels": [{"level": name, **asdict(self.levels[name])} for name in used],
            "holds": {name: self.holds[name] for name in CLASSES},
            "reuse_tokens": self.tokens, "steps_together": self.steps, "partial_sum_accesses": self.accesses,
            "ranges": [{"name": name, **asdict(n)} for name, n in self.ranges.items() if name in used or name == "partial sums"],
        }  # fmt: skip


def load_memory(table: str | Path | None = None, reuse: int | None = None) -> Memory:
    """The hierarchy of a table that ships with ntc, by name, or of a TOML file; by default everything in SRAM on the chip.

    Args:
        table: Name or file.
        reuse: Tokens that share one read of a weight, in place of the table's number.

    Raises:
        ConfigError: If there is no such table, it lacks something, or a number makes no sense.
    """
    where = table or DEFAULT_MEMORY
    with table_of(where, "memory", "memory energies") as data:
        levels, ranges = {}, {}
        for name, level in data["levels"].items():
            energy = ranges[name] = number(f"the memory energies {where}", name, level["picojoules"])
            levels[name] = MemoryLevel(whole(level["bits"], f"the width of {name}"), energy.nominal)
        ranges["partial sums"] = number(f"the memory energies {where}", "accesses", data.get("partial_sums", {}).get("accesses", 0))
        holds = dict(data["holds"])
        if missing := set(CLASSES) - holds.keys():
            raise ValueError(f"it does not say where {', '.join(sorted(missing))} lie")
        if unknown := [level for name, level in holds.items() if name in CLASSES and level not in levels]:
            raise ValueError(f"it has no level {unknown[0]}")
        shared = data.get("reuse", {})
        steps = shared.get("steps", False)
        if not isinstance(steps, bool):
            raise TypeError(f"steps is {steps!r}, and neither true nor false")
        return Memory(
            data["id"], data["title"], data["source"], data["scope"], levels, holds,
            whole(shared.get("tokens", 1) if reuse is None else reuse, "reuse.tokens"), steps, ranges["partial sums"].nominal, ranges,
        )  # fmt: skip


def list_memories() -> list[Memory]:
    """The tables that ship with ntc."""
    return [load_memory(name) for name in shipped("memory")]
