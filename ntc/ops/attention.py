r"""Causal softmax attention as one op: what every captured attention becomes.

    Y_i = sum_{j <= i} softmax_j(scale q_i . k_j) v_j        per head

The head split and merge are inside, so that queries, keys, values and result are ``[B, L, C]`` as the linear layers give
and take them. Keys and values may have fewer heads than queries (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.spec import Counts, Operand, OpSpec, host_rule, register
from ntc.spike_type import NodeType

__all__ = ["ATTENTION", "ONNX_MERGE", "ONNX_SIZES", "ONNX_SPLIT", "attention", "merge_heads", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., L, H D] -> [..., H, L, D]``."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """``[..., H, L, D] -> [..., L, H D]``."""
    return x.transpose(-3, -2).flatten(-2)


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
    q, k = split_heads(query, heads), split_heads(key, kv_heads).repeat_interleave(heads // kv_heads, dim=-3)
    scores = q @ k.transpose(-2, -1) * scale
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~causal, float("-inf")).softmax(-1), q, k


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.heads, ctx.kv_heads, ctx.scale = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value = ctx.saved_tensors
    groups = ctx.heads // ctx.kv_heads
    p, q, k = _probabilities(query, key, ctx.heads, ctx.kv_heads, ctx.scale)
    v = split_heads(value, ctx.kv_heads).repeat_interleave(groups, dim=-3)
    g = split_heads(grad, ctx.heads)
    to_p = g @ v.transpose(-2, -1)
    to_scores = p * (to_p - (to_p * p).sum(-1, keepdim=True)) * ctx.scale

    def per_kv_head(x: Tensor) -> Tensor:
        return merge_heads(x.reshape(*x.shape[:-3], ctx.kv_heads, groups, *x.shape[-2:]).sum(-3))

    return (
        merge_heads(to_scores @ k), per_kv_head(to_scores.transpose(-2, -1) @ q), per_kv_head(p.transpose(-2, -1) @ g),
        None, None, None,
    )  # fmt: skip


attention.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    return host_rule(node, type_of)


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    *batch, length, _ = operands[0].shape
    tokens, heads = length * int(torch.tensor(batch).prod()), node.args[3]
    assert isinstance(heads, int)
    width = operands[0].shape[-1] + result.shape[-1]  # QK^T and PV, all heads
    seen = (length + 1) / 2  # mean number of keys a query sees
    return Counts(dense_macs=tokens * length * width, macs=tokens * seen * width, elementwise=3 * heads * tokens * seen)


ONNX_SIZES = """
    query_heads = Constant <value_int: int = @heads> ()
    key_heads = Constant <value_int: int = @kv_heads> ()
    groups = Div(query_heads, key_heads)
    axis = Constant <value_ints = [0]> ()
    hk = Unsqueeze(key_heads, axis)
    g = Unsqueeze(groups, axis)
    h = Unsqueeze(query_heads, axis)
    one = Constant <value_ints = [1]> ()
    any = Constant <value_ints = [-1]> ()
    length = Shape <start = -2, end = -1> (query)
    lead = Shape <end = -1> (query)
    query_width = Shape <start = -1> (query)
    key_width = Shape <start = -1> (key)
    value_width = Shape <start = -1> (value)
    query_size = Div(query_width, h)
    key_size = Div(key_width, hk)
    value_size = Div(value_width, hk)
    query_shape = Concat <axis = 0> (any, length, hk, g, query_size)
    key_shape = Concat <axis = 0> (any, length, hk, one, key_size)
    value_shape = Concat <axis = 0> (any, length, hk, one, value_size)
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
ATTENTION = register(OpSpec(target=torch.ops.ntc.attention.default, infer=_infer, count=_count, kind="attention", onnx=_ONNX))
