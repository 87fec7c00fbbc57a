"""Types and counts of spiking attention, and what it refuses."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CURRENT, GRADED, RATE, SPIKES, TERNARY, Constant, counts, infer, item_of, node_of, operand, random
from spiking_attention_cases import MODULE, OP, STREAM, naive, spike_cases
from torch import nn

from ntc.ops import SPECS, Counts, TypeMismatch, events, spiking_attention, spiking_attention_stream
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

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
