"""Gradients of spiking attention, with and without a leak: against finite differences and the recurrence in float64."""

from unittest.mock import patch

import pytest
import torch
from op_cases import gradients, random
from spiking_attention_cases import GROUPS, MODULE, chunked, leaks, sequential

from ntc.ops import spiking_attention, spiking_attention_stream


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("chunk", [2, 256])
def test_gradient(groups, chunk):
    heads, kv_heads = groups
    x = tuple(random(1, 1, 3, n, seed=i) for i, n in enumerate((heads * 2, kv_heads * 2, kv_heads)))
    with patch.object(MODULE, "CHUNK", chunk):
        torch.autograd.gradcheck(lambda *t: spiking_attention(*t, heads, kv_heads), x)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("chunk", [2, 64])
def test_gradient_with_a_leak(groups, chunk):
    heads, kv_heads = groups
    x = tuple(random(2, 1, 5, n, seed=i) for i, n in enumerate((heads * 2, kv_heads * 2, kv_heads)))
    for size in leaks(kv_heads, 2):
        leak = random(size, low=0.05, high=1.0, seed=size)
        with chunked(chunk, chunk):
            torch.autograd.gradcheck(lambda *t: spiking_attention(*t[:3], heads, kv_heads, t[3]), (*x, leak), fast_mode=chunk > 2)


@pytest.mark.parametrize("size", [1, 2, 32])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_long_texts(size, dtype, bound):
    """Against those of the recurrence in float64, in the norm: rounding, whatever the length."""
    length, heads, kv_heads, d = 150, 4, 2, 16
    x = [(random(2, 1, length, n * d, seed=i, grad=False, dtype=torch.float32) > 0.7).float() for i, n in enumerate((heads, kv_heads, kv_heads))]
    leak = torch.linspace(0.4, 0.98, size)
    ours = [t.to(dtype).requires_grad_() for t in x] + [leak.clone().requires_grad_()]
    exact = [t.double().requires_grad_() for t in (*x, leak)]
    found = gradients(spiking_attention(*ours[:3], heads, kv_heads, ours[3]), ours)
    weight = torch.randn(2, 1, length, heads * d, generator=torch.Generator().manual_seed(0), dtype=dtype).double()
    expected = torch.autograd.grad((sequential(*exact[:3], heads, kv_heads, exact[3]) * weight).sum(), exact)
    for a, b, given_tensor in zip(found, expected, ours, strict=True):
        assert a.dtype == given_tensor.dtype
        assert float((a.double() - b).norm() / b.norm()) < bound


def test_half_precision_has_room_for_the_powers_of_a_leak():
    q, k, v = ((random(1, 1, 40, 8, seed=i, grad=False) > 0.5).half().requires_grad_() for i in range(3))
    leak = torch.linspace(0.01, 0.9, 8)
    y = spiking_attention(q, k, v, 2, 2, leak)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), sequential(q, k, v, 2, 2, leak), rtol=2**-10, atol=2**-10)
    assert all(g.dtype == torch.float16 and bool(g.isfinite().all()) for g in gradients(y, [q, k, v]))


def test_compiles_with_gradients_for_any_length():
    def f(q, k, v, leak):
        return 2 * spiking_attention(2 * q, k, v, 4, 2) + spiking_attention(q, k, v, 4, 2, leak)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 3):
        x = [random(2, 1, length, n, seed=i, dtype=torch.float32) for i, n in enumerate((8, 4, 6))]
        x.append(random(4, low=0.5, high=1.0, dtype=torch.float32))
        a, b = f(*x), compiled(*x)
        assert torch.equal(a, b)
        for one, two in zip(gradients(a, x), gradients(b, x), strict=True):
            torch.testing.assert_close(one, two)

    def g(q, k, v, state):
        y, state = spiking_attention_stream(q, k, v, state, 4, 2)
        return y + 1, state

    x = [t.detach().round() for t in x[:3]]
    state = torch.ones(2, 1, 2, 2, 3)
    for one, two in zip(g(*x, state), torch.compile(g, backend="aot_eager", fullgraph=True)(*x, state), strict=True):
        assert torch.equal(one, two)
