"""What ntc knows about an op: its type rule, its operation counts, what it moves, and its place in a netlist.

An op of ours has one file in this folder with its mathematics, kernel, fake kernel, gradient, oracle and one ``OpSpec``;
ATen ops of the dialect share the table in ``aten.py``. Adding a neuron model is adding one file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from torch import Tensor
from torch.fx import Node

from ntc.ops.interval import BoundRule
from ntc.spike_type import ANALOG, Analog, CurrentType, NodeType, RateType, SpikeType, type_of_tensor

__all__ = [
    "SPECS", "Counts", "Element", "OpSpec", "Operand", "Traffic", "TypeMismatch", "host_rule", "register", "spec_of", "timed",
]  # fmt: skip


class TypeMismatch(Exception):
    """An op was given a value of a type that it does not take; carries the offending argument."""

    def __init__(self, message: str, argument: Node | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class _Additive:
    """Numbers of a frozen dataclass that add up field by field, and scale."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, self.__dict__.values(), other.__dict__.values()))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(value * factor for value in self.__dict__.values()))


@dataclass(frozen=True)
class Counts(_Additive):
    """Operations of one node on stated data. Additive over nodes.

    Attributes:
        dense_macs: Multiply-accumulates of the dense computation, nothing skipped (attention: all L x L scores).
        macs: Multiply-accumulates with a real-valued operand that are needed (attention: j <= i only).
        acs: Accumulates caused by binary or ternary spikes (a weight or count is added, nothing is multiplied).
        graded_macs: Multiply-accumulates caused by graded spikes or integer payloads.
        neuron_updates: Membrane updates: neurons x time steps; each is one accumulate.
        elementwise: Other arithmetic (norms, activations, softmax, residual adds), counted but not costed.
        spikes: Spikes emitted by this node.
        neurons: Neurons that this node holds, times tokens (0 if it is no population).
    """

    dense_macs: float = 0.0
    macs: float = 0.0
    acs: float = 0.0
    graded_macs: float = 0.0
    neuron_updates: float = 0.0
    elementwise: float = 0.0
    spikes: float = 0.0
    neurons: float = 0.0


@dataclass(frozen=True)
class Traffic(_Additive):
    """Data that one node moves on stated data, between memories and arithmetic. Additive over nodes, like ``Counts``.

    Elements have the width that a table of energies states; bits are bits. Partial sums, scores and currents stay in registers.

    Attributes:
        weights: Stored numbers read, one for each operation that uses one: nothing is kept between two spikes or two tokens.
        sweep: Elements of one pass over all that ``weights`` reads from, per token: what a memory moves that keeps a row for all
            spikes of a token.
        membranes: Membrane potentials read and written: two per update.
        activations: Analog values and integers read and written: each argument once, each result once.
        spikes: Bits of spike trains read and written.
        cache: Elements of the keys and values that softmax attention reads again for each query.
        spike_cache: Bits of the keys and values that spiking attention reads again for each query, parallel form.
        state: Entries of the memory of spiking attention read and written, streaming form.
    """

    weights: float = 0.0
    sweep: float = 0.0
    membranes: float = 0.0
    activations: float = 0.0
    spikes: float = 0.0
    cache: float = 0.0
    spike_cache: float = 0.0
    state: float = 0.0


@dataclass(frozen=True)
class Operand:
    """A tensor argument or result of a node as the counting rules see it.

    Attributes:
        shape: Concrete shape on the measured data.
        type: Its type.
        nonzero: Elements that were not zero, measured; for spike trains the number of events.
    """

    shape: tuple[int, ...]
    type: NodeType
    nonzero: float

    @property
    def numel(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n


Element: TypeAlias = Literal["population", "projection", "dynamic_product", "decode", "scale", "host"]
TypeRule: TypeAlias = Callable[[Node, Callable[[Node], NodeType]], NodeType]
MembraneRule: TypeAlias = Callable[[Sequence[Any], Tensor], tuple[Tensor, tuple[Any, ...]]]
CountRule: TypeAlias = Callable[[Node, Sequence[Operand], Operand, dict[str, float]], Counts]
MoveRule: TypeAlias = Callable[[Node, Sequence[Operand], Operand, dict[str, float]], Traffic]


@dataclass(frozen=True)
class OpSpec:
    """Everything that the compiler knows about one op.

    Attributes:
        target: The op overload.
        infer: Type rule; raises ``TypeMismatch`` for types that the op does not take.
        count: Operations from operands (tensor arguments in order), result and what ``measure`` returned;
            None = cannot be counted, which reports list.
        moves: Data moved, from the same as ``count``; None = what ``ntc.ops.traffic.streamed`` says: each argument is read once and the
            result written once.
        measure: Called with the tensor arguments and the result while rates are measured, for counts that need
            more than numbers of non-zero elements; ``effective_macs`` in what it returns are those of ``Counts.macs`` whose
            factors are both other than zero, ``zero_weight_acs`` those of ``Counts.acs`` that add a zero.
        element: What the node is in a netlist.
        kind: Where its energy is booked (``attention``, ``projection``, ``norm``, ...).
        onnx: For ops of ours: the body as an ONNX function in the text syntax of ``onnx.parser``; one after the other if the op
            has variants, told apart by their ``overload``.
        traced: For ops of ours: the same function of the same arguments in plain torch operations, differentiable and open to
            ``torch.compile``, which training runs in place of the kernel; None = training runs the kernel and its gradient.
        membrane: Of populations: from the arguments and a train that was fired, the membrane before each decision, ``[T, ...]``, and the
            potentials from which on the next larger event is fired, the highest one first: one (0, 1), two (-1, 0, 1) or 2 N of them
            (0 and +-2^i, i < N); None = ties at a threshold cannot be told from mistakes (``ntc.rounding``).
        one_spike: Of ops with neurons inside that their result does not show: from arguments and result, how far one spike of theirs moves
            each of the results at most; None = there are none. Without it a tie in there would pass for a mistake (``ntc.rounding``).
        source: Of ops that read a train and the value that it was made of, since that tells which neuron fired: where that value stands in
            their arguments. Whoever holds the train holds it, too: a train of one neuron that is read as another's tells nothing.
        bound: Of the integer grade: the interval of the result and of what is held inside, from those of the arguments
            (``ntc.ops.interval``); None = the op has no integer form.
    """

    target: Any
    infer: TypeRule
    count: CountRule | None = None
    moves: MoveRule | None = None
    measure: Callable[[Sequence[Tensor], Tensor, Node], dict[str, float]] | None = None
    element: Element = "host"
    kind: str = "elementwise"
    onnx: str | None = None
    traced: Callable[..., Tensor] | None = None
    membrane: MembraneRule | None = None
    one_spike: Callable[[Sequence[Any], Tensor], Tensor] | None = None
    source: int | None = None
    bound: BoundRule | None = None


SPECS: dict[Any, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Enter an op into the table; an op registered twice is a mistake."""
    if spec.target in SPECS:
        raise ValueError(f"op {spec.target} is registered twice")
    SPECS[spec.target] = spec
    return spec


def spec_of(node: Node) -> OpSpec | None:
    """The spec of a node's op, or None if ntc has none (then it is an unknown analog op on the host)."""
    return SPECS.get(node.target)


def timed(value: NodeType) -> bool:
    """Whether a value has the time-step axis."""
    return isinstance(value, SpikeType | CurrentType)


def host_rule(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The rule of ordinary ops: they take analog values, integers and indices, never a value with a time axis."""
    for argument in node.all_input_nodes:
        given = type_of(argument)
        if timed(given) or isinstance(given, RateType):
            raise TypeMismatch(f"{node.target} takes analog values, and %{argument.name} is {given}; decode it first", argument)
    value = node.meta.get("val")
    if value is None and any(isinstance(type_of(a), Analog) for a in node.all_input_nodes):
        return ANALOG
    return type_of_tensor(value)
