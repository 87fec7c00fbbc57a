r"""Linear layer of integers: ``y_o = sum_c x_c W_oc + b_o`` in int32.

Integer sums do not depend on their order, so every executor has the same result. The kernel takes the product through floating
point, which is exact while no partial sum exceeds what the format holds: float32 below ``2^24``, else float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.events import nonzero_products
from ntc.ops.integer import as_int32, check_integers, exact_matmul, integer_argument, integer_constants, largest
from ntc.ops.interval import Bound, Inside, Integers, Interval, integers
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, register
from ntc.ops.traffic import matrix
from ntc.spike_type import INTEGER, NodeType

__all__ = ["INTEGER_LINEAR", "integer_linear"]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_integers(x=x, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"a linear layer on {x.shape[-1]} channels has a weight of shape [O, {x.shape[-1]}], not {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"the bias of {weight.shape[0]} outputs has as many numbers, and not the shape {list(bias.shape)}")


@torch.library.custom_op("ntc::integer_linear", mutates_args=())
def integer_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a matrix and add a bias.

    Args:
        x: Integers ``[..., C]``.
        weight: Integers ``[O, C]``.
        bias: Integers ``[O]``, or None.

    Returns:
        ``[..., O]``, int32.

    Raises:
        ValueError: For shapes and dtypes that do not fit, or a sum that int32 does not hold.
    """
    _check(x, weight, bias)
    bound = largest(x) * int(weight.abs().sum(1, dtype=torch.int64).max()) if weight.dtype != torch.int8 else _bound_int8(x, weight)
    y = exact_matmul(x, weight.t(), bound)
    if bias is not None:
        y += bias
    return as_int32(y, "the sum of a linear layer")


def _bound_int8(x: Tensor, weight: Tensor) -> int:
    """Without a pass over the weight where the shape alone is enough."""
    coarse = largest(x) * 128 * weight.shape[1]
    return coarse if coarse < 1 << 24 else largest(x) * int(weight.to(torch.int16).abs().sum(1, dtype=torch.int64).max())


@integer_linear.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    integer_argument(node, type_of)
    integer_constants(node, 1, 2)
    return INTEGER


def _payloads(node: Node) -> bool:
    """Whether the input is a decoded train: spike counts, of which only those that are not zero cause work."""
    x = node.args[0]
    return isinstance(x, Node) and x.target is torch.ops.ntc.decode.default


def _measure(tensors: Sequence[Tensor], result: Tensor, node: Node) -> dict[str, float]:
    if _payloads(node):
        return {"payloads": float((tensors[0] != 0).sum())}
    return {"effective_macs": nonzero_products(*tensors[:2])}


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    """Counts of spikes are payloads: one product each serves all steps. An activation is a number like any other."""
    fan_out = operands[1].shape[0]
    dense = operands[0].numel * fan_out
    if _payloads(node):
        return Counts(dense_macs=dense, graded_macs=measured["payloads"] * fan_out)
    return Counts(dense_macs=dense, macs=dense)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return matrix(operands, result, _count(node, operands, result, measured))


def _bound(node: Node, context: int, x: Interval, weight: Tensor, bias: Tensor | None) -> Bound:
    row = int(weight.to(torch.int64).abs().sum(1).max())
    sums = _sums(weight, x, row)
    # In whatever order the sum is taken, a part of it is a sum in which other terms are 0.
    partial = _sums(weight, x | Interval.of(0, 0), row)
    if bias is not None:
        sums = sums + Interval(integers(bias), integers(bias))
    remedy = "use fewer bits for weights or activations"
    return Bound(sums, (Inside.over("accumulator", partial | sums, 32, remedy),))


def _sums(weight: Tensor, x: Interval, row: int) -> Interval:
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    low = _products(positive, x.low, row) + _products(negative, x.high, row)
    return Interval(low, _products(positive, x.high, row) + _products(negative, x.low, row))


def _products(weight: Tensor, vector: Integers, row: int) -> Integers:
    """``W v`` in Python integers; by float64 while that is exact."""
    most = max(abs(int(v)) for v in vector)
    if row * most < 1 << 53:
        column = torch.tensor([int(v) for v in vector], dtype=torch.float64)
        return integers((weight.double() @ column).to(torch.int64))
    result: Integers = weight.numpy().astype(object) @ vector
    return result


INTEGER_LINEAR = register(
    OpSpec(
        target=torch.ops.ntc.integer_linear.default, infer=_infer, count=_count, moves=_moves, measure=_measure, element="projection",
        kind="projection", bound=_bound,
    )
)  # fmt: skip
