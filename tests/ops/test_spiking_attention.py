import importlib
import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    CURRENT,
    GRADED,
    RATE,
    SPIKES,
    TERNARY,
    Constant,
    counts,
    gradients,
    infer,
    item_of,
    node_of,
    operand,
    random,
    same_layout,
)

from ntc.ops import Counts, TypeMismatch, spiking_attention, spiking_attention_stream
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

MODULE = importlib.import_module("ntc.ops.spiking_attention")  # ntc.ops has the op under this name
OP = torch.ops.ntc.spiking_attention.default
STREAM = torch.ops.ntc.spiking_attention_stream.default
GROUPS = [(1, 1), (2, 2), (2, 1), (4, 2), (3, 1)]


@st.composite
def spike_cases(draw, longest=7):
    """Binary or ternary q, k, v of any small shape, with grouped-query heads."""
    steps, batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, longest))
    heads, kv_heads = draw(st.sampled_from(GROUPS))
    d, dv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    low, density = draw(st.sampled_from([0, -1])), draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def spikes(width):
        shape = (steps, batch, length, width)
        sign = 1 if low == 0 else torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (torch.rand(shape, generator=generator) < density).float() * sign

    return spikes(heads * d), spikes(kv_heads * d), spikes(kv_heads * dv), heads, kv_heads


def naive(query, key, value, heads, kv_heads):
    """``Y_i = sum_{j <= i} (Q_i . K_j) V_j`` in Python integers, and the accumulates that each form makes."""
    steps, batch, length, width = query.shape
    d, dv, groups = width // heads, value.shape[-1] // kv_heads, heads // kv_heads
    q, k, v = (x.long().tolist() for x in (query, key, value))
    out = torch.zeros(steps, batch, length, heads * dv, dtype=torch.int64).tolist()
    work = {"scores": 0, "values": 0, "write": 0, "read": 0}
    for t in range(steps):
        for b in range(batch):
            for i in range(length):
                for h in range(heads):
                    kv, q_i = h // groups, q[t][b][i][h * d : (h + 1) * d]
                    work["read"] += sum(map(abs, q_i)) * dv
                    for j in range(i + 1):
                        k_j, v_j = k[t][b][j][kv * d : (kv + 1) * d], v[t][b][j][kv * dv : (kv + 1) * dv]
                        score = sum(x * y for x, y in zip(q_i, k_j, strict=True))
                        work["scores"] += sum(map(abs, q_i))
                        work["values"] += sum(map(abs, v_j)) if score else 0
                        for c in range(dv):
                            out[t][b][i][h * dv + c] += score * v_j[c]
                for kv in range(kv_heads):
                    k_i, v_i = k[t][b][i][kv * d : (kv + 1) * d], v[t][b][i][kv * dv : (kv + 1) * dv]
                    work["write"] += sum(1 for x in k_i for y in v_i if x * y)
    return torch.tensor(out), work


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


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("chunk", [2, 256])
def test_gradient(groups, chunk):
    heads, kv_heads = groups
    x = tuple(random(1, 1, 3, n, seed=i) for i, n in enumerate((heads * 2, kv_heads * 2, kv_heads)))
    with patch.object(MODULE, "CHUNK", chunk):
        torch.autograd.gradcheck(lambda *t: spiking_attention(*t, heads, kv_heads), x)


@pytest.mark.parametrize("lead", [(2,), (3, 2)])
def test_takes_any_leading_axes(lead):
    x = tuple(random(*lead, 4, n, seed=i, grad=False) for i, n in enumerate((8, 4, 2)))
    y = spiking_attention(*x, 4, 2)
    one = tuple(t.reshape(-1, 1, *t.shape[-2:])[-1] for t in x)
    assert y.shape == (*lead, 4, 4)
    torch.testing.assert_close(y.reshape(-1, 1, 4, 4)[-1], spiking_attention(*one, 4, 2))


def test_opcheck_and_layout():
    x = tuple(random(2, 2, 3, n, seed=i, dtype=torch.float32) for i, n in enumerate((8, 4, 6)))
    torch.library.opcheck(spiking_attention, (*x, 4, 2))
    plain = tuple(t.detach() for t in x)
    state = torch.zeros(2, 2, 2, 2, 3)
    # The streaming form is for decoding and has no gradient: its inputs do not require one.
    torch.library.opcheck(spiking_attention_stream, (*plain, state, 4, 2))
    swapped = tuple(t.transpose(0, 1) for t in plain)
    assert same_layout(spiking_attention, *swapped, 4, 2)
    assert same_layout(spiking_attention_stream, *swapped, state.transpose(0, 1), 4, 2)


def test_compiles_with_gradients_for_any_length():
    def f(q, k, v):
        return 2 * spiking_attention(2 * q, k, v, 4, 2)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 3):
        x = [random(2, 1, length, n, seed=i, dtype=torch.float32) for i, n in enumerate((8, 4, 6))]
        a, b = f(*x), compiled(*x)
        assert torch.equal(a, b)
        for one, two in zip(gradients(a, x), gradients(b, x), strict=True):
            torch.testing.assert_close(one, two)

    def g(q, k, v, state):
        y, state = spiking_attention_stream(q, k, v, state, 4, 2)
        return y + 1, state

    x = [t.detach().round() for t in x]
    state = torch.ones(2, 1, 2, 2, 3)
    for one, two in zip(g(*x, state), torch.compile(g, backend="aot_eager", fullgraph=True)(*x, state), strict=True):
        assert torch.equal(one, two)


OTHER_STEPS, PHASE = SpikeType(8), SpikeType(4, "phase")


@pytest.mark.parametrize(("given", "result"), [
    ((SPIKES, SPIKES, SPIKES), CURRENT),
    ((TERNARY, SPIKES, TERNARY), CURRENT),
    ((PHASE, PHASE, PHASE), CurrentType(4, "phase")),
    ((RATE, RATE, RATE), ANALOG),
    ((RATE, SPIKES, SPIKES), "x0"),
    ((SPIKES, SPIKES, RATE), "x2"),
    ((SPIKES, OTHER_STEPS, SPIKES), "x1"),
    ((SPIKES, SPIKES, OTHER_STEPS), "x2"),
    ((SPIKES, PHASE, SPIKES), "x1"),
    ((GRADED, SPIKES, SPIKES), "x0"),
    ((SPIKES, GRADED, SPIKES), "x1"),
    ((CURRENT, CURRENT, CURRENT), "x0"),
    ((ANALOG, ANALOG, ANALOG), "x0"),
    ((SPIKES, SPIKES, ANALOG), "x2"),
])  # fmt: skip
def test_types(given, result):
    if isinstance(result, str):
        for target, state in ((OP, ()), (STREAM, (ANALOG,))):
            with pytest.raises(TypeMismatch, match=f"%{result} is") as caught:
                infer(target, *given, *state, 2, 2)
            assert caught.value.argument.name == result
    else:
        assert infer(OP, *given, 2, 2) == result
        assert infer(STREAM, *given, ANALOG, 2, 2) == result
        assert infer(STREAM, *given, result, 2, 2) == result  # the state of a call before
        assert [item_of(STREAM, i, *given, Constant((4, 2, 2, 4, 4)), 2, 2) for i in (0, 1)] == [result, result]


@pytest.mark.parametrize("state", [SPIKES, RATE, INDEX, CurrentType(8), CurrentType(4, "count")])
def test_a_state_of_another_type_is_refused(state):
    with pytest.raises(TypeMismatch, match=r"the state of spiking attention .* cannot be %x3"):
        infer(STREAM, SPIKES, SPIKES, SPIKES, state, 2, 2)


@settings(max_examples=150, deadline=None)
@given(spike_cases(), st.integers(1, 8))
def test_measured_work_is_the_work_of_the_loops(case, chunk):
    query, key, value, heads, kv_heads = case
    expected, work = naive(*case)
    node, _ = node_of(OP, SPIKES, SPIKES, SPIKES, heads, kv_heads)
    with patch.object(MODULE, "CHUNK", chunk):
        measured = MODULE.SPIKING_ATTENTION.measure((query, key, value), expected, node)
    assert measured == work


def test_coincidences_that_cancel_add_nothing():
    q, k, v = (torch.tensor(x, dtype=torch.float32).view(1, 1, 1, -1) for x in ([1, 1], [1, -1], [1, -1, 1]))
    assert spiking_attention(q, k, v, 1, 1).tolist() == [[[[0, 0, 0]]]]
    node, _ = node_of(OP, TERNARY, TERNARY, TERNARY, 1, 1)
    assert MODULE.SPIKING_ATTENTION.measure((q, k, v), q, node) == {"scores": 2, "values": 0, "write": 6, "read": 6}


def test_counting():
    # T = 4, B = 2, L = 3, H = 4, Hk = 2, D = 3, Dv = 2.
    q, k, v, y = (torch.ones(4, 2, 3, n) for n in (12, 6, 4, 8))
    measured = {"scores": 5.0, "values": 7.0, "write": 11.0, "read": 13.0}
    operands = [operand(x, SPIKES) for x in (q, k, v)]
    got = counts(OP, operands, operand(y, CURRENT), SPIKES, SPIKES, SPIKES, 4, 2, measured=measured)
    assert got == Counts(dense_macs=2 * 4 * 9 * (3 + 2), acs=12)
    # Rates are real numbers: causal multiply-accumulates, 6 pairs of the 9.
    operands = [operand(x[0], RATE) for x in (q, k, v)]
    assert counts(OP, operands, operand(y[0]), RATE, RATE, RATE, 4, 2) == Counts(dense_macs=360, macs=2 * 4 * 6 * (3 + 2))
