import operator
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, GRADED, RATE, SPIKES, TERNARY, Constant, counts, infer, node_of, operand

from ntc.ops import SPECS, Counts, OpSpec, TypeMismatch, aten, register
from ntc.ops.spec import host_rule, timed
from ntc.spike_type import ANALOG, INDEX, CurrentType, SpikeType

LINEAR, MUL = aten.linear.default, aten.mul.Tensor
W, BIAS = Constant((5, 8)), Constant((5,))
BAD = TypeMismatch


@pytest.mark.parametrize(("target", "arguments", "result"), [
    (LINEAR, (ANALOG, W, BIAS), ANALOG),
    (LINEAR, (RATE, W, BIAS), ANALOG),
    (LINEAR, (SPIKES, W, BIAS), CURRENT),
    (LINEAR, (TERNARY, W), CURRENT),
    (LINEAR, (GRADED, W, None), CURRENT),
    (LINEAR, (SpikeType(4, "count"), W), CurrentType(4, "count")),
    (LINEAR, (SpikeType(4, "phase"), W, None), CurrentType(4, "phase")),
    (LINEAR, (SpikeType(4, "count"), W, BIAS), BAD),  # the bias would be decoded T times
    (LINEAR, (SpikeType(4, "phase"), W, BIAS), BAD),
    (LINEAR, (CURRENT, W, BIAS), BAD),
    (LINEAR, (INDEX, W, BIAS), BAD),
    (LINEAR, (ANALOG, SPIKES), BAD),
    (LINEAR, (SPIKES, RATE), BAD),
    (MUL, (ANALOG, ANALOG), ANALOG),
    (MUL, (ANALOG, 2.0), ANALOG),
    (MUL, (RATE, Constant((8,))), ANALOG),
    (MUL, (CURRENT, Constant((8,))), CURRENT),
    (MUL, (CURRENT, 0.5), CURRENT),
    (MUL, (SPIKES, 0.5), SpikeType(4, "rate", "graded", "tensor")),
    (MUL, (SPIKES, Constant(())), SpikeType(4, "rate", "graded", "tensor")),
    (MUL, (SPIKES, Constant((1,))), SpikeType(4, "rate", "graded", "tensor")),
    (MUL, (SPIKES, Constant((8,))), SpikeType(4, "rate", "graded", "channel")),
    (MUL, (Constant((8,)), TERNARY), SpikeType(4, "rate", "graded", "channel")),
    (MUL, (SPIKES, Constant((3, 1))), SpikeType(4, "rate", "graded", "token")),
    (MUL, (SPIKES, Constant((1, 2, 3, 1))), SpikeType(4, "rate", "graded", "token")),
    (MUL, (GRADED, 0.5), GRADED),  # still one factor per channel
    (MUL, (SPIKES, Constant((4, 1, 1, 1))), BAD),  # a factor per time step is another code
    (MUL, (CURRENT, Constant((4, 1, 1, 1))), BAD),
    (MUL, (SPIKES, Constant((5, 1, 1, 1, 1))), BAD),
    (MUL, (SPIKES, ANALOG), BAD),
    (MUL, (ANALOG, SPIKES), BAD),
    (MUL, (SPIKES, SPIKES), BAD),
    (MUL, (RATE, RATE), BAD),
    (MUL, (CURRENT, CURRENT), BAD),
    (aten.layer_norm.default, (ANALOG, [8]), ANALOG),
    (aten.layer_norm.default, (SPIKES, [8]), BAD),
    (aten.layer_norm.default, (RATE, [8]), BAD),
    (aten.gelu.default, (CURRENT,), BAD),
    (aten.add.Tensor, (ANALOG, ANALOG), ANALOG),
    (aten.add.Tensor, (ANALOG, CURRENT), BAD),
    (aten.view.default, (SPIKES, [8]), BAD),
    (aten.matmul.default, (SPIKES, W), BAD),
    (operator.getitem, (ANALOG, 0), ANALOG),
])  # fmt: skip
def test_types(target, arguments, result):
    if result is BAD:
        with pytest.raises(TypeMismatch) as caught:
            infer(target, *arguments)
        assert caught.value.argument is not None
        assert f"%{caught.value.argument.name}" in str(caught.value)
    else:
        assert infer(target, *arguments) == result


def test_a_train_times_itself_is_no_scaling():
    node, types = node_of(MUL, SPIKES, SPIKES)
    node.args = (node.args[0], node.args[0])
    with pytest.raises(TypeMismatch, match="scaled by a constant only, not by %x0"):
        SPECS[MUL].infer(node, types.__getitem__)


def test_which_types_have_time_steps():
    assert [timed(t) for t in (SPIKES, CURRENT, RATE, ANALOG, INDEX)] == [True, True, False, False, False]


def test_an_op_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register(OpSpec(LINEAR, host_rule))


def test_linear_multiplies_analog_values_and_accumulates_spikes():
    weight = operand(torch.ones(5, 3))
    x = torch.tensor([[[1.0, 0.0, 0.5], [2.0, 0.0, 0.0]]])  # B = 1, L = 2, C = 3
    y = operand(torch.ones(1, 2, 5))
    assert counts(LINEAR, [operand(x), weight], y) == Counts(dense_macs=30, macs=30)
    assert counts(LINEAR, [operand(x, RATE), weight], y) == Counts(dense_macs=30, macs=30)
    spikes = torch.zeros(4, 1, 2, 3)
    spikes[0, 0, 0, 0] = spikes[3, 0, 0, 0] = 1
    spikes[2, 0, 1, 2] = -1  # three events, each to five neurons; the dense layer runs once, not T times
    y = operand(torch.ones(4, 1, 2, 5), CURRENT)
    assert counts(LINEAR, [operand(spikes, TERNARY), weight], y) == Counts(dense_macs=30, acs=15)
    assert counts(LINEAR, [operand(spikes * 0.3, GRADED), weight], y) == Counts(dense_macs=30, graded_macs=15)


@pytest.mark.parametrize(("target", "shapes", "result", "expected"), [
    (aten.mm.default, [(2, 3), (3, 5)], (2, 5), 30),
    (aten.bmm.default, [(4, 2, 3), (4, 3, 5)], (4, 2, 5), 120),
    (aten.matmul.default, [(4, 2, 3), (3, 5)], (4, 2, 5), 120),
    (aten.addmm.default, [(5,), (2, 3), (3, 5)], (2, 5), 30),
])  # fmt: skip
def test_products(target, shapes, result, expected):
    got = counts(target, [operand(torch.ones(s)) for s in shapes], operand(torch.ones(result)))
    assert got == Counts(dense_macs=expected, macs=expected)


def test_scaled_dot_product_attention():
    # B = 2, H = 4, Hk = 2, 3 queries, 5 keys, D = 6, Dv = 7: 2 * 4 * 3 * 5 pairs.
    q, k, v, y = (operand(torch.ones(2, h, n, d)) for h, n, d in ((4, 3, 6), (2, 5, 6), (2, 5, 7), (4, 3, 7)))
    got = counts(aten.scaled_dot_product_attention.default, [q, k, v], y)
    assert got == Counts(dense_macs=120 * 13, macs=120 * 13, elementwise=360)


def test_elementwise():
    x = operand(torch.ones(2, 3, 4))
    assert counts(aten.layer_norm.default, [x], x) == Counts(elementwise=8 * 24)
    assert counts(aten.add.Tensor, [x, x], x) == Counts(elementwise=24)
    assert counts(MUL, [x], x) == Counts(elementwise=24)
    assert counts(aten.mean.dim, [x], operand(torch.ones(2, 3, 1))) == Counts(elementwise=24)  # all inputs are added
    assert counts(aten.view.default, [x], x) == Counts()
    assert counts(aten.embedding.default, [x, x], x) == Counts()


numbers = st.builds(Counts, *[st.integers(0, 2**40)] * len(fields(Counts)))


@given(numbers, numbers, st.integers(0, 100))
def test_counts_are_additive(a, b, n):
    for f in fields(Counts):
        assert getattr(a + b, f.name) == getattr(a, f.name) + getattr(b, f.name)
        assert getattr(a * n, f.name) == n * getattr(a, f.name)
    assert a + Counts() == a
    assert sum([a, b], Counts()) == b + a
