import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, counts, gradients, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, attention
from ntc.ops.attention import merge_heads, split_heads
from ntc.spike_type import ANALOG

OP = torch.ops.ntc.attention.default


def naive(query, key, value, heads, kv_heads, scale):
    """The formula of the module's docstring, one number at a time."""
    d, dv = query.shape[-1] // heads, value.shape[-1] // kv_heads
    out = torch.zeros(*query.shape[:-1], heads * dv, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for i in range(query.shape[1]):
                q = query[b, i, h * d : (h + 1) * d].tolist()
                e = [math.exp(scale * sum(x * y for x, y in zip(q, key[b, j, kv * d : (kv + 1) * d].tolist(), strict=True))) for j in range(i + 1)]
                for j in range(i + 1):
                    out[b, i, h * dv : (h + 1) * dv] += e[j] / sum(e) * value[b, j, kv * dv : (kv + 1) * dv]
    return out


def case(heads, kv_heads, batch=2, length=5, d=3, dv=2, **options):
    return tuple(random(batch, length, n, seed=i, **options) for i, n in enumerate((heads * d, kv_heads * d, kv_heads * dv)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (3, 1)]), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_is_causal_softmax_attention(groups, length, d, dv):
    q, k, v = case(*groups, length=length, d=d, dv=dv, grad=False)
    torch.testing.assert_close(attention(q, k, v, *groups, 0.7), naive(q, k, v, *groups, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [(2, 2), (4, 2), (4, 1)])
def test_gradient(groups):
    heads, kv_heads = groups
    q, k, v = case(heads, kv_heads)
    ours = attention(q, k, v, heads, kv_heads, 0.7)
    theirs = merge_heads(torch.nn.functional.scaled_dot_product_attention(
        split_heads(q, heads), split_heads(k, kv_heads), split_heads(v, kv_heads), is_causal=True, scale=0.7, enable_gqa=True
    ))  # fmt: skip
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, [q, k, v]), gradients(theirs, [q, k, v]), strict=True):
        torch.testing.assert_close(a, b)
    torch.autograd.gradcheck(lambda *x: attention(*x, heads, kv_heads, 0.7), case(heads, kv_heads, batch=1, length=3, d=2, dv=1))


def test_does_not_look_ahead():
    q, k, v = case(4, 2, grad=False)
    y = attention(q, k, v, 4, 2, 0.5)
    for x in (q, k, v):
        x[:, 3:] += 1
    assert torch.equal(attention(q, k, v, 4, 2, 0.5)[:, :3], y[:, :3])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_heads_split_and_merge(length, heads, d):
    x = torch.arange(2 * length * heads * d).view(2, length, heads * d)
    split = split_heads(x, heads)
    assert split.shape == (2, heads, length, d)
    assert int(split[1, -1, 0, -1]) == int(x[1, 0, -1])
    assert torch.equal(merge_heads(split), x)


def test_opcheck_and_layout():
    x = case(4, 2, dtype=torch.float32)
    torch.library.opcheck(attention, (*x, 4, 2, 0.5))
    assert same_layout(attention, *(t.detach().transpose(0, 1) for t in x), 4, 2, 0.5)


def test_compiles_with_gradients_for_any_length():
    def f(q, k, v):
        return 2 * attention(2 * q, k, v, 4, 2, 0.5)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 3):
        x = case(4, 2, length=length, dtype=torch.float32)
        a, b = f(*x), compiled(*x)
        assert torch.equal(a, b)
        for one, two in zip(gradients(a, list(x)), gradients(b, list(x)), strict=True):
            torch.testing.assert_close(one, two)


def test_types():
    assert infer(OP, ANALOG, ANALOG, ANALOG, 2, 2, 1.0) == ANALOG
    for kind in (SPIKES, CURRENT, RATE):
        for place in range(3):
            given = [ANALOG] * 3
            given[place] = kind
            with pytest.raises(TypeMismatch, match=f"%x{place} is .*decode it first"):
                infer(OP, *given, 2, 2, 1.0)


def test_counting():
    # B = 2, L = 3, H = 4, Hk = 2, D = 3, Dv = 2. A query sees 1, 2, 3 keys: 6 pairs of the 9, per batch and head.
    q, k, v = (torch.ones(2, 3, n) for n in (12, 6, 4))
    got = counts(OP, [operand(q), operand(k), operand(v)], operand(torch.ones(2, 3, 8)), q, k, v, 4, 2, 0.5)
    pairs = sum(1 for _ in range(2) for _ in range(4) for i in range(3) for j in range(3) if j <= i)
    assert pairs == 48
    assert got == Counts(dense_macs=2 * 4 * 9 * (3 + 2), macs=pairs * (3 + 2), elementwise=3 * pairs)
