"""Check a streaming program against the parallel one: node by node, in pieces, given equal spikes.

Both are run on the example tokens, the streaming one in pieces of several tokens and of one. Every value that has one entry per token
must be the same entry of the parallel run, up to rounding: so a node that mixes tokens in a way that has no streaming form is found
where it stands, and not by what becomes of it.

Products of other shapes are added up in another order. A neuron whose membrane lies within rounding of its threshold then fires a
step earlier or later, and the layers behind can make anything of one spike. So what a population fires is compared by counting, and
its readers are given the spikes of the parallel run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import TYPE, where
from ntc.ops import spec_of
from ntc.pipeline import exact_limit
from ntc.program import Program, interpret
from ntc.recording import sources
from ntc.spike_type import SpikeType
from ntc.streaming import Stream
from ntc_passes.to_streaming.positions import constant_nodes, token_axis

__all__ = ["check"]

_SHARE, _TIES = 1e-4, 3
"""Spikes of a population that may differ: threshold ties give 1e-7 to 1e-6 of them, a wrong state a large part."""


def check(parallel: Program, streaming: Program) -> dict[str, Any]:
    """Compare the two programs; returns what was found, as plain data.

    Raises:
        PassError: Names the first node that has another value.
    """
    recorded = _Recorded(parallel)
    constant = constant_nodes(streaming)
    # What positions are made of may be anything; they themselves depend on the state, and what meets tokens counts.
    inner = {n.name for n in constant if all(user in constant for user in n.users)}
    moved: dict[str, float] = {}  # largest |difference| or, of a population, number of spikes that differ
    stream = Stream(streaming, len(parallel.example))

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
        expected = recorded.part(node.name, start, stop)
        if expected is None or node.name in inner or not isinstance(value, Tensor):
            return None
        if value.shape != expected.shape:
            moved[node.name] = math.inf
        elif node.name in recorded.populations:
            moved[node.name] = moved.get(node.name, 0.0) + float((value != expected).sum())
            return expected
        else:
            moved[node.name] = max(moved.get(node.name, 0.0), _distance(value, expected))
            return expected if node.name in recorded.sources else None
        return None

    for start, stop in _pieces(parallel.example.shape[1]):
        try:
            stream(parallel.example[:, start:stop], visit)
        except (RuntimeError, IndexError, ValueError) as error:
            _judge(streaming, recorded, moved)  # what went wrong before says more
            raise PassError(f"the program does not run in pieces: {error}") from error
    _judge(streaming, recorded, moved)
    spikes = sum(recorded.values[name].numel() for name in recorded.populations)
    return {
        "tokens": parallel.example.numel(), "max_abs_logit_difference": moved[parallel.results[0].name],
        "spikes": spikes, "spike_mismatches": int(sum(moved[name] for name in recorded.populations)),
    }  # fmt: skip


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """Several tokens, one, one, and the rest; of a short text single tokens."""
    cuts = sorted({0, length // 3, length // 3 + 1, length // 3 + 2, length} & set(range(length + 1)))
    yield from pairwise(cuts)


def _distance(value: Tensor, expected: Tensor) -> float:
    """Largest |difference|; infinite if one of the two is not a number where the other is."""
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, expected) else math.inf
    return float((value - expected).abs().nan_to_num(nan=math.inf).max()) if not torch.equal(value, expected) else 0.0


class _Recorded:
    """Values of the parallel program on its example, those of nodes with one entry per token."""

    def __init__(self, program: Program) -> None:
        self.program = program
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        self.axes = {n.name: axis for n in nodes if (axis := token_axis(program, n)) is not None}
        self.values: dict[str, Tensor] = {}
        self.populations = {n.name for n in program.graph.nodes if n.name in self.axes and _is_population(n)}
        # What a reader of spikes reads, too: it says which neuron has fired them.
        self.sources = {source.name for source in sources(n for n in nodes if n.name in self.populations).values()} & self.axes.keys()
        self._run(self.values, lambda node, value: None)

    def part(self, name: str, start: int, stop: int) -> Tensor | None:
        """Its entries for those tokens."""
        return self.values[name].narrow(self.axes[name], start, stop - start) if name in self.values else None

    def sensitivity(self) -> dict[str, float]:
        """How far rounding moves each value, given equal spikes: every other value of the graph is moved by one unit in the last place."""
        moved: dict[str, float] = {}
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            shaken: dict[str, Tensor] = {}

            def shake(node: Node, value: Tensor, generator: torch.Generator = generator) -> Tensor | None:
                if node.name in self.populations | self.sources:
                    return self.values[node.name]
                if not value.is_floating_point():
                    return None
                sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                return value * (1 + sign * torch.finfo(value.dtype).eps)

            self._run(shaken, shake)
            for name, value in shaken.items():
                moved[name] = max(moved.get(name, 0.0), _distance(value, self.values[name]))
        return moved

    def _run(self, into: dict[str, Tensor], change: Callable[[Node, Tensor], Tensor | None]) -> None:
        def visit(node: Node, args: tuple[Any, ...], value: Any) -> Tensor | None:
            if not isinstance(value, Tensor):
                return None
            if node.name in self.axes:
                into[node.name] = value
            return change(node, value)

        with torch.no_grad():
            interpret(self.program, self.program.example, visit)


def _is_population(node: Node) -> bool:
    spec = spec_of(node)
    return spec is not None and spec.element == "population" and isinstance(node.meta.get(TYPE), SpikeType)


def _judge(program: Program, recorded: _Recorded, moved: dict[str, float]) -> None:
    sensitivity: dict[str, float] | None = None
    for node in program.graph.nodes:
        if node.name not in moved or not (found := moved[node.name]):
            continue
        value = recorded.values[node.name]
        if not value.is_floating_point():
            limit: float = 0.0
        elif node.name in recorded.populations:
            limit = max(_TIES, math.floor(_SHARE * value.numel()))
        else:
            limit = exact_limit(float(value.abs().max()))
            if not found <= limit and found < math.inf:  # the costly measurement, only where the quick limit does not do
                sensitivity = sensitivity if sensitivity is not None else recorded.sensitivity()
                limit = max(limit, 4 * sensitivity[node.name])
        if not found <= limit:
            raise PassError(
                f"{node.target} has no streaming form: given the next tokens alone it differs from the whole text by {found:.3g} (limit "
                f"{limit:.3g}) at {where(node)}; known are softmax and spiking attention, their scales, positions and tables of positions"
            )
