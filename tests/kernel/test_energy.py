"""Energy: dense counts against torch's flop counter, a table by hand, attention by loops, nothing skipped in silence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import CONTEXT, TOKENS, canonical, nano, rates, spiking
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import ntc
from ntc.energy import Constants, EnergyReport, load_constants, measure_energy
from ntc.errors import ConfigError, DataError
from ntc.meta import NEURON, building
from ntc.observe import Activity, count_by_shape, observe
from ntc.ops import Counts
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import NanoGPT, count_ops, example_ids, tiny_gpt2
from ntc.text import random_tokens
from ntc.verify import verify
from ntc_passes.calibrate import Calibrate
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.convert_ffn import ConvertFfn
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention

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


# ------------------------------------------------------------------------------------------------ whose projections


class Inline(nn.Module):
    """Attention and FFN in the forward of one block, or attention in a module below its projections."""

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.view(*t.shape[:2], 4, 8).transpose(1, 2) for t in (q, k, v))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).reshape(*y.shape[:1], -1, C)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
            self.up, self.down, self.norm, self.core = nn.Linear(C, 64), nn.Linear(64, C), nn.LayerNorm(C), Inline.Core()

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm(x)
            x = x + self.out(self.core(self.q(n), self.k(n), self.v(n)))
            return x + self.down(functional.gelu(self.up(self.norm(x))))

    class Flat(Block):
        """The same, and the attention in the block's own forward."""

        def __init__(self) -> None:
            super().__init__()
            del self.core

        def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
            return Inline.Core.forward(None, q, k, v)  # type: ignore[arg-type]

    class Bare(Block):
        """The same with queries that no layer projects: the layers before them are those of another block."""

        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Identity()

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.h, self.head = nn.Embedding(V, C), nn.ModuleList([block(), block()]), nn.Linear(C, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(x)


def neurtransformer(model: nn.Module) -> tuple[Program, Program]:
    analog = run_pipeline(ntc.capture(model, example_ids()), [Canonicalize()])
    passes = recipe("neurtransformer").build(Settings(), find_pass)[1:]
    return run_pipeline(analog, passes, CONTEXT), analog


@pytest.mark.parametrize("block", [Inline.Block, Inline.Flat, Inline.Bare])
def test_projections_are_found_in_the_graph_and_not_by_module_names(block: type[nn.Module]) -> None:
    found = measure_energy(*neurtransformer(Inline(block)), TOKENS)
    layers = ("k", "v", "out") if block is Inline.Bare else ("q", "k", "v", "out")
    expected = {f"h_{b}_{r}" for b in range(2) for r in layers}
    assert found.ann.attention_projections == found.snn.attention_projections == expected
    attention = found.attention()
    assert attention["with_projections"]["asa_pj"] - attention["asa_pj"] == pytest.approx(4.6 * len(expected) * C * C)


@pytest.mark.parametrize("output", ["current", "spikes"])
def test_projections_of_fused_and_separate_layers(output: str) -> None:
    for config in ({}, {"layout": "separate", "kv_heads": 2, "scaled": "query"}):
        analog = nano(**config)
        program = run_pipeline(analog, [ReplaceAttention.configure({"output": output}), FoldThresholds(), InsertNeurons()], CONTEXT)
        found = measure_energy(program, analog, TOKENS)
        for side in (found.ann, found.snn):
            assert len(side.attention_projections) == 4
            assert not any("mlp" in name or "lm_head" in name for name in side.attention_projections)


# ------------------------------------------------------------------------------------------------ nothing is skipped


class Unregistered(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.wte, self.fc, self.proj, self.head = nn.Embedding(V, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, V)
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.taps = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.proj(torch.relu(self.fc(x)))
        if self.kind == "einsum":
            x = torch.einsum("blc,dc->bld", x, self.mix)
        elif self.kind == "baddbmm":
            x = torch.baddbmm(x, x, self.mix.expand(x.shape[0], 8, 8))
        else:
            x = functional.conv1d(functional.pad(x.transpose(1, 2), (2, 0)), self.taps).transpose(1, 2)
        return self.head(x)


@pytest.mark.parametrize(("kind", "macs"), [("einsum", 64), ("baddbmm", 64), ("conv", 3 * 64)])
def test_an_op_without_a_rule_is_listed_with_its_share(kind: str, macs: int) -> None:
    analog = run_pipeline(ntc.capture(Unregistered(kind), example_ids()), [Canonicalize()])
    program = run_pipeline(analog, [Calibrate(), ConvertFfn(), FoldThresholds(), InsertNeurons()], CONTEXT)
    found = measure_energy(program, analog, TOKENS, batch=3)
    rows = [r for r in found.uncounted() if r["macs"]]
    assert [(r["side"], r["op"].split(".")[0]) for r in rows] == [("ann", rows[0]["op"]), ("snn", rows[0]["op"])]
    assert kind in rows[0]["op"]
    assert [r["macs"] for r in rows] == [macs, macs]
    counted = 2 * 8 * 16 + 8 * V
    assert found.snn.total().dense_macs == counted
    assert found.uncounted_share() == pytest.approx(macs / (macs + counted))
    assert found.to_json()["uncounted"] == found.uncounted()
    found.require_counted(macs / (macs + counted))
    with pytest.raises(DataError, match=rf"% of the dense multiply-accumulates are not counted, and 1 % are allowed: .* of {kind}\w* \(%"):
        found.require_counted(0.01)


def test_a_gpt2_has_nothing_uncounted(report: EnergyReport) -> None:
    assert report.uncounted() == []
    assert report.uncounted_share() == 0
    assert set(count_ops(spiking())) == {n.op for n in report.snn.nodes}, "every op of the graph has its row"


# ------------------------------------------------------------------------------------------------ constants and report


def test_the_constants_that_ship() -> None:
    constants = load_constants()
    assert (constants.mac, constants.ac, constants.graded_mac, constants.update) == (4.6, 0.9, 4.6, 0.9)
    assert "ISSCC 2014" in constants.source
    assert constants.cost(Counts(macs=1, acs=10, graded_macs=100, neuron_updates=1000, elementwise=1e9)) == pytest.approx(4.6 + 9 + 460 + 900)


GOOD = 'id = "x"\ntitle = "t"\nsource = "s"\nscope = "c"\n[picojoules]\nmac = 2\nac = 1\ngraded_mac = 2\nupdate = 0\n'


def test_other_constants(tmp_path: Path, report: EnergyReport) -> None:
    path = tmp_path / "c.toml"
    path.write_text(GOOD)
    assert load_constants(path) == Constants("x", "t", "s", "c", 2, 1, 2, 0)
    other = measure_energy(spiking(), canonical(), TOKENS, load_constants(path))
    assert other.to_json()["total"]["ann_pj"] == pytest.approx(2 * report.ann.total().macs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "is no table of energy constants"),
        ("", "is no table of energy constants: 'picojoules'"),
        (GOOD.replace("ac = 1\n", "", 1), "is no table of energy constants"),
        (GOOD + "leak = 3\n", "is no table of energy constants"),
        (GOOD.replace("mac = 2", 'mac = "much"', 1), "is no table of energy constants"),
        (GOOD.replace("mac = 2", "mac = -2", 1), "give -2.0 pJ for mac: it must be finite and not negative"),
        (GOOD.replace("mac = 2", "mac = nan", 1), "give nan pJ for mac"),
        (GOOD.replace("update = 0", "update = inf"), "give inf pJ for update"),
        ('picojoules = 3\nid = "x"', "is no table of energy constants"),
    ],
)
def test_bad_constants(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_constants(path)


def test_constants_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the energy constants .*absent.toml: No such file"):
        load_constants(tmp_path / "absent.toml")


def test_the_report_has_the_keys_that_are_promised(report: EnergyReport) -> None:
    data: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"asa_pj", "ssa_pj", "reduction", "with_projections"} <= data["attention"].keys()
    assert {"ann_pj", "snn_pj", "reduction"} <= data["total"].keys()
    assert (data["steps"], data["tokens"], data["window"], data["unit"]) == (4, 96, 12, "pJ per token")
    assert data["data_sha256"] == TOKENS.sha256
    assert data["constants"]["id"] == "horowitz-45nm-fp32"


def test_windows_that_do_not_fit_and_progress() -> None:
    with pytest.raises(DataError, match="25 tokens are more than the model's context of 24"):
        measure_energy(spiking(), canonical(), random_tokens(V, 25, 50))
    calls: list[tuple[int, int]] = []
    measure_energy(spiking(n_layer=1), canonical(n_layer=1), TOKENS, batch=3, progress=lambda *a: calls.append(a))
    assert calls == [(3, 8), (6, 8), (8, 8)]


def test_a_hand_written_network_counts_as_the_same_gpt2() -> None:
    ours, theirs = (count_by_shape(p, [(2, 9)]) for p in (run_pipeline(ntc.capture(NanoGPT(), example_ids()), [Canonicalize()]), canonical()))
    assert sum(n.counts.macs for n in ours.nodes.values()) == sum(n.counts.macs for n in theirs.nodes.values())
