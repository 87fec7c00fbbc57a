"""Bytes moved: a table by hand for a two-layer network, and each rule by itself."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from energy_cases import linear, neurons, pricing
from integer_programs import VOCABULARY, block
from integer_programs import streaming as by_hand
from programs import TOKENS, canonical, quantized, spiking

from ntc.energy import EnergyReport, load_constants, load_memory, measure_energy
from ntc.energy.hierarchy import CLASSES
from ntc.meta import NEURON
from ntc.observe import Activity, count_by_shape, observe
from ntc.ops import Operand, Traffic
from ntc.ops.traffic import bits_per_slot, causal, values
from ntc.pipeline import run_pipeline
from ntc.program import interpret
from ntc.spike_type import ANALOG, INDEX, INTEGER, CurrentType, SpikeType
from ntc.text import random_tokens
from ntc_passes.to_streaming import ToStreaming

L, C, V = 12, 32, 61  # window, width and vocabulary of the tiny models; 4 heads, T = 4
SEEN = (L + 1) / 2


@pytest.fixture(scope="module")
def report() -> EnergyReport:
    return measure_energy(spiking(), canonical(), TOKENS, batch=3)


def test_the_table_of_a_two_layer_network_by_hand(report: EnergyReport) -> None:
    moved = {n.name: n.traffic for n in report.ann.per_token}

    def layer(inputs: int, outputs: int, bias: bool = True) -> Traffic:
        read = inputs * outputs + outputs * bias
        return Traffic(weights=read, sweep=read, activations=inputs + outputs)

    expected = {
        "wte": Traffic(weights=C, sweep=V * C, activations=C),  # a row of the table, written on
        "lm_head": layer(C, V, bias=False),
        "ln_f": Traffic(weights=2 * C, sweep=2 * C, activations=2 * C),
    }
    for b in range(2):
        for role in "qkv":
            expected[f"h_{b}_attn_c_attn_{role}"] = layer(C, C)
        expected[f"h_{b}_attn_attention"] = Traffic(activations=2 * C, cache=SEEN * 2 * C)
        expected[f"h_{b}_attn_c_proj"] = layer(C, C)
        expected[f"h_{b}_mlp_c_fc"], expected[f"h_{b}_mlp_c_proj"] = layer(C, 4 * C), layer(4 * C, C)
        expected[f"h_{b}_mlp_act"] = Traffic(activations=8 * C)
    assert expected.keys() <= moved.keys(), sorted(moved)
    for name, traffic in expected.items():
        assert asdict(moved[name]) == pytest.approx(asdict(traffic)), name


def test_what_spikes_move_by_hand(report: EnergyReport) -> None:
    moved, spikes = {n.name: n.traffic for n in report.snn.nodes}, {}
    with torch.no_grad():
        interpret(spiking(), TOKENS.windows, lambda n, a, v: spikes.update({n.name: float(v.abs().sum())}) if NEURON in n.meta else None)
    n, t = 96, 4  # tokens
    for b in range(2):
        hidden, out = f"h_{b}_mlp_act_spikes", f"h_{b}_mlp_c_proj"
        assert moved[hidden].membranes == 2 * n * 4 * C * t
        assert moved[hidden].spikes == n * 4 * C * t  # binary, written once
        assert moved[hidden].activations == n * 4 * C  # the constant current
        assert moved[out].weights == spikes[hidden] * C + n * C, "a row per spike, and the bias"
        assert moved[out].sweep == n * (4 * C * C + C)
        assert moved[out].spikes == n * 4 * C * t and moved[out].activations == 0, "currents are not stored"
        product = moved[f"h_{b}_attn_attention_ssa"]
        assert product.spike_cache == n * t * SEEN * (C + 2 * C), "binary keys, ternary values"
        assert product.spikes == n * t * C
        assert product.cache == product.state == 0


def test_a_stream_reads_its_memory() -> None:
    for make, leaky in ((lambda: spiking(n_layer=1), False), (lambda: quantized("leak, current"), True)):
        program = run_pipeline(make(), [ToStreaming()])
        found = measure_energy(program, canonical(n_layer=1), TOKENS, batch=3)
        (row,) = (n for n in found.snn.nodes if "attention_stream" in n.op or "spiking_attention_stream" in n.op)
        assert row.traffic.spike_cache == row.traffic.cache == 0
        assert row.traffic.state == row.measured["read"] + 2 * row.measured["write"] + 2 * row.measured.get("leak", 0.0) > 0
        assert ("leak" in row.measured) == leaky
    activity = Activity()
    observe(by_hand(block()), random_tokens(VOCABULARY, 11, 22).batches(2), activity)
    row = activity.nodes["attention_stream"]
    assert row.traffic.state == row.measured["read"] + 2 * row.measured["write"] + 2 * 2 * 2 * (4 * 2 * 4 * 4)  # two renewals


def test_by_shape_is_by_running() -> None:
    ran = Activity()
    observe(canonical(), TOKENS.batches(3), ran)
    shapes = count_by_shape(canonical(), [tuple(b.shape) for b in TOKENS.batches(3)])  # type: ignore[misc]
    assert {n: r.traffic for n, r in ran.nodes.items()} == {n: r.traffic for n, r in shapes.nodes.items()}


def test_values_by_type() -> None:
    def one(kind: object) -> Traffic:
        return values(Operand((4, 2, 3), kind, 0))  # type: ignore[arg-type]

    assert one(ANALOG) == one(INTEGER) == Traffic(activations=24)
    assert one(INDEX) == one(CurrentType(4)) == Traffic()
    assert one(SpikeType(4)) == Traffic(spikes=24)
    assert one(SpikeType(4, levels="ternary")) == Traffic(spikes=48)
    assert bits_per_slot(SpikeType(4, levels="graded")) == 1


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 0), (7, 3), (7, 9), (5, 1)])
def test_keys_seen(length: int, window: int) -> None:
    assert causal(length, window) == pytest.approx(sum(min(i + 1, window or length) for i in range(length)) / length)


# ------------------------------------------------------------------------------------------------ bytes and joules


def test_bytes_by_widths_levels_and_reuse() -> None:
    bits, memory = load_constants("horowitz-45nm-int8").bits, load_memory()
    dense = memory.bytes_moved(linear(100, 10), bits)
    assert dense == {"weights": 1000, "membranes": 0, "activations": 110, "spikes": 0, "cache": 0, "state": 0, "partial_sums": 0}
    sparse = linear(100, 10, steps=8, rate=0.5)
    assert memory.bytes_moved(sparse, bits)["weights"] == 4000, "each spike reads its row"
    assert memory.bytes_moved(sparse, bits)["spikes"] == 100
    assert replace(memory, steps=True).bytes_moved(sparse, bits)["weights"] == 1000, "one pass serves all steps"
    assert replace(memory, tokens=4).bytes_moved(sparse, bits)["weights"] == 2000, "a pass per step serves four tokens"
    assert replace(memory, tokens=4).bytes_moved(linear(100, 10), bits)["weights"] == 250
    population = neurons(10, 4, 0.5)
    assert memory.bytes_moved(population, bits)["membranes"] == 2 * 10 * 4 * 4
    assert replace(memory, steps=True).bytes_moved(population, bits)["membranes"] == 0
    assert replace(memory, accesses=2).bytes_moved(sparse, bits)["partial_sums"] == 2 * 4000 * 4
    assert memory.per_byte("weights") == pytest.approx(12.5)  # 100 pJ for 64 bits
    assert memory.per_byte("membranes") == pytest.approx(2.5)
    assert load_memory("horowitz-45nm-dram").per_byte("cache") == pytest.approx(243.75)


def test_a_worked_example() -> None:
    """768 x 3072, int8 weights in 1 MB of SRAM, T = 8 at 10 %: the spikes save 73 % by arithmetic and 13 % with weights and membranes."""
    price = pricing("horowitz-45nm-int8", holds={**load_memory().holds, "membranes": "SRAM 1 MB"})
    dense = [replace(linear(768, 3072), traffic=Traffic(weights=768 * 3072, sweep=768 * 3072))]
    sparse = linear(768, 3072, steps=8, rate=0.1)
    train = [replace(sparse, traffic=replace(sparse.traffic, spikes=0)), replace(neurons(3072, 8, 0), traffic=Traffic(membranes=2 * 3072 * 8))]
    assert price.compute(train) / price.compute(dense) == pytest.approx(0.27, abs=0.005)
    both = [price.column("compute and memory", nodes) for nodes in (train, dense)]
    assert both[0] / both[1] == pytest.approx(0.87, abs=0.01)
    assert sum(price.memory_pj(dense).values()) / both[1] > 0.97


def test_moved_and_columns_of_a_report(report: EnergyReport) -> None:
    data = report.to_json()
    assert [row["data"] for row in data["moved"]] == list(CLASSES)
    for side in ("ann", "snn"):
        memory = sum(row[f"{side}_pj"] for row in data["moved"])
        assert memory == pytest.approx(sum(n["memory_pj"] for n in data["nodes"][side]))
        assert memory == pytest.approx(sum(b[f"{side}_memory_pj"] for b in data["blocks"]))
        compute, both, placed = data["total"]["columns"]
        assert both[f"{side}_pj"] == pytest.approx(compute[f"{side}_pj"] + memory)
        assert compute[f"{side}_pj"] == data["total"][f"{side}_pj"]
        assert placed[f"{side}_pj"] is None and "not mapped" in placed["remark"]
    ssa = data["attention"]["columns"][0]
    assert (ssa["ann_pj"], ssa["snn_pj"]) == pytest.approx((data["attention"]["asa_pj"], data["attention"]["ssa_pj"]))
