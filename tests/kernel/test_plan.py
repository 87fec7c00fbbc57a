"""Plans: what is counted is what a compilation makes, to the byte; what is measured grows with the network; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

import ntc
from ntc import plan as planning
from ntc.artifact import save
from ntc.errors import CaptureError, ConfigError
from ntc.plan import Plan, plan
from ntc.recipe import Settings

SIZES = {
    "vocab_size": 480, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
MEDIUM = {"hidden": 512, "inner": 1408, "vocab": 4096, "heads": 8, "keys": 4, "width": 64}
STAGES = ("capture", "canonicalize", "fold-norms", "rotate", "encode-linears", "write")


def saved(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_to_the_byte(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied, dtype="bfloat16")
    found = plan(saved(tmp_path / "model", config), recipe="sdllm", settings=Settings({"scale": "static"}))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    parameters = sum(p.numel() for p in model.parameters())
    made = ntc.compile(model, recipe="sdllm", settings=Settings({"scale": "static"}), calibration=ntc.Calibration.of(torch.ones(2, 8).long()))
    (tmp_path / "out").mkdir()
    save(made.program, tmp_path / "out")
    sizes = [t.numel() * t.element_size() for t in made.program.tensors.values()]
    assert (found.parameters, found.blocks, found.architecture) == (parameters, 3, "LlamaForCausalLM")
    assert found.model_bytes == 2 * parameters
    # Constants that are no weights count as in the miniature: rotary frequencies, the core of the Hadamard transform (20 x 20 or 28 x 28).
    assert found.output_bytes == pytest.approx(sum(sizes), abs=4 * 28**2)
    assert [s.name for s in found.stages] == list(STAGES)
    captured = sum(t.numel() * t.element_size() for t in made.analog.tensors.values())
    assert found.stages[0].weight_bytes == pytest.approx(captured, abs=64)
    # Rotated weights are made of folded ones while the original is kept; static steps go into others once more.
    held = {s.name: s.weight_bytes for s in found.stages}
    assert held["capture"] <= held["canonicalize"] < held["fold-norms"] < held["rotate"]
    assert held["encode-linears"] > held["write"] > held["capture"]
    assert not found.on_disk and found.scratch_bytes == 0
    assert [s.cpu_seconds for s in found.stages] == pytest.approx([1 + 3 + 0.001 * parameters] * 6)
    assert [s.memory_bytes for s in found.stages] == [100 + 2 * parameters] * 6
    assert found.cpu_seconds == pytest.approx(6 * (4 + 0.001 * parameters)) and found.memory_bytes == 100 + 2 * parameters


@pytest.mark.usefixtures("unmeasured")
def test_seventy_billion_parameters_without_one_weight(tmp_path: Path) -> None:
    """Of which the embedding and the head are the largest: 262 M elements each, where a matrix of the FFN has 235 M."""
    found = plan(Path(__file__).parents[2] / "examples" / "configs" / "llama-70b.json", recipe="sdllm")
    assert found.parameters == 68_976_648_192
    assert found.on_disk and found.scratch_bytes == max(s.weight_bytes for s in found.stages) > 2 * 4 * found.parameters
    gains = 161 * 8192  # of the norms, folded
    assert found.output_bytes == pytest.approx(4 * (found.parameters - gains), abs=10_000)
    assert [s.memory_bytes for s in found.stages] == [100 + 2 * 32000 * 8192] * 6
    captured = [s.weight_bytes for s in found.stages][:2]
    assert captured[0] == captured[1] + 4 * found.parameters  # the weight file in float32 lies beside what is loaded from it
    data = json.loads(json.dumps(found.to_json()))
    assert data["memory_bytes"] == found.memory_bytes and data["stages"][3]["name"] == "rotate"


@pytest.mark.slow  # it measures this machine
def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is of use to a test but their order: all are positive, a stage takes longer for more blocks, and more memory for more weights."""
    monkeypatch.setattr(planning, "_WIDE", MEDIUM)
    monkeypatch.setattr(planning, "_BLOCKS", (1, 3))
    config = LlamaConfig(**SIZES)
    seen = list[tuple[str, int, int]]()
    found: Plan = plan(saved(tmp_path, config), recipe="sdllm", progress=lambda *news: seen.append(news))
    assert seen == [("measure", i, 4) for i in range(5)]
    assert [r.name for r in found.rates] == list(STAGES)
    assert found.rates[0].block_s > 0 and found.rates[0].fixed_s > 0
    assert sum(r.parameter_s for r in found.rates) > 0
    assert all(r.fixed_bytes > 50e6 and r.element_bytes >= 0 for r in found.rates)
    assert max(r.element_bytes for r in found.rates) >= 8  # a network and what is made of it, both in float32
    assert found.cpu_seconds > 0


def test_what_cannot_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match=r"there is no file nowhere\.json"):
        plan("nowhere.json", recipe="sdllm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaptureError, match=r"empty holds no config\.json"):
        plan(tmp_path / "empty", recipe="sdllm")
    folder = Path(__file__).parents[2] / "examples" / "gpt2-books"
    with pytest.raises(ConfigError, match=r"LLaMA-type configs, and that of .*gpt2-books \(gpt2\) has no intermediate_size"):
        plan(folder, recipe="sdllm")
    with pytest.raises(ConfigError, match="no setting 'planes'"):
        plan(saved(tmp_path / "model", LlamaConfig(**SIZES)), recipe="sdllm", settings=Settings({"planes": 3}))


@pytest.mark.usefixtures("unmeasured")
def test_widths_that_do_not_explain_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2Config(**SIZES, tie_word_embeddings=False)
    assert plan(saved(tmp_path, config), recipe="sdllm").parameters > 0  # biases and all
    monkeypatch.setattr(planning, "_parameters", lambda config: 12345)
    with pytest.raises(ConfigError, match=r"cannot tell the widths of .*: they give [\d,]+ parameters, and the network has 12,345"):
        plan(tmp_path, recipe="sdllm")
