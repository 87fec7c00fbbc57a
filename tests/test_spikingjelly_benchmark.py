"""The benchmark beside SpikingJelly: the network that its converter gets, the error of one layer, the tables, and a run where it is installed."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ntc.errors import ConfigError
from ntc.testing import example_ids, randomize, tiny_gpt2
from ntc.text import random_tokens

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "spikingjelly_converter.py"
REFERENCE, SAMPLE = ROOT / "examples" / "gpt2-books", ROOT / "examples" / "data" / "books-sample.txt"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "spikingjelly_converter", type(sys)("spikingjelly_converter"))
        return runpy.run_path(str(BENCHMARK), run_name="spikingjelly_converter")


def tiny_llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 61, "max_position_embeddings": 32, **config}))
    randomize(model, 0)
    return model.eval()


def line(label: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "key": f"{label}, T = {steps}", "label": label, "steps": steps, "data": "a.txt", "perplexity": 1234.5, "perplexity_ann": 40.0,
        "change": 29.8625, "change_interval": [29.0, 31.0], "logit_error": 0.25, "events_per_value": 1.5, "real_macs_per_mac": 159.0,
        "acs_per_mac": 0.125, "analog_share": 0.8, "cpu_ratio": 12.345, "layer": {"error": 0.0625, "events_per_value": 2.0}, **more,
    }  # fmt: skip


def test_a_llama_is_a_qwen2_without_biases(benchmark: dict[str, Any]) -> None:
    llama, ids = tiny_llama(), example_ids()
    qwen = benchmark["as_qwen2"](llama)
    assert qwen.config.model_type == "qwen2" and benchmark["as_qwen2"](qwen) is qwen
    with torch.no_grad():
        assert torch.equal(qwen(ids).logits, llama(ids).logits)
    with pytest.raises(ConfigError, match="takes Qwen2, and gpt2 is none under another name"):
        benchmark["as_qwen2"](tiny_gpt2())


def test_the_error_of_one_layer_is_that_of_its_code(benchmark: dict[str, Any]) -> None:
    llama, tokens = tiny_llama(), random_tokens(61, 12, 24)
    exact = benchmark["one_layer"](llama, tokens, lambda x, weight: (x, weight, x.new_tensor([0.0, 3.0])))
    assert exact == {"error": 0, "events_per_value": 1.5}
    silent = benchmark["one_layer"](llama, tokens, lambda x, weight: (0 * x, weight, 0 * x))
    assert silent == {"error": 1, "events_per_value": 0}
    found = [benchmark["one_layer"](llama, tokens, lambda x, weight, t=t: benchmark["digits"](x, weight, t)) for t in (2, 4, 6)]
    # Each digit more divides the step by three, so two of them the error by nine.
    assert found[0]["error"] / 9 == pytest.approx(found[1]["error"], rel=0.3)
    assert found[1]["error"] / 9 == pytest.approx(found[2]["error"], rel=0.3)
    assert all(0 < f["events_per_value"] < t for f, t in zip(found, (2, 4, 6), strict=True))


def test_the_tables_say_what_the_lines_say(benchmark: dict[str, Any]) -> None:
    theirs = line("SpikingJelly, 16 levels", 160, losses={"original": 4.0, "sums": 5.25, "spikes": 5.5}, spike_tokens=51)
    written = benchmark["section"]([theirs, line("ntc, lossless", 4)])
    assert "| SpikingJelly, 16 levels | 160 | 1,234.50 | +2,986.25 % | +2,900.00 ... +3,100.00 | 0.2500 | 1.50 | 159.00 | 0.12 |" in written
    assert "| ntc, lossless | 4 | 0.06250 | 2.00 |" in written
    assert "T = 160, 51 tokens: 4.000, 5.250, 5.500." in written
    with pytest.raises(ConfigError, match=r"one text, and these lines have 2: a\.txt; b\.txt"):
        benchmark["section"]([theirs, line("ntc, lossless", 4, data="b.txt")])


def test_the_page_has_tables_of_this_form(benchmark: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    written = page.split("<!-- begin spikingjelly -->")[1].split("<!-- end spikingjelly -->")[0]
    assert f"\n{benchmark['table']([])}\n| SpikingJelly, " in written


def test_settings_are_three_numbers(benchmark: dict[str, Any]) -> None:
    setting = benchmark["Setting"].read("160/16/0.999")
    assert (setting.steps, setting.levels, setting.quantile) == (160, 16, 0.999)
    with pytest.raises(ConfigError, match=r"T/levels/quantile, such as 160/16/0\.999, got '8/x'"):
        benchmark["Setting"].read("8/x")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["spikingjelly_converter.py", *map(str, arguments)])
    runpy.run_path(str(BENCHMARK), run_name="__main__")


def test_without_it_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "spikingjelly", None)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "nowhere", "--data", SAMPLE, "--calibration", SAMPLE)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(': pip install --no-deps spikingjelly==2.0.0 "loguru<1" requests tqdm\n')


def test_both_sides_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spikingjelly.activation_based.ann2snn", reason="SpikingJelly is not installed")
    model, lines, page = tmp_path / "tiny", tmp_path / "lines.jsonl", tmp_path / "page.md"
    tiny_llama(vocab_size=4096).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, model)
    page.write_text("<!-- begin spikingjelly -->\nold\n<!-- end spikingjelly -->\n", encoding="utf-8")
    sizes = ["--window", 16, "--windows", 8, "--calibration-tokens", 256, "--passes", 256]
    settings = ["--settings", "16/16/1,1024/1024/1", "--steps", "6", "--output", lines, "--page", page]
    run(monkeypatch, model, "--data", SAMPLE, "--calibration", SAMPLE, *sizes, *settings)
    few, many, ours = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    for d in (few, many):
        assert d["losses"]["sums"] == pytest.approx(d["losses"]["spikes"], abs=2e-3)  # its two modes are one network
        assert d["real_macs_per_mac"] > 1 and d["analog_share"] > 0.5 and d["coded_values_per_token"] == 32 + 2 * (32 + 16 + 16 + 64)
    assert many["logit_error"] < few["logit_error"] / 20 and many["layer"]["error"] < few["layer"]["error"] / 20
    assert ours["analog_share"] == 0 == ours["real_macs_per_mac"] and ours["events_per_value"] < 6
    assert "old" not in page.read_text(encoding="utf-8") and page.read_text(encoding="utf-8").count("| ntc, lossless | 6 |") == 2
