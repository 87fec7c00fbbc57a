"""Canonicalize: every spelling becomes one small dialect, and what is not recognized is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import ntc
from ntc.errors import PassError, VerifyError
from ntc.meta import MADE_BY, ORIGIN, module_of, source_of, where
from ntc.ops import aten
from ntc.pipeline import run_pipeline
from ntc.program import Program
from ntc.testing import NanoGPT, check_pass, count_ops, example_ids, tiny_gpt2
from ntc_passes.canonicalize import Canonicalize

# All that may be left of a decoder: position ids, embeddings, norms, residual adds, linears, activations, attention.
ALLOWED = {"sym_size", "arange", "unsqueeze", "embedding", "layer_norm", "add", "linear", "gelu", "relu", "ntc.attention"}

GPT2 = {
    "default": {},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "gelu_fast": {"activation_function": "gelu_fast"},
    "unscaled": {"scale_attn_weights": False},
    "layer_scaled": {"scale_attn_by_inverse_layer_idx": True},
    "n_inner": {"n_inner": 20},
    "square_mlp": {"n_inner": 32},
    "untied": {"tie_word_embeddings": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "one_head": {"n_head": 1, "n_layer": 1},
    "odd_sizes": {"n_layer": 3, "n_embd": 21, "n_head": 3, "vocab_size": 37, "n_positions": 11},
    "tiny_context": {"n_positions": 3},
}

MODULES = {
    f"{layout}-{mask}-{scaled}": {"layout": layout, "mask": mask, "scaled": scaled}
    for layout, mask, scaled in [
        ("split", "masked_fill", "scores"), ("split", "sdpa", "scores"), ("split", "additive", "query"), ("split", "where", "scores"),
        ("separate", "masked_fill", "query"), ("separate", "sdpa_mask", "scores"), ("separate", "where", "query"),
        ("permute", "masked_fill", "scores"), ("permute", "sdpa", "query"), ("permute", "additive", "scores"),
        ("interleaved", "masked_fill", "scores"), ("interleaved", "sdpa", "scores"), ("interleaved", "sdpa_mask", "query"),
    ]
} | {
    "grouped": {"layout": "separate", "kv_heads": 2},
    "multi_query": {"layout": "separate", "kv_heads": 1, "mask": "sdpa"},
    "relu": {"activation": "relu", "bias": False},
    "erf_gelu": {"activation": "gelu", "bias": False, "layout": "interleaved"},
    "one_head": {"heads": 1},
    "many_heads": {"heads": 16, "layout": "permute"},
    "tiny_context": {"context": 3},
}  # fmt: skip


def captured(model: nn.Module, length: int = 9) -> Program:
    is_ours = isinstance(model, NanoGPT)
    return ntc.capture(model, example=example_ids(length=min(length, model.context))) if is_ours else ntc.capture(model)


def check_dialect(program: Program, layers: int, relu: bool = False) -> Program:
    activation = "relu" if relu else "gelu"
    after = check_pass(
        Canonicalize(), program, missed=[],
        ops_after={"ntc.attention": layers, activation: layers, "linear": 6 * layers + 1, "layer_norm": 2 * layers + 1, "embedding": 2},
    )  # fmt: skip
    assert set(count_ops(after)) <= ALLOWED
    return after


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_becomes_the_small_dialect(name: str) -> None:
    model = tiny_gpt2(**GPT2[name])
    after = check_dialect(captured(model), model.config.n_layer, relu=name == "relu")
    # Scale by scale: the attention nodes carry the right factor.
    size = model.config.n_embd // model.config.n_head
    scales = [n.args[5] for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    base = 1.0 if name == "unscaled" else size**-0.5
    assert scales == pytest.approx([base / (i + 1 if name == "layer_scaled" else 1) for i in range(len(scales))])


@pytest.mark.parametrize("name", MODULES)
def test_hand_written_module_becomes_the_small_dialect(name: str) -> None:
    model = NanoGPT(**MODULES[name])
    after = check_dialect(captured(model), layers=2, relu=name == "relu")
    (first, _) = [n for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    heads, kv_heads = MODULES[name].get("heads", 4), MODULES[name].get("kv_heads", MODULES[name].get("heads", 4))
    assert first.args[3:5] == (heads, kv_heads)
    assert first.args[5] == pytest.approx((32 / heads) ** -0.5)


@pytest.mark.parametrize("layout", ["split", "permute", "interleaved"])
def test_rows_of_a_fused_projection_are_named_by_what_they_are(layout: str) -> None:
    model = NanoGPT(layout=layout, layers=1, heads=4, width=32)
    after = run_pipeline(captured(model), [Canonicalize()])
    (node,) = [n for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    assert [a.name for a in node.args[:3]] == ["h_0_attn_c_attn_q", "h_0_attn_c_attn_k", "h_0_attn_c_attn_v"]
    fused = model.h[0].attn.c_attn
    rows = torch.arange(96)
    order = {"split": rows.view(3, 32), "permute": rows.view(3, 32), "interleaved": rows.view(4, 3, 8).transpose(0, 1).reshape(3, 32)}[layout]
    for part, index in zip("qkv", order, strict=True):
        assert torch.equal(after.tensor(f"h.0.attn.c_attn.{part}.weight"), fused.weight[index])
        assert torch.equal(after.tensor(f"h.0.attn.c_attn.{part}.bias"), fused.bias[index])


def test_a_gpt2_block_prints_as_a_dozen_nodes(golden) -> None:
    program = run_pipeline(ntc.capture(tiny_gpt2(n_layer=1)), [Canonicalize()])
    text = str(program)
    block = text.split("transformer.h.0:\n")[1].split("-:")[0].splitlines()
    assert len(block) == 12
    golden("gpt2_canonical", text)


def test_names_do_not_depend_on_the_run() -> None:
    texts = {str(run_pipeline(ntc.capture(tiny_gpt2()), [Canonicalize()])) for _ in range(2)}
    assert len(texts) == 1


def test_every_node_leads_back_to_the_model() -> None:
    for program in (captured(tiny_gpt2()), captured(NanoGPT())):
        after = run_pipeline(program, [Canonicalize()])
        known = {n.name for n in program.graph.nodes}
        for node in after.graph.nodes:
            if node.op != "call_function":
                continue
            assert set(node.meta[ORIGIN]) <= known, node
            assert node.meta[ORIGIN], node
            assert node.meta[MADE_BY][0] == "capture", node
            if node.target is torch.ops.ntc.attention.default:  # Hugging Face models are captured with it, others get it here
                assert node.meta[MADE_BY][1:] == (("canonicalize",) if program.info.architecture == "NanoGPT" else ()), node
            assert node.meta[MADE_BY][1:] in ((), ("canonicalize",)), node
            # NanoGPT lies in ntc itself, whose frames are not taken for the model's.
            if program.info.architecture != "NanoGPT" and not node.name.startswith("sym_size"):
                assert source_of(node), where(node)
            if node.name.startswith("h_"):
                assert module_of(node).removeprefix("transformer.").startswith("h."), where(node)
        for name in ("q", "k", "v"):
            node = after.find(f"h_0_attn_c_attn_{name}")
            assert module_of(node).endswith("h.0.attn.c_attn")
            assert node.meta[MADE_BY] == ("capture", "canonicalize")


def test_rewritten_arithmetic_leads_back_to_its_line() -> None:
    after = run_pipeline(tail(lambda m, x: 0.5 * x * (1.0 + torch.erf(x / 2.0**0.5))), [Canonicalize()])
    assert source_of(after.find("gelu")).startswith("test_canonicalize.py:")


def test_tied_embedding_stays_tied() -> None:
    after = run_pipeline(captured(tiny_gpt2()), [Canonicalize()])
    assert after.find("lm_head").args[1].target == "transformer.wte.weight"
    untied = run_pipeline(captured(tiny_gpt2(tie_word_embeddings=False)), [Canonicalize()])
    assert untied.find("lm_head").args[1].target == "lm_head.weight"


def test_shared_blocks_stay_shared() -> None:
    # One block used twice (as in ALBERT): its turned and split weights must not be stored twice.
    model = tiny_gpt2(n_layer=2)
    model.transformer.h[1] = model.transformer.h[0]
    after = check_pass(Canonicalize(), ntc.capture(model), ops_after={"ntc.attention": 2, "linear": 13})
    assert not [n for n in after.tensors if n.endswith(("_1", "_t"))]
    assert sum("mlp.c_fc.weight" in n for n in after.tensors) == 1


# --- spellings beyond the two families ----------------------------------------------------------------------------------


class _Tail(nn.Module):
    """A module around one expression of the hidden states, so that a spelling can be tested alone."""

    def __init__(self, body, **parameters) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wte = nn.Embedding(11, 16)
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.body = body

    def forward(self, ids):
        return self.body(self, self.wte(ids))


def tail(body, **parameters) -> Program:
    return ntc.capture(_Tail(body, **parameters), example=example_ids(11))


def test_products_with_a_weight_become_linears() -> None:
    for body in (
        lambda m, x: x @ m.w,
        lambda m, x: x @ m.w.t(),
        lambda m, x: x @ m.w.T,
        lambda m, x: x @ m.w.t().t(),  # square: the shape does not tell that it was turned twice
        lambda m, x: x @ m.w.transpose(0, 1).contiguous(),
        lambda m, x: functional.linear(x, m.w, m.b),
        lambda m, x: x @ m.w.T + m.b,
        lambda m, x: m.b + (x.reshape(-1, 16) @ m.w).reshape(x.shape),
        lambda m, x: torch.addmm(m.b, x.view(-1, 16), m.w).view(x.shape),
        lambda m, x: (x.reshape(-1, 16) @ m.w).reshape(x.shape),
        lambda m, x: torch.addmm(m.b, torch.addmm(m.b, x.view(-1, 16), m.w), m.w).view(x.shape),
    ):
        after = check_pass(Canonicalize(), tail(body, w=(16, 16), b=(16,)), not_after=["addmm", "mm", "matmul", "t", "transpose", "reshape", "add"])
        assert count_ops(after)["linear"] in (1, 2)


def test_a_bias_is_taken_in_only_where_nobody_reads_the_product_without_it() -> None:
    for body in (lambda m, x: (y := x @ m.w) + m.b + y, lambda m, x: x @ m.w + m.b[:1], lambda m, x: torch.add(x @ m.w, m.b, alpha=2)):
        after = check_pass(Canonicalize(), tail(body, w=(16, 16), b=(16,)), ops_after={"linear": 1})
        assert count_ops(after)["add"]


def test_one_weight_used_both_ways_round() -> None:
    program = tail(lambda m, x: (x @ m.w) @ m.w.t(), w=(16, 16))
    after = check_pass(Canonicalize(), program, ops_after={"linear": 2})
    assert sorted(after.tensors) == ["w", "w_t", "wte.weight"], "the turned copy must not take the name of the other"


def test_a_parameter_that_happens_to_end_in_t_keeps_its_name() -> None:
    after = check_pass(Canonicalize(), tail(lambda m, x: functional.linear(x, m.w_t) + m.w, w_t=(16, 16), w=(16,)))
    assert {"w", "w_t"} <= set(after.tensors)


def test_bias_that_is_a_matrix_is_left_alone() -> None:
    # addmm with a bias per token and channel is no linear.
    program = tail(lambda m, x: torch.addmm(m.b, x[0, :2], m.w).sum() + x, w=(16, 16), b=(2, 16))
    with pytest.raises(VerifyError, match="addmm"):
        run_pipeline(program, [Canonicalize()])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_spelled_out(approximate: str) -> None:
    def tanh(m, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))

    def erf(m, x):
        return x * 0.5 * (1.0 + torch.erf(x / 2.0**0.5))

    after = check_pass(Canonicalize(), tail(tanh if approximate == "tanh" else erf), ops_after={"gelu": 1}, not_after=["tanh", "erf", "mul"])
    assert next(n for n in after.graph.nodes if n.target is aten.gelu.default).kwargs == {"approximate": approximate}


@pytest.mark.parametrize("factor", [0.79, 0.8])
def test_nearly_gelu_is_left_alone(factor: float) -> None:
    program = tail(lambda m, x: 0.5 * x * (1.0 + torch.tanh(factor * (x + 0.044715 * x**3))))
    check_pass(Canonicalize(), program, ops_after={"gelu": 0, "tanh": 1})


def test_a_bare_fused_parameter() -> None:
    def body(m, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in functional.linear(x, m.qkv).chunk(3, -1))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    after = check_pass(Canonicalize(), tail(body, qkv=(48, 16)), ops_after={"ntc.attention": 1, "linear": 3})
    assert sorted(after.tensors) == ["qkv_k", "qkv_q", "qkv_v", "wte.weight"]


def test_grouped_heads_inside_sdpa() -> None:
    def body(m, x):
        q, k, v = (functional.linear(x, w).unflatten(-1, (-1, 4)).transpose(1, 2) for w in (m.q, m.k, m.v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)

    after = check_pass(Canonicalize(), tail(body, q=(16, 16), k=(8, 16), v=(8, 16)), ops_after={"ntc.attention": 1, "linear": 3})
    (node,) = [n for n in after.graph.nodes if n.target is torch.ops.ntc.attention.default]
    assert node.args[3:5] == (4, 2)


def test_attention_straight_from_the_residual_stream() -> None:
    def body(m, x):
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(2)

    check_pass(Canonicalize(), tail(body), ops_after={"ntc.attention": 1, "linear": 0})


# --- what is left alone -------------------------------------------------------------------------------------------------


def scored(change) -> Program:
    """Hand-written attention whose masked scores are ``change(scores, causal mask)``."""

    def body(m, x):
        q, k, v = (functional.linear(x, w).unflatten(-1, (2, 8)).transpose(1, 2) for w in (m.q, m.k, m.v))
        causal = torch.ones(x.shape[1], x.shape[1]).tril() == 1
        return (change(q @ k.transpose(-2, -1), causal).softmax(-1) @ v).transpose(1, 2).flatten(2)

    return tail(body, q=(16, 16), k=(16, 16), v=(16, 16))


def test_the_plain_form_of_the_refusals_is_recognized() -> None:
    check_pass(Canonicalize(), scored(lambda s, c: (s / 3).masked_fill(~c, -1e9)), missed=[], ops_after={"ntc.attention": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, c: s, "later tokens are seen"),
        (lambda s, c: s.masked_fill(c, -1e9), "later tokens are seen"),
        (lambda s, c: s.masked_fill(~c, -1.0), "later tokens are seen"),
        (lambda s, c: (5 * torch.tanh(s / 5)).masked_fill(~c, -1e9), "only scaled and causally masked"),  # soft cap
        (lambda s, c: (s * s).masked_fill(~c, -1e9), "only scaled and causally masked"),
        (lambda s, c: (s + torch.ones(2, 1, 1)).masked_fill(~c, -1e9), "only scaled and causally masked"),
        (lambda s, c: (s - torch.arange(s.shape[-1]).float()).masked_fill(~c, -1e9), "only scaled and causally masked"),  # ALiBi
        (lambda s, c: s.masked_fill(~c | (c.float().cumsum(0) > 2), -1e9), "its"),  # a sliding window
        (lambda s, c: s.masked_fill(~c, -1e9).masked_fill((s > 0).any(), -1e9), "its"),
    ],
)  # fmt: skip
def test_other_attention_is_left_alone(change, reason: str) -> None:
    program = scored(change)
    after = check_pass(Canonicalize(), program, missed=[reason], ops_after={"ntc.attention": 0, "softmax": 1})
    name, _ = after.history[-1].missed[0]
    assert after.find(name), "the miss is named as the node is called now"


def test_data_dependent_mask_is_left_alone() -> None:
    model = NanoGPT(mask="padding")
    check_pass(Canonicalize(), captured(model), missed=["its mask depends on the input"] * 2, ops_after={"softmax": 2, "ntc.attention": 0})


def test_bidirectional_attention_is_left_alone() -> None:
    model = NanoGPT(mask="none", layers=1)
    check_pass(Canonicalize(), captured(model), missed=["later tokens are seen"], ops_after={"softmax": 1, "ntc.attention": 0})


class _Experts(nn.Module):
    """Two linear layers, mixed by a router of softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(32, 2), nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = self.router(x).softmax(-1)
        return sum(shares[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


def test_the_softmax_of_a_router_is_no_attention_that_is_missed() -> None:
    model = NanoGPT(layers=1)
    model.h[0].mlp = _Experts()
    check_pass(Canonicalize(), captured(model), missed=[], ops_after={"softmax": 1, "ntc.attention": 1})


def test_bidirectional_sdpa_is_an_error_that_names_the_place() -> None:
    def body(m, x):
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)

    with pytest.raises(PassError, match=r"scaled_dot_product_attention at node %\w+ \(.*\) is no causal attention .*: it is not causal"):
        run_pipeline(tail(body), [Canonicalize()])
