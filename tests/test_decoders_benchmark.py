"""benchmarks/decoders.py: tiny configs, every outcome that a model type can have, and the page; the whole loop is run by hand."""

from __future__ import annotations

import importlib
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ntc.errors import PassError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("decoders", "decoder_configs")})


@pytest.fixture
def decoders(modules: SimpleNamespace) -> ModuleType:
    return modules.decoders


@pytest.fixture
def configs(modules: SimpleNamespace) -> ModuleType:
    return modules.decoder_configs


# ------------------------------------------------------------------------------------------------ configs


def test_a_config_is_small_and_has_one_layer_of_every_kind(configs: ModuleType) -> None:
    fields = configs.small_fields(CONFIG_MAPPING["gemma3_text"]())
    assert fields["layer_types"] == ["sliding_attention", "full_attention"]
    assert fields["num_hidden_layers"] == 2
    assert {name: fields[name] for name in ("hidden_size", "vocab_size", "sliding_window", "max_position_embeddings")} == {
        "hidden_size": 32, "vocab_size": 61, "sliding_window": 4, "max_position_embeddings": 24,
    }  # fmt: skip
    assert configs.small_fields(CONFIG_MAPPING["gpt2"]())["n_layer"] == 1
    assert configs.small_fields(CONFIG_MAPPING["gpt2"]())["eos_token_id"] == 0, "ids are in the vocabulary"
    assert configs.small_fields(CONFIG_MAPPING["bert"]())["is_decoder"] is True
    latent = configs.small_fields(CONFIG_MAPPING["deepseek_v3"]())
    assert latent["num_key_value_heads"] == latent["num_attention_heads"] == 4


def test_configs_inside_of_a_config_are_small_too(configs: ModuleType) -> None:
    fields = configs.small_fields(CONFIG_MAPPING["gemma3"]())
    assert (fields["text_config"]["hidden_size"], fields["vision_config"]["hidden_size"]) == (32, 32)
    assert configs.merged(fields, {"text_config": {"head_dim": 4}})["text_config"] == {**fields["text_config"], "head_dim": 4}


def test_exceptions_are_of_types_that_there_are(configs: ModuleType) -> None:
    for table in (configs.EXCEPTIONS, configs.PART, configs.NOT_ALONE):
        assert set(table) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# ------------------------------------------------------------------------------------------------ outcomes


def test_a_decoder_is_captured(decoders: ModuleType) -> None:
    found = decoders.outcome("gemma3_text")
    assert (found.outcome, found.model, found.attention, found.layers, found.missed) == ("captured", "Gemma3ForCausalLM", 2, 2, {})
    assert 0 < found.error <= found.limit == decoders.CAPTURE_TOLERANCE


def test_a_decoder_inside_of_a_model_of_images_is_captured(decoders: ModuleType) -> None:
    """Its config has no vocabulary and no context of its own, but one of text that has."""
    found = decoders.outcome("fuyu")
    assert (found.outcome, found.model, found.attention, found.missed) == ("captured", "FuyuForCausalLM", 1, {})


def test_a_refusal_is_the_sentence_of_ntc(decoders: ModuleType) -> None:
    found = decoders.outcome("gpt_oss")
    assert found.outcome == "refused"
    assert found.reason.startswith("GptOssAttention has attention sinks (s_aux)")


def test_what_cannot_be_made_says_why(decoders: ModuleType, configs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.EXCEPTIONS, "llama", {"num_attention_heads": 0})
    found = decoders.outcome("llama")
    assert found.outcome == "not configured"
    assert "Error: " in found.reason


def test_an_error_that_is_not_ours_is_a_bug(decoders: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> None:
        raise KeyError("somewhere")

    monkeypatch.setattr(decoders, "capture", broken)
    found = decoders.outcome("gpt2")
    assert found.outcome == "bug"
    assert found.reason.strip().endswith("KeyError: 'somewhere'")


def test_an_error_of_torch_inside_of_a_pass_is_a_bug(decoders: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(program: Any, passes: Any) -> None:
        raise PassError("pass canonicalize failed: RuntimeError: negative dimension -4")

    monkeypatch.setattr(decoders, "capture", lambda model: None)
    monkeypatch.setattr(decoders, "run_pipeline", failing)
    assert decoders.outcome("gpt2").outcome == "bug"


def test_logits_that_are_off_are_a_bug(decoders: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    own = decoders.own_logits
    monkeypatch.setattr(decoders, "own_logits", lambda model, ids: own(model, ids) + (2e-4 if ids.shape[1] > 7 else 0))
    found = decoders.outcome("gpt2")
    assert found.outcome == "bug"
    assert found.reason.startswith("logits of [1, 17] tokens are off by 0.0002")


def _answers(model_type: str, pipe: Connection) -> None:
    pipe.send(sys.modules["decoders"].Outcome(model_type, "GPT2LMHeadModel", "captured"))


def _dies(model_type: str, pipe: Connection) -> None:
    os._exit(3)


def _works_on(model_type: str, pipe: Connection) -> None:
    while True:
        pass


def _waits(model_type: str, pipe: Connection) -> None:
    time.sleep(600)


@pytest.mark.parametrize(
    ("answer", "seconds", "outcome", "reason"),
    [
        (_answers, 60, "captured", ""), (_dies, 60, "bug", "its process ends with exit code 3"),
        (_works_on, 1, "bug", "it takes more than 1 s of processor time"), (_waits, 0.1, "bug", "no answer within 1 s"),
    ],
)  # fmt: skip
def test_whatever_happens_there_is_an_outcome(decoders: ModuleType, answer: Any, seconds: float, outcome: str, reason: str) -> None:
    decoders.WAIT, before = (600 if answer is _works_on else 10), decoders.WAIT
    try:
        found = decoders.isolated("gpt2", seconds, answer)
    finally:
        decoders.WAIT = before
    assert (found.model_type, found.outcome, found.reason) == ("gpt2", outcome, reason)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_groups_by_outcome(decoders: ModuleType) -> None:
    def made(name: str, outcome: str, **more: Any) -> Any:
        return decoders.Outcome(name, f"{name.title()}ForCausalLM", outcome, version="5", **more)

    stuck = "torch.export could not capture {}ForCausalLM at layers.0 (modeling_{}.py:7 in forward): no | rule"
    text = decoders.section([
        made("b", "captured", error=2e-6, attention=2), made("a", "captured", error=1e-6, attention=1),
        made("c", "captured", error=3e-6, attention=1, missed={"not causal": 2}), made("d", "captured", error=0.0),
        made("e", "refused", reason=stuck.format("E", "e")), made("f", "refused", reason=stuck.format("F", "f")),
        made("g", "not configured", reason="ImportError: no timm"),
    ], ["h"])  # fmt: skip
    assert text.splitlines()[0] == "transformers 5, 7 of 8 model types tried: 4 captured, 2 refused, 1 not configured."
    assert "largest difference of logits is 3.0e-06). Every attention is one op, and `canonicalize` misses nothing (2): `a`, `b`." in text
    assert "| `c` | yes | not causal |" in text
    assert "| `d` | none | nothing: it has no softmax attention |" in text
    assert r"| `e`, `f` | `torch.export could not capture ... at ...: no \| rule` |" in text
    assert "**Not configured**: the benchmark makes no tiny network of it (1):" in text
    assert text.splitlines()[-1] == "**Not tried yet** (1): `h`."
    assert "Not as they should be" not in text


def test_a_page_is_of_one_version(decoders: ModuleType) -> None:
    both = [decoders.Outcome("gpt2", "GPT2LMHeadModel", "captured", version=version) for version in ("5.1", "5.2")]
    with pytest.raises(SystemExit, match=r"one version of transformers, and these lines have 5\.1, 5\.2"):
        decoders.section(both)


def test_lines_are_kept_and_not_tried_again(decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def isolated(name: str, seconds: float) -> Any:
        tried.append(name)
        return decoders.Outcome(name, "X", "captured", error=0.0, limit=1e-4, attention=1)

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin decoders -->\n<!-- end decoders -->\nafter\n")
    monkeypatch.setattr(decoders, "isolated", isolated)
    monkeypatch.setattr(decoders, "outcome", lambda name: None)  # the first, which warms torch up
    monkeypatch.setattr(decoders.gc, "freeze", lambda: None)
    for only in ("llama", "llama,mistral"):
        monkeypatch.setattr(sys, "argv", ["decoders.py", "--only", only, "--output", str(tmp_path / "a.jsonl"), "--page", str(page)])
        decoders.main()
    assert tried == ["llama", "mistral"]
    assert "2 of 2 model types tried: 2 captured." in page.read_text()
    assert page.read_text().endswith("<!-- end decoders -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["decoders.py", "--only", "lama", "--output", str(tmp_path / "a.jsonl")])
    with pytest.raises(SystemExit, match="has no causal decoder of type lama"):
        decoders.main()
