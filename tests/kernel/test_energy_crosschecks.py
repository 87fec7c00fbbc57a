"""Counts against those of others: torch's flop counter on families of decoders, NeuroBench on layers that spikes drive and on a plain network
of linear layers and IF neurons; joules against SpikingJelly's presets.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from energy_cases import pricing
from hypothesis import given
from hypothesis import strategies as st
from integer_programs import VOCABULARY, Builder
from programs import TOKENS, canonical, spiking
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

import ntc
from ntc.energy import load_constants, measure_energy
from ntc.meta import building
from ntc.observe import NodeCounts, count_by_shape
from ntc.ops import Counts, Traffic, aten
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import SpikeType
from ntc.testing import example_ids
from ntc.text import Tokens, random_tokens
from ntc_passes.canonicalize import Canonicalize

ops = torch.ops.ntc

_LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24,
}  # fmt: skip


def test_dense_macs_of_a_llama_are_those_of_torchs_flop_counter() -> None:
    """All layers, grouped attention included, and the outer product that makes the angles of rotary embeddings."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)).eval()
    analog = run_pipeline(ntc.capture(model, example_ids()), [Canonicalize()])
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example_ids(batch=2, length=9))
    nodes = count_by_shape(analog, [(2, 9)]).nodes.values()
    assert all(n.countable for n in nodes)
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 61
    assert sum(n.counts.dense_macs for n in nodes if n.kind == "projection" and n.op == "linear") == 18 * layers
    assert 2 * sum(n.counts.dense_macs for n in nodes) == counter.get_total_flops()


def test_neurobench_counts_the_same_operations() -> None:
    """Effective ACs of layers that spikes drive, effective MACs of those that analog values drive, layer by layer."""
    layers = pytest.importorskip("neurobench.metrics.utils.layers", reason="NeuroBench is not installed: pip install --no-deps neurobench")
    program = spiking().copy()
    layer_in = program.find("h_0_mlp_c_fc")
    pruned = program.tensor(layer_in.args[1]).clone()
    pruned[:, ::3] = 0  # effective MACs leave zero weights out
    with building(program.graph, before=layer_in, stands_for=[layer_in], by="test") as call:
        layer_in.update_arg(1, call(program.add_tensor("pruned", pruned)))
    program.refresh()
    # One batch, as below: sums of other sizes may be rounded otherwise, and a spike at its threshold falls.
    ours = {n.name: n for n in measure_energy(program, canonical(), TOKENS, batch=len(TOKENS.windows)).snn.nodes}
    theirs: dict[str, tuple[float, bool]] = {}

    def visit(node: Node, args: tuple[Any, ...], value: Tensor) -> None:
        if node.target is not aten.linear.default:
            return
        layer = nn.Linear(args[1].shape[1], args[1].shape[0], bias=False)
        layer.weight = nn.Parameter(args[1].detach().clone())
        spikes = isinstance(node.args[0].meta["ntc.type"], SpikeType)
        steps = args[0] if spikes else args[0][None]
        found = [layers.single_layer_MACs(x.flatten(0, -2), layer) for x in steps]
        theirs[node.name] = (sum(float(n) for n, _ in found), spikes)

    with torch.no_grad():
        interpret(program, TOKENS.windows, visit)
    assert {spikes for _, spikes in theirs.values()} == {True, False}
    for name, (operations, spikes) in theirs.items():
        assert (ours[name].effective_acs if spikes else ours[name].effective_macs) == operations, name
    assert ours["h_0_mlp_c_fc"].effective_macs < 0.7 * ours["h_0_mlp_c_fc"].counts.macs
    assert sum(n.effective_acs for n in ours.values()) < sum(n.counts.acs for n in ours.values()), "a channel has no weights"


# ------------------------------------------------------------------------------------------------ a plain linear-and-IF network

STEPS, WIDTHS = 4, (8, 24, VOCABULARY)


class IF(nn.Module):
    """Integrate and fire as torch modules have it: one call is one time step, reset by subtraction."""

    def __init__(self, threshold: Tensor, start: float) -> None:
        super().__init__()
        self.threshold, self.start = threshold, start
        self.v: Tensor | None = None

    def forward(self, current: Tensor) -> Tensor:
        v = (self.start * self.threshold if self.v is None else self.v) + current
        spikes = (v >= self.threshold).float()
        self.v = v - spikes * self.threshold
        return spikes


def plain_network(spikes: bool) -> tuple[Program, Tensor, list[Tensor]]:
    """linear -> IF (or ReLU) -> linear in our dialect behind a table of inputs, that table, and the weights: a fifth of them zero."""
    random = torch.Generator().manual_seed(5)
    table = torch.rand(VOCABULARY, WIDTHS[0], generator=random) * (torch.rand(VOCABULARY, WIDTHS[0], generator=random) < 0.7)
    weights = [
        torch.randint(-3, 5, (o, i), generator=random) / 8 * (torch.rand(o, i, generator=random) < 0.8)
        for i, o in pairwise(WIDTHS)
    ]  # fmt: skip
    b = Builder(table)
    current = b.call(aten.linear.default, b.embedded, weights[0], name="first")
    if not spikes:
        return b.program(b.call(aten.linear.default, b.call(aten.relu.default, current), weights[1])), table, weights
    train = b.call(ops.integrate_fire.default, current, torch.ones(1), torch.full((1,), 0.5), STEPS, False, False, "atan", 1.0)
    last = b.call(aten.linear.default, train, weights[1], name="last")
    return b.program(b.call(ops.decode.default, last, "rate")), table, weights


def test_neurobench_and_ntc_count_a_plain_network_alike() -> None:
    """The same weights as torch modules under NeuroBench's own metric: effective ACs, effective MACs, and dense operations of each step."""
    pytest.importorskip("neurobench", reason="NeuroBench is not installed: pip install --no-deps neurobench")
    from neurobench.metrics.workload import SynapticOperations
    from neurobench.models import TorchModel

    program, table, weights = plain_network(True)
    windows = random_tokens(VOCABULARY, 9, 36).windows
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights]
    for layer, w in zip(layers, weights):
        layer.weight = nn.Parameter(w)
    network, neuron = TorchModel(nn.Sequential(layers[0], IF(torch.ones(1), 0.5), layers[1])), 1
    metric, total = SynapticOperations(), {"Effective_MACs": 0.0, "Effective_ACs": 0.0, "Dense": 0.0}
    network.register_hooks()
    values = table[windows.flatten()]  # each token is a sample
    with torch.no_grad():
        outputs = []
        for _ in range(STEPS):
            network.reset_hooks()
            outputs.append(network(values))
            found = metric(network, outputs[-1], (values, None))
    assert isinstance(network.net[neuron], IF)
    total = {key: number * metric.total_samples / len(values) for key, number in found.items()}  # per token, over all steps
    ours = measure_energy(program, plain_network(False)[0], Tokens(windows, "drawn", ""), batch=len(windows)).neurobench()["synaptic_operations"]
    torch.testing.assert_close(program(windows).flatten(0, 1), torch.stack(outputs).mean(0))
    assert ours["Effective_ACs"] == pytest.approx(total["Effective_ACs"], rel=1e-12) and ours["Effective_ACs"] > 20
    # The first layer has a constant input: its product is taken once, not at each step. NeuroBench sees the module called T times.
    assert ours["Effective_MACs"] == pytest.approx(total["Effective_MACs"] / STEPS, rel=1e-12) and ours["Effective_MACs"] > 20
    first, last = (w.numel() for w in weights)
    assert total["Dense"] == STEPS * (first + last) and ours["Dense"] == first + STEPS * last


# ------------------------------------------------------------------------------------------------ SpikingJelly's presets

# SpikingJelly 2.0.0 (Apache-2.0), activation_based/op_counter/simple_energy.py, SimpleEnergyCostConfig: pJ per MAC, per AC, per byte of
# parameters read and of neuron states read and written. E = e_mac MACs + e_ac ACs + e_memory bytes.
SPIKINGJELLY = {"fp32": (4.6, 0.9, 24.96), "fp16": (1.5, 0.4, 24.96), "int8": (0.23, 0.03, 24.96)}


@pytest.mark.parametrize("preset", ["fp32", "int8"])
@given(macs=st.integers(0, 10**9), acs=st.integers(0, 10**9), updates=st.integers(0, 10**6), read=st.integers(0, 10**9))
def test_joules_are_those_of_spikingjellys_presets(preset: str, macs: int, acs: int, updates: int, read: int) -> None:
    mac, ac, byte = SPIKINGJELLY[preset]
    width = {"fp32": 4, "int8": 1}[preset]
    counts, moved = Counts(macs=macs, acs=acs, neuron_updates=updates, elementwise=7), Traffic(weights=read, sweep=read, membranes=2 * updates)
    moved = replace(moved, activations=5, spikes=6, cache=7)  # which that tool does not count
    node = NodeCounts("n", "linear", "", "", "projection", counts, {}, True, moved, 4)
    price = pricing(f"spikingjelly-2.0-{preset}", "spikingjelly-2.0")
    assert price.column("compute", [node]) == pytest.approx(mac * macs + ac * (acs + updates))
    whole = mac * macs + ac * (acs + updates) + byte * width * (read + 2 * updates)
    assert price.column("compute and memory", [node]) == pytest.approx(whole)


def test_our_tables_and_spikingjellys_presets_agree_where_they_mean_the_same() -> None:
    for preset, level in (("fp32", "nominal"), ("fp16", "nominal"), ("int8", "low")):
        table = load_constants(f"horowitz-45nm-{preset}").at(level)  # type: ignore[arg-type]
        assert (table.mac, table.ac) == pytest.approx(SPIKINGJELLY[preset][:2]), preset


def test_the_presets_are_those_of_the_installed_spikingjelly() -> None:
    module = pytest.importorskip("spikingjelly.activation_based.op_counter.simple_energy", reason="SpikingJelly is not installed")
    for preset, expected in SPIKINGJELLY.items():
        found = getattr(module.SimpleEnergyCostConfig, preset)()
        assert (found.e_mac_pj, found.e_ac_pj, found.e_memory_pj_per_byte) == expected
