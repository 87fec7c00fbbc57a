"""The integer program while it is made: its nodes, what each integer stands for, and its own values on calibration text.

Nodes are made in the order of execution, and each is run as soon as it is made, so that whoever decides about a layer sees the
integers that reach it, with all the errors made before. Values are held until their last use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import PassError
from ntc.meta import NEURON, SCALE, building, module_of, where
from ntc.program import Program
from ntc_passes.quantize.fixed_point import fixed_point
from ntc_passes.quantize.options import Options
from ntc_passes.quantize.statistics import Statistics

__all__ = ["NAME", "Constant", "Value", "Work", "rows_of"]

NAME = "quantize"

Kind: TypeAlias = Literal["index", "stream", "activation", "accumulator", "train", "product"]

_REQUANTIZE = torch.ops.ntc.requantize.default


@dataclass(frozen=True)
class Constant:
    """A tensor of integers that becomes a constant of the program under that name."""

    name: str
    value: Tensor


@dataclass
class Value:
    """A value of the integer program.

    Attributes:
        node: Its node.
        kind: ``index`` ids and positions; ``stream`` the residual stream, at its power of two; ``activation`` a few bits;
            ``accumulator`` sums of a linear layer; ``train`` spikes; ``product`` counts of spiking attention.
        scale: The integer n stands for ``n * scale``, float64: ``[1]``, ``[C]``, or ``[R, C]`` for tokens by position mod R.
        data: What it is on each calibration batch.
        bound: Largest magnitude that it can have; 0 if nobody has to know.
        steps: Time steps of axis 0; 0 if there is no such axis.
        made: What has been made of it for other uses.
    """

    node: Node
    kind: Kind
    scale: Tensor
    data: list[Any]
    bound: int = 0
    steps: int = 0
    made: dict[Any, Value] = field(default_factory=dict)

    def scaled(self, factor: Tensor) -> Value:
        """The same integers standing for that many times as much."""
        return replace(self, scale=self.scale * factor, made={}, kind="activation" if self.kind == "stream" else self.kind)


class Work:
    """The program on its way.

    Attributes:
        program: Both programs in one graph: the floating-point one loses its last user at the end.
        at: The options for a node of the floating-point program.
        batches: Token ids of calibration text.
        floating: What the floating-point program does on them.
        exponent: The residual stream counts in units of ``2**exponent``.
        notes: What was decided and measured, by name of the node.
    """

    def __init__(
        self, program: Program, at: Callable[[Node], Options], batches: Sequence[Tensor], floating: Statistics, exponent: int
    ) -> None:
        self.program = program
        self.at = at
        self.batches = list(batches)
        self.floating = floating
        self.exponent = exponent
        self.notes: dict[str, dict[str, Any]] = {}
        self._values: dict[Node, Value] = {}
        self._names: set[str] = set()

    @property
    def unit(self) -> float:
        """What one unit of the residual stream stands for."""
        return 2.0**self.exponent

    def __getitem__(self, node: object) -> Value:
        """The integer value of a node of the floating-point program."""
        assert isinstance(node, Node)
        if node not in self._values:
            raise PassError(f"%{node.name} is computed, and the integer grade takes a constant there: {where(node)}")
        return self._values[node]

    def __setitem__(self, node: Node, value: Value) -> None:
        self._values[node] = value

    def forget(self, node: Node) -> None:
        """Let go of a value after its last use."""
        self._values.pop(node, None)

    def constant(self, node: Node, argument: object, what: str) -> Tensor:
        """The constant tensor that is an argument of a node, float64.

        Raises:
            PassError: If it is none.
        """
        if not isinstance(argument, Node) or argument.op != "get_attr":
            raise PassError(f"quantize takes a constant as {what}, and that of {where(node)} is computed: it has no integer form")
        return self.program.tensor(argument).detach().double()

    def emit(self, stands_for: Node, target: Callable[..., Any], *args: Any, name: str | None = None) -> tuple[Node, list[Any]]:
        """Make a node of the integer program and run it.

        Args:
            stands_for: The node of the floating-point program that it stands for; new nodes go before it.
            target: The op.
            args: Its arguments: values, constants and plain data.
            name: Name of the node, by default that of ``stands_for``.

        Returns:
            The node and its value on each batch.
        """
        with building(self.program.graph, before=stands_for, stands_for=[stands_for], by=NAME) as call:

            def as_node(argument: Any) -> Any:
                if isinstance(argument, Constant):
                    return call(self.program.add_tensor(self._unused(argument.name), argument.value, trainable=False))
                return argument.node if isinstance(argument, Value) else argument

            node = call(target, *[as_node(a) for a in args], name=name or stands_for.name)
        if NEURON in stands_for.meta and target is torch.ops.ntc.integer_fire.default:
            node.meta[NEURON] = stands_for.meta[NEURON]
        with torch.no_grad():
            data = [target(*(_on(a, i) for a in args)) for i in range(len(self.batches))]
        return node, data

    def _unused(self, name: str) -> str:
        """A name that no other tensor of the integer program has asked for."""
        unique, number = name, 1
        while unique in self._names:
            unique, number = f"{name}_{number}", number + 1
        self._names.add(unique)
        return unique

    def requantize(self, at: Node, value: Value, scale: float | Tensor, low: int, high: int, name: str, kind: Kind) -> Value:
        """A value in units of another scale, clamped.

        Args:
            at: The node of the floating-point program that it stands for.
            value: What is to be rescaled.
            scale: The new scale, one number or ``[C]``.
            low: Least result.
            high: Largest result.
            name: Name of the node.
            kind: Of the result.
        """
        wanted = torch.as_tensor(scale, dtype=torch.float64).reshape(-1)
        factor = value.scale / wanted
        try:
            multiplier, shift = fixed_point(factor)
        except ValueError as error:
            raise PassError(f"{where(at)} cannot be brought to another scale: {error}; calibrate on more text") from error
        stored = Constant(f"{module_of(at) or at.name}.{_last(name)}.multiplier", multiplier)
        node, data = self.emit(at, _REQUANTIZE, value, stored, shift, low, high, name=name)
        return self.noted(Value(node, kind, wanted, data, max(-low, high), value.steps))

    def noted(self, value: Value) -> Value:
        """Write the scale of a value into its node: one number, or one per channel; ``[R, C]`` only if the caller does."""
        if value.scale.dim() == 1:
            first = float(value.scale[0])
            value.node.meta[SCALE] = first if bool((value.scale == first).all()) else value.scale.tolist()
        return value


def _last(name: str) -> str:
    return name.rsplit("_", 1)[-1]


def _on(argument: Any, batch: int) -> Any:
    if isinstance(argument, Constant):
        return argument.value
    return argument.data[batch] if isinstance(argument, Value) else argument


def rows_of(value: Value, most: int | None = None) -> Tensor:
    """What a value stands for on calibration text, one row per token (and step), ``[rows, C]`` float64.

    Args:
        value: Any value with channels.
        most: Most rows, evenly spread.
    """
    parts = [real * 1.0 for real in _real(value)]
    rows = torch.cat(parts)
    if most is None or len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long()]


def _real(value: Value) -> Iterator[Tensor]:
    for n in value.data:
        scale = value.scale
        if scale.dim() == 2:  # by position mod R
            scale = scale[torch.arange(n.shape[-2]) % len(scale)]
        yield (n.double() * scale).flatten(0, -2)
