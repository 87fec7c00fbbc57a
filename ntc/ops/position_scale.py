r"""Divide by the number of keys that a query sees: ``y_i = x_i / (i + 1)`` for token position i = 0..L-1.

Causal spiking self-attention has no softmax, so its row sums grow with the position; softmax rows sum to one. Dividing
by the position is the normaliser with no parameters. In a netlist it is a gain per token, known in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import Analog, CurrentType, NodeType

__all__ = ["POSITION_SCALE", "position_scale"]


def _seen(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-2] + 1, dtype=x.dtype, device=x.device).unsqueeze(-1)


@torch.library.custom_op("ntc::position_scale", mutates_args=())
def position_scale(x: Tensor) -> Tensor:
    """``x[..., i, :] / (i + 1)`` for ``x`` of shape ``[..., L, C]``."""
    return (x / _seen(x)).contiguous()


@position_scale.register_fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    return None


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad / _seen(grad)


position_scale.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x = node.args[0]
    assert isinstance(x, Node)
    given = type_of(x)
    if not isinstance(given, CurrentType | Analog):
        raise TypeMismatch(f"position_scale takes a current or an analog value, and %{x.name} is {given}", x)
    return given


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


_ONNX = """
<domain: "ntc", opset_import: ["": 20]>
PositionScale (x) => (y)
{
    tail = Shape <start = -2, end = -1> (x)
    length = Squeeze(tail)
    one = Constant <value_int = 1> ()
    stop = Add(length, one)
    seen = Range(one, stop, one)
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze(seen, last)
    divisor = CastLike(column, x)
    y = Div(x, divisor)
}
"""
POSITION_SCALE = register(
    OpSpec(target=torch.ops.ntc.position_scale.default, infer=_infer, count=_count, element="scale", kind="attention", onnx=_ONNX)
)
