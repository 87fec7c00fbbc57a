"""fold-norms: gains, biases and means in the weights beside them, exactly; what shares a weight is untied and said."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from family_cases import analog
from programs import canonical
from test_canonicalize import tail
from torch.nn import functional

from ntc.errors import ConfigError
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import Program, interpret
from ntc.testing import check_pass, count_ops
from ntc_passes.canonicalize import Canonicalize
from ntc_passes.fold_norms import FoldNorms
from ntc_passes.residual import residual_stream, streams

NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@cache
def tailed(body, **parameters) -> Program:
    return run_pipeline(tail(body, **parameters), [Canonicalize()])


def norms(program: Program) -> list:
    return [n for n in program.graph.nodes if n.target in NORMS]


def test_gains_of_rms_norms_go_into_every_reader() -> None:
    program = analog("llama")
    after = check_pass(FoldNorms(), program, ops_before={"rms_norm": 5}, ops_after={"rms_norm": 5, "linear": 15}, sites=5, missed=[])
    assert all(n.args[2] is None and n.args[3] == 1e-6 for n in norms(after))
    assert after.tensors.keys() == program.tensors.keys() - {str(n.args[2].target) for n in norms(program)}, "names stay"
    for norm, readers in (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                          ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))):  # fmt: skip
        gain = program.tensor(f"model.layers.1.{norm}.weight")
        for reader in readers:
            name = f"model.layers.1.{reader}.weight"
            torch.testing.assert_close(after.tensor(name), program.tensor(name) * gain, rtol=1e-6, atol=0)
    assert "untied" not in after.history[-1].notes


def test_layer_norms_become_rms_norms_of_a_stream_without_mean() -> None:
    program = canonical()
    after = check_pass(FoldNorms(), program, ops_before={"layer_norm": 5}, ops_after={"layer_norm": 0, "rms_norm": 5}, sites=10, missed=[])
    assert all(n.args[2] is None and n.args[3] == 1e-5 for n in norms(after))
    members, means = {n.name for n in residual_stream(after).members}, []

    def visit(node, args, value):
        if node.name in members:
            means.append(float(value.mean(-1).abs().max() / value.std()))

    with torch.no_grad():
        interpret(after, after.example, visit)
    assert len(means) == 11 and max(means) < 1e-6
    gain, bias = (program.tensor(f"transformer.h.0.ln_1.{leaf}").double() for leaf in ("weight", "bias"))
    w, c = (program.tensor(f"transformer.h.0.attn.c_attn.q.{leaf}").double() for leaf in ("weight", "bias"))
    torch.testing.assert_close(after.tensor("transformer.h.0.attn.c_attn.q.weight"), (w * gain).float())
    torch.testing.assert_close(after.tensor("transformer.h.0.attn.c_attn.q.bias"), (c + w @ bias).float())
    w, c = (program.tensor(f"transformer.h.0.mlp.c_proj.{leaf}").double() for leaf in ("weight", "bias"))
    torch.testing.assert_close(after.tensor("transformer.h.0.mlp.c_proj.weight"), (w - w.mean(0)).float())
    torch.testing.assert_close(after.tensor("transformer.h.0.mlp.c_proj.bias"), (c - c.mean()).float())


def test_a_tied_embedding_is_untied_and_said() -> None:
    program = canonical()
    after = run_pipeline(program, [FoldNorms()])
    assert after.history[-1].notes["untied"] == {"transformer.wte.weight": ["lm_head.weight", "transformer.wte.weight"]}
    embedding, gain = program.tensor("transformer.wte.weight"), program.tensor("transformer.ln_f.weight")
    torch.testing.assert_close(after.tensor("lm_head.weight"), embedding * gain)
    torch.testing.assert_close(after.tensor("lm_head.bias"), embedding @ program.tensor("transformer.ln_f.bias"))
    torch.testing.assert_close(after.tensor("transformer.wte.weight"), embedding - embedding.mean(-1, keepdim=True))
    one = run_pipeline(analog("smollm3"), [FoldNorms()])
    assert one.history[-1].notes["untied"] == {"model.embed_tokens.weight": ["lm_head.weight"]}
    assert torch.equal(one.tensor("model.embed_tokens.weight"), analog("smollm3").tensor("model.embed_tokens.weight"))


def test_means_may_stay() -> None:
    after = check_pass(FoldNorms(FoldNorms.Options(centre=False)), canonical(), ops_after={"layer_norm": 5, "rms_norm": 0}, sites=5, missed=[])
    assert all(n.args[2] is None and n.args[3] is None for n in norms(after))


def test_parallel_blocks() -> None:
    check_pass(FoldNorms(), analog("gpt-neox"), ops_before={"layer_norm": 3}, ops_after={"rms_norm": 3}, sites=6, missed=[])


def test_norms_of_heads_and_norms_behind_layers_are_left_alone() -> None:
    after = check_pass(FoldNorms(), analog("qwen3"), sites=3, missed=["it norms single heads, and what follows is no linear layer"] * 2)
    assert sum(n.args[2] is None for n in norms(after)) == 3
    beside = "its result goes into %"
    after = check_pass(FoldNorms(), analog("olmo2"), sites=1, missed=[beside] * 4)
    assert sum(n.args[2] is None for n in norms(after)) == 1, "the last one, in front of the head"


def test_a_weight_of_two_norms_becomes_two_and_of_one_stays_one() -> None:
    def body(m, x):
        first = functional.rms_norm(x, [16], m.a, 1e-6)
        second = functional.rms_norm(x, [16], m.b, 1e-6)
        return functional.linear(first, m.w) + functional.linear(second, m.w) + functional.linear(first, m.w)

    after = check_pass(FoldNorms(), tailed(body, a=(16,), b=(16,), w=(16, 16)), sites=2, missed=[])
    assert after.history[-1].notes["untied"] == {"w": ["w", "w_1"]}
    assert sorted(after.tensors) == ["w", "w_1", "wte.weight"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: functional.linear(functional.rms_norm(x, [16], m.a.exp(), 1e-6), m.w), "its gain or bias, is computed"),
        (lambda m, x: functional.linear(functional.rms_norm(x, [16], m.a, 1e-6), m.w.exp()), "its weight or bias, is computed"),
        (lambda m, x: functional.rms_norm(x, [16], m.a, 1e-6), "its result goes into %output"),
        (lambda m, x: functional.linear(y := functional.rms_norm(x, [16], m.a, 1e-6), m.w) + y, "its result goes into %add"),
    ],
)
def test_gains_that_cannot_be_folded(body, reason: str) -> None:
    check_pass(FoldNorms(), tailed(body, a=(16,), w=(16, 16)), sites=0, missed=[reason])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: functional.linear(functional.layer_norm(x, [16]), m.w) + functional.linear(x, m.w), "reads the residual stream as it is"),
        (lambda m, x: functional.linear(functional.layer_norm(x.relu(), [16]), m.w), "is no linear layer or embedding"),
        (lambda m, x: functional.linear(functional.layer_norm(functional.linear(x, m.w.exp()), [16]), m.w), "weight or bias, is computed"),
    ],
)
def test_means_that_cannot_be_folded(body, reason: str) -> None:
    check_pass(FoldNorms(), tailed(body, w=(16, 16)), sites=0, missed=[reason], ops_after={"layer_norm": 1})


def test_one_percent_of_a_gain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.errors import PassError
    from ntc_passes.new_weights import NewWeights

    right = NewWeights.of
    monkeypatch.setattr(NewWeights, "of", lambda self, tensor, change, make, *rest, **more: right(
        self, tensor, change, lambda value: make(value) * (1.01 if str(tensor.target).endswith("0.mlp.up_proj.weight") else 1.0), *rest, **more))
    with pytest.raises(PassError, match="claims to be exact, but the logits moved"):
        run_pipeline(analog("llama"), [FoldNorms()])


def test_options_and_streams() -> None:
    with pytest.raises(ConfigError, match="centre must be true or false, got 1"):
        FoldNorms.configure({"centre": 1})
    stream = residual_stream(analog("gemma"))
    assert [n.name for n in stream.writers] == ["embed_tokens", "layers_0_self_attn_o_proj", "layers_0_mlp_down_proj"]
    assert [n.name for n, _ in stream.readers] == ["layers_0_input_layernorm", "layers_0_post_attention_layernorm", "norm"]
    assert len(streams(analog("olmo2"))) == 5, "the stream, and what each norm behind a layer reads"
    assert count_ops(analog("gemma"))["mul"] > 1
