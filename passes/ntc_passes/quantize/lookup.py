r"""Pointwise functions (GELU and its like): a table of as many entries as an activation has values.

The range of the integers in front of it need not be symmetric about 0: GELU is flat below -4, and values up to 8 may matter. So the
layer in front takes the middle z of the range into its bias, and all ``2**bits`` integers are used::

    %h = integer_linear(...)                 # stands for h - z: its bias is round((b_o - z) / s_o)
    %i = requantize(%h, ..., low, high)      # n = round((h - z) / s)
    %a = integer_lookup(%i, table, low)      # table[n - low] = round(f(n s + z) / s')

Where the layer has other readers too, z = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ntc.meta import module_of
from ntc_passes.quantize.activations import best_scale, gram_behind, relative_error, sample_rows
from ntc_passes.quantize.fixed_point import integer_dtype, nearest
from ntc_passes.quantize.walk import Constant, Value, Work, rows_of

__all__ = ["lookup"]

_SHRINK = tuple(0.9**k for k in range(16))
"""Of the distance of either end of the range from the median of the values."""


def lookup(work: Work, node: Node) -> Value:
    """A table in place of a pointwise function of one value."""
    source = node.args[0]
    assert isinstance(source, Node)
    value, options = work[source], work.at(node)
    limit = options.activation_limit
    exact = _apply(node, rows_of(value))
    sample = rows_of(value, sample_rows(value.data[0].shape[-1]))
    shiftable = value.kind == "accumulator" and len(source.users) == 1
    step, zero = _range(node, sample, limit, centred=not shiftable)
    if zero:
        _shift_bias(work, value, zero)
    index = work.requantize(source, value, step, -limit - 1, limit, f"{source.name}_index", "activation")
    results = _apply(node, sample)
    scale = best_scale(results, gram_behind(work, node, results), limit)
    points = torch.arange(-limit - 1, limit + 1, dtype=torch.float64) * step + zero
    table = nearest(_apply(node, points) / scale).clamp(-limit, limit).to(integer_dtype(limit))
    stored = Constant(f"{module_of(node) or node.name}.table", table)
    result, data = work.emit(node, torch.ops.ntc.integer_lookup.default, index, stored, -limit - 1)
    made = Value(result, "activation", torch.tensor([scale], dtype=torch.float64), data, bound=limit)
    work.notes[node.name] = {
        "bits": options.activation_bits, "scale": scale, "input_scale": step, "input_zero": zero,
        "relative_squared_error": relative_error(rows_of(made), exact),
    }  # fmt: skip
    return work.noted(made)


def _apply(node: Node, x: Tensor) -> Tensor:
    result: Tensor = node.target(x, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return result


def _range(node: Node, sample: Tensor, limit: int, centred: bool) -> tuple[float, float]:
    """Scale and middle of the input with the least squared error of the function's result.

    One end after the other is drawn in while that helps: ends that are never reached, or where the function is flat, cost precision
    everywhere else.
    """
    wanted = _apply(node, sample)
    middle = 0.0 if centred else float(sample.median())
    lowest, highest = min(float(sample.min()), middle), max(float(sample.max()), middle)

    def grid(low: float, high: float) -> tuple[float, float]:
        if centred:
            return max(max(high, -low) / limit, 1e-12), 0.0
        step = max((high - low) / (2 * limit + 1), 1e-12)
        return step, low + (limit + 1) * step

    def error(low: float, high: float) -> float:
        step, zero = grid(low, high)
        taken = nearest((sample - zero) / step).clamp(-limit - 1, limit) * step + zero
        return float((_apply(node, taken) - wanted).square().sum())

    low = min((middle + (lowest - middle) * k for k in _SHRINK), key=lambda x: error(x, highest))
    high = min((middle + (highest - middle) * k for k in _SHRINK), key=lambda x: error(low, x))
    low = min((middle + (lowest - middle) * k for k in _SHRINK), key=lambda x: error(x, high))
    return grid(low, high)


def _shift_bias(work: Work, value: Value, zero: float) -> None:
    """Make the sums of a layer stand for ``h - zero``: in its bias, which this pass made, and in what is known of it."""
    bias = value.node.args[2]
    assert isinstance(bias, Node)
    steps = nearest(zero / value.scale).to(torch.int32)
    work.program.tensor(bias).sub_(steps)
    value.data = [n - steps for n in value.data]
