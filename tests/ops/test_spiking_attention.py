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
from torch import nn

from ntc.ops import SPECS, Counts, TypeMismatch, events, spiking_attention, spiking_attention_stream
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


def naive(query, key, value, heads, kv_heads, leak_is=None):
    """``Y_i = sum_{j <= i} (Q_i . K_j) V_j`` in Python integers, and the operations that each form makes."""
    steps, batch, length, width = query.shape
    d, dv, groups = width // heads, value.shape[-1] // kv_heads, heads // kv_heads
    q, k, v = (x.long().tolist() for x in (query, key, value))
    out = torch.zeros(steps, batch, length, heads * dv, dtype=torch.int64).tolist()
    work = {"scores": 0, "values": 0, "write": 0, "read": 0, "decays": 0, "leak": steps * batch * length * kv_heads * d * dv}
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
                        met = sum(abs(x * y) for x, y in zip(q_i, k_j, strict=True))
                        work["values"] += sum(map(abs, v_j)) if (met if leak_is == "channel" else score) else 0
                        work["decays"] += met if leak_is == "channel" else bool(score)
                        for c in range(dv):
                            out[t][b][i][h * dv + c] += score * v_j[c]
                for kv in range(kv_heads):
                    k_i, v_i = k[t][b][i][kv * d : (kv + 1) * d], v[t][b][i][kv * dv : (kv + 1) * dv]
                    work["write"] += sum(1 for x in k_i for y in v_i if x * y)
    if leak_is is None:
        del work["decays"], work["leak"]
    return torch.tensor(out), work


def sequential(query, key, value, heads, kv_heads, leak, dtype=torch.float64):
    """``M_i = diag(lambda) M_{i-1} + K_i (x) V_i``, ``Y_i = Q_i M_i``, token by token; any shape of leak; differentiable."""
    q, k, v = (x.to(dtype).unflatten(-1, (n, -1)) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    keep = leak.to(dtype)
    keep = keep.expand(kv_heads, 1) if keep.shape[0] == 1 else keep.view(kv_heads, -1)
    memory, rows = 0.0, []
    for i in range(query.shape[-2]):
        memory = keep.unsqueeze(-1) * memory + k[..., i, :, :, None] * v[..., i, :, None, :]
        read = memory.repeat_interleave(heads // kv_heads, dim=-3)
        rows.append((q[..., i, :, None, :] @ read).squeeze(-2).flatten(-2))
    return torch.stack(rows, -2)


def leaks(kv_heads, d):
    """Sizes of a leak: one number, one per key head, one per key channel."""
    return sorted({1, kv_heads, kv_heads * d})


def chunked(head=3, channel=19):
    """The kernels with small chunks, so that a few tokens are several."""
    return patch.multiple(MODULE, CHUNK=head, HEAD_LEAK_CHUNK=head, CHANNEL_LEAK_CHUNK=channel)


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


def test_half_precision_has_room_for_the_powers_of_a_leak():
    q, k, v = ((random(1, 1, 40, 8, seed=i, grad=False) > 0.5).half().requires_grad_() for i in range(3))
    leak = torch.linspace(0.01, 0.9, 8)
    y = spiking_attention(q, k, v, 2, 2, leak)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), sequential(q, k, v, 2, 2, leak), rtol=2**-10, atol=2**-10)
    assert all(g.dtype == torch.float16 and bool(g.isfinite().all()) for g in gradients(y, [q, k, v]))


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


@pytest.mark.parametrize("shape", [(3,), (1, 2), (), (16,)])
def test_a_leak_of_another_shape_is_refused(shape):
    x = tuple(random(2, 1, 3, n, seed=i, grad=False, dtype=torch.float32) for i, n in enumerate((16, 8, 4)))
    message = r"the leak of spiking attention has shape \[1\], \[2\] \(one number per key head\) or \[8\] \(one per key channel\), and not"
    with pytest.raises(ValueError, match=message):
        spiking_attention(*x, 4, 2, torch.full(shape, 0.5))
    with pytest.raises(ValueError, match=message):
        spiking_attention_stream(*x, torch.zeros(2, 1, 2, 4, 2), 4, 2, torch.full(shape, 0.5))
    with pytest.raises(ValueError, match=message), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        spiking_attention(*x, 4, 2, torch.full(shape, 0.5))


@pytest.mark.parametrize(("target", "before"), [(OP, ()), (STREAM, (ANALOG,))])
def test_types_with_a_leak(target, before):
    arguments = (SPIKES, SPIKES, SPIKES, *before, 2, 2)
    assert infer(target, *arguments, Constant((2,))) == CURRENT
    with pytest.raises(TypeMismatch, match=rf"the leak of spiking attention is an analog value, and %x{len(arguments)} is"):
        infer(target, *arguments, SPIKES)
    owner = nn.Module()
    for value, fits in ((0.5, True), (1.0, True), (0.0, False), (1.5, False), (float("nan"), False)):
        node, types = node_of(target, *arguments, Constant((2,)))
        owner.register_buffer(f"c{len(arguments)}", torch.tensor([0.25, value]))
        node.graph.owning_module = owner
        if fits:
            assert SPECS[target].infer(node, types.__getitem__) == CURRENT
        else:
            with pytest.raises(TypeMismatch, match=rf"lies in \(0, 1\], and element 1 of %c{len(arguments)} is {value:g}"):
                SPECS[target].infer(node, types.__getitem__)


@pytest.mark.parametrize("state", [SPIKES, RATE, INDEX, CurrentType(8), CurrentType(4, "count")])
def test_a_state_of_another_type_is_refused(state):
    with pytest.raises(TypeMismatch, match=r"the state of spiking attention .* cannot be %x3"):
        infer(STREAM, SPIKES, SPIKES, SPIKES, state, 2, 2)


@settings(max_examples=150, deadline=None)
@given(spike_cases(), st.integers(1, 8), st.sampled_from([None, "head", "channel"]))
def test_measured_work_is_the_work_of_the_loops(case, chunk, leak_is):
    query, key, value, heads, kv_heads = case
    if leak_is == "channel" and key.shape[-1] == kv_heads:
        leak_is = "head"  # one channel per head
    expected, work = naive(*case, leak_is)
    leak = () if leak_is is None else (torch.full((kv_heads if leak_is == "head" else key.shape[-1],), 0.5),)
    node, _ = node_of(OP, SPIKES, SPIKES, SPIKES, heads, kv_heads, *(Constant(tuple(t.shape)) for t in leak))
    with patch.object(events, "_TOKENS", chunk):
        measured = MODULE.SPIKING_ATTENTION.measure((query, key, value, *leak), expected, node)
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
    # A leak per key head, or per key channel: multiplications.
    leaky = [*operands, operand(torch.full((2,), 0.5))]
    got = counts(OP, leaky, operand(y, CURRENT), SPIKES, SPIKES, SPIKES, 4, 2, measured=measured | {"decays": 17.0, "leak": 19.0})
    assert got == Counts(dense_macs=2 * 4 * 9 * (3 + 2), acs=12, macs=17)
    # Rates are real numbers: causal multiply-accumulates, 6 pairs of the 9.
    operands = [operand(x[0], RATE) for x in (q, k, v)]
    assert counts(OP, operands, operand(y[0]), RATE, RATE, RATE, 4, 2) == Counts(dense_macs=360, macs=2 * 4 * 6 * (3 + 2))
    for size, factors in ((1, 4), (2, 4), (6, 4 * 3)):  # one factor per score, or one per channel of it
        more = [*operands, operand(torch.full((size,), 0.5))]
        assert counts(OP, more, operand(y[0]), RATE, RATE, RATE, 4, 2) == Counts(dense_macs=360, macs=2 * 6 * (4 * (3 + 2) + factors))
