from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Constant, infer, item_of, node_of
from torch import nn

from ntc.ops import SPECS, Interval, Operand, TypeMismatch, integer_attention, integer_attention_stream, spiking_attention
from ntc.ops.integer_attention import INTEGER_ATTENTION
from ntc.spike_type import ANALOG, INTEGER, CurrentType, SpikeType

OP, STREAM = torch.ops.ntc.integer_attention.default, torch.ops.ntc.integer_attention_stream.default


def oracle(q, k, v, growth, renewal, shift):
    """One head, one step, one sequence, in Python integers: Y and every M."""
    period, memory, rows, states = len(growth), [[0] * len(v[0]) for _ in k[0]], [], []
    for i in range(len(q)):
        if i % period == 0 and i > 0 and renewal is not None:
            memory = [[(m * renewal + (1 << shift >> 1)) >> shift for m in row] for row in memory]
        memory = [[m + growth[i % period] * a * b for m, b in zip(row, v[i], strict=True)] for row, a in zip(memory, k[i], strict=True)]
        rows.append([sum(q[i][d] * memory[d][e] for d in range(len(memory))) for e in range(len(v[0]))])
        states.append(memory)
    return rows, states


def spikes(seed, *shape, signed=True):
    return torch.randint(-1 if signed else 0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@st.composite
def cases(draw):
    """Trains, growth and renewal: up to 3 periods, several heads on one memory, leaks from strong to none."""
    seed, signed = draw(st.integers(0, 2**20)), draw(st.booleans())
    kv_heads, groups, size, value_size = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    length, steps, batch = draw(st.integers(1, 13)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    shift, leaking = draw(st.integers(0, 20)), draw(st.booleans())
    period = draw(st.sampled_from([1, 2, 4])) if leaking else 1
    growth = draw(st.lists(st.integers(1, 2**16), min_size=kv_heads * period, max_size=kv_heads * period)) if leaking else [3] * kv_heads
    renewal = draw(st.lists(st.integers(0, 2**shift), min_size=kv_heads, max_size=kv_heads)) if leaking else None
    heads = kv_heads * groups
    sizes = (heads * size, kv_heads * size, kv_heads * value_size)
    trains = [spikes(seed + i, steps, batch, length, c, signed=signed) for i, c in enumerate(sizes)]
    table = torch.tensor(growth, dtype=torch.int32).view(kv_heads, period)
    return trains, heads, kv_heads, table, None if renewal is None else torch.tensor(renewal, dtype=torch.int32), shift


def head_of(x, heads, h):
    return x.unflatten(-1, (heads, -1))[..., h, :]


@given(cases())
def test_is_its_definition(case):
    (q, k, v), heads, kv_heads, growth, renewal, shift = case
    got = integer_attention(q, k, v, heads, kv_heads, growth, renewal, shift)
    assert got.dtype == torch.int32
    for t in range(q.shape[0]):
        for b in range(q.shape[1]):
            for h in range(heads):
                m = h * kv_heads // heads
                one = [head_of(x, n, i)[t, b].tolist() for x, n, i in ((q, heads, h), (k, kv_heads, m), (v, kv_heads, m))]
                expected, _ = oracle(*one, growth[m].tolist(), None if renewal is None else int(renewal[m]), shift)
                assert head_of(got, heads, h)[t, b].tolist() == expected


@given(cases(), st.data())
def test_streaming_gives_the_same_integers_however_the_text_is_cut(case, data):
    (q, k, v), heads, kv_heads, growth, renewal, shift = case
    length = q.shape[-2]
    whole = integer_attention(q, k, v, heads, kv_heads, growth, renewal, shift)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {length})]
    state = torch.zeros(*q.shape[:2], kv_heads, k.shape[-1] // kv_heads, v.shape[-1] // kv_heads, dtype=torch.int32)
    parts = []
    for start, stop in pairwise(cuts):
        y, state = integer_attention_stream(*(x[..., start:stop, :] for x in (q, k, v)), state, heads, kv_heads, growth, renewal, shift, torch.tensor([start]))
        parts.append(y)
    assert torch.equal(torch.cat(parts, dim=-2), whole)


@pytest.mark.parametrize(("length", "period"), [(300, 1), (300, 256), (130, 8)])
def test_long_texts_agree_across_chunks(length, period):
    """No leak: chunks of 128; a period longer than a chunk; many renewals. Sums beyond 2**24 go through float64."""
    q, k, v = (spikes(i, 2, 1, length, 16) for i in range(3))
    growth = torch.linspace(2**10, 2**14, 2 * period).to(torch.int32).view(2, period)
    renewal = None if period == 1 else torch.tensor([900, 200], dtype=torch.int32)
    arguments = (4, 2, growth if renewal is not None else torch.ones(1, 1, dtype=torch.int32), renewal, 10)
    q, v = q.repeat(1, 1, 1, 2), v
    whole = integer_attention(q, k, v, *arguments)
    state = torch.zeros(2, 1, 2, 8, 8, dtype=torch.int32)
    assert torch.equal(integer_attention_stream(q, k, v, state, *arguments, torch.tensor([0]))[0], whole)


def test_without_a_leak_it_counts_as_the_float_grade_does():
    q, k, v = (spikes(i, 3, 2, 200, 12) for i in range(3))
    got = integer_attention(q, k, v, 3, 3, torch.ones(1, 1, dtype=torch.int32), None, 0)
    assert torch.equal(got.float(), spiking_attention(q.float(), k.float(), v.float(), 3, 3))


def test_a_leak_is_what_the_float_grade_forgets():
    """Relative to the largest count, growth of 12 bits and renewals of 16 come near retention with a real lambda."""
    leak, period, gain, shift = 0.875, 16, 2**12, 16
    q, k, v = (spikes(i, 2, 1, 150, 12) for i in range(3))
    powers = leak ** torch.arange(period, dtype=torch.float64)
    growth, renewal = (gain / powers).round().to(torch.int32)[None], torch.tensor([round(leak**period * 2**shift)], dtype=torch.int32)
    y = integer_attention(q, k, v, 3, 3, growth, renewal, shift).double() * (powers / gain)[torch.arange(150) % period].unsqueeze(-1)
    real = spiking_attention(q.double(), k.double(), v.double(), 3, 3, torch.tensor([leak], dtype=torch.float64))
    assert float((y - real).abs().max() / real.abs().max()) < 2e-4


def test_opcheck_and_refusals():
    q, k, v = (spikes(i, 2, 1, 5, 8) for i in range(3))
    growth, renewal = torch.ones(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    torch.library.opcheck(integer_attention, (q, k, v, 2, 2, growth, renewal, 3))
    torch.library.opcheck(integer_attention, (q, k, v, 2, 2, growth[:, :1], None, 3))
    state = torch.zeros(2, 1, 2, 4, 4, dtype=torch.int32)
    torch.library.opcheck(integer_attention_stream, (q, k, v, state, 2, 2, growth, renewal, 3, torch.tensor([6])))
    for wrong, match in (
        ((q.float(), k, v, 2, 2, growth, renewal, 3), "query holds"), ((q, k, v, 2, 2, growth[0], renewal, 3), "growth has shape"),
        ((q, k, v, 2, 2, growth[:, :3], renewal, 3), "power of two"), ((q, k, v, 4, 4, growth, renewal, 3), r"\[4, R\]"),
        ((q, k, v, 2, 2, growth, None, 3), "needs a renewal"), ((q, k, v, 2, 2, growth, torch.ones(3).int(), 3), r"renewal has shape \[1\] or \[2\]"),
        ((q, k, v, 2, 2, growth, renewal, 63), "shift"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            integer_attention(*wrong)
    many = torch.ones(1, 1, 3, 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="does not fit into int32"):
        integer_attention(many, many, many, 1, 1, torch.full((1, 1), 2**30, dtype=torch.int32), None, 0)


GROWTH, RENEWAL, COUNT = Constant((2, 4), torch.int32), Constant((2,), torch.int32), SpikeType(4, "count", "ternary")


def test_types():
    arguments = (2, 2, GROWTH, RENEWAL, 3)
    assert infer(OP, COUNT, COUNT, SpikeType(4, "count"), *arguments) == CurrentType(4, "count")
    for wrong in (SpikeType(4), SpikeType(3, "count"), SpikeType(4, "count", "graded"), ANALOG, INTEGER, CurrentType(4, "count")):
        with pytest.raises(TypeMismatch, match="%x1"):
            infer(OP, COUNT, wrong, COUNT, *arguments)
    with pytest.raises(TypeMismatch, match="integer constants, and %c5"):
        infer(OP, COUNT, COUNT, COUNT, 2, 2, Constant((2, 4)), RENEWAL, 3)
    for state in (INTEGER, CurrentType(4, "count")):
        assert item_of(STREAM, 1, COUNT, COUNT, COUNT, state, *arguments, 0) == CurrentType(4, "count")
    with pytest.raises(TypeMismatch, match="%x3"):
        infer(STREAM, COUNT, COUNT, COUNT, ANALOG, *arguments, 0)


@pytest.mark.parametrize(("growth", "renewal", "shift", "match"), [
    ([[1, 2]], [8], 3, None), ([[1, 0]], [8], 3, "weight > 0"), ([[1, 2]], [9], 3, r"keeps 0 to 2\^3"), ([[1, 2]], [-1], 3, "%c6 is -1"),
    # Shifts beyond what int32 can be compared with.
    ([[1, 2]], [2**31 - 1], 31, None), ([[1, 2]], [2**31 - 1], 36, None), ([[1, 2]], [5], 62, None), ([[1, 2]], [-1], 36, "%c6 is -1"),
])  # fmt: skip
def test_constants_out_of_range_are_type_errors(growth, renewal, shift, match):
    node, types = node_of(OP, COUNT, COUNT, COUNT, 2, 2, GROWTH, RENEWAL, shift)
    owner = nn.Module()
    owner.register_buffer("c5", torch.tensor(growth, dtype=torch.int32))
    owner.register_buffer("c6", torch.tensor(renewal, dtype=torch.int32))
    node.graph.owning_module = owner
    if match is None:
        SPECS[OP].infer(node, types.__getitem__)
    else:
        with pytest.raises(TypeMismatch, match=match):
            SPECS[OP].infer(node, types.__getitem__)


def test_operations_are_those_of_the_spikes_and_the_renewals():
    q, k, v = (spikes(i, 4, 2, 9, 8) for i in range(3))
    growth, renewal = torch.ones(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    node, _ = node_of(OP, COUNT, COUNT, COUNT, 2, 2, GROWTH, RENEWAL, 3)
    found = INTEGER_ATTENTION.measure([q, k, v, growth, renewal], q, node)
    float_op = SPECS[torch.ops.ntc.spiking_attention.default]
    plain = float_op.measure([q.float(), k.float(), v.float()], q, node)
    assert found == plain | {"leak": 4.0 * 2 * 2 * (2 * 4 * 4)}  # steps, sequences, renewals at 4 and 8, entries of M


def test_operations_of_the_streaming_form_are_those_of_its_memory():
    """However the text is cut, they add up to what the parallel form says of the streaming one."""
    q, k, v = (spikes(i, 4, 2, 21, 8) for i in range(3))
    growth, renewal = torch.ones(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    whole_node, _ = node_of(OP, COUNT, COUNT, COUNT, 2, 2, GROWTH, RENEWAL, 3)
    whole = INTEGER_ATTENTION.measure([q, k, v, growth, renewal], q, whole_node)
    node, _ = node_of(STREAM, COUNT, COUNT, COUNT, CurrentType(4, "count"), 2, 2, GROWTH, RENEWAL, 3, INTEGER)
    operands = [Operand(tuple(x.shape), COUNT, float(x.count_nonzero())) for x in (q, k)]
    for cuts in ([0, 21], [0, 1, 4, 5, 8, 12, 21], list(range(22))):
        found = dict.fromkeys(("write", "read", "leak"), 0.0)
        for start, stop in pairwise(cuts):
            part = [x[..., start:stop, :] for x in (q, k, v)]
            one = SPECS[STREAM].measure([*part, torch.zeros(4, 2, 2, 4, 4), growth, renewal, torch.tensor([start])], part[0], node)
            found = {name: number + one[name] for name, number in found.items()}
        assert found == {name: whole[name] for name in found}
    counts = SPECS[STREAM].count(node, operands, Operand(tuple(q.shape), CurrentType(4, "count"), 0.0), found)
    assert (counts.acs, counts.macs) == (whole["write"] + whole["read"], whole["leak"])
    assert counts.dense_macs == 2 * 21 * 2 * 2 * 4 * 4  # sequences, tokens, write and read, heads, entries of M


@pytest.mark.parametrize("context", [5, 13, 0])
@pytest.mark.parametrize("shift", [4, 10])
def test_the_bound_of_the_memory_is_the_largest_that_texts_make_of_it(context, shift):
    """All keys and values fire: M is as large as it gets; without a context, after many periods."""
    growth, renewal = torch.tensor([[3, 4, 6, 9]], dtype=torch.int32), torch.tensor([round(0.7 * 2**shift)], dtype=torch.int32)
    one = Interval.of(0, 1)
    bound = INTEGER_ATTENTION.bound(None, context, one.wide(2), one.wide(2), one.wide(3), 1, 1, growth, renewal, shift)
    ones = [[1, 1]] * (context or 400)
    rows, states = oracle(ones, ones, [[1, 1, 1]] * len(ones), growth[0].tolist(), int(renewal), shift)
    memory, count, product = bound.inside
    largest = max(m for state in states for row in state for m in row)
    assert (memory.low, count.low) == (0, 0)
    if context:
        assert memory.high == largest
        assert count.high == max(map(max, rows)) == bound.result.ends[1]
    else:
        assert largest <= memory.high <= largest + 4  # the fixed point if each renewal rounds up by half a unit: 0.5 / (1 - 0.7), twice
    assert product.high >= max(m for i, s in enumerate(states[:-1]) if i % 4 == 3 for r in s for m in r) * int(renewal) * (len(ones) > 4)


def test_the_bound_knows_silent_channels_and_signs():
    def interval(low, high):
        return Interval(*(torch.tensor(e).numpy().astype(object) for e in (low, high)))

    growth = torch.ones(1, 1, dtype=torch.int32)
    q, k, v = interval([0, 0, 0, 0], [1, 0, 1, 1]), interval([0, -1, 0, 0], [1, 1, 0, 1]), interval([0, 0], [1, 0])
    bound = INTEGER_ATTENTION.bound(None, 10, q, k, v, 2, 2, growth, None, 0)
    assert (list(bound.result.low), list(bound.result.high)) == ([-10, 0], [10, 0])  # head 0: one row of 10; the value of head 1 is silent
    unlimited = INTEGER_ATTENTION.bound(None, 0, q, k, v, 2, 2, growth, None, 0)
    assert unlimited.inside[0].high > unlimited.inside[0].most
