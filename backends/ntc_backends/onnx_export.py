"""A program as one ONNX model that stock ONNX Runtime runs, neurons still visible as neurons.

Layout of the file:

- ATen nodes become nodes of the standard opset; every op of ours becomes one call of a *local function* (``ntc::IntegrateFire``,
  ``ntc::SpikingAttention`` ...) whose body, in standard ops, is in the file. ONNX Runtime inlines it, so no custom library is
  needed; a mapping tool reads the call: its name, overload (the variant: ``signed.timed``) and attributes (T, v0, ``>=``, reset).
  The bodies stand with the ops (``OpSpec.onnx``).
- An ATen op that this writer does not know is exported alone by ``torch.onnx`` and becomes a local function in domain ``aten``.
- ``input_ids [batch, sequence]`` int64 in, ``logits [batch, sequence, V]`` out. Initializers are named as the program's tensors,
  tied ones stored once; nodes as the program's nodes (parts of a node as ``node.part``), with module, passes and type in
  ``metadata_props``.
- The same program gives the same bytes. No path of this computer and no stack trace gets in.

Agreement: each op of ours gives the same bits as its kernel (``decode`` and ``attention`` of real values: to rounding). The linear
layers and norms between them are added up in another order than torch does it, and a neuron makes a whole spike of one rounding
error when its membrane lies at the threshold. What is promised of a float program, and what is measured: see ``Tolerance``.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx.checker
import onnx.parser
import onnx.shape_inference
import torch
from onnx import helper, inliner
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ntc.errors import BackendError, where
from ntc.meta import MADE_BY, TYPE, module_of
from ntc.ops import aten, spec_of
from ntc.program import Program, interpret
from ntc.spike_type import SpikeType

__all__ = ["EXTERNAL_BYTES", "OPSET", "OnnxBackend", "Tolerance", "build", "check", "compare"]

logger = logging.getLogger(__name__)

OPSET = 20
"""Oldest opset with everything used (Gelu); the function bodies name it too."""

IR_VERSION = 10
"""Oldest IR with overloads of functions and metadata of nodes."""

EXTERNAL_BYTES = 1 << 30
"""Weights beyond this go to ``model.onnx.data``. Protobuf ends at 2 GiB, and holds what is inside of it twice while it writes."""

_MODEL, _DATA = "model.onnx", "model.onnx.data"
_ALIGN = 4096  # a page: readers map the file
_INLINE = 1024  # bytes; smaller tensors stay in the model, where shape inference sees them


_HELD = 1 << 26
"""Spikes that the held comparison takes at once; 256 MB in, as many out."""


@dataclass(frozen=True)
class Tolerance:
    """How far ONNX Runtime may be from the program *on equal spikes*.

    Between two populations a program is smooth, and two executors agree to rounding. At a threshold it is not: a membrane that
    lies within rounding of theta fires in one executor and not in the other, about once in 10**6 to 10**7 spikes, and in a deep network
    the layers behind can make anything of one spike (measured on untrained GPT-2s: 50 times more flips with every layer). No
    bound on the free-running logits holds for every right file. So the file is judged with each population's readers held to
    the program's spikes, where nothing accumulates; how far the free run goes is measured and reported.

    Attributes:
        logits: Largest ``max |delta logit|``, as a fraction of ``1 + max |logit|``. Rounding in fp32 gives 1e-6 to 1e-5.
        spikes: Largest share of spikes that differ in any one population. Ties give 1e-7 to 1e-6, weights 1 % off about 1e-2.
        ties: Spikes of a population that may always differ: in a small one a single tie is a large share.
        top1: Least share of positions with the same most probable token; one position may always differ.
    """

    logits: float = 1e-4
    spikes: float = 1e-4
    ties: int = 3
    top1: float = 0.999


class OnnxBackend:
    """Writes ``model.onnx`` (and ``model.onnx.data`` for large weights), checked and run in ONNX Runtime.

    Attributes:
        external_bytes: Weights beyond this many bytes go to a file of their own.
        tolerance: How far the artefact may be from the program.
    """

    name = "onnx"
    files: tuple[str, ...] = (_MODEL,)
    summary = "ONNX model for stock ONNX Runtime, neurons as named functions of domain ntc"

    def __init__(self, external_bytes: int = EXTERNAL_BYTES, tolerance: Tolerance | None = None) -> None:
        self.external_bytes = external_bytes
        self.tolerance = tolerance or Tolerance()

    def emit(self, program: Program, folder: Any, *, analog: Program | None = None, tokens: Any | None = None) -> dict[str, Any]:
        """Write the model, check it, run it beside the program; nothing is left in ``folder`` unless it agrees.

        Args:
            program: The program; its tokens, if none are given, are ``program.example``.
            folder: An existing folder.
            analog: Not used.
            tokens: Token ids ``[B, L]`` to compare on.

        Raises:
            BackendError: For a node that ONNX cannot express, or a model that is broken or disagrees.
        """
        target = Path(folder)
        model, weights = build(program)
        with _workspace(target) as work:
            external = _save(model, weights, work, self.external_bytes)
            functions = sorted({f"{f.domain}::{f.name}" for f in model.functions})
            del model, weights  # ONNX Runtime brings its own copy
            ids = program.example if tokens is None else torch.as_tensor(tokens)
            report = check(work / _MODEL, program, ids, self.tolerance)
            report |= {
                "opset": OPSET, "functions": functions,
                "files": {p.name: p.stat().st_size for p in sorted(work.iterdir()) if p.name in (_MODEL, _DATA)},
            }  # fmt: skip
            if external:
                os.replace(work / _DATA, target / _DATA)  # first: a model without its weights would be half an artefact
            os.replace(work / _MODEL, target / _MODEL)
            if not external:
                (target / _DATA).unlink(missing_ok=True)
        logger.info("onnx %s", report)
        return report


class _workspace:  # noqa: N801
    """A folder beside the target, gone afterwards, so that a rename publishes what is inside."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=".onnx-", dir=self.target))
        except OSError as error:
            raise BackendError(f"cannot write into {self.target}: {error.strerror}") from error
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------- writing


def build(program: Program) -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    """The model without its weights, and the weights by initializer name in file order.

    Raises:
        BackendError: Names the node that ONNX cannot express.
    """
    writer = _Writer(program)
    writer.run()
    return writer.model(), writer.weights


_Value: TypeAlias = str | list[str]
_Handler: TypeAlias = Callable[["_Writer", Node], _Value]
_HANDLERS: dict[Any, _Handler] = {}


def _handles(*targets: Any) -> Callable[[_Handler], _Handler]:
    def enter(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return enter


class _Writer:
    """Walks a program once and collects ONNX nodes, weights and functions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights: dict[str, Tensor] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.functions: dict[tuple[str, str, str], onnx.FunctionProto] = {}
        self.values: dict[Node, _Value] = {}
        self.infos: list[onnx.ValueInfoProto] = []
        self.taken: set[str] = {"input_ids", "logits"}
        self.shared: dict[Any, str] = {}  # constants and transposed weights that several nodes use
        self.at: Node | None = None
        self.result: onnx.ValueInfoProto | None = None

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
        (last,) = next(n for n in graph.nodes if n.op == "output").args
        for node in graph.nodes:
            self.at = node
            if node.op == "placeholder":
                cast = node.meta["val"].dtype != torch.int64
                self.values[node] = self.call("Cast", ["input_ids"], to=_onnx_type(node.meta["val"].dtype)) if cast else "input_ids"
            elif node.op == "call_function":
                self.values[node] = self.translate(node)
                self.describe(node)
        assert isinstance(last, Node)
        self.at = last
        self.call("Identity", [self.name_of(last)], part="logits", output="logits")
        info = self.info("logits", last)
        if info is None:
            raise BackendError(f"the logits have no static shape: {where(last)}")
        self.result = info

    def translate(self, node: Node) -> _Value:
        """ONNX nodes for one node; returns the names of its values."""
        spec = spec_of(node)
        if spec is not None and spec.onnx is not None:
            return self.call_function(node, spec.onnx)
        if node.target in _HANDLERS:
            return _HANDLERS[node.target](self, node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ntc":
            raise BackendError(f"{node.target} has no ONNX function: {where(node)}")
        return _by_torch(self, node)

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
        return name if found == dtype else self.call("Cast", [name], f"{part}.cast", to=_onnx_type(dtype))

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

    def call_function(self, node: Node, text: str) -> str:
        """A call of a function of ours: tensors are inputs, the rest attributes, true booleans and words choose the variant."""
        arguments = _bound(node)
        variants = _functions(text)
        vocabulary = {word for f in variants for word in f.overload.split(".") if word}
        words = {k for k, v in arguments.items() if v is True} | {v for v in arguments.values() if isinstance(v, str)}
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
        return self.call(function.name, [self.name_of(v) for v in tensors.values()], domain=function.domain,
                         overload=function.overload, **attributes)  # fmt: skip

    # -- the whole

    def info(self, name: str, node: Node) -> onnx.ValueInfoProto | None:
        """Type and shape of a tensor value, dynamic sizes by name; None if it has sizes that are no symbol."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape: list[int | str] = []
        for size in value.shape:
            text = self.program.size(size)
            if text in ("B", "L"):
                shape.append("batch" if text == "B" else "sequence")
            elif text.isdigit():
                shape.append(int(text))
            else:
                return None
        return helper.make_tensor_value_info(name, _onnx_type(value.dtype), shape)

    def describe(self, node: Node) -> None:
        """Note the shape of a node's value."""
        value = self.values[node]
        if isinstance(value, str) and value != "input_ids" and value not in self.weights and (info := self.info(value, node)):
            self.infos.append(info)

    def model(self) -> onnx.ModelProto:
        """The model; its initializers are filled in by ``_save``."""
        assert self.result is not None
        ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])
        infos = {i.name: i for i in self.infos}
        graph = helper.make_graph(self.nodes, "ntc", [ids], [self.result], value_info=list(infos.values()))
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
def _functions(text: str) -> tuple[onnx.FunctionProto, ...]:
    """The variants in the text of ``OpSpec.onnx``; each begins with ``<domain``."""
    return tuple(onnx.parser.parse_function(part) for part in re.split(r"(?=<\s*domain)", text) if part.strip())


def _bound(node: Node) -> dict[str, Any]:
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


def _onnx_type(dtype: torch.dtype) -> int:
    if dtype not in _TYPES:
        raise BackendError(f"ONNX has no {dtype}")
    return int(_TYPES[dtype])


def _bytes(value: Tensor) -> memoryview:
    """The elements of a tensor, not copied if it is contiguous and on the CPU."""
    array: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _tensor_proto(name: str, value: Tensor, *, inline: bool) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=_onnx_type(value.dtype), dims=list(value.shape))
    if inline:
        proto.raw_data = bytes(_bytes(value)) if value.numel() else b""
    return proto


def _save(model: onnx.ModelProto, weights: dict[str, Tensor], folder: Path, limit: int) -> bool:
    """Fill in the initializers and write the model; returns whether they went to a file of their own.

    Large weights go straight from the program's memory to the file, one by one.
    """
    external = sum(t.numel() * t.element_size() for t in weights.values()) > limit
    if not external:
        model.graph.initializer.extend(_tensor_proto(n, t, inline=True) for n, t in weights.items())
    else:
        with (folder / _DATA).open("wb") as data:
            for name, value in weights.items():
                size = value.numel() * value.element_size()
                proto = _tensor_proto(name, value, inline=size < min(_INLINE, limit))
                if not proto.HasField("raw_data"):
                    data.write(b"\0" * (-data.tell() % _ALIGN))
                    proto.data_location = onnx.TensorProto.EXTERNAL
                    for key, text in (("location", _DATA), ("offset", str(data.tell())), ("length", str(size))):
                        proto.external_data.add(key=key, value=text)
                    data.write(_bytes(value))
                model.graph.initializer.append(proto)
    (folder / _MODEL).write_bytes(model.SerializeToString(deterministic=True))
    return external


# --------------------------------------------------------------------------------------------------------- standard opset

_UNARY: dict[Any, str] = {
    aten.relu.default: "Relu", aten.tanh.default: "Tanh", aten.sigmoid.default: "Sigmoid", aten.erf.default: "Erf",
    aten.exp.default: "Exp", aten.cos.default: "Cos", aten.sin.default: "Sin", aten.neg.default: "Neg",
    aten.sqrt.default: "Sqrt", aten.abs.default: "Abs", aten.log.default: "Log", aten.reciprocal.default: "Reciprocal",
}  # fmt: skip
_BINARY: dict[Any, str] = {aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div"}
# Of sizes, which are never negative: there floor division is ONNX's.
_SYMBOLIC: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}


@_handles(*_UNARY)
def _unary(w: _Writer, node: Node) -> _Value:
    (x,) = node.args
    return w.call(_UNARY[node.target], [w.operand(x, node.meta["val"].dtype, "x")])


@_handles(*_BINARY)
def _binary(w: _Writer, node: Node) -> _Value:
    a, dtype = _bound(node), node.meta["val"].dtype
    if dtype == torch.bool:
        return _by_torch(w, node)
    other = w.operand(a["other"], dtype, "other")
    if a.get("alpha", 1) != 1:
        other = w.call("Mul", [other, w.operand(a["alpha"], dtype, "alpha")], "scaled")
    return w.call(_BINARY[node.target], [w.operand(a["self"], dtype, "self"), other])


@_handles(*_SYMBOLIC)
def _symbolic(w: _Writer, node: Node) -> _Value:
    return w.call(_SYMBOLIC[node.target], [w.operand(a, torch.int64, "size") for a in node.args])


@_handles(aten.sym_size.int)
def _sym_size(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    axis = int(a["dim"]) % a["self"].meta["val"].dim()
    return w.call("Squeeze", [w.call("Shape", [w.name_of(a["self"])], "shape", start=axis, end=axis + 1)])


@_handles(operator.getitem)
def _getitem(w: _Writer, node: Node) -> _Value:
    source, index = node.args
    values = w.values[source]  # type: ignore[index]
    if isinstance(values, str):
        raise BackendError(f"an element of what is no list of tensors: {where(node)}")
    return values[index]  # type: ignore[index]


@_handles(aten.linear.default)
def _linear(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    weight = a["weight"]
    # The initializer keeps our layout [out, in], so that tied and untied weights look alike; loaders fold the transposition.
    key = ("transposed", weight)
    if key not in w.shared:
        w.shared[key] = w.call("Transpose", [w.name_of(weight)], "weight_t", perm=[1, 0])
    inputs = [w.name_of(a["input"]), w.shared[key]]
    if a["bias"] is None:
        return w.call("MatMul", inputs)
    return w.call("Add", [w.call("MatMul", inputs, "product"), w.name_of(a["bias"])])


@_handles(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(w: _Writer, node: Node) -> _Value:
    return w.call("MatMul", [w.name_of(x) for x in node.all_input_nodes] if len(node.all_input_nodes) == 2
                  else [w.name_of(node.all_input_nodes[0])] * 2)  # fmt: skip


@_handles(aten.embedding.default)
def _embedding(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    return w.call("Gather", [w.name_of(a["weight"]), w.name_of(a["indices"])], axis=0)


@_handles(aten.layer_norm.default)
def _layer_norm(w: _Writer, node: Node) -> _Value:
    a, dtype = _bound(node), node.meta["val"].dtype
    shape = [int(n) for n in a["normalized_shape"]]
    scale = w.name_of(a["weight"]) if a["weight"] is not None else w.constant(torch.ones(shape).tolist(), dtype)
    bias = [w.name_of(a["bias"])] if a["bias"] is not None else []
    return w.call("LayerNormalization", [w.name_of(a["input"]), scale, *bias], axis=-len(shape), epsilon=float(a["eps"]))


@_handles(aten.rms_norm.default)
def _rms_norm(w: _Writer, node: Node) -> _Value:
    a, dtype = _bound(node), node.meta["val"].dtype
    x, rank = w.name_of(a["input"]), len(a["normalized_shape"])
    eps = torch.finfo(dtype).eps if a["eps"] is None else float(a["eps"])
    square = w.call("Mul", [x, x], "square")
    mean = w.call("ReduceMean", [square, w.constant(list(range(-rank, 0)), torch.int64)], "mean")
    root = w.call("Sqrt", [w.call("Add", [mean, w.constant(eps, dtype)], "shifted")], "root")
    if a["weight"] is None:
        return w.call("Div", [x, root])
    return w.call("Mul", [w.call("Div", [x, root], "normal"), w.name_of(a["weight"])])


@_handles(aten.gelu.default)
def _gelu(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    return w.call("Gelu", [w.name_of(a["self"])], approximate=a["approximate"])


@_handles(aten.silu.default)
def _silu(w: _Writer, node: Node) -> _Value:
    x = w.name_of(node.args[0])  # type: ignore[arg-type]
    return w.call("Mul", [x, w.call("Sigmoid", [x], "gate")])


@_handles(aten.rsqrt.default)
def _rsqrt(w: _Writer, node: Node) -> _Value:
    return w.call("Reciprocal", [w.call("Sqrt", [w.operand(node.args[0], node.meta["val"].dtype, "x")], "root")])


@_handles(aten.pow.Tensor_Scalar)
def _pow(w: _Writer, node: Node) -> _Value:
    dtype = node.meta["val"].dtype
    return w.call("Pow", [w.operand(node.args[0], dtype, "self"), w.constant(node.args[1], dtype)])


@_handles(aten.softmax.int, aten._softmax.default)
def _softmax(w: _Writer, node: Node) -> _Value:
    return w.call("Softmax", [w.operand(node.args[0], node.meta["val"].dtype, "self")], axis=int(node.args[1]))  # type: ignore[arg-type]


@_handles(aten.mean.dim)
def _mean(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    axes = [w.constant([int(d) for d in a["dim"]], torch.int64)] if a["dim"] else []
    return w.call("ReduceMean", [w.operand(a["self"], node.meta["val"].dtype, "self"), *axes], keepdims=int(a["keepdim"]))


@_handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(w: _Writer, node: Node) -> _Value:
    a, dtype = _bound(node), node.meta["val"].dtype
    return w.call("Range", [w.operand(a.get(k, d), dtype, k) for k, d in (("start", 0), ("end", None), ("step", 1))])


@_handles(aten.unsqueeze.default)
def _unsqueeze(w: _Writer, node: Node) -> _Value:
    return w.call("Unsqueeze", [w.name_of(node.args[0]), w.constant([int(node.args[1])], torch.int64)])  # type: ignore[arg-type]


@_handles(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def _reshape(w: _Writer, node: Node) -> _Value:
    x, size = node.args
    assert isinstance(x, Node)
    return w.call("Reshape", [w.name_of(x), w.sizes(size)])  # type: ignore[arg-type]


@_handles(aten.unflatten.int)
def _unflatten(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    rank = a["self"].meta["val"].dim()
    axis = a["dim"] % rank
    x = w.name_of(a["self"])
    pieces = [w.sizes(a["sizes"])]
    if axis > 0:
        pieces.insert(0, w.call("Shape", [x], "before", end=axis))
    if axis < rank - 1:
        pieces.append(w.call("Shape", [x], "after", start=axis + 1))
    return w.call("Reshape", [x, w.call("Concat", pieces, "shape", axis=0)])


@_handles(aten.flatten.using_ints)
def _flatten(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    rank = a["self"].meta["val"].dim()
    if rank == 0:
        return _by_torch(w, node)
    first, last, x = a["start_dim"] % rank, a["end_dim"] % rank, w.name_of(a["self"])
    pieces = [w.constant([-1], torch.int64)]
    if first > 0:
        pieces.insert(0, w.call("Shape", [x], "before", end=first))
    if last < rank - 1:
        pieces.append(w.call("Shape", [x], "after", start=last + 1))
    return w.call("Reshape", [x, w.call("Concat", pieces, "shape", axis=0)])


@_handles(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    rank = a["self"].meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in a["dims"]]
    else:
        i, j = (a["dim0"] % rank, a["dim1"] % rank) if node.target is aten.transpose.int else (0, rank - 1)
        order[i], order[j] = order[j], order[i]
    return w.call("Transpose", [w.name_of(a["self"])], perm=order)


@_handles(aten.expand.default)
def _expand(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    size = [1 if not isinstance(s, Node) and s == -1 else s for s in a["size"]]  # 1 keeps a size in ONNX, -1 does in torch
    return w.call("Expand", [w.name_of(a["self"]), w.sizes(size)])


@_handles(aten.slice.Tensor)
def _slice(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    end = (1 << 63) - 1 if a["end"] is None else a["end"]
    bounds = [w.sizes([v], part) for v, part in ((a["start"] or 0, "start"), (end, "end"), (a["dim"], "axis"), (a["step"], "step"))]
    return w.call("Slice", [w.name_of(a["self"]), *bounds])


@_handles(aten.cat.default)
def _cat(w: _Writer, node: Node) -> _Value:
    a, dtype = _bound(node), node.meta["val"].dtype
    return w.call("Concat", [w.operand(x, dtype, f"part_{i}") for i, x in enumerate(a["tensors"])], axis=int(a["dim"]))


@_handles(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten._to_copy.default,
          aten.to.dtype_layout, aten.to.device, aten.lift_fresh_copy.default)  # fmt: skip
def _copy(w: _Writer, node: Node) -> _Value:
    x, dtype = node.args[0], node.meta["val"].dtype
    assert isinstance(x, Node)
    if x.meta["val"].dtype == dtype:
        return w.call("Identity", [w.name_of(x)])
    return w.call("Cast", [w.name_of(x)], to=_onnx_type(dtype))


@_handles(aten._assert_tensor_metadata.default)
def _nothing(w: _Writer, node: Node) -> _Value:
    return []  # only checks


@_handles(aten.dropout.default)
def _dropout(w: _Writer, node: Node) -> _Value:
    a = _bound(node)
    if a["train"]:
        raise BackendError(f"dropout in training mode gives random logits: {where(node)}")
    return w.call("Identity", [w.name_of(a["input"])])


# --------------------------------------------------------------------------------------------------- everything else: torch


def _by_torch(w: _Writer, node: Node) -> _Value:
    """A node that this writer does not know, exported alone by ``torch.onnx`` and called as a function of domain ``aten``.

    Sizes among its arguments are computed inside, from the tensors that they are sizes of. Nodes alike share one function.
    """
    if not isinstance(node.meta.get("val"), Tensor | list | tuple):
        raise BackendError(f"{node.target} computes a size in a way that ONNX export does not know: {where(node)}")
    region = [node]
    inputs: list[Node] = []
    stack = list(node.all_input_nodes)
    while stack:
        argument = stack.pop(0)
        if isinstance(argument.meta["val"], Tensor):
            if argument not in inputs:
                inputs.append(argument)
        elif isinstance(argument.meta["val"], torch.SymInt) and argument not in region:
            region.append(argument)
            stack.extend(argument.all_input_nodes)
        elif argument not in region:
            raise BackendError(f"{node.target} takes a list of tensors, which ONNX export does not know: {where(node)}")
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    region.sort(key=order.__getitem__)
    inputs.sort(key=order.__getitem__)
    names = {n: f"x{i}" for i, n in enumerate(inputs)} | {n: f"n{i}" for i, n in enumerate(region)}
    shapes = [(tuple(w.program.size(s) for s in n.meta["val"].shape), n.meta["val"].dtype) for n in inputs]
    key = ("torch", repr(shapes), "; ".join(
        f"{n.target}{torch.fx.map_arg((n.args, dict(n.kwargs)), lambda a: names[a])}" for n in region
    ))  # fmt: skip
    if key not in w.shared:
        function = _exported(node, region, inputs)
        function.name = f"{getattr(node.target, '__name__', 'op').replace('.', '_')}_{len(w.functions)}"
        w.functions["aten", function.name, ""] = function
        w.shared[key] = function.name
    function = w.functions["aten", w.shared[key], ""]
    results = w.call_many(function.name, [w.name_of(n) for n in inputs], len(function.output), domain="aten")
    return results[0] if isinstance(node.meta["val"], Tensor) else results


def _exported(node: Node, region: Sequence[Node], inputs: Sequence[Node]) -> onnx.FunctionProto:
    graph, mapping, shapes, examples = Graph(), {}, [], []
    for i, n in enumerate(inputs):
        value = n.meta["val"]
        mapping[n] = graph.placeholder(f"x{i}")
        sizes = [s.node.hint if isinstance(s, torch.SymInt) else int(s) for s in value.shape]
        examples.append(torch.zeros(sizes, dtype=value.dtype))
        dynamic = [d for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt)]
        shapes.append(dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC))
    for n in region:
        mapping[n] = graph.node_copy(n, mapping.__getitem__)
    graph.output(mapping[node])
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it reports that torchvision is missing, at every call
    try:
        with warnings.catch_warnings(action="ignore"):
            exported = torch.export.export(
                GraphModule({}, graph), tuple(examples), dynamic_shapes={f"x{i}": s for i, s in enumerate(shapes)}, strict=False
            )
            made = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
        assert made is not None
        model = inliner.inline_local_functions(made.model_proto)
    except Exception as error:  # many kinds; all mean that neither we nor torch can write this op
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackendError(f"{node.target} cannot be written as ONNX ({first}): {where(node)}") from error
    finally:
        exporter.setLevel(level)
    if len(model.graph.input) != len(inputs):
        raise BackendError(f"{node.target} loses an input in ONNX: {where(node)}")
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    body = [*constants, *model.graph.node]
    for proto in body:
        del proto.metadata_props[:]  # torch's hold stack traces, and those hold paths
        proto.doc_string = ""
    opsets = [helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    return helper.make_function(
        "aten", "op", [i.name for i in model.graph.input], [o.name for o in model.graph.output], body, opsets
    )


# --------------------------------------------------------------------------------------------------------------- checking


def check(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance | None = None) -> dict[str, Any]:
    """Check a written model: its form, then what it computes, against the program it was made of.

    Args:
        path: The ``.onnx`` file; external weights lie beside it.
        program: The program.
        tokens: Token ids ``[B, L]``.
        tolerance: Limits; by default those of ``Tolerance``.

    Raises:
        BackendError: If the file is malformed, does not load, or disagrees.
    """
    tolerance = tolerance or Tolerance()
    size = sum(p.stat().st_size for p in path.parent.iterdir() if p.is_file())
    try:
        # The full check infers all shapes on a copy of the model; for weights of gigabytes only the structure is checked.
        onnx.checker.check_model(str(path), full_check=size <= EXTERNAL_BYTES)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the ONNX checker refuses the model: {error}") from error
    held = _held(path, program, tokens, tolerance)
    report = {"checker": "ok", **compare(_session(path), program, tokens), "held": held, "tolerance": asdict(tolerance)}
    if report["top1_agreement"] < tolerance.top1:
        logger.warning(
            "ONNX Runtime and the program give the same token at %.2f %% of the positions only, although every population agrees "
            "on equal input: this network makes large differences of single flipped spikes", 100 * report["top1_agreement"],
        )  # fmt: skip
    return report


def _session(model: Path | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    given = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds
        raise BackendError(f"ONNX Runtime cannot load the model: {error}") from error


def compare(session: Any, program: Program, tokens: Tensor) -> dict[str, Any]:
    """Run an ONNX Runtime session of ``model.onnx`` beside the program, both freely; refuses only what has another shape.

    Returns quantiles over positions of ``max_v |delta logit|`` and the share of positions with the same most probable token.
    """
    differences, same, largest = [], 0, 0.0
    rows = max(1, (1 << 26) // max(1, tokens.shape[1] * program.info.vocab_size))  # 256 MB of logits at a time
    for ids in torch.split(tokens, rows):
        with torch.no_grad():
            expected = program(ids)
        result = torch.from_numpy(session.run(["logits"], {"input_ids": ids.to(torch.int64).numpy()})[0])
        if result.shape != expected.shape:
            raise BackendError(f"ONNX Runtime gives logits of shape {list(result.shape)}, the program {list(expected.shape)}")
        differences.append((result - expected).abs().amax(-1).flatten())
        same += int((result.argmax(-1) == expected.argmax(-1)).sum())
        largest = max(largest, float(expected.abs().max()))
    moved = torch.cat(differences).sort().values
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    found = {f"{k}_abs_logit_difference": float(moved[min(moved.numel() - 1, int(q * moved.numel()))]) for k, q in at.items()}
    return {"tokens": moved.numel(), "top1_agreement": same / moved.numel(), **found, "max_abs_logit": largest}


def _held(path: Path, program: Program, tokens: Tensor, tolerance: Tolerance) -> dict[str, Any]:
    """Run the model with every population's input held to the program's spikes, and judge.

    The edges behind the populations are cut: what a population fires is an output, what its readers see is an input.
    """
    trains = {n.name: n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get(TYPE), SpikeType)}
    trains = {k: n for k, n in trains.items() if (s := spec_of(n)) is not None and s.element == "population"}
    per_token = sum(math.prod(int(x) for x in (n.meta["val"].shape[0], n.meta["val"].shape[-1])) for n in trains.values())
    ids = tokens[:1, : max(8, _HELD // max(1, per_token))]
    expected: dict[str, Tensor] = {}

    def keep(node: Node, _: tuple[Any, ...], value: Any) -> None:
        if node.name in trains:
            expected[node.name] = value

    with torch.no_grad():
        logits = interpret(program, ids, keep)
    got = _run_cut(path, list(trains), {"input_ids": ids.to(torch.int64), **expected})
    difference = float((got["logits"] - logits).abs().max())
    differing = {name: int((got[name] != value).sum()) for name, value in expected.items()}
    report = {
        "tokens": ids.numel(), "max_abs_logit_difference": difference,
        "top1_agreement": float((got["logits"].argmax(-1) == logits.argmax(-1)).double().mean()),
        "spikes": sum(v.numel() for v in expected.values()), "spike_mismatches": sum(differing.values()),
    }  # fmt: skip
    for name, count in differing.items():
        allowed = max(tolerance.ties, math.floor(tolerance.spikes * expected[name].numel()))
        if count > allowed:
            raise BackendError(
                f"ONNX Runtime disagrees with the program: on equal input {count} of {expected[name].numel()} spikes differ "
                f"(limit {allowed}) at {where(trains[name])}"
            )
    limit = tolerance.logits * (1.0 + float(logits.abs().max()))
    if not difference <= limit:  # also if it is NaN
        raise BackendError(
            f"ONNX Runtime disagrees with the program: on equal spikes the logits differ by {difference:.3g} (limit {limit:.3g})"
        )
    if round((1 - report["top1_agreement"]) * ids.numel()) > max(1, math.floor((1 - tolerance.top1) * ids.numel())):
        raise BackendError(f"ONNX Runtime gives the same token at {report['top1_agreement']:.2%} of the positions only, on equal spikes")
    return report


def _run_cut(path: Path, cut: Sequence[str], feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a model file with the values of the nodes ``cut`` fed in; returns the logits and what those nodes made themselves."""
    model = onnx.load(path, load_external_data=False)
    known = {i.name: i for i in model.graph.value_info}
    nodes = {n.name: n for n in model.graph.node}
    values: dict[str, str] = {}
    for name in cut:
        if name not in nodes or (value := nodes[name].output[0]) not in known:
            raise BackendError(f"the model has no node {name} with a known shape")
        values[name] = value
        model.graph.input.append(known[value])
        own = model.graph.output.add()
        own.CopyFrom(known[value])
        own.name = nodes[name].output[0] = f"{value}.own"
    kept = [i for i in model.graph.value_info if i.name not in values.values()]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    beside = path.with_name(f".{path.name}.held")  # beside the file: that is where its external weights are looked for
    try:
        beside.write_bytes(model.SerializeToString())
        del model
        wanted = ["logits", *(f"{v}.own" for v in values.values())]
        results = _session(beside).run(wanted, {values.get(k, k): v.numpy() for k, v in feeds.items()})
    finally:
        beside.unlink(missing_ok=True)
    return dict(zip(["logits", *values], map(torch.from_numpy, results), strict=True))
