r"""LayerNorm or RMSNorm of integers, and the quantization of its result, without a fraction anywhere.

With C channels, ``guard`` binary places more for the root and 16 for the normalised value:

    m   = round(sum_c x_c / C)                              centre; RMSNorm: m = 0
    d_c = x_c - m
    v   = floor(sum_c d_c^2 / C) + epsilon
    r   = max(isqrt(v 2^(2 guard)), 1)                      the root, times 2^guard
    n_c = round(d_c 2^(guard + 16) / r)                     d_c / sqrt(v) with 16 binary places
    y_c = clamp(round((n_c gain_c + offset_c) / 2^shift), low, high)

``gain`` and ``offset`` are weight and bias of the norm over the scale of the result, times ``2^(shift - 16)`` and ``2^shift``. The
scale of x cancels, but for ``epsilon``, which is the one of the norm over the square of that scale. Against real arithmetic the root
is wrong by 1 of ``sqrt(v) 2^guard``, and the mean by half a unit of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.integer import (
    check_integers,
    check_range,
    check_shift,
    dtype_of_range,
    integer_argument,
    integer_constants,
    isqrt,
    round_divide,
    round_shift,
)
from ntc.ops.interval import Bound, Inside, Interval, integers
from ntc.ops.spec import Counts, Operand, OpSpec, register
from ntc.spike_type import INTEGER, NodeType

__all__ = ["INTEGER_NORM", "PLACES", "integer_norm", "most_normal"]

PLACES = 16
"""Binary places of the normalised value."""


def _check(x: Tensor, gain: Tensor, offset: Tensor, epsilon: int, guard: int, shift: int, low: int, high: int) -> None:
    check_integers(x=x, gain=gain, offset=offset)
    for name, value in (("gain", gain), ("offset", offset)):
        if value.dim() != 1 or value.shape[0] not in (1, x.shape[-1]):
            raise ValueError(f"the {name} of a norm has shape [1] or [{x.shape[-1]}], and not {list(value.shape)}")
    if epsilon < 0 or not 0 <= guard <= 31:
        raise ValueError(f"a norm needs epsilon >= 0 and a guard in 0 ... 31, and not {epsilon} and {guard}")
    check_shift(shift)
    check_range(low, high)


@torch.library.custom_op("ntc::integer_norm", mutates_args=())
def integer_norm(
    x: Tensor, gain: Tensor, offset: Tensor, epsilon: int, guard: int, shift: int, low: int, high: int, centre: bool
) -> Tensor:
    """Normalise and quantize (see the module's docstring).

    Args:
        x: Integers ``[..., C]``.
        gain: ``[C]`` or ``[1]``, integers.
        offset: ``[C]`` or ``[1]``, integers.
        epsilon: Added to the variance, in squared units of x.
        guard: Binary places of the root, ``v 2^(2 guard) < 2^62``.
        shift: Binary places of gain times n, 0 to 62.
        low: Least result.
        high: Largest result.
        centre: LayerNorm; else RMSNorm.

    Returns:
        ``[..., C]``, int8 if the range fits, else int16 or int32.

    Raises:
        ValueError: For shapes, dtypes or numbers out of range.
    """
    _check(x, gain, offset, epsilon, guard, shift, low, high)
    d = x.to(torch.int64)
    channels = x.shape[-1]
    if centre:
        d = d - round_divide(d.sum(-1, keepdim=True), channels)
    v = torch.div((d * d).sum(-1, keepdim=True), channels, rounding_mode="floor") + epsilon
    root = isqrt(v << (2 * guard)).clamp_(min=1)
    n = round_divide(d << (guard + PLACES), root)
    y = round_shift(n * gain.to(torch.int64) + offset.to(torch.int64), shift)
    return y.clamp_(low, high).to(dtype_of_range(low, high))


@integer_norm.register_fake
def _fake(
    x: Tensor, gain: Tensor, offset: Tensor, epsilon: int, guard: int, shift: int, low: int, high: int, centre: bool
) -> Tensor:
    _check(x, gain, offset, epsilon, guard, shift, low, high)
    return x.new_empty(x.shape, dtype=dtype_of_range(low, high))


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    integer_argument(node, type_of)
    integer_constants(node, 1, 2)
    return INTEGER


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=8 * result.numel)


def most_normal(channels: int, epsilon: int, guard: int) -> int:
    """Largest ``|n|``.

    ``d^2 <= C v`` if epsilon > 0, so ``r > q - 1`` with ``q = |d| 2^guard / sqrt(C)``, and ``r >= max(1, q / 2)``. Without epsilon, v may
    be rounded down to half of its value, or to 0 if ``|d| < sqrt(C)``.
    """
    return (math.isqrt(channels) + 1 << PLACES + (1 if epsilon else max(2, guard))) + 1


def _bound(
    node: Node, context: int, x: Interval, gain: Tensor, offset: Tensor, epsilon: int, guard: int, shift: int, low: int, high: int,
    centre: bool,
) -> Bound:  # fmt: skip
    d, channels = x, len(x.low)
    if centre:
        ends = [(sum(end.tolist()) + channels // 2) // channels for end in (x.low, x.high)]
        d = x - Interval.of(*ends)
    squares = sum(max(abs(a), abs(b)) ** 2 for a, b in zip(d.low.tolist(), d.high.tolist(), strict=True))
    most, weight, bias = most_normal(channels, epsilon, guard), Interval(integers(gain), integers(gain)), integers(offset)
    scaled = Interval.of(-most, most) * weight + Interval(bias, bias)
    variance = Interval.of(0, squares // channels + epsilon << 2 * guard)
    half = (1 << shift) >> 1
    shifted = Interval.of(-d.magnitude << guard + PLACES, d.magnitude << guard + PLACES)
    inside = (
        Inside.over("sum of squares", Interval.of(0, squares), 64, "use fewer bits for the residual stream"),
        Inside.over("variance under the root", variance, 63, "use a smaller guard"),
        Inside.over("shifted difference", shifted, 63, "use a smaller guard"),
        Inside.over("normalised value", Interval.of(-most, most), 32, "use a smaller guard, or an epsilon above 0"),
        Inside.over("normalised value times gain", scaled | (scaled + Interval.of(half, half)), 63, "use a smaller shift"),
    )
    return Bound(scaled.round_shift(shift).clamp(low, high), inside)


INTEGER_NORM = register(
    OpSpec(target=torch.ops.ntc.integer_norm.default, infer=_infer, count=_count, kind="norm", bound=_bound)
)  # fmt: skip
