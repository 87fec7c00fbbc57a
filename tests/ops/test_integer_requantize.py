import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Constant, infer

from ntc.ops import Interval, TypeMismatch, integer_lookup, requantize
from ntc.ops.integer_lookup import INTEGER_LOOKUP
from ntc.ops.requantize import REQUANTIZE
from ntc.spike_type import ANALOG, INTEGER, CurrentType, SpikeType

OP, LOOKUP = torch.ops.ntc.requantize.default, torch.ops.ntc.integer_lookup.default
INT32 = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]))


def oracle(x, m, shift, low, high):
    return min(max((x * m + (1 << shift >> 1)) >> shift, low), high)


@given(st.lists(INT32, min_size=3, max_size=3), st.lists(INT32, min_size=3, max_size=3), st.integers(0, 62), st.sampled_from([(-128, 127), (-(2**31), 2**31 - 1)]))
def test_is_its_definition(x, m, shift, ends):
    got = requantize(torch.tensor([[x]], dtype=torch.int32), torch.tensor(m, dtype=torch.int32), shift, *ends)
    assert got.dtype == (torch.int8 if ends[1] == 127 else torch.int32)
    assert got[0, 0].tolist() == [oracle(a, b, shift, *ends) for a, b in zip(x, m, strict=True)]


@given(st.integers(-1000, 1000), st.integers(0, 10))
def test_halves_go_up(n, shift):
    x = n * 2**shift + (1 << shift >> 1)
    assert int(requantize(torch.tensor([[[x]]]), torch.ones(1).int(), shift, -(2**20), 2**20)) == n + (shift > 0)


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("timed", [False, True])
def test_one_row_of_multipliers_for_each_position_in_the_period(period, timed):
    x = torch.randint(-999, 999, (*((3,) if timed else ()), 2, 7, 4), dtype=torch.int32)
    table = torch.randint(1, 99, (period, 4), dtype=torch.int32)
    got = requantize(x, table, 3, -128, 127)
    for i in range(7):
        assert torch.equal(got[..., i, :], requantize(x[..., i : i + 1, :], table[i % period], 3, -128, 127)[..., 0, :])


def test_opcheck_and_refusals():
    x, one = torch.ones(2, 3, 4, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    for m in (one, torch.ones(4).int(), torch.ones(2, 4).int()):
        torch.library.opcheck(requantize, (x, m, 3, -128, 127))
    for wrong, match in (
        ((x.float(), one, 3, 0, 1), "x holds"), ((x, one.float(), 3, 0, 1), "multiplier holds"), ((x, torch.ones(3).int(), 3, 0, 1), r"\[1\], \[4\] or \[R, 4\]"),
        ((x, torch.ones(2, 1).int(), 3, 0, 1), r"\[2, 1\]"), ((x, one, -1, 0, 1), "shift"), ((x, one, 63, 0, 1), "shift"), ((x, one, 3, 1, 0), "range"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            requantize(*wrong)


def test_types():
    m = Constant((8,), torch.int32)
    for kind in (INTEGER, CurrentType(4, "count")):
        assert infer(OP, kind, m, 3, -128, 127) == kind
    for kind in (ANALOG, SpikeType(4, "count"), CurrentType(4, "rate")):
        with pytest.raises(TypeMismatch, match="integers or count-coded currents of integers, and %x0"):
            infer(OP, kind, m, 3, -128, 127)
    with pytest.raises(TypeMismatch, match=r"%c1 is torch\.float32"):
        infer(OP, INTEGER, Constant((8,)), 3, -128, 127)


@given(st.data(), st.integers(0, 8))
def test_the_bound_is_reached(data, shift):
    a, b = sorted(data.draw(st.tuples(st.integers(-999, 999), st.integers(-999, 999))))
    m = data.draw(st.lists(st.integers(-99, 99), min_size=2, max_size=2))
    bound = REQUANTIZE.bound(None, 0, Interval.of(a, b), torch.tensor(m).view(2, 1), shift, -500, 500)
    values = [oracle(x, f, shift, -500, 500) for x in (a, b) for f in m]
    assert bound.result.ends == (min(values), max(values))


# ----------------------------------------------------------------------------------------------------------------- look-up


@given(st.data(), st.integers(-300, 300))
def test_each_value_finds_its_entry(data, low):
    table = data.draw(st.lists(st.integers(-128, 127), min_size=1, max_size=20))
    index = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=4, max_size=4))
    got = integer_lookup(torch.tensor([[[low + i for i in index]]], dtype=torch.int32), torch.tensor(table, dtype=torch.int8), low)
    assert got.dtype == torch.int8
    assert got[0, 0].tolist() == [table[i] for i in index]


@pytest.mark.parametrize("x", [-3, 2])
def test_what_is_not_in_the_table_is_refused(x):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        integer_lookup(torch.tensor([[[x]]], dtype=torch.int8), torch.arange(4), -2)


def test_opcheck_refusals_and_types_of_the_lookup():
    x, table = torch.zeros(2, 3, 4, dtype=torch.int8), torch.arange(5, dtype=torch.int16)
    torch.library.opcheck(integer_lookup, (x, table, 0))
    for wrong in ((x.float(), table), (x, table.float()), (x, table[None]), (x, table[:0])):
        with pytest.raises(ValueError, match=r"holds integers|one axis"):
            integer_lookup(*wrong, 0)
    assert infer(LOOKUP, INTEGER, Constant((5,), torch.int8), 0) == INTEGER
    with pytest.raises(TypeMismatch, match="takes integers, and %x0"):
        infer(LOOKUP, ANALOG, Constant((5,), torch.int8), 0)


def test_the_bound_is_over_the_entries_in_reach():
    table = torch.tensor([9, -4, 3, 7, 50])
    interval = Interval(*(torch.tensor(e).numpy().astype(object) for e in ([-1, 0], [1, 0])))
    bound = INTEGER_LOOKUP.bound(None, 0, interval, table, -2)
    assert (list(bound.result.low), list(bound.result.high)) == ([-4, 3], [7, 3])
    assert (bound.inside[0].low, bound.inside[0].high, bound.inside[0].most) == (1, 3, 4)
