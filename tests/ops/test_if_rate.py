import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, Constant, counts, dyadics, gradients, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, if_rate, integrate_fire
from ntc.spike_type import ANALOG, INDEX, RateType

OP = torch.ops.ntc.if_rate.default


@settings(max_examples=200, deadline=None)
@given(dyadics(-64, 64, 4), dyadics(1, 32, 4), st.integers(1, 32), st.booleans())
def test_is_the_limit_of_the_neuron(x, theta, steps, signed):
    current, threshold = torch.tensor([[x]], dtype=torch.float64), torch.tensor(theta, dtype=torch.float64)
    rate = integrate_fire(current, threshold, torch.tensor([0.5]), steps, signed, False, "sigmoid", 1.0).mean(0)
    assert float((rate - if_rate(current, threshold, signed)).abs().max()) <= 1 / (2 * steps) + 1e-12


@pytest.mark.parametrize(("signed", "expected"), [(False, [0.0, 0.0, 0.25, 1.0, 1.0]), (True, [-1.0, -0.5, 0.25, 1.0, 1.0])])
def test_by_hand(signed, expected):
    assert if_rate(torch.tensor([[-4.0, -1.0, 0.5, 2.0, 3.0]]), torch.tensor([2.0]), signed).tolist() == [expected]


@settings(max_examples=50, deadline=None)
@given(dyadics(-64, 64, 4), dyadics(1, 32, 4), st.integers(-4, 4), st.booleans())
def test_is_homogeneous(x, theta, exponent, signed):
    current, threshold, a = torch.tensor([x]), torch.tensor(theta), 2.0**exponent
    assert torch.equal(if_rate(current, threshold, signed), if_rate(a * current, a * threshold, signed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(2, 2, 3), (3,)])
def test_gradient(signed, channels, shape):
    theta = random(channels, low=0.8, high=1.0, seed=1)
    inside = random(*shape, low=-0.7 if signed else 0.1, high=0.7)
    torch.autograd.gradcheck(lambda x, th: if_rate(x, th, signed), (inside, theta))
    outside = random(*shape, low=1.5, high=2.0)
    assert all(float(g.abs().sum()) == 0 for g in gradients(if_rate(outside, theta, signed), [outside, theta]))
    below = random(*shape, low=-2.0, high=-1.5)
    assert all(float(g.abs().sum()) == 0 for g in gradients(if_rate(below, theta, signed), [below, theta]))


def test_opcheck_and_layout():
    x, theta = random(2, 3, 4, dtype=torch.float32), random(4, low=0.5, high=1.0, dtype=torch.float32)
    torch.library.opcheck(if_rate, (x, theta, True))
    assert same_layout(if_rate, x.detach().transpose(0, 1), theta.detach(), True)
    with pytest.raises(ValueError, match=r"\[1\] or \[4\]"):
        if_rate(x, torch.ones(3), True)


def test_compiles_with_gradients():
    def f(x, theta):
        return 2 * if_rate(2 * x, theta, True)

    x, theta = random(2, 3, 4, dtype=torch.float32), random(4, low=0.5, high=1.0, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x, theta)
    assert torch.equal(f(x, theta), compiled)
    for a, b in zip(gradients(f(x, theta), [x, theta]), gradients(compiled, [x, theta]), strict=True):
        torch.testing.assert_close(a, b)


def test_types():
    assert infer(OP, ANALOG, Constant((8,)), True) == RateType(signed=True)
    assert infer(OP, ANALOG, Constant((8,)), False) == RateType()
    for kind in (RATE, SPIKES, CURRENT, INDEX):
        with pytest.raises(TypeMismatch, match="%x0"):
            infer(OP, kind, Constant((8,)), False)


def test_counting():
    x = torch.ones(2, 3, 4)
    assert counts(OP, [operand(x), operand(torch.ones(4))], operand(x, RATE)) == Counts(elementwise=48)
