r"""From a train of spikes or currents back to one analog value per neuron.

    rate    y = (1/T) sum_t s(t)
    count   y = sum_t s(t)
    phase   y = sum_t 2**-(t+1) s(t),  t = 0..T-1

The code is part of the train's type; decoding by another one does not compile. Integer trains (int8 spikes, int32 currents of the
integer grade) have the code ``count``, and their sum is int32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import traced
from ntc.ops.interval import Bound, Interval
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import ANALOG, CurrentType, NodeType, SpikeType, type_of_tensor

__all__ = ["DECODE", "PHASE_WEIGHTS", "TICKS", "decode", "decode_weights"]


def decode_weights(code: str, steps: int) -> list[float]:
    """Weight d(t) of each time step in the decoded sum."""
    if code == "rate":
        return [1.0 / steps] * steps
    if code == "count":
        return [1.0] * steps
    if code == "phase":
        return [2.0 ** -(t + 1) for t in range(steps)]
    raise ValueError(f"unknown spike code {code!r}")


def _check_integer(code: str) -> None:
    if code != "count":
        raise ValueError(f"integer trains decode by count, their sum, and not by {code}: its result would not be an integer")


@torch.library.custom_op("ntc::decode", mutates_args=())
def decode(train: Tensor, code: str) -> Tensor:
    """Decode a train ``[T, ...]`` of spikes or currents to its value ``[...]``.

    Args:
        train: Spikes or currents, axis 0 is the time step.
        code: ``rate``, ``count`` or ``phase``.

    Returns:
        The decoded value, without axis 0; int32 of an integer train.

    Raises:
        ValueError: If the code is unknown, or an integer train is not decoded by ``count``.
    """
    if not train.is_floating_point():
        _check_integer(code)
        return train.sum(0, dtype=torch.int32).contiguous()
    if code == "rate":
        return train.mean(0).contiguous()
    if code == "count":
        return train.sum(0).contiguous()
    weights = torch.tensor(decode_weights(code, train.shape[0]), dtype=train.dtype, device=train.device)
    value: Tensor = torch.tensordot(weights, train, dims=1)
    return value.contiguous()


@decode.register_fake
def _fake(train: Tensor, code: str) -> Tensor:
    if not train.is_floating_point():
        _check_integer(code)
        return train.new_empty(train.shape[1:], dtype=torch.int32)
    return train.new_empty(train.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    train, ctx.code = inputs
    ctx.steps = train.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.stack([grad * w for w in decode_weights(ctx.code, ctx.steps)]), None


decode.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    train, code = node.args
    assert isinstance(train, Node)
    given = type_of(train)
    if not isinstance(given, SpikeType | CurrentType):
        raise TypeMismatch(f"decode takes spikes or currents, and %{train.name} is {given}", train)
    if given.code != code:
        raise TypeMismatch(f"decode reads the {code} code, and %{train.name} is {given}", train)
    return type_of_tensor(node.meta["val"]) if "val" in node.meta else ANALOG


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=operands[0].numel)


def _bound(node: Node, context: int, train: Interval, code: str) -> Bound:
    argument = node.args[0]
    assert isinstance(argument, Node)
    steps = int(argument.meta["val"].shape[0])
    return Bound(train * Interval.of(steps, steps))


TICKS = """
    axes = Constant <value_ints = [0]> ()
    one = Constant <value_int = 1> ()
    head = Shape <end = 1> ({0})
    steps = Squeeze(head, axes)
    after = Add(steps, one)
    numbers = Range(one, after, one)
    numbers_like = CastLike(numbers, {0})
    shape = Shape({0})
    rank = Size(shape)
    others = Sub(rank, one)
    length = Unsqueeze(others, axes)
    single = Constant <value_ints = [1]> ()
    ones = Expand(single, length)
    column = Concat <axis = 0> (head, ones)
    ticks = Reshape(numbers_like, column)
"""
"""ONNX: ``ticks`` = 1 ... T in the shape ``[T, 1, ..., 1]`` and the type of the train named."""

PHASE_WEIGHTS = """
    half_value = Constant <value_float = 0.5> ()
    half = CastLike(half_value, ticks)
    weights = Pow(half, ticks)
"""
"""ONNX, after ``TICKS``: ``weights`` of the phase code, ``2^-t``."""

# A mean or a sum of spikes is the same bits in any order; of real currents it depends on the order from T = 5 on.
_ONNX = f"""
<domain: "ntc", overload: "rate", opset_import: ["": 20]>
Decode <code> (train) => (value)
{{
    time = Constant <value_ints = [0]> ()
    value = ReduceMean <keepdims = 0> (train, time)
}}

<domain: "ntc", overload: "count", opset_import: ["": 20]>
Decode <code> (train) => (value)
{{
    time = Constant <value_ints = [0]> ()
    value = ReduceSum <keepdims = 0> (train, time)
}}

<domain: "ntc", overload: "phase", opset_import: ["": 20]>
Decode <code> (train) => (value)
{{
    {TICKS.format("train")}
    {PHASE_WEIGHTS}
    weighted = Mul(train, weights)
    value = ReduceSum <keepdims = 0> (weighted, axes)
}}
"""

DECODE = register(
    OpSpec(
        target=torch.ops.ntc.decode.default, traced=traced.decode, infer=_infer, count=_count, element="decode", kind="decode",
        onnx=_ONNX, bound=_bound,
    )
)  # fmt: skip
