"""How each ATen op is written in the standard opset; what is not here is exported alone by ``torch.onnx``."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import helper, inliner
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ntc.errors import BackendError
from ntc.meta import where
from ntc.ops import aten
from ntc_backends.onnx_writer import OPSET, Value, Writer, bound, handles, onnx_type

__all__ = ["by_torch"]

# --------------------------------------------------------------------------------------------------------- standard opset

_UNARY: dict[Any, str] = {
    aten.relu.default: "Relu", aten.tanh.default: "Tanh", aten.erf.default: "Erf",
    aten.exp.default: "Exp", aten.cos.default: "Cos", aten.sin.default: "Sin", aten.neg.default: "Neg",
    aten.sqrt.default: "Sqrt", aten.abs.default: "Abs", aten.log.default: "Log", aten.reciprocal.default: "Reciprocal",
}  # fmt: skip
_BINARY: dict[Any, str] = {aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div"}
# Of sizes, which are never negative: there floor division is ONNX's.
_SYMBOLIC: dict[Any, str] = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}


@handles(*_UNARY)
def _unary(w: Writer, node: Node) -> Value:
    (x,) = node.args
    return w.call(_UNARY[node.target], [w.operand(x, node.meta["val"].dtype, "x")])


@handles(*_BINARY)
def binary(w: Writer, node: Node) -> Value:
    """An op of two tensors, or of a tensor and a number."""
    a, dtype = bound(node), node.meta["val"].dtype
    if dtype == torch.bool:
        return by_torch(w, node)
    other = w.operand(a["other"], dtype, "other")
    if a.get("alpha", 1) != 1:
        other = w.call("Mul", [other, w.operand(a["alpha"], dtype, "alpha")], "scaled")
    return w.call(_BINARY[node.target], [w.operand(a["self"], dtype, "self"), other])


@handles(*_SYMBOLIC)
def _symbolic(w: Writer, node: Node) -> Value:
    return w.call(_SYMBOLIC[node.target], [w.operand(a, torch.int64, "size") for a in node.args])


@handles(aten.sym_size.int)
def _sym_size(w: Writer, node: Node) -> Value:
    a = bound(node)
    axis = int(a["dim"]) % a["self"].meta["val"].dim()
    return w.call("Squeeze", [w.call("Shape", [w.name_of(a["self"])], "shape", start=axis, end=axis + 1)])


@handles(operator.getitem)
def _getitem(w: Writer, node: Node) -> Value:
    source, index = node.args
    values = w.values[source]  # type: ignore[index]
    if isinstance(values, str):
        raise BackendError(f"an element of what is no list of tensors: {where(node)}")
    return values[index]  # type: ignore[index]


@handles(aten.linear.default)
def _linear(w: Writer, node: Node) -> Value:
    a = bound(node)
    weight = a["weight"]
    # The initializer keeps our layout [out, in], so that tied and untied weights look alike; loaders fold the transposition.
    key = ("transposed", weight)
    if key not in w.shared:
        w.shared[key] = w.call("Transpose", [w.name_of(weight)], "weight_t", perm=[1, 0])
    inputs = [w.name_of(a["input"]), w.shared[key]]
    if a["bias"] is None:
        return w.call("MatMul", inputs)
    return w.call("Add", [w.call("MatMul", inputs, "product"), w.name_of(a["bias"])])


@handles(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(w: Writer, node: Node) -> Value:
    return w.call("MatMul", [w.name_of(x) for x in node.all_input_nodes] if len(node.all_input_nodes) == 2
                  else [w.name_of(node.all_input_nodes[0])] * 2)  # fmt: skip


@handles(aten.embedding.default)
def _embedding(w: Writer, node: Node) -> Value:
    a = bound(node)
    return w.call("Gather", [w.name_of(a["weight"]), w.name_of(a["indices"])], axis=0)


@handles(aten.index_select.default)
def _index_select(w: Writer, node: Node) -> Value:
    a = bound(node)
    return w.call("Gather", [w.name_of(a["self"]), w.name_of(a["index"])], axis=int(a["dim"]))


@handles(aten.layer_norm.default)
def _layer_norm(w: Writer, node: Node) -> Value:
    a, dtype = bound(node), node.meta["val"].dtype
    shape = [int(n) for n in a["normalized_shape"]]
    scale = w.name_of(a["weight"]) if a["weight"] is not None else w.constant(torch.ones(shape).tolist(), dtype)
    bias = [w.name_of(a["bias"])] if a["bias"] is not None else []
    return w.call("LayerNormalization", [w.name_of(a["input"]), scale, *bias], axis=-len(shape), epsilon=float(a["eps"]))


@handles(aten.rms_norm.default)
def _rms_norm(w: Writer, node: Node) -> Value:
    a, dtype = bound(node), node.meta["val"].dtype
    x, rank = w.name_of(a["input"]), len(a["normalized_shape"])
    eps = torch.finfo(dtype).eps if a["eps"] is None else float(a["eps"])
    square = w.call("Mul", [x, x], "square")
    mean = w.call("ReduceMean", [square, w.constant(list(range(-rank, 0)), torch.int64)], "mean")
    root = w.call("Sqrt", [w.call("Add", [mean, w.constant(eps, dtype)], "shifted")], "root")
    if a["weight"] is None:
        return w.call("Div", [x, root])
    return w.call("Mul", [w.call("Div", [x, root], "normal"), w.name_of(a["weight"])])


@handles(aten.gelu.default)
def _gelu(w: Writer, node: Node) -> Value:
    a = bound(node)
    return w.call("Gelu", [w.name_of(a["self"])], approximate=a["approximate"])


@handles(aten.silu.default)
def _silu(w: Writer, node: Node) -> Value:
    return _through_sigmoid(w, node, w.operand(node.args[0], node.meta["val"].dtype, "x"))


@handles(aten.sigmoid.default)
def _sigmoid(w: Writer, node: Node) -> Value:
    return _through_sigmoid(w, node, w.constant(1.0, node.meta["val"].dtype))


def _through_sigmoid(w: Writer, node: Node, above: str) -> str:
    """``above / (1 + exp(-x))``. Not ``Sigmoid``: ONNX Runtime's is off by up to 1e-7 whatever its value, a fifth of it at -13."""
    dtype = node.meta["val"].dtype
    below = w.call("Exp", [w.call("Neg", [w.operand(node.args[0], dtype, "x")], "turned")], "exp")
    return w.call("Div", [above, w.call("Add", [below, w.constant(1.0, dtype)], "below")])


@handles(aten.rsqrt.default)
def _rsqrt(w: Writer, node: Node) -> Value:
    return w.call("Reciprocal", [w.call("Sqrt", [w.operand(node.args[0], node.meta["val"].dtype, "x")], "root")])


@handles(aten.pow.Tensor_Scalar)
def _pow(w: Writer, node: Node) -> Value:
    dtype = node.meta["val"].dtype
    return w.call("Pow", [w.operand(node.args[0], dtype, "self"), w.constant(node.args[1], dtype)])


@handles(aten.softmax.int, aten._softmax.default)
def _softmax(w: Writer, node: Node) -> Value:
    return w.call("Softmax", [w.operand(node.args[0], node.meta["val"].dtype, "self")], axis=int(node.args[1]))  # type: ignore[arg-type]


@handles(aten.mean.dim)
def _mean(w: Writer, node: Node) -> Value:
    a = bound(node)
    axes = [w.constant([int(d) for d in a["dim"]], torch.int64)] if a["dim"] else []
    return w.call("ReduceMean", [w.operand(a["self"], node.meta["val"].dtype, "self"), *axes], keepdims=int(a["keepdim"]))


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(w: Writer, node: Node) -> Value:
    a, dtype = bound(node), node.meta["val"].dtype
    return w.call("Range", [w.operand(a.get(k, d), dtype, k) for k, d in (("start", 0), ("end", None), ("step", 1))])


@handles(aten.unsqueeze.default)
def _unsqueeze(w: Writer, node: Node) -> Value:
    return w.call("Unsqueeze", [w.name_of(node.args[0]), w.constant([int(node.args[1])], torch.int64)])  # type: ignore[arg-type]


@handles(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def _reshape(w: Writer, node: Node) -> Value:
    x, size = node.args
    assert isinstance(x, Node)
    return w.call("Reshape", [w.name_of(x), w.sizes(size)])  # type: ignore[arg-type]


@handles(aten.unflatten.int)
def _unflatten(w: Writer, node: Node) -> Value:
    a = bound(node)
    rank = a["self"].meta["val"].dim()
    axis = a["dim"] % rank
    x = w.name_of(a["self"])
    pieces = [w.sizes(a["sizes"])]
    if axis > 0:
        pieces.insert(0, w.call("Shape", [x], "before", end=axis))
    if axis < rank - 1:
        pieces.append(w.call("Shape", [x], "after", start=axis + 1))
    return w.call("Reshape", [x, w.call("Concat", pieces, "shape", axis=0)])


@handles(aten.flatten.using_ints)
def _flatten(w: Writer, node: Node) -> Value:
    a = bound(node)
    rank = a["self"].meta["val"].dim()
    if rank == 0:
        return by_torch(w, node)
    first, last, x = a["start_dim"] % rank, a["end_dim"] % rank, w.name_of(a["self"])
    pieces = [w.constant([-1], torch.int64)]
    if first > 0:
        pieces.insert(0, w.call("Shape", [x], "before", end=first))
    if last < rank - 1:
        pieces.append(w.call("Shape", [x], "after", start=last + 1))
    return w.call("Reshape", [x, w.call("Concat", pieces, "shape", axis=0)])


@handles(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(w: Writer, node: Node) -> Value:
    a = bound(node)
    rank = a["self"].meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in a["dims"]]
    else:
        i, j = (a["dim0"] % rank, a["dim1"] % rank) if node.target is aten.transpose.int else (0, rank - 1)
        order[i], order[j] = order[j], order[i]
    return w.call("Transpose", [w.name_of(a["self"])], perm=order)


@handles(aten.expand.default)
def _expand(w: Writer, node: Node) -> Value:
    a = bound(node)
    size = [1 if not isinstance(s, Node) and s == -1 else s for s in a["size"]]  # 1 keeps a size in ONNX, -1 does in torch
    return w.call("Expand", [w.name_of(a["self"]), w.sizes(size)])


@handles(aten.slice.Tensor)
def _slice(w: Writer, node: Node) -> Value:
    a = bound(node)
    end = (1 << 63) - 1 if a["end"] is None else a["end"]
    bounds = [w.sizes([v], part) for v, part in ((a["start"] or 0, "start"), (end, "end"), (a["dim"], "axis"), (a["step"], "step"))]
    return w.call("Slice", [w.name_of(a["self"]), *bounds])


@handles(aten.cat.default)
def _cat(w: Writer, node: Node) -> Value:
    a, dtype = bound(node), node.meta["val"].dtype
    return w.call("Concat", [w.operand(x, dtype, f"part_{i}") for i, x in enumerate(a["tensors"])], axis=int(a["dim"]))


@handles(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten._to_copy.default,
          aten.to.dtype_layout, aten.to.device, aten.lift_fresh_copy.default)  # fmt: skip
def _copy(w: Writer, node: Node) -> Value:
    x, dtype = node.args[0], node.meta["val"].dtype
    assert isinstance(x, Node)
    if x.meta["val"].dtype == dtype:
        return w.call("Identity", [w.name_of(x)])
    return w.call("Cast", [w.name_of(x)], to=onnx_type(dtype))


@handles(aten._assert_tensor_metadata.default)
def _nothing(w: Writer, node: Node) -> Value:
    return []  # only checks


@handles(aten.dropout.default)
def _dropout(w: Writer, node: Node) -> Value:
    a = bound(node)
    if a["train"]:
        raise BackendError(f"dropout in training mode gives random logits: {where(node)}")
    return w.call("Identity", [w.name_of(a["input"])])


# --------------------------------------------------------------------------------------------------- everything else: torch


def by_torch(w: Writer, node: Node) -> Value:
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
