"""Run a program and watch it: spikes per population, operations per node.

One walk serves evaluation and energy. Spikes are counted on the very values that flow; nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from ntc.meta import TYPE, block_of, module_of
from ntc.ops import Counts, Operand, Traffic, spec_of
from ntc.ops.events import spikes_per_neuron
from ntc.ops.traffic import streamed
from ntc.program import Program, interpret, op_name
from ntc.recording import role_of
from ntc.spike_type import ANALOG, CurrentType, Integer, NodeType, SpikeType

__all__ = ["Activity", "NodeCounts", "PopulationActivity", "count_by_shape", "observe", "steps_of"]


@dataclass
class PopulationActivity:
    """What one population of neurons did.

    Attributes:
        name: Node name.
        module: Module of the model.
        block: Transformer block.
        role: ``q``, ``k``, ``v``, ``ssa``, ``ffn``, ``input``, or nothing (``ntc.recording.role_of``).
        steps: T.
        spikes: Spikes of each neuron over all tokens and steps, ``[C]``.
        tokens: Tokens that it saw.
    """

    name: str
    module: str
    block: str
    role: str
    steps: int
    spikes: Tensor
    tokens: int = 0

    @property
    def neurons(self) -> int:
        """Neurons per token."""
        return self.spikes.numel()

    @property
    def events_per_value(self) -> float:
        """Mean number of spikes that stand for one value."""
        return float(self.spikes.sum()) / max(1, self.neurons * self.tokens)

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and step."""
        return self.events_per_value / self.steps

    @property
    def dead(self) -> int:
        """Neurons that never fired."""
        return int((self.spikes == 0).sum())

    @property
    def saturated(self) -> int:
        """Neurons that fired at every step of every token."""
        return int((self.spikes >= self.steps * self.tokens).sum())


@dataclass
class NodeCounts:
    """Operations of one node and the data that it moves, summed over the tokens that it saw.

    Attributes:
        name: Node name.
        op: Its op.
        module: Module of the model.
        block: Transformer block.
        kind: Where its energy is booked.
        counts: Operations.
        measured: What its op measured, and ``flop_counter_macs`` of an op without a counting rule.
        countable: Whether its op has a counting rule.
        traffic: Data moved.
        steps: T of the trains that it takes or makes; 0 if there are none.
    """

    name: str
    op: str
    module: str
    block: str
    kind: str
    counts: Counts
    measured: dict[str, float]
    countable: bool = True
    traffic: Traffic = field(default_factory=Traffic)
    steps: float = 0

    @property
    def effective_macs(self) -> float:
        """Of ``counts.macs`` those with both factors other than zero; where nothing was measured, all."""
        return self.measured.get("effective_macs", self.counts.macs)

    @property
    def effective_acs(self) -> float:
        """Of ``counts.acs`` those that do not add a zero."""
        return self.counts.acs - self.measured.get("zero_weight_acs", 0.0)

    def __mul__(self, factor: float) -> NodeCounts:
        measured = {key: value * factor for key, value in self.measured.items()}
        return replace(self, counts=self.counts * factor, traffic=self.traffic * factor, measured=measured)

    def __add__(self, other: NodeCounts) -> NodeCounts:
        """The same node on more tokens."""
        measured = {key: self.measured.get(key, 0.0) + other.measured.get(key, 0.0) for key in {**self.measured, **other.measured}}
        return replace(self, counts=self.counts + other.counts, traffic=self.traffic + other.traffic, measured=measured)


def steps_of(types: Iterable[NodeType]) -> int:
    """T of the trains among some values, 0 if there are none."""
    return max((t.steps for t in types if isinstance(t, SpikeType | CurrentType)), default=0)


class Activity:
    """Accumulates what happens while a program runs; pass ``visit`` to ``ntc.program.interpret``."""

    def __init__(self, *, operations: bool = True) -> None:
        self.operations = operations
        self.populations: dict[str, PopulationActivity] = {}
        self.nodes: dict[str, NodeCounts] = {}
        self.tokens = 0
        self._events: dict[Node, float] = {}

    def start(self, input_ids: Tensor) -> None:
        """Begin a batch."""
        self.tokens += input_ids.numel()
        self._events.clear()

    def visit(self, node: Node, args: tuple[Any, ...], value: Any) -> None:
        """Watch one node."""
        kind = node.meta.get(TYPE, ANALOG)
        if isinstance(kind, SpikeType) and isinstance(value, Tensor):
            self._spikes(node, kind, value)
        if self.operations:
            self._count(node, args, value)

    def _spikes(self, node: Node, kind: SpikeType, value: Tensor) -> None:
        per_neuron = spikes_per_neuron(value, kind.levels)
        self._events[node] = float(per_neuron.sum())
        spec = spec_of(node)
        if spec is None or spec.element != "population":
            return
        found = self.populations.setdefault(
            node.name,
            PopulationActivity(
                node.name, module_of(node), block_of(node), role_of(node), kind.steps, torch.zeros_like(per_neuron)
            ),
        )
        found.spikes = found.spikes + per_neuron
        found.tokens += value[0].numel() // value.shape[-1]

    def _count(self, node: Node, args: tuple[Any, ...], value: Any) -> None:
        spec = spec_of(node)
        row = self.nodes.get(node.name)
        if row is None:
            countable = spec is not None and spec.count is not None
            kind = spec.kind if spec else "unknown"
            row = NodeCounts(node.name, op_name(node.target), module_of(node), block_of(node), kind, Counts(), {}, countable)
            self.nodes[node.name] = row
        if not row.countable:
            row.measured["flop_counter_macs"] = row.measured.get("flop_counter_macs", 0.0) + _torch_macs(node, args)
        value = value[0] if isinstance(value, tuple) else value  # of an op with a state the other results are that
        if spec is None or spec.count is None or not isinstance(value, Tensor):
            return
        nodes = [a for a in node.args if isinstance(a, Node)]
        tensors = [a for a in args if isinstance(a, Tensor)]
        if len(nodes) != len(tensors):  # sizes among the arguments: a layout operation, which costs nothing
            return
        operands = [self._operand(n, t) for n, t in zip(nodes, tensors, strict=True)]
        # Spikes, or integers that may be counts of them, or factors that may be zero; shapes alone have no values.
        worth = any(isinstance(o.type, SpikeType | Integer) for o in operands) or spec.element == "projection"
        real = not isinstance(value, FakeTensor) and not value.is_meta
        measured = spec.measure(tensors, value, node) if spec.measure and worth and real else {}
        result = self._operand(node, value)
        row.counts = row.counts + spec.count(node, operands, result, measured)
        row.traffic = row.traffic + (spec.moves or streamed)(node, operands, result, measured)
        row.steps = steps_of(o.type for o in (*operands, result))
        for key, number in measured.items():
            row.measured[key] = row.measured.get(key, 0.0) + number

    def _operand(self, node: Node, value: Tensor) -> Operand:
        return Operand(tuple(int(s) for s in value.shape), node.meta.get(TYPE, ANALOG), self._events.get(node, 0.0))


def _torch_macs(node: Node, args: tuple[Any, ...]) -> float:
    """Multiply-accumulates of an op that ntc does not know, as torch's flop counter sees them while it runs once more.

    Running it decomposes ops such as ``einsum`` into those that the counter knows; what it does not know counts 0.
    """
    if any(isinstance(v, Node) for v in node.kwargs.values()):  # only positional values are at hand
        return 0.0
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **node.kwargs)  # type: ignore[operator]
    return float(counter.get_total_flops()) / 2


def observe(program: Program, batches: Sequence[Tensor], activity: Activity) -> None:
    """Run every batch and watch it."""
    with torch.no_grad():
        for batch in batches:
            activity.start(batch)
            interpret(program, batch, activity.visit)


def count_by_shape(program: Program, shapes: Sequence[tuple[int, int]]) -> Activity:
    """Operations of a program in which nothing spikes, from shapes alone: no weight is read, nothing is computed.

    Args:
        program: A program whose tensors may be on the ``meta`` device.
        shapes: (B, L) of each batch.
    """
    activity = Activity()
    for batch, length in shapes:
        if (values := _by_symbols(program, batch, length)) is not None:
            activity.tokens += batch * length
            for node in program.graph.nodes:
                if node.op == "call_function":
                    activity.visit(node, torch.fx.map_arg(node.args, values.__getitem__), values[node])
            continue
        with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad():
            ids = torch.zeros(batch, length, dtype=torch.long)
            activity.start(ids)
            shapes_only = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in program.tensors.items()}
            interpret(program, ids, activity.visit, tensors=shapes_only)
    return activity


def _by_symbols(program: Program, batch: int, length: int) -> dict[Node, Any] | None:
    """Tensors without data in the shapes of all values, from the symbolic shapes that the program carries; None if those do not tell, or if
    an op must run to be counted.
    """
    ids = next((n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"), None)
    if not isinstance(ids, Tensor):
        return None
    sizes: list[Any] = list(ids.shape)
    known = {size.node.expr: n for size, n in zip(sizes, (batch, length)) if isinstance(size, torch.SymInt)}
    found: dict[Any, int] = {}

    def number(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in found:
            found[expression] = int(expression.xreplace(known))  # TypeError if another symbol is left
        return found[expression]

    def concrete(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty([number(size) for size in value.shape], dtype=value.dtype, device="meta")
        if isinstance(value, tuple | list):
            return type(value)(map(concrete, value))
        return number(value) if isinstance(value, torch.SymInt) else value

    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        spec = spec_of(node)
        if "val" not in node.meta or (node.op == "call_function" and (spec is None or spec.count is None)):
            return None
        try:
            values[node] = concrete(node.meta["val"])
        except TypeError:
            return None
    return values
