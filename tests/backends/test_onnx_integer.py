"""ONNX Runtime gives the very integers of the program: every value of every node, not the logits alone."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_programs import CHANNELS, CONTEXT, STEPS, VOCABULARY, Builder, block, integers, ntc, one_op

from ntc.errors import BackendError
from ntc.program import interpret
from ntc.recording import populations
from ntc_backends.onnx_aten import by_torch
from ntc_backends.onnx_export import OnnxBackend, build
from ntc_backends.onnx_integer import SINGLE, WHOLE
from ntc_backends.onnx_integer_trains import follows, pack, unpack
from ntc_backends.onnx_run import Exposed
from ntc_backends.onnx_writer import Writer, save

ONE = torch.ones(1, dtype=torch.int32)


def run_all(program, ids, folder):
    """Values of every node in ONNX Runtime, by name; also the overloads of the functions that were chosen."""
    writer = Writer(program, by_torch)
    writer.run()
    model = writer.model()
    infos = {info.name: info for info in model.graph.value_info}
    names = {node.name: value for node, value in writer.values.items() if isinstance(value, str) and value in infos}
    wanted = list(dict.fromkeys(names.values()))
    model.graph.output.extend(infos[name] for name in wanted if name != "logits")
    save(model, writer.weights, Path(folder), 1 << 40)
    onnx.checker.check_model(str(Path(folder) / "model.onnx"), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"])
    results = ["logits", *wanted]
    got = dict(zip(results, map(torch.from_numpy, session.run(results, {"input_ids": ids.numpy()})), strict=True))
    return {"logits": got["logits"], **{name: got[value] for name, value in names.items()}}, {f"{f.name}.{f.overload}" for f in model.functions}


def check(program, folder, ids=None):
    """All values agree; returns what was chosen."""
    ids = program.example if ids is None else ids
    got, chosen = run_all(program, ids, folder)
    seen = []

    def visit(node, args, value):
        if node.name in got:
            assert got[node.name].dtype == value.dtype, node.name
            assert torch.equal(got[node.name], value), node.name
            seen.append(node.name)

    assert torch.equal(got["logits"], interpret(program, ids, visit))
    assert len(seen) >= len(got) - 1 > 0
    return chosen


@pytest.mark.parametrize("options", [
    {}, {"leak": False}, {"neuron": False, "signed": False}, {"centre": False, "kv_heads": 1}, {"leak": False, "signed": False, "kv_heads": 1},
])  # fmt: skip
def test_a_whole_block_is_the_same(options, tmp_path):
    program = block(**options)
    for length in (1, 3, 4, CONTEXT):
        ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        chosen = check(program, tmp_path, ids)
    signed = options.get("signed", True)
    words = "signed." if signed else ""
    # Of the feed-forward layer, where only counts are read: 8-bit products take what is not negative as it is.
    assert f"IntegerFire.{words}count.biased.{'int32' if signed else 'uint8'}" in chosen
    packed = options.get("leak", True)
    assert f"IntegerFire.{words}{'packed.biased.' if packed else ''}steps{STEPS}" in chosen
    assert any(c.startswith("IntegerAttention.renewal.packed") for c in chosen) == packed


def test_the_back_end_writes_checks_and_says_so(tmp_path):
    report = OnnxBackend().emit(block(), tmp_path)
    assert report["max_abs_logit_difference"] == 0
    assert "all logits at 18 positions identical" in report["summary"]
    model = onnx.load(tmp_path / "model.onnx")
    neurons = {n.name: n for n in model.graph.node if n.op_type == "IntegerFire"}
    assert sorted(neurons) == ["ffn", "k", "q", "ssa", "v"]
    facts = {a.name: onnx.helper.get_attribute_value(a) for a in neurons["q"].attribute}
    lie = {"kv_heads": [2], "groups": [1], "period": [4], "channels": [CHANNELS]}
    assert facts == {"steps": STEPS, "signed": 1, "timed": 0, "comparison": b">=", "reset": b"soft", **lie}


def test_a_file_that_differs_in_one_logit_is_refused(tmp_path, monkeypatch):
    from ntc_backends import onnx_integer_functions

    right = onnx_integer_functions.from_integer()
    monkeypatch.setattr(onnx_integer_functions, "from_integer", lambda: right.replace("y = Mul(values, unit)", "z = Mul(values, unit)  y = Add(z, unit)"))
    with pytest.raises(BackendError, match=r"computes with integers, so that nothing may differ: logits differ by up to 0\.0625"):
        OnnxBackend().emit(block(), tmp_path)
    assert not (tmp_path / "model.onnx").exists()


# ------------------------------------------------------------------------------------------------------- op by op, at extremes

BITS = st.sampled_from([6, 12, 20, 24])


@settings(max_examples=25)
@given(st.integers(0, 2**20), BITS, st.integers(0, 4), st.sampled_from([0, 1, 7]), st.booleans(), st.sampled_from([127, 2**15, 2**20]))
def test_norms(tmp_path_factory, seed, bits, guard, epsilon, centre, limit):
    table = integers(-(2**bits), 2**bits, VOCABULARY, CHANNELS, seed=seed)
    table[0], table[1, 0] = 2**bits, -(2**bits)
    gain, offset = integers(-(2**16), 2**16, CHANNELS, seed=seed), integers(-(2**22), 2**22, CHANNELS, seed=seed)
    ids = torch.arange(VOCABULARY)[None]

    def make(b, x):
        return b.call(ntc.integer_norm.default, x, gain, offset, epsilon, guard, 20, -limit, limit - 1, centre)

    check(one_op(make, table), tmp_path_factory.mktemp("norm"), ids)


@pytest.mark.parametrize(("bits", "word"), [(12, "float64.group8"), (23, "float64.group8"), (25, "float64.group8"), (26, "float64.group2"), (28, "int64")])
def test_norms_take_the_widest_arithmetic_only_where_they_need_it(bits, word, tmp_path):
    table = integers(-(2**bits), 2**bits, VOCABULARY, CHANNELS)
    program = one_op(lambda b, x: b.call(ntc.integer_norm.default, x, ONE * 9999, ONE, 1, 0, 20, -127, 127, True), table)
    assert f"IntegerNorm.centre.{word}.int8" in check(program, tmp_path, torch.arange(VOCABULARY)[None])


@settings(max_examples=25)
@given(st.integers(0, 2**20), st.sampled_from([4, 20, 31]), st.sampled_from([8, 20, 30]), st.integers(0, 61), st.sampled_from([0, 1, 4]))
def test_rescaling(tmp_path_factory, seed, bits, places, shift, period):
    """Both sides of 2**53, shifts from 0 to 61 (the product and its half stay below 2**62), one multiplier, one per channel, one row per position."""
    top = 2**bits - 1
    table = integers(-top, top, VOCABULARY, CHANNELS, seed=seed)
    table[0, 0], table[0, 1] = top, -top
    shape = {0: (1,), 1: (CHANNELS,), 4: (4, CHANNELS)}[period]
    multiplier = integers(-(2**places) + 1, 2**places - 1, *shape, seed=seed + 1)
    program = one_op(lambda b, x: b.call(ntc.requantize.default, x, multiplier, shift, -127, 127), table)
    check(program, tmp_path_factory.mktemp("requantize"), torch.arange(VOCABULARY)[None])


@pytest.mark.parametrize(("bits", "word"), [(20, "float64"), (31, "int64")])
def test_rescaling_in_int64_only_beyond_2_to_53(bits, word, tmp_path):
    table = integers(-(2**bits) + 1, 2**bits - 1, VOCABULARY, CHANNELS)
    program = one_op(lambda b, x: b.call(ntc.requantize.default, x, ONE * (2**30 - 1), 30, -(2**31), 2**31 - 1, name="x"), table)
    assert f"Requantize.{word}.int32" in check(program, tmp_path)


@pytest.mark.parametrize("period", [0, 4])
@pytest.mark.parametrize(("limit", "word"), [(2**20, ".raised"), (2**23, ".raised"), (2**31 - 1, "")])
def test_results_that_are_cast_to_be_rounded_down(limit, word, period, tmp_path):
    """Of both signs, far beyond both ends, and half way."""
    table = torch.cat([integers(-(2**25), 2**25, 9, CHANNELS), torch.arange(-16, 16).reshape(4, CHANNELS).to(torch.int32)])
    shape = (4, CHANNELS) if period else (CHANNELS,)
    program = one_op(lambda b, x: b.call(ntc.requantize.default, x, integers(1, 100, *shape) * 4, 4, -limit, limit, name="x"), table)
    assert f"Requantize.{'position.' if period else ''}float64.int32{word}" in check(program, tmp_path, torch.arange(VOCABULARY)[None])


@pytest.mark.parametrize(("x", "multiplier", "result", "word"), [
    (68_972_201, 1_052_895_847, 64, "int64"),  # x m = 129 2^49 - 1, a last place below a half: float64 would say 65
    (68_972_201, 1_052_895_849, 65, "float64"),
])  # fmt: skip
def test_results_of_few_bits_in_float64_beyond_2_to_53_where_each_step_is_the_same(x, multiplier, result, word, tmp_path):
    table = torch.full((VOCABULARY, CHANNELS), x, dtype=torch.int32)
    table[0] = 2**31 - 1
    program = one_op(lambda b, x: b.call(ntc.requantize.default, x, ONE * multiplier, 50, -127, 127, name="x"), table)
    assert f"Requantize.{word}.int8" in check(program, tmp_path)
    assert int(program(torch.ones(1, 1, dtype=torch.int64))[0, 0, 0]) == result


@pytest.mark.parametrize("low", [-128, -20, 0, 3])
def test_look_ups_from_any_low_end(low, tmp_path):
    table = torch.arange(low, low + 13, dtype=torch.int32).unsqueeze(1).expand(13, CHANNELS).contiguous()
    program = one_op(lambda b, x: b.call(ntc.integer_lookup.default, x, integers(-128, 127, 13, dtype=torch.int8), low), table)
    check(program, tmp_path, torch.arange(13)[None])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("theta", [3, 2**15 + 1, 2**23 - 1, 2**29])
def test_counts_on_both_sides_of_every_step(signed, steps, theta, tmp_path):
    """Currents around each level of the staircase; thresholds that float32 cannot tell apart take the neuron itself."""
    thresholds = torch.tensor([theta, max(theta - 1, 1), theta + 1, max(theta // 3, 1)], dtype=torch.int32)
    start = thresholds // 2
    level = torch.arange(-steps - 1, steps + 2).unsqueeze(1)
    reached = -torch.div(start - level * thresholds, steps, rounding_mode="floor")
    limit = (2**31 - 1 - 2**30) // steps  # the membrane has to fit
    table = torch.cat([reached - 1, reached, reached + 1]).clamp(-limit, limit).to(torch.int32)

    def make(b, x):
        return b.call(ntc.decode.default, b.call(ntc.integer_fire.default, x, thresholds, start, steps, signed, False), "count")

    chosen = check(one_op(make, table), tmp_path, torch.arange(len(table))[None])
    counted = any(c.startswith("IntegerFire") and "count" in c for c in chosen)
    assert counted or theta >= 2**23 - 1
    assert not counted or theta < 2**29


KINDS = [  # (range of x, of weights, dtype of the weights, what stands for the product)
    ((-127, 127), (-127, 127), torch.int8, "halves"), ((-63, 63), (-127, 127), torch.int8, "whole"), ((-127, 127), (-63, 63), torch.int8, "whole"),
    ((0, 255), (-127, 127), torch.int8, "halves"), ((0, 16), (-127, 127), torch.int8, "whole"), ((-4, 4), (-127, 127), torch.int8, "whole"),
    ((-128, 127), (-32767, 32767), torch.int16, "real"), ((-2000, 2000), (-127, 127), torch.int8, "real"),
]  # fmt: skip


@pytest.mark.parametrize(("x_range", "w_range", "dtype", "kind"), KINDS)
@pytest.mark.parametrize("channels", [1, 7, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_layers(x_range, w_range, dtype, kind, channels, biased, tmp_path):
    table = integers(*x_range, VOCABULARY, channels)
    table[0], table[1] = x_range[1], x_range[0]
    weight = integers(*w_range, 5, channels, dtype=dtype)
    weight[0], weight[1] = w_range[1], w_range[0]
    bias = integers(-(2**20), 2**20, 5) if biased else None
    narrow = x_range[0] >= -128 and x_range[1] <= 127

    def make(b, x):
        if narrow:  # int8, as activations are
            x = b.call(ntc.requantize.default, x, ONE, 0, *x_range)
        return b.call(ntc.integer_linear.default, x, weight, bias, name="linear")

    program = one_op(make, table)
    check(program, tmp_path, torch.arange(VOCABULARY)[None])
    model, _ = build(program)
    product = {n.op_type for n in model.graph.node if n.name.startswith("linear")}
    assert ("MatMul" in product) == (kind == "real")
    assert ("Div" in product) == (kind == "halves" and channels > 1)


def test_one_activation_is_made_unsigned_once_for_all_its_readers():
    b = Builder(integers(-9, 9, VOCABULARY, CHANNELS))
    x = b.call(ntc.requantize.default, b.embedded, ONE, 0, -9, 9)
    weight = integers(-127, 127, CHANNELS, CHANNELS, dtype=torch.int8)
    y = b.call(torch.ops.aten.add.Tensor, *(b.call(ntc.integer_linear.default, x, weight, None) for _ in range(2)))
    model, _ = build(b.program(b.call(ntc.from_integer.default, y, 0)))
    ops = [f"{n.op_type}.{n.overload}" for n in model.graph.node]
    assert [ops.count(n) for n in ("Requantize.float64.uint8", "MatMulInteger.", "Cast.", "Add.")] == [1, 2, 0, 1]


@settings(max_examples=20)
@given(
    st.integers(0, 2**20), st.sampled_from([1, 2, 8]), st.sampled_from([4, 14, 23]), st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.sampled_from([8, 30]), st.booleans(), st.booleans(), st.sampled_from([1, 8, 11]),
)  # fmt: skip
def test_attention(tmp_path_factory, seed, period, bits, heads, shift, decoded, leak, length):
    """Products in float32 and float64, renewals in float64 and int64, shared heads, with and without the sum over the steps."""
    period = period if leak else 1
    growth = integers(1, 2**bits, heads[1], period, seed=seed)
    renewal = integers(0, int(0.9 * 2**shift), heads[1], seed=seed + 1) if leak else None
    b = Builder(integers(-100, 100, VOCABULARY, CHANNELS, seed=seed))

    def train(n):
        x = b.call(ntc.integer_linear.default, b.embedded, integers(-9, 9, CHANNELS // 2 * n, CHANNELS, seed=seed + n, dtype=torch.int8), None)
        return b.call(ntc.integer_fire.default, x, ONE * 300, ONE * 100, 2, bool(seed % 2), False)

    y = b.call(ntc.integer_attention.default, train(heads[0]), train(heads[1]), train(heads[1]), *heads, growth, renewal, shift, name="attention")
    chain = [lambda v: b.call(ntc.requantize.default, v, ONE, 8, -(2**20), 2**20), lambda v: b.call(ntc.decode.default, v, "count")]
    for step in reversed(chain) if decoded else chain:
        y = step(y)
    program = b.program(b.call(ntc.from_integer.default, y, 0))
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    chosen = check(program, tmp_path_factory.mktemp("attention"), ids)
    assert decoded == any(c.startswith("IntegerAttention") and "decoded" in c for c in chosen)


def test_trains_are_those_of_the_neuron_for_every_current():
    """``follows`` against the kernel, currents one by one: where it says yes the float32 of the file is the neuron."""
    said = []
    for theta, start, bias, signed in ((1, 0, 0, True), (7, 3, -9, True), (12, 6, 100, False), (13, 7, 5, False), (13, 13, 0, False), (96, 48, 10**6, True)):
        of = torch.tensor([theta]), torch.tensor([start]), torch.tensor([bias])
        product = torch.arange(-2 * theta - bias, 2 * theta - bias + 1)[None, :, None].to(torch.int32)
        train = ntc.integer_fire(product + bias, *(x.to(torch.int32) for x in of[:2]), 5, signed, False)
        number = (product.float() * (1 / of[0].float()) + of[2].float() / of[0].float()).clamp(-1.0 if signed else 0.0, 1.0)
        counts = [((start + 0.5) / torch.tensor(float(theta)) - 0.5 + number)]
        for _ in range(4):
            counts.append(counts[-1] + number)
        same = torch.equal(torch.stack([c.round() for c in counts]), train.cumsum(0).float())
        said.append(follows(*of, 5, signed))
        assert same or not said[-1]
    assert said == [True, True, True, True, False, True]  # a neuron that starts at its threshold would fire once too often
    far = torch.tensor([2**29])
    assert not follows(far, far // 2, None, 4, False)  # float32 cannot tell its levels apart


@pytest.mark.parametrize(("groups", "length"), [(1, 8), (2, 5), (3, 1)])
def test_trains_are_packed_and_unpacked(groups, length):
    train = integers(-1, 1, 3, 2, length, 2 * groups * 5, dtype=torch.int8)
    packed = pack(train, 2, groups, 4)
    assert packed.shape == (-(-length // 4), 2, 2, 3, groups, 4, 5) and packed.dtype == torch.float32
    assert torch.equal(unpack(packed, length), train.float())
    assert float(packed[0, 1, 1, 2, groups - 1, 0, 3]) == int(train[2, 1, 0, (2 * groups - 1) * 5 + 3])


@pytest.mark.parametrize(("bits", "shift", "packed"), [(12, 8, True), (23, 8, False), (6, 14, True), (12, 20, False)])
def test_attention_is_packed_where_counts_and_renewals_stay_below_2_to_24(bits, shift, packed, tmp_path):
    """Every spike meets every other, so that the largest numbers are reached; lengths that do not fill a period."""
    growth, renewal = torch.full((1, 4), 2**bits // 4, dtype=torch.int32), torch.tensor([int(0.7 * 2**shift)], dtype=torch.int32)
    b = Builder(torch.full((VOCABULARY, CHANNELS), 999, dtype=torch.int32))
    q, k, v = (b.call(ntc.integer_fire.default, b.embedded, ONE * 999, ONE * 9, 2, False, False, name=name) for name in "qkv")
    y = b.call(ntc.integer_attention.default, q, k, v, 2, 2, growth, renewal, shift, name="attention")
    y = b.call(ntc.requantize.default, b.call(ntc.decode.default, y, "count"), ONE, 8, -(2**20), 2**20)
    program = b.program(b.call(ntc.from_integer.default, y, 0))
    chosen = check(program, tmp_path, torch.zeros(2, 23, dtype=torch.int64))
    assert ("IntegerAttention.renewal.packed.decoded.float32" in chosen) == packed
    save(*build(program), tmp_path, 1 << 40)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    for cut in (False, True):
        model = Exposed(tmp_path / "model.onnx", populations(program), cut=cut)
        trains = {name: integers(0, 1, 2, 2, 7, CHANNELS, seed=i, dtype=torch.int8) for i, name in enumerate("qkv")}
        logits, fired = model.run(ids, trains if cut else None)
        given = trains if cut else fired
        again = ntc.integer_attention(*given.values(), 2, 2, growth, renewal, shift).sum(0, dtype=torch.int32)
        assert torch.equal(logits, ntc.requantize(again, ONE, 8, -(2**20), 2**20).float())
        assert all(f.dtype == torch.int8 and bool((f == 1).all()) for f in fired.values())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("multipliers", [1, 23])
def test_a_wide_head_is_written_in_blocks(multipliers, biased, tmp_path, monkeypatch):
    """The last block is shorter than the others."""
    monkeypatch.setattr("ntc_backends.onnx_integer.BLOCK", 7)
    b = Builder(integers(-60, 60, VOCABULARY, CHANNELS))
    weight, bias = integers(-127, 127, 23, CHANNELS, dtype=torch.int8), integers(-999, 999, 23) if biased else None
    x = b.call(ntc.integer_linear.default, b.embedded, weight, bias)
    x = b.call(ntc.requantize.default, x, integers(2**20, 2**21, multipliers), 22, -2000, 2000)
    program = b.program(b.call(ntc.from_integer.default, x, -3))
    check(program, tmp_path)
    model, _ = build(program)
    assert [n.op_type for n in model.graph.node].count("MatMulInteger") == 4


@pytest.mark.parametrize(("most", "one"), [(9, True), (999, False)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_head_whose_sums_are_logits_is_one_product(most, one, biased, tmp_path):
    """Sums times multipliers below 2^24 are exact in float32; beyond they are rescaled in float64."""
    b = Builder(integers(-60, 60, VOCABULARY, CHANNELS))
    weight, bias = integers(-127, 127, 23, CHANNELS, dtype=torch.int8), integers(-(2**16), 2**16, 23) if biased else None
    x = b.call(ntc.integer_linear.default, b.embedded, weight, bias)
    x = b.call(ntc.requantize.default, x, integers(1, most, 23) if one else ONE * 2**10, 0, 1 - 2**24, 2**24 - 1)
    program = b.program(b.call(ntc.from_integer.default, x, -13))
    chosen = check(program, tmp_path, torch.arange(VOCABULARY)[None])
    assert (f"Requantize.float32{'.biased' if biased else ''}.logits" in chosen) == one
    assert ("FromInteger." in chosen) != one


@pytest.mark.parametrize(("shift", "limit", "word"), [
    (0, 2**24 - 1, "float32.biased"), (5, 2**22, "float32.rounded.biased"), (3, 999, "float32.rounded.clipped.biased"),
    (0, 2**17, "float32.clipped.biased"),
])  # fmt: skip
@pytest.mark.parametrize("stream", [2**12, 2**20 + 5])
def test_sums_on_the_stream_in_float32(shift, limit, word, stream, tmp_path):
    """Of both signs, half way too; a stream beyond 2^24 is int32 as the program's."""
    table = integers(-60, 60, VOCABULARY, CHANNELS)
    table[:2] = 60 * (1 - 2 * torch.arange(2, dtype=torch.int32))[:, None]
    b = Builder(table)
    weight, bias = integers(-127, 127, CHANNELS, CHANNELS, dtype=torch.int8), integers(-(2**16), 2**16, CHANNELS)
    linear = b.call(ntc.integer_linear.default, b.embedded, weight, bias)
    x = b.call(ntc.requantize.default, linear, integers(1, 15, CHANNELS), shift, -limit, limit)
    far = b.call(ntc.requantize.default, b.embedded, ONE * stream, 0, -(2**31), 2**31 - 1)
    y = b.call(torch.ops.aten.add.Tensor, b.call(torch.ops.aten.add.Tensor, b.embedded, x), far)
    y = b.call(ntc.integer_norm.default, y, ONE * 2**10, ONE, 1, 0, 20, -127, 127, True)
    chosen = check(b.program(b.call(ntc.from_integer.default, y, 0)), tmp_path, torch.arange(VOCABULARY)[None])
    assert f"Requantize.{word}" in chosen


def test_the_limits_are_those_of_the_formats():
    for limit, dtype in ((SINGLE, torch.float32), (WHOLE, torch.float64)):
        assert int(torch.tensor(limit - 1, dtype=dtype)) == limit - 1
        assert int(torch.tensor(limit + 1, dtype=dtype)) != limit + 1
