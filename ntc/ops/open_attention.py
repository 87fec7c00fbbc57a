r"""Causal softmax attention taken apart: scores and weighted values as ops of their own, so that the softmax in between can be anything.

    S_ij = scale q_i . k_j   for j <= i, and i - w < j with a window of w;   minus infinity elsewhere        [B, H L, L]
    Y_i  = sum_j P_ij v_j                                                                                    [B, L, H Dv]

``ntc::attention`` is both with a softmax along the last axis of S between them, and never holds S; here S and P are values of the graph,
with the rows of all heads one after the other, ``[B, H L, L]``, so that they have as many axes as every other value. The products are
counted for the pairs that a token sees, as those of ``ntc::attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import ONNX_GROUPED_HEADS, grouped, merge_heads, per_head, seen_by, split_heads
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, host_rule, register
from ntc.ops.traffic import causal, values
from ntc.ops.windowed_attention import ONNX_WINDOW_MASK
from ntc.spike_type import NodeType

__all__ = [
    "CAUSAL_SCORES", "WEIGHTED_VALUES", "by_head", "causal_scores", "masked_scores", "onnx_scores", "score_gradients", "weighted_values",
]  # fmt: skip


def by_head(rows: Tensor, heads: int) -> Tensor:
    """``[B, H L, L]`` as ``[B, H, L, L]``."""
    return rows.reshape(*rows.shape[:-2], heads, -1, rows.shape[-1])


@torch.library.custom_op("ntc::causal_scores", mutates_args=())
def causal_scores(query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float, window: int) -> Tensor:
    """Scores of causal attention.

    Args:
        query: ``[B, L, H D]``.
        key: ``[B, L, Hk D]``.
        heads: H, number of query heads.
        kv_heads: Hk, number of key heads; divides H.
        scale: Factor of the scores.
        window: w, most tokens that a token sees, itself among them; 0 = all.

    Returns:
        ``[B, H L, L]``, minus infinity for what a token does not see.
    """
    return masked_scores(query, key, heads, kv_heads, scale, window)


def masked_scores(query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float, window: int) -> Tensor:
    """The same, for other ops to call."""
    scores = split_heads(query, heads) @ per_head(key, heads, kv_heads).transpose(-2, -1) * scale
    return scores.masked_fill(~seen_by(query.shape[-2], window, query.device), float("-inf")).flatten(-3, -2).contiguous()


@causal_scores.register_fake
def _fake_scores(query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float, window: int) -> Tensor:
    length = query.shape[-2]
    return query.new_empty((*query.shape[:-2], heads * length, length))


def _setup_scores(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, ctx.heads, ctx.kv_heads, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key)


def _backward_scores(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key = ctx.saved_tensors
    return *score_gradients(grad, query, key, ctx.heads, ctx.kv_heads, ctx.scale, ctx.window), *[None] * 4


def score_gradients(
    grad: Tensor, query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to query and key, from that of the scores."""
    given = by_head(grad, heads).masked_fill(~seen_by(query.shape[-2], window, query.device), 0.0) * scale
    to_query = merge_heads(given @ per_head(key, heads, kv_heads))
    return to_query, grouped(given.transpose(-2, -1) @ split_heads(query, heads), heads, kv_heads)


causal_scores.register_autograd(_backward_scores, setup_context=_setup_scores)


@torch.library.custom_op("ntc::weighted_values", mutates_args=())
def weighted_values(probabilities: Tensor, value: Tensor, heads: int, kv_heads: int, window: int) -> Tensor:
    """Values summed with the weights of attention.

    Args:
        probabilities: P, ``[B, H L, L]``; zero for what a token does not see.
        value: ``[B, L, Hk Dv]``.
        heads: H.
        kv_heads: Hk.
        window: w, for counting.

    Returns:
        ``[B, L, H Dv]``.
    """
    return merge_heads(by_head(probabilities, heads) @ per_head(value, heads, kv_heads)).contiguous()


@weighted_values.register_fake
def _fake_values(probabilities: Tensor, value: Tensor, heads: int, kv_heads: int, window: int) -> Tensor:
    return value.new_empty((*value.shape[:-1], value.shape[-1] // kv_heads * heads))


def _setup_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probabilities, value, ctx.heads, ctx.kv_heads, _ = inputs
    ctx.save_for_backward(probabilities, value)


def _backward_values(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    probabilities, value = ctx.saved_tensors
    given, rows = split_heads(grad, ctx.heads), by_head(probabilities, ctx.heads)
    to_rows = given @ per_head(value, ctx.heads, ctx.kv_heads).transpose(-2, -1)
    to_value = grouped(rows.transpose(-2, -1) @ given, ctx.heads, ctx.kv_heads)
    return to_rows.flatten(-3, -2), to_value, None, None, None


weighted_values.register_autograd(_backward_values, setup_context=_setup_values)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    return host_rule(node, type_of)


def _products(node: Node, x: Operand) -> tuple[Counts, float]:
    """Of queries or results ``[B, L, H D]``: products with what each token sees, and how many tokens that is in all."""
    length, window = x.shape[-2], node.args[-1]
    assert isinstance(window, int)
    seen = causal(length, window)
    return Counts(dense_macs=x.numel * length, macs=x.numel * seen), x.numel // x.shape[-1] * seen


def _count_scores(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return _products(node, operands[0])[0]


def _count_values(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    return _products(node, result)[0]


def _moves_scores(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    """Queries in, the keys that each sees; scores are used where they are made."""
    query, key = operands
    return values(query) + Traffic(cache=_products(node, query)[1] * key.shape[-1])


def _moves_values(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    return values(result) + Traffic(cache=_products(node, result)[1] * operands[1].shape[-1])


def onnx_scores(query: str = "query", key: str = "key") -> str:
    """From values ``[B, L, C]`` of these names to ``scores``, minus infinity where a token does not see, in the text of ONNX functions."""
    return f"""{ONNX_GROUPED_HEADS}
    length = Shape <start = -2, end = -1> ({query})
    batch = Shape <end = -2> ({query})
    query_width = Shape <start = -1> ({query})
    key_width = Shape <start = -1> ({key})
    query_size = Div(query_width, h)
    key_size = Div(key_width, hk)
    query_shape = Concat <axis = 0> (any, length, hk, g, query_size)
    key_shape = Concat <axis = 0> (any, length, hk, single, key_size)
    query_split = Reshape({query}, query_shape)
    key_split = Reshape({key}, key_shape)
    q = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    kt = Transpose <perm = [0, 2, 3, 4, 1]> (key_split)
    products = MatMul(q, kt)
    factor_value = Constant <value_float: float = @scale> ()
    factor = CastLike(factor_value, {query})
    scaled = Mul(products, factor)
{ONNX_WINDOW_MASK}    masked = Add(scaled, mask)
    shape = Concat <axis = 0> (batch, any, length)
    scores = Reshape(masked, shape)
"""


_ONNX_SCORES = f"""
<domain: "ntc", opset_import: ["": 20]>
CausalScores <heads, kv_heads, scale, window> (query, key) => (scores)
{{{onnx_scores()}}}
"""
_ONNX_VALUES = f"""
<domain: "ntc", opset_import: ["": 20]>
WeightedValues <heads, kv_heads, window> (probabilities, value) => (y)
{{{ONNX_GROUPED_HEADS}
    length = Shape <start = -1> (probabilities)
    lead = Shape <end = -1> (value)
    value_width = Shape <start = -1> (value)
    value_size = Div(value_width, hk)
    split_shape = Concat <axis = 0> (any, hk, g, length, length)
    p = Reshape(probabilities, split_shape)
    value_shape = Concat <axis = 0> (any, length, hk, single, value_size)
    value_split = Reshape(value, value_shape)
    v = Transpose <perm = [0, 2, 3, 1, 4]> (value_split)
    products = MatMul(p, v)
    rows = Transpose <perm = [0, 3, 1, 2, 4]> (products)
    merged = Concat <axis = 0> (lead, any)
    y = Reshape(rows, merged)
}}
"""
CAUSAL_SCORES = register(
    OpSpec(
        target=torch.ops.ntc.causal_scores.default, infer=_infer, count=_count_scores, moves=_moves_scores, kind="attention",
        onnx=_ONNX_SCORES,
    )
)  # fmt: skip
WEIGHTED_VALUES = register(
    OpSpec(
        target=torch.ops.ntc.weighted_values.default, infer=_infer, count=_count_values, moves=_moves_values, kind="attention",
        onnx=_ONNX_VALUES,
    )
)  # fmt: skip
