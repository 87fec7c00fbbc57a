"""The decoder families of docs/models.md that are held by tests: captured and recognised; two of them converted, saved, counted, exported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from family_cases import CONVERTED, FAMILIES, analog, compiled, model
from programs import CONTEXT, TOKENS
from torch.fx import Node
from transformers import PreTrainedModel

import ntc
from ntc import PassError
from ntc.frontend import CAPTURE_TOLERANCE
from ntc.meta import module_of
from ntc.ops import SOFTMAX_ATTENTION, aten
from ntc.pipeline import run_pipeline
from ntc.program import op_name
from ntc.registry import find_pass
from ntc.testing import count_ops, example_ids
from ntc_backends.onnx_export import OnnxBackend
from ntc_passes.calibrate import Calibrate
from ntc_passes.convert_ffn import ConvertFfn

each_family = pytest.mark.parametrize("name", FAMILIES)
each_converted = pytest.mark.parametrize("name", CONVERTED)


def _logits(reference: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    before = reference.config._attn_implementation
    reference.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return reference(input_ids=ids, use_cache=False).logits
    finally:
        reference.set_attn_implementation(before)


@each_family
def test_logits_are_those_of_the_model_at_any_size(name: str) -> None:
    for batch, length in ((1, 1), (3, 7), (2, 24)):  # 24 is all that it takes, and six windows of 4
        ids = example_ids(batch=batch, length=length, seed=batch)
        torch.testing.assert_close(analog(name)(ids), _logits(model(name), ids), rtol=0, atol=CAPTURE_TOLERANCE)


@each_family
def test_every_attention_is_recognised(name: str) -> None:
    family, program = FAMILIES[name], analog(name)
    windowed = [n for n in program.graph.nodes if n.target is torch.ops.ntc.windowed_attention.default]
    assert count_ops(program)["ntc.attention"] == family.attention
    assert tuple(n.args[6:] for n in windowed) == family.bounds
    assert family.attention + len(windowed) == family.config["num_hidden_layers"]
    assert program.history[-1].missed == ()
    heads = {n.args[3:5] for n in program.graph.nodes if n.target in SOFTMAX_ATTENTION}
    assert heads == {(4, family.config.get("num_key_value_heads", 4))}, "grouped keys and values stay grouped"


@each_family
def test_every_norm_is_one_node(name: str) -> None:
    family, ops = FAMILIES[name], count_ops(analog(name))
    assert {op: ops[op] for op in ("rms_norm", "layer_norm")} == {"rms_norm": 0, "layer_norm": 0} | {family.norm: family.norms}
    assert not {"rsqrt", "sqrt", "pow", "mean"} & set(ops)


@each_family
def test_an_ffn_is_its_linear_layers_and_its_activation(name: str) -> None:
    family, program = FAMILIES[name], analog(name)
    gate = ["linear", family.activation, "linear", "mul", "linear"] if family.gated else ["linear", family.activation, "linear"]
    found = [op_name(n.target) for n in program.graph.nodes if n.op == "call_function" and _FFN.search(module_of(n)) and not _NORM(n)]
    assert found == gate * family.config["num_hidden_layers"]


_FFN = re.compile(r"(layers|h)\.\d+\.(mlp|fc|activation_fn)")


def _NORM(node: Node) -> bool:
    return op_name(node.target) in ("rms_norm", "layer_norm")


@each_converted
def test_every_attention_becomes_spiking(name: str) -> None:
    family, program = FAMILIES[name], compiled(name).program
    layers = family.config["num_hidden_layers"]
    ops = count_ops(program)
    assert ops["ntc.spiking_attention"] == layers
    assert ops["ntc.integrate_fire"] == 3 * layers
    assert not ops["ntc.attention"] + ops["ntc.windowed_attention"]


def _at_once(neuron: Node) -> bool:
    """Whether the neuron is driven by a linear layer, scaled by a number or not (OPT scales its queries)."""
    source = neuron.args[0]
    while isinstance(source, Node) and source.target is aten.mul.Tensor and not isinstance(source.args[1], Node):
        source = source.args[0]
    assert isinstance(source, Node)
    return source.target is aten.linear.default


@each_converted
def test_neurons_stand_behind_the_rotation(name: str) -> None:
    program = compiled(name).program
    neurons = [n for n in program.graph.nodes if n.target is torch.ops.ntc.integrate_fire.default]
    rotated = {n.name for n in neurons if not _at_once(n)}
    queries_and_keys = {n.name for n in neurons if n.meta["ntc.neuron"].role in "qk"}
    assert rotated == (queries_and_keys if FAMILIES[name].rotary else set())


@each_converted
def test_nothing_is_uncounted(name: str) -> None:
    found = compiled(name)
    assert ntc.measure_energy(found.program, found.analog, TOKENS).uncounted() == []


@each_converted
def test_saves_loads_and_exports(name: str, tmp_path: Path) -> None:
    found = compiled(name)
    report = ntc.write(found, tmp_path / "made", emit=("onnx",), tokens=TOKENS.windows[:2])
    assert report["onnx"]["max_abs_logit_difference"] < CAPTURE_TOLERANCE
    ids = example_ids(length=11)
    assert torch.equal(ntc.load(tmp_path / "made")(ids), found.program(ids))


@each_converted
def test_the_analog_network_exports(name: str, tmp_path: Path) -> None:
    report = OnnxBackend().emit(compiled(name).analog, tmp_path, tokens=example_ids(batch=3, length=11))
    assert report["max_abs_logit_difference"] < 1e-5


@each_converted
def test_the_whole_recipe_takes_a_plain_ffn_and_names_a_gate(name: str) -> None:
    family, found = FAMILIES[name], compiled(name)
    passes = [Calibrate(), ConvertFfn()]
    if not family.gated:
        assert run_pipeline(found.analog, passes, CONTEXT).history[-1].sites == family.config["num_hidden_layers"]
        return
    with pytest.raises(PassError, match=r"convert-ffn found none of its sites.*gates another projection.*ssa-only converts the attention"):
        run_pipeline(found.analog, passes, CONTEXT)


def test_a_window_is_captured_though_the_example_is_shorter() -> None:
    program = ntc.capture(model("mistral"), example_ids(length=3))
    ids = example_ids(length=20)
    torch.testing.assert_close(program(ids), _logits(model("mistral"), ids), rtol=0, atol=CAPTURE_TOLERANCE)


def test_a_window_has_no_streaming_form() -> None:
    streaming = find_pass("to-streaming")()
    with pytest.raises(PassError, match=r"ntc.windowed_attention.default has no streaming form.*model\.layers\.0\.self_attn"):
        run_pipeline(compiled("mistral").analog, [streaming])
    run_pipeline(compiled("mistral").program, [streaming])  # what a leak forgets needs no window
