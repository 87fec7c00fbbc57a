import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, Step, counts, dyadics, gradients, infer, node_of, operand, random, same_layout
from torch import Tensor, nn

from ntc.errors import ConfigError
from ntc.ops import SPECS, Counts, TypeMismatch, integrate_fire
from ntc.ops.if_neuron import count_oracle
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType
from ntc.surrogate import SURROGATES

IF = torch.ops.ntc.integrate_fire.default
V0 = st.sampled_from([0.0, 0.5])


def run(current, threshold, steps, signed=False, v0=0.5, timed=False, surrogate="sigmoid", width=1.0):
    v0 = v0 if isinstance(v0, Tensor) else current.new_tensor([v0])
    return integrate_fire(current, threshold, v0, steps, signed, timed, surrogate, width)


def reference(current, threshold, steps, signed, v0, surrogate, width):
    """The equations of the module's docstring with ordinary differentiable operations; ``current`` is ``[T, ...]``."""
    v, spikes = v0 * threshold.expand(current.shape[1:]), []
    for t in range(steps):
        u = v + current[t]
        s = Step.apply((u - threshold) / threshold, surrogate, width)
        if signed:
            s = s - (1 - Step.apply(u / threshold, surrogate, width))
        v = u - threshold * s
        spikes.append(s)
    return torch.stack(spikes)


@settings(max_examples=300, deadline=None)
@given(dyadics(-64, 64, 4), dyadics(1, 32, 4), st.integers(1, 16), st.booleans(), V0, st.booleans())
def test_constant_current_fires_as_often_as_the_closed_form_says(x, theta, steps, signed, v0, timed):
    current, threshold = torch.tensor([[x]]), torch.tensor(theta)
    given_current = current.expand(steps, 1, 1, 4) if timed else current
    spikes = run(given_current, threshold, steps, signed, v0, timed)
    assert torch.equal(spikes.sum(0).double(), count_oracle(current, threshold, torch.tensor([v0]), steps, signed))
    assert set(spikes.unique().tolist()) <= ({-1.0, 0.0, 1.0} if signed else {0.0, 1.0})


@pytest.mark.parametrize(("x", "signed", "v0", "count"), [
    (1.0, False, 0.0, 4), (0.5, False, 0.0, 2), (0.25, False, 0.5, 1), (0.125, False, 0.5, 1), (-0.5, False, 0.5, 0),
    (-0.5, True, 0.0, -2), (-0.125, True, 0.5, 0), (-0.25, True, 0.5, -1), (9.0, True, 0.5, 4), (-9.0, True, 0.5, -4),
    (-0.125, True, 0.0, -1), (0.375, False, 0.5, 2),
])  # fmt: skip
def test_counts_by_hand(x, signed, v0, count):
    assert float(run(torch.tensor([[[x]]]), torch.ones(1), 4, signed, v0).sum()) == count
    assert float(count_oracle(torch.tensor(x), torch.ones(1), torch.tensor([v0]), 4, signed)) == count


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 12), st.booleans(), V0, st.integers(1, 32))
def test_timed_current_within_the_threshold_is_counted_to_the_last_event(data, steps, signed, v0, theta):
    # For |x(t)| <= theta the membrane stays in [0, theta): the count is the floor of all that came in.
    n = theta
    x = torch.tensor(data.draw(dyadics(-n if signed else 0, n, steps))).view(steps, 1, 1, 1)
    spikes = run(x, torch.tensor([theta / 8]), steps, signed, v0, timed=True)
    expected = (Fraction(v0) + Fraction(float(x.sum())) / Fraction(theta, 8)).__floor__()
    assert int(spikes.sum()) == expected


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 12), st.booleans(), V0, st.integers(1, 32))
def test_soft_reset_conserves_charge(data, steps, signed, v0, theta):
    x = data.draw(dyadics(-64, 64, steps))
    spikes = run(torch.tensor(x).view(steps, 1, 1, 1), torch.tensor([theta / 8]), steps, signed, v0, timed=True).flatten().tolist()
    th = Fraction(theta, 8)
    v = Fraction(v0) * th
    for x_t, s_t in zip(x, spikes, strict=True):  # every decision follows the definition, in exact arithmetic
        u = v + Fraction(x_t)
        assert s_t == (u >= th) - (signed and u < 0)
        v = u - th * int(s_t)
    assert v == Fraction(v0) * th + sum(map(Fraction, x)) - th * int(sum(spikes))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8), st.booleans(), V0, st.integers(-3, 3))
def test_scaling_current_and_threshold_changes_no_spike(data, steps, signed, v0, exponent):
    x = torch.tensor(data.draw(dyadics(-40, 40, 3 * steps))).view(steps, 1, 1, 3)
    theta, a = torch.tensor(data.draw(dyadics(1, 24, 3))), 2.0**exponent
    assert torch.equal(run(x, theta, steps, signed, v0, True), run(a * x, a * theta, steps, signed, v0, True))


@settings(max_examples=100, deadline=None)
@given(dyadics(-64, 64, 4), dyadics(1, 32, 1), dyadics(0, 8, 4), st.integers(1, 16), st.booleans())
def test_every_channel_starts_where_its_own_v0_says(x, theta, v0, steps, signed):
    current, threshold, start = torch.tensor([[x]]), torch.tensor(theta), torch.tensor(v0)
    spikes = run(current, threshold, steps, signed, start)
    assert torch.equal(spikes.sum(0).double(), count_oracle(current, threshold, start, steps, signed))


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4), (4,)])
@pytest.mark.parametrize("channels", [1, 4])
def test_one_threshold_for_all_or_one_per_channel(shape, channels):
    x, theta = random(*shape), random(channels, low=0.5, high=1.5, seed=1)
    full = theta.detach().expand(4).contiguous().requires_grad_()
    a, b = run(x, theta, 3, True), run(x, full, 3, True)
    assert torch.equal(a, b)
    (gx, gt), (fx, ft) = gradients(a, [x, theta]), gradients(b, [x, full])
    assert torch.equal(gx, fx)
    torch.testing.assert_close(gt, ft if channels == 4 else ft.sum(0, keepdim=True))


@pytest.mark.parametrize("threshold", [torch.ones(3), torch.ones(1, 4), torch.ones(()), torch.ones(2, 3, 4)])
def test_threshold_of_another_shape_is_refused(threshold):
    with pytest.raises(ValueError, match=r"\[1\] or \[4\]"):
        run(torch.zeros(2, 3, 4), threshold, 2)
    with pytest.raises(ValueError, match=r"v0 has shape \[1\] or \[4\]"):
        run(torch.zeros(2, 3, 4), torch.ones(4), 2, v0=threshold)
    for other in ({"threshold": threshold}, {"threshold": torch.ones(1), "v0": threshold}):
        with pytest.raises(ValueError, match=next(reversed(other))), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            run(torch.zeros(2, 3, 4), steps=2, **other)


def test_unknown_surrogate_is_refused_in_the_forward_pass():
    with pytest.raises(ConfigError, match="no surrogate gradient is called 'step'"):
        run(random(1, 2, 3), torch.ones(1), 2, surrogate="step")


@pytest.mark.parametrize(
    ("name", "timed", "channels", "signed", "v0"),
    list(itertools.product(sorted(SURROGATES), [False, True], [1, 4], [False, True], [(0.0,), (0.5,), (0.1, 0.3, 0.5, 0.9)])),
)
def test_gradient_is_the_one_of_the_equations(name, timed, channels, signed, v0):
    steps, width = 5, 0.8
    x = random(*((steps,) if timed else ()), 2, 3, 4)
    theta = random(channels, low=0.5, high=1.2, seed=1)
    start = torch.tensor(v0, dtype=torch.float64, requires_grad=True)
    ours = run(x, theta, steps, signed, start, timed, name, width)
    theirs = reference(x if timed else x.expand(steps, 2, 3, 4), theta, steps, signed, start, name, width)
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0
    for a, b in zip(gradients(ours, [x, theta, start]), gradients(theirs, [x, theta, start]), strict=True):
        assert a.shape == b.shape
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_of_reduced_precision_come_in_the_types_of_the_arguments():
    x = random(3, 2, 3, 4, dtype=torch.bfloat16)
    theta, start = random(4, low=0.5, high=1.2, seed=1, dtype=torch.float32), random(4, low=0.0, high=1.0, seed=2, dtype=torch.float32)
    spikes = run(x, theta, 3, True, start, True)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), run(x.float(), theta, 3, True, start, True))  # the membrane is a float32 one
    assert [g.dtype for g in gradients(spikes, [x, theta, start])] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("signed", [False, True])
def test_gradient_keeps_the_homogeneity_of_the_neuron(signed):
    x, theta = random(6, 2, 3, 4), random(4, low=0.5, high=1.2, seed=1)
    gx, gt = gradients(run(x, theta, 6, signed, 0.5, True), [x, theta])
    torch.testing.assert_close((gx * x).sum((0, 1, 2)) + gt * theta, torch.zeros(4, dtype=torch.float64), atol=1e-10, rtol=0)
    assert (gt * theta).abs().min() > 1e-3


@pytest.mark.parametrize(("timed", "channels", "signed"), [(False, 4, True), (True, 1, False)])
def test_opcheck(timed, channels, signed):
    x = random(*((3,) if timed else ()), 2, 3, 4, dtype=torch.float32)
    theta, start = (random(channels, low=low, high=1.0, dtype=torch.float32) for low in (0.5, 0.0))
    torch.library.opcheck(integrate_fire, (x, theta, start, 3, signed, timed, "sigmoid", 1.0))
    swapped = x.detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    assert same_layout(integrate_fire, swapped, theta.detach(), start.detach(), 3, signed, timed, "atan", 1.0)


def test_compiles_with_gradients():
    def f(x, theta):
        return run(2 * x, theta, 3, True, surrogate="triangular").sum(0) * 3

    x, theta = random(2, 3, 4, dtype=torch.float32), random(4, low=0.5, high=1.0, dtype=torch.float32)
    eager, compiled = f(x, theta), torch.compile(f, backend="aot_eager", fullgraph=True)(x, theta)
    assert torch.equal(eager, compiled)
    for a, b in zip(gradients(eager, [x, theta]), gradients(compiled, [x, theta]), strict=True):
        torch.testing.assert_close(a, b)


TH, V_0 = Constant((8,)), Constant((1,))


@pytest.mark.parametrize(("kind", "signed", "timed", "result"), [
    (ANALOG, False, False, SpikeType(4)),
    (ANALOG, True, False, SpikeType(4, levels="ternary")),
    (CURRENT, True, True, SpikeType(4, levels="ternary")),
    (CURRENT, False, False, None),
    (ANALOG, False, True, None),
    (CurrentType(3), False, True, None),
    (CurrentType(4, "count"), False, True, None),
    (CurrentType(4, "phase"), False, True, None),
    (SPIKES, False, True, None),
    (SPIKES, False, False, None),
    (RATE, False, False, None),
    (INDEX, False, False, None),
])  # fmt: skip
def test_types(kind, signed, timed, result):
    arguments = (kind, TH, V_0, 4, signed, timed, "sigmoid", 1.0)
    if result is not None:
        assert infer(IF, *arguments) == result
    else:
        with pytest.raises(TypeMismatch, match="%x0") as caught:
            infer(IF, *arguments)
        assert caught.value.argument.name == "x0"


@pytest.mark.parametrize(("value", "fits"), [([1.0, 0.5], True), ([1.0, 0.0], False), ([1.0, -0.25], False), ([1.0, float("nan")], False)])
def test_a_threshold_that_is_not_positive_is_a_type_error(value, fits):
    node, types = node_of(IF, ANALOG, Constant((2,)), V_0, 4, False, False, "sigmoid", 1.0)
    owner = nn.Module()
    owner.register_buffer("c1", torch.tensor(value))
    node.graph.owning_module = owner
    if fits:
        assert SPECS[IF].infer(node, types.__getitem__) == SpikeType(4)
    else:
        with pytest.raises(TypeMismatch, match="thresholds > 0, and element 1 of %c1 is"):
            SPECS[IF].infer(node, types.__getitem__)


@pytest.mark.parametrize(("value", "fits"), [([0.0, 1.0], True), ([0.5], True), ([0.5, 1.25], False), ([0.5, -0.25], False), ([0.5, float("nan")], False)])
def test_an_initial_potential_beyond_the_threshold_is_a_type_error(value, fits):
    node, types = node_of(IF, ANALOG, Constant((2,)), Constant((2,)), 4, False, False, "sigmoid", 1.0)
    owner = nn.Module()
    owner.register_parameter("c2", nn.Parameter(torch.tensor(value)))
    node.graph.owning_module = owner
    if fits:
        assert SPECS[IF].infer(node, types.__getitem__) == SpikeType(4)
    else:
        with pytest.raises(TypeMismatch, match=r"v0 lies in \[0, 1\], and element 1 of %c2 is"):
            SPECS[IF].infer(node, types.__getitem__)


def test_counting():
    spikes = run(torch.tensor([[[1.0, 0.5, 0.0]]]), torch.ones(1), 4, v0=0.0)  # 4 + 2 + 0 spikes
    got = counts(IF, [operand(torch.zeros(1, 1, 3)), operand(torch.ones(1))], operand(spikes, SPIKES))
    assert got == Counts(neuron_updates=12, spikes=6, neurons=3)
