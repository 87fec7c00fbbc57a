r"""Change the scale of integers: ``y = clamp(round(x m / 2^shift), low, high)``.

``m / 2^shift`` is the ratio of two scales, known at compile time: one number, one per channel, or one row per position in the renewal
period of spiking attention (``r = i mod R`` for the token at position i), whose counts have a scale that depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.integer import (
    check_integers,
    check_per_channel_or_position,
    check_range,
    check_shift,
    dtype_of_range,
    integer_argument,
    integer_constants,
    round_shift,
)  # fmt: skip
from ntc.ops.interval import Bound, Inside, Interval, integers
from ntc.ops.spec import Counts, Operand, OpSpec, register
from ntc.spike_type import NodeType

__all__ = ["REQUANTIZE", "REQUANTIZE_STREAM", "by_position", "requantize", "requantize_stream"]


def _check(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int) -> None:
    check_integers(x=x, multiplier=multiplier)
    check_per_channel_or_position("a multiplier", multiplier, x.shape[-1])
    check_shift(shift)
    check_range(low, high)


def by_position(table: Tensor, length: int, start: Tensor | None = None) -> Tensor:
    """Row ``(start + i) mod R`` of a table ``[R, C]`` for each of ``i = 0 ... length - 1``; anything else as it is."""
    if table.dim() < 2 or table.shape[0] == 1:
        return table
    numbers = torch.arange(length, device=table.device)
    return table[(numbers if start is None else numbers + start) % table.shape[0]]


@torch.library.custom_op("ntc::requantize", mutates_args=())
def requantize(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int) -> Tensor:
    """Multiply, shift, round, clamp.

    Args:
        x: Integers ``[..., L, C]``, with or without time steps in front.
        multiplier: Integers below 2^31, ``[1]``, ``[C]`` or ``[R, C]`` (by position mod R).
        shift: 0 to 62.
        low: Least result.
        high: Largest result.

    Returns:
        The shape of x; int8 if the range fits, else int16 or int32.

    Raises:
        ValueError: For shapes, dtypes or numbers out of range.
    """
    _check(x, multiplier, shift, low, high)
    return _rounded(x, by_position(multiplier, x.shape[-2]), shift, low, high)


def _rounded(x: Tensor, factor: Tensor, shift: int, low: int, high: int) -> Tensor:
    return round_shift(x.to(torch.int64) * factor, shift).clamp_(low, high).to(dtype_of_range(low, high))


@requantize.register_fake
def _fake(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int) -> Tensor:
    _check(x, multiplier, shift, low, high)
    return x.new_empty(x.shape, dtype=dtype_of_range(low, high))


@torch.library.custom_op("ntc::requantize_stream", mutates_args=())
def requantize_stream(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int, start: Tensor) -> Tensor:
    """The same for the next tokens of a sequence, the first of which stands at position ``start``, int64 ``[1]``."""
    _check(x, multiplier, shift, low, high)
    return _rounded(x, by_position(multiplier, x.shape[-2], start), shift, low, high)


@requantize_stream.register_fake
def _fake_stream(x: Tensor, multiplier: Tensor, shift: int, low: int, high: int, start: Tensor) -> Tensor:
    _check(x, multiplier, shift, low, high)
    return x.new_empty(x.shape, dtype=dtype_of_range(low, high))


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    integer_constants(node, 1)
    return integer_argument(node, type_of, currents=True)


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


def _bound(
    node: Node, context: int, x: Interval, multiplier: Tensor, shift: int, low: int, high: int, start: None = None
) -> Bound:  # fmt: skip
    """Any row may meet any value, wherever the tokens begin."""
    rows = multiplier if multiplier.dim() == 2 else multiplier.unsqueeze(0)
    factor = Interval(*(integers(end) for end in torch.aminmax(rows, dim=0)))
    product = x * factor
    half = (1 << shift) >> 1
    rounded = Interval(np.minimum(product.low, 0), np.maximum(product.high, 0) + half)
    inside = Inside.over("product", rounded, 63, "use a smaller multiplier and shift")
    return Bound(product.round_shift(shift).clamp(low, high), (inside,))


REQUANTIZE = register(
    OpSpec(target=torch.ops.ntc.requantize.default, infer=_infer, count=_count, element="scale", kind="scale", bound=_bound)
)
REQUANTIZE_STREAM = register(
    OpSpec(target=torch.ops.ntc.requantize_stream.default, infer=_infer, count=_count, element="scale", kind="scale", bound=_bound)
)
