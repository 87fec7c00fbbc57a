"""Models that are none: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import content, run_ntc, start_ntc
from tests.cli.refusals import nothing_left, refused

# ------------------------------------------------------------------------------------------------ models


def test_missing_folder(tmp_path: Path) -> None:
    refused("compile", tmp_path / "nowhere", "-o", tmp_path / "out", says=r"there is no folder .*nowhere")
    nothing_left(tmp_path)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused("compile", tmp_path / "empty", "-o", tmp_path / "out", says="no config.json")
    nothing_left(tmp_path, "empty")


def config(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("command", ["compile", "check"])
def test_config_that_is_no_causal_language_model(tmp_path: Path, command: str) -> None:
    model = config(tmp_path / "vit", model_type="vit", architectures=["ViTForImageClassification"])
    extra = ["-o", tmp_path / "out"] if command == "compile" else []
    refused(command, model, *extra, says="ViTForImageClassification, not a causal language model")
    nothing_left(tmp_path, "vit")


def test_encoder_models(tmp_path: Path) -> None:
    bert = config(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    refused("compile", bert, "-o", tmp_path / "out", says="BertForMaskedLM, not a causal language model")
    t5 = config(tmp_path / "t5", model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    refused("compile", t5, "-o", tmp_path / "out", says="not a causal language model")
    nothing_left(tmp_path, "bert", "t5")


def test_config_that_is_no_json(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "config.json").write_text("{ not json")
    refused("compile", broken, "-o", tmp_path / "out", says="could not read the model")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_weights(tmp_path: Path, model: Path, damage: str) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\xff" * 100, "empty": b""}[damage])
    refused("compile", broken, "-o", tmp_path / "out", says="could not load the weights of .*broken")
    nothing_left(tmp_path, "broken")


def test_missing_weights(tmp_path: Path, model: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    refused("compile", broken, "-o", tmp_path / "out", says="could not load the weights")


# ------------------------------------------------------------------------------------------------ the hub


def test_hub_name_without_network(tmp_path: Path) -> None:
    started = time.perf_counter()
    refused("compile", "gpt2", "-o", tmp_path / "out", says="there is no folder gpt2, .* cannot be reached: connect .* or give a local folder")
    assert time.perf_counter() - started < 20
    nothing_left(tmp_path)


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listening port that never says a word: one question, a few seconds, no retries."""
    from huggingface_hub import constants

    from ntc.loading import hub_answers

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        assert not hub_answers("someone/model")
        assert time.perf_counter() - started < 15


def test_hub_name_from_the_local_cache(model: Path, tmp_path: Path) -> None:
    """``ntc compile NAME`` and ``ntc compile FOLDER`` share their code: same model, same program."""
    commit = "0" * 40
    cache = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(model, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    process = start_ntc(
        "compile", "someone/tiny", "-o", tmp_path / "out", "--calibration", model / "calibration.txt", "--no-measure", "--json",
        env={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}, cwd=tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["model"]["source"] == "someone/tiny"
    run_ntc("compile", model, "-o", tmp_path / "local", "--no-measure")
    hub, local = content(tmp_path / "out"), content(tmp_path / "local")
    assert {k: v for k, v in hub.items() if k.startswith("program")} == {k: v for k, v in local.items() if k.startswith("program")}
