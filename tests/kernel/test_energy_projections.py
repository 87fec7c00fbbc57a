"""Which linear layers belong to attention: read off the graph and not off names."""

from __future__ import annotations

import pytest
import torch
from programs import CONTEXT, TOKENS, nano
from torch import Tensor, nn
from torch.nn import functional

import ntc
from ntc.energy import measure_energy
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.recipe import Settings
from ntc.registry import find_pass, recipe
from ntc.testing import example_ids
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.fold_thresholds import FoldThresholds
from ntc_passes.insert_neurons import InsertNeurons
from ntc_passes.replace_attention import ReplaceAttention

C, V = 32, 61  # width and vocabulary of the tiny models


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
