"""Insert-neurons: every annotated rate a neuron, decodes only where time ends, the float limit as T grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from programs import CONTEXT, calibrated, canonical, rates
from torch import Tensor, nn

import ntc
from ntc.errors import PassError
from ntc.meta import NEURON, TYPE, NeuronSpec, building
from ntc.ops import integrate_fire, position_scale, spiking_attention
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import ANALOG, CurrentType, SpikeType
from ntc.testing import check_pass, count_ops, example_ids
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention


def inserted(program: Program) -> Program:
    return run_pipeline(program, [InsertNeurons()])


def test_ops_and_types_after_folding() -> None:
    folded = run_pipeline(rates(n_layer=1), [FoldThresholds()])
    after = check_pass(
        InsertNeurons(), folded, ops_before={"ntc.if_rate": 5, "ntc.decode": 0}, not_after=["ntc.if_rate", "mul"], sites=5, missed=[],
        ops_after={"ntc.integrate_fire": 5, "ntc.decode": 2, "ntc.spiking_attention": 1, "ntc.position_scale": 1, "linear": 7},
    )  # fmt: skip
    types = {n.name: n.meta[TYPE] for n in after.graph.nodes if n.op != "output"}
    assert types["h_0_attn_attention_v_spikes"] == SpikeType(4, "rate", "ternary")
    assert types["h_0_mlp_act_spikes"] == SpikeType(4, "rate", "binary")
    assert types["h_0_attn_attention_scaled"] == types["h_0_mlp_c_proj"] == CurrentType(4)
    assert types["h_0_add_1"] == types["h_0_mlp_c_proj_decoded"] == ANALOG
    assert after.facts >= {"spiking", "thresholds-folded"}
    assert "neurons-annotated" not in after.facts
    assert after.steps == 4
    assert folded.steps == 0
    node = after.find("h_0_mlp_act_spikes")
    assert node.meta[NEURON] == NeuronSpec(steps=4, role="ffn")
    assert node.meta["ntc.made_by"] == ("capture", "canonicalize", "convert-ffn", "fold-thresholds", "insert-neurons")


def test_initial_potentials_are_parameters_beside_the_thresholds() -> None:
    """One number per channel, also where one threshold stands for all of them."""
    program = rates(n_layer=1).copy()
    rate = program.find("h_0_mlp_act_rate")
    rate.meta[NEURON] = replace(rate.meta[NEURON], v0=0.25)
    with building(program.graph, before=rate, stands_for=[rate], by="test") as call:
        rate.update_arg(1, call(program.add_tensor(str(rate.args[1].target), torch.tensor([2.0]))))
    program.refresh()
    after = inserted(program)
    parameters = dict(after.module.named_parameters())
    for path, size, value in (("attn.q", 32, 0.5), ("attn.ssa", 32, 0.5), ("mlp.c_fc", 128, 0.25)):
        assert torch.equal(parameters[f"transformer.h.0.{path}.v0"], torch.full((size,), value))
    loss = after.module(after.example).square().mean()
    loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in parameters.items() if name.endswith((".v0", ".threshold")))
    assert after.find("h_0_mlp_act_spikes").args[2].target == "transformer.h.0.mlp.c_fc.v0"


def test_without_folding_spikes_become_graded_and_the_result_is_the_same() -> None:
    """A value behind a neuron is a payload of its spikes; folded or not, both compute one function up to rounding and ties."""
    program = rates(n_layer=1)
    after = check_pass(InsertNeurons(), program, sites=5, ops_after={"ntc.integrate_fire": 5, "mul": 2, "ntc.decode": 2})
    assert after.find("h_0_mlp_act_value").meta[TYPE] == SpikeType(4, "rate", "graded", "channel")
    other = inserted(run_pipeline(program, [FoldThresholds()]))
    torch.testing.assert_close(after(program.example), other(program.example), rtol=0, atol=1e-3)


@pytest.mark.parametrize("folding", [True, False])
def test_without_an_output_neuron_the_gain_scales_a_current(folding: bool) -> None:
    policy = [ReplaceAttention.configure({"output": "current"}), *([FoldThresholds()] if folding else [])]
    program = run_pipeline(calibrated(n_layer=1), policy, CONTEXT)
    after = check_pass(InsertNeurons(), program, sites=3, ops_after={"ntc.integrate_fire": 3, "ntc.decode": 1})
    decode = next(n for n in after.graph.nodes if n.target is torch.ops.ntc.decode.default)
    # A linear layer takes spikes or analog values: the current is read out in front of the projection.
    assert decode.args[0].name == ("h_0_attn_attention_scaled" if folding else "h_0_attn_attention_gained")
    assert next(iter(decode.users)).name == "h_0_attn_c_proj"


@pytest.mark.parametrize("steps", [1, 3])
def test_spiking_attention_is_what_the_ops_compute_by_hand(steps: int) -> None:
    program = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({"steps": steps})], CONTEXT)
    after = inserted(program)
    prefix, ids = "transformer.h.0.attn", example_ids(seed=4)

    def theta(role: str) -> Tensor:
        return program.tensor(f"{prefix}.{role}.threshold").detach()

    def visit(node: torch.fx.Node, args: tuple[object, ...], value: Tensor) -> Tensor | None:
        if node.target is not torch.ops.ntc.attention.default:
            return None
        q, k, v = args[:3]
        half = torch.tensor([0.5])
        trains = [
            integrate_fire(x, theta(r), half, steps, r == "v", False, "atan", 1.0) for x, r in ((q, "q"), (k, "k"), (v, "v"))
        ]
        scaled = position_scale(spiking_attention(*trains, 4, 4))
        spikes = integrate_fire(scaled, theta("ssa"), half, steps, True, True, "atan", 1.0)
        return spikes.mean(0) * program.tensor(f"{prefix}.ssa.gain").detach()

    with torch.no_grad():
        expected = interpret(calibrated(n_layer=1), ids, visit)
        torch.testing.assert_close(after(ids), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ T to infinity


class TinyFfn(nn.Module):
    """No norm behind the FFN, so that the rounding of its rates reaches the logits through linear layers only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wte, self.fc, self.proj, self.head = nn.Embedding(61, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        return self.head(x + self.proj(nn.functional.gelu(self.fc(x))))


def converted(program: Program, steps: int) -> Program:
    return run_pipeline(program, [ConvertFfn.configure({"steps": steps}), FoldThresholds()], CONTEXT)


def test_the_spiking_network_tends_to_the_float_limit_within_the_rounding_of_its_rates() -> None:
    program = run_pipeline(ntc.capture(TinyFfn(), example_ids()), [Canonicalize(), Calibrate()], CONTEXT)
    ids = example_ids(batch=8, length=12, seed=3)
    errors = {}
    for steps in (4, 16, 64, 256):
        limit = converted(program, steps)
        with torch.no_grad():
            difference = (inserted(limit)(ids) - limit(ids)).abs()
        # |rate_T - r| <= 1 / (2 T) for a constant current, so |dz| <= |W_head| |W_proj| 1 / (2 T), per logit.
        bound = (limit.tensor("head.weight").abs() @ limit.tensor("proj.weight").abs()).sum(1) / (2 * steps)
        assert bool((difference <= bound * (1 + 1e-3) + 1e-5).all()), steps
        errors[steps] = float(difference.max())
    assert errors[4] > errors[16] > errors[64] > errors[256]
    assert errors[256] < errors[4] / 20, "the error falls about as 1 / T"
    assert errors[4] > 0.05, "at T = 4 rounding must show, or the test shows nothing"


def test_the_feed_forward_of_a_gpt2_tends_to_its_float_limit() -> None:
    ids = example_ids(batch=4, length=12, seed=3)
    errors = []
    for steps in (4, 16, 64, 256):
        limit = converted(calibrated(n_layer=1), steps)
        with torch.no_grad():
            errors.append(float((inserted(limit)(ids) - limit(ids)).pow(2).mean().sqrt()))
    assert errors == sorted(errors, reverse=True)
    # Rounding errors of the hidden neurons are independent, of size 1 / T: at 64 times the steps a 64th, with room for chance.
    assert errors[3] < errors[0] / 25


# ------------------------------------------------------------------------------------------------ edges


def test_a_network_that_ends_in_spikes_is_decoded() -> None:
    class Scorer(TinyFfn):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(torch.relu(self.fc(self.wte(ids))), self.weight)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(61, 32))

    program = run_pipeline(ntc.capture(Scorer(), example_ids()), [Canonicalize(), Calibrate(), ConvertFfn()], CONTEXT)
    after = check_pass(InsertNeurons(), program, sites=1, ops_after={"ntc.decode": 1})
    assert after(example_ids()).shape == (2, 9, 61)


def test_neurons_driven_by_a_train_of_another_length_read_it_out_first() -> None:
    program = rates(n_layer=1).copy()
    node = program.find("h_0_attn_attention_ssa_rate")
    node.meta[NEURON] = NeuronSpec(steps=8, signed=True, role="ssa")
    after = inserted(program)
    spikes = after.find("h_0_attn_attention_ssa_spikes")
    assert spikes.args[0].target is torch.ops.ntc.decode.default
    assert spikes.meta[TYPE] == SpikeType(8, "rate", "ternary")
    assert after.steps == 8


def test_a_train_with_two_host_users_is_decoded_once() -> None:
    program = run_pipeline(calibrated(n_layer=1), [ReplaceAttention.configure({"output": "current"})], CONTEXT).copy()
    projection = program.find("h_0_attn_c_proj")
    last = program.find("h_0_add")
    with building(program.graph, before=last, stands_for=[projection], by="test") as call:
        more = call(torch.ops.aten.linear.default, projection.args[0], projection.args[1])
        total = call(torch.ops.aten.add.Tensor, last.args[0], more)
    last.update_arg(0, total)
    program.refresh()
    assert count_ops(inserted(program))["ntc.decode"] == 1


def test_a_rate_without_annotation_is_an_error() -> None:
    program = rates(n_layer=1).copy()
    del program.find("h_0_mlp_act_rate").meta[NEURON]
    with pytest.raises(PassError, match=r"node %h_0_mlp_act_rate \(transformer\.h\.0\.mlp\.act.* is a rate without a neuron annotation"):
        inserted(program)


def test_needs_annotated_neurons_and_takes_the_fact_with_it() -> None:
    with pytest.raises(PassError, match="insert-neurons needs a program that is neurons-annotated"):
        inserted(canonical(n_layer=1))
    with pytest.raises(PassError, match="insert-neurons needs a program that is neurons-annotated"):
        inserted(inserted(rates(n_layer=1)))


def test_a_program_that_says_it_is_annotated_but_holds_no_rate_is_an_error() -> None:
    program = canonical(n_layer=1).copy()
    program.facts |= {"neurons-annotated"}
    with pytest.raises(PassError, match="insert-neurons found none of its sites"):
        inserted(program)
