import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import CURRENT, SPIKES, infer

from ntc.ops import TypeMismatch, decode, from_integer
from ntc.ops.integer import as_int32, check_range, dtype_of_range, exact_matmul, isqrt, largest, round_divide, round_shift
from ntc.ops.interval import Interval, bits_of
from ntc.spike_type import ANALOG, INDEX, INTEGER, SpikeType, from_json, to_json, type_of_tensor

EDGE = st.integers(0, 61).flatmap(lambda k: st.integers(-2, 2).map(lambda d: (1 << k) + d))
WIDE = st.one_of(EDGE, EDGE.map(lambda n: -n), st.integers(-(2**62), 2**62))


@given(WIDE, st.integers(0, 61))
def test_a_rounding_shift_rounds_halves_up(a, shift):
    expected = math.floor(a / 1 + 0) if shift == 0 else (a + 2 ** (shift - 1)) // 2**shift
    assert int(round_shift(torch.tensor(a), shift)) == (a if shift == 0 else expected)


@given(st.integers(-(2**61), 2**61), st.integers(1, 2**31))
def test_a_rounding_division_is_the_one_of_its_definition(a, b):
    expected = (a + b // 2) // b
    assert int(round_divide(torch.tensor(a), torch.tensor(b))) == expected
    assert int(round_divide(torch.tensor(a), b)) == expected


@given(st.one_of(st.integers(0, 2**62 - 1), st.integers(0, 2**31 - 1).flatmap(lambda r: st.integers(-1, 1).map(lambda d: max(r * r + d, 0)))))
def test_the_root_is_the_integer_below(n):
    assert int(isqrt(torch.tensor(n))) == math.isqrt(n)


def test_the_root_of_the_largest_squares():
    roots = torch.arange(2**31 - 40_000, 2**31 - 1)
    for d in (-1, 0, 1):
        assert torch.equal(isqrt(roots * roots + d), roots - int(d < 0))


@given(st.data(), st.sampled_from([7, 11, 20, 25]))
def test_products_are_exact_in_either_precision(data, bits):
    """2**24 and more goes through float64; the sums are taken at their largest."""
    values = st.lists(st.integers(-(2**bits), 2**bits), min_size=6, max_size=6)
    a, b = data.draw(values), data.draw(values)
    bound = sum(abs(x * y) for x, y in zip(a, b, strict=True))
    got = exact_matmul(torch.tensor([a]), torch.tensor(b).unsqueeze(1), bound)
    assert int(got) == sum(x * y for x, y in zip(a, b, strict=True))


def test_products_do_not_trust_a_lowered_precision():
    a, b = torch.tensor([[4097, 1]]), torch.tensor([[4095], [1]])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert int(exact_matmul(a, b, 4097 * 4095 + 1)) == 4097 * 4095 + 1
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(ValueError, match=r"2\*\*53"):
        exact_matmul(a, b, 1 << 53)


def test_ranges_and_their_types():
    assert [dtype_of_range(*r) for r in ((-128, 127), (0, 128), (-32768, 0), (0, 32768))] == [torch.int8, torch.int16, torch.int16, torch.int32]
    for wrong in ((3, 2), (-(2**31) - 1, 0), (0, 2**31)):
        with pytest.raises(ValueError, match="no range that int32 holds"):
            check_range(*wrong)
    assert largest(torch.tensor([-128, 5], dtype=torch.int8)) == 128
    assert largest(torch.zeros(0)) == 0
    with pytest.raises(ValueError, match="does not fit into int32"):
        as_int32(torch.tensor([2**31]), "x")


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_bits(low, size):
    high = low + size
    bits = bits_of(low, high)
    fits = (lambda b: low >= 0 and high < 2**b) if low >= 0 else (lambda b: -(2 ** (b - 1)) <= low and high < 2 ** (b - 1))
    assert fits(bits)
    assert bits == 1 or not fits(bits - 1)


@given(st.data())
def test_intervals_hold_what_they_bound(data):
    number = st.integers(-50, 50)
    (a, b), (c, d) = (sorted(data.draw(st.tuples(number, number))) for _ in range(2))
    x, y = data.draw(st.integers(a, b)), data.draw(st.integers(c, d))
    shift = data.draw(st.integers(0, 5))
    one, two = Interval.of(a, b), Interval.of(c, d)
    for interval, value in (
        (one + two, x + y), (one - two, x - y), (one * two, x * y), (one | two, x), (one | two, y), (one.clamp(-9, 20), min(max(x, -9), 20)),
        (one.round_shift(shift), (x + (1 << shift >> 1)) >> shift),
    ):  # fmt: skip
        low, high = interval.ends
        assert low <= value <= high
    assert one.ends == (a, b)
    assert one.magnitude == max(abs(a), abs(b))


# ------------------------------------------------------------------------------------------------------------------- types


def test_fixed_point_numbers_have_a_type_of_their_own():
    kinds = {torch.float32: ANALOG, torch.int8: INTEGER, torch.int16: INTEGER, torch.int32: INTEGER, torch.int64: INDEX, torch.bool: INDEX}
    for dtype, kind in kinds.items():
        assert type_of_tensor(torch.zeros(2, dtype=dtype)) == kind
    assert type_of_tensor(None) == INDEX
    assert from_json(to_json(INTEGER)) == INTEGER
    assert str(INTEGER) == "integer"


# ------------------------------------------------------------------------------------------------- decode and from_integer


@given(st.lists(st.integers(-(2**27), 2**27), min_size=1, max_size=8))
def test_an_integer_train_decodes_to_its_sum(train):
    got = decode(torch.tensor(train, dtype=torch.int32).view(-1, 1, 1), "count")
    assert got.dtype == torch.int32
    assert int(got) == sum(train)


def test_spikes_add_up_beyond_int8():
    spikes = torch.full((300, 1, 2), -1, dtype=torch.int8)
    assert decode(spikes, "count").tolist() == [[-300, -300]]
    torch.library.opcheck(decode, (spikes, "count"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("code", ["rate", "phase"])
def test_an_integer_train_has_no_mean(code):
    with pytest.raises(ValueError, match=f"decode by count.*not by {code}"):
        decode(torch.ones(2, 1, 2, dtype=torch.int8), code)


@given(st.integers(-(2**24) + 1, 2**24 - 1), st.integers(-126, 103))
def test_from_integer_is_exact(n, exponent):
    got = from_integer(torch.tensor([[n]], dtype=torch.int32), exponent)
    assert got.dtype == torch.float32
    assert float(got) == math.ldexp(n, exponent)


@pytest.mark.parametrize("exponent", [-127, 104])
def test_a_power_of_two_that_float32_does_not_have_is_refused(exponent):
    with pytest.raises(ValueError, match=f"not for {exponent}"):
        from_integer(torch.ones(1, 1, dtype=torch.int32), exponent)


def test_from_integer_takes_integers():
    op = torch.ops.ntc.from_integer.default
    assert infer(op, INTEGER, -3) == ANALOG
    for kind in (ANALOG, INDEX, SPIKES, CURRENT, SpikeType(4, "count")):
        with pytest.raises(TypeMismatch, match="takes integers, and %x0"):
            infer(op, kind, -3)
    with pytest.raises(ValueError, match="x holds integers"):
        from_integer(torch.ones(1, 1), 0)
    torch.library.opcheck(from_integer, (torch.ones(2, 3, 4, dtype=torch.int32), -3))
