"""``convert = false``: modules that the policy passes leave as they are, and programs that are converted in two goes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from programs import CALIBRATION, CONTEXT, calibrated, canonical, context
from torch.fx import Node

from ntc.check import check_model
from ntc.errors import ConfigError, PassError
from ntc.pipeline import Context, Override, Pass, run_pipeline
from ntc.program import Program, interpret
from ntc.recipe import Settings
from ntc.testing import check_pass, count_ops, tiny_gpt2
from ntc_passes.calibrate import Calibrate
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention

LEFT = "left analog by the settings"
FIRST_ONLY = context(**{"transformer.h.1.*": {"convert": False}})
ALL_LEFT = context(**{"*": {"convert": False}})
ATTENTION, ACTIVATION = torch.ops.ntc.attention.default, torch.ops.aten.gelu.default


def passes() -> list[Pass]:
    return [Calibrate(), ReplaceAttention(), ConvertFfn(), FoldThresholds(), InsertNeurons()]


@cache
def first_block_spiking() -> Program:
    return run_pipeline(canonical(), passes(), FIRST_ONLY)


def values(program: Program, targets: tuple[Any, ...]) -> list[torch.Tensor]:
    """Results of the nodes of these ops on the example, in order."""
    found: list[torch.Tensor] = []

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target in targets:
            found.append(value)

    with torch.no_grad():
        interpret(program, program.example, visit)
    return found


@pytest.mark.parametrize(("step", "before", "after"), [
    (ReplaceAttention(), {"ntc.attention": 2}, {"ntc.attention": 1, "ntc.spiking_attention": 1, "ntc.if_rate": 4}),
    (ConvertFfn(), {"gelu": 2}, {"gelu": 1, "ntc.if_rate": 1}),
])  # fmt: skip
def test_a_module_is_left_alone_and_listed_with_the_reason(step: Pass, before: dict[str, int], after: dict[str, int]) -> None:
    left = check_pass(step, calibrated(), context=FIRST_ONLY, ops_before=before, ops_after=after, sites=1, missed=[LEFT])
    ((name, _),) = left.history[-1].missed
    assert name.startswith("h_1")
    whole = run_pipeline(calibrated(), [step], CONTEXT)
    made = {name for name in whole.tensors if name not in calibrated().tensors}
    assert {name for name in made if name in left.tensors} == {name for name in made if ".h.0." in name}
    # What the first block becomes does not depend on the second, which stands behind it.
    assert all(torch.equal(left.tensors[name], whole.tensors[name]) for name in whole.tensors if ".h.0." in name)
    assert all(torch.equal(left.tensors[name], calibrated().tensors[name]) for name in left.tensors if ".h.1." in name)


def test_attention_and_ffn_of_a_block_can_be_left_apart() -> None:
    given = context(**{"transformer.h.0.attn": {"convert": False}, "transformer.h.1.mlp.*": {"convert": False}})
    counts = count_ops(run_pipeline(canonical(), passes(), given))
    assert [counts[op] for op in ("ntc.attention", "ntc.spiking_attention", "gelu", "ntc.integrate_fire")] == [1, 1, 1, 5]


def test_a_later_override_takes_a_module_back_in() -> None:
    given = context(**{"*": {"convert": False}, "transformer.h.1.*": {"convert": True}})
    program = run_pipeline(calibrated(), [ReplaceAttention()], given)
    assert program.history[-1].missed == (("h_0_attn_attention", LEFT),)
    assert list(program.history[-1].notes["explained_variance"]) == ["transformer.h.1"]


@pytest.mark.parametrize("step", [ReplaceAttention, ConvertFfn])
def test_nothing_left_to_convert_is_an_error_that_says_why(step: type[Pass]) -> None:
    message = rf"{step.name} found none of its sites in \w+: all 2 are {LEFT}; convert one of them, or choose a recipe without this pass"
    with pytest.raises(PassError, match=message):
        run_pipeline(calibrated(), [step()], ALL_LEFT)
    with pytest.raises(PassError, match=message):
        run_pipeline(calibrated(), [step.configure({"convert": False})], CONTEXT)
    with pytest.raises(ConfigError, match=rf"pass {step.name}: convert must be true or false, got 'no'"):
        step.configure({"convert": "no"})


def test_what_was_in_the_way_is_named_before_what_was_left() -> None:
    program = calibrated().copy()
    (before,) = (n.args[0] for n in program.graph.find_nodes(op="call_function", target=ACTIVATION) if n.name.startswith("h_1"))
    with program.graph.inserting_after(before):  # a second reader of the pre-activation: refused
        program.graph.call_function(torch.ops.aten.relu.default, (before,))
    result = ConvertFfn().run(program, context(**{"transformer.h.0.*": {"convert": False}}))
    assert result.sites == 0
    assert [reason == LEFT for _, reason in result.missed] == [True, False, False]

    class Refusing(ConvertFfn):
        def run(self, program: Program, context: Context) -> Any:
            return result

    with pytest.raises(PassError, match=r"nearest miss %\w+: its pre-activation %h_1_mlp_c_fc is used elsewhere"):
        run_pipeline(calibrated(), [Refusing()], CONTEXT)


# ------------------------------------------------------------------------------------------------ in two goes


def test_what_is_left_computes_what_it_did() -> None:
    """The spiking program with the analog network's values in place of the first block's is the network again from there on."""
    analog, program = canonical(), first_block_spiking()
    streams: list[torch.Tensor] = []

    def keep(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.name == "h_1_ln_1":
            streams.extend((args[0], value))

    with torch.no_grad():
        expected = interpret(analog, analog.example, keep)

        def put(node: Node, args: tuple[Any, ...], value: Any) -> Any:
            return streams[0] if node is stream else None

        stream = program.find("h_1_ln_1").args[0]
        torch.testing.assert_close(interpret(program, program.example, put), expected, rtol=0, atol=1e-5)
        assert float((program(program.example) - expected).abs().max()) > 1e-3, "spikes must change something for this to mean anything"


def test_a_second_go_gives_the_graph_of_one() -> None:
    whole = run_pipeline(canonical(), passes(), CONTEXT)
    second = run_pipeline(first_block_spiking(), passes(), CONTEXT)
    assert str(second) == str(whole)
    assert second.facts == whole.facts
    assert "spiking" in second.facts
    same = {name for name, tensor in whole.tensors.items() if torch.equal(tensor, second.tensors[name])}
    assert {name for name in whole.tensors if ".h.1." not in name} <= same


def test_the_second_go_calibrates_on_what_the_spikes_of_the_first_give() -> None:
    program = first_block_spiking()
    after = run_pipeline(program, [Calibrate(), ReplaceAttention.configure({"percentile": 80.0})], CONTEXT)
    assert "spiking" not in after.facts, "rates stand in it until the neurons are inserted"
    seen: list[torch.Tensor] = []

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node.target is ATTENTION:
            seen.append(args[1].flatten(0, -2))

    with torch.no_grad():
        for batch in CALIBRATION.batches:
            interpret(program, batch, visit)
    theta = np.percentile(torch.cat(seen).clamp(min=0).numpy(), 80.0, axis=0)
    found = after.tensor("transformer.h.1.attn.k.threshold").numpy(force=True)
    np.testing.assert_allclose(found, np.maximum(theta, theta.max() * 1e-3), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ what check says


def test_check_does_not_hold_it_against_the_model() -> None:
    report = check_model(tiny_gpt2(), settings=Settings(overrides=(Override("transformer.h.1.*", {"convert": False}),)))
    assert report.ok
    assert [(f.stage, f.reason, f.required) for f in report.findings if f.reason == LEFT] == [
        ("replace-attention", LEFT, False), ("convert-ffn", LEFT, False),
    ]  # fmt: skip
    classes = {n.node: (n.becomes, n.reason) for n in report.nodes if n.op == "ntc.attention"}
    assert classes == {"h_0_attn_attention": ("spiking", ""), "h_1_attn_attention": ("analog", LEFT)}


def test_check_fails_where_compile_would() -> None:
    report = check_model(tiny_gpt2(), settings=Settings(overrides=(Override("*.mlp.*", {"convert": False}),)))
    assert not report.ok
    ((stage, reason),) = [(f.stage, f.reason) for f in report.findings if f.required]
    assert stage == "convert-ffn"
    assert "all 2 are left analog by the settings" in reason
