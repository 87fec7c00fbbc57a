import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, RATE, SPIKES, counts, infer, operand, random, same_layout

from ntc.ops import SPECS, Counts, TypeMismatch, decode, rms_scale
from ntc.spike_type import ANALOG, INDEX, CurrentType

OP = torch.ops.ntc.rms_scale.default


def by_loop(x: torch.Tensor, heads: int, eps: float) -> torch.Tensor:
    """The docstring's equations on ``[T, B, L, C]``, one token and head at a time."""
    size, y = x.shape[-1] // heads, torch.empty_like(x)
    for b in range(x.shape[1]):
        for i in range(x.shape[2]):
            for h in range(heads):
                mine = slice(h * size, (h + 1) * size)
                m = x[:, b, i, mine].sum(0) / x.shape[0]
                y[:, b, i, mine] = x[:, b, i, mine] / ((m * m).sum() / size + eps) ** 0.5
    return y


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_equals_the_loop(steps, heads, length, size, seed):
    x = random(steps, 2, length, heads * size, grad=False, seed=seed)
    torch.testing.assert_close(rms_scale(x, heads, 1e-3), by_loop(x, heads, 1e-3))
    torch.testing.assert_close(rms_scale(x[0], heads, 1e-3), by_loop(x[:1], heads, 1e-3)[0])


@given(st.integers(0, 99))
def test_commutes_with_the_decode_and_forgets_the_scale_of_a_head(seed):
    x = random(4, 2, 3, 8, grad=False, seed=seed)
    torch.testing.assert_close(decode(rms_scale(x, 2, 1e-5), "rate"), rms_scale(decode(x, "rate"), 2, 1e-5))
    factors = torch.tensor([0.5] * 4 + [30.0] * 4, dtype=x.dtype)
    torch.testing.assert_close(rms_scale(x * factors, 2, 1e-12), rms_scale(x, 2, 1e-12), rtol=1e-4, atol=1e-6)
    power = rms_scale(x, 2, 1e-12).mean(0).unflatten(-1, (2, 4)).square().mean(-1)
    torch.testing.assert_close(power, torch.ones_like(power))


def test_a_silent_token_stays_silent():
    x = torch.zeros(4, 1, 2, 6, requires_grad=True)
    y = rms_scale(x, 2, 1e-5)
    assert not y.any()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_bfloat16_is_the_rounded_result():
    x = random(4, 2, 3, 8, grad=False, dtype=torch.float32).bfloat16()
    assert torch.equal(rms_scale(x, 2, 1e-5), rms_scale(x.float(), 2, 1e-5).bfloat16())


def test_gradient_opcheck_and_layout():
    for shape in ((3, 2, 3, 4), (2, 3, 4)):
        torch.autograd.gradcheck(lambda x: rms_scale(x, 2, 1e-2), (random(*shape),))
        torch.library.opcheck(rms_scale, (random(*shape, dtype=torch.float32), 2, 1e-5))
    assert same_layout(rms_scale, random(2, 3, 4, 3, grad=False).transpose(-1, -2), 2, 1e-5)
    assert same_layout(rms_scale, random(1, 1, 4, grad=False).expand(2, 3, 4), 2, 1e-5)


def test_compiles_with_gradients():
    def f(x):
        return rms_scale(2 * x, 2, 1e-5) ** 2

    x = random(3, 2, 3, 4, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads that divides the 8 channels, not 3"):
        rms_scale(torch.ones(2, 3, 8), 3, 1e-5)
    with pytest.raises(ValueError, match=r"takes \[B, L, C\] or \[T, B, L, C\], not \[3, 8\]"):
        rms_scale(torch.ones(3, 8), 2, 1e-5)


def test_types():
    assert infer(OP, ANALOG, 2, 1e-5) == ANALOG
    assert infer(OP, CURRENT, 2, 1e-5) == CURRENT
    for kind in (SPIKES, RATE, INDEX, CurrentType(4, "count")):
        with pytest.raises(TypeMismatch, match="rms_scale takes a rate-coded current or an analog value, and %x0"):
            infer(OP, kind, 2, 1e-5)
    with pytest.raises(TypeMismatch, match="needs eps > 0"):
        infer(OP, CURRENT, 2, 0.0)


def test_counting():
    x = torch.ones(4, 2, 3, 5)
    assert counts(OP, [operand(x, CURRENT)], operand(x, CURRENT)) == Counts(elementwise=120 + 120 + 60)
    assert counts(OP, [operand(x[0])], operand(x[0])) == Counts(elementwise=30 + 60)


def test_the_traced_form_is_the_same_function():
    x, traced = random(3, 2, 3, 4), SPECS[OP].traced
    assert torch.equal(traced(x, 2, 1e-5), rms_scale(x, 2, 1e-5))
    torch.testing.assert_close(*(torch.autograd.grad((f(x, 2, 1e-5)[..., :2] ** 2).sum(), x) for f in (traced, rms_scale)))
