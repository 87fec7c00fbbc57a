r"""Divide each token and head by the row sum of its attention scores, taken on the decoded value.

    z_i[h]    = mean over t of Q(t)_i . sum_{j <= i} K(t)_j                the row sum of the scores, averaged over the steps
    y(t)_i[c] = x(t)_i[c] / max(|z_i[h]|, 1)

Softmax rows sum to one; with this normaliser so do the rows of spiking attention, on average over the steps (linear
attention's denominator, Katharopoulos et al. 2020, arXiv 2006.16236). The mean over the steps is one factor for all of them,
so it commutes with the decode of the rate code. The sum of keys is a state of ``Hk D`` counters per step: it streams, and a
spike of K or of Q costs one accumulate. Below one coincidence per step nothing is divided, which also keeps ternary scores
that cancel from making the quotient large. The streaming form, ``ntc::row_sum_scale_stream``, takes and returns those sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, TypeMismatch, register
from ntc.ops.traffic import values
from ntc.spike_type import ANALOG, Analog, CurrentType, NodeType, RateType, SpikeType

__all__ = ["ROW_SUM_SCALE", "ROW_SUM_SCALE_STREAM", "row_sum_scale", "row_sum_scale_stream"]


def _check(current: Tensor, query: Tensor, key: Tensor, heads: int, kv_heads: int) -> None:
    if current.dim() not in (3, 4) or current.shape[:-1] != query.shape[:-1] or query.shape[:-1] != key.shape[:-1]:
        shapes = ", ".join(str(list(x.shape)) for x in (current, query, key))
        raise ValueError(f"row_sum_scale takes a current, queries and keys of [B, L, C] or [T, B, L, C], same T, B and L, not {shapes}")
    if heads < 1 or kv_heads < 1 or heads % kv_heads or current.shape[-1] % heads:
        raise ValueError(f"row_sum_scale: {kv_heads} key heads must divide {heads} heads, and those {current.shape[-1]} channels")
    if query.shape[-1] * kv_heads != key.shape[-1] * heads or key.shape[-1] % kv_heads:
        raise ValueError(
            f"row_sum_scale: {query.shape[-1]} query channels in {heads} heads do not fit {key.shape[-1]} key channels in {kv_heads}"
        )


def _timed(x: Tensor, *split: int) -> Tensor:
    """``[T, B, L, *split, D]``, at least in float32: sums of bfloat16 lose whole spikes beyond 256."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], *split, -1)
    return x if x.dim() == 4 + len(split) else x.unsqueeze(0)


def _row_sums(
    query: Tensor, key: Tensor, heads: int, kv_heads: int, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``z [B, L, Hk, g]``, Q ``[T, B, L, Hk, g, D]`` and the running sum of keys ``[T, B, L, Hk, 1, D]``."""
    q = _timed(query, kv_heads, heads // kv_heads)
    keys = _timed(key, kv_heads, 1).cumsum(2)
    if sums is not None:
        keys = keys + _timed(sums.unsqueeze(-2), kv_heads, 1)
    return (q * keys).sum(-1).sum(0) / q.shape[0], q, keys


def _divided(current: Tensor, z: Tensor, heads: int) -> Tensor:
    divisor = z.abs().clamp(min=1.0).flatten(-2).unsqueeze(-1)  # [B, L, H, 1]
    return (_timed(current, heads) / divisor).reshape(current.shape).to(current.dtype)


def _scaled(current: Tensor, query: Tensor, key: Tensor, heads: int, kv_heads: int) -> Tensor:
    return _divided(current, _row_sums(query, key, heads, kv_heads)[0], heads)


@torch.library.custom_op("ntc::row_sum_scale", mutates_args=())
def row_sum_scale(current: Tensor, query: Tensor, key: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Divide spiking attention by its row sums (see the module's docstring).

    Args:
        current: Result of spiking attention ``[T, B, L, H Dv]``, or of rates ``[B, L, H Dv]`` (then T = 1 above).
        query: Spikes ``[T, B, L, H D]``, or rates ``[B, L, H D]``.
        key: Spikes ``[T, B, L, Hk D]``, or rates ``[B, L, Hk D]``.
        heads: H.
        kv_heads: Hk; divides H, and head h reads the keys of key head ``h // (H / Hk)``.

    Returns:
        The shape and dtype of the current.

    Raises:
        ValueError: If the shapes do not fit each other or the heads.
    """
    _check(current, query, key, heads, kv_heads)
    return _scaled(current, query, key, heads, kv_heads).contiguous()


@row_sum_scale.register_fake
def _fake(current: Tensor, query: Tensor, key: Tensor, heads: int, kv_heads: int) -> Tensor:
    _check(current, query, key, heads, kv_heads)
    return current.new_empty(current.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    current, query, key, ctx.heads, ctx.kv_heads = inputs
    ctx.save_for_backward(current, query, key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Quotient and product rule, with n = max(|z|, 1) and the running sum of keys read backwards.

    ``dL/dz = -sign(z) 1[|z| > 1] / n**2 sum_{t, c} g x`` per token and head,
    ``dL/dx = g / n``, ``dL/dQ(t)_i = dL/dz_i / T sum_{j <= i} K(t)_j``, ``dL/dK(t)_j = sum_{i >= j} dL/dz_i Q(t)_i / T``.
    """
    current, query, key = ctx.saved_tensors
    heads, kv_heads = ctx.heads, ctx.kv_heads
    z, q, keys = _row_sums(query, key, heads, kv_heads)
    n = z.abs().clamp(min=1.0)
    g, x = _timed(grad, heads), _timed(current, heads)
    to_n = -(g * x).sum((0, -1)).reshape(n.shape) / n.square()
    to_z = (to_n * z.sign() * (z.abs() > 1) / q.shape[0]).unsqueeze(-1)  # [B, L, Hk, g, 1]
    to_query = (to_z * keys).reshape(query.shape).to(query.dtype)
    seen_by = (to_z * q).sum(-2).flip(2).cumsum(2).flip(2)  # a sum over later tokens is a running one read backwards
    to_key = seen_by.reshape(key.shape).to(key.dtype)
    to_current = (g / n.flatten(-2).unsqueeze(-1)).reshape(current.shape).to(current.dtype)
    return to_current, to_query, to_key, None, None


row_sum_scale.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("ntc::row_sum_scale_stream", mutates_args=())
def row_sum_scale_stream(
    current: Tensor, query: Tensor, key: Tensor, sums: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """The same for the next tokens of a sequence.

    Args:
        current: As of ``row_sum_scale``.
        query: As there.
        key: As there.
        sums: Sum of the keys so far, ``[T, B, Hk D]`` (of rates ``[B, Hk D]``), float32 or better; zeros at the start.
        heads: H.
        kv_heads: Hk.

    Returns:
        The scaled current, and the new sums.

    Raises:
        ValueError: If the shapes do not fit each other or the heads.
    """
    _check(current, query, key, heads, kv_heads)
    z, _, keys = _row_sums(query, key, heads, kv_heads, sums)
    return _divided(current, z, heads).contiguous(), keys[:, :, -1].reshape(sums.shape).to(sums.dtype).contiguous()


@row_sum_scale_stream.register_fake
def _fake_stream(current: Tensor, query: Tensor, key: Tensor, sums: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    _check(current, query, key, heads, kv_heads)
    return current.new_empty(current.shape), sums.new_empty(sums.shape)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    current, query, key = arguments = [a for a in node.args[:3] if isinstance(a, Node)]
    given = [type_of(a) for a in arguments]
    if isinstance(given[0], Analog) and all(isinstance(t, RateType) for t in given[1:]):
        return ANALOG
    if not isinstance(given[0], CurrentType) or given[0].code != "rate":
        raise TypeMismatch(
            f"row_sum_scale takes a rate-coded current, or an analog value made of rates, and %{current.name} is {given[0]}", current
        )
    for argument, value in zip((query, key), given[1:], strict=True):
        if not isinstance(value, SpikeType) or value.levels == "graded":
            raise TypeMismatch(f"row_sum_scale takes binary or ternary queries and keys, and %{argument.name} is {value}", argument)
        if (value.steps, value.code) != (given[0].steps, "rate"):
            raise TypeMismatch(
                f"row_sum_scale sums spikes of the same steps: %{current.name} is {given[0]}, %{argument.name} is {value}", argument
            )
    return given[0]


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    _, query, key = operands
    if isinstance(query.type, SpikeType):  # a spike of K counts up one counter, a spike of Q adds one
        return Counts(elementwise=result.numel, acs=key.nonzero + query.nonzero)
    return Counts(elementwise=result.numel + key.numel, macs=query.numel)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """A spike of K reads and writes one counter, a spike of Q reads one; without spikes all counters change at every token."""
    current, query, key = operands[:3]
    spiking = isinstance(query.type, SpikeType)
    state = 2 * key.nonzero + query.nonzero if spiking else 2.0 * key.numel + query.numel
    return values(current) + values(query) + values(key) + values(result) + Traffic(state=state)


_ONNX_SPLIT = """
    whole = Shape(current)
    zeroth = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    query_heads = Constant <value_int: int = @heads> ()
    key_heads = Constant <value_int: int = @kv_heads> ()
    groups = Div(query_heads, key_heads)
    h = Unsqueeze(query_heads, zeroth)
    hk = Unsqueeze(key_heads, zeroth)
    g = Unsqueeze(groups, zeroth)
    leading = Shape <end = -3> (current)
    at_least_one = Concat <axis = 0> (one, leading)
    steps = ReduceProd <keepdims = 1> (at_least_one)
    length = Shape <start = -2, end = -1> (current)
    query_width = Shape <start = -1> (query)
    width = Shape <start = -1> (current)
    size = Div(query_width, h)
    value_size = Div(width, h)
    query_shape = Concat <axis = 0> (steps, any, length, hk, g, size)
    key_shape = Concat <axis = 0> (steps, any, length, hk, one, size)
    value_shape = Concat <axis = 0> (steps, any, length, h, value_size)
    q = Reshape(query, query_shape)
    k = Reshape(key, key_shape)
    x = Reshape(current, value_shape)
    tokens = Constant <value_int = 2> ()
"""
_ONNX_DIVIDE = """
    products = Mul(q, keys)
    scores = ReduceSum <keepdims = 0> (products, any)
    total = ReduceSum <keepdims = 0> (scores, zeroth)
    steps_like = CastLike(steps, total)
    z = Div(total, steps_like)
    magnitude = Abs(z)
    unit = Constant <value_float = 1.0> ()
    least = CastLike(unit, magnitude)
    n = Max(magnitude, least)
    divisor_shape = Concat <axis = 0> (any, length, h, one)
    divisor = Reshape(n, divisor_shape)
    divided = Div(x, divisor)
    y = Reshape(divided, whole)
"""
_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
RowSumScale <heads, kv_heads> (current, query, key) => (y)
{{{_ONNX_SPLIT}
    keys = CumSum(k, tokens)
{_ONNX_DIVIDE}}}
"""
_ONNX_STREAM = f"""
<domain: "ntc", opset_import: ["": 20]>
RowSumScaleStream <heads, kv_heads> (current, query, key, sums) => (y, sums_next)
{{{_ONNX_SPLIT}
    within = CumSum(k, tokens)
    sums_shape = Concat <axis = 0> (steps, any, one, hk, one, size)
    before = Reshape(sums, sums_shape)
    keys = Add(within, before)
{_ONNX_DIVIDE}
    end = Constant <value_ints = [-1]> ()
    after = Constant <value_ints = [9223372036854775807]> ()
    token_axis = Constant <value_ints = [2]> ()
    newest = Slice(keys, end, after, token_axis)
    sums_whole = Shape(sums)
    sums_next = Reshape(newest, sums_whole)
}}
"""
ROW_SUM_SCALE = register(
    OpSpec(
        target=torch.ops.ntc.row_sum_scale.default, infer=_infer, count=_count, moves=_moves, element="scale", kind="attention",
        onnx=_ONNX,
        traced=_scaled,  # the kernel is plain torch operations
    )
)


def _infer_stream(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type of both results: the sums are integers per time step. They may enter as a plain tensor of zeros."""
    result, sums = _infer(node, type_of), node.args[3]
    assert isinstance(sums, Node)
    given = type_of(sums)
    if given != result and not isinstance(given, Analog):
        raise TypeMismatch(f"the sums of keys of row_sum_scale on {result} cannot be %{sums.name}, which is {given}", sums)
    return result


def _count_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return _count(node, operands[:3], result, measured)


ROW_SUM_SCALE_STREAM = register(
    OpSpec(
        target=torch.ops.ntc.row_sum_scale_stream.default, infer=_infer_stream, count=_count_stream, moves=_moves, element="scale",
        kind="attention", onnx=_ONNX_STREAM,
    )
)  # fmt: skip
