"""What counts cost: by the arithmetic alone, and with the data that it moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ntc.energy.constants import Constants
from ntc.energy.hierarchy import CLASSES, Memory
from ntc.energy.numbers import Level
from ntc.observe import NodeCounts

__all__ = ["COLUMNS", "NOT_MAPPED", "Column", "Pricing", "reduction"]

Column: TypeAlias = Literal["compute", "compute and memory"]
COLUMNS: tuple[Column, ...] = ("compute", "compute and memory")

NOT_MAPPED = "not mapped: the program is placed on no chip, so hops, packets and idle cores are not known"
"""Why the third column, the placed program, is empty."""


def reduction(before: float, after: float) -> float | None:
    """Share of the energy that is saved; negative if the second costs more."""
    return 1 - after / before if before else None


@dataclass(frozen=True)
class Pricing:
    """A table of energies per operation and one of memory, together.

    Attributes:
        constants: Energies per operation, and widths.
        memory: Where data lies and what it takes to move it.
    """

    constants: Constants
    memory: Memory

    def compute(self, nodes: Iterable[NodeCounts]) -> float:
        """Energy of the operations [pJ]."""
        return sum(self.constants.cost(node.counts) for node in nodes)

    def moved(self, nodes: Iterable[NodeCounts]) -> dict[str, float]:
        """Bytes moved, by class of data. Node by node: each reads its weights in the cheaper of the two ways."""
        total = dict.fromkeys(CLASSES, 0.0)
        for node in nodes:
            for name, number in self.memory.bytes_moved(node, self.constants.bits).items():
                total[name] += number
        return total

    def memory_pj(self, nodes: Iterable[NodeCounts]) -> dict[str, float]:
        """Energy of the bytes moved, by class of data [pJ]."""
        return {name: number * self.memory.per_byte(name) for name, number in self.moved(nodes).items()}

    def column(self, column: Column, nodes: Iterable[NodeCounts]) -> float:
        """Energy of the nodes as a column of the report has it [pJ]."""
        nodes = list(nodes)
        return self.compute(nodes) + (sum(self.memory_pj(nodes).values()) if column == "compute and memory" else 0.0)

    def at(self, level: Level, only: str | None = None) -> Pricing:
        """Both tables with their low or high values, or with that of one number alone."""
        return Pricing(self.constants.at(level, only), self.memory.at(level, only))
