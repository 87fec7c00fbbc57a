"""The program's own run, kept: what executors of its artefacts are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import NEURON
from ntc.ops import spec_of
from ntc.program import Program, interpret

__all__ = ["Grade", "Recorded", "grade_of", "neurons_of", "populations", "record", "role_of", "sources"]

Grade: TypeAlias = Literal["integer", "float"]


def populations(program: Program) -> dict[str, Node]:
    """Its populations by name, in the order of the graph."""
    return {n.name: n for n in program.graph.nodes if (s := spec_of(n)) is not None and s.element == "population"}


def sources(populations: Iterable[Node]) -> dict[Node, Node]:
    """By reader of a population, the value that its spikes were made of, if the reader takes that as well (``OpSpec.source``)."""
    found: dict[Node, Node] = {}
    for reader in (reader for node in populations for reader in node.users):
        spec = spec_of(reader)
        if spec is not None and spec.source is not None:
            found[reader] = reader.args[spec.source]  # type: ignore[assignment]
    return found


def neurons_of(population: Node, tokens: int) -> int:
    """Neurons of one sequence of so many tokens: ``L C``, and ``H L L`` of those on rows of attention ``[T, B, H L, L]``."""
    sizes = population.meta["val"].shape[2:]
    # Not int(size): that would tell torch that the network takes sequences as long as its example and no others.
    return math.prod(
        int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, tokens))) if isinstance(size, torch.SymInt) else size
        for size in sizes
    )


_OPERANDS = {"query": "q", "key": "k", "value": "v"}  # as the ops of attention call them


def role_of(population: Node) -> str:
    """What a population is for: the role that a pass has noted, or what those that read it make of its spikes.

    Returns:
        ``q``, ``k``, ``v``, ``ssa``, ``ffn``; ``input`` of what only linear layers read; empty of anything else.
    """
    neuron, readers = population.meta.get(NEURON), list(population.users)
    if neuron is not None:
        return str(neuron.role)
    for reader in readers:
        if isinstance(reader.target, torch._ops.OpOverload) and population in reader.args:
            role = _OPERANDS.get(reader.target._schema.arguments[reader.args.index(population)].name)
            if role is not None:
                return role
    return "input" if readers and all((s := spec_of(r)) is not None and s.kind == "projection" for r in readers) else ""


def grade_of(program: Program) -> Grade:
    """Whether it computes with integers from token ids to logits."""
    return "integer" if program.results[0].target is torch.ops.ntc.from_integer.default else "float"


@dataclass
class Recorded:
    """The program's own run on a batch.

    Attributes:
        ids: ``[B, L]``.
        first: Number of the first sequence.
        logits: ``[B, L, V]``.
        trains: By population, ``[T, B, L, C]``, int8.
        arguments: What each population was called with; only of floating-point programs.
        values: Values of the other nodes asked for, and of those that readers of spikes read, too (``sources``).
    """

    ids: Tensor
    first: int
    logits: Tensor
    trains: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def one(self) -> Recorded:
        """Its first sequence."""

        def cut(value: Any) -> Any:
            return value.narrow(value.dim() - 3, 0, 1) if isinstance(value, Tensor) and value.dim() >= 3 else value

        trains = {name: cut(train) for name, train in self.trains.items()}
        arguments = {name: tuple(map(cut, given)) for name, given in self.arguments.items()}
        values = {name: cut(value) for name, value in self.values.items()}
        return Recorded(self.ids[:1], self.first, self.logits[:1], trains, arguments, values)


def record(program: Program, ids: Tensor, first: int, wanted: Sequence[str] = ()) -> Recorded:
    """Run the program and keep what is compared with, and the values of the nodes ``wanted``."""
    nodes = populations(program)
    keep = {*wanted, *(source.name for source in sources(nodes.values()).values())}
    result = Recorded(ids, first, torch.empty(0))
    floating = grade_of(program) == "float"

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name in nodes:
            result.trains[node.name] = value.to(torch.int8)
            if floating:
                result.arguments[node.name] = args
        if node.name in keep:
            result.values[node.name] = value

    with torch.no_grad():
        result.logits = interpret(program, ids, visit)
    return result
