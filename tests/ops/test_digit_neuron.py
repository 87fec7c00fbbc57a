"""Digit neurons: against their dynamics, the arithmetic of number systems, and the spikes that it promises."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, dyadics, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, digit_neuron, token_step
from ntc.ops.digit_neuron import digit_thresholds, digit_weights, membrane, spread
from ntc.ops.spike_linear import weighted
from ntc.spike_type import ANALOG, SpikeType

OP = torch.ops.ntc.digit_neuron.default
BASES = (1.5, 2.0, 2.5, 3.0)


def tables(base: float, steps: int, price: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    w = digit_weights(base, steps)
    return torch.tensor(w, dtype=dtype), torch.tensor(digit_thresholds(w, price), dtype=dtype)


def by_loop(x: Fraction, weights: list[Fraction], thresholds: list[Fraction]) -> list[int]:
    """The docstring's neuron, one number, in exact arithmetic."""
    v, spikes = x, []
    for w, theta in zip(weights, thresholds, strict=True):
        s = (v >= theta) - (v <= -theta)
        v -= w * s
        spikes.append(s)
    return spikes


@given(dyadics(-200, 200, 6), st.sampled_from([0.25, 1.0, 2.0]), st.integers(1, 5), st.sampled_from([2.0, 3.0]), st.sampled_from([0.0, 1.0]))
def test_equals_the_neuron(numbers, d, steps, base, price):
    x = torch.tensor(numbers).reshape(1, 2, 3)
    w, theta = tables(base, steps, price)
    spikes = digit_neuron(x, torch.tensor([d]), w, theta)
    exact = [[Fraction(float(n)) for n in table] for table in (w, theta)]
    for i, number in enumerate(numbers):
        assert spikes[:, 0, i // 3, i % 3].tolist() == by_loop(Fraction(number) / Fraction(d), *exact)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
def test_base_3_has_one_form_of_every_number(steps):
    """Balanced ternary: 3^T whole numbers, 3^T trains, each decodes to its number."""
    most = (3**steps - 1) // 2
    n = torch.arange(-most, most + 1).float().reshape(1, 1, -1)
    w, theta = tables(3.0, steps)
    spikes = digit_neuron(n, torch.ones(1), w, theta)
    assert torch.equal(weighted(spikes, w), n)
    assert len(torch.unique(spikes.flatten(1).T, dim=0)) == 3**steps


def test_base_2_is_the_non_adjacent_form():
    """No two digits next to each other: the fewest that make the number (Reitwiesner 1960), 2 of 15 where binary has 4."""
    n = torch.arange(-170, 171).float().reshape(1, 1, -1)
    w, theta = tables(2.0, 9)
    spikes = digit_neuron(n, torch.ones(1), w, theta)
    assert torch.equal(weighted(spikes, w), n)
    assert not (spikes[1:] * spikes[:-1]).any()
    fifteen = spikes[:, 0, 0, 170 + 15]
    assert fifteen.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, -1]


    def weight(m: int) -> int:
        """Digits of the non-adjacent form that are not 0, from the last one on: an odd number ends with 2 - (m mod 4)."""
        return 0 if m == 0 else weight(m // 2) if m % 2 == 0 else 1 + weight((m - (2 - m % 4)) // 2)

    assert spikes.abs().sum(0).flatten().tolist() == [weight(abs(int(m))) for m in n.flatten()]


@given(dyadics(-2000, 2000, 6), st.integers(1, 6), st.sampled_from([2.0, 3.0]))
def test_half_a_step_at_most(numbers, steps, base):
    w, theta = tables(base, steps)
    x = torch.tensor(numbers).reshape(1, 2, 3)
    most = float(w.sum())
    off = (x - weighted(digit_neuron(x, torch.ones(1), w, theta), w)).abs()
    inside = x.abs() <= most + 0.5
    assert bool((off[inside] <= 0.5).all())
    assert torch.equal(weighted(digit_neuron(x, torch.ones(1), w, theta), w)[~inside].abs(), torch.full_like(x[~inside], most)), "the end"


@pytest.mark.parametrize("base", BASES)
def test_between_the_bases_the_error_stays_within_what_the_last_digit_reaches(base):
    w, theta = tables(base, 6)
    x = torch.linspace(-float(w.sum()), float(w.sum()), 40001).reshape(1, 1, -1)
    off = (x - weighted(digit_neuron(x, torch.ones(1), w, theta), w)).abs()
    assert float(off.max()) <= 0.5 + 1e-3, "every interval that a decision leaves is one that the later digits reach"


def test_a_price_makes_spikes_rarer_and_only_fires_what_is_worth_it():
    x, (w, _) = random(1, 64, 64, grad=False, low=-20, high=20, dtype=torch.float32), tables(2.0, 6)
    before = None
    for price in (0.0, 0.5, 1.0, 2.0):
        theta = tables(2.0, 6, price)[1]
        spikes = digit_neuron(x, torch.ones(1), w, theta)
        events = float(spikes.abs().sum())
        assert before is None or events < before
        before = events
        v = x.clone()
        for t in range(6):
            gain = v.square() - (v - w[t] * spikes[t]).square()
            assert bool((gain[spikes[t] != 0] >= price - 1e-4).all()), "squared error that a spike takes away"
            v -= w[t] * spikes[t]


def test_steps_per_channel_token_and_head():
    x, (w, theta) = random(2, 3, 8, grad=False, dtype=torch.float32), tables(3.0, 3)
    per_channel = torch.linspace(0.05, 0.4, 8)
    each = torch.cat([digit_neuron(x[..., c : c + 1], per_channel[c : c + 1], w, theta) for c in range(8)], -1)
    assert torch.equal(digit_neuron(x, per_channel, w, theta), each)
    per_head = token_step(x, 1 / 13, 2)
    assert per_head.shape == (2, 3, 2) and torch.equal(per_head[..., 1], x[..., 4:].abs().amax(-1) * (1 / 13))
    halves = [digit_neuron(x[..., s], per_head[..., i : i + 1], w, theta, True) for i, s in enumerate((slice(4), slice(4, 8)))]
    assert torch.equal(digit_neuron(x, per_head, w, theta, True), torch.cat(halves, -1))
    assert torch.equal(spread(per_head, x)[..., 3], per_head[..., 0]) and torch.equal(spread(per_head, x)[..., 4], per_head[..., 1])
    with pytest.raises(ValueError, match="8 channels are not 3 groups"):
        token_step(x, 0.1, 3)


def test_two_ranges_share_the_work():
    x = torch.tensor([[[0.3, -0.9, 1.0, -5.0, 20.0]]])
    w, theta = tables(3.0, 3)
    near = weighted(digit_neuron(x, torch.tensor([0.1]), w, theta, False, 0.0, 1.0), w) * 0.1
    far = weighted(digit_neuron(x, torch.tensor([2.0]), w, theta, False, 1.0), w) * 2.0
    torch.testing.assert_close(near, torch.tensor([[[0.3, -0.9, 0, 0, 0]]]))
    torch.testing.assert_close(far, torch.tensor([[[0, 0, 2.0, -4.0, 20.0]]]), rtol=0, atol=0)  # 1.0 and 2.5 steps: ties are fired


def test_bad_arguments():
    x, (w, theta) = torch.ones(2, 3, 8), tables(3.0, 3)
    with pytest.raises(ValueError, match=r"a step has shape \[1\], \[8\] or \[2, 3, 'G'\] with G groups of the 8 channels, and not \[3\]"):
        digit_neuron(x, torch.ones(3), w, theta)
    with pytest.raises(ValueError, match=r"not \[2, 3, 5\]"):
        digit_neuron(x, torch.ones(2, 3, 5), w, theta)
    with pytest.raises(ValueError, match=r"shape \[T\], one number per time step, and not \[3\] and \[2\]"):
        digit_neuron(x, torch.ones(1), w, theta[:2])
    for base in (1.0, 3.5, True, "3"):
        with pytest.raises(ValueError, match="larger than 1 and at most 3, got"):
            digit_weights(base, 4)
    with pytest.raises(ValueError, match="digits of base 3 have 1 to 15 time steps, got 16"):
        digit_weights(3.0, 16)


def test_gradients_are_straight_through():
    x, d = random(2, 3, 4, low=-2.0, high=2.0), torch.tensor([0.04], dtype=torch.float64, requires_grad=True)
    w, theta = tables(3.0, 4, dtype=torch.float64)
    weight = random(2, 3, 4, seed=1, grad=False)
    n = weighted(digit_neuron(x, d, w, theta), w)
    to_x, to_d = torch.autograd.grad((weight * d * n).sum(), (x, d))
    inside = (x.abs() <= 40.5 * d).double()
    assert 0 < inside.mean() < 1
    torch.testing.assert_close(to_x, weight * inside)
    torch.testing.assert_close(to_d, (weight * (n - inside * x / d)).sum().reshape(1))
    per_head = torch.full((2, 3, 2), 0.04, dtype=torch.float64, requires_grad=True)
    (grouped,) = torch.autograd.grad((weight * spread(per_head, x) * weighted(digit_neuron(x, per_head, w, theta, True), w)).sum(), per_head)
    torch.testing.assert_close(grouped.sum().reshape(1), to_d)


def test_opcheck_and_layout():
    x, (w, theta) = random(2, 3, 4, dtype=torch.float32), tables(2.5, 3)
    for step, flag in ((torch.tensor([0.2], requires_grad=True), False), (torch.full((4,), 0.2), False), (torch.full((2, 3, 2), 0.2), True)):
        torch.library.opcheck(digit_neuron, (x, step, w, theta, flag))
    torch.library.opcheck(token_step, (x, 0.1, 2))
    turned = random(2, 4, 3, grad=False).transpose(-1, -2)
    assert same_layout(digit_neuron, turned, torch.ones(1, dtype=torch.float64), w, theta)


def test_types_and_counts():
    table = Constant((4,))
    assert infer(OP, ANALOG, Constant((1,)), table, table) == SpikeType(4, "fitted", "ternary")
    for kind in (SPIKES, RATE, CURRENT):
        with pytest.raises(TypeMismatch, match="takes a value that is analog, and %x0 is"):
            infer(OP, kind, Constant((1,)), table, table)
    x, (w, theta) = random(2, 3, 5, grad=False, dtype=torch.float32), tables(3.0, 4)
    spikes = digit_neuron(x, torch.tensor([0.1]), w, theta)
    expected = Counts(neuron_updates=120, spikes=float(spikes.abs().sum()), neurons=30)
    assert counts(OP, [operand(x)], operand(spikes, SpikeType(4, "fitted", "ternary")), ANALOG, Constant((1,)), table, table) == expected


@pytest.mark.parametrize("bounds", [(), (True, 0.4, 1.2)])
def test_the_membrane_tells_what_was_fired(bounds):
    x, step = random(2, 3, 50, grad=False, seed=5), random(2, 3, 1, grad=False, low=0.05, high=0.2)
    w, theta = tables(2.5, 4, dtype=torch.float64)
    spikes = digit_neuron(x, step, w, theta, *bounds)
    u, (up, down) = membrane((x, step, w, theta, *bounds), spikes)
    assert torch.equal((u >= up).double() - (u <= down).double(), spikes)


@pytest.mark.parametrize("bounds", [(False, 0.0, 1.0), (False, 1.0, 0.0)])
def test_a_value_at_a_bound_is_near_another_train(bounds):
    """Of two populations side by side one hears it: the slightest change moves it to the other, which is a tie and no mistake."""
    w, theta = tables(2.0, 5, dtype=torch.float64)
    x, step = torch.tensor([[[0.999, 1.001, -1.001, -0.999, 0.5, 1.7]]], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    own, other = digit_neuron(x, step, w, theta, *bounds), digit_neuron(torch.where(x.abs() < 1, x * 1.01, x * 0.99), step, w, theta, *bounds)
    assert (own.any(0) != other.any(0)).flatten().tolist() == [True] * 4 + [False] * 2

    def distance(fired):
        """Of each value, to the thresholds that lie between what it does and what was fired (``ntc.rounding.margins``)."""
        u, (up, down) = membrane((x, step, w, theta, *bounds), fired)
        crossed = ((u >= up) != (fired > 0)), ((u <= down) != (fired < 0))
        return torch.maximum((u - up).abs() * crossed[0], (u - down).abs() * crossed[1])[:, 0, 0]

    assert not distance(own).any()
    found = distance(other) * theta[:, None]
    assert (found[:, :4] <= 0.0101).all()  # in steps: 0.001 / 0.1
    assert (found[:, :4].amax(0) > 0.0099).all()
    wrong = (own == 0).double()  # a spike wherever there is none
    assert (distance(wrong)[:, 4:].amax(0) > 0.5).all()
