"""GGUF files: the network is that of the file, its quantized weights in float32; damaged ones are refused in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ntc
from ntc.errors import CaptureError
from ntc.loading import load_model, load_tokenizer
from tests.cli.conftest import run_ntc

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, KEY_HEADS, INNER = 64, 4, 2, 96
WORDS = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=10000.0,
        )
    ).eval()  # fmt: skip


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection as llama.cpp rotates them: pairs of neighbours, not of halves."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


def write(model: LlamaForCausalLM, path: Path, kind: Any = None) -> Path:
    """By the format's own library; ``kind`` is the type of the matrices, float32 if None."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, config.max_position_embeddings), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KEY_HEADS),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, len(WORDS)),
        (writer.add_rope_dimension_count, WIDTH // HEADS), (writer.add_tokenizer_model, "llama"), (writer.add_token_list, WORDS),
        (writer.add_token_scores, [-float(i) for i in range(len(WORDS))]), (writer.add_token_types, [2, 3, 3] + [1] * (len(WORDS) - 3)),
        (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 0),
    ):  # fmt: skip
        add(value)
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
    }  # fmt: skip
    for i in range(2):
        for ours, theirs in (
            ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):  # fmt: skip
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    for ours, theirs in names.items():
        value = model.state_dict()[ours].numpy()
        if ".attn_q." in theirs or ".attn_k." in theirs:
            value = interleaved(value, HEADS if ".attn_q." in theirs else KEY_HEADS)
        if kind is None or value.ndim == 1:
            writer.add_tensor(theirs, value)
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_in_float32_is_the_network_it_was_written_from(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write(llama, tmp_path / "model.gguf")
    ids = torch.randint(0, len(WORDS), (2, 9), generator=torch.Generator().manual_seed(1))
    program = ntc.capture(path)
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
        assert torch.allclose(program(ids), expected, rtol=0, atol=1e-5)
    assert (program.info.context, program.info.vocab_size) == (64, len(WORDS))


def test_quantized_weights_are_those_of_the_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """32 numbers share a scale: the largest of them is 127, so each is wrong by at most half a step, which float16 of the scale moves by 2^-11."""
    loaded = load_model(write(llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)).state_dict()
    before = llama.state_dict()["model.layers.1.mlp.down_proj.weight"]
    after = loaded["model.layers.1.mlp.down_proj.weight"]
    most = before.view(WIDTH, -1, 32).abs().amax(-1, keepdim=True)
    error = (after - before).view(WIDTH, -1, 32).abs()
    assert after.dtype == torch.float32
    assert bool((error <= most * (0.5 / 127 + 2**-11)).all())
    assert float(error.max()) > 0
    assert torch.equal(loaded["model.norm.weight"], llama.state_dict()["model.norm.weight"])


def test_the_tokenizer_is_that_of_the_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(llama, tmp_path / "model.gguf"))
    assert tokenizer is not None
    assert tokenizer.convert_tokens_to_ids(["▁", "z", "▁b"]) == [3, 29, 31]


def test_the_package_is_left_as_it_was(llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a file is read, its bytes are a plain array and the table of names is made once."""
    before, tables, seen = (gguf.GGUFReader, gguf.get_tensor_name_map), [], []
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *arguments: (tables.append(arguments), before[1](*arguments))[1])
    monkeypatch.setattr(gguf.GGUFReader, "_build_tensors", lambda self, *a, of=before[0]._build_tensors: (seen.append(self.data), of(self, *a)))
    load_model(write(llama, tmp_path / "llama.gguf"))
    assert len(tables) == 1
    assert seen and all(type(data) is np.ndarray for data in seen)
    assert gguf.GGUFReader is before[0]


def test_commands_take_a_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    path, text = write(llama, tmp_path / "model.gguf"), tmp_path / "calibration.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    compiled = run_ntc("compile", path, "-o", tmp_path / "out", "--recipe", "ssa-only", "--json")
    assert compiled.code == 0, compiled.err
    assert "%|" not in compiled.err  # no bar of a library
    assert compiled.json["model"]["source"] == str(path)
    assert compiled.json["model"]["architecture"] == "LlamaForCausalLM"
    assert compiled.json["calibration"]["data"].startswith("calibration.txt, ")
    measured = run_ntc("evaluate", tmp_path / "out", "--data", text, "--json")
    assert measured.code == 0, measured.err
    assert measured.json["against"] == str(path)
    assert run_ntc("generate", path, "the fox", "--max-tokens", 2).code == 0


def test_what_is_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CaptureError, match=r"there is no file .*model.gguf"):
        load_model(path)
    path.write_bytes(b"GGML and more")
    with pytest.raises(CaptureError, match="is no GGUF file: it does not begin with the letters GGUF"):
        load_model(path)
    path.write_bytes(b"GGUF and no more")
    with pytest.raises(CaptureError, match=r"could not read the model .*model.gguf"):
        load_model(path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CaptureError, match=r"model.bin is a file, and neither a Hugging Face model folder nor a GGUF file"):
        load_model(tmp_path / "model.bin")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CaptureError, match=r"needs the package gguf: pip install 'ntc-compiler\[gguf\]'"):
        load_model(path)
