"""Block and sublayer outputs: against what forward hooks see in the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import canonical, rates, spiking
from torch import Tensor, nn

import ntc
from ntc.blocks import block_outputs, layer_outputs
from ntc.meta import TYPE
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.spike_type import ANALOG
from ntc.testing import NanoGPT, example_ids, tiny_gpt2
from ntc_passes.canonicalize import Canonicalize

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "gpt2-books"


def hooked(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What the named modules return."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given, result: seen.update({name: result if isinstance(result, Tensor) else result[0]})

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def value(program: Program, node: torch.fx.Node) -> Tensor:
    with torch.no_grad():
        return interpret(program, program.example, lambda *_: None, last=node)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, vocab_size=61, max_position_embeddings=24)).eval()  # fmt: skip


def neox(*, parallel: bool = True) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
                                            max_position_embeddings=24, use_parallel_residual=parallel)).eval()  # fmt: skip


def post_norm() -> nn.Module:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=24)).eval()


@pytest.mark.parametrize(
    ("make", "block", "attention", "ffn"),
    [
        (tiny_gpt2, "transformer.h", "attn", "mlp"),
        (llama, "model.layers", "self_attn", "mlp"),
        (neox, "gpt_neox.layers", "attention", "mlp"),
        (lambda: neox(parallel=False), "gpt_neox.layers", "attention", "mlp"),
        (post_norm, "transformer.h", "attn", "mlp"),
        (NanoGPT, "h", "attn", "mlp"),
    ],
    ids=["gpt2", "llama", "parallel", "serial-neox", "post-norm", "hand-written"],
)
def test_the_nodes_are_the_results_of_the_modules(make: Callable[[], nn.Module], block: str, attention: str, ffn: str) -> None:
    model = make()
    captured = ntc.capture(model, example_ids() if isinstance(model, NanoGPT) else None)
    modules = {"attention": f".{attention}", "ffn": f".{ffn}", "block": ""}
    seen = hooked(model, [f"{block}.{i}{part}" for i in (0, 1) for part in modules.values()], captured.example)
    for program in (captured, run_pipeline(captured, [Canonicalize()])):
        outputs = block_outputs(program)
        assert list(outputs) == [f"{block}.0", f"{block}.1"]
        layers = layer_outputs(program)
        places = [(found.block, found.where) for found in layers]
        assert sorted(places) == sorted((f"{block}.{i}", where) for i in (0, 1) for where in ("attention", "ffn", "block"))
        for found in layers:
            torch.testing.assert_close(value(program, found.node), seen[found.block + modules[found.where]], rtol=1e-4, atol=1e-5)
        assert [found.node for found in layers if found.where == "block"] == list(outputs.values())


class SumsOutside(nn.Module):
    """A model whose own forward adds what the sublayers of its blocks return."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        inner = NanoGPT()
        self.together = together
        self.wte, self.wpe, self.blocks, self.ln_f, self.lm_head = inner.wte, inner.wpe, inner.h, inner.ln_f, inner.lm_head

    def stream(self, ids: Tensor) -> list[Tensor]:
        x = [self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))]
        for block in self.blocks:
            if self.together:
                x.append(x[-1] + (block.attn(block.ln_1(x[-1]), ids) + block.mlp(block.ln_2(x[-1]))))
            else:
                middle = x[-1] + block.attn(block.ln_1(x[-1]), ids)
                x.append(middle + block.mlp(block.ln_2(middle)))
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.ln_f(self.stream(ids)[-1]))


@pytest.mark.parametrize("together", [False, True])
def test_sums_outside_of_the_blocks_are_found(together: bool) -> None:
    model = SumsOutside(together=together).eval()
    program = ntc.capture(model, example_ids())
    outputs = block_outputs(program)
    assert list(outputs) == ["blocks.0", "blocks.1"]
    with torch.no_grad():
        expected = model.stream(program.example)[1:]
    for node, x in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(value(program, node), x, rtol=1e-4, atol=1e-5)
    assert [found.where for found in layer_outputs(program)] == ["attention", "ffn", "block"] * 2


class SumFirst(nn.Module):
    """A parallel block that adds attention and FFN to each other before it adds them to the stream."""

    def __init__(self) -> None:
        super().__init__()
        block = NanoGPT(layers=1).h[0]
        self.ln, self.attn, self.mlp = block.ln_1, block.attn, block.mlp

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.ln(x)
        return x + (self.attn(h, ids) + self.mlp(h))


def test_attention_and_ffn_that_are_added_to_each_other_first() -> None:
    model = NanoGPT()
    model.h = nn.ModuleList(SumFirst() for _ in range(2))
    program = ntc.capture(model.eval(), example_ids())
    layers = layer_outputs(program)
    assert sorted((found.block, found.where) for found in layers) == sorted(
        (f"h.{i}", where) for i in (0, 1) for where in ("attention", "ffn", "block")
    )
    seen = hooked(model, [f"h.{i}{part}" for i in (0, 1) for part in ("", ".attn", ".mlp")], program.example)
    for found in layers:
        part = {"attention": ".attn", "ffn": ".mlp", "block": ""}[found.where]
        torch.testing.assert_close(value(program, found.node), seen[found.block + part], rtol=1e-4, atol=1e-5)


def test_every_form_of_a_model_has_the_same_places() -> None:
    forms = [ntc.capture(tiny_gpt2()), canonical(), rates(), spiking()]
    places = [[(found.block, found.where) for found in layer_outputs(form)] for form in forms]
    assert places[0] == [(f"transformer.h.{i}", where) for i in (0, 1) for where in ("attention", "ffn", "block")]
    assert places[1:] == places[:1] * 3
    for form in forms[1:]:
        assert {found.node.meta[TYPE] for found in layer_outputs(form)} == {ANALOG}
        assert {form.shape_text(found.node) for found in layer_outputs(form)} == {"[B, L, 32]"}


def test_a_spiking_stream_is_the_sum_of_what_is_found() -> None:
    """What leaves block 1 is what left block 0 plus the two terms: nothing is missed and nothing counted twice."""
    program = spiking()
    at = {(found.block, found.where): value(program, found.node) for found in layer_outputs(program)}
    before, block = at["transformer.h.0", "block"], "transformer.h.1"
    torch.testing.assert_close(at[block, "block"], before + at[block, "attention"] + at[block, "ffn"])


def test_the_reference_model() -> None:
    outputs = block_outputs(ntc.capture(REFERENCE))
    assert list(outputs) == [f"transformer.h.{i}" for i in range(4)]


def test_a_model_without_blocks_has_none() -> None:
    model = nn.Sequential(nn.Embedding(61, 16), nn.Linear(16, 61))
    program = ntc.capture(model, example_ids())
    assert block_outputs(program) == {}
    assert layer_outputs(program) == ()
