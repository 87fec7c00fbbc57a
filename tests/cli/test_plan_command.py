"""ntc plan: a table and JSON from a config, and an error in one sentence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ntc.cli.output import data_size, duration
from ntc.cli.plan_command import _show
from tests.cli.conftest import run_ntc
from tests.cli.test_commands import check_keys

SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 480, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.usefixtures("unmeasured")
def test_a_table_and_its_json(tmp_path: Path) -> None:
    """Each figure of the table stands in the JSON, whose stages are those of the recipe. What is measured is in tests/kernel/test_plan.py."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    ran = run_ntc("plan", tmp_path / "config.json", "--recipe", "sdllm", "--json")
    assert ran.code == 0, ran.err
    assert "shards" not in ran.err, "progress of a library that saves the miniatures"
    data = ran.json
    check_keys("plan", data)
    assert [s["name"] for s in data["stages"]] == ["capture", "canonicalize", "fold-norms", "rotate", "encode-linears", "write"]
    assert data["memory_bytes"] == max(s["memory_bytes"] for s in data["stages"])
    assert data["cpu_seconds"] == sum(s["cpu_seconds"] for s in data["stages"])
    assert not data["on_disk"] and data["scratch_bytes"] == 0 and len(data["rates"]) == len(data["stages"])
    shown = io.StringIO()
    _show(Console(file=shown, width=160), data, measured=True)
    text = shown.getvalue()
    for label, value in (("Memory", data_size(data["memory_bytes"])), ("Time", duration(data["cpu_seconds"]))):
        assert f"{label} {value}" in text
    assert f"scratch 0 B, result {data_size(data['output_bytes'])}" in text
    assert text.count("all weights") == len(data["stages"])
    assert all(text.count(s["name"]) == 2 for s in data["stages"] if s["name"] != "capture")


def test_an_error_is_one_sentence(tmp_path: Path) -> None:
    ran = run_ntc("plan", tmp_path / "config.json")
    assert ran.code == 2 and ran.err.startswith("error: there is no file ")
