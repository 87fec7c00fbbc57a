"""Quantize: the integer program is the plain one of docs/integers.md, near the floating-point one, the same for every batch and length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integer_reference import run
from programs import CALIBRATION, CONTEXT, QUANTIZED, context, floating, quantized, unquantized
from torch import Tensor
from torch.fx import Node

from ntc import artifact
from ntc.meta import NEURON, SCALE, TYPE
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import Analog
from ntc.testing import check_pass, count_ops, example_ids
from ntc.widths import widths
from ntc_passes.quantize import Quantize


def values(program: Program, ids: Tensor) -> dict[str, Tensor]:
    """Every value, integers times their scale where one number or one per channel is known."""
    found: dict[str, Tensor] = {}

    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        scale = node.meta.get(SCALE, 1.0)
        if isinstance(value, Tensor) and not (isinstance(scale, list) and isinstance(scale[0], list)):
            found[node.name] = value.double() * torch.tensor(scale, dtype=torch.float64)

    with torch.no_grad():
        interpret(program, ids, visit)
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum())


def notes(program: Program) -> dict[str, Any]:
    found: dict[str, Any] = program.history[-1].notes["sites"]
    return found


# ------------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("name", QUANTIZED)
def test_it_is_the_plain_arithmetic_of_the_document(name: str) -> None:
    program = quantized(name)
    for batch, length in ((2, 9), (1, 1), (3, 24)):
        ids = example_ids(batch=batch, length=length, seed=length)
        np.testing.assert_array_equal(program(ids).numpy(), run(program, ids.numpy()))


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 8), (16, 8), (16, 16), (8, 5)])
def test_widths_to_choose_from(weight_bits: int, activation_bits: int) -> None:
    program = quantized("leak, current", weight_bits, activation_bits)
    ids = example_ids(seed=7)
    np.testing.assert_array_equal(program(ids).numpy(), run(program, ids.numpy()))
    weights = [program.tensor(n.args[1]) for n in program.graph.nodes if n.target is torch.ops.ntc.integer_linear.default]
    limit = 2 ** (weight_bits - 1) - 1
    assert max(int(w.abs().max()) for w in weights) <= limit
    assert {w.dtype for w in weights} == {torch.int16 if weight_bits == 16 else torch.int8}
    clamped = {n.args[-2] for n in program.graph.nodes if n.target is torch.ops.ntc.integer_norm.default}
    assert clamped == {2 ** (activation_bits - 1) - 1}


@pytest.mark.parametrize("name", QUANTIZED)
def test_nothing_in_floating_point_is_left_but_the_logits(name: str) -> None:
    program = quantized(name)
    analog = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta[TYPE], Analog)]
    assert [n.target for n in analog] == [torch.ops.ntc.from_integer.default]
    assert not any(t.is_floating_point() for t in program.tensors.values())
    assert widths(program)
    exponent = analog[0].args[1]
    assert isinstance(exponent, int)
    whole = program(program.example) * 2.0**-exponent
    assert torch.equal(whole, whole.round())
    assert float(whole.abs().max()) < 2**23


def test_contract_and_names() -> None:
    program = unquantized("leak, current")
    after = check_pass(
        Quantize(), program, context=CONTEXT, not_after=["linear", "layer_norm", "ntc.integrate_fire", "ntc.spiking_attention"],
        ops_after={"ntc.integer_norm": 3, "ntc.integer_linear": 7, "ntc.integer_fire": 4, "ntc.integer_attention": 1, "ntc.decode": 2,
                   "ntc.requantize": 4, "ntc.from_integer": 1}, missed=[],
    )  # fmt: skip
    assert after.facts >= {"spiking", "integer"}
    assert after.steps == 4
    kept = {n.name: n.meta[NEURON] for n in program.graph.nodes if NEURON in n.meta}
    assert {n.name: n.meta[NEURON] for n in after.graph.nodes if NEURON in n.meta} == kept
    fc = after.find("h_0_mlp_c_fc")
    assert [fc.args[1].target, fc.args[2].target] == ["transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"]
    assert fc.meta["ntc.made_by"][-1] == "quantize"
    # Tied embeddings are a table in units of the stream and a matrix of their own.
    assert after.tensor("transformer.wte.weight").dtype == torch.int32
    assert after.tensor("lm_head.weight").dtype == torch.int8


# ------------------------------------------------------------------------------------------------ how near it comes


def test_eight_bits_are_near_before_spikes_differ() -> None:
    program, ids = unquantized("leak, current"), CALIBRATION.batches[0]
    got, wanted = values(quantized("leak, current"), ids), values(program, ids)
    assert relative(got["transformer_add"], wanted["transformer_add"]) < 1e-9
    # A step of s, evenly: s^2 / 12 where nothing is clipped.
    scale = notes(quantized("leak, current"))["h_0_ln_1"]["scale"]
    error = (got["h_0_ln_1"] - wanted["h_0_ln_1"]).square().mean()
    assert 0.5 < float(error) / (scale**2 / 12) < 1.5
    for name in ("h_0_attn_c_attn_q", "h_0_attn_c_attn_k", "h_0_attn_c_attn_v"):
        assert relative(got[name], wanted[name]) < 4e-4
    spikes = "h_0_attn_attention_q_spikes"
    assert float((got[spikes] != wanted[spikes]).double().mean()) < 0.03


def test_sixteen_bits_are_nearer_by_four_orders() -> None:
    coarse, middle, fine = (notes(quantized("leak, current", bits))["h_0_mlp_c_fc"]["relative_squared_error"] for bits in (4, 8, 16))
    assert 50 < coarse / middle < 1000  # each bit is worth a factor of 4: 256
    assert 10**4 < middle / fine < 10**6  # 65,536
    program, ids = unquantized("leak, current"), CALIBRATION.batches[0]
    got, wanted = values(quantized("leak, current", 16, 16), ids), values(program, ids)
    assert relative(got["h_0_ln_1"], wanted["h_0_ln_1"]) < 1e-8
    # With both at 16 bits the 32 bits of the membrane bind, and the weights give way.
    assert 1e-9 < relative(got["h_0_attn_c_attn_v"], wanted["h_0_attn_c_attn_v"]) < 4e-6


def test_logits_stay_what_they_were() -> None:
    """A model of random weights amplifies every spike that comes a step later, so this is no tight bound; a wrong rewrite gives 1 and more."""
    ids = torch.cat(CALIBRATION.batches)
    for name in QUANTIZED:
        with torch.no_grad():
            wanted = unquantized(name)(ids)
            error = relative(quantized(name, 16, 16)(ids), wanted)
        assert error < 0.05, name


def test_a_layer_of_gelu_uses_all_values_of_its_table() -> None:
    program = quantized("ffn analog")
    table = program.tensor("transformer.h.0.mlp.act.table")
    assert table.shape == (256,)
    assert int(table.max()) == 127
    index = next(n for n in program.graph.nodes if n.name == "h_0_mlp_c_fc_index")
    assert index.args[-2:] == (-128, 127)
    site = notes(program)["h_0_mlp_act"]
    assert site["input_zero"] != 0
    assert site["relative_squared_error"] < 3e-3
    points = torch.arange(-128, 128, dtype=torch.float64) * site["input_scale"] + site["input_zero"]
    wanted = torch.nn.functional.gelu(points, approximate="tanh") / site["scale"]
    assert float((table - wanted.clamp(-127, 127)).abs().max()) <= 0.5


def test_biases_make_up_for_the_mean_error() -> None:
    program, ids = unquantized("position, spikes"), torch.cat(CALIBRATION.batches)
    wanted = values(program, ids)["lm_head"].mean((0, 1))
    errors = []
    for correction in (True, False):
        step = Quantize.configure({"bias_correction": correction, "weight_bits": 4})
        after = run_pipeline(program, [step], CONTEXT)
        scale = torch.tensor(after.find("lm_head").meta[SCALE], dtype=torch.float64)
        errors.append(((values(after, ids)["lm_head"].mean((0, 1)) - wanted).abs() / scale).max())
    assert float(errors[0]) <= 0.5 + 1e-3  # the rounding of the bias, and float32 in the program
    assert float(errors[1]) > 2


def test_trained_thresholds_potentials_and_leaks() -> None:
    """One number per channel, as fine-tuning leaves them."""
    program = floating(**QUANTIZED["leak, current"])
    generator = torch.Generator().manual_seed(3)
    for name, tensor in program.tensors.items():
        if name.endswith((".threshold", ".v0")):
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data = 0.5 + noise if name.endswith(".threshold") else noise
        elif name.endswith(".leak"):
            tensor.data = torch.tensor([0.9, 0.99, 0.3, 1.0])
    after = run_pipeline(program, [Quantize()], CONTEXT)
    ids = example_ids(length=24)
    np.testing.assert_array_equal(after(ids).numpy(), run(after, ids.numpy()))
    for role in "qkv":
        prefix = f"transformer.h.0.attn.{role}"
        scale = torch.tensor(after.find(f"h_0_attn_c_attn_{role}").meta[SCALE], dtype=torch.float64)
        theta, start = (after.tensor(f"{prefix}.{name}") * scale for name in ("threshold", "start"))
        exact = program.tensor(f"{prefix}.threshold").double()
        assert bool(((theta - exact).abs() <= scale * 0.5001).all())
        assert bool(((start - exact * program.tensor(f"{prefix}.v0").double()).abs() <= scale * 0.5001).all())
    # What a written key is worth d tokens later, from the tables alone.
    growth, node = after.tensor("transformer.h.0.attn.ssa.growth").double(), after.find("h_0_attn_attention_ssa")
    factors, given = torch.tensor(node.meta[SCALE], dtype=torch.float64).T, program.tensor("transformer.h.0.attn.ssa.leak").detach().double()
    leak = factors[:, 1] / factors[:, 0]  # one whose renewal has few bits
    assert bool(((leak - given).abs() <= (1 - given) / 128).all())
    later, earlier = torch.tril_indices(growth.shape[1], growth.shape[1])
    worth = growth[:, earlier] * factors[:, later] / leak[:, None] ** (later - earlier)
    assert float((worth - 1).abs().max()) < 1 / 128
    renewal = after.tensor("transformer.h.0.attn.ssa.renewal").double() / 2 ** node.args[7]
    torch.testing.assert_close(renewal, leak ** growth.shape[1], rtol=1e-12, atol=2**-31)


def test_rms_norm() -> None:
    program = floating(**QUANTIZED["leak, current"])
    for node in program.graph.find_nodes(op="call_function", target=aten.layer_norm.default):
        node.target, node.args = aten.rms_norm.default, (*node.args[:3], 1e-5)
    program.refresh()
    after = run_pipeline(program, [Quantize()], CONTEXT)
    ids = CALIBRATION.batches[0]
    np.testing.assert_array_equal(after(ids).numpy(), run(after, ids.numpy()))
    assert relative(values(after, ids)["h_0_ln_1"], values(program, ids)["h_0_ln_1"]) < 4e-4


# ------------------------------------------------------------------------------------------------ what it does not depend on


@pytest.mark.parametrize("name", ["leak, current", "position, spikes", "ffn analog"])
def test_a_token_depends_on_nothing_behind_it_and_on_no_other_row(name: str) -> None:
    program, ids = quantized(name), example_ids(batch=3, length=24, seed=5)
    whole = program(ids)
    padded = torch.cat([ids[:, :17], torch.zeros(3, 7, dtype=torch.long)], dim=1)
    assert torch.equal(program(padded)[:, :17], whole[:, :17])
    for length in (1, 16, 17):
        assert torch.equal(program(ids[:, :length]), whole[:, :length])
    for row in range(3):
        assert torch.equal(program(ids[row : row + 1])[0], whole[row])


def test_the_same_input_gives_the_same_program() -> None:
    again = run_pipeline(unquantized("leak, current"), [Quantize()], CONTEXT)
    first = quantized("leak, current")
    assert str(again) == str(first)
    assert all(torch.equal(t, first.tensors[name]) for name, t in again.tensors.items())
    assert again.history[-1].notes == first.history[-1].notes


def test_saved_and_loaded(tmp_path: Path) -> None:
    program, ids = quantized("leak, ternary, spikes"), example_ids(length=20)
    artifact.save(program, tmp_path)
    artifact.seal(tmp_path)
    loaded = artifact.load(tmp_path)
    assert torch.equal(loaded(ids), program(ids))
    scales = {n.name: n.meta[SCALE] for n in program.graph.nodes if SCALE in n.meta}
    assert {n.name: n.meta[SCALE] for n in loaded.graph.nodes if SCALE in n.meta} == scales
    assert len(scales) > 20
    assert str(loaded) == str(program)


def test_options_by_module() -> None:
    given = context(**{"transformer.h.0.mlp.c_fc": {"weight_bits": 4}})
    program = run_pipeline(unquantized("leak, current"), [Quantize()], given)
    assert int(program.tensor("transformer.h.0.mlp.c_fc.weight").abs().max()) <= 7
    assert int(program.tensor("transformer.h.0.mlp.c_proj.weight").abs().max()) > 100
    assert count_ops(program)["ntc.integer_linear"] == 7
