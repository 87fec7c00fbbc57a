"""Every spelling of causal softmax attention becomes ``ntc::attention``."""

from __future__ import annotations

import itertools
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
    aten._to_copy.default, aten.where.Scalar, aten.clone.default, aten.contiguous.default, aten.maximum.default, aten.max.other,
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip

# exp of it is 0 in fp32 whatever the other scores are; hand-written masks use -1e4 at least.
_NEGLIGIBLE = -9e3

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_SCORES = _PRODUCTS | {aten.baddbmm.default}

# All scores differ, so that a factor that depends on the place, a bias or a soft cap is seen; the wide range shows a clamp.
_SPANS = ((1.0, 2.0), (-1e6, 1e6))


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
    heads, q_heads, k_heads, v_heads = (_heads(program, x) for x in (result, query, key, value))
    if not (heads and k_heads and v_heads) or q_heads != heads:
        return "queries, keys and values are not [B, H, L, D]"
    q, k, v = _split_off(program, query), _split_off(program, key, transposed_key), _split_off(program, value)
    if q is None or k is None or v is None:
        return f"{'queries' if q is None else 'keys' if k is None else 'values'} are not heads in the order [B, H, L, D]"
    if v.factor != 1.0:
        return "values are scaled"
    (one_k, kv_heads), (one_v, one_v_heads) = _ungrouped(k, k_heads), _ungrouped(v, v_heads)
    if kv_heads == one_v_heads:
        k, v = one_k, one_v
    elif k_heads == v_heads:  # grouped values, and keys of which each head is rotated by itself
        kv_heads = k_heads
    else:
        return "keys and values have different numbers of heads"
    with making(program, result, [node, result]) as call:
        three = [channels_of(program, g, part, call) for g, part in zip((q, k, v), "qkv", strict=True)]
        if any(t is None for t in three):
            return "queries, keys or values are scattered channels of a tensor that is no linear layer's result"
        y = call(torch.ops.ntc.attention.default, *three, heads, kv_heads, scale * q.factor * k.factor, at=node)
        split = call(aten.transpose.int, call(aten.unflatten.int, y, -1, [heads, -1]), 1, 2)
        if result.meta["val"].dim() == 3:
            split = call(aten.flatten.using_ints, split, 0, 1)
    result.replace_all_uses_with(split)
    program.graph.erase_node(result)  # torch counts SDPA as random, so dead-code elimination keeps it
    program.graph.eliminate_dead_code()
    return ""


def _heads(program: Program, node: Node) -> int:
    """H of ``[B, H, L, D]``, or of ``[B H, L, D]`` as products of batches are given it; 0 if it is neither."""
    found = set[int]()
    for sizes in probe_sizes(program):
        shape = shape_at(program, node, sizes)
        found.add(shape[1] if len(shape) == 4 else shape[0] // sizes[0] if len(shape) == 3 and shape[0] % sizes[0] == 0 else 0)
    return found.pop() if len(found) == 1 else 0


def _split_off(program: Program, node: Node, transposed: bool = False) -> Gathered | None:
    """Where the heads of queries, keys (perhaps ``[.., D, L]``) or values come from: a projection, or what rotates each of them."""
    heads = _heads(program, node)

    def merge(t: Tensor) -> Tensor:
        t = t.transpose(-2, -1) if transposed else t
        return merge_heads(t if t.dim() == 4 else t.reshape(-1, heads, *t.shape[1:]))

    return gather_of(program, node, merge) or gather_of(program, node, merge, heads=True)


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
    while len(after.users) == 1 and (_is_copy(user := next(iter(after.users))) or _regroups(program, after, user)):
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
    query: Any
    key: Any
    *added, query, key = scores.args
    if added:  # baddbmm: beta added + alpha query key
        if scores.kwargs.get("beta", 1) and not _is_zero(program, added[0]):
            return "something is added to its scores that is no mask"
        scale *= float(scores.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    value: Any = product.args[1]
    return query, key, value, scale, product, True


def _is_zero(program: Program, node: Any) -> bool:
    try:
        return all(not bool(evaluate(program, node, {}, sizes).any()) for sizes in probe_sizes(program))
    except LookupError:
        return False


def _regroups(program: Program, before: Node, node: Node) -> bool:
    """Whether it is ``[B, H, L, L]`` as ``[B H, L, L]``, or back: such a reshape keeps what stands in the last two axes."""
    if node.target not in (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int):
        return False
    return all(shape_at(program, node, sizes)[-2:] == shape_at(program, before, sizes)[-2:] for sizes in probe_sizes(program))


def _is_copy(node: Node) -> bool:
    """A copy, also to another floating-point type; probabilities cast to integers would be 0 or 1."""
    return node.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default) and bool(node.meta["val"].is_floating_point())


def _product_behind(node: Node) -> Node | None:
    """The nearest product that a node is made of by scaling and masking."""
    frontier = [node]
    while frontier:
        n = frontier.pop(0)
        if n.target in _SCORES:
            return n
        if n.target in _MASKING:
            frontier.extend(n.all_input_nodes)
    return None


def _masking(program: Program, masked: Node, scores: Node | None) -> float | str:
    """The factor c if ``masked`` is ``c * scores`` where j <= i and very negative elsewhere, else what is wrong.

    Without scores: 1.0 if ``masked`` alone is a causal mask, boolean or to be added.
    """
    factors = list[float]()
    for sizes, span in itertools.product(probe_sizes(program), _SPANS if scores is not None else _SPANS[:1]):
        length, inputs, values = sizes[1], {}, torch.zeros((), dtype=torch.float64)
        if scores is not None:
            count = math.prod(shape := shape_at(program, scores, sizes))
            inputs[scores] = values = torch.linspace(*span, count, dtype=torch.float64).reshape(shape)
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
        if span == _SPANS[0] and not bool((got[..., ~causal] <= _NEGLIGIBLE).all()):
            return "its mask is not the causal one: later tokens are seen"
        if scores is not None:
            if got.numel() != values.numel():
                return "its scores are not only scaled and causally masked"
            values = values.reshape(got.shape)  # [B H, L, L] may have become [B, H, L, L]
            factors.append(float((got / values)[..., 0, 0].flatten()[0]))
        expected = (factors[0] if factors else 1.0) * values
        if not torch.allclose(got[..., causal].double(), expected.expand(got.shape)[..., causal], rtol=1e-6, atol=1e-12):
            return "its scores are not only scaled and causally masked"
    return factors[0] if factors else 1.0


def _ungrouped(g: Gathered, heads: int) -> tuple[Gathered, int]:
    """Repeated key-value heads back to the distinct ones."""
    rows = g.channels.reshape(heads, -1)
    distinct = torch.tensor(list(dict.fromkeys(map(tuple, rows.tolist()))))
    if heads % len(distinct) == 0 and torch.equal(distinct.repeat_interleave(heads // len(distinct), dim=0), rows):
        return Gathered(g.root, distinct.flatten(), g.factor), len(distinct)
    return g, heads
