"""How sums of the residual stream of the integer grade are written: in float32 where they stay below 2^24 and norms and sums read them.

Layers that are added give float32 (``onnx_integer_functions.rescale``) and norms take it, so no value of the stream is converted.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ntc.ops import aten
from ntc_backends.onnx_aten import binary
from ntc_backends.onnx_integer_widths import SINGLE, interval, once
from ntc_backends.onnx_writer import Value, Writer, handles, onnx_type

__all__ = ["is_real_sum"]

_INTEGERS = torch.int8, torch.int16, torch.int32


def is_real_sum(w: Writer, node: Node) -> bool:
    """Whether a sum has the form ``real`` and takes it: float32 that holds the integers."""
    if node.target is not aten.add.Tensor or node.meta["val"].dtype != torch.int32 or len(node.args) != 2 or node.kwargs:
        return False
    if not all(isinstance(a, Node) and a.op == "call_function" and a.meta["val"].dtype in _INTEGERS for a in node.args):
        return False
    reading = (torch.ops.ntc.integer_norm.default, aten.add.Tensor)
    exact = all(interval(w, n).magnitude < SINGLE for n in (node, *node.all_input_nodes))
    return exact and bool(node.users) and all(u.target in reading for u in node.users)


@handles(aten.add.Tensor)
def _add(w: Writer, node: Node) -> Value:
    given = [a for a in node.args if isinstance(a, Node)]
    if is_real_sum(w, node):
        if any(("real", a) in w.shared for a in given):
            w.shared["real", node] = w.call("Add", [_real(w, a) for a in given])
        else:
            whole = w.call("Add", [w.operand(a, torch.int32, f"x.{i}") for i, a in enumerate(given)], "whole")
            w.shared["real", node] = w.call("Cast", [whole], to=onnx_type(torch.float32))
        return []
    if any(("real", a) in w.shared for a in given):  # a sum beyond 2^24 of one that is not
        return w.call("Add", [_whole(w, a) for a in given])
    return binary(w, node)


def _real(w: Writer, x: Node) -> str:
    return once(w, ("real", x), lambda: w.call("Cast", [w.name_of(x)], "real", to=onnx_type(torch.float32)))


def _whole(w: Writer, x: Node) -> str:
    if isinstance(w.values[x], str):
        return w.operand(x, torch.int32, "x")
    real = w.shared["real", x]
    return once(w, ("whole", x), lambda: w.call("Cast", [real], "whole", to=onnx_type(torch.int32)))
