"""Products of trains: what they decode to is the product of what the factors decode to, and every step is the increment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, counts, infer, operand, random, same_layout

from ntc.ops import Counts, Traffic, TypeMismatch, decode, encode, spec_of, token_step, train_product
from ntc.ops.decode import decode_weights
from ntc.spike_type import ANALOG, CurrentType, SpikeType

OP = torch.ops.ntc.train_product.default
CODES = [("count", "count"), ("phase", "phase"), ("phase", "count")]


@st.composite
def trains(draw, steps: int, levels: int):
    numbers = st.lists(st.integers(-levels, levels), min_size=steps * 4, max_size=steps * 4)
    return tuple(torch.tensor(draw(numbers)).reshape(steps, 1, 2, 2).float() for _ in range(2))


@given(st.integers(1, 6).flatmap(lambda steps: trains(steps, 3)), st.sampled_from(CODES))
def test_equals_the_increments(pair, codes):
    a, b = pair
    product = train_product(a, b, *codes)
    sums = [0.0, 0.0]
    weights = [decode_weights(code, len(a)) for code in codes]
    for t in range(len(a)):
        before = sums[0] * sums[1]
        sums = [sums[0] + weights[0][t] * a[t], sums[1] + weights[1][t] * b[t]]
        assert torch.equal(product[t], sums[0] * sums[1] - before)
    assert torch.equal(product.sum(0), decode(a, codes[0]) * decode(b, codes[1])), "dyadic numbers: exact"


def test_the_square_and_the_gate_of_encoded_values():
    x, y = (random(2, 3, 8, grad=False, seed=s, dtype=torch.float32) for s in (0, 1))
    step_x, step_y = (token_step(v, 1 / 255) for v in (x, y))
    sx, sy = encode(x, step_x, 8, "phase"), encode(y, step_y, 8, "phase")
    n = decode(sx, "phase") * 256
    assert torch.equal(train_product(sx, sx, "phase", "phase").sum(0) * 65536, n * n)
    gate = train_product(sx, sy, "phase", "phase").sum(0) * 65536 * step_x * step_y
    limit = step_x / 2 * (y.abs() + step_y / 2) + step_y / 2 * x.abs()
    assert bool(((gate - x * y).abs() <= limit * (1 + 1e-5)).all()) and float((gate - x * y).abs().max()) > 1e-4


def test_a_factor_per_row_meets_all_channels():
    a, b = random(4, 2, 3, 8, grad=False), random(4, 2, 3, 1, grad=False, seed=1)
    torch.testing.assert_close(train_product(a, b, "phase", "count").sum(0), decode(a, "phase") * b.sum(0))


def test_what_does_not_fit_is_refused():
    a = torch.ones(4, 1, 2, 3)
    with pytest.raises(ValueError, match="that of 'phase' first, got 'count' and 'phase'"):
        train_product(a, a, "count", "phase")
    with pytest.raises(ValueError, match="got 'rate' and 'rate'"):
        train_product(a, a, "rate", "rate")
    with pytest.raises(ValueError, match=r"as many steps and axes, and not of \[4, 1, 2, 3\] and \[3, 1, 2, 3\]"):
        train_product(a, a[:3], "count", "count")


@pytest.mark.parametrize("codes", CODES)
def test_gradients(codes):
    torch.autograd.gradcheck(lambda a, b: train_product(a, b, *codes), (random(3, 2, 2, 3), random(3, 2, 2, 1, seed=1)))
    torch.autograd.gradcheck(lambda a: train_product(a, a, "count", "count"), (random(3, 1, 2, 3),))


def test_opcheck_layout_and_compiling():
    a, b = random(4, 2, 3, 5, dtype=torch.float32), random(4, 2, 3, 1, seed=1, dtype=torch.float32)
    torch.library.opcheck(train_product, (a, b, "phase", "count"))
    turned = random(4, 2, 5, 3, grad=False, dtype=torch.float32).transpose(-1, -2)
    assert same_layout(train_product, turned, turned, "count", "count")
    compiled = torch.compile(lambda x, y: train_product(x, y, "phase", "phase"), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b), train_product(a, b, "phase", "phase"))


def test_types():
    phase, count = SpikeType(4, "phase", "ternary"), SpikeType(4, "count", "graded")
    assert infer(OP, phase, count, "phase", "count") == CurrentType(4, "count")
    for kind in (ANALOG, RATE, CURRENT, SpikeType(4, "fitted"), SpikeType(4)):
        with pytest.raises(TypeMismatch, match="takes spikes of the phase code here, and %x0 is"):
            infer(OP, kind, count, "phase", "count")
        with pytest.raises(TypeMismatch, match="takes spikes of the count code here, and %x1 is"):
            infer(OP, phase, kind, "phase", "count")
    with pytest.raises(TypeMismatch, match="of as many steps: %x0 is spikes T=4 ternary phase, and %x1 is spikes T=5"):
        infer(OP, phase, SpikeType(5, "count", "graded"), "phase", "count")


def test_counting():
    """Spikes of the first factor are shifted, payloads of the second are multiplied; one of the second meets eight channels."""
    a, b = random(4, 2, 3, 8, grad=False).round(), random(4, 2, 3, 1, grad=False, seed=1)
    given = [operand(a, SpikeType(4, "phase", "ternary")), operand(b, SpikeType(4, "count", "graded"))]
    result, events = operand(a, CurrentType(4, "count")), float((a != 0).sum())
    assert counts(OP, given, result, given[0].type, given[1].type, "phase", "count") == Counts(dense_macs=48, acs=2 * events + 24, graded_macs=192)
    moved = spec_of(_node()).moves(None, given, result, {})
    assert moved == Traffic(spikes=2 * 192 + 24, membranes=3 * events + 2 * 24 + 192)


def _node():
    from op_cases import node_of

    return node_of(OP, SpikeType(4), SpikeType(4), "count", "count")[0]
