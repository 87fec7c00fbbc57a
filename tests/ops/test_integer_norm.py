import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Constant, infer

from ntc.ops import Interval, TypeMismatch, integer_norm
from ntc.ops.integer_norm import INTEGER_NORM, most_normal
from ntc.spike_type import ANALOG, INTEGER, SpikeType

OP = torch.ops.ntc.integer_norm.default


def oracle(x, gain, offset, epsilon, guard, shift, low, high, centre):
    """The equations in Python integers; also n."""
    c = len(x)
    m = (sum(x) + c // 2) // c if centre else 0
    d = [v - m for v in x]
    v = sum(e * e for e in d) // c + epsilon
    r = max(math.isqrt(v << 2 * guard), 1)
    n = [((e << guard + 16) + r // 2) // r for e in d]
    half = (1 << shift) >> 1
    return [min(max((a * g + o + half) >> shift, low), high) for a, g, o in zip(n, gain, offset, strict=True)], n


def run(x, gain, offset, *rest):
    return integer_norm(torch.tensor([[x]], dtype=torch.int32), torch.tensor(gain), torch.tensor(offset), *rest)[0, 0].tolist()


CASES = st.integers(1, 9).flatmap(
    lambda c: st.tuples(*(st.lists(st.integers(-b, b), min_size=c, max_size=c) for b in (2**20, 2**24, 2**28)))
)


@given(CASES, st.integers(0, 9), st.integers(0, 8), st.integers(0, 40), st.booleans())
def test_is_its_definition(case, epsilon, guard, shift, centre):
    x, gain, offset = case
    rest = (epsilon, guard, shift, -127, 127, centre)
    expected, n = oracle(x, gain, offset, *rest)
    assert run(x, gain, offset, *rest) == expected
    assert max(map(abs, n)) <= most_normal(len(x), epsilon, guard)


@given(st.lists(st.integers(-(2**12), 2**12), min_size=16, max_size=16).filter(lambda x: len(set(x)) > 4), st.booleans())
def test_is_a_norm(x, centre):
    """Against real arithmetic: the mean and the root are rounded, nothing else."""
    scale, shift = 0.02, 20
    got = torch.tensor(run(x, [round(2 ** (shift - 16) / scale)] * 16, [0] * 16, 1, 8, shift, -127, 127, centre)) * scale
    real = torch.tensor(x, dtype=torch.float64)
    d = real - real.mean() if centre else real
    root = (d.square().mean() + 1).sqrt()
    expected = (d / root).clamp(-127 * scale, 127 * scale)
    # Half a step of the result, half a unit of the mean, and what gain and variance lose.
    assert float((got - expected).abs().max()) <= scale / 2 + 0.5 / float(root) + 127 * scale * (scale * 2 + 1 / float(root) ** 2)


@pytest.mark.parametrize("value", [0, 5, -5, 2**20, -(2**20)])
def test_a_constant_token_gives_the_offset(value):
    assert run([value] * 4, [1000] * 4, [0, 1 << 20, -(1 << 20), 1 << 19], 1, 8, 20, -127, 127, True) == [0, 1, -1, 1]


@pytest.mark.parametrize(("low", "high", "dtype"), [(-127, 127, torch.int8), (0, 255, torch.int16), (-(2**15), 2**15, torch.int32)])
def test_the_type_follows_the_range_and_the_range_clamps(low, high, dtype):
    x = torch.tensor([[[-30, 10, 20]]], dtype=torch.int32)
    gain, zero = torch.full((3,), 2**28), torch.zeros(1, dtype=torch.int32)
    y = integer_norm(x, gain, zero, 1, 4, 16, low, high, True)
    assert y.dtype == dtype
    assert (int(y.min()), int(y.max())) == (low, high)


def test_opcheck_and_refusals():
    x, one = torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    torch.library.opcheck(integer_norm, (x, torch.ones(4, dtype=torch.int32), one, 1, 8, 18, -127, 127, True))
    for wrong, match in (
        ((x.float(), one, one, 1, 8, 18, 0, 1), "x holds integers"), ((x, torch.ones(3).int(), one, 1, 8, 18, 0, 1), r"gain.*\[1\] or \[4\]"),
        ((x, one, one[0], 1, 8, 18, 0, 1), r"offset.*\[\]"), ((x, one, one, -1, 8, 18, 0, 1), "epsilon"), ((x, one, one, 1, 32, 18, 0, 1), "guard"),
        ((x, one, one, 1, 8, 63, 0, 1), "shift"), ((x, one, one, 1, 8, 18, 1, 0), "range"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            integer_norm(*wrong, True)


def test_types():
    rest = (1, 8, 18, -127, 127, True)
    whole, wide, real = Constant((8,), torch.int32), Constant((8,), torch.int64), Constant((8,))
    assert infer(OP, INTEGER, whole, wide, *rest) == INTEGER
    for kind in (ANALOG, SpikeType(4, "count")):
        with pytest.raises(TypeMismatch, match="takes integers, and %x0"):
            infer(OP, kind, whole, whole, *rest)
    for gain, offset, culprit in ((real, whole, "c1"), (whole, real, "c2")):
        with pytest.raises(TypeMismatch, match=f"integer constants, and %{culprit}"):
            infer(OP, INTEGER, gain, offset, *rest)


@given(st.data(), st.integers(0, 2), st.booleans())
def test_the_bound_holds(data, epsilon, centre):
    c = data.draw(st.integers(1, 5))
    ends = [sorted(data.draw(st.tuples(st.integers(-999, 999), st.integers(-999, 999)))) for _ in range(c)]
    x = [data.draw(st.integers(*e)) for e in ends]
    gain, offset = (data.draw(st.lists(st.integers(-b, b), min_size=c, max_size=c)) for b in (2**12, 2**20))
    rest = (epsilon, 8, 18, -127, 127, centre)
    interval = Interval.of(*ends[0]) if c == 1 else Interval(*(torch.tensor(e).numpy().astype(object) for e in zip(*ends, strict=True)))
    bound = INTEGER_NORM.bound(None, 0, interval, torch.tensor(gain), torch.tensor(offset), *rest)
    got = oracle(x, gain, offset, *rest)[0]
    assert all(low <= y <= high for low, y, high in zip(bound.result.low, got, bound.result.high, strict=True))
