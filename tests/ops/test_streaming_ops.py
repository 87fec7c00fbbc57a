"""The streaming forms of the ops: any split of a sequence gives the parallel op's result; counts, types, refusals."""

import importlib
import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, gradients, infer, item_of, node_of, operand, random, same_layout

from ntc.ops import (
    SPECS,
    Counts,
    TypeMismatch,
    attention,
    attention_stream,
    position_scale,
    row_sum_scale,
    row_sum_scale_stream,
    spiking_attention,
    spiking_attention_stream,
)
from ntc.ops.requantize import requantize, requantize_stream
from ntc.spike_type import ANALOG, INDEX

OPS = torch.ops.ntc
MODULE = importlib.import_module("ntc.ops.spiking_attention")
GROUPS = [(1, 1), (2, 2), (2, 1), (6, 2)]


def spikes(seed, *shape):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def splits(draw, longest=12):
    """A length, and pieces (start, stop) of it."""
    length = draw(st.integers(1, longest))
    cuts = draw(st.sets(st.integers(1, length)))
    return length, list(itertools.pairwise(sorted({0, length, *cuts})))


@given(splits(), st.sampled_from(GROUPS), st.integers(0, 6), st.sampled_from([0, 1, 3]), st.booleans(), st.integers(0, 99))
def test_spiking_attention_in_chunks_and_one_by_one(split, heads, recurrent, sizes, timed, seed):
    """With and without a leak, of all three shapes, whatever the number of tokens from which chunks are taken."""
    (length, pieces), (heads, kv_heads), lead = split, heads, (2, 1) if timed else (2,)
    q, k, v = (spikes(seed + i, *lead, length, n * d) for i, (n, d) in enumerate(((heads, 4), (kv_heads, 4), (kv_heads, 3))))
    size = {0: None, 1: kv_heads, 3: kv_heads * 4}[sizes]
    leak = None if size is None else torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    expected = spiking_attention(q, k, v, heads, kv_heads, leak)
    state, rows = torch.zeros(*lead, kv_heads, 4, 3), []
    with patch.multiple(MODULE, RECURRENT=recurrent, CHUNK=3, HEAD_LEAK_CHUNK=3, CHANNEL_LEAK_CHUNK=5):
        for start, stop in pieces:
            before = state.clone()
            y, new = spiking_attention_stream(*(x[..., start:stop, :] for x in (q, k, v)), state, heads, kv_heads, leak)
            assert torch.equal(state, before)
            state = new
            rows.append(y)
    if leak is None:
        assert torch.equal(torch.cat(rows, -2), expected)
    else:
        torch.testing.assert_close(torch.cat(rows, -2), expected, rtol=1e-5, atol=1e-5)
    memory = torch.zeros(*lead, kv_heads, 4, 3, dtype=torch.float64)
    keep = 1.0 if leak is None else leak.double().view(kv_heads, -1, 1)
    for i in range(length):
        memory = memory * keep + k[..., i, :].unflatten(-1, (kv_heads, 4, 1)) * v[..., i, :].unflatten(-1, (kv_heads, 1, 3))
    torch.testing.assert_close(state.double(), memory, rtol=1e-5, atol=1e-5)


@given(splits(), st.sampled_from(GROUPS), st.integers(0, 99))
def test_softmax_attention_with_a_cache(split, heads, seed):
    (length, pieces), (heads, kv_heads) = split, heads
    q, k, v = (random(2, length, n * d, seed=seed + i, grad=False) for i, (n, d) in enumerate(((heads, 4), (kv_heads, 4), (kv_heads, 3))))
    keys, values, rows = k[:, :0], v[:, :0], []
    for start, stop in pieces:
        y, keys, values = attention_stream(q[:, start:stop], k[:, start:stop], v[:, start:stop], keys, values, heads, kv_heads, 0.7)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), attention(q, k, v, heads, kv_heads, 0.7))
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@given(splits(), st.sampled_from(GROUPS), st.booleans(), st.integers(0, 99))
def test_row_sums_go_on(split, heads, timed, seed):
    (length, pieces), (heads, kv_heads), lead = split, heads, (2, 1) if timed else (2,)
    x = random(*lead, length, heads * 3, seed=seed, grad=False, dtype=torch.float32)
    q, k = spikes(seed, *lead, length, heads * 4), spikes(seed + 1, *lead, length, kv_heads * 4)
    sums, rows = torch.zeros(*lead, kv_heads * 4), []
    for start, stop in pieces:
        y, sums = row_sum_scale_stream(*(a[..., start:stop, :] for a in (x, q, k)), sums, heads, kv_heads)
        rows.append(y)
    assert torch.equal(torch.cat(rows, -2), row_sum_scale(x, q, k, heads, kv_heads)), "sums of spikes are exact"
    assert torch.equal(sums, k.sum(-2))


@given(splits(), st.booleans())
def test_scales_by_position_go_on(split, with_table):
    length, pieces = split
    x = random(3, 2, length, 8, grad=False, dtype=torch.float32)
    table = torch.rand(4, 15) + 0.1 if with_table else None
    parts = [position_scale(x[..., a:b, :], table, torch.tensor([a])) for a, b in pieces]
    assert torch.equal(torch.cat(parts, -2), position_scale(x, table))
    whole = torch.randint(-999, 999, (3, 2, length, 8), dtype=torch.int32)
    rows = torch.randint(1, 99, (4, 8), dtype=torch.int32)
    parts = [requantize_stream(whole[..., a:b, :], rows, 3, -128, 127, torch.tensor([a])) for a, b in pieces]
    assert torch.equal(torch.cat(parts, -2), requantize(whole, rows, 3, -128, 127))


def test_gradients_of_a_scale_of_later_tokens():
    x, table, start = random(2, 3, 4), random(2, 9, low=0.1), torch.tensor([4])
    torch.autograd.gradcheck(lambda a: position_scale(a, None, start), (x,))
    torch.autograd.gradcheck(lambda a, b: position_scale(a, b, start), (x, table))
    (to_table,) = gradients(position_scale(x, table, start), [table])
    assert not to_table[:, :4].any()
    assert not to_table[:, 7:].any()
    assert bool(to_table[:, 4:7].all())


def test_kernels_and_fakes_agree():
    q, k, v = (spikes(i, 2, 1, 5, 8) for i in range(3))
    state, start = torch.zeros(2, 1, 2, 4, 4), torch.tensor([3])
    calls = [
        (spiking_attention_stream, (q, k, v, state, 2, 2)), (spiking_attention_stream, (q, k, v, state, 2, 2, torch.full((2,), 0.5))),
        (row_sum_scale_stream, (q, q, k, torch.zeros(2, 1, 8), 2, 2)), (position_scale, (q, None, start)),
        (position_scale, (q, torch.rand(2, 9), start)), (attention_stream, (q[0], k[0], v[0], k[0, :, :3], v[0, :, :3], 2, 2, 0.5)),
        (requantize_stream, (q.int(), torch.ones(4, 8).int(), 2, -9, 9, start)),
    ]  # fmt: skip
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)
        assert same_layout(op, *arguments)
    long = [x.repeat(1, 1, 9, 1) for x in (q, k, v)]
    assert same_layout(spiking_attention_stream, *long, state, 2, 2)


def test_what_does_not_fit_is_refused():
    q, state = spikes(0, 2, 1, 5, 8), torch.zeros(2, 1, 2, 4, 4)
    with pytest.raises(ValueError, match="the leak of spiking attention has shape"):
        spiking_attention_stream(q, q, q, state, 2, 2, torch.ones(3))
    with pytest.raises(ValueError, match="row_sum_scale: 3 key heads must divide 2 heads"):
        row_sum_scale_stream(q, q, q, torch.zeros(2, 1, 8), 2, 3)
    with pytest.raises(ValueError, match=r"the position of the first token is one number, shape \[1\], not \[2\]"):
        position_scale(q, None, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="out of DATA bounds"):
        position_scale(q, torch.ones(2, 6), torch.tensor([3]))


def test_types():
    cache = OPS.attention_stream.default
    assert infer(cache, ANALOG, ANALOG, ANALOG, ANALOG, ANALOG, 2, 2, 0.5) == ANALOG
    assert item_of(cache, 1, ANALOG, ANALOG, ANALOG, ANALOG, ANALOG, 2, 2, 0.5) == ANALOG
    with pytest.raises(TypeMismatch, match=r"takes analog values, .*and %x0 is spikes"):
        infer(cache, SPIKES, ANALOG, ANALOG, ANALOG, ANALOG, 2, 2, 0.5)
    sums = OPS.row_sum_scale_stream.default
    for given_sums in (CURRENT, ANALOG):
        assert infer(sums, CURRENT, SPIKES, SPIKES, given_sums, 2, 2) == CURRENT
        assert item_of(sums, 1, CURRENT, SPIKES, SPIKES, given_sums, 2, 2) == CURRENT
    assert infer(sums, ANALOG, RATE, RATE, ANALOG, 2, 2) == ANALOG
    with pytest.raises(TypeMismatch, match="the sums of keys of row_sum_scale on current T=4 rate cannot be %x3, which is index"):
        infer(sums, CURRENT, SPIKES, SPIKES, INDEX, 2, 2)
    scale = OPS.position_scale.default
    assert infer(scale, CURRENT, None, INDEX) == CURRENT
    assert infer(scale, CURRENT, Constant((2, 9)), INDEX) == CURRENT
    with pytest.raises(TypeMismatch, match="a position is an index, and %x2 is analog"):
        infer(scale, CURRENT, None, ANALOG)


def test_operations_of_the_streaming_forms():
    """Spiking: what the spikes write and read; of rates: the whole memory. Softmax: the keys that are there."""
    q, k, v, state = torch.zeros(4, 1, 2, 8), torch.zeros(4, 1, 2, 4), torch.zeros(4, 1, 2, 6), torch.zeros(4, 1, 1, 4, 6)
    q[0, 0, 0, :3], k[0, 0, 0, :2], v[0, 0, 0, :5] = 1, -1, 1
    measure = torch.ops.ntc.spiking_attention_stream.default
    node, _ = node_of(measure, SPIKES, SPIKES, SPIKES, CURRENT, 2, 1)
    y, _ = spiking_attention_stream(q, k, v, state, 2, 1)
    found = SPECS[measure].measure([q, k, v, state], y, node)
    assert found == {"write": 10, "read": 18}
    given = [operand(q, SPIKES), operand(k, SPIKES), operand(v, SPIKES), operand(state, CURRENT)]
    arguments = (SPIKES, SPIKES, SPIKES, CURRENT, 2, 1)
    # Entries of M 4 x 6; two tokens; written once and read by two heads.
    assert counts(measure, given, operand(y, CURRENT), *arguments, measured=found) == Counts(dense_macs=2 * 3 * 24, acs=28)
    with_leak = SPECS[measure].measure([q, k, v, state, torch.ones(1)], y, node)
    assert with_leak == {**found, "leak": 4 * 2 * 24}
    assert counts(measure, [*given, operand(torch.ones(1))], operand(y, CURRENT), *arguments, measured=with_leak).macs == 4 * 2 * 24
    rates = [operand(x[0], RATE) for x in (q, k, v)]
    assert counts(measure, [*rates, operand(state[0])], operand(y[0]), RATE, RATE, RATE, ANALOG, 2, 1) == Counts(dense_macs=144, macs=144)
    cache = [operand(x) for x in (torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 5, 8), torch.ones(1, 5, 8))]
    expected = Counts(dense_macs=2 * 7 * 16, macs=2 * 6.5 * 16, elementwise=3 * 2 * 2 * 6.5)
    assert counts(OPS.attention_stream.default, cache, operand(torch.ones(1, 2, 8)), *[ANALOG] * 5, 2, 2, 0.5) == expected
