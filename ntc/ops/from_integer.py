r"""From integers to floating point, exactly: ``y = x 2^exponent``. The last op of an integer program, which returns float32 logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.integer import check_integers, integer_argument
from ntc.ops.interval import Bound, Inside, Interval
from ntc.ops.spec import Counts, Operand, OpSpec, register
from ntc.spike_type import ANALOG, NodeType

__all__ = ["FROM_INTEGER", "from_integer"]


def _check(x: Tensor, exponent: int) -> None:
    check_integers(x=x)
    if not -126 <= exponent <= 103:
        raise ValueError(f"2**exponent times an integer below 2**24 is a normal float32 for -126 ... 103, and not for {exponent}")


@torch.library.custom_op("ntc::from_integer", mutates_args=())
def from_integer(x: Tensor, exponent: int) -> Tensor:
    """Scale integers by a power of two.

    Args:
        x: Integers of any shape, ``|x| < 2^24``: float32 holds each of them.
        exponent: -126 to 103.

    Returns:
        The shape of x, float32.

    Raises:
        ValueError: If x holds no integers, or the exponent is out of range.
    """
    _check(x, exponent)
    return x.to(torch.float32) * 2.0**exponent


@from_integer.register_fake
def _fake(x: Tensor, exponent: int) -> Tensor:
    _check(x, exponent)
    return x.new_empty(x.shape, dtype=torch.float32)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    integer_argument(node, type_of)
    return ANALOG


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


def _bound(node: Node, context: int, x: Interval, exponent: int) -> Bound:
    most = (1 << 24) - 1
    return Bound(x, (Inside("integer in float32", *x.ends, -most, most, "clamp the logits to fewer bits"),))


FROM_INTEGER = register(OpSpec(target=torch.ops.ntc.from_integer.default, infer=_infer, count=_count, kind="scale", bound=_bound))
