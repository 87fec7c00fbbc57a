"""What counts cost: by the arithmetic alone, and with the data that it moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ntc.energy.constants import Constants
from ntc.energy.hierarchy import CLASSES, Memory
from ntc.energy.numbers import Level
from ntc.observe import NodeCounts
from ntc.ops import Counts

__all__ = ["COLUMNS", "NOT_MAPPED", "ONE_CHIP", "REAL_ADDITIONS", "WITH_MEMORY", "Column", "Pricing", "reduction"]

Column: TypeAlias = Literal["compute", "compute and memory"]
COLUMNS: tuple[Column, ...] = ("compute", "compute and memory")

NOT_MAPPED = "not mapped: the program is placed on no chip, so hops, packets and idle cores are not known"
"""Why the third column, the placed program, is empty."""

REAL_ADDITIONS = "additions_of_real_values"
"""Accumulates that no spike causes, among what the table of a chip has no figure for."""

ONE_CHIP = "accumulates by spikes and neuron updates only, at figures published for one chip; of other operations it has none"
"""What the first column is with the table of a chip."""

WITH_MEMORY = "the figures of a chip are of its operations with their memory: that of another table would count it twice"
"""Why there is no second column with the table of a chip."""


def reduction(before: float | None, after: float | None) -> float | None:
    """Share of the energy that is saved; negative if the second costs more, None where there is nothing to compare with."""
    return 1 - after / before if before and after is not None else None


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
        return sum(self.constants.cost(self._costed(node)) for node in nodes)

    def _costed(self, node: NodeCounts) -> Counts:
        """Counts that the figures are of: on a chip the accumulates that spikes cause, and no additions of real values (a rotation's)."""
        return replace(node.counts, acs=0.0) if self.constants.device and not node.steps else node.counts

    def moved(self, nodes: Iterable[NodeCounts]) -> dict[str, float]:
        """Bytes moved, by class of data. Node by node: each reads its weights in the cheaper of the two ways."""
        total = dict.fromkeys(CLASSES, 0.0)
        for node in nodes:
            for name, number in self.memory.bytes_moved(node, self.constants.bits).items():
                total[name] += number
        return total

    def memory_pj(self, nodes: Iterable[NodeCounts]) -> dict[str, float]:
        """Energy of the bytes moved, by class of data [pJ]."""
        return {name: number * self.per_byte(name) for name, number in self.moved(nodes).items()}

    def per_byte(self, name: str) -> float:
        """Energy of one byte of a class [pJ]; none of its own where operations are costed with their memory."""
        return 0.0 if self.constants.device else self.memory.per_byte(name)

    def column(self, column: Column, nodes: Iterable[NodeCounts]) -> float:
        """Energy of the nodes as a column of the report has it [pJ]."""
        nodes = list(nodes)
        return self.compute(nodes) + (sum(self.memory_pj(nodes).values()) if column == "compute and memory" else 0.0)

    def stated(self, column: Column, nodes: Iterable[NodeCounts]) -> float | None:
        """``column``, or None if the tables say nothing of it: a chip's figures are of its operations with their memory."""
        nodes = list(nodes)
        if not self.constants.device:
            return self.column(column, nodes)
        return self.constants.stated(sum(map(self._costed, nodes), Counts())) if column == "compute" else None

    def at(self, level: Level, only: str | None = None) -> Pricing:
        """Both tables with their low or high values, or with that of one number alone."""
        return Pricing(self.constants.at(level, only), self.memory.at(level, only))
