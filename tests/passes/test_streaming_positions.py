"""To-streaming: positions are recognized by what they are; what mixes tokens otherwise is refused, and what the pass forgets is found."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from streaming_cases import LENGTH, in_pieces, streaming, variant
from torch import Tensor, nn

import ntc
import ntc_passes.to_streaming as module
from ntc.errors import PassError
from ntc.pipeline import exact_limit, run_pipeline
from ntc.program import Program
from ntc.testing import NanoGPT, example_ids
from ntc_passes.canonicalize import Canonicalize


class Decoder(nn.Module):
    """A small decoder that makes positions in its own way."""

    def __init__(self, positions: str) -> None:
        super().__init__()
        self.inner, self.positions = NanoGPT(layers=1, mask="sdpa"), positions
        self.register_buffer("table", torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(3)))

    def forward(self, ids: Tensor) -> Tensor:
        length, x = ids.shape[1], self.inner.wte(ids)
        if self.positions == "arange":
            x = x + self.inner.wpe(torch.arange(0, length).unsqueeze(0))
        elif self.positions == "cumsum":
            x = x + self.inner.wpe(torch.ones(1, length, dtype=torch.long).cumsum(1) - 1)
        elif self.positions == "from one":
            x = x + torch.sin(0.3 * torch.ones(1, length).cumsum(1))[..., None]
        elif self.positions == "slice":
            x = x + self.inner.wpe.weight[:length]
        elif self.positions == "buffer":
            x = x + self.table[:, :length, :]
        elif self.positions == "angles":
            x = x + torch.sin(torch.arange(length, dtype=torch.float32)[:, None] * torch.linspace(0.01, 1, 32))
        elif self.positions == "twice":
            numbers = torch.arange(length)
            x = x + self.inner.wpe(numbers) + self.table[0, :length] * torch.cos(numbers * 0.3)[:, None]
        elif self.positions == "share":
            x = x + (torch.arange(length) / length)[None, :, None]
        elif self.positions == "backwards":
            x = x + self.inner.wpe(length - 1 - torch.arange(length))
        elif self.positions == "mean":
            x = x + x.cumsum(1)
        for block in self.inner.h:
            x = block(x, ids)
        return self.inner.lm_head(self.inner.ln_f(x))


@cache
def decoder(positions: str) -> Program:
    return run_pipeline(ntc.capture(Decoder(positions).eval(), example_ids()), [Canonicalize()])


@pytest.mark.parametrize("positions", ["none", "arange", "cumsum", "from one", "slice", "buffer", "angles", "twice"])
def test_positions_are_recognized_by_what_they_are(positions: str) -> None:
    after = streaming(decoder(positions))
    assert after.history[-1].sites == 1 + {"none": 0, "twice": 2}.get(positions, 1)
    ids = example_ids(length=LENGTH)
    with torch.no_grad():
        expected = decoder(positions)(ids)
    for cuts in ({1, 2, 3}, {20}):
        _, found = in_pieces(after, ids, cuts)
        assert float((found - expected).abs().max()) <= exact_limit(float(expected.abs().max()))


def test_rotary_embeddings_move_on() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         vocab_size=61, max_position_embeddings=24)  # fmt: skip
    parallel = run_pipeline(ntc.capture(LlamaForCausalLM(config).eval()), [Canonicalize()])
    after, ids = streaming(parallel), example_ids(length=LENGTH)
    with torch.no_grad():
        expected = parallel(ids)
    _, found = in_pieces(after, ids, {4, 5, 19})
    assert float((found - expected).abs().max()) <= exact_limit(float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("positions", "node"), [("mean", r"aten\.cumsum"), ("share", r"aten\.div"), ("backwards", r"aten\.(sub|rsub|add)")]
)
def test_what_mixes_tokens_otherwise_is_refused_where_it_stands(positions: str, node: str) -> None:
    with pytest.raises(PassError, match=rf"({node})\S* has no streaming form: given the next tokens alone it differs .* at node %\w+"):
        streaming(decoder(positions))


def test_attention_that_is_not_causal_is_refused() -> None:
    program = run_pipeline(ntc.capture(NanoGPT(layers=1, mask="none"), example_ids()), [Canonicalize()])
    with pytest.raises(PassError, match=r"has no streaming form: .* at node %\w+ \(h\.0\.attn"):
        streaming(program)


def test_a_program_that_is_not_canonical_is_refused() -> None:
    with pytest.raises(PassError, match="to-streaming needs a program that is canonical"):
        streaming(ntc.capture(NanoGPT(layers=1), example_ids()))


FORMS = torch.ops.ntc


@pytest.mark.parametrize("lost", [FORMS.position_scale.default, FORMS.spiking_attention.default, FORMS.row_sum_scale.default, None])
def test_the_check_finds_what_the_pass_forgets(lost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the rewrites left out, and the positions: the check names the node that lacks it."""
    program = variant("row-sum" if lost is FORMS.row_sum_scale.default else "position")
    if lost is None:
        monkeypatch.setattr(module, "shift_positions", lambda *_: 0)
        where = "wpe"
    else:
        monkeypatch.setattr(module, "_FORMS", {k: v for k, v in module._FORMS.items() if k is not lost})
        where = "ssa" if lost is FORMS.spiking_attention.default else "scaled"
    with pytest.raises(PassError, match=rf"has no streaming form: .* at node %\w*{where}"):
        streaming(program)


def test_the_check_finds_a_wrong_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly(edit: Any, node: torch.fx.Node) -> None:
        *rest, leak = node.args
        wrong = edit.program.tensor(leak).detach() * 0.99
        with ntc.meta.building(edit.program.graph, before=node, stands_for=[node], by="test") as call:
            node.args = (*rest, call(edit.program.add_tensor("wrong", wrong)))
        module._spiking_attention(edit, node)

    monkeypatch.setitem(module._FORMS, FORMS.spiking_attention.default, slightly)
    with pytest.raises(PassError, match=r"given the next tokens alone it differs .* at node %h_0_attn_attention_ssa"):
        streaming(variant("leak"))
