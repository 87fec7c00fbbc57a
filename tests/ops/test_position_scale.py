import pytest
import torch
from op_cases import CURRENT, RATE, SPIKES, counts, infer, operand, random, same_layout

from ntc.ops import Counts, TypeMismatch, position_scale
from ntc.spike_type import ANALOG, INDEX

OP = torch.ops.ntc.position_scale.default


@pytest.mark.parametrize("lead", [(), (2,), (4, 2)])
def test_divides_by_the_number_of_keys_seen(lead):
    x = random(*lead, 5, 3, grad=False)
    y = position_scale(x)
    for i in range(5):
        assert torch.equal(y[..., i, :], x[..., i, :] / (i + 1))


def test_gradient_opcheck_and_layout():
    torch.autograd.gradcheck(position_scale, (random(2, 3, 2),))
    torch.library.opcheck(position_scale, (random(2, 3, 4, dtype=torch.float32),))
    assert same_layout(position_scale, random(2, 4, 3, grad=False).transpose(-1, -2))
    assert same_layout(position_scale, random(1, 1, 3, grad=False).expand(2, 4, 3))


def test_compiles_with_gradients():
    def f(x):
        return position_scale(2 * x) ** 2

    x = random(2, 3, 4, dtype=torch.float32)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(f(x), compiled)
    torch.testing.assert_close(torch.autograd.grad(f(x).sum(), x), torch.autograd.grad(compiled.sum(), x))


def test_types():
    assert infer(OP, ANALOG) == ANALOG
    assert infer(OP, CURRENT) == CURRENT
    for kind in (SPIKES, RATE, INDEX):
        with pytest.raises(TypeMismatch, match="position_scale takes a current or an analog value, and %x0"):
            infer(OP, kind)


def test_counting():
    x = torch.ones(4, 2, 3, 5)
    assert counts(OP, [operand(x, CURRENT)], operand(x, CURRENT)) == Counts(elementwise=120)
