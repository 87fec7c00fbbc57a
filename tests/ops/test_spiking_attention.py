"""Spiking attention: parallel and streaming forms give the same integers, and with a leak the recurrence up to rounding."""

import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import gradients, random, same_layout
from spiking_attention_cases import MODULE, chunked, leaks, naive, sequential, spike_cases

from ntc.ops import spiking_attention, spiking_attention_stream


def stream(query, key, value, heads, kv_heads, cuts):
    """The streaming form over the pieces between the cuts, with the state carried."""
    d, dv = query.shape[-1] // heads, value.shape[-1] // kv_heads
    state, rows = query.new_zeros(*query.shape[:-2], kv_heads, d, dv), []
    edges = sorted({0, *cuts, query.shape[-2]})
    for start, stop in itertools.pairwise(edges):
        before = state.clone()
        y, new = spiking_attention_stream(*(x[..., start:stop, :] for x in (query, key, value)), state, heads, kv_heads)
        assert torch.equal(state, before)  # the op makes a new state and leaves the old one
        state = new
        rows.append(y)
    return torch.cat(rows, -2), state


@settings(max_examples=1000, deadline=None)
@given(spike_cases(), st.data())
def test_parallel_and_streaming_give_the_same_integers(case, data):
    length = case[0].shape[-2]
    with patch.object(MODULE, "CHUNK", data.draw(st.integers(1, length + 1), label="CHUNK")):
        parallel = spiking_attention(*case)
    streamed, state = stream(*case, data.draw(st.sets(st.integers(0, length)), label="cuts"))
    expected, _ = naive(*case)
    assert torch.equal(parallel, expected.float())
    assert torch.equal(streamed, expected.float())
    _, key, value, _, kv_heads = case
    k, v = (x.unflatten(-1, (kv_heads, x.shape[-1] // kv_heads)) for x in (key, value))
    assert torch.equal(state, torch.einsum("tblhd,tblhe->tbhde", k, v))


@settings(max_examples=300, deadline=None)
@given(spike_cases(longest=12), st.data())
def test_with_a_leak_both_forms_are_the_recurrence_up_to_rounding(case, data):
    query, key, value, heads, kv_heads = case
    d, dv = key.shape[-1] // kv_heads, value.shape[-1] // kv_heads
    size = data.draw(st.sampled_from(leaks(kv_heads, d)), label="size")
    values = data.draw(st.lists(st.one_of(st.floats(1e-3, 1.0), st.just(1.0)), min_size=size, max_size=size), label="leak")
    leak = torch.tensor(values, dtype=torch.float64)
    expected = sequential(query, key, value, heads, kv_heads, leak)
    with chunked(data.draw(st.integers(1, 13), label="head"), data.draw(st.integers(1, 13), label="channel")):
        parallel = spiking_attention(*case, leak.float())
    state = torch.zeros(*query.shape[:-2], kv_heads, d, dv)
    cut = data.draw(st.integers(1, query.shape[-2]), label="cut")
    rows = []
    for part in (slice(0, cut), slice(cut, None)):
        if query[..., part, :].shape[-2]:
            y, state = spiking_attention_stream(*(x[..., part, :] for x in (query, key, value)), state, heads, kv_heads, leak.float())
            rows.append(y)
    for found in (parallel, torch.cat(rows, -2)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 * d)
    if all(v == 1.0 for v in values):
        assert torch.equal(parallel, spiking_attention(*case))


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize("smallest", [1e-3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_long_texts(size, smallest, dtype):
    """float32: 1e-6 of the largest count at any leak and distance; bfloat16: its own rounding, in products and in the result."""
    length, heads, kv_heads, d = 300, 4, 2, 32
    q, k, v = ((random(2, 1, length, n * d, seed=i, grad=False, dtype=torch.float32) > 0.7).float() for i, n in enumerate((heads, kv_heads, kv_heads)))
    leak = torch.linspace(smallest, 1.0, size, dtype=torch.float64) if size > 1 else torch.tensor([smallest], dtype=torch.float64)
    expected = sequential(q, k, v, heads, kv_heads, leak)
    found = spiking_attention(q.to(dtype), k.to(dtype), v.to(dtype), heads, kv_heads, leak.float())
    assert found.dtype == dtype
    # A leak itself is rounded to float32, which the result magnifies by the tokens that it remembers.
    bound = 2e-6 + 6e-8 * length if dtype == torch.float32 else 1.5 * 2.0**-8
    assert float((found.double() - expected).abs().max() / expected.max()) < bound


@pytest.mark.parametrize("leak", [1e-3, 1e-5, 1e-12])
def test_a_tiny_leak_forgets_and_nothing_overflows(leak):
    """Also where its powers do not fit into float32: what is left of other tokens is less than 3e-5 of them."""
    q, k, v = (random(1, 1, 40, 8, seed=i, dtype=torch.float32) for i in range(3))
    for size in (1, 2, 8):
        given_leak = torch.full((size,), leak, requires_grad=True)
        y = spiking_attention(q, k, v, 2, 2, given_leak)
        alone = torch.stack([spiking_attention(q[..., i : i + 1, :], k[..., i : i + 1, :], v[..., i : i + 1, :], 2, 2) for i in range(40)], -2).flatten(-3, -2)
        torch.testing.assert_close(y, alone, rtol=0, atol=20 * max(leak, 2**-15))
        assert all(bool(g.isfinite().all()) for g in gradients(y, [q, k, v]))


def test_a_leak_by_hand():
    q = k = torch.ones(1, 1, 3, 2)
    v = torch.tensor([8.0, 4.0, 2.0]).view(1, 1, 3, 1)
    # lambda = 1/2: (8, 4 + 4, 2 + 4) per channel, two of them; channels 1/2 and 1/4: 8 + 8, (4 + 4) + (4 + 2), (2 + 4) + (2 + 1.5)
    for leak, expected in (([0.5], [16, 16, 12]), ([0.5, 0.25], [16, 14, 9.5]), ([1.0], [16, 24, 28])):
        assert spiking_attention(q, k, v, 1, 1, torch.tensor(leak)).flatten().tolist() == expected


def test_by_hand():
    q, k, v = (torch.tensor(x, dtype=torch.float32).view(1, 1, 3, 2) for x in ([1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1]))
    # scores, j <= i: [1], [0, 1], [1, 1, 0]
    assert spiking_attention(q, k, v, 1, 1).tolist() == [[[[1, 0], [0, 1], [1, 1]]]]


def test_chunks_of_the_default_size_are_exact_and_bounded_in_memory():
    length = 2 * MODULE.CHUNK + 3
    q, k, v = ((random(1, 1, length, 8, seed=i, grad=False, dtype=torch.float32) > 0.5).float() for i in range(3))
    scores = torch.einsum("tbid,tbjd->tbij", q, k).tril()
    assert torch.equal(spiking_attention(q, k, v, 1, 1), scores @ v)
    assert float(scores.max()) > 4
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        MODULE.spiking_attention._init_fn(q, k, v, 1, 1)  # the kernel itself: the op is opaque
    assert largest <= max(MODULE.CHUNK**2, q.numel())


def test_exact_up_to_two_to_the_24():
    # All ones: Y of the last token is L D.
    for length, d, exact in ((16, 2**20 - 1, True), (17, 2**20 - 1, False)):
        ones = torch.ones(1, 1, length, d)
        last = spiking_attention(ones, ones, torch.ones(1, 1, length, 1), 1, 1)[0, 0, -1, 0]
        assert (length * d < 2**24) == exact
        assert (int(last) == length * d) == exact


@settings(max_examples=50, deadline=None)
@given(spike_cases())
def test_does_not_look_ahead(case):
    query, key, value, heads, kv_heads = case
    cut = query.shape[-2] // 2
    y = spiking_attention(*case)
    later = [torch.cat([x[..., :cut, :], 1 - x[..., cut:, :]], -2) for x in (query, key, value)]
    assert torch.equal(spiking_attention(*later, heads, kv_heads)[..., :cut, :], y[..., :cut, :])


@pytest.mark.parametrize("lead", [(2,), (3, 2)])
def test_takes_any_leading_axes(lead):
    x = tuple(random(*lead, 4, n, seed=i, grad=False) for i, n in enumerate((8, 4, 2)))
    y = spiking_attention(*x, 4, 2)
    one = tuple(t.reshape(-1, 1, *t.shape[-2:])[-1] for t in x)
    assert y.shape == (*lead, 4, 4)
    torch.testing.assert_close(y.reshape(-1, 1, 4, 4)[-1], spiking_attention(*one, 4, 2))


def test_opcheck_and_layout():
    x = tuple(random(2, 2, 3, n, seed=i, dtype=torch.float32) for i, n in enumerate((8, 4, 6)))
    for leak in (None, random(1, low=0.5, high=1.0, dtype=torch.float32), random(4, low=0.5, high=1.0, dtype=torch.float32)):
        torch.library.opcheck(spiking_attention, (*x, 4, 2, leak))
    plain = tuple(t.detach() for t in x)
    state = torch.zeros(2, 2, 2, 2, 3)
    # The streaming form is for decoding and has no gradient: its inputs do not require one.
    torch.library.opcheck(spiking_attention_stream, (*plain, state, 4, 2, torch.tensor([0.5, 0.25])))
    swapped = tuple(t.transpose(0, 1) for t in plain)
    assert same_layout(spiking_attention, *swapped, 4, 2)
    assert same_layout(spiking_attention, *swapped, 4, 2, torch.full((4,), 0.5))
    assert same_layout(spiking_attention_stream, *swapped, state.transpose(0, 1), 4, 2)
