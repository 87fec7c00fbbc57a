"""One netlist element for one node of a floating-point program, and what all elements are made of."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import NEURON, SCALE, TYPE, block_of, module_of, source_of, where
from ntc.ops import aten, timed
from ntc.ops.decode import decode_weights
from ntc.program import Program
from ntc.spike_type import CurrentType, Index, Integer, SpikeType
from ntc_backends import netlist_schema as schema
from ntc_backends.netlist_blob import dtype_name
from ntc_backends.netlist_elements import PLAIN

__all__ = ["Lowered", "Makers", "arguments_of", "place_of"]

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


class Makers:
    """Makes elements of nodes, and keeps the tensors that they refer to and the endpoints that they offer."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.result = Lowered()
        self.registers: dict[tuple[str, str], tuple[int, int]] | None = None  # of the integer grade, when the first one is asked for
        self.source = next(n for n in program.graph.nodes if n.op == "placeholder")
        symbols = zip(self.source.meta["val"].shape, ("B", "L"), strict=False)
        self.sizes = {str(symbol): letter for symbol, letter in symbols if not isinstance(symbol, int)}
        self.result.endpoints[self.source.name] = f"{self.source.name}:ids"

    def add(self, element: schema.AnyElement) -> None:
        """Enter an element; from now on others can read its outputs."""
        self.result.elements.append(element)
        for port in dict(element.outputs):
            node = port if isinstance(element, schema.HostIsland) else element.name
            self.result.endpoints[node] = f"{element.name}:{port}"

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

    def integer(self, node: Any) -> schema.Integer:
        """``number`` of a tensor of integers."""
        assert isinstance(node, Node)
        if node.op == "get_attr":
            value = self.program.tensor(node).detach()
            if value.numel() and bool((value == value.flatten()[0]).all()):
                return int(value.flatten()[0])
        return schema.TensorRef(tensor=self.tensor(node))

    def endpoint(self, node: Any) -> schema.Endpoint:
        """Where a value that an element reads comes from."""
        assert isinstance(node, Node)
        if node.op == "get_attr":
            raise BackendError(f"a constant cannot drive the chip: {where(node)}; run it through a host op")
        return self.result.endpoints[node.name]

    def port(self, node: Node) -> schema.Port:
        """What the value of a node is."""
        value, given = node.meta["val"], node.meta[TYPE]
        if isinstance(value, torch.SymInt | int):
            return schema.Port(kind="index", dtype="int64", shape=[])
        if not isinstance(value, Tensor):
            raise BackendError(f"a result that is a {type(value).__name__} cannot cross from one element to another: {where(node)}")
        if isinstance(given, SpikeType | CurrentType):
            kind: Any = "spikes" if isinstance(given, SpikeType) else "current"
        else:
            kind = "index" if isinstance(given, Index) else "integer" if isinstance(given, Integer) else "analog"
        levels = given.levels if isinstance(given, SpikeType) else None
        shape = [self._size(s) for s in value.shape]
        return schema.Port(kind=kind, dtype=dtype_name(value.dtype), shape=shape, levels=levels, scale=self._scale_of(node))

    def _scale_of(self, node: Node) -> schema.Number | None:
        """What an integer stands for, if the program says so."""
        given = node.meta.get(SCALE)
        if given is None or isinstance(given, float):
            return given
        value = torch.tensor(given, dtype=torch.float64)
        if bool((value == value.flatten()[0]).all()):
            return float(value.flatten()[0])
        name = f"{node.name}.scale"
        self.result.tensors[name] = value
        return schema.TensorRef(tensor=name)

    def _size(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        return re.sub(r"[A-Za-z_]\w*", lambda found: self.sizes.get(found[0], found[0]), str(size))

    # One method per kind of element.

    def population(self, node: Node) -> schema.Population:
        """IF or LIF neurons."""
        leaky = node.target is torch.ops.ntc.leaky_integrate_fire.default
        given = arguments_of(node)
        current, spec = given["current"], node.meta.get(NEURON)
        return schema.Population(
            **place_of(node), model="lif" if leaky else "if", role=spec.role if spec else "",
            size=int(node.meta["val"].shape[-1]), steps=given["steps"], threshold=self.number(given["threshold"]),
            v0=self.number(given["v0"]), tau=self.number(given["tau"]) if leaky else None,
            signed=False if leaky else given["signed"], reset="hard" if leaky and given["hard_reset"] else "soft",
            input="timed" if given["timed"] else "constant",
            inputs=schema.PopulationInput(current=self.endpoint(current)), outputs=schema.SpikesOutput(spikes=self.port(node)),
        )  # fmt: skip

    def projection(self, node: Node) -> schema.Projection:
        """A linear layer on spikes, or in front of neurons."""
        given = arguments_of(node)
        pre, weight = given["input"], given["weight"]
        post_size, pre_size = (int(s) for s in weight.meta["val"].shape)
        return schema.Projection(
            **place_of(node), kind="dense", synapse="spikes" if timed(pre.meta[TYPE]) else "analog", shape=[post_size, pre_size],
            synapses=post_size * pre_size, weight=self.tensor(weight), bias=self.tensor(given["bias"]) if given["bias"] else None,
            inputs=schema.ProjectionInput(pre=self.endpoint(pre)), outputs=schema.CurrentOutput(current=self.port(node)),
        )  # fmt: skip

    def dynamic_product(self, node: Node) -> schema.DynamicProduct:
        """Spiking attention."""
        given = arguments_of(node)
        heads, kv_heads, kind = given["heads"], given["kv_heads"], node.meta[TYPE]
        size = int(given["query"].meta["val"].shape[-1]) // heads
        value_size = int(given["value"].meta["val"].shape[-1]) // kv_heads
        context, leak = self.program.info.context, given["leak"]
        number = None if leak is None else self.number(leak)
        # Of M after n tokens: at most 1 + lambda + ... + lambda**(n - 1), for the largest lambda.
        keep = 1.0 if leak is None else float(self.program.tensor(leak).detach().max())
        bound = float(context) if keep >= 1.0 else (1.0 - (keep**context if context else 0.0)) / (1.0 - keep)
        return schema.DynamicProduct(
            **place_of(node), rule=PLAIN if leak is None else "M = leak M + outer(K, V); Y = Q M",
            leak=number, heads=heads, kv_heads=kv_heads, head_size=size, value_size=value_size,
            steps=kind.steps, state_shape=[kind.steps, kv_heads, size, value_size],
            max_state=math.ceil(bound) or None, max_count=math.ceil(bound * size) or None,
            inputs=schema.ProductInputs(**{name: self.endpoint(given[name]) for name in ("query", "key", "value")}),
            outputs=schema.ProductOutput(counts=self.port(node)),
        )  # fmt: skip

    def scale(self, node: Node) -> schema.Scale:
        """A gain on a train."""
        if node.target is aten.mul.Tensor:
            train = next(a for a in node.args if isinstance(a, Node) and timed(a.meta[TYPE]))
            factor = self.number(next(a for a in node.args if a is not train))
            return self._scale(node, "constant", train, factor=factor)
        given = arguments_of(node)
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
        return schema.Scale(**place_of(node), kind=kind, inputs=inputs, outputs=schema.TrainOutput(train=self.port(node)), **fields)

    def decode(self, node: Node) -> schema.Decode:
        """From a train to a value."""
        given = arguments_of(node)
        train, code = given["train"], given["code"]
        weights: list[int | float] = [*decode_weights(code, train.meta[TYPE].steps)]
        if not train.meta["val"].is_floating_point():
            weights = [1] * len(weights)
        return schema.Decode(
            **place_of(node), code=code, step_weights=weights,
            inputs=schema.TrainInput(train=self.endpoint(train)), outputs=schema.ValueOutput(value=self.port(node)),
        )  # fmt: skip

    def host(self, name: str, members: list[Node]) -> schema.HostIsland:
        """An island of host ops."""
        inside = set(members)
        inputs = {a.name: self.endpoint(a) for n in members for a in n.all_input_nodes if a.op != "get_attr" and a not in inside}
        outputs = {n.name: self.port(n) for n in members if any(user not in inside for user in n.users)}
        blocks = list(dict.fromkeys(block_of(n) for n in members))
        ops = [
            schema.HostOp(
                name=node.name, op=_op(node), module=module_of(node), source=source_of(node),
                arguments={k: self._argument(v) for k, v in arguments_of(node).items()},
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


def place_of(node: Node) -> dict[str, Any]:
    """Name of an element, and where it comes from."""
    return {"name": node.name, "module": module_of(node), "block": block_of(node), "source": source_of(node)}


def _op(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return f"operator.{getattr(node.target, '__name__', node.target)}"


def arguments_of(node: Node) -> dict[str, Any]:
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
