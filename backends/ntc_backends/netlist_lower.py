"""From a program's graph to the elements of a netlist: every node becomes exactly one element, or one op of a host island.

What a node is in hardware is in its ``OpSpec.element``, with three decisions that a chip team would want:

- A linear layer whose result only drives neurons is a projection, even if its input is analog (the LayerNorm in front of Q, K,
  V and the first FFN layer): the synapses stand on the chip, and the analog vector enters as a current that is held for all
  steps. A linear layer whose analog result goes on to the host (``lm_head``) is a host op: no neuron would ever see it.
- A scale is an element if it acts on a train; a product of analog values is a host op.
- Host ops are grouped into islands by level: how many times the signal has left the host on its longest way there. Connected
  host ops of one level are an island. No way leads from an island over the chip back into it, so the elements form a directed
  acyclic graph, although the residual stream connects all analog ops of the network with each other.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import NEURON, TYPE, block_of, module_of, source_of, where
from ntc.ops import aten, spec_of, timed
from ntc.ops.decode import decode_weights
from ntc.program import Program
from ntc.spike_type import CurrentType, Index, RateType, SpikeType
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_blob import dtype_name

__all__ = ["Lowered", "lower"]

# Where a tensor lies and how fast it is made says nothing about the network.
_EXECUTION_ONLY = frozenset({"device", "pin_memory", "layout", "memory_format", "cudnn_enable", "requires_grad", "non_blocking", "copy"})


@dataclass
class Lowered:
    """The elements of a program.

    Attributes:
        elements: In an order in which they can run.
        endpoints: Where each value of the graph that crosses an element's border is found, by node name.
        tensors: Constants that the elements refer to, by name.
    """

    elements: list[schema.AnyElement] = field(default_factory=list)
    endpoints: dict[str, schema.Endpoint] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def lower(program: Program) -> Lowered:
    """The elements of a spiking program.

    Raises:
        BackendError: If it is not spiking yet, or holds an op with time steps that the format cannot express; names the node.
    """
    return _Lowering(program).run()


class _Lowering:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.result = Lowered()
        self.source = next(n for n in program.graph.nodes if n.op == "placeholder")
        self.nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        symbols = zip(self.source.meta["val"].shape, ("B", "L"), strict=False)
        self.sizes = {str(symbol): letter for symbol, letter in symbols if not isinstance(symbol, int)}

    def run(self) -> Lowered:
        for node in self.nodes:
            _check(node)
        kinds = {node: _kind(node) for node in self.nodes}
        if "population" not in kinds.values():
            raise BackendError("the program holds no neurons, and a netlist without neurons describes no spiking network: compile it first")
        islands = _islands(self.nodes, kinds)
        taken = {n.name for n in self.program.graph.nodes}
        prefix = "host" if not any(re.fullmatch(r"host_\d+", name) for name in taken) else "host_island"
        groups: list[tuple[str, list[Node]]] = [(node.name, [node]) for node in self.nodes if kinds[node] != "host"]
        groups += [(f"{prefix}_{number}", island) for number, island in enumerate(islands)]
        self.result.endpoints[self.source.name] = f"{self.source.name}:ids"
        for name, members in _ordered(groups):
            kind = kinds[members[0]]
            element = self._host(name, members) if kind == "host" else _MAKERS[kind](self, members[0])
            self.result.elements.append(element)
            for port in dict(element.outputs):
                node_name = port if kind == "host" else name
                self.result.endpoints[node_name] = f"{name}:{port}"
        return self.result

    # What elements are made of.

    def tensor(self, node: Any) -> str:
        """Name of a constant, which from now on is part of the netlist."""
        assert isinstance(node, Node)
        if node.op != "get_attr":
            raise BackendError(f"a weight or factor has to be a constant, and {where(node)} computes it")
        self.result.tensors[str(node.target)] = self.program.tensor(node)
        return str(node.target)

    def number(self, node: Any) -> schema.Number:
        """A constant as one number if all its elements are equal, else as a reference."""
        if not isinstance(node, Node):
            return float(node)
        if node.op == "get_attr":
            value = self.program.tensor(node).detach()
            if value.numel() and value.is_floating_point() and bool((value == value.flatten()[0]).all()):
                return float(value.flatten()[0])
        return schema.TensorRef(tensor=self.tensor(node))

    def endpoint(self, node: Any) -> schema.Endpoint:
        assert isinstance(node, Node)
        if node.op == "get_attr":
            raise BackendError(f"a constant cannot drive the chip: {where(node)}; run it through a host op")
        return self.result.endpoints[node.name]

    def port(self, node: Node) -> schema.Port:
        value, given = node.meta["val"], node.meta[TYPE]
        if isinstance(value, torch.SymInt | int):
            return schema.Port(kind="index", dtype="int64", shape=[])
        if not isinstance(value, Tensor):
            raise BackendError(f"a result that is a {type(value).__name__} cannot cross from one element to another: {where(node)}")
        if isinstance(given, SpikeType | CurrentType):
            kind: Any = "spikes" if isinstance(given, SpikeType) else "current"
        else:
            kind = "index" if isinstance(given, Index) else "analog"
        levels = given.levels if isinstance(given, SpikeType) else None
        return schema.Port(kind=kind, dtype=dtype_name(value.dtype), shape=[self._size(s) for s in value.shape], levels=levels)

    def _size(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        return re.sub(r"[A-Za-z_]\w*", lambda found: self.sizes.get(found[0], found[0]), str(size))

    # One method per kind of element.

    def population(self, node: Node) -> schema.Population:
        leaky = node.target is torch.ops.ntc.leaky_integrate_fire.default
        given = _arguments(node)
        current, spec = given["current"], node.meta.get(NEURON)
        return schema.Population(
            **_place(node), model="lif" if leaky else "if", role=spec.role if spec else "",
            size=int(node.meta["val"].shape[-1]), steps=given["steps"], threshold=self.number(given["threshold"]),
            v0=self.number(given["v0"]), tau=self.number(given["tau"]) if leaky else None,
            signed=False if leaky else given["signed"], reset="hard" if leaky and given["hard_reset"] else "soft",
            input="timed" if given["timed"] else "constant",
            inputs=schema.PopulationInput(current=self.endpoint(current)), outputs=schema.SpikesOutput(spikes=self.port(node)),
        )  # fmt: skip

    def projection(self, node: Node) -> schema.Projection:
        given = _arguments(node)
        pre, weight = given["input"], given["weight"]
        post_size, pre_size = (int(s) for s in weight.meta["val"].shape)
        return schema.Projection(
            **_place(node), kind="dense", synapse="spikes" if timed(pre.meta[TYPE]) else "analog", shape=[post_size, pre_size],
            synapses=post_size * pre_size, weight=self.tensor(weight), bias=self.tensor(given["bias"]) if given["bias"] else None,
            inputs=schema.ProjectionInput(pre=self.endpoint(pre)), outputs=schema.CurrentOutput(current=self.port(node)),
        )  # fmt: skip

    def dynamic_product(self, node: Node) -> schema.DynamicProduct:
        given = _arguments(node)
        heads, kv_heads, kind = given["heads"], given["kv_heads"], node.meta[TYPE]
        size = int(given["query"].meta["val"].shape[-1]) // heads
        value_size = int(given["value"].meta["val"].shape[-1]) // kv_heads
        context, leak = self.program.info.context, given["leak"]
        number = None if leak is None else self.number(leak)
        # Of M after n tokens: at most 1 + lambda + ... + lambda**(n - 1), for the largest lambda.
        keep = 1.0 if leak is None else float(self.program.tensor(leak).detach().max())
        bound = float(context) if keep >= 1.0 else (1.0 - (keep**context if context else 0.0)) / (1.0 - keep)
        return schema.DynamicProduct(
            **_place(node), rule="M += outer(K, V); Y = Q M" if leak is None else "M = leak M + outer(K, V); Y = Q M",
            leak=number, heads=heads, kv_heads=kv_heads, head_size=size, value_size=value_size,
            steps=kind.steps, state_shape=[kind.steps, kv_heads, size, value_size],
            max_state=math.ceil(bound) or None, max_count=math.ceil(bound * size) or None,
            inputs=schema.ProductInputs(**{name: self.endpoint(given[name]) for name in ("query", "key", "value")}),
            outputs=schema.ProductOutput(counts=self.port(node)),
        )  # fmt: skip

    def scale(self, node: Node) -> schema.Scale:
        if node.target is aten.mul.Tensor:
            train = next(a for a in node.args if isinstance(a, Node) and timed(a.meta[TYPE]))
            factor = self.number(next(a for a in node.args if a is not train))
            return self._scale(node, "constant", train, factor=factor)
        given = _arguments(node)
        if node.target is torch.ops.ntc.rms_scale.default:
            return self._scale(node, "rms", given["current"], heads=given["heads"], eps=given["eps"])
        if node.target is torch.ops.ntc.row_sum_scale.default:
            inputs = schema.RowSumInputs(
                train=self.endpoint(given["current"]), query=self.endpoint(given["query"]), key=self.endpoint(given["key"])
            )
            return self._scale(node, "row-sum", inputs, heads=given["heads"], kv_heads=given["kv_heads"])
        if given["table"] is None:
            return self._scale(node, "position", given["current"])
        table = schema.TensorRef(tensor=self.tensor(given["table"]))
        return self._scale(node, "table", given["current"], factor=table, heads=int(given["table"].meta["val"].shape[0]))

    def _scale(self, node: Node, kind: Any, read: Node | schema.RowSumInputs, **values: Any) -> schema.Scale:
        inputs = schema.TrainInput(train=self.endpoint(read)) if isinstance(read, Node) else read
        fields = {"factor": None, **values}
        return schema.Scale(**_place(node), kind=kind, inputs=inputs, outputs=schema.TrainOutput(train=self.port(node)), **fields)

    def decode(self, node: Node) -> schema.Decode:
        given = _arguments(node)
        train, code = given["train"], given["code"]
        return schema.Decode(
            **_place(node), code=code, step_weights=decode_weights(code, train.meta[TYPE].steps),
            inputs=schema.TrainInput(train=self.endpoint(train)), outputs=schema.ValueOutput(value=self.port(node)),
        )  # fmt: skip

    def _host(self, name: str, members: list[Node]) -> schema.HostIsland:
        inside = set(members)
        inputs = {a.name: self.endpoint(a) for n in members for a in n.all_input_nodes if a.op != "get_attr" and a not in inside}
        outputs = {n.name: self.port(n) for n in members if any(user not in inside for user in n.users)}
        blocks = list(dict.fromkeys(block_of(n) for n in members))
        ops = [
            schema.HostOp(
                name=node.name, op=_op(node), module=module_of(node), source=source_of(node),
                arguments={k: self._argument(v) for k, v in _arguments(node).items()},
            )
            for node in members
        ]  # fmt: skip
        return schema.HostIsland(name=name, block=blocks[0] if len(blocks) == 1 else "", ops=ops, inputs=inputs, outputs=outputs)

    def _argument(self, value: Any) -> schema.Argument:
        if isinstance(value, Node):
            return schema.TensorRef(tensor=self.tensor(value)) if value.op == "get_attr" else schema.ValueRef(value=value.name)
        if isinstance(value, list | tuple):
            return [self._argument(v) for v in value]
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        if isinstance(value, float) and not math.isfinite(value):
            return schema.NonFinite(float="nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise BackendError(f"an argument of type {type(value).__name__} cannot be written to a netlist: {value!r}")


_MAKERS: dict[str, Callable[[_Lowering, Node], schema.AnyElement]] = {
    "population": _Lowering.population, "projection": _Lowering.projection, "dynamic_product": _Lowering.dynamic_product,
    "scale": _Lowering.scale, "decode": _Lowering.decode,
}  # fmt: skip

# The format describes these ops; another op with time steps needs a new minor version.
_ON_CHIP = {
    "population": {torch.ops.ntc.integrate_fire.default, torch.ops.ntc.leaky_integrate_fire.default},
    "projection": {aten.linear.default},
    "dynamic_product": {torch.ops.ntc.spiking_attention.default},
    "scale": {
        torch.ops.ntc.position_scale.default, torch.ops.ntc.rms_scale.default, torch.ops.ntc.row_sum_scale.default, aten.mul.Tensor,
    },
    "decode": {torch.ops.ntc.decode.default},
}


def _check(node: Node) -> None:
    if TYPE not in node.meta or "val" not in node.meta:
        raise BackendError(f"{where(node)} has no type or shape: verify the program before you export it")
    if isinstance(node.meta[TYPE], RateType):
        raise BackendError(f"a netlist holds neurons, and {where(node)} is a firing rate: run insert-neurons first")
    if not node.users:
        raise BackendError(f"nothing uses {where(node)}: refresh the program, which drops dead nodes")


def _kind(node: Node) -> str:
    """Which table a node goes to."""
    spec = spec_of(node)
    element = spec.element if spec else "host"
    trains = [given for n in (node, *node.all_input_nodes) if isinstance(given := n.meta.get(TYPE), SpikeType | CurrentType)]
    if not trains and (element != "projection" or not _feeds_neurons_only(node)):
        return "host"
    if node.target not in _ON_CHIP.get(element, ()):
        raise BackendError(f"the netlist format has no element for {node.target} on {', '.join(map(str, trains))}: {where(node)}")
    return element


def _feeds_neurons_only(linear: Node) -> bool:
    """Whether the weights of an analog linear layer are constants and its result is nothing but the current of neurons."""
    constant = all(a.op == "get_attr" for a in linear.args[1:3] if isinstance(a, Node))
    specs = [(user, spec_of(user)) for user in linear.users]
    return constant and all(spec is not None and spec.element == "population" and user.args[0] is linear for user, spec in specs)


def _islands(nodes: list[Node], kinds: dict[Node, str]) -> list[list[Node]]:
    """Host nodes by level and connection, see the module's docstring."""
    level: dict[Node, int] = {}
    for node in nodes:
        from_inputs = (level[a] + (kinds[node] == "host" and kinds[a] != "host") for a in node.all_input_nodes if a in level)
        level[node] = max(from_inputs, default=0)
    fed: set[Node] = set()  # what depends on the token ids; anything else (a mask, a table of angles) moves to its first user
    for node in nodes:
        if any(a.op == "placeholder" or a in fed for a in node.all_input_nodes):
            fed.add(node)
    for node in reversed(nodes):
        if node not in fed:
            level[node] = min((level[u] for u in node.users if u in level), default=0)
    graph: nx.Graph[Node] = nx.Graph()
    hosts = [n for n in nodes if kinds[n] == "host"]
    graph.add_nodes_from(hosts)
    graph.add_edges_from((a, n) for n in hosts for a in n.all_input_nodes if kinds.get(a) == "host" and level[a] == level[n])
    position = {node: i for i, node in enumerate(nodes)}
    islands = [sorted(part, key=position.__getitem__) for part in nx.connected_components(graph)]
    return sorted(islands, key=lambda island: (level[island[0]], position[island[0]]))


def _ordered(groups: list[tuple[str, list[Node]]]) -> Iterable[tuple[str, list[Node]]]:
    """Groups in topological order; of those that could run next, the one whose first node comes first in the graph."""
    owner = {node: name for name, members in groups for node in members}
    place = {node: i for i, node in enumerate(next(iter(owner)).graph.nodes)}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(name for name, _ in groups)
    graph.add_edges_from((owner[a], owner[n]) for n in owner for a in n.all_input_nodes if a in owner and owner[a] != owner[n])
    members = dict(groups)
    for name in nx.lexicographical_topological_sort(graph, key=lambda name: place[members[name][0]]):
        yield name, members[name]


def _place(node: Node) -> dict[str, Any]:
    return {"name": node.name, "module": module_of(node), "block": block_of(node), "source": source_of(node)}


def _op(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return f"operator.{getattr(node.target, '__name__', node.target)}"


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments of a node by name, in the order of the signature and with defaults."""
    if isinstance(node.target, torch._ops.OpOverload):
        declared = node.target._schema.arguments
        named = {a.name: a.default_value for a in declared if a.has_default_value()}
        named |= dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
        return {a.name: named[a.name] for a in declared if a.name not in _EXECUTION_ONLY}
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
