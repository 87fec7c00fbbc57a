r"""The firing rate of an IF neuron in the limit of many time steps.

    r = clip(x / theta, 0, 1)          binary
    r = clip(x / theta, -1, 1)         signed

This is what ``ntc::integrate_fire`` with ``v0 = 1/2`` rounds to multiples of 1/T (``|rate_T - r| <= 1 / (2 T)`` for a
constant current). A program that holds this op is the float limit of the spiking program that ``insert-neurons`` makes
of it. It is positively homogeneous: ``r(a x, a theta) = r(x, theta)`` for a > 0, which is why thresholds fold exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import traced
from ntc.ops.if_neuron import check_threshold, check_threshold_value
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import Analog, NodeType, RateType

__all__ = ["IF_RATE", "if_rate"]


@torch.library.custom_op("ntc::if_rate", mutates_args=())
def if_rate(current: Tensor, threshold: Tensor, signed: bool) -> Tensor:
    """Firing rate in the limit T to infinity.

    Args:
        current: Constant input current ``[B, L, C]``.
        threshold: Firing threshold theta > 0, ``[C]`` or ``[1]``.
        signed: Ternary neuron: rates in ``[-1, 1]`` instead of ``[0, 1]``.

    Returns:
        Rates ``[B, L, C]``, dimensionless.
    """
    check_threshold(threshold, current.shape[-1])
    return (current / threshold).clamp(-1.0 if signed else 0.0, 1.0).contiguous()


@if_rate.register_fake
def _fake(current: Tensor, threshold: Tensor, signed: bool) -> Tensor:
    check_threshold(threshold, current.shape[-1])
    return current.new_empty(current.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, threshold, ctx.signed = inputs
    ctx.save_for_backward(current, threshold)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    current, threshold = ctx.saved_tensors
    rate = current / threshold
    inside = ((rate > (-1.0 if ctx.signed else 0.0)) & (rate < 1.0)).to(grad.dtype)
    to_current = grad * inside / threshold
    return to_current, (-to_current * rate).sum_to_size(threshold.shape), None


if_rate.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current = node.args[0]
    assert isinstance(current, Node)
    if not isinstance(type_of(current), Analog):
        raise TypeMismatch(f"a firing rate is taken of an analog current, and %{current.name} is {type_of(current)}", current)
    check_threshold_value(node)
    return RateType(signed=bool(node.args[2]))


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=2 * result.numel)


_ONNX = """
<domain: "ntc", opset_import: ["": 20]>
IfRate <signed> (current, threshold) => (rate)
{
    sign = Constant <value_int: int = @signed> ()
    minus = Neg(sign)
    lowest = CastLike(minus, current)
    unit = Constant <value_float = 1.0> ()
    highest = CastLike(unit, current)
    ratio = Div(current, threshold)
    rate = Clip(ratio, lowest, highest)
}
"""
IF_RATE = register(
    OpSpec(target=torch.ops.ntc.if_rate.default, traced=traced.if_rate, infer=_infer, count=_count, kind="neurons", onnx=_ONNX)
)
