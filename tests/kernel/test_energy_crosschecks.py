"""Counts against those of others: torch's flop counter on families of decoders, NeuroBench on layers that spikes drive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from programs import TOKENS, canonical, spiking
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

import ntc
from ntc.energy import measure_energy
from ntc.meta import building
from ntc.observe import count_by_shape
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import interpret
from ntc.spike_type import SpikeType
from ntc.testing import example_ids
from ntc_passes.canonicalize import Canonicalize

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
