"""Under which kinds operations are booked, and that every multiply-accumulate of a decoder is under one of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from programs import CONTEXT, TOKENS, canonical, spiking
from torch.utils.flop_counter import FlopCounterMode

import ntc
from ntc.energy import EnergyReport, load_constants, measure_energy
from ntc.energy.booking import booked
from ntc.energy.headline import headline
from ntc.observe import Activity, observe
from ntc.ops import Counts
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import example_ids
from ntc_passes.canonicalize import Canonicalize

_LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24,
}  # fmt: skip


@cache
def llama() -> tuple[transformers.LlamaForCausalLM, Program]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)).eval()
    return model, run_pipeline(ntc.capture(model, example_ids()), [Canonicalize()])


@cache
def sdllm() -> Program:
    return run_pipeline(llama()[1], recipe("sdllm").build(Settings(), find_pass)[1:], CONTEXT)


@pytest.fixture(scope="module")
def report() -> EnergyReport:
    return measure_energy(sdllm(), llama()[1], TOKENS, batch=len(TOKENS.windows))


def test_every_dense_mac_of_a_llama_is_counted_plain_and_spiking(report: EnergyReport) -> None:
    model, _ = llama()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(TOKENS.windows)
    macs = counter.get_total_flops() / 2
    for side in (report.ann, report.snn):
        assert sum(n.counts.dense_macs for n in side.nodes) == macs
        assert all(n.countable for n in side.nodes)
    for side, program in ((report.ann, llama()[1]), (report.snn, sdllm())):
        assert {n.name for n in side.nodes} == {n.name for n in program.graph.nodes if n.op == "call_function"}, "every node has its row"
    assert report.uncounted() == []
    report.require_counted(0.0)


def test_the_kinds_of_a_llama(report: EnergyReport) -> None:
    per_layer = {"projections": 2 * 32 * 32 + 2 * 32 * 16, "FFN": 3 * 32 * 48}
    for side in (report.ann, report.snn):
        dense = {kind: sum(n.counts.dense_macs for n in nodes) for kind, nodes in side.by_kind.items()}
        for kind, macs in per_layer.items():
            assert dense[kind] == pytest.approx(2 * macs), kind
        assert dense["lm_head"] == pytest.approx(32 * 61)
        assert dense["attention products"] == pytest.approx(2 * 2 * 32 * 12)
        assert {kind for kind, macs in dense.items() if macs} == {"projections", "FFN", "lm_head", "attention products"}
        names = {kind: len(nodes) for kind, nodes in side.by_kind.items()}
        assert (names["projections"], names["FFN"], names["lm_head"], names["embedding"]) == (8, 6, 1, 1)
    softmax, products = (report.ann.by_kind[kind] for kind in ("softmax", "attention products"))
    assert sum(n.counts.elementwise for n in softmax) == pytest.approx(2 * 3 * 4 * 6.5)
    assert sum(n.counts.elementwise for n in products) == 0 == sum(n.counts.macs for n in softmax)
    encoders = report.snn.by_kind["encoders"]
    assert {n.op for n in encoders} >= {"ntc.encode", "ntc.token_step"}
    assert "neuron updates" not in report.snn.by_kind, "no other neuron is in this recipe"
    assert sum(n.counts.neuron_updates for n in encoders) == report.snn.total().neuron_updates > 0


def test_kinds_add_up_with_counts_and_bytes(report: EnergyReport) -> None:
    for data in (report.to_json(), measure_energy(spiking(), canonical(), TOKENS).to_json()):
        for side in ("ann", "snn"):
            for groups in (data["kinds"], data["blocks"]):
                for key in (*Counts.__dataclass_fields__, *(["effective_macs"] if side == "snn" else [])):
                    assert sum(g[side][key] for g in groups) == pytest.approx(data["total"][side][key]), key
                for moved in data["moved"]:
                    assert sum(g[side][f"{moved['data']}_bytes"] for g in groups) == pytest.approx(moved[f"{side}_bytes"])
                assert sum(g[f"{side}_pj"] for g in groups) == pytest.approx(data["total"][f"{side}_pj"])
    assert all(g["ann"]["effective_macs"] is None for g in report.to_json()["kinds"])


def test_kinds_of_the_spiking_gpt2() -> None:
    kinds = booked(spiking())
    assert {name: kind for name, kind in kinds.items() if name.startswith("h_0_mlp")} == {
        "h_0_mlp_c_fc": "FFN", "h_0_mlp_act_spikes": "neuron updates", "h_0_mlp_c_proj": "FFN",
        **{name: kind for name, kind in kinds.items() if name.startswith("h_0_mlp") and kind in ("decoding", "scale", "elementwise")},
    }  # fmt: skip
    assert kinds["h_1_attn_attention_ssa"] == "attention products" and kinds["h_1_attn_c_proj"] == "projections"
    assert kinds["lm_head"] == "lm_head"
    assert kinds["ln_f"] == "norms" and kinds["wte"] == "embedding"


def test_every_op_of_both_programs_ran_and_is_booked() -> None:
    for program in (sdllm(), spiking()):
        activity = Activity()
        observe(program, [TOKENS.windows[:2]], activity)
        assert activity.nodes.keys() == booked(program).keys()


def test_additions_of_a_rotation_are_no_synaptic_operations(report: EnergyReport) -> None:
    chip = replace(report, constants=load_constants("loihi-1"))
    turned = sum(n.counts.acs for n in report.snn.per_token if n.op == "ntc.hadamard")
    total, data = report.snn.total(), chip.to_json()
    assert turned > 0
    assert data["total"]["snn_pj"] == pytest.approx(27.1 * (total.acs - turned) + 81 * total.neuron_updates)
    assert data["total"]["snn_pj"] == pytest.approx(sum(k["snn_pj"] for k in data["kinds"]))
    (row,) = (r for r in data["unpriced"] if r["operation"] == "additions_of_real_values")
    assert row["side"] == "snn" and row["number"] == pytest.approx(turned)
    assert "additions of real values" in headline(data)[1]


def test_layers_and_attention_that_read_digits_are_booked_where_they_were() -> None:
    """Nothing is multiplied by a weight any more, and the dense work of each kind stays what it was."""
    program = run_pipeline(llama()[1], recipe("lossless").build(Settings(), find_pass)[1:], CONTEXT)
    report = measure_energy(program, llama()[1], TOKENS, batch=len(TOKENS.windows))
    dense = [{k: sum(n.counts.dense_macs for n in nodes) for k, nodes in side.by_kind.items()} for side in (report.ann, report.snn)]
    assert {k: v for k, v in dense[0].items() if v} == pytest.approx({k: v for k, v in dense[1].items() if v})
    acs = {kind: sum(n.counts.acs for n in nodes) for kind, nodes in report.snn.by_kind.items()}
    assert {k for k, v in acs.items() if v} == {"projections", "FFN", "lm_head", "attention products", "encoders"}
    assert report.snn.total().macs == 0
    ours = {kind for kind, nodes in report.snn.by_kind.items() if any(n.counts.spikes for n in nodes)}
    assert ours == {"encoders", "attention products"}, "the softmax's numerators spike inside of attention"
    assert "other products" not in acs
