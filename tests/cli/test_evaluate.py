"""``ntc evaluate`` with a fine-tuned original, confidence intervals and layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import run_ntc
from tests.cli.test_commands import check_keys, result, shown


def write_tuned(model: Path, folder: Path) -> Path:
    """The original after a few steps of training, as a compiled folder."""
    import ntc
    from ntc import artifact
    from ntc.loading import load_tokenizer
    from ntc.text import tokens_from

    program = ntc.capture(model)
    ids = tokens_from(model / "calibration.txt", load_tokenizer(model), 24, 240).windows
    optimizer = torch.optim.SGD(program.parameters(), 0.05)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(program.module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir(parents=True)
    artifact.save(program, folder)
    artifact.seal(folder)
    again = artifact.load(folder)
    with torch.no_grad():
        assert torch.equal(again.module(ids), program.module(ids)), "a fine-tuned analog program comes back bit for bit"
    return folder


def finetuned(folder: Path, *, text: str = "a", tokens: int = 960, **options: Any) -> Path:
    """What a fine-tuning leaves in the history of a folder."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    record = {**manifest["history"][-1], "name": "finetune", "options": {"group": "all", "window": 24, "rows": 8, "seed": 0, "lr": 1e-3, **options}}
    record["notes"] = {"data": {"description": f"{text}.txt, packed", "sha256": text * 64}, "tokens": tokens}
    manifest["history"].append(record)
    path.write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tuned(model, tmp_path_factory.mktemp("tuned") / "baseline")


@pytest.fixture(scope="module")
def data(compiled: Path, text: Path) -> dict[str, Any]:
    return result("evaluate", compiled, "--data", text)


@pytest.fixture(scope="module")
def brief(compiled: Path, text: Path) -> str:
    return shown("evaluate", compiled, "--data", text)


@pytest.fixture
def refused() -> Callable[..., str]:
    def run(*arguments: object) -> str:
        ran = run_ntc(*arguments)
        assert (ran.code, ran.out) == (2, ""), ran.err
        return " ".join(ran.err.split())

    return run


def test_a_tuned_original_is_a_second_reference(compiled: Path, text: Path, tuned: Path) -> None:
    data = result("evaluate", compiled, "--data", text, "--tuned", tuned)
    check_keys("evaluate", data)
    assert data["tuned"] == str(tuned)
    assert data["perplexity_change_tuned"] == pytest.approx(data["perplexity"] / data["perplexity_tuned"] - 1)
    assert data["perplexity_tuned"] != data["perplexity_ann"]
    low, high = data["confidence"]["perplexity_change_tuned"]
    assert low < data["perplexity_change_tuned"] < high
    assert data["tuned_training"]["same"] is None
    ran = run_ntc("evaluate", compiled, "--data", text, "--tuned", tuned)
    assert "Against a fine-tuned network  not known to have seen the same tokens" in ran.out
    assert f"{data['perplexity_tuned']:.2f}" in ran.out
    assert f"whether the network in {tuned} has seen the same tokens cannot be checked" in " ".join(ran.err.split())


def test_the_training_of_a_tuned_original_is_checked(
    copied: Path, text: Path, tuned: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    reference = Path(shutil.copytree(tuned, tmp_path / "reference"))
    arguments = ("evaluate", copied, "--data", text, "--max-tokens", 48, "--tuned", reference)
    finetuned(reference, lr=5e-4)  # its own
    ran = run_ntc(*arguments, "--json")
    assert ran.json["tuned_training"] == {"same": False, "differences": ["960 tokens (the program: 0)"]}
    assert "was fine-tuned on 960 tokens (the program: 0), so the difference is not only what the spikes cost" in " ".join(ran.err.split())
    finetuned(copied)
    ran = run_ntc(*arguments)
    assert (ran.code, ran.err) == (0, "")
    assert "Against the network fine-tuned on the same tokens" in ran.out
    other = finetuned(Path(shutil.copytree(tuned, tmp_path / "other")), text="b", seed=1)
    said = refused(*arguments[:-1], other)
    assert f"{other} was fine-tuned with the text b.txt, hash bbbbbbbb (the program: the text a.txt, hash aaaaaaaa) and seed = 1" in said
    assert "or --no-tuned" in said
    shutil.copytree(other, copied / "baseline")
    assert "was fine-tuned with the text b.txt" in refused(*arguments[:-2]), "found in the folder, too"


def test_a_baseline_in_the_folder_is_found(copied: Path, text: Path, tuned: Path, data: dict[str, Any], brief: str) -> None:
    assert (data["tuned"], data["tuned_training"], data["perplexity_tuned"], data["cosine_tuned"]) == (None, None, None, None)
    assert "fine-tuned" not in brief
    shutil.copytree(tuned, copied / "baseline")
    found = result("evaluate", copied, "--data", text)
    assert found["tuned"] == str(copied / "baseline")
    assert found["perplexity_tuned"] > 1
    without = result("evaluate", copied, "--data", text, "--no-tuned")
    assert without == {**data, "folder": str(copied)}


def test_what_is_no_tuned_original_is_refused(compiled: Path, copied: Path, text: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("evaluate", compiled, "--data", text, "--tuned", copied)
    assert "holds a spiking program (T = 4): --tuned takes the original, fine-tuned without spikes" in said
    assert "there is no folder" in refused("evaluate", compiled, "--data", text, "--tuned", tmp_path / "nowhere")
    assert "exclude each other" in refused("evaluate", compiled, "--data", text, "--tuned", tmp_path, "--no-tuned")
    (copied / "baseline").mkdir()
    assert f"{copied / 'baseline'} holds no compiled program" in refused("evaluate", copied, "--data", text)


def test_intervals_and_seed(compiled: Path, text: Path, data: dict[str, Any], brief: str) -> None:
    confidence = data["confidence"]
    assert (confidence["level"], confidence["windows"]) == (0.95, data["tokens"] // data["window"])
    assert confidence["resamples"] >= 1000
    for name in ("perplexity", "perplexity_change", "cosine", "top1_agreement"):
        low, high = confidence[name]
        assert low <= data[name] <= high
    other = result("evaluate", compiled, "--data", text, "--seed", 1)
    assert other["confidence"]["seed"] == 1
    assert other["confidence"]["perplexity"] != confidence["perplexity"]
    assert {**other, "confidence": 0} == {**data, "confidence": 0}
    assert f"bootstrap over {confidence['windows']} windows" in brief
    low, high = confidence["perplexity"]
    assert f"{low:.2f} … {high:.2f}" in brief


def test_few_windows_have_no_interval(compiled: Path, text: Path) -> None:
    assert result("evaluate", compiled, "--data", text, "--max-tokens", 24)["confidence"] is None
    out = shown("evaluate", compiled, "--data", text, "--max-tokens", 48)
    assert "no confidence intervals: 2 windows of text are too few" in out
    assert "…" not in out


def test_layers(compiled: Path, text: Path, data: dict[str, Any], brief: str) -> None:
    places = [(row["block"], row["where"]) for row in data["layers"]]
    assert places == [(f"transformer.h.{i}", where) for i in (0, 1) for where in ("attention", "ffn", "block")]
    worst = min(data["layers"], key=lambda row: row["cosine"])
    assert f"Layers: cosine with the original's {worst['cosine']:.4f} or more" in brief
    whole = shown("evaluate", compiled, "--data", text, "--layers")
    for row in data["layers"]:
        assert f"{row['cosine']:.4f}" in whole
        assert f"{row['relative_error']:.3f}" in whole
