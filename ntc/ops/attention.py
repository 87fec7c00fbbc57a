r"""Causal softmax attention as one op: what every captured attention becomes.

    Y_i = sum_{j <= i} softmax_j(scale q_i . k_j) v_j        per head

Streaming, the keys and values of all tokens so far are the state: it grows, and so does the work for a token.

The head split and merge are inside, so that queries, keys, values and result are ``[B, L, C]`` as the linear layers give
and take them. Keys and values may have fewer heads than queries (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, host_rule, register
from ntc.ops.traffic import causal, rows_of
from ntc.spike_type import ANALOG, NodeType

__all__ = [
    "ATTENTION", "ATTENTION_STREAM", "ONNX_GROUPED_HEADS", "ONNX_MERGE", "ONNX_SIZES", "ONNX_SPLIT", "attention", "attention_gradients",
    "attention_stream", "grouped", "merge_heads", "per_head", "seen_by", "split_heads",
]  # fmt: skip


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., L, H D] -> [..., H, L, D]``."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """``[..., H, L, D] -> [..., L, H D]``."""
    return x.transpose(-3, -2).flatten(-2)


def per_head(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """``[B, H, L, D]`` of keys or values, each repeated for the queries of its group."""
    return split_heads(x, kv_heads).repeat_interleave(heads // kv_heads, dim=-3)


def grouped(x: Tensor, heads: int, kv_heads: int) -> Tensor:
    """``[B, L, Hk D]`` of what each query head gives to its keys or values, ``[B, H, L, D]``."""
    return merge_heads(x.reshape(*x.shape[:-3], kv_heads, heads // kv_heads, *x.shape[-2:]).sum(-3))


def seen_by(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys each query sees, ``[L, L]``."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window) if window else seen


@torch.library.custom_op("ntc::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float) -> Tensor:
    """Causal softmax attention.

    Args:
        query: ``[B, L, H D]``.
        key: ``[B, L, Hk D]``.
        value: ``[B, L, Hk Dv]``.
        heads: H, number of query heads.
        kv_heads: Hk, number of key and value heads; divides H.
        scale: Factor of the scores, usually ``D ** -0.5``.

    Returns:
        ``[B, L, H Dv]``.
    """
    y = torch.nn.functional.scaled_dot_product_attention(
        split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads),
        is_causal=True, scale=scale, enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return merge_heads(y).contiguous()


@attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads))


def _probabilities(query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k = split_heads(query, heads), per_head(key, heads, kv_heads)
    scores = q @ k.transpose(-2, -1) * scale
    return scores.masked_fill(~seen_by(query.shape[-2], 0, query.device), float("-inf")).softmax(-1), q, k


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.heads, ctx.kv_heads, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of causal softmax attention with respect to query, key and value, from that of its result."""
    p, q, k = _probabilities(query, key, heads, kv_heads, scale)
    g = split_heads(grad, heads)
    to_p = g @ per_head(value, heads, kv_heads).transpose(-2, -1)
    to_scores = p * (to_p - (to_p * p).sum(-1, keepdim=True)) * scale
    to_key, to_value = (grouped(x, heads, kv_heads) for x in (to_scores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ g))
    return merge_heads(to_scores @ k), to_key, to_value


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value = ctx.saved_tensors
    return *attention_gradients(grad, query, key, value, ctx.heads, ctx.kv_heads, ctx.scale), None, None, None


attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("ntc::attention_stream", mutates_args=())
def attention_stream(
    query: Tensor, new_key: Tensor, new_value: Tensor, keys: Tensor, values: Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal softmax attention, streaming form: the tokens given are the next ones of the sequence.

    Args:
        query: ``[B, L, H D]``, L >= 1 new tokens.
        new_key: ``[B, L, Hk D]``.
        new_value: ``[B, L, Hk Dv]``.
        keys: Keys of the P tokens so far, ``[B, P, Hk D]``.
        values: Their values, ``[B, P, Hk Dv]``.
        heads: H.
        kv_heads: Hk.
        scale: Factor of the scores.

    Returns:
        ``[B, L, H Dv]``, and the keys and values of all P + L tokens. Cost per token is proportional to P, in scores and in copies.
    """
    keys, values = torch.cat([keys, new_key], -2), torch.cat([values, new_value], -2)
    length, past = query.shape[-2], keys.shape[-2] - query.shape[-2]
    # One token sees all keys; the first ones are the parallel form; only what lies between needs a mask.
    seen = torch.ones(length, past + length, dtype=torch.bool, device=query.device).tril(past) if past and length > 1 else None
    y = torch.nn.functional.scaled_dot_product_attention(
        split_heads(query, heads), split_heads(keys, kv_heads), split_heads(values, kv_heads),
        attn_mask=seen, is_causal=past == 0, scale=scale, enable_gqa=heads != kv_heads,
    )  # fmt: skip
    return merge_heads(y).contiguous(), keys, values


@attention_stream.register_fake
def _fake_stream(
    query: Tensor, new_key: Tensor, new_value: Tensor, keys: Tensor, values: Tensor, heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = query.new_empty((*query.shape[:-1], new_value.shape[-1] // kv_heads * heads))
    return y, torch.cat([keys, new_key], -2), torch.cat([values, new_value], -2)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    return host_rule(node, type_of)


def _infer_stream(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    """The type that all three results have."""
    host_rule(node, type_of)
    return ANALOG


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    *batch, length, _ = operands[0].shape
    tokens, heads = length * int(torch.tensor(batch).prod()), node.args[3]
    assert isinstance(heads, int)
    width = operands[0].shape[-1] + result.shape[-1]  # QK^T and PV, all heads
    seen = (length + 1) / 2  # mean number of keys a query sees
    return Counts(dense_macs=tokens * length * width, macs=tokens * seen * width, elementwise=3 * heads * tokens * seen)


def _count_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    *batch, length, _ = operands[0].shape
    tokens, heads, past = length * int(torch.tensor(batch).prod()), node.args[5], operands[3].shape[-2]
    assert isinstance(heads, int)
    width = operands[0].shape[-1] + result.shape[-1]
    seen = past + (length + 1) / 2
    return Counts(dense_macs=tokens * (past + length) * width, macs=tokens * seen * width, elementwise=3 * heads * tokens * seen)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return rows_of(operands, result, causal(operands[0].shape[-2]))


def _moves_stream(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return rows_of(operands, result, operands[3].shape[-2] + causal(operands[0].shape[-2]))


ONNX_GROUPED_HEADS = """
    query_heads = Constant <value_int: int = @heads> ()
    key_heads = Constant <value_int: int = @kv_heads> ()
    groups = Div(query_heads, key_heads)
    axis = Constant <value_ints = [0]> ()
    hk = Unsqueeze(key_heads, axis)
    g = Unsqueeze(groups, axis)
    h = Unsqueeze(query_heads, axis)
    single = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
"""
"""Numbers of heads as the axes that shapes are made of, in the text of ONNX functions."""

ONNX_SIZES = f"""{ONNX_GROUPED_HEADS}
    length = Shape <start = -2, end = -1> (query)
    lead = Shape <end = -1> (query)
    query_width = Shape <start = -1> (query)
    key_width = Shape <start = -1> (key)
    value_width = Shape <start = -1> (value)
    query_size = Div(query_width, h)
    key_size = Div(key_width, hk)
    value_size = Div(value_width, hk)
    query_shape = Concat <axis = 0> (any, length, hk, g, query_size)
    key_length = Shape <start = -2, end = -1> (key)
    key_shape = Concat <axis = 0> (any, key_length, hk, single, key_size)
    value_shape = Concat <axis = 0> (any, key_length, hk, single, value_size)
    query_split = Reshape(query, query_shape)
    key_split = Reshape(key, key_shape)
    value_split = Reshape(value, value_shape)
"""
ONNX_SPLIT = f"""{ONNX_SIZES}
    q = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    kt = Transpose <perm = [0, 2, 3, 4, 1]> (key_split)
    v = Transpose <perm = [0, 2, 3, 1, 4]> (value_split)
    scores = MatMul(q, kt)
"""
ONNX_MERGE = """
    rows = Transpose <perm = [0, 3, 1, 2, 4]> (products)
    merged = Concat <axis = 0> (lead, any)
    y = Reshape(rows, merged)
"""
"""Head split with the scores, and head merge, in the text of ONNX functions: any leading axes are one axis N in between,
``[N, Hk, H / Hk, L, D]``; the keys and values of a group are broadcast, never copied. ``ONNX_SIZES`` is the first part of it, with
the tokens still in front of the heads."""

_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
Attention <heads, kv_heads, scale> (query, key, value) => (y)
{{{ONNX_SPLIT}
    factor_value = Constant <value_float: float = @scale> ()
    factor = CastLike(factor_value, query)
    scaled = Mul(scores, factor)
    hidden_value = Constant <value_float = -inf> ()
    hidden = CastLike(hidden_value, query)
    square = Concat <axis = 0> (length, length)
    all_hidden = Expand(hidden, square)
    diagonal = Constant <value_int = 1> ()
    mask = Trilu <upper = 1> (all_hidden, diagonal)
    masked = Add(scaled, mask)
    probabilities = Softmax <axis = -1> (masked)
    products = MatMul(probabilities, v)
{ONNX_MERGE}}}
"""
ATTENTION = register(
    OpSpec(target=torch.ops.ntc.attention.default, infer=_infer, count=_count, moves=_moves, kind="attention", onnx=_ONNX)
)

# Query i of the L new ones stands behind P keys more than it has places: the mask is a triangle moved by P.
_ONNX_STREAM = f"""
<domain: "ntc", opset_import: ["": 20]>
AttentionStream <heads, kv_heads, scale> (query, new_key, new_value, keys, values) => (y, keys_next, values_next)
{{
    keys_next = Concat <axis = -2> (keys, new_key)
    values_next = Concat <axis = -2> (values, new_value)
    key = Identity(keys_next)
    value = Identity(values_next)
{ONNX_SPLIT}
    factor_value = Constant <value_float: float = @scale> ()
    factor = CastLike(factor_value, query)
    scaled = Mul(scores, factor)
    hidden_value = Constant <value_float = -inf> ()
    hidden = CastLike(hidden_value, query)
    past = Shape <start = -2, end = -1> (keys)
    width = Add(past, length)
    table = Concat <axis = 0> (length, width)
    all_hidden = Expand(hidden, table)
    diagonal_size = Add(past, single)
    diagonal = Squeeze(diagonal_size)
    mask = Trilu <upper = 1> (all_hidden, diagonal)
    masked = Add(scaled, mask)
    probabilities = Softmax <axis = -1> (masked)
    products = MatMul(probabilities, v)
{ONNX_MERGE}}}
"""
ATTENTION_STREAM = register(
    OpSpec(
        target=torch.ops.ntc.attention_stream.default, infer=_infer_stream, count=_count_stream, moves=_moves_stream, kind="attention",
        onnx=_ONNX_STREAM,
    )
)  # fmt: skip
