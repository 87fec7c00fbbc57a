"""``ntc::windowed_attention``: formula, gradient, counts and ONNX, with windows and caps."""

import math

import pytest
import torch
from op_cases import CURRENT, SPIKES, counts, gradients, infer, operand, random

from ntc.ops import TypeMismatch, attention, windowed_attention
from ntc.spike_type import ANALOG

OP = torch.ops.ntc.windowed_attention.default
BOUNDS = [(0, 0.0), (1, 0.0), (3, 0.0), (99, 0.0), (0, 0.6), (3, 0.6)]


def naive(query, key, value, heads, kv_heads, scale, window, softcap):
    """The formula of the module's docstring, one number at a time."""
    d, dv = query.shape[-1] // heads, value.shape[-1] // kv_heads
    out = torch.zeros(*query.shape[:-1], heads * dv, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(query.shape[1]):
                seen = [j for j in range(i + 1) if not window or i - j < window]
                q = query[b, i, h * d : (h + 1) * d].tolist()
                s = [scale * sum(x * y for x, y in zip(q, key[b, j, kv * d : (kv + 1) * d].tolist(), strict=True)) for j in seen]
                e = [math.exp(softcap * math.tanh(x / softcap) if softcap else x) for x in s]
                for j, weight in zip(seen, e, strict=True):
                    out[b, i, h * dv : (h + 1) * dv] += weight / sum(e) * value[b, j, kv * dv : (kv + 1) * dv]
    return out


def case(heads, kv_heads, batch=2, length=6, d=3, dv=2, **options):
    return tuple(random(batch, length, n, seed=i, **options) for i, n in enumerate((heads * d, kv_heads * d, kv_heads * dv)))


@pytest.mark.parametrize("groups", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("window", "softcap"), BOUNDS)
def test_is_the_formula(groups, window, softcap):
    q, k, v = case(*groups, grad=False)
    got = windowed_attention(q, k, v, *groups, 0.7, window, softcap)
    torch.testing.assert_close(got, naive(q, k, v, *groups, 0.7, window, softcap), rtol=1e-12, atol=1e-12)
    if window in (0, 99) and not softcap:
        torch.testing.assert_close(got, attention(q, k, v, *groups, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap"), BOUNDS)
def test_gradient(window, softcap):
    inputs = case(4, 2, batch=1, length=4, d=2, dv=1)
    torch.autograd.gradcheck(lambda *x: windowed_attention(*x, 4, 2, 0.7, window, softcap), inputs)
    found = gradients(windowed_attention(*inputs, 4, 2, 0.7, 1, 0.0), list(inputs))
    assert not found[0].any() and not found[1].any() and found[2].any(), "a token that sees itself alone has one probability, 1"


def test_the_shape_without_values():
    q, k, v = (torch.empty(2, 5, n, device="meta") for n in (12, 6, 4))
    assert windowed_attention(q, k, v, 4, 2, 0.5, 3, 0.0).shape == (2, 5, 8)


def test_types():
    assert infer(OP, ANALOG, ANALOG, ANALOG, 4, 2, 0.5, 3, 0.0) == ANALOG
    for given in (SPIKES, CURRENT):
        with pytest.raises(TypeMismatch, match="decode it first"):
            infer(OP, given, ANALOG, ANALOG, 4, 2, 0.5, 3, 0.0)


@pytest.mark.parametrize(("window", "softcap"), BOUNDS)
def test_counts_the_keys_that_are_seen(window, softcap):
    batch, length, heads, d, dv = 2, 6, 4, 3, 2
    q, k, v = (torch.ones(batch, length, n) for n in (heads * d, 2 * d, 2 * dv))
    result = operand(torch.ones(batch, length, heads * dv))
    got = counts(OP, [operand(q), operand(k), operand(v)], result, q, k, v, heads, 2, 0.5, window, softcap)
    pairs = batch * sum(min(i + 1, window or length) for i in range(length))
    assert got.macs == pytest.approx(pairs * heads * (d + dv))
    assert got.dense_macs == batch * length * length * heads * (d + dv)
    assert got.elementwise == pytest.approx(pairs * heads * (8 if softcap else 3))
