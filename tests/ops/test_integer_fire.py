import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Constant, counts, infer, node_of, operand
from torch import nn

from ntc.ops import SPECS, Counts, Interval, TypeMismatch, integer_fire, integrate_fire
from ntc.ops.integer_fire import INTEGER_FIRE, spike_count
from ntc.spike_type import ANALOG, INTEGER, CurrentType, SpikeType

OP = torch.ops.ntc.integer_fire.default


def oracle(x, theta, start, signed):
    """Spikes and membranes before the reset of one neuron, in Python integers."""
    v, spikes, reached = start, [], [start]
    for current in x:
        u = v + current
        s = int(u >= theta) - int(signed and u < 0)
        v = u - theta * s
        spikes.append(s)
        reached.append(u)
    return spikes, reached


NEURON = st.integers(1, 200).flatmap(lambda theta: st.tuples(st.just(theta), st.integers(0, theta)))


@given(st.data(), NEURON, st.integers(1, 9), st.booleans())
def test_timed_neurons_follow_the_equations(data, neuron, steps, signed):
    theta, start = neuron
    x = data.draw(st.lists(st.integers(-500, 500), min_size=steps, max_size=steps))
    got = integer_fire(torch.tensor(x, dtype=torch.int32).view(-1, 1, 1, 1), torch.tensor([theta]), torch.tensor([start]), steps, signed, True)
    assert got.dtype == torch.int8
    assert got.flatten().tolist() == oracle(x, theta, start, signed)[0]


@given(NEURON, st.integers(-500, 500), st.integers(1, 20), st.booleans())
def test_the_count_of_a_constant_current_has_a_closed_form(neuron, x, steps, signed):
    theta, start = (torch.tensor([n], dtype=torch.int32) for n in neuron)
    current = torch.tensor([[[x]]], dtype=torch.int32)
    spikes = integer_fire(current, theta, start, steps, signed, False)
    expected = min(max((neuron[1] + steps * x) // neuron[0], -steps if signed else 0), steps)
    assert int(spikes.sum()) == int(spike_count(current, theta, start, steps, signed)) == expected


@given(st.data(), st.integers(1, 6), st.booleans(), st.booleans())
def test_is_the_neuron_of_the_float_grade(data, steps, signed, timed):
    """Powers of two: then both compute without rounding."""
    theta = [2 ** data.draw(st.integers(1, 8)) for _ in range(3)]
    x = torch.tensor(data.draw(st.lists(st.integers(-300, 300), min_size=6 * steps, max_size=6 * steps)), dtype=torch.int32).view(steps, 1, 2, 3)
    x = x if timed else x[0]
    half = torch.tensor(theta, dtype=torch.int32) // 2
    got = integer_fire(x, torch.tensor(theta, dtype=torch.int32), half, steps, signed, timed)
    real = integrate_fire(x.float(), torch.tensor(theta).float(), torch.tensor([0.5]), steps, signed, timed, "atan", 1.0)
    assert torch.equal(got.float(), real)


def test_a_membrane_beyond_int32_does_not_wrap():
    x = torch.full((1, 1, 1), 2**31 - 1, dtype=torch.int32)
    big = torch.tensor([2**31 - 1], dtype=torch.int32)
    assert integer_fire(x, big, big, 3, True, False).flatten().tolist() == oracle([2**31 - 1] * 3, 2**31 - 1, 2**31 - 1, True)[0]
    assert integer_fire(-x, big, big * 0, 3, True, False).flatten().tolist() == [-1, -1, -1]


def test_opcheck_and_refusals():
    x, theta = torch.ones(2, 3, 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    torch.library.opcheck(integer_fire, (x, theta, theta[:1], 3, True, False))
    torch.library.opcheck(integer_fire, (x.expand(3, 2, 3, 4).contiguous(), theta, theta[:1], 3, False, True))
    for wrong, match in (
        ((x.float(), theta, theta, 3, True, False), "current holds"), ((x, theta.float(), theta, 3, True, False), "threshold holds"),
        ((x, theta[:3], theta, 3, True, False), r"threshold has shape \[1\] or \[4\]"), ((x, theta, theta[:3], 3, True, False), r"start has shape"),
        ((x, theta, theta, 0, True, False), "at least one step"), ((x, theta, theta, 3, True, True), "timed current of as many"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            integer_fire(*wrong)


TH = Constant((8,), torch.int32)


@pytest.mark.parametrize(("kind", "signed", "timed", "result"), [
    (INTEGER, False, False, SpikeType(4, "count")),
    (INTEGER, True, False, SpikeType(4, "count", "ternary")),
    (CurrentType(4, "count"), True, True, SpikeType(4, "count", "ternary")),
    (CurrentType(4, "count"), True, False, None),
    (CurrentType(3, "count"), True, True, None),
    (CurrentType(4, "rate"), True, True, None),
    (INTEGER, True, True, None),
    (ANALOG, True, False, None),
    (SpikeType(4, "count"), True, True, None),
])  # fmt: skip
def test_types(kind, signed, timed, result):
    if result is not None:
        assert infer(OP, kind, TH, TH, 4, signed, timed) == result
    else:
        with pytest.raises(TypeMismatch, match="%x0"):
            infer(OP, kind, TH, TH, 4, signed, timed)


@pytest.mark.parametrize(("theta", "start", "match"), [
    ([4, 5], [0, 5], None), ([4, 0], [0, 0], "thresholds > 0, and element 1"), ([4, 5], [0, 6], "between 0 and its threshold, and element 1 of %c2 is 6"),
    ([4, 5], [-1, 0], "element 0 of %c2 is -1"),
])  # fmt: skip
def test_constants_out_of_range_are_type_errors(theta, start, match):
    node, types = node_of(OP, INTEGER, Constant((2,), torch.int32), Constant((2,), torch.int32), 4, True, False)
    owner = nn.Module()
    owner.register_buffer("c1", torch.tensor(theta))
    owner.register_buffer("c2", torch.tensor(start))
    node.graph.owning_module = owner
    if match is None:
        assert SPECS[OP].infer(node, types.__getitem__) == SpikeType(4, "count", "ternary")
    else:
        with pytest.raises(TypeMismatch, match=match):
            SPECS[OP].infer(node, types.__getitem__)


def test_counting():
    spikes = integer_fire(torch.tensor([[[4, 2, 0]]]), torch.tensor([4]), torch.tensor([0]), 4, False, False)  # 4 + 2 + 0 spikes
    got = counts(OP, [operand(torch.zeros(1, 1, 3)), operand(torch.ones(1))], operand(spikes, SpikeType(4, "count")))
    assert got == Counts(neuron_updates=12, spikes=6, neurons=3)


@given(st.data(), NEURON, st.integers(1, 4), st.booleans())
def test_the_bound_of_the_membrane_is_reached_and_never_left(data, neuron, steps, signed):
    """Against every current of a small range: the interval is the union of all of them."""
    theta, start = (n % 12 + 1 if i == 0 else min(n, neuron[0] % 12 + 1) for i, n in enumerate(neuron))
    low, high = sorted(data.draw(st.tuples(st.integers(-14, 14), st.integers(-14, 14))))
    low = max(low, high - 6)
    bound = INTEGER_FIRE.bound(None, 0, Interval.of(low, high), torch.tensor([theta]), torch.tensor([start]), steps, signed, True)
    states, reached, fired = {start}, {start}, set()
    for _ in range(steps):
        after = set()
        for v in states:
            for x in range(low, high + 1):
                (s,), (_, u) = oracle([x], theta, v, signed)
                reached.add(u)
                fired.add(s)
                after.add(u - theta * s)
        states = after
    membrane = bound.inside[0]
    assert membrane.low <= min(reached)
    assert max(reached) <= membrane.high
    # Within one interval per step, holes are filled: a little may be given away, but never more than a threshold.
    assert membrane.high - max(reached) < theta
    assert min(reached) - membrane.low < theta
    spikes = bound.result.ends
    assert spikes[0] <= min(fired)
    assert max(fired) <= spikes[1]
