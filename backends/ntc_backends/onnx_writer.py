"""The ONNX writer: walks a program once and collects nodes, functions and weights; how each ATen op is written is in ``onnx_aten``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx.parser
import torch
from onnx import helper
from torch import Tensor
from torch.fx import Node

from ntc.errors import BackendError
from ntc.meta import MADE_BY, STATE, TYPE, module_of, where
from ntc.ops import spec_of
from ntc.program import Program

__all__ = [
    "DATA", "EXTERNAL_BYTES", "HANDLERS", "IR_VERSION", "MODEL", "OPSET", "Value", "Writer", "bound", "functions_in", "handles",
    "onnx_type", "save",
]  # fmt: skip

OPSET = 20
"""Oldest opset with everything used (Gelu); the function bodies name it too."""

IR_VERSION = 10
"""Oldest IR with overloads of functions and metadata of nodes."""

EXTERNAL_BYTES = 1 << 30
"""Weights beyond this go to ``model.onnx.data``. Protobuf ends at 2 GiB, and holds what is inside of it twice while it writes."""

MODEL, DATA = "model.onnx", "model.onnx.data"
_SIZES = {"B": "batch", "L": "sequence", "P": "past", "L + P": "past + sequence"}
_ALIGN = 4096  # a page: readers map the file
_INLINE = 1024  # bytes; smaller tensors stay in the model, where shape inference sees them

Value: TypeAlias = str | list[str]
Handler: TypeAlias = Callable[["Writer", Node], Value]
HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Decorator: the function writes nodes with those targets."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return enter


class Writer:
    """Walks a program once and collects ONNX nodes, weights and functions."""

    def __init__(self, program: Program, fallback: Handler) -> None:
        self.program = program
        self.fallback = fallback  # writes the nodes that have no handler
        self.weights: dict[str, Tensor] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
        self.values: dict[Node, Value] = {}
        self.infos: list[onnx.ValueInfoProto] = []
        self.states = [n for n in program.graph.find_nodes(op="placeholder") if STATE in n.meta]
        self.taken: set[str] = {"input_ids", "logits", *(n.name for n in self.states), *(f"{n.name}_next" for n in self.states)}
        self.shared: dict[Any, str] = {}  # constants and transposed weights that several nodes use
        self.at: Node | None = None
        self.results: list[onnx.ValueInfoProto] = []

    def run(self) -> None:
        """Translate every node."""
        graph = self.program.graph
        stored: dict[Any, str] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                value = self.program.tensor(node).detach()
                key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride()) if value.numel() else str(node.target)
                self.values[node] = name = stored.setdefault(key, str(node.target))
                self.weights[name] = value
                self.taken.add(name)
        for node in graph.nodes:
            self.at = node
            if node in self.states:
                self.values[node] = node.name
            elif node.op == "placeholder":
                cast = node.meta["val"].dtype != torch.int64
                self.values[node] = self.call("Cast", ["input_ids"], to=onnx_type(node.meta["val"].dtype)) if cast else "input_ids"
            elif node.op == "call_function":
                self.values[node] = self.translate(node)
                self.describe(node)
        for name, last in zip(["logits", *(f"{n.name}_next" for n in self.states)], self.program.results, strict=True):
            self.at = last
            self.call("Identity", [self.name_of(last)], part=name, output=name)
            info = self.info(name, last)
            if info is None:
                raise BackendError(f"the result {name} has no static shape: {where(last)}")
            self.results.append(info)

    def translate(self, node: Node) -> Value:
        """ONNX nodes for one node; returns the names of its values."""
        spec = spec_of(node)
        if node.target in HANDLERS:
            return HANDLERS[node.target](self, node)
        if spec is not None and spec.onnx is not None:
            return self.call_function(node, spec.onnx)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ntc":
            raise BackendError(f"{node.target} has no ONNX function: {where(node)}")
        return self.fallback(self, node)

    # -- nodes

    def fresh(self, wanted: str) -> str:
        """A value name that is not taken."""
        name, number = wanted, 1
        while name in self.taken:
            name, number = f"{wanted}.{number}", number + 1
        self.taken.add(name)
        return name

    def call(self, op: str, inputs: Sequence[str], part: str = "", *, domain: str = "", overload: str = "",
             output: str = "", **attributes: Any) -> str:  # fmt: skip
        """Add a node for the current graph node and return its value; without ``part`` it is *the* node of that name."""
        return self.call_many(op, inputs, 1, part, domain=domain, overload=overload, output=output, **attributes)[0]

    def call_many(self, op: str, inputs: Sequence[str], outputs: int, part: str = "", *, domain: str = "", overload: str = "",
                  output: str = "", **attributes: Any) -> list[str]:  # fmt: skip
        """Like ``call`` for a node with several results."""
        assert self.at is not None
        wanted = f"{self.at.name}.{part}" if part else self.at.name
        names = [output or self.fresh(wanted if outputs == 1 else f"{wanted}.{i}") for i in range(outputs)]
        proto = helper.make_node(op, list(inputs), names, name=wanted if output else names[0], domain=domain, **attributes)
        proto.overload = overload
        kind = self.at.meta.get(TYPE)
        facts = {"module": module_of(self.at), "made_by": ", ".join(self.at.meta.get(MADE_BY, ())), "type": str(kind or "")}
        helper.set_model_props(proto, {f"ntc.{k}": v for k, v in facts.items() if v})
        self.nodes.append(proto)
        return names

    def name_of(self, node: Node) -> str:
        """The value of a node that has one."""
        value = self.values[node]
        if not isinstance(value, str):
            raise BackendError(f"a list of tensors is used as one: {where(node)}")
        return value

    def constant(self, value: Any, dtype: torch.dtype) -> str:
        """A constant, made once: a number or a list of numbers."""
        key = (repr(value), dtype)
        if key not in self.shared:
            proto = helper.make_node("Constant", [], [name := self.fresh(f"constant_{len(self.shared)}")], name=name)
            proto.attribute.append(helper.make_attribute("value", _tensor_proto("", torch.tensor(value, dtype=dtype), inline=True)))
            self.nodes.append(proto)
            self.shared[key] = name
        return self.shared[key]

    def operand(self, value: Any, dtype: torch.dtype, part: str) -> str:
        """A node or number as a value of that dtype."""
        if not isinstance(value, Node):
            return self.constant(value, dtype)
        name, given = self.name_of(value), value.meta["val"]
        found = given.dtype if isinstance(given, Tensor) else torch.int64
        return name if found == dtype else self.call("Cast", [name], f"{part}.cast", to=onnx_type(dtype))

    def sizes(self, values: Iterable[Any], part: str = "sizes") -> str:
        """Sizes, some of them computed, as one int64 vector."""
        given = list(values)
        if not any(isinstance(v, Node) for v in given):
            return self.constant([int(v) for v in given], torch.int64)
        one = self.constant([1], torch.int64)
        pieces = [
            self.call("Reshape", [self.name_of(v), one], f"{part}.{i}") if isinstance(v, Node) else self.constant([int(v)], torch.int64)
            for i, v in enumerate(given)
        ]
        return self.call("Concat", pieces, part, axis=0)

    def call_function(self, node: Node, text: str) -> Value:
        """A call of a function of ours: tensors are inputs, the rest attributes.

        True booleans, words and the names of optional tensors that are given choose the variant.
        """
        arguments = bound(node)
        variants = functions_in(text)
        vocabulary = {word for f in variants for word in f.overload.split(".") if word}
        words = {v for v in arguments.values() if isinstance(v, str)}
        words |= {k for k, v in arguments.items() if v is True or isinstance(v, Node)}
        chosen = [f for f in variants if set(filter(None, f.overload.split("."))) == words & vocabulary]
        if len(chosen) != 1:
            raise BackendError(f"no ONNX function of {node.target} is for {sorted(words & vocabulary)}: {where(node)}")
        function = chosen[0]
        self.functions.setdefault((function.domain, function.name, function.overload), function)
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Node)}
        if list(tensors) != list(function.input):
            raise BackendError(f"{function.name} takes {list(function.input)}, not {list(tensors)}: {where(node)}")
        # How a neuron compares and resets is no argument of the kernel, but a mapping tool must not have to guess it.
        known = {"comparison": ">=", "reset": "hard" if arguments.get("hard_reset") else "soft", **arguments}
        attributes: dict[str, Any] = {k: int(known[k]) if isinstance(known[k], bool) else known[k] for k in function.attribute}
        results = self.call_many(function.name, [self.name_of(v) for v in tensors.values()], len(function.output),
                                 domain=function.domain, overload=function.overload, **attributes)  # fmt: skip
        return results[0] if len(results) == 1 else results

    # -- the whole

    def info(self, name: str, node: Node) -> onnx.ValueInfoProto | None:
        """Type and shape of a tensor value, dynamic sizes by name; None if it has sizes that are no symbol."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape: list[int | str] = []
        for size in value.shape:
            text = self.program.size(size)
            if text in _SIZES:
                shape.append(_SIZES[text])
            elif text.isdigit():
                shape.append(int(text))
            else:
                return None
        return helper.make_tensor_value_info(name, onnx_type(value.dtype), shape)

    def describe(self, node: Node) -> None:
        """Note the shape of a node's value."""
        value = self.values[node]
        if isinstance(value, str) and value != "input_ids" and value not in self.weights and (info := self.info(value, node)):
            self.infos.append(info)

    def model(self) -> onnx.ModelProto:
        """The model; its initializers are filled in by ``save``."""
        assert self.results
        ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])
        states = [self.info(n.name, n) for n in self.states]
        infos = {i.name: i for i in self.infos}
        graph = helper.make_graph(self.nodes, "ntc", [ids, *states], self.results, value_info=list(infos.values()))
        domains = dict.fromkeys(f.domain for f in self.functions.values())
        model = helper.make_model(
            graph, producer_name="ntc", producer_version=_version(), ir_version=IR_VERSION, functions=list(self.functions.values()),
            opset_imports=[helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in domains)],
        )  # fmt: skip
        resets = {a.s.decode() for n in self.nodes for a in n.attribute if a.name == "reset"}
        info = self.program.info
        helper.set_model_props(model, {
            "ntc.version": _version(), "ntc.source": _public(info.source), "ntc.architecture": info.architecture,
            "ntc.steps": str(self.program.steps), "ntc.dt": "1 step", "ntc.comparison": ">=",
            "ntc.reset": ", ".join(sorted(resets)) or "soft", "ntc.facts": ", ".join(sorted(self.program.facts)),
            **({"ntc.state": json.dumps([part.to_json() for part in self.program.state])} if self.states else {}),
        })  # fmt: skip
        return model


def _version() -> str:
    try:
        return version("ntc-compiler")
    except PackageNotFoundError:  # run from a source tree
        return "0"


def _public(source: str) -> str:
    """The name of a model without the folders that it lies in; a hub id as it is."""
    if source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1:
        return re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return source


@cache
def functions_in(text: str) -> tuple[onnx.FunctionProto, ...]:
    """The variants in the text of ``OpSpec.onnx``; each begins with ``<domain``."""
    return tuple(onnx.parser.parse_function(part) for part in re.split(r"(?=<\s*domain)", text) if part.strip())


def bound(node: Node) -> dict[str, Any]:
    """Arguments of an ATen or ntc op by name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema.arguments}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return bound | dict(node.kwargs)


_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT, torch.float64: onnx.TensorProto.DOUBLE, torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16, torch.int64: onnx.TensorProto.INT64, torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16, torch.int8: onnx.TensorProto.INT8, torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}  # fmt: skip


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype; refuses one that ONNX does not have."""
    if dtype not in _TYPES:
        raise BackendError(f"ONNX has no {dtype}")
    return int(_TYPES[dtype])


def _bytes(value: Tensor) -> memoryview:
    """The elements of a tensor, not copied if it is contiguous and on the CPU."""
    array: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _tensor_proto(name: str, value: Tensor, *, inline: bool) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=onnx_type(value.dtype), dims=list(value.shape))
    if inline:
        proto.raw_data = bytes(_bytes(value)) if value.numel() else b""
    return proto


def save(model: onnx.ModelProto, weights: dict[str, Tensor], folder: Path, limit: int, name: str = MODEL) -> bool:
    """Fill in the initializers and write the model; returns whether they went to a file of their own, ``NAME.data``.

    Large weights go straight from the program's memory to the file, one by one.
    """
    data_name = f"{name}.data"
    external = sum(t.numel() * t.element_size() for t in weights.values()) > limit
    if not external:
        model.graph.initializer.extend(_tensor_proto(n, t, inline=True) for n, t in weights.items())
    else:
        with (folder / data_name).open("wb") as data:
            for key, value in weights.items():
                size = value.numel() * value.element_size()
                proto = _tensor_proto(key, value, inline=size < min(_INLINE, limit))
                if not proto.HasField("raw_data"):
                    data.write(b"\0" * (-data.tell() % _ALIGN))
                    proto.data_location = onnx.TensorProto.EXTERNAL
                    for field, text in (("location", data_name), ("offset", str(data.tell())), ("length", str(size))):
                        proto.external_data.add(key=field, value=text)
                    data.write(_bytes(value))
                model.graph.initializer.append(proto)
    (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    return external
