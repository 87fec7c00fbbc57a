r"""Scale each token by a factor that depends on its position alone: ``y_i = x_i / (i + 1)``, or by a learned table.

Causal spiking self-attention has no softmax, so its row sums grow with the position; softmax rows sum to one. Dividing
by the number of keys that a query sees, i + 1 for position i = 0..L-1, is the normaliser with no parameters. With a table
of one positive factor per head and position,

    y[i, h, :] = x[i, h, :] table[h, i]

it is one that training can move: set to ``1 / (i + 1)`` it is the former. In a netlist both are a gain per token, known in
advance, and the token at hand needs no other one: they stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, TypeMismatch, register
from ntc.spike_type import Analog, CurrentType, NodeType

__all__ = ["POSITION_SCALE", "position_scale", "position_table"]


def position_table(heads: int, context: int) -> Tensor:
    """The table that divides by the position: ``1 / (i + 1)``, ``[H, context]``."""
    return (1.0 / torch.arange(1, context + 1)).expand(heads, context).contiguous()


def _seen(x: Tensor) -> Tensor:
    # bfloat16 has no whole numbers between 256 and 258.
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.arange(1, x.shape[-2] + 1, dtype=dtype, device=x.device).unsqueeze(-1)


def _factor(x: Tensor, table: Tensor) -> Tensor:
    """``[L, H, 1]``."""
    return table[:, : x.shape[-2]].t().unsqueeze(-1)


def _check(current: Tensor, table: Tensor | None) -> None:
    if table is None:
        return
    if table.dim() != 2 or current.shape[-1] % table.shape[0]:
        raise ValueError(f"a position table has shape [H, context] with H a divisor of {current.shape[-1]}, not {list(table.shape)}")
    if current.shape[-2] > table.shape[1]:
        raise ValueError(f"the position table has factors for {table.shape[1]} tokens, and the sequence has {current.shape[-2]}")


def _scaled(current: Tensor, table: Tensor | None = None) -> Tensor:
    if table is None:
        return (current / _seen(current)).to(current.dtype)
    parts = current.reshape(*current.shape[:-1], table.shape[0], -1)
    scaled: Tensor = parts * _factor(current, table)
    return scaled.flatten(-2).to(current.dtype)


@torch.library.custom_op("ntc::position_scale", mutates_args=())
def position_scale(current: Tensor, table: Tensor | None = None) -> Tensor:
    """Scale by position (see the module's docstring).

    Args:
        current: ``[..., L, C]``, C = H D.
        table: Factors > 0, ``[H, context]``, context >= L; None divides by i + 1.

    Returns:
        ``[..., L, C]`` in the dtype of the current.

    Raises:
        ValueError: If the table has another rank, H does not divide C, or there are more tokens than the table has columns.
    """
    _check(current, table)
    return _scaled(current, table).contiguous()


@position_scale.register_fake
def _fake(current: Tensor, table: Tensor | None = None) -> Tensor:
    _check(current, table)
    return current.new_empty(current.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, table = inputs
    ctx.save_for_backward(*([] if table is None else [current, table]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dL/dx_i = table_i g_i``, ``dL/dtable[h, i] = sum over batch, steps and channels of head h of g x``."""
    if not ctx.saved_tensors:
        return _scaled(grad), None
    current, table = ctx.saved_tensors
    to_table = torch.zeros_like(table)
    products = grad.to(table.dtype) * current.to(table.dtype)
    products = products.reshape(*products.shape[:-1], table.shape[0], -1).sum(-1)  # [..., L, H]
    to_table[:, : current.shape[-2]] = products.flatten(0, -3).sum(0).t() if products.dim() > 2 else products.t()
    return _scaled(grad, table), to_table


position_scale.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x = node.args[0]
    assert isinstance(x, Node)
    given = type_of(x)
    if not isinstance(given, CurrentType | Analog):
        raise TypeMismatch(f"position_scale takes a current or an analog value, and %{x.name} is {given}", x)
    table = node.args[1] if len(node.args) > 1 else None
    if isinstance(table, Node) and not isinstance(type_of(table), Analog):
        raise TypeMismatch(f"a position table is an analog constant, and %{table.name} is {type_of(table)}", table)
    check_constant(node, table, lambda x: x > 0, "a position table holds factors > 0")
    return given


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


_ONNX = """
<domain: "ntc", opset_import: ["": 20]>
PositionScale (current) => (y)
{
    tail = Shape <start = -2, end = -1> (current)
    length = Squeeze(tail)
    one = Constant <value_int = 1> ()
    stop = Add(length, one)
    seen = Range(one, stop, one)
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze(seen, last)
    divisor = CastLike(column, current)
    y = Div(current, divisor)
}
<domain: "ntc", overload: "table", opset_import: ["": 20]>
PositionScale (current, table) => (y)
{
    first = Constant <value_ints = [0]> ()
    columns = Constant <value_ints = [1]> ()
    length = Shape <start = -2, end = -1> (current)
    seen = Slice(table, first, length, columns)
    by_token = Transpose <perm = [1, 0]> (seen)
    last = Constant <value_ints = [-1]> ()
    factor = Unsqueeze(by_token, last)
    lead = Shape <end = -1> (current)
    heads = Shape <start = 0, end = 1> (table)
    split = Concat <axis = 0> (lead, heads, last)
    parts = Reshape(current, split)
    scaled = Mul(parts, factor)
    whole = Shape(current)
    y = Reshape(scaled, whole)
}
"""
POSITION_SCALE = register(
    OpSpec(
        target=torch.ops.ntc.position_scale.default, infer=_infer, count=_count, element="scale", kind="attention", onnx=_ONNX,
        traced=_scaled,  # the kernel is plain torch operations
    )
)
