"""Capture: the same logits at every batch and length, the model left alone, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ntc
from ntc import CaptureError, DataError, NtcError, frontend
from ntc.attention_hook import our_attention
from ntc.frontend import CAPTURE_TOLERANCE
from ntc.loading import load_tokenizer
from ntc.program import check_ids, interpret
from ntc.testing import NanoGPT, count_ops, example_ids, tiny_gpt2

GPT2 = {
    "default": {},
    "gelu_new": {"activation_function": "gelu_new"},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "unscaled": {"scale_attn_weights": False},
    "layer_scaled": {"scale_attn_by_inverse_layer_idx": True},
    "n_inner": {"n_inner": 20},
    "untied": {"tie_word_embeddings": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "one_head": {"n_layer": 1, "n_head": 1},
    "odd_sizes": {"n_layer": 3, "n_embd": 21, "n_head": 3, "vocab_size": 37, "n_positions": 11},
    "tiny_context": {"n_positions": 3, "n_layer": 1},
}

MODULES = {
    "split": {"layout": "split"},
    "separate": {"layout": "separate"},
    "permute": {"layout": "permute"},
    "interleaved": {"layout": "interleaved"},
    "additive": {"mask": "additive"},
    "where": {"mask": "where"},
    "sdpa": {"mask": "sdpa"},
    "sdpa_mask": {"mask": "sdpa_mask"},
    "query_scaled": {"scaled": "query"},
    "query_scaled_sdpa": {"scaled": "query", "mask": "sdpa", "layout": "permute"},
    "grouped": {"layout": "separate", "kv_heads": 2},
    "multi_query": {"layout": "separate", "kv_heads": 1, "mask": "sdpa"},
    "relu": {"activation": "relu", "bias": False},
    "erf_gelu": {"activation": "gelu"},
    "bidirectional": {"mask": "none"},
    "padding": {"mask": "padding"},
}


def assert_same(program: ntc.Program, model: nn.Module, context: int) -> None:
    """The same logits for sizes that the example does not have, among them one token and a full context."""
    for batch, length in ((2, 2), (1, 1), (1, 5), (3, 1), (4, context)):
        ids = example_ids(program.info.vocab_size, batch, min(length, context), seed=batch)
        with torch.no_grad():
            output = model(ids)
            expected = output.logits if hasattr(output, "logits") else output[0]
            torch.testing.assert_close(program(ids), expected, rtol=0, atol=CAPTURE_TOLERANCE)


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_computes_the_same_at_any_size(name: str) -> None:
    model = tiny_gpt2(**GPT2[name])
    program = ntc.capture(model)
    assert_same(program, model, model.config.n_positions)
    assert count_ops(program)["ntc.attention"] == model.config.n_layer
    assert program.info.context == model.config.n_positions
    assert program.info.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_module_computes_the_same_at_any_size(name: str) -> None:
    model = NanoGPT(**MODULES[name])
    program = ntc.capture(model, example=example_ids())
    assert_same(program, model, model.context)
    assert program.info.context == model.context, "the model's own assert on the length is its context"


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (4, 8), (2, 24), (3, 24)])
def test_no_size_of_the_example_is_baked_in(shape: tuple[int, int]) -> None:
    # (4, 8) are the numbers of heads and channels per head, 24 is the length of the mask buffer.
    model = NanoGPT(layers=1)
    program = ntc.capture(model, example=example_ids(61, *shape))
    assert_same(program, model, 24)


def test_large_logits_have_large_rounding() -> None:
    model = tiny_gpt2(n_layer=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    program = ntc.capture(model)
    assert 0 < program.history[0].drift < 1e-5 * float(program(program.example).detach().abs().max())


def test_a_capture_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = frontend._own_attention_logits
    monkeypatch.setattr(frontend, "_own_attention_logits", lambda model, ids: own(model, ids) + 2e-4)
    with pytest.raises(CaptureError, match=r"the capture of GPT2LMHeadModel differs from the model by 0.0002.* in its logits \(limit 0.0001\)"):
        ntc.capture(tiny_gpt2(n_layer=1))


class Blocks(torch.nn.Module):
    """Sums of blocks of four tokens, in a loop that torch can only trace for so many blocks; or a branch on the length."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.embed, self.head, self.branch = torch.nn.Embedding(61, 8), torch.nn.Linear(8, 61), branch

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.branch:
            return self.head(x * 2 if ids.shape[1] >= 6 else x)
        total = torch.zeros_like(x)
        for block in range(-(-ids.shape[1] // 4)):
            total = total + x[:, 4 * block : 4 * block + 4].sum(1, keepdim=True)
        return self.head(x + total)


@pytest.mark.parametrize("branch", [False, True])
def test_a_capture_of_one_length_is_refused(branch: bool) -> None:
    sentence = "Blocks only for texts of at least 6 tokens" if branch else r"Blocks (only for texts of|holds for the length|differs from the model)"
    with pytest.raises(CaptureError, match=sentence):
        ntc.capture(Blocks(branch).eval(), example=example_ids())


def test_an_op_without_shapes_is_named_and_torch_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """BLOOM's baddbmm: torch logs a traceback before it raises, which is nobody's answer."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sentence = r"torch knows no shapes of BloomForCausalLM for any batch and length at node %baddbmm \(transformer\.h\.0.*in forward\): [A-Z]"
    with pytest.raises(CaptureError, match=sentence):
        ntc.capture(BloomForCausalLM(BloomConfig(**sizes)).eval())
    assert "Traceback" not in capfd.readouterr().err


def test_a_mask_may_be_given_by_name() -> None:
    """The interface of transformers calls it ``attention_mask``, and some families give it so."""
    model = tiny_gpt2(n_layer=1)
    with our_attention(model):
        given = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
        heads = torch.ones(1, 4, 3, 8)
        y, _ = given(model.transformer.h[0].attn, heads, heads, heads, attention_mask=None)
    assert y.shape == (1, 3, 4, 8)


def test_tied_weights_stay_one_tensor() -> None:
    program = ntc.capture(tiny_gpt2(n_layer=1))
    assert [n for n in program.tensors if "wte" in n or "head" in n] == ["transformer.wte.weight"]
    untied = ntc.capture(tiny_gpt2(n_layer=1, tie_word_embeddings=False))
    assert {"transformer.wte.weight", "lm_head.weight"} <= set(untied.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_captured_in_fp32(dtype: torch.dtype) -> None:
    model = tiny_gpt2(n_layer=1).to(dtype)
    program = ntc.capture(model)
    assert all(p.dtype == dtype for p in model.parameters()), "the model given must not change"
    model.float()
    assert_same(program, model, 24)


def test_from_a_saved_folder(tmp_path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), tmp_path):
        program = ntc.capture(source)
        assert_same(program, model, 24)
        assert program.info.source == str(tmp_path)
        assert program.info.architecture == "GPT2LMHeadModel"
    assert load_tokenizer(tmp_path) is None


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_gpt2(n_layer=1, attn_implementation="sdpa")
    model.train()
    model.transformer.ln_f.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: (t.data_ptr(), t._version, t.dtype, t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    implementation = model.config._attn_implementation
    ntc.capture(model)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: (t.data_ptr(), t._version, t.dtype, t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert model.config._attn_implementation == implementation == "sdpa"


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    model = tiny_gpt2(n_layer=1)
    implementation = model.config._attn_implementation
    with pytest.raises(CaptureError):
        ntc.capture(model, example=torch.full((2, 5), 61))
    assert model.config._attn_implementation == implementation


def test_capture_is_deterministic() -> None:
    texts = {str(ntc.capture(tiny_gpt2())) for _ in range(2)} | {str(ntc.capture(tiny_gpt2(seed=1)))}
    assert len(texts) == 1, "the printed graph depends on nothing but the architecture"


def test_interpreting_node_by_node_is_the_same() -> None:
    program = ntc.capture(tiny_gpt2())
    ids = example_ids()
    seen = []
    assert torch.equal(interpret(program, ids, lambda node, args, value: seen.append(node.name)), program(ids))
    assert len(seen) == sum(n.op == "call_function" for n in program.graph.nodes)


# --- errors: each one sentence, none a traceback of torch ----------------------------------------------------------------


def refused(match: str, *args, **kwargs) -> None:
    with pytest.raises(CaptureError, match=match) as caught:
        ntc.capture(*args, **kwargs)
    assert isinstance(caught.value, NtcError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_missing_folder(tmp_path) -> None:
    refused("there is no folder", tmp_path / "nothing")
    refused("there is no folder", "./nothing")


def test_unknown_hub_id() -> None:
    refused("there is no folder nobody-at-all/nothing, and the hub", "nobody-at-all/nothing")


def test_folder_without_config(tmp_path) -> None:
    refused("holds no config.json", tmp_path)


def test_folder_with_broken_config(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused("could not read the model", tmp_path)


def _bert(cls: str):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    return getattr(transformers, cls)(transformers.BertConfig(**sizes, max_position_embeddings=16))


@pytest.mark.parametrize("cls", ["BertForMaskedLM", "BertModel"])
def test_an_encoder_is_refused(tmp_path, cls: str) -> None:
    model = _bert(cls)
    refused("causal language model", model)
    model.save_pretrained(tmp_path)
    refused(f"is a {cls}, not a causal language model", tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=40))
    refused("encoder-decoder", model)
    model.save_pretrained(tmp_path)
    refused("not a causal language model", tmp_path)


def test_corrupt_weights(tmp_path) -> None:
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    refused("could not load the weights", tmp_path)
    file.unlink()
    refused("could not load the weights", tmp_path)


def test_weights_that_lack_a_tensor(tmp_path) -> None:
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("h.0.mlp.c_fc.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(r"lack 1 tensor.* such as .*h\.0\.mlp\.c_fc\.weight", tmp_path)


def test_weights_of_another_size(tmp_path) -> None:
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": 16}))
    refused("weights", tmp_path)


def test_module_without_example() -> None:
    refused("give example token ids", NanoGPT(layers=1))


@pytest.mark.parametrize(
    "example", [torch.zeros(2, 5), torch.zeros(5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)]
)
def test_example_of_a_wrong_kind(example: torch.Tensor) -> None:
    refused("example token ids must be integers", NanoGPT(layers=1), example=example)


def test_example_that_is_no_tensor() -> None:
    refused("must be a tensor", NanoGPT(layers=1), example=[[1, 2], [3, 4]])


def test_example_outside_of_the_vocabulary() -> None:
    refused("fails on the example token ids", NanoGPT(layers=1), example=torch.full((2, 5), 61))


class _NoLogits(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = NanoGPT(layers=1), kind

    def forward(self, idx):
        logits = self.inner(idx)[0]
        if self.kind == "last":  # nanoGPT at inference
            return logits[:, [-1], :], None
        if self.kind == "constant":
            return torch.ones(2, 9, 61)
        if self.kind == "branch":
            return logits if logits.sum() > 0 else -logits
        return {"loss": logits.mean(), "dict": logits} if self.kind == "dict" else logits.mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mean", "no tensor of shape"), ("dict", "no tensor of shape"), ("last", "logits for every position"),
        ("constant", "does not use its input ids"), ("branch", "could not capture _NoLogits"),
    ],
)  # fmt: skip
def test_module_that_gives_no_logits(kind: str, message: str) -> None:
    refused(message, _NoLogits(kind), example=example_ids())


class _Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_capture_that_fails_names_the_module_and_its_line() -> None:
    model = NanoGPT(layers=2)
    model.h[1].mlp = _Branching()
    refused(r"could not capture NanoGPT at h\.1\.mlp \(test_frontend\.py:\d+ in forward\): \w", model, example=example_ids())


class _Recurrent(nn.Module):
    def forward(self, x):
        return torch.stack([x[:, : i + 1].mean(1) for i in range(x.shape[1])], 1)


def test_a_loop_over_tokens_names_its_line_and_torch_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    model = NanoGPT(layers=1)
    model.h[0].mlp = _Recurrent()
    sentence = r"NanoGPT for any batch and length at test_frontend\.py:\d+ in forward: it takes the number of tokens for a constant there"
    refused(sentence, model, example=example_ids())
    assert "guard" not in capfd.readouterr().err


def test_a_run_that_fails_names_the_module_and_its_line() -> None:
    model = NanoGPT(layers=2)
    model.h[1].mlp.c_proj = nn.Linear(7, 32)
    refused(r"NanoGPT fails on the example token ids at h\.1\.mlp \(testing\.py:\d+ in forward\): mat1", model, example=example_ids())


class _Random(NanoGPT):
    def forward(self, idx):
        return nn.functional.dropout(super().forward(idx)[0], 0.5, training=True)


def test_module_that_is_random() -> None:
    refused("differs from the model", _Random(layers=1), example=example_ids())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "shape"), (torch.zeros(1, 3), "float32"), (torch.zeros(1, 3, dtype=torch.bool), "bool"),
        (torch.full((1, 3), 61), "token id 61 is outside the vocabulary of 61"), (torch.full((1, 3), -1), "token id -1 is outside"),
        (torch.zeros(1, 25, dtype=torch.long), "25 tokens are more than the model's context of 24"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"), ([[1, 2]], "not a list"),
    ],
)  # fmt: skip
def test_wrong_ids(ids, message: str) -> None:
    info = ntc.program.ModelInfo("x", "x", vocab_size=61, context=24)
    with pytest.raises(DataError, match=message):
        check_ids(ids, info)


def test_a_program_checks_its_ids() -> None:
    program = ntc.capture(NanoGPT(layers=1), example=example_ids())
    with pytest.raises(DataError, match="outside the vocabulary"):
        program(torch.full((1, 3), 61))
    with pytest.raises(DataError, match="context of 24"):
        program(torch.zeros(1, 25, dtype=torch.long))
