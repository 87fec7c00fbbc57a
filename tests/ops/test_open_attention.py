"""Attention taken apart: with a softmax between them the two ops are the whole one, gradients, counts and ONNX included."""

from __future__ import annotations

import pytest
import torch
from op_cases import CURRENT, RATE, SPIKES, counts, infer, node_of, operand, random, same_layout

from ntc.ops import Counts, Traffic, TypeMismatch, attention, causal_scores, spec_of, weighted_values, windowed_attention
from ntc.spike_type import ANALOG

SCORES, VALUES = torch.ops.ntc.causal_scores.default, torch.ops.ntc.weighted_values.default
SIZES = [(4, 4, 0), (4, 2, 0), (4, 1, 3), (2, 2, 1)]  # H, Hk, window


def parts(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [random(2, 5, h * d, seed=s, dtype=dtype) for s, (h, d) in enumerate(((heads, 3), (kv_heads, 3), (kv_heads, 2)))]


@pytest.mark.parametrize(("heads", "kv_heads", "window"), SIZES)
def test_with_a_softmax_they_are_the_whole_op(heads, kv_heads, window):
    q, k, v = parts(heads, kv_heads)
    scores = causal_scores(q, k, heads, kv_heads, 0.7, window)
    y = weighted_values(scores.softmax(-1), v, heads, kv_heads, window)
    whole = windowed_attention(q, k, v, heads, kv_heads, 0.7, window, 0.0) if window else attention(q, k, v, heads, kv_heads, 0.7)
    torch.testing.assert_close(y, whole)
    to = random(*y.shape, seed=9, grad=False)
    for ours, theirs in zip(*(torch.autograd.grad((to * out).sum(), (q, k, v)) for out in (y, whole)), strict=True):
        torch.testing.assert_close(ours, theirs)
    hidden = torch.tensor([[j > i or (window and j <= i - window) for j in range(5)] for i in range(5)])
    assert torch.equal(scores == -torch.inf, hidden.repeat(heads, 1).expand(2, -1, -1)), "the rows of all heads, one after the other"


def test_opcheck_and_layout():
    q, k, v = parts(4, 2, torch.float32)
    torch.library.opcheck(causal_scores, (q, k, 4, 2, 0.7, 0))
    p = random(2, 20, 5, dtype=torch.float32)
    torch.library.opcheck(weighted_values, (p, v, 4, 2, 0))
    assert same_layout(causal_scores, q.detach(), k.detach(), 4, 2, 0.7, 2) and same_layout(weighted_values, p.detach(), v.detach(), 4, 2, 2)


def test_types_and_counts():
    for op, given in ((SCORES, (4, 2, 0.7, 0)), (VALUES, (4, 2, 0))):
        assert infer(op, ANALOG, ANALOG, *given) == ANALOG
        for kind in (SPIKES, RATE, CURRENT):
            with pytest.raises(TypeMismatch, match="takes analog values, and %x1 is"):
                infer(op, ANALOG, kind, *given)
    q, k, v = (operand(x) for x in parts(4, 2))
    p = operand(random(2, 20, 5))
    y = operand(random(2, 5, 8))
    for window, seen in ((0, 3.0), (2, 1.8)):
        assert counts(SCORES, [q, k], p, ANALOG, ANALOG, 4, 2, 0.7, window) == Counts(dense_macs=600, macs=120 * seen)
        assert counts(VALUES, [p, v], y, ANALOG, ANALOG, 4, 2, window) == Counts(dense_macs=400, macs=80 * seen)
        node, _ = node_of(SCORES, ANALOG, ANALOG, 4, 2, 0.7, window)
        assert spec_of(node).moves(node, [q, k], p, {}) == Traffic(activations=120, cache=10 * seen * 6)
        node, _ = node_of(VALUES, ANALOG, ANALOG, 4, 2, window)
        assert spec_of(node).moves(node, [p, v], y, {}) == Traffic(activations=80, cache=10 * seen * 4)
