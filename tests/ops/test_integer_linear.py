import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Constant, counts, infer, node_of, operand

from ntc.ops import SPECS, Counts, Interval, TypeMismatch, integer_linear
from ntc.ops.integer_linear import INTEGER_LINEAR
from ntc.spike_type import ANALOG, INDEX, INTEGER, CurrentType, SpikeType

OP = torch.ops.ntc.integer_linear.default


def oracle(x, weight, bias):
    return [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight, bias, strict=True)]


@settings(max_examples=40)
@given(st.data(), st.sampled_from([(7, torch.int8), (15, torch.int16)]), st.booleans())
def test_is_its_definition(data, kind, biased):
    bits, dtype = kind
    c, o = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    number = st.integers(-(2**bits) + 1, 2**bits - 1)
    x, bias = data.draw(st.lists(number, min_size=c, max_size=c)), data.draw(st.lists(st.integers(-(2**20), 2**20), min_size=o, max_size=o))
    weight = data.draw(st.lists(st.lists(number, min_size=c, max_size=c), min_size=o, max_size=o))
    expected = oracle(x, weight, bias if biased else [0] * o)
    arguments = torch.tensor([[x]], dtype=dtype), torch.tensor(weight, dtype=dtype), torch.tensor(bias, dtype=torch.int32) if biased else None
    if max(map(abs, expected)) < 2**31:
        got = integer_linear(*arguments)
        assert got.dtype == torch.int32
        assert got[0, 0].tolist() == expected


@pytest.mark.parametrize("channels", [8, 1024, 1032, 1033, 4096])
def test_sums_at_their_largest_on_both_sides_of_2_to_24(channels):
    """float32 would lose the last bit from 1033 channels on."""
    x = torch.full((1, 1, channels), -128, dtype=torch.int8)
    weight = torch.full((2, channels), 127, dtype=torch.int8)
    x[..., 0], weight[1, 0] = 127, -127
    assert integer_linear(x, weight, None).tolist() == [[[127 * 127 - 128 * 127 * (channels - 1), -127 * 127 - 128 * 127 * (channels - 1)]]]


@settings(max_examples=20)
@given(st.randoms())
def test_the_order_of_the_sum_does_not_matter(random):
    order = list(range(600))
    random.shuffle(order)
    g = torch.Generator().manual_seed(random.randrange(2**30))
    x = torch.randint(-(2**15), 2**15, (1, 2, 600), generator=g, dtype=torch.int16)
    weight = torch.randint(-127, 128, (5, 600), generator=g, dtype=torch.int8)
    assert torch.equal(integer_linear(x, weight, None), integer_linear(x[..., order], weight[:, order], None))


def test_opcheck_and_refusals():
    x, weight, bias = torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(5, 4, dtype=torch.int8), torch.ones(5, dtype=torch.int32)
    for b in (bias, None):
        torch.library.opcheck(integer_linear, (x, weight, b))
    for wrong, match in (
        ((x.float(), weight, bias), "x holds integers"), ((x, weight.float(), bias), "weight holds integers"), ((x, weight[:, :3], bias), r"\[O, 4\]"),
        ((x, weight, bias[:4]), r"bias of 5 outputs"), ((x, weight, bias[None]), r"\[1, 5\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            integer_linear(*wrong)
    with pytest.raises(ValueError, match="does not fit into int32"):
        integer_linear(torch.full((1, 1, 1), 2**20, dtype=torch.int32), torch.full((1, 1), 2**12, dtype=torch.int16), None)


def test_types():
    weight, bias = Constant((5, 8), torch.int8), Constant((5,), torch.int32)
    assert infer(OP, INTEGER, weight, bias) == INTEGER
    assert infer(OP, INTEGER, weight, None) == INTEGER
    for kind in (ANALOG, INDEX, SpikeType(4, "count"), CurrentType(4, "count")):
        with pytest.raises(TypeMismatch, match="takes integers, and %x0"):
            infer(OP, kind, weight, bias)
    with pytest.raises(TypeMismatch, match=r"integer constants, and %c1 is torch\.float32"):
        infer(OP, INTEGER, Constant((5, 8)), bias)


def test_activations_are_macs_and_spike_counts_are_payloads():
    x, weight = torch.tensor([[[3, 0, 1, 0]]]), torch.ones(5, 4)
    operands, result = [operand(x, INTEGER), operand(weight, INTEGER)], operand(torch.ones(1, 1, 5), INTEGER)
    assert counts(OP, operands, result, INTEGER, Constant((5, 4), torch.int8), None) == Counts(dense_macs=20, macs=20)
    node, _ = node_of(OP, INTEGER, Constant((5, 4), torch.int8), None)
    node.args[0].op, node.args[0].target = "call_function", torch.ops.ntc.decode.default
    spec = SPECS[OP]
    measured = spec.measure([x, weight], torch.ones(1, 1, 5), node)
    assert spec.count(node, operands, result, measured) == Counts(dense_macs=20, graded_macs=10)


@given(st.data())
def test_the_bound_is_reached_and_never_left(data):
    c, o = 3, 2
    ends = [sorted(data.draw(st.tuples(st.integers(-128, 127), st.integers(-128, 127)))) for _ in range(c)]
    weight = torch.tensor(data.draw(st.lists(st.lists(st.integers(-127, 127), min_size=c, max_size=c), min_size=o, max_size=o)), dtype=torch.int8)
    bias = torch.tensor(data.draw(st.lists(st.integers(-99, 99), min_size=o, max_size=o)), dtype=torch.int32)
    interval = Interval(*(torch.tensor(e).numpy().astype(object) for e in zip(*ends, strict=True)))
    bound = INTEGER_LINEAR.bound(None, 0, interval, weight, bias)
    low, high = torch.tensor(ends).unbind(1)
    for i in range(o):
        largest = torch.where(weight[i] > 0, high, low)
        assert int(integer_linear(largest[None, None], weight, bias)[0, 0, i]) == bound.result.high[i]
        least = torch.where(weight[i] > 0, low, high)
        assert int(integer_linear(least[None, None], weight, bias)[0, 0, i]) == bound.result.low[i]
    partial = [sum(max(int(w) * a, int(w) * b, 0) for w, (a, b) in zip(row, ends, strict=True)) for row in weight]
    assert bound.inside[0].high == max(max(partial), max(bound.result.high))
