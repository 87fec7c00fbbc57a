"""Multi-threshold neurons and expectations: against their dynamics; the mean over the steps is the function of the mean."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, dyadics, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, expectation, mt_neuron
from ntc.ops.expectation import FUNCTIONS
from ntc.ops.mt_neuron import membrane, sum_oracle
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

NEURON, EXPECTED = torch.ops.ntc.mt_neuron.default, torch.ops.ntc.expectation.default
TABLES = {"rms_norm": 1, "layer_norm": 2}


def by_loop(inputs: list[float], theta: float, levels: int) -> tuple[list[float], float]:
    """Events of one neuron, and its membrane at the end."""
    v, events = 0.0, []
    for x in inputs:
        u = v + x
        sizes = [2**i for i in range(levels) if abs(u) >= 2**i * theta - theta / 2]
        events.append((max(sizes) if sizes else 0) * (1.0 if u > 0 else -1.0 if u < 0 else 0.0))
        v = u - theta * events[-1]
    return events, v


@given(dyadics(-400, 400, 6), st.sampled_from([0.25, 1.0, 2.0]), st.integers(1, 6), st.integers(1, 7))
def test_neurons_equal_their_dynamics(numbers, theta, steps, levels):
    x, at = torch.tensor(numbers).reshape(1, 2, 3), torch.tensor([theta])
    events = mt_neuron(x, at, steps, levels, False)
    assert torch.equal(events, mt_neuron(x.expand(steps, -1, -1, -1).contiguous(), at, steps, levels, True))
    for i, number in enumerate(numbers):
        expected, left = by_loop([number] * steps, theta, levels)
        got = events[:, 0, i // 3, i % 3]
        assert got.tolist() == expected
        assert theta * float(got.sum()) == steps * number - left, "nothing is lost but what the membrane keeps"


@given(dyadics(-400, 400, 12), st.sampled_from([0.25, 1.0, 2.0]), st.integers(1, 12), st.integers(1, 7))
def test_a_constant_is_told_as_the_closed_form_says(numbers, theta, steps, levels):
    """Multiples of a power of two, rounded down: short by less than the T-th part of the value, or of theta, in range."""
    x, at = torch.tensor(numbers), torch.tensor([theta])
    told = mt_neuron(x.reshape(1, 1, -1), at, steps, levels, False).sum(0).flatten()
    assert torch.equal(told.double(), sum_oracle(x, at, steps, levels))
    inside = x.abs() < (2 ** (levels - 1) + 0.0) * theta
    short = (x.abs() * steps - theta * told.abs())[inside]  # T times what the mean is short by: exact, where a mean is not
    assert bool((short >= -theta / 2).all())
    assert bool((short < x[inside].abs().clamp(min=theta)).all())
    assert bool((theta * told.abs()[~inside] == 2 ** (levels - 1) * theta * steps).all()), "what is beyond the largest is clipped to it"


@given(st.integers(0, 100), st.sampled_from([0.02, 0.3, 1.7]), st.integers(1, 10), st.integers(1, 7))
def test_the_closed_form_of_real_numbers(seed, theta, steps, levels):
    x, at = random(1, 3, 40, seed=seed, grad=False, low=-6, high=6), torch.tensor([theta], dtype=torch.float64)
    assert torch.equal(mt_neuron(x, at, steps, levels, False).sum(0), sum_oracle(x, at, steps, levels))


@pytest.mark.parametrize("timed", [False, True])
def test_the_membrane_tells_what_was_fired(timed):
    x, theta = random(*([5] if timed else []), 2, 3, 40, grad=False, low=-9, high=9), random(40, grad=False, seed=1, low=0.1, high=0.5)
    events = mt_neuron(x, theta, 5, 4, timed)
    u, levels = membrane((x, theta, 5, 4, timed), events)
    assert len(levels) == 8 and all(bool((above > below).all()) for above, below in pairwise(levels))
    reached = torch.stack([u >= level for level in levels]).sum(0) - 4
    assert torch.equal(events, reached.sign() * 2.0 ** (reached.abs() - 1) * (reached != 0)) and len(events.unique()) == 9


def test_neurons_by_hand():
    x = torch.tensor([[[0.49, 0.5, 1.5, -3.5, 100.0]]])
    assert mt_neuron(x, torch.ones(1), 3, 3, False).flatten(1).T.tolist() == [[0, 1, 0], [1, 0, 1], [2, 1, 2], [-4, -2, -4], [4, 4, 4]]


def test_neurons_of_other_shapes_are_refused():
    x = torch.ones(1, 2, 3)
    for levels in (0, 8):
        with pytest.raises(ValueError, match=f"1 to 7 levels, got {levels}"):
            mt_neuron(x, torch.ones(1), 4, levels, False)
    with pytest.raises(ValueError, match=r"\[1\] or \[3\]"):
        mt_neuron(x, torch.ones(2), 4, 4, False)


def test_neurons_pass_the_gradient_of_what_they_tell():
    """In range every step gives away what it got: ``sum_t e = T x / theta``, and nothing where the neuron is far beyond its range."""
    x, theta = random(1, 2, 6, low=-2.0, high=2.0), torch.full((6,), 0.3, dtype=torch.float64, requires_grad=True)
    to_x, to_theta = torch.autograd.grad(mt_neuron(x, theta, 4, 5, False).sum(), (x, theta))
    torch.testing.assert_close(to_x, torch.full_like(x, 4 / 0.3))
    torch.testing.assert_close((to_x * x).sum() + (to_theta * theta).sum(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    far = torch.full((1, 1, 6), 50.0, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(mt_neuron(far, theta, 4, 2, False).sum(), far)[0].any()


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.integers(1, 6), st.integers(0, 50))
def test_the_mean_up_to_every_step_is_the_function_of_the_mean(function, steps, seed):
    x = random(steps, 2, 3, 8, seed=seed, grad=False)
    weight, bias = (random(8, seed=seed + n, grad=False) if TABLES.get(function, 0) >= n else None for n in (1, 2))
    told = expectation(x, function, 1e-6, weight, bias)
    for t in range(1, steps + 1):
        mean = x[:t].mean(0)
        if function == "softmax":
            expected = mean.exp() / mean.exp().sum(-1, keepdim=True)
        elif function in TABLES:
            centre = mean - mean.mean(-1, keepdim=True) if function == "layer_norm" else mean
            expected = centre / (centre.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + (0 if bias is None else bias)
        else:
            inner = (2 / torch.pi) ** 0.5 * (mean + 0.044715 * mean**3)
            gate = {"silu": torch.sigmoid(mean), "gelu": (1 + torch.erf(mean / 2**0.5)) / 2, "gelu_tanh": (1 + torch.tanh(inner)) / 2}[function]
            expected = mean * gate
        torch.testing.assert_close(told[:t].mean(0), expected)


def test_expectations_that_do_not_exist_are_refused():
    x = torch.ones(4, 1, 2, 8)
    with pytest.raises(ValueError, match=r"expectations are of silu, .*, and not of 'relu'"):
        expectation(x, "relu", 0.0)
    with pytest.raises(ValueError, match="softmax has no weight"):
        expectation(x, "softmax", 0.0, torch.ones(8))
    with pytest.raises(ValueError, match="rms_norm has no bias"):
        expectation(x, "rms_norm", 0.0, torch.ones(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"a weight of rms_norm has shape \[8\], and not \[4\]"):
        expectation(x, "rms_norm", 0.0, torch.ones(4))


def test_gradients_opcheck_and_layout():
    x = random(3, 2, 2, 4)
    torch.autograd.gradcheck(lambda x, w, b: expectation(x, "layer_norm", 1e-3, w, b), (x, random(4, seed=1), random(4, seed=2)))
    torch.autograd.gradcheck(lambda x: expectation(x, "gelu_tanh", 0.0), (x,))
    torch.library.opcheck(expectation, (x, "rms_norm", 1e-6, random(4, seed=1)))
    torch.library.opcheck(mt_neuron, (x, torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True), 3, 4, True))
    turned = random(3, 2, 4, 2, grad=False).transpose(-1, -2)
    assert same_layout(expectation, turned, "softmax", 0.0)
    assert same_layout(mt_neuron, turned[0], torch.ones(1, dtype=torch.float64), 3, 4, False)


def test_types_and_counts():
    assert infer(NEURON, ANALOG, Constant((8,)), 4, 5, False) == SpikeType(4, "rate", "graded") == infer(NEURON, CURRENT, Constant((8,)), 4, 5, True)
    for given_type, timed, sentence in ((CURRENT, False, "take an analog current"), (ANALOG, True, "a rate-coded current of as many steps"),
                                        (CurrentType(4, "phase"), True, "a rate-coded current")):  # fmt: skip
        with pytest.raises(TypeMismatch, match=sentence):
            infer(NEURON, given_type, Constant((8,)), 4, 5, timed)
    assert infer(EXPECTED, CURRENT, "silu", 0.0) == CURRENT == infer(EXPECTED, SPIKES, "silu", 0.0)
    for kind in (ANALOG, RATE, INDEX, CurrentType(4, "count")):
        with pytest.raises(TypeMismatch, match="an expectation is of a rate-coded train, and %x0 is"):
            infer(EXPECTED, kind, "silu", 0.0)
    events = mt_neuron(random(2, 3, 5, grad=False), torch.tensor([0.3], dtype=torch.float64), 4, 5, False)
    fired = float((events != 0).sum())
    assert counts(NEURON, [], operand(events, SpikeType(4, "rate", "graded")), ANALOG, Constant((1,)), 4, 5, False) == Counts(
        neuron_updates=120, acs=480, spikes=fired, neurons=30
    )
    assert counts(EXPECTED, [], operand(events, CURRENT), CURRENT, "softmax", 0.0) == Counts(elementwise=7 * 120)
