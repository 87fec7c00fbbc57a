"""From a program's graph to the elements of a netlist: every node becomes exactly one element, or one op of a host island.

What a node is in hardware is in its ``OpSpec.element``, with three decisions that a chip team would want:

- A linear layer whose result only drives neurons is a projection, even if its input is analog (the LayerNorm in front of Q, K,
  V and the first FFN layer): the synapses stand on the chip, and the analog vector enters as a current that is held for all
  steps. A linear layer whose analog result goes on to the host (``lm_head``) is a host op: no neuron would ever see it. In the
  integer grade a layer behind spikes takes their counts, the decoded train: a projection too.
- A scale is an element if it acts on a train; a product of values is a host op.
- Host ops are grouped into islands (``netlist_islands``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import TYPE, where
from ntc.ops import aten, spec_of
from ntc.program import Program
from ntc.spike_type import CurrentType, RateType, SpikeType
from ntc_backends import netlist_integer
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_islands import in_order, islands_of
from ntc_backends.netlist_makers import Lowered, Makers

__all__ = ["lower", "refusal_of"]

_NTC = torch.ops.ntc

# The format describes these ops; another op with time steps needs a new minor version.
_ON_CHIP: dict[Any, Callable[[Makers, Node], schema.AnyElement]] = {
    _NTC.integrate_fire.default: Makers.population,
    _NTC.leaky_integrate_fire.default: Makers.population,
    _NTC.integer_fire.default: netlist_integer.population,
    aten.linear.default: Makers.projection,
    _NTC.integer_linear.default: netlist_integer.projection,
    _NTC.spiking_attention.default: Makers.dynamic_product,
    _NTC.integer_attention.default: netlist_integer.dynamic_product,
    _NTC.position_scale.default: Makers.scale,
    _NTC.rms_scale.default: Makers.scale,
    _NTC.row_sum_scale.default: Makers.scale,
    aten.mul.Tensor: Makers.scale,
    _NTC.requantize.default: netlist_integer.scale,
    _NTC.decode.default: Makers.decode,
}

REFUSED: Mapping[str, str] = {
    "streaming": "a netlist says itself how a sequence goes on: write it from the parallel program, without to-streaming",
    "neurons-annotated": "a netlist holds neurons, and there are firing rates in their places: run insert-neurons first",
    "coded": "the netlist format has no elements for neurons whose spikes have weights or sizes, only for those that integrate and fire",
}
"""Facts of programs that have no netlist, each with the reason."""


def refusal_of(facts: frozenset[str]) -> str:
    """Why no program of those facts has a netlist, or an empty string."""
    return next((reason for fact, reason in REFUSED.items() if fact in facts), "")


def lower(program: Program) -> Lowered:
    """The elements of a spiking program.

    Raises:
        BackendError: If it is not spiking yet, or holds an op with time steps that the format cannot express; names the node.
    """
    if program.state:
        raise BackendError(REFUSED["streaming"])
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in nodes:
        _check(node)
    makers = {node: _maker(node) for node in nodes}
    if not any(spec.element == "population" for n in nodes if makers[n] and (spec := spec_of(n))):
        raise BackendError("the program holds no neurons, and a netlist without neurons describes no spiking network: compile it first")
    make = Makers(program)
    islands = islands_of(nodes, {node for node in nodes if makers[node] is None})
    taken = {n.name for n in program.graph.nodes}
    prefix = "host" if not any(re.fullmatch(r"host_\d+", name) for name in taken) else "host_island"
    groups: list[tuple[str, list[Node]]] = [(node.name, [node]) for node in nodes if makers[node] is not None]
    groups += [(f"{prefix}_{number}", island) for number, island in enumerate(islands)]
    for name, members in in_order(groups):
        maker = makers[members[0]]
        make.add(make.host(name, members) if maker is None else maker(make, members[0]))
    return make.result


def _check(node: Node) -> None:
    if TYPE not in node.meta or "val" not in node.meta:
        raise BackendError(f"{where(node)} has no type or shape: verify the program before you export it")
    if isinstance(node.meta[TYPE], RateType):
        raise BackendError(f"a netlist holds neurons, and {where(node)} is a firing rate: run insert-neurons first")
    if not node.users:
        raise BackendError(f"nothing uses {where(node)}: refresh the program, which drops dead nodes")


def _maker(node: Node) -> Callable[[Makers, Node], schema.AnyElement] | None:
    """What makes an element of a node; None for an op of a host island."""
    spec = spec_of(node)
    element = spec.element if spec else "host"
    trains = [given for n in (node, *node.all_input_nodes) if isinstance(given := n.meta.get(TYPE), SpikeType | CurrentType)]
    if not trains and (element != "projection" or not (_feeds_neurons_only(node) or netlist_integer.takes_counts(node))):
        return None
    if element == "host" or node.target not in _ON_CHIP:
        raise BackendError(f"the netlist format has no element for {node.target} on {', '.join(map(str, trains))}: {where(node)}")
    return _ON_CHIP[node.target]


def _feeds_neurons_only(linear: Node) -> bool:
    """Whether the weights of an analog linear layer are constants and its result is nothing but the current of neurons."""
    constant = all(a.op == "get_attr" for a in linear.args[1:3] if isinstance(a, Node))
    specs = [(user, spec_of(user)) for user in linear.users]
    return constant and all(spec is not None and spec.element == "population" and user.args[0] is linear for user, spec in specs)
