"""encode-linears: what linear layers read becomes ternary spikes; the value is off by half a step at most."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from family_cases import analog, model
from programs import CALIBRATION, CONTEXT, TOKENS, canonical, context
from test_fold_norms import tailed
from torch.nn import functional

import ntc
from ntc.errors import ConfigError, PassError
from ntc.meta import TYPE
from ntc.ops import aten
from ntc.pipeline import Context, run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import CurrentType, SpikeType
from ntc.testing import check_pass, count_ops, example_ids
from ntc_passes.encode_linears import EncodeLinears

ENCODE = torch.ops.ntc.encode.default


@cache
def encoded(name: str = "llama", **options) -> Program:
    return run_pipeline(canonical() if name == "gpt2" else analog(name), [EncodeLinears.configure(options)], CONTEXT)


def drift(program: Program, name: str = "llama") -> float:
    before = canonical() if name == "gpt2" else analog(name)
    ids = example_ids(length=12, seed=3)
    with torch.no_grad():
        expected, got = before(ids), program(ids)
    return float((got - expected).norm() / expected.norm())


def test_every_linear_layer_is_driven_by_spikes() -> None:
    after = check_pass(
        EncodeLinears(), analog("llama"), ops_before={"linear": 15},
        # One population per value that is read: two per block for the norms, one for attention, one for the gated product; the head's.
        ops_after={"linear": 15, "ntc.encode": 9, "ntc.token_step": 9, "ntc.decode": 15}, sites=15, missed=[],
    )  # fmt: skip
    assert after.history[-1].notes == {"layers": 15, "encoders": 9}
    for layer in after.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert layer.args[0].meta[TYPE] == SpikeType(5, "phase", "ternary") and layer.meta[TYPE] == CurrentType(5, "phase")
        assert len(layer.args) == 2, "no bias is added at every step"
    q, k, v = (after.find(f"layers_0_self_attn_{part}_proj") for part in "qkv")
    assert q.args[0] is k.args[0] is v.args[0]
    assert q.args[0].name == "layers_0_input_layernorm_spikes" and q.args[0].meta["ntc.module"] == "model.layers.0.input_layernorm"
    for name, weight in analog("llama").tensors.items():
        if name.endswith("proj.weight"):
            assert torch.equal(after.tensor(name), weight * 32), "the unit of five planes, a power of two"


@pytest.mark.parametrize("code", ["phase", "count"])
@pytest.mark.parametrize("scale", ["token", "channel", "static"])
def test_a_layer_is_off_by_half_a_step_per_weight(code: str, scale: str) -> None:
    """Every encoder in place, each given the analog program's own value: ``|y - W x - c| <= sum_c |W_c| d_c / 2``."""
    program = encoded("gpt2", code=code, scale=scale, steps=4)
    reference, values, steps = canonical(), {}, {}

    def keep(node, args, value):
        values[node.name] = value

    ids = CALIBRATION.batches[0]  # of these every value is in range
    with torch.no_grad():
        interpret(reference, ids, keep)
    checked = 0

    def visit(node, args, value):
        nonlocal checked
        if node.target is ENCODE:
            x = values[node.args[0].name.removesuffix("_shifted")] if node.args[0].name not in values else values[node.args[0].name]
            step = torch.ops.ntc.token_step.default(x, node.args[1].args[1]) if scale == "token" else args[1]
            steps[node.name] = step
            return torch.ops.ntc.encode.default(x, step, *args[2:])
        if node.target is torch.ops.ntc.decode.default:
            layer = reference.find(node.args[0].name)
            weight, bias = (reference.tensor(a).detach() if a is not None else 0.0 for a in (layer.args[1], layer.args[2] if len(layer.args) > 2 else None))
            d = steps[node.args[0].args[0].name]
            y = value * d if scale == "token" else value
            limit = (d / 2).expand(*ids.shape, weight.shape[1]) @ weight.abs().T
            off = (y + bias - values[layer.name]).abs()
            assert bool((off <= limit * (1 + 1e-5) + 1e-5).all()), node
            assert float(off.max()) > 1e-3 * float(limit.max()), "and not by nothing"
            checked += 1
        return None

    with torch.no_grad():
        interpret(program, ids, visit)
    assert checked == 13


def test_static_steps_are_folded_and_nothing_is_multiplied() -> None:
    for scale, size in (("static", 1), ("channel", 32)):
        program = encoded("gpt2", scale=scale, code="count", steps=7)
        ops = count_ops(program)
        assert not ops["ntc.token_step"] + ops["mul"]
        step = program.tensor("h_0_ln_1.step")
        assert step.shape == (size,)
        x = []
        with torch.no_grad():
            for ids in CALIBRATION.batches:
                interpret(canonical(), ids, lambda node, args, value, x=x: x.append(value.flatten(0, 1)) if node.name == "h_0_ln_1" else None)
        top = torch.cat(x).abs().amax(0) if size > 1 else torch.cat(x).abs().max()
        torch.testing.assert_close(step, (top / 7).expand(size), msg="all calibration tokens are few")
        name = "transformer.h.0.attn.c_attn.q.weight"
        torch.testing.assert_close(program.tensor(name), canonical().tensor(name) * step)


def test_more_steps_are_nearer_and_a_phase_code_needs_fewer() -> None:
    errors = [drift(encoded(steps=steps)) for steps in (3, 5, 8, 12)]
    assert all(finer < coarser / 2 for coarser, finer in pairwise(errors))
    assert errors[-1] < 1e-3
    assert drift(encoded(code="count", steps=31)) == pytest.approx(errors[1], rel=1e-4), "31 values either way, the same numbers"


def test_events_are_counted_and_nothing_is_multiplied_by_weights() -> None:
    program = encoded()
    report = ntc.measure_energy(program, analog("llama"), TOKENS)
    assert report.uncounted() == []
    attention = sum(row.counts.macs for row in _rows(program) if row.kind == "attention")
    macs, acs = (sum(getattr(row.counts, what) for row in _rows(program)) for what in ("macs", "acs"))
    assert macs == attention > 0, "the products of attention are the only ones left"
    ids, expected = TOKENS.windows[:2], 0.0

    def visit(node, args, value):
        nonlocal expected
        if node.target is aten.linear.default:
            expected += float(args[0].abs().sum()) * args[1].shape[0]

    with torch.no_grad():
        interpret(program, ids, visit)
    assert acs == expected


def _rows(program: Program):
    from ntc.observe import Activity

    activity = Activity()
    with torch.no_grad():
        activity.start(TOKENS.windows[:2])
        interpret(program, TOKENS.windows[:2], activity.visit)
    return activity.nodes.values()


def test_modules_may_be_left_analog() -> None:
    given = context(**{"lm_head": {"convert": False}, "model.layers.0.*": {"steps": 3}})
    after = check_pass(EncodeLinears(), analog("llama"), context=given, sites=14, missed=["left analog by the settings"])
    assert after.find("lm_head").args[0].name == "norm"
    assert {n.args[2] for n in after.graph.nodes if n.target is ENCODE and "layers_0" in n.name} == {3}
    with pytest.raises(PassError, match="all 15 are left analog by the settings"):
        run_pipeline(analog("llama"), [EncodeLinears.configure({"convert": False})])


def test_what_cannot_be_encoded_is_left_alone() -> None:
    def body(m, x):
        flat = functional.linear(x[:, 0], m.w)  # [B, C]: no tokens
        return functional.linear(x, m.w.exp()) + functional.linear(x, m.w) + flat.unsqueeze(1)

    reasons = ["is no [B, L, C] value", "its weight or bias, is computed and not a constant"]
    check_pass(EncodeLinears(), tailed(body, w=(16, 16)), sites=1, missed=reasons)
    again = EncodeLinears().run(encoded().copy(), Context())
    assert not again.modified and all("is spikes T=5 ternary phase already" in reason for _, reason in again.missed)


def test_static_steps_need_calibration_text() -> None:
    with pytest.raises(PassError, match="encode-linears measures on calibration text: give --calibration FILE"):
        run_pipeline(analog("llama"), [EncodeLinears.configure({"scale": "static"})])


def test_a_percentile_clips_and_a_ratio_scales() -> None:
    whole, clipped, half = (
        encoded("gpt2", scale="static", **options).tensor("h_0_ln_1.step") for options in ({}, {"percentile": 90.0}, {"ratio": 0.5})
    )
    assert clipped < whole and torch.equal(half, whole / 2)


def test_options() -> None:
    for options, sentence in (
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 17}, "the phase code has 1 to 16 time steps, got 17"),
        ({"code": "rate"}, "encoders have the codes 'count' and 'phase', got 'rate'"),
        ({"scale": "dynamic"}, "scale must be 'token', 'channel' or 'static', got 'dynamic'"),
        ({"ratio": 0}, "ratio must be a positive number, got 0"),
        ({"percentile": 101}, "percentile"),
        ({"convert": 1}, "convert must be true or false, got 1"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            EncodeLinears.configure(options)


def test_the_recipe_sdllm(tmp_path: Path) -> None:
    found = ntc.compile(model("llama"), recipe="sdllm")
    ops = count_ops(found.program)
    assert ops["ntc.encode"] == 9 and ops["ntc.attention"] == 2 and ops["rms_norm"] == 5 and ops["ntc.hadamard"] == 2
    report = ntc.write(found, tmp_path / "made", emit=("onnx",), tokens=TOKENS.windows[:2])
    held = report["onnx"]["held"]  # the same spikes from the same input, up to ties: what differs more is an error
    assert held["spikes"] > 10_000 and held["spike_mismatches"] <= 3 * 9
    ids = example_ids(length=11)
    assert torch.equal(ntc.load(tmp_path / "made")(ids), found.program(ids))
