"""Energy: dense counts against torch's flop counter, a table by hand, attention by loops."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from programs import TOKENS, canonical, nano, rates, spiking
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ntc.energy import EnergyReport, measure_energy
from ntc.meta import NEURON, building
from ntc.observe import Activity, count_by_shape, observe
from ntc.ops import Counts
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.testing import example_ids, tiny_gpt2
from ntc.verify import verify
from ntc_passes.insert_neurons import InsertNeurons

L, C, V = 12, 32, 61  # window, width and vocabulary of the tiny models; 4 heads, T = 4


@pytest.fixture(scope="module")
def report() -> EnergyReport:
    return measure_energy(spiking(), canonical(), TOKENS, batch=3)


# ------------------------------------------------------------------------------------------------ the analog network


@pytest.mark.parametrize(("layers", "batch", "length"), [(1, 1, 24), (2, 3, 7)])
def test_dense_macs_are_those_of_torchs_flop_counter(layers: int, batch: int, length: int) -> None:
    model = tiny_gpt2(n_layer=layers)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example_ids(batch=batch, length=length))
    activity = count_by_shape(canonical(n_layer=layers), [(batch, length)])
    assert 2 * sum(n.counts.dense_macs for n in activity.nodes.values()) == counter.get_total_flops()


def test_the_table_of_a_two_layer_network_by_hand(report: EnergyReport) -> None:
    per_token = {n.name: n.counts * (1 / report.ann.tokens) for n in report.ann.nodes}
    seen = (L + 1) / 2  # keys that a query sees, on average
    expected = {"lm_head": Counts(dense_macs=C * V, macs=C * V)}
    for b in range(2):
        for role in "qkv":
            expected[f"h_{b}_attn_c_attn_{role}"] = Counts(dense_macs=C * C, macs=C * C)
        expected[f"h_{b}_attn_attention"] = Counts(dense_macs=2 * C * L, macs=2 * C * seen, elementwise=3 * 4 * seen)
        expected[f"h_{b}_attn_c_proj"] = Counts(dense_macs=C * C, macs=C * C)
        expected[f"h_{b}_mlp_c_fc"] = expected[f"h_{b}_mlp_c_proj"] = Counts(dense_macs=4 * C * C, macs=4 * C * C)
    for name, counts in expected.items():
        assert asdict(per_token[name]) == pytest.approx(asdict(counts)), name
    assert report.ann.total().macs == pytest.approx(sum(c.macs for c in expected.values())), "nothing else multiplies"
    assert report.to_json()["total"]["ann_pj"] == pytest.approx(4.6 * (24 * C * C + 4 * C * seen + C * V))


def test_counting_by_shape_equals_counting_by_running() -> None:
    for program in (canonical(), nano(layout="separate", kv_heads=2)):
        ran = Activity()
        observe(program, TOKENS.batches(3), ran)
        shapes = count_by_shape(program, [tuple(b.shape) for b in TOKENS.batches(3)])  # type: ignore[misc]
        assert ran.tokens == shapes.tokens == 96
        assert {n: r.counts for n, r in ran.nodes.items()} == {n: r.counts for n, r in shapes.nodes.items()}


def test_counting_by_shape_reads_no_weight() -> None:
    work = canonical(n_layer=1).copy()
    sizes = {n: torch.empty(t.shape, device="meta") for n, t in work.tensors.items()}
    for node in work.graph.nodes:
        if node.op == "get_attr":
            node.target = work.add_tensor("shapes." + node.name, sizes[str(node.target)])
    work.module = work.with_graph(work.graph, {str(n.target): work.tensor(n) for n in work.graph.nodes if n.op == "get_attr"}).module
    found, expected = (count_by_shape(p, [(2, 5)]).nodes for p in (work, canonical(n_layer=1)))
    assert {n: r.counts for n, r in found.items()} == {n: r.counts for n, r in expected.items()}


# ------------------------------------------------------------------------------------------------ the spiking network


def trains(program: Program) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        interpret(program, TOKENS.windows, lambda n, a, v: seen.update({n.name: v}) if NEURON in n.meta else None)
    return seen


def test_accumulates_are_events_times_fan_out(report: EnergyReport) -> None:
    spikes, counted = trains(spiking()), {n.name: n.counts for n in report.snn.nodes}
    for b in range(2):
        assert counted[f"h_{b}_mlp_c_proj"].acs == C * float(spikes[f"h_{b}_mlp_act_spikes"].abs().sum())
        assert counted[f"h_{b}_attn_c_proj"].acs == C * float(spikes[f"h_{b}_attn_attention_ssa_spikes"].abs().sum())
        assert counted[f"h_{b}_mlp_c_proj"].macs == 0
        assert counted[f"h_{b}_mlp_c_fc"].macs == 96 * 4 * C * C, "its input is analog"
        assert counted[f"h_{b}_mlp_act_spikes"].neuron_updates == 96 * 4 * C * 4
    assert report.snn.total().dense_macs == report.ann.total().dense_macs


def test_the_attention_block_by_hand(report: EnergyReport) -> None:
    spikes, acs = trains(spiking()), 0
    for b in range(2):
        q, k, v = (spikes[f"h_{b}_attn_attention_{r}_spikes"].view(4, 8, L, 4, 8) for r in "qkv")  # T, B, L, H, D
        for i in range(L):
            acs += int((q[:, :, i] != 0).sum()) * (i + 1)  # a spike of Q_i is added to the scores of the keys it sees
            for j in range(i + 1):
                score = (q[:, :, i] * k[:, :, j]).sum(-1)
                acs += int(((score != 0) * (v[:, :, j] != 0).sum(-1)).sum())  # and a score to the active channels of V_j
    updates = 2 * 4 * 4 * C  # two blocks, Q K V and output neurons, T = 4
    found = report.attention()
    asa = 4.6 * 2 * 2 * C * (L + 1) / 2
    assert found["ssa_acs"] == pytest.approx(acs / 96)
    assert found["asa_pj"] == pytest.approx(asa)
    assert found["ssa_pj"] == pytest.approx(0.9 * (acs / 96 + updates))
    assert found["reduction"] == pytest.approx(1 - found["ssa_pj"] / asa)
    assert found["steps_times_rate"] == pytest.approx(acs / 96 / (2 * C * (L + 1)))
    wide = found["with_projections"]
    assert wide["asa_pj"] == pytest.approx(asa + 4.6 * 8 * C * C)
    outputs = sum(C * float(spikes[f"h_{b}_attn_attention_ssa_spikes"].abs().sum()) for b in range(2)) / 96
    assert wide["ssa_pj"] == pytest.approx(found["ssa_pj"] + 4.6 * 6 * C * C + 0.9 * outputs)


def test_totals_are_sums_over_nodes_blocks_and_kinds(report: EnergyReport) -> None:
    data = report.to_json()
    for side in ("ann", "snn"):
        total = data["total"][f"{side}_pj"]
        assert sum(n["pj"] for n in data["nodes"][side]) == pytest.approx(total)
        assert sum(b[f"{side}_pj"] for b in data["blocks"]) == pytest.approx(total)
        assert sum(k[f"{side}_pj"] for k in data["kinds"]) == pytest.approx(total)
    assert [b["block"] for b in data["blocks"]] == ["outside", "transformer.h.0", "transformer.h.1"]
    halves = [measure_energy(spiking(), canonical(), type(TOKENS)(TOKENS.windows[s], "half", ""), batch=3) for s in (slice(4), slice(4, 8))]
    together = halves[0].snn.total() * 0.5 + halves[1].snn.total() * 0.5
    assert asdict(together) == pytest.approx(asdict(report.snn.total()))


def test_more_steps_cost_more() -> None:
    found = [measure_energy(spiking(t, n_layer=1), canonical(n_layer=1), TOKENS) for t in (1, 2, 4, 8)]
    totals = [r.to_json()["total"]["snn_pj"] for r in found]
    assert totals == sorted(totals)
    assert len(set(totals)) == 4
    assert [r.snn.total().neuron_updates for r in found] == [t * 256 for t in (1, 2, 4, 8)]
    assert [r.steps for r in found] == [1, 2, 4, 8]


def test_no_spikes_no_accumulates() -> None:
    work = spiking(n_layer=1).copy()
    for neuron in [n for n in work.graph.nodes if NEURON in n.meta]:
        theta = work.tensor(neuron.args[1])
        with building(work.graph, before=neuron, stands_for=[neuron], by="test") as call:
            neuron.update_arg(1, call(work.add_tensor("never", torch.full_like(theta, 1e6))))
            neuron.update_arg(2, call(work.add_tensor("start", torch.full_like(theta, 0.25))))  # not half a threshold
    work.refresh()
    total = measure_energy(work, canonical(n_layer=1), TOKENS).snn.total()
    assert (total.spikes, total.acs) == (0, 0)
    assert total.neuron_updates == 4 * 256


@pytest.mark.parametrize("size", [1, 4, C])
def test_a_leak_costs_multiplications(size: int) -> None:
    """Parallel: one for each non-zero score, or for each coincidence if every channel fades in its own way. Streaming: all of M."""
    work = spiking(n_layer=1).copy()
    product = work.find("h_0_attn_attention_ssa")
    with building(work.graph, before=product, stands_for=[product], by="test") as call:
        product.args = (*product.args[:5], call(work.add_tensor("leak", torch.linspace(0.3, 0.9, size))))
    work.refresh()
    verify(work)
    leaky, plain = (measure_energy(p, canonical(n_layer=1), TOKENS) for p in (work, spiking(n_layer=1)))
    seen = trains(work)
    q, k, v = (seen[f"h_0_attn_attention_{r}_spikes"].view(4, 8, L, 4, 8) for r in "qkv")  # T, B, L, H, D
    scores = torch.einsum("tbihd,tbjhd->tbhij", q, k).tril()  # binary: no coincidences that cancel
    decays = float(scores.sum() if size == C else (scores != 0).sum())
    row = next(n for n in leaky.snn.nodes if n.name == product.name)
    without = next(n for n in plain.snn.nodes if n.name == product.name)
    assert (row.counts.macs, row.counts.acs) == (decays, without.counts.acs)
    adds = float((k.abs().sum(-1) * v.abs().sum(-1)).sum() + q.sum() * 8)
    updates = leaky.snn.total(lambda n: n.name.startswith("h_0_attn_attention_") and n.name.endswith("_spikes")).neuron_updates
    streamed = 4.6 * 4 * 4 * 8 * 8 + 0.9 * (adds / 96 + updates)  # T, H, D, Dv
    assert leaky.attention()["ssa_streaming_pj"] == pytest.approx(streamed)
    assert plain.attention()["ssa_streaming_pj"] == pytest.approx(0.9 * (adds / 96 + updates))


def test_graded_spikes_cost_a_multiplication() -> None:
    unfolded = run_pipeline(rates(n_layer=1), [InsertNeurons()])
    counted = {n.name: n.counts for n in measure_energy(unfolded, canonical(n_layer=1), TOKENS).snn.nodes}
    assert counted["h_0_mlp_c_proj"].acs == 0
    assert counted["h_0_mlp_c_proj"].graded_macs > 0


def test_streaming_and_steps_are_null_where_nothing_spikes() -> None:
    same = measure_energy(canonical(n_layer=1), canonical(n_layer=1), TOKENS)
    attention = same.attention()
    assert attention["reduction"] == 0
    assert attention["steps_times_rate"] is attention["ssa_streaming_pj"] is None
    assert same.to_json()["total"]["reduction"] == 0
