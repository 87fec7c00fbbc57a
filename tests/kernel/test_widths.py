import pytest
import torch
from integer_programs import CHANNELS, CONTEXT, STEPS, VOCABULARY, Builder, block, integers, ntc, one_op, streaming
from programs import canonical

from ntc.errors import VerifyError
from ntc.ops import aten
from ntc.program import interpret
from ntc.streaming import Stream
from ntc.widths import bounds, widths


@pytest.mark.parametrize("options", [{}, {"leak": False}, {"neuron": False, "signed": False}, {"centre": False, "kv_heads": 1}])
def test_no_text_leaves_the_intervals(options):
    program = block(**options)
    proven = bounds(program)
    ids = torch.randint(0, VOCABULARY, (40, CONTEXT), generator=torch.Generator().manual_seed(0))
    seen = []

    def visit(node, args, value):
        if node in proven:
            flat = value.flatten(0, -2).double() * (16 if value.is_floating_point() else 1)
            low, high = (torch.tensor([float(n) for n in end]) for end in (proven[node].result.low, proven[node].result.high))
            assert bool((flat >= low).all()), node.name
            assert bool((flat <= high).all()), node.name
            seen.append(node)

    interpret(program, ids, visit)
    assert len(seen) == len(proven) > 20


def test_rows_say_what_every_register_needs():
    rows = {(row.node, row.what): row for row in widths(block())}
    membrane, memory = rows["ssa", "membrane"], rows["attention", "memory"]
    assert membrane.bits == 11
    assert membrane.low < 0 < membrane.high
    # growth 16 + 20 + 25 + 31 = 92, renewed by 100 / 256 five times: 92 + (92 + ...) 0.39; head 1: 77 and 160 / 256.
    peak = 77
    for _ in range(5):
        peak = (peak * 160 + 128 >> 8) + 77
    assert (memory.low, memory.high, memory.limit) == (-peak, peak, 2**31 - 1)
    assert rows["q", "result"].dtype == "int8"
    assert rows["q", "result"].op == "ntc.integer_fire"
    assert {what for node, what in rows if node == "attention"} == {"memory", "count", "memory times renewal", "result"}
    assert all(row.low <= row.high <= row.limit for row in rows.values())


@pytest.mark.parametrize("options", [{}, {"leak": False, "kv_heads": 1}])
def test_a_streaming_program_has_the_widths_of_the_parallel_one(options):
    """Whatever the cuts, and its state besides."""
    parallel, stream = block(**options), streaming(block(**options))

    def rows(program):
        return {(row.node.removesuffix("_stream"), row.what): (row.low, row.high, row.bits, row.dtype) for row in widths(program)}

    before, after = rows(parallel), rows(stream)
    memory = after.pop(("attention_memory_next", "result"))
    assert after == before
    assert memory == (*before["attention", "memory"][:3], "int32")
    ids = torch.randint(0, VOCABULARY, (20, CONTEXT), generator=torch.Generator().manual_seed(0))
    state = Stream(stream, 20)
    for start in range(0, CONTEXT, 5):
        state(ids[:, start : start + 5])
        memories = state.named()["attention_memory"]
        assert memory[0] <= int(memories.min()) < int(memories.max()) <= memory[1]


def test_bounds_are_per_channel():
    table = torch.tensor([[-3, 10], [5, 20]], dtype=torch.int32)
    program = one_op(lambda b, x: b.call(aten.add.Tensor, x, torch.tensor([[[1, 100]]], dtype=torch.int32), name="added"), table)
    found = bounds(program)[program.find("added")].result
    assert (list(found.low), list(found.high)) == ([-2, 110], [6, 120])


BIG = integers(-(2**30), 2**30, VOCABULARY, CHANNELS)
ONE = torch.ones(1, dtype=torch.int32)


@pytest.mark.parametrize(("make", "match"), [
    (lambda b, x: b.call(ntc.integer_linear.default, x, integers(-127, 127, 3, CHANNELS, dtype=torch.int8), None, name="wide"),
     r"accumulator of node %wide can be -\d{11}.*what it may be: use fewer bits for weights"),
    (lambda b, x: b.call(ntc.integer_norm.default, x, ONE, ONE, 1, 8, 18, -127, 127, True, name="wide"), r"sum of squares of node %wide|variance under the root"),
    (lambda b, x: b.call(ntc.decode.default, b.call(ntc.integer_fire.default, x, ONE, ONE, STEPS, True, False, name="wide"), "count"),
     "membrane of node %wide"),
    (lambda b, x: b.call(aten.add.Tensor, x, b.call(aten.add.Tensor, x, x), name="wide"), r"result of node %wide can be .*stored as torch.int32"),
    (lambda b, x: b.call(ntc.integer_lookup.default, x, integers(0, 9, 40, dtype=torch.int8), -20, name="wide"), r"index into the table of node %wide.* 0 \.\.\. 39"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, match):
    with pytest.raises(VerifyError, match=match):
        widths(one_op(make, BIG))


def attended(context, growth, renewal=None, shift=8):
    b = Builder(integers(-100, 100, VOCABULARY, CHANNELS), context)
    train = b.call(ntc.integer_fire.default, b.embedded, ONE * 10, ONE, STEPS, True, False)
    y = b.call(ntc.integer_attention.default, train, train, train, 2, 2, growth, renewal, shift, name="attention")
    value = b.call(ntc.requantize.default, b.call(ntc.decode.default, y, "count"), ONE, 8, -(2**20), 2**20)
    return b.program(b.call(ntc.from_integer.default, value, 0))


def test_the_memory_of_attention_needs_a_context_or_a_leak():
    ones = torch.ones(1, 1, dtype=torch.int32)
    rows = {row.what: row for row in widths(attended(24, ones)) if row.node == "attention"}
    assert (rows["memory"].low, rows["memory"].high) == (-24, 24)
    assert rows["count"].high == 24 * 4  # four rows of a head
    with pytest.raises(VerifyError, match=r"memory of node %attention.*state the model's context"):
        widths(attended(0, ones))
    leaking = {row.what: row for row in widths(attended(0, ones, ONE * 128)) if row.node == "attention"}
    assert leaking["memory"].high == 3  # M = round(M / 2) + 1 stays below 1.5 / 0.5
    with pytest.raises(VerifyError, match=r"memory of node %attention can be -.*: use fewer bits for growth"):
        widths(attended(24, torch.full((1, 1), 2**28, dtype=torch.int32), ONE * 250))


def test_logits_beyond_float32_are_refused():
    b = Builder(integers(-(2**25), 2**25, VOCABULARY, CHANNELS))
    with pytest.raises(VerifyError, match=r"integer in float32 of node %from_integer.*16777215.*clamp the logits"):
        widths(b.program(b.call(ntc.from_integer.default, b.embedded, 0)))


def test_a_program_in_floating_point_has_no_widths():
    with pytest.raises(VerifyError, match=r"run quantize on the program"):
        widths(canonical())
