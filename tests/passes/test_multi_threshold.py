"""multi-threshold: what linear layers read is told in signed powers of two; the mean over the steps is what expectations would give."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from family_cases import analog, model
from programs import CALIBRATION, CONTEXT, TOKENS, canonical, context
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

import ntc
from ntc.errors import ConfigError, PassError
from ntc.meta import TYPE
from ntc.ops import aten, expectation
from ntc.ops.mt_neuron import sum_oracle
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import CurrentType, SpikeType
from ntc.testing import check_pass, count_ops, example_ids
from ntc_passes.multi_threshold import MultiThreshold

NEURON, DECODE = torch.ops.ntc.mt_neuron.default, torch.ops.ntc.decode.default


@cache
def converted(name: str = "gpt2", **options: object) -> Program:
    source = canonical() if name == "gpt2" else analog(name)
    return run_pipeline(source, [MultiThreshold.configure(options)], CONTEXT)


def values_of(program: Program, ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        interpret(program, ids, lambda node, args, value: found.__setitem__(node.name, value))
    return found


def test_every_linear_layer_is_driven_by_neurons() -> None:
    after = check_pass(
        MultiThreshold(), canonical(), context=CONTEXT, ops_before={"linear": 13},
        # One population per value that is read: two norms, attention and the hidden layer of each block; the head's norm.
        ops_after={"linear": 13, "ntc.mt_neuron": 9, "ntc.decode": 13, "mul": 0}, sites=13, missed=[],
    )  # fmt: skip
    assert after.history[-1].notes == {"layers": 13, "populations": 9, "untied": {"transformer.wte.weight": ["lm_head.weight"]}}
    for layer in after.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert layer.args[0].meta[TYPE] == SpikeType(4, "rate", "graded") and layer.meta[TYPE] == CurrentType(4, "rate")
        original = canonical().find(layer.name)
        assert [a.target for a in layer.args[2:]] == [a.target for a in original.args[2:]], "rates take the bias as it is"
        theta = after.tensor(layer.args[0].args[1])
        torch.testing.assert_close(after.tensor(layer.args[1]), canonical().tensor(original.args[1]) * theta)
    q, k, v = (after.find(f"h_0_attn_c_attn_{part}") for part in "qkv")
    assert q.args[0] is k.args[0] is v.args[0] and q.args[0].name == "h_0_ln_1_spikes"


@pytest.mark.parametrize("scale", ["static", "channel"])
def test_thresholds_are_percentiles(scale: str) -> None:
    rows = torch.cat([values_of(canonical(), ids)["h_0_ln_1"].flatten(0, 1) for ids in CALIBRATION.batches]).abs()
    rows = rows if scale == "channel" else rows.reshape(-1, 1)  # all calibration tokens are few, so all are looked at
    for options, percentile, factor in (({}, 100.0, 64), ({"levels": 3, "percentile": 90.0}, 90.0, 4),
                                        ({"threshold": "smallest", "percentile": 99.0}, 99.0, 1)):  # fmt: skip
        theta = converted(scale=scale, **options).tensor("h_0_ln_1.threshold")
        torch.testing.assert_close(theta.detach(), rows.quantile(percentile / 100, 0) / factor)


@pytest.mark.parametrize("options", [{}, {"steps": 7, "levels": 4}, {"scale": "channel"}, {"threshold": "smallest", "percentile": 99.0}])
def test_a_layer_reads_what_the_closed_form_says(options: dict[str, object]) -> None:
    """All neurons in place: ``y = W n theta / T + c`` with n in closed form; and within the bound, where nothing is clipped."""
    program, ids, checked = converted(**options), CALIBRATION.batches[0], 0
    values = values_of(program, ids)
    for node in program.graph.find_nodes(op="call_function", target=DECODE):
        layer = node.args[0]
        _, theta, steps, levels, _ = layer.args[0].args
        x, theta = values[layer.args[0].args[0].name].double(), program.tensor(theta).detach().double()
        told = sum_oracle(x, theta, steps, levels)
        assert float((values[layer.args[0].name].sum(0) - told).ne(0).double().mean()) < 1e-3, "float64 and float32 part at ties only"
        original = canonical().find(layer.name)
        weight, *bias = (canonical().tensor(a).detach().double() for a in original.args[1:])
        expected = values[layer.args[0].name].sum(0).double() * theta / steps @ weight.T + sum(bias)
        torch.testing.assert_close(values[node.name].double(), expected, rtol=1e-4, atol=1e-5)
        exact, room = x @ weight.T + sum(bias), torch.maximum(x.abs(), theta) / steps
        room = room + (x.abs() - theta * 2 ** (levels - 1)).clamp(min=0)
        off, limit = (values[node.name] - exact).abs(), room @ weight.abs().T
        assert bool((off <= limit * (1 + 1e-5) + 1e-5).all()) and float(off.max()) > 1e-3 * float(limit.max()), node
        checked += 1
    assert checked == 13


def test_more_steps_are_nearer() -> None:
    ids = example_ids(length=12, seed=3)
    with torch.no_grad():
        expected = canonical()(ids)
        errors = [float((converted(steps=steps)(ids) - expected).norm() / expected.norm()) for steps in (4, 16, 64)]
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def in_time(node: Node, args: tuple, trains: dict[Node, Tensor], values: dict[Node, object]) -> Tensor:
    """A node of the program as the paper runs it: step by step, nonlinear functions by expectation compensation."""
    if node.target is aten.layer_norm.default:
        return expectation(trains[node.args[0]], "layer_norm", args[4], args[2], args[3])
    if node.target is aten.rms_norm.default:
        return expectation(trains[node.args[0]], "rms_norm", args[3], args[2])
    if node.target in (aten.gelu.default, aten.silu.default):
        return expectation(trains[node.args[0]], "silu" if node.target is aten.silu.default else "gelu_tanh", 0.0)

    def upto(t: int) -> Tensor:  # what ntc::expectation has no name for: the same formula
        means = map_arg(node.args, lambda n: trains[n][:t].mean(0) if n in trains else values[n])
        return t * node.target(*means, **node.kwargs)

    totals = torch.stack([upto(t) for t in range(1, 5)])
    return torch.cat([totals[:1], totals[1:] - totals[:-1]])


@pytest.mark.parametrize(("name", "functions"), [("gpt2", {"gelu", "layer_norm", "attention"}), ("llama", {"silu", "rms_norm", "attention", "mul"})])
def test_each_value_is_the_mean_of_what_expectation_compensation_tells(name: str, functions: set[str]) -> None:
    """The whole network in time, the neurons' trains held: its mean over the steps is this program, value by value, to the logits."""
    program, trains, seen, populations = converted(name), dict[Node, Tensor](), set[str](), 0
    values: dict[Node, object] = {n: program.tensor(n).detach() for n in program.graph.find_nodes(op="get_attr")}

    def visit(node: Node, args: tuple, value: object) -> None:
        nonlocal populations
        values[node] = value
        moving = [n for n in node.all_input_nodes if n in trains]
        if node.target is NEURON:
            torch.testing.assert_close(trains[node.args[0]].mean(0), args[0], rtol=1e-4, atol=1e-4)
            populations += 1
        elif node.target is aten.linear.default:
            trains[node] = value
        elif node.target is DECODE:
            trains[node] = trains[node.args[0]]
        elif node.target is aten.embedding.default:
            trains[node] = value.expand(4, *value.shape)  # the same at every step
        elif moving and isinstance(value, Tensor):
            trains[node] = in_time(node, args, trains, values)
            torch.testing.assert_close(trains[node].mean(0), value, rtol=1e-4, atol=1e-4)
            seen.add(str(node.target).split(".")[1])
            spread = trains[node].std(0).max()
            assert node.name in ("transformer_add", "layers_0_input_layernorm", "h_0_ln_1") or float(spread) > 1e-4, f"{node} stands still"

    with torch.no_grad():
        logits = interpret(program, example_ids(length=9, seed=2), visit)
    assert functions <= seen and populations == 9
    head = trains[program.find("lm_head_decoded")]
    torch.testing.assert_close(head.mean(0), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["static", "channel"])
def test_a_gain_makes_up_for_what_is_told_short(scale: str) -> None:
    """By least squares: no other factor of what is told of the calibration values is nearer to them."""
    rows = torch.cat([values_of(canonical(), ids)["h_0_ln_1"].flatten(0, 1) for ids in CALIBRATION.batches]).double()
    plain, fitted = converted(scale=scale), converted(scale=scale, gain=True)
    theta = fitted.tensor("h_0_ln_1.threshold").detach()
    assert torch.equal(theta, plain.tensor("h_0_ln_1.threshold"))
    short = sum_oracle(rows, theta, 4, 7) * theta.double() / 4
    layer = "h_0_attn_c_attn_q"
    matrices = [program.tensor(program.find(layer).args[1]).detach() for program in (plain, fitted)]
    gain = float((matrices[1] / matrices[0]).median())
    torch.testing.assert_close(matrices[1], matrices[0] * gain)
    assert 1.01 < gain < 1.2

    def error(factor: float) -> float:
        return float((rows - factor * short).square().sum())

    assert error(gain) < min(error(1.0), error(gain * 1.001), error(gain / 1.001))


def test_modules_may_be_left_analog_and_have_steps_of_their_own() -> None:
    given = context(**{"lm_head": {"convert": False}, "transformer.h.0.*": {"steps": 3}})
    after = check_pass(MultiThreshold(), canonical(), context=given, sites=12, missed=["left analog by the settings"])
    assert after.find("lm_head").args[0].name == "ln_f"
    assert {n.args[2] for n in after.graph.find_nodes(op="call_function", target=NEURON) if "h_0" in n.name} == {3}
    with pytest.raises(PassError, match="all 13 are left analog by the settings"):
        run_pipeline(canonical(), [MultiThreshold.configure({"convert": False})])


def test_thresholds_need_calibration_text() -> None:
    with pytest.raises(PassError, match="multi-threshold measures on calibration text: give --calibration FILE"):
        run_pipeline(canonical(), [MultiThreshold()])


def test_options() -> None:
    for options, sentence in (
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"levels": 8}, "levels must be at most 7: trains are recorded in 8 bits, got 8"),
        ({"threshold": "middle"}, "threshold must be 'largest' or 'smallest', got 'middle'"),
        ({"scale": "token"}, "scale must be 'static' or 'channel', got 'token'"),
        ({"percentile": 0}, "percentile"),
        ({"gain": 1}, "gain must be true or false, got 1"),
        ({"convert": 1}, "convert must be true or false, got 1"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            MultiThreshold.configure(options)


def test_the_recipe_ecmt(tmp_path: Path) -> None:
    found = ntc.compile(model("llama"), recipe="ecmt", calibration=CALIBRATION)
    ops = count_ops(found.program)
    assert ops["ntc.mt_neuron"] == 9 and ops["ntc.attention"] == 2 and ops["rms_norm"] == 5 and ops["linear"] == 15
    assert ntc.measure_energy(found.program, found.analog, TOKENS).uncounted() == []
    report = ntc.write(found, tmp_path / "made", emit=("onnx",), tokens=TOKENS.windows[:2])
    held = report["onnx"]["held"]  # the same events from the same input, up to ties: what differs more is an error
    assert held["spikes"] > 10_000 and held["spike_mismatches"] <= 3 * 9
    ids = example_ids(length=11)
    assert torch.equal(ntc.load(tmp_path / "made")(ids), found.program(ids))
