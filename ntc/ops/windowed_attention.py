r"""Causal softmax attention with a sliding window, capped scores, or both (Mistral, Gemma 2 and 3, Qwen2 with windows).

    Y_i = sum_{i - w < j <= i} softmax_j(cap(scale q_i . k_j)) v_j        per head,   cap(s) = c tanh(s / c)

A token sees itself and the w - 1 tokens before it (Beltagy et al. 2020, arXiv 2004.05150); the cap (Gemma 2, arXiv 2408.00118) keeps
scores within +-c. Attention without either is ``ntc::attention``, so that the common case pays for neither. There is no streaming
form yet: ``to-streaming`` refuses a program that holds this op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import ONNX_MERGE, ONNX_SPLIT, grouped, merge_heads, per_head, seen_by, split_heads
from ntc.ops.spec import Counts, Operand, OpSpec, Traffic, host_rule, register
from ntc.ops.traffic import causal, rows_of
from ntc.spike_type import NodeType

__all__ = ["ONNX_WINDOW_MASK", "SOFTMAX_ATTENTION", "WINDOWED_ATTENTION", "windowed_attention"]


@torch.library.custom_op("ntc::windowed_attention", mutates_args=())
def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float, window: int, softcap: float
) -> Tensor:
    """Causal softmax attention to the last tokens, of capped scores.

    Args:
        query: ``[B, L, H D]``.
        key: ``[B, L, Hk D]``.
        value: ``[B, L, Hk Dv]``.
        heads: H, number of query heads.
        kv_heads: Hk, number of key and value heads; divides H.
        scale: Factor of the scores, before the cap.
        window: w, most tokens that a token sees, itself among them; 0 = all.
        softcap: c, in units of the scaled scores; 0 = no cap.

    Returns:
        ``[B, L, H Dv]``.
    """
    p, _, _, _ = _probabilities(query, key, heads, kv_heads, scale, window, softcap)
    return merge_heads(p @ per_head(value, heads, kv_heads)).contiguous()


@windowed_attention.register_fake
def _fake(
    query: Tensor, key: Tensor, value: Tensor, heads: int, kv_heads: int, scale: float, window: int, softcap: float
) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1] // kv_heads * heads))


def _probabilities(
    query: Tensor, key: Tensor, heads: int, kv_heads: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax ``[B, H, L, L]``, the factor of the gradient that the cap makes, and the heads of queries and keys."""
    q, k = split_heads(query, heads), per_head(key, heads, kv_heads)
    scores = q @ k.transpose(-2, -1) * scale
    slope = torch.ones((), dtype=scores.dtype, device=scores.device)
    if softcap:
        bounded = torch.tanh(scores / softcap)
        scores, slope = bounded * softcap, 1 - bounded * bounded
    return scores.masked_fill(~seen_by(query.shape[-2], window, query.device), float("-inf")).softmax(-1), slope, q, k


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value = ctx.saved_tensors
    heads, kv_heads, scale, window, softcap = ctx.options
    p, slope, q, k = _probabilities(query, key, heads, kv_heads, scale, window, softcap)
    g = split_heads(grad, heads)
    to_p = g @ per_head(value, heads, kv_heads).transpose(-2, -1)
    to_scores = p * (to_p - (to_p * p).sum(-1, keepdim=True)) * slope * scale
    to_key, to_value = (grouped(x, heads, kv_heads) for x in (to_scores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ g))
    return merge_heads(to_scores @ k), to_key, to_value, *[None] * 5


windowed_attention.register_autograd(_backward, setup_context=_setup)


def _infer(node: Node, type_of: Callable[[Node], NodeType]) -> NodeType:
    return host_rule(node, type_of)


def _count(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Counts:
    *batch, length, _ = operands[0].shape
    heads, window, softcap = node.args[3], node.args[6], node.args[7]
    assert isinstance(heads, int) and isinstance(window, int)
    tokens = length * int(torch.tensor(batch).prod())
    width = operands[0].shape[-1] + result.shape[-1]  # QK^T and PV, all heads
    seen = causal(length, window)
    each = 3 + (5 if softcap else 0)  # softmax, and a tanh with its two scalings
    return Counts(dense_macs=tokens * length * width, macs=tokens * seen * width, elementwise=each * heads * tokens * seen)


def _moves(node: Node, operands: Sequence[Operand], result: Operand, measured: dict[str, float]) -> Traffic:
    window = node.args[6]
    assert isinstance(window, int)
    return rows_of(operands, result, causal(operands[0].shape[-2], window))


# A cap of 0 would divide by 0, so it is 1 there and what it gives is not chosen. A window of 0 is the whole length.
ONNX_WINDOW_MASK = """    hidden_value = Constant <value_float = -inf> ()
    hidden = CastLike(hidden_value, query)
    square = Concat <axis = 0> (length, length)
    all_hidden = Expand(hidden, square)
    diagonal = Constant <value_int = 1> ()
    later = Trilu <upper = 1> (all_hidden, diagonal)
    given_window = Constant <value_int: int = @window> ()
    none = Constant <value_int = 0> ()
    has_window = Greater(given_window, none)
    whole = Squeeze(length)
    reach = Where(has_window, given_window, whole)
    below = Neg(reach)
    earlier = Trilu <upper = 0> (all_hidden, below)
    mask = Add(later, earlier)
"""
"""``mask``, minus infinity for keys behind a query and out of its window, in the text of ONNX functions."""

_ONNX = f"""
<domain: "ntc", opset_import: ["": 20]>
WindowedAttention <heads, kv_heads, scale, window, softcap> (query, key, value) => (y)
{{{ONNX_SPLIT}
    factor_value = Constant <value_float: float = @scale> ()
    factor = CastLike(factor_value, query)
    scaled = Mul(scores, factor)
    cap_value = Constant <value_float: float = @softcap> ()
    cap = CastLike(cap_value, query)
    zero_value = Constant <value_float = 0.0> ()
    zero = CastLike(zero_value, query)
    unit_value = Constant <value_float = 1.0> ()
    unit = CastLike(unit_value, query)
    has_cap = Greater(cap, zero)
    divisor = Where(has_cap, cap, unit)
    divided = Div(scaled, divisor)
    squashed = Tanh(divided)
    bounded = Mul(squashed, divisor)
    capped = Where(has_cap, bounded, scaled)
{ONNX_WINDOW_MASK}    masked = Add(capped, mask)
    probabilities = Softmax <axis = -1> (masked)
    products = MatMul(probabilities, v)
{ONNX_MERGE}}}
"""
WINDOWED_ATTENTION = register(
    OpSpec(target=torch.ops.ntc.windowed_attention.default, infer=_infer, count=_count, moves=_moves, kind="attention", onnx=_ONNX)
)

SOFTMAX_ATTENTION = frozenset({torch.ops.ntc.attention.default, torch.ops.ntc.windowed_attention.default})
"""The ops that ``replace-attention`` converts: both have queries, keys, values, H, Hk and the scale as their first arguments."""
