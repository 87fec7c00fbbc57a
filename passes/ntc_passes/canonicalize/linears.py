"""addmm, mm and matmul with a weight become ``linear``, and take in the bias that is added to them."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.probe import LAYOUT_OPS, equals, evaluate, keeps_values
from ntc.program import Program
from ntc_passes.canonicalize.making import constant, making

__all__ = ["rewrite_linears", "take_in_biases"]


def _constant_matrix(program: Program, node: object) -> tuple[Node, Tensor, bool] | None:
    """A weight matrix (in, out) behind a node: (its get_attr, value, whether the stored tensor is already (out, in))."""
    if not isinstance(node, Node):
        return None
    base = node
    while base.target in (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default, aten.contiguous.default):
        base = base.args[0]  # type: ignore[assignment]
    if base.op != "get_attr" or base.meta["val"].dim() != 2:
        return None
    value: Tensor = evaluate(program, node, {}, (3, 7))
    stored = program.tensor(base).detach()
    # Shape alone would take a square matrix for its own transpose: the strides tell.
    reusable = value.data_ptr() == stored.data_ptr() and value.shape == stored.T.shape and value.stride() == stored.T.stride()
    return base, value, reusable


def rewrite_linears(program: Program) -> int:
    """addmm, mm and matmul with a weight become ``linear(x, weight [out, in], bias)`` on ``[..., in]``."""
    count = 0
    for node in list(program.graph.nodes):
        if node.target is aten.addmm.default:
            bias, x, matrix = node.args
            if node.kwargs or not (isinstance(bias, Node) and bias.op == "get_attr" and bias.meta["val"].dim() == 1):
                continue
        elif node.target in (aten.mm.default, aten.matmul.default):
            (x, matrix), bias = node.args, None
        else:
            continue
        weight = _constant_matrix(program, matrix)
        if weight is None or not isinstance(x, Node):
            continue
        base, value, reusable = weight
        source = _unflattened(program, x)
        with making(program, node, [node]) as call:
            stored = base if reusable else call(constant(program, f"{base.target}_t", value.T.contiguous()), at=base)
            result = call(aten.linear.default, source, stored, *([bias] if bias is not None else []))
            if source is not x:  # the old node was [B * L, out]: what follows sees that, and the chain cancels later
                result = call(aten.reshape.default, result, [-1, value.shape[1]])
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)
        count += 1
    return count


def take_in_biases(program: Program) -> int:
    """``linear(x, w) + b`` with a constant b of its width is ``linear(x, w, b)``, if nobody else reads the product."""
    count = 0
    for node in list(program.graph.find_nodes(op="call_function", target=aten.linear.default)):
        add = next(iter(node.users)) if len(node.users) == 1 else None
        if add is None or add.target is not aten.add.Tensor or add.kwargs or (len(node.args) > 2 and node.args[2] is not None):
            continue
        bias = next((a for a in add.args if a is not node), None)
        if not isinstance(bias, Node) or bias.op != "get_attr" or bias.meta["val"].shape != node.meta["val"].shape[-1:]:
            continue
        with making(program, add, [node, add]) as call:
            add.replace_all_uses_with(call(aten.linear.default, *node.args[:2], bias, at=node))
        program.graph.erase_node(add)
        program.graph.erase_node(node)
        count += 1
    return count


def _unflattened(program: Program, x: Node) -> Node:
    """The node of which ``x [M, C]`` is the flattened form, or x."""
    if x.meta["val"].dim() != 2:
        return x
    source, passed = x, list[Node]()
    while source.target in LAYOUT_OPS and isinstance(source.args[0], Node):
        passed.append(source)
        source = source.args[0]
        wider = source.meta["val"].dim() > 2 and keeps_values(source, passed)
        if wider and equals(program, source, x, lambda t, _: t.reshape(-1, t.shape[-1])):
            return source
    return x
