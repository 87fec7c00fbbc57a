"""Encoder neurons: against their dynamics and their closed form, by both codes, with every kind of step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, dyadics, infer, node_of, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, decode, encode, token_step
from ntc.ops.encode import levels_of, membrane
from ntc.rounding import margins
from ntc.spike_type import ANALOG, INDEX, SpikeType

OP, STEP = torch.ops.ntc.encode.default, torch.ops.ntc.token_step.default
CODES = ("count", "phase")


def by_loop(x: float, d: float, steps: int, code: str) -> list[int]:
    """The docstring's neuron, one number."""
    v, spikes = abs(x) + d / 2, []
    for t in range(steps):
        theta = d if code == "count" else d * 2 ** (steps - 1 - t)
        fires = v >= theta
        v -= theta * fires
        spikes.append(int(fires) * (1 if x > 0 else -1))
    return spikes


def whole(spikes: torch.Tensor, code: str) -> torch.Tensor:
    """n of a train."""
    return decode(spikes, code) * (2.0 ** len(spikes) if code == "phase" else 1)


@given(dyadics(-200, 200, 6), st.sampled_from([0.25, 1.0, 3.0]), st.integers(1, 6), st.sampled_from(CODES))
def test_equals_the_neuron(numbers, d, steps, code):
    x = torch.tensor(numbers).reshape(1, 2, 3)
    spikes = encode(x, torch.tensor([d]), steps, code)
    for i, number in enumerate(numbers):
        assert spikes[:, 0, i // 3, i % 3].tolist() == by_loop(number, d, steps, code)


@given(dyadics(-200, 200, 6), st.sampled_from([0.25, 1.0, 2.0]), st.integers(1, 6), st.sampled_from(CODES))
def test_decodes_to_the_nearest_multiple_of_the_step(numbers, d, steps, code):
    x, most = torch.tensor(numbers).reshape(1, 2, 3), levels_of(code, steps)
    spikes = encode(x, torch.tensor([d]), steps, code)
    assert set(spikes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    n = whole(spikes, code)
    assert torch.equal(n, x.sign() * (x.abs() / d + 0.5).floor().clamp(max=most))
    inside = x.abs() <= (most + 0.5) * d
    assert bool(((x - d * n).abs() <= d / 2)[inside].all()), "half a step"
    assert torch.equal(n[~inside].abs(), torch.full_like(n[~inside], most))


def test_by_hand():
    x = torch.tensor([[[0.0, 0.5, -0.49, 2.4, -2.5, 9.0]]])
    one = torch.ones(1)
    assert whole(encode(x, one, 3, "count"), "count").tolist() == [[[0, 1, 0, 2, -3, 3]]]
    assert encode(x, one, 3, "count")[:, 0, 0, 4].tolist() == [-1, -1, -1]
    assert encode(x, one, 3, "count")[:, 0, 0, 3].tolist() == [1, 1, 0]
    assert whole(encode(x, one, 3, "phase"), "phase").tolist() == [[[0, 1, 0, 2, -3, 7]]]
    assert encode(x, one, 3, "phase")[:, 0, 0, 4].tolist() == [0, -1, -1]


def test_events_are_the_count_or_the_binary_weight_of_n():
    n = torch.arange(-15, 16).float().reshape(1, 1, -1)
    assert torch.equal(encode(n, torch.ones(1), 15, "count").abs().sum(0), n.abs())
    weight = torch.tensor([bin(abs(int(k))).count("1") for k in n.flatten()]).reshape(n.shape).float()
    assert torch.equal(encode(n, torch.ones(1), 4, "phase").abs().sum(0), weight)


def test_steps_per_channel_and_per_token():
    x, per_channel = random(2, 3, 4, grad=False, dtype=torch.float32), torch.tensor([0.1, 0.2, 0.3, 0.4])
    per_token = token_step(x, 1 / 7)
    for code in CODES:
        each = torch.stack([encode(x[..., c : c + 1], per_channel[c : c + 1], 4, code) for c in range(4)], -2).squeeze(-1)
        assert torch.equal(encode(x, per_channel, 4, code), each)
        alone = torch.stack([encode(x[b : b + 1], per_token[b : b + 1], 4, code)[:, 0] for b in range(2)], 1)
        assert torch.equal(encode(x, per_token, 4, code), alone)
    assert torch.equal(per_token, x.abs().max(-1, keepdim=True).values * (1 / 7))
    codes = whole(encode(x, per_token, 7, "count"), "count")
    assert torch.equal(codes.abs().amax(-1), torch.full((2, 3), 7.0)), "the largest channel of a token takes all steps"


def test_a_token_of_zeros_is_silent():
    x = torch.zeros(1, 2, 3)
    assert token_step(x, 0.1).min() > 0
    assert not encode(x, token_step(x, 0.1), 4, "phase").any()


def test_steps_and_codes_that_do_not_fit_are_refused():
    x = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match=r"a step has shape \[1\], \[8\] or \[2, 3, 1\], and not \[3\]"):
        encode(x, torch.ones(3), 4, "phase")
    with pytest.raises(ValueError, match=r"and not \[2, 3, 8\]"):
        encode(x, x, 4, "phase")
    with pytest.raises(ValueError, match="have the codes 'count' and 'phase', got 'rate'"):
        encode(x, torch.ones(1), 4, "rate")
    with pytest.raises(ValueError, match="the phase code has 1 to 16 time steps, got 17"):
        encode(x, torch.ones(1), 17, "phase")
    with pytest.raises(ValueError, match="the count code has 1 to 1048576 time steps, got 0"):
        levels_of("count", 0)


@pytest.mark.parametrize("code", CODES)
def test_gradients_are_straight_through(code):
    x, d = random(2, 3, 4, low=-2.0, high=2.0), torch.tensor([0.11], dtype=torch.float64, requires_grad=True)
    steps, most = (4, 15) if code == "phase" else (7, 7)
    weight = random(2, 3, 4, seed=1, grad=False)
    value = d * whole(encode(x, d, steps, code), code)  # the decoded value, in the units of x
    to_x, to_d = torch.autograd.grad((weight * value).sum(), (x, d))
    inside = (x.abs() <= (most + 0.5) * d).double()
    n = whole(encode(x, d, steps, code), code)
    assert 0 < inside.mean() < 1
    torch.testing.assert_close(to_x, weight * inside)
    torch.testing.assert_close(to_d, (weight * (n - inside * x / d)).sum().reshape(1))


def test_the_gradient_of_a_token_step_goes_to_its_largest_channel():
    torch.autograd.gradcheck(lambda x: token_step(x, 0.3), (random(2, 3, 4),))


def test_opcheck_and_layout():
    x = random(2, 3, 4, dtype=torch.float32)
    for step in (torch.tensor([0.2], requires_grad=True), torch.full((4,), 0.2), torch.full((2, 3, 1), 0.2, requires_grad=True)):
        for code in CODES:
            torch.library.opcheck(encode, (x, step, 3, code))
    torch.library.opcheck(token_step, (x, 0.1))
    turned = random(2, 4, 3, grad=False).transpose(-1, -2)
    assert same_layout(encode, turned, torch.ones(1, dtype=torch.float64), 3, "phase") and same_layout(token_step, turned, 0.1)


def test_compiles_with_gradients():
    def f(x):
        return whole(encode(x, token_step(x, 1 / 15), 4, "phase"), "phase") ** 2

    x = random(2, 3, 4, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


def test_types():
    assert infer(OP, ANALOG, Constant((1,)), 4, "phase") == SpikeType(4, "phase", "ternary")
    assert infer(OP, ANALOG, ANALOG, 7, "count") == SpikeType(7, "count", "ternary")
    for kind in (SPIKES, RATE, INDEX, CURRENT):
        with pytest.raises(TypeMismatch, match="takes a value that is analog, and %x0 is"):
            infer(OP, kind, Constant((1,)), 4, "phase")
        with pytest.raises(TypeMismatch, match="takes a step that is analog, and %x1 is"):
            infer(OP, ANALOG, kind, 4, "phase")
        with pytest.raises(TypeMismatch, match="made of analog values, and %x0 is"):
            infer(STEP, kind, 0.1)
    assert infer(STEP, ANALOG, 0.1) == ANALOG
    with pytest.raises(TypeMismatch, match="its factor is 0"):
        infer(STEP, ANALOG, 0.0)


def test_counting():
    x, kind = random(2, 3, 5, grad=False), SpikeType(4, "phase", "ternary")
    spikes = encode(x, torch.tensor([0.1], dtype=x.dtype), 4, "phase")
    events = float(spikes.abs().sum())
    assert counts(OP, [operand(x), operand(torch.ones(1))], operand(spikes, kind)) == Counts(neuron_updates=120, spikes=events, neurons=30)
    assert counts(STEP, [operand(x)], operand(torch.ones(2, 3, 1))) == Counts(elementwise=36)


@pytest.mark.parametrize("code", CODES)
def test_the_membrane_tells_what_was_fired(code):
    x, step = random(2, 3, 50, grad=False, seed=5), random(2, 3, 1, grad=False, low=0.05, high=0.2)
    spikes = encode(x, step, 4, code)
    u, (up, down) = membrane((x, step, 4, code), spikes)
    assert torch.equal((u >= up).double() - (u <= down).double(), spikes)


def test_a_spike_more_is_a_tie_only_at_the_threshold():
    """Token 0 codes 2.5 - 1e-6 of its steps, token 1 2.4 of them: one more spike is within rounding of the first only."""
    x, step = torch.tensor([[[2.5 - 1e-6, 7.0], [4.8, -7.0]]], dtype=torch.float64), torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    node, _ = node_of(OP, ANALOG, ANALOG, 7, "count")
    node.meta["val"] = encode(x, step, 7, "count")
    other = node.meta["val"].clone()
    other[2, 0, :, 0] = 1.0
    found = margins(node, (x, step, 7, "count"), other, (torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 0]))).amax(0)
    torch.testing.assert_close(found, torch.tensor([1e-6, 0.1], dtype=torch.float64), rtol=1e-3, atol=0)
