"""What the floating-point program does on calibration text: the ranges that scales come from, and the means that biases keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.program import Program, interpret

__all__ = ["Statistics", "measure"]


@dataclass
class Statistics:
    """Of values of the floating-point program.

    Attributes:
        largest: ``max |x|`` of every tensor in floating point.
        mean: Mean of the results of linear layers over tokens and time steps, ``[C]`` float64.
    """

    largest: dict[Node, float] = field(default_factory=dict)
    mean: dict[Node, Tensor] = field(default_factory=dict)


def measure(program: Program, batches: Sequence[Tensor], progress: Callable[[int, int], None]) -> Statistics:
    """Run the program on token ids ``[B, L]`` and watch it."""
    found, rows = Statistics(), dict[Node, int]()

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        found.largest[node] = max(found.largest.get(node, 0.0), float(value.abs().max()))
        if node.target is aten.linear.default:
            flat = value.flatten(0, -2)
            total = flat.sum(0, dtype=torch.float64)
            found.mean[node] = found.mean[node] + total if node in found.mean else total
            rows[node] = rows.get(node, 0) + len(flat)

    with torch.no_grad():
        for number, batch in enumerate(batches):
            progress(number, len(batches))
            interpret(program, batch, visit)
    for node, count in rows.items():
        found.mean[node] /= count
    return found
