r"""Scale each token by a factor that depends on its position alone: ``y_i = x_i / (i + 1)``, or by a learned table.

Causal spiking self-attention has no softmax, so its row sums grow with the position; softmax rows sum to one. Dividing
by the number of keys that a query sees, i + 1 for position i = 0..L-1, is the normaliser with no parameters. With a table
of one positive factor per head and position,

    y[i, h, :] = x[i, h, :] table[h, i]

it is one that training can move: set to ``1 / (i + 1)`` it is the former. In a netlist both are a gain per token, known in
advance, and the token at hand needs no other one: they stream. In a streaming program the first token given stands at ``start``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.if_neuron import check_constant
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.traffic import tokens_of, values
from ntc.spike_type import Analog, CurrentType, Index, NodeType

__all__ = ["POSITION_SCALE", "position_scale", "position_table"]


def position_table(heads: int, context: int) -> Tensor:
    """The table that divides by the position: ``1 / (i + 1)``, ``[H, context]``."""
    return (1.0 / torch.arange(1, context + 1)).expand(heads, context).contiguous()


def _seen(x: Tensor, start: Tensor | None) -> Tensor:
    # bfloat16 has no whole numbers between 256 and 258.
    dtype = torch.promote_types(x.dtype, torch.float32)
    seen = torch.arange(1, x.shape[-2] + 1, dtype=dtype, device=x.device)
    return (seen if start is None else seen + start).unsqueeze(-1)


def _positions(x: Tensor, start: Tensor | None) -> Tensor:
    numbers = torch.arange(x.shape[-2], device=x.device)
    return numbers if start is None else start + numbers


def _factor(x: Tensor, table: Tensor, start: Tensor | None) -> Tensor:
    """``[L, H, 1]``."""
    part = table[:, : x.shape[-2]] if start is None else table.index_select(1, _positions(x, start))
    return part.t().unsqueeze(-1)


def _check(current: Tensor, table: Tensor | None, start: Tensor | None) -> None:
    if start is not None and tuple(start.shape) != (1,):
        raise ValueError(f"the position of the first token is one number, shape [1], not {list(start.shape)}")
    if table is None:
        return
    if table.dim() != 2 or current.shape[-1] % table.shape[0]:
        raise ValueError(f"a position table has shape [H, context] with H a divisor of {current.shape[-1]}, not {list(table.shape)}")
    if current.shape[-2] > table.shape[1]:
        raise ValueError(f"the position table has factors for {table.shape[1]} tokens, and the sequence has {current.shape[-2]}")


def _scaled(current: Tensor, table: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    if table is None:
        return (current / _seen(current, start)).to(current.dtype)
    parts = current.reshape(*current.shape[:-1], table.shape[0], -1)
    scaled: Tensor = parts * _factor(current, table, start)
    return scaled.flatten(-2).to(current.dtype)


@torch.library.custom_op("ntc::position_scale", mutates_args=())
def position_scale(current: Tensor, table: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    """Scale by position (see the module's docstring).

    Args:
        current: ``[..., L, C]``, C = H D.
        table: Factors > 0, ``[H, context]``, context >= L; None divides by i + 1.
        start: Position of the first token, int64 ``[1]``; None = 0.

    Returns:
        ``[..., L, C]`` in the dtype of the current.

    Raises:
        ValueError: If the table has another rank, H does not divide C, or there are more tokens than the table has columns.
        RuntimeError: If the table ends before the last token that follows ``start``.
    """
    _check(current, table, start)
    return _scaled(current, table, start).contiguous()


@position_scale.register_fake
def _fake(current: Tensor, table: Tensor | None = None, start: Tensor | None = None) -> Tensor:
    _check(current, table, start)
    return current.new_empty(current.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, table, start = inputs
    ctx.save_for_backward(None if table is None else current, table, start)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    """``dL/dx_i = table_i g_i``, ``dL/dtable[h, i] = sum over batch, steps and channels of head h of g x``."""
    current, table, start = ctx.saved_tensors
    if table is None:
        return _scaled(grad, None, start), None, None
    products = grad.to(table.dtype) * current.to(table.dtype)
    products = products.reshape(*products.shape[:-1], table.shape[0], -1).sum(-1)  # [..., L, H]
    by_token = (products.flatten(0, -3).sum(0) if products.dim() > 2 else products).t()
    to_table = torch.zeros_like(table).index_add(1, _positions(current, start), by_token)
    return _scaled(grad, table, start), to_table, None


position_scale.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    x = node.args[0]
    assert isinstance(x, Node)
    given = type_of(x)
    if not isinstance(given, CurrentType | Analog):
        raise TypeMismatch(f"position_scale takes a current or an analog value, and %{x.name} is {given}", x)
    table = node.args[1] if len(node.args) > 1 else None
    start = node.args[2] if len(node.args) > 2 else None
    if isinstance(start, Node) and not isinstance(type_of(start), Index):
        raise TypeMismatch(f"a position is an index, and %{start.name} is {type_of(start)}", start)
    if isinstance(table, Node) and not isinstance(type_of(table), Analog):
        raise TypeMismatch(f"a position table is an analog constant, and %{table.name} is {type_of(table)}", table)
    check_constant(node, table, lambda x: x > 0, "a position table holds factors > 0")
    return given


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return Counts(elementwise=result.numel)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Of a table ``[H, context]`` a token reads one column."""
    read = sum(tokens_of(result, result.type) * o.shape[0] for o in operands[1:] if len(o.shape) == 2)
    return values(operands[0]) + values(result) + Traffic(weights=read, sweep=read)


def _onnx(table: bool, start: bool) -> str:
    """The function with or without a table, from the beginning of a sequence or from ``start``."""
    first = "start" if start else "zeroth"
    inputs = ["current", *["table"] * table, *["start"] * start]
    overload = ".".join(inputs[1:])
    head = f"""
<domain: "ntc",{f' overload: "{overload}",' if overload else ""} opset_import: ["": 20]>
PositionScale ({", ".join(inputs)}) => (y)
{{
    zeroth = Constant <value_ints = [0]> ()
    length = Shape <start = -2, end = -1> (current)
    stop = Add({first}, length)
    last = Constant <value_ints = [-1]> ()
"""
    if table:
        return head + f"""
    columns = Constant <value_ints = [1]> ()
    seen = Slice(table, {first}, stop, columns)
    by_token = Transpose <perm = [1, 0]> (seen)
    factor = Unsqueeze(by_token, last)
    lead = Shape <end = -1> (current)
    heads = Shape <start = 0, end = 1> (table)
    split = Concat <axis = 0> (lead, heads, last)
    parts = Reshape(current, split)
    scaled = Mul(parts, factor)
    whole = Shape(current)
    y = Reshape(scaled, whole)
}}
"""
    return head + f"""
    one = Constant <value_int = 1> ()
    first = Squeeze({first})
    end = Squeeze(stop)
    first_seen = Add(first, one)
    end_seen = Add(end, one)
    seen = Range(first_seen, end_seen, one)
    column = Unsqueeze(seen, last)
    divisor = CastLike(column, current)
    y = Div(current, divisor)
}}
"""


_ONNX = "".join(_onnx(table, start) for table in (False, True) for start in (False, True))
POSITION_SCALE = register(
    OpSpec(
        target=torch.ops.ntc.position_scale.default, infer=_infer, count=_count, moves=_moves, element="scale", kind="attention",
        onnx=_ONNX,
        traced=_scaled,  # the kernel is plain torch operations
    )
)
