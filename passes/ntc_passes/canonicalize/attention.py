"""Every spelling of causal softmax attention becomes ``ntc::attention``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops import aten
from ntc.ops.attention import merge_heads
from ntc.probe import Gathered, evaluate, gather_of, probe_sizes, shape_at
from ntc.program import Program
from ntc_passes.canonicalize.activations import ARITHMETIC
from ntc_passes.canonicalize.fused import channels_of
from ntc_passes.canonicalize.making import making

__all__ = ["SOFTMAX", "over_tokens", "rewrite_attention"]

_MASKING = ARITHMETIC | {
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.to.dtype,
    aten._to_copy.default, aten.where.Scalar, aten.clone.default, aten.contiguous.default,
}  # fmt: skip

# exp of it is 0 in fp32 whatever the other scores are; hand-written masks use -1e4 at least.
_NEGLIGIBLE = -9e3

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


def over_tokens(softmax: Node) -> bool:
    """Whether a softmax is over an axis that grows with the text; one over experts, as their routers have it, is no attention."""
    value, dim = softmax.meta["val"], softmax.args[1]
    return isinstance(value.shape[dim], torch.SymInt)


def rewrite_attention(program: Program, node: Node) -> str:
    """Causal softmax attention around a softmax or SDPA node becomes ``ntc::attention``; returns why not."""
    parts = _hand_written(program, node) if node.target in SOFTMAX else _sdpa(program, node)
    if isinstance(parts, str):
        return parts
    query, key, value, scale, result, transposed_key = parts
    if any(x.meta["val"].dim() != 4 for x in (query, key, value)):
        return "queries, keys and values are not [B, H, L, D]"
    heads = result.meta["val"].shape[1]

    def merge(t: Tensor) -> Tensor:
        return merge_heads(t)

    q = gather_of(program, query, merge)
    k = gather_of(program, key, lambda t: merge_heads(t.transpose(-2, -1)) if transposed_key else merge_heads(t))
    v = gather_of(program, value, merge)
    if q is None or k is None or v is None:
        return f"{'queries' if q is None else 'keys' if k is None else 'values'} are not heads split off a [B, L, C] tensor"
    if v.factor != 1.0:
        return "values are scaled"
    (k, kv_heads), (v, v_heads) = _ungrouped(k, key.meta["val"].shape[1]), _ungrouped(v, value.meta["val"].shape[1])
    if kv_heads != v_heads:
        return "keys and values have different numbers of heads"
    with making(program, result, [node, result]) as call:
        three = [channels_of(program, g, part, call) for g, part in zip((q, k, v), "qkv", strict=True)]
        if any(t is None for t in three):
            return "queries, keys or values are scattered channels of a tensor that is no linear layer's result"
        y = call(torch.ops.ntc.attention.default, *three, heads, kv_heads, scale * q.factor * k.factor, at=node)
        split = call(aten.transpose.int, call(aten.unflatten.int, y, -1, [heads, -1]), 1, 2)
    result.replace_all_uses_with(split)
    program.graph.erase_node(result)  # torch counts SDPA as random, so dead-code elimination keeps it
    program.graph.eliminate_dead_code()
    return ""


def _sdpa(program: Program, node: Node) -> tuple[Node, Node, Node, float, Node, bool] | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    query, key, value = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    if mask is not None:
        reason = _masking(program, mask, None)
        if isinstance(reason, str):
            return reason
    elif not given.get("is_causal"):
        return "it is not causal"
    if given.get("dropout_p"):
        return "it drops probabilities at random"
    scale = given.get("scale")
    width = query.meta["val"].shape[-1]
    return query, key, value, float(scale) if scale is not None else float(width) ** -0.5, node, False


def _hand_written(program: Program, softmax: Node) -> tuple[Node, Node, Node, float, Node, bool] | str:
    """matmul, scale, mask, softmax over keys, matmul."""
    scores_in = softmax.args[0]
    dim = softmax.args[1]
    assert isinstance(scores_in, Node)
    if dim not in (-1, scores_in.meta["val"].dim() - 1):
        return "its softmax is not over the last axis"
    after = softmax
    while len(after.users) == 1 and _is_copy(user := next(iter(after.users))):
        after = user
    products = [u for u in after.users if u.target in _PRODUCTS and u.args[0] is after]
    if len(products) != 1 or len(after.users) != 1:
        return "its probabilities are used by something else than one product with the values"
    product, scores = products[0], _product_behind(scores_in)
    if scores is None:
        return "its scores are no product of queries and keys"
    scale = _masking(program, scores_in, scores)
    if isinstance(scale, str):
        return scale
    query: Any = scores.args[0]
    key: Any = scores.args[1]
    value: Any = product.args[1]
    return query, key, value, scale, product, True


def _is_copy(node: Node) -> bool:
    """A copy, also to another floating-point type; probabilities cast to integers would be 0 or 1."""
    return node.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default) and bool(node.meta["val"].is_floating_point())


def _product_behind(node: Node) -> Node | None:
    """The nearest product that a node is made of by scaling and masking."""
    frontier = [node]
    while frontier:
        n = frontier.pop(0)
        if n.target in _PRODUCTS:
            return n
        if n.target in _MASKING:
            frontier.extend(n.all_input_nodes)
    return None


def _masking(program: Program, masked: Node, scores: Node | None) -> float | str:
    """The factor c if ``masked`` is ``c * scores`` where j <= i and very negative elsewhere, else what is wrong.

    Without scores: 1.0 if ``masked`` alone is a causal mask, boolean or to be added.
    """
    factor = 1.0
    for sizes in probe_sizes(program):
        length, inputs, values = sizes[1], {}, torch.zeros((), dtype=torch.float64)
        if scores is not None:
            # All scores differ, so that a factor that depends on the place, a bias or a soft cap is seen.
            count = math.prod(shape := shape_at(program, scores, sizes))
            inputs[scores] = values = torch.linspace(1, 2, count, dtype=torch.float64).reshape(shape)
        try:
            got = evaluate(program, masked, inputs, sizes)
        except LookupError:
            return "its mask depends on the input"
        except (RuntimeError, TypeError, ValueError):
            return "its mask could not be evaluated"
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        if got.shape[-2:] != causal.shape:
            return "its mask is not the causal one"
        if got.dtype == torch.bool:
            got = torch.zeros_like(got, dtype=torch.float64).masked_fill(~got, float("-inf"))
        if not bool((got[..., ~causal] <= _NEGLIGIBLE).all()):
            return "its mask is not the causal one: later tokens are seen"
        if scores is not None:
            factor = float((got / values)[..., 0, 0].flatten()[0])
        if not torch.allclose(got[..., causal].double(), (factor * values).expand(got.shape)[..., causal], rtol=1e-6, atol=1e-12):
            return "its scores are not only scaled and causally masked"
    return factor


def _ungrouped(g: Gathered, heads: int) -> tuple[Gathered, int]:
    """Repeated key-value heads back to the distinct ones."""
    rows = g.channels.reshape(heads, -1)
    distinct = torch.tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))
    if heads % len(distinct) == 0 and torch.equal(distinct.repeat_interleave(heads // len(distinct), dim=0), rows):
        return Gathered(g.root, distinct.flatten(), g.factor), len(distinct)
    return g, heads
