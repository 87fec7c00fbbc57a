"""Whole runs on a compiled folder: what comes out is a complete compiled folder that says how it was trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ntc
from ntc import artifact
from ntc.artifact import BASELINE
from ntc.errors import ArtifactError, ConfigError, DataError, TrainingError
from ntc.loading import load_tokenizer
from ntc.program import Program
from ntc.quality import perplexity
from ntc.text import tokens_from
from ntc.training.config import TrainingConfig
from ntc.training.prepare import network_from
from ntc.training.record import figures_of, write_finetuned
from ntc.training.run import Finetuned, finetune
from ntc.training.state import News

TOKENS = 8 * 24 * 12


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{
        "rows": 8, "max_tokens": TOKENS, "blockwise_tokens": 0, "warmup": 2, "validate_every": 6, "log_every": 2, "bf16": False, **options,
    })  # fmt: skip


@pytest.fixture(scope="module")
def original(model: Path) -> Program:
    """The teacher, captured once for all runs."""
    return network_from(model)


@pytest.fixture(scope="module")
def found(compiled: Path, text: Path) -> Finetuned:
    return finetune(compiled, text, config=config(lr=3e-3), baseline=True)


@pytest.fixture(scope="module")
def written(found: Finetuned, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "out"
    write_finetuned(found, folder, source=compiled)
    return folder


def test_public_names() -> None:
    assert ntc.finetune is finetune
    assert ntc.Finetuned is Finetuned
    assert ntc.TrainingConfig is TrainingConfig


def test_it_gets_better_and_its_figures_can_be_measured_again(found: Finetuned, compiled: Path, model: Path, text: Path) -> None:
    data = found.to_json()
    assert data["perplexity_after"] < data["perplexity_before"]
    assert data["steps"] == 12
    assert data["tokens"] == TOKENS
    tokenizer = load_tokenizer(model)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    held_out = ntc.text.Tokens(ids[-data["validation"]["tokens"] :].view(-1, 24), "", "")
    assert perplexity(ntc.load(compiled), held_out) == pytest.approx(data["perplexity_before"], rel=1e-5)
    assert perplexity(found.program, held_out) == pytest.approx(data["perplexity_after"], rel=1e-5)
    assert perplexity(ntc.capture(model), held_out) == pytest.approx(data["perplexity_ann"], rel=1e-4)
    assert data["perplexity_change"] == pytest.approx(data["perplexity_after"] / data["perplexity_ann"] - 1)
    assert found.baseline is not None
    assert perplexity(found.baseline, held_out) == pytest.approx(data["perplexity_tuned"], rel=1e-5)
    assert data["perplexity_change_tuned"] == pytest.approx(data["perplexity_after"] / data["perplexity_tuned"] - 1)


def test_the_end_of_the_text_is_not_trained_on(found: Finetuned, text: Path) -> None:
    data = found.to_json()
    whole = len(text.read_text()) + 1  # one token per character; the tokenizer has no end of text
    assert data["data"]["tokens"] + data["validation"]["tokens"] in (whole, whole - 1)
    assert data["validation"]["tokens"] == 24 * 8


def test_the_folder_is_a_compiled_one(found: Finetuned, written: Path, compiled: Path) -> None:
    program = ntc.load(written)
    ids = program.example
    assert torch.equal(program(ids), found.program(ids))
    assert program.facts == ntc.load(compiled).facts
    assert [r.name for r in program.history] == [*(r.name for r in ntc.load(compiled).history), "finetune"]
    manifest, before = artifact.read_manifest(written), artifact.read_manifest(compiled)
    assert {k: manifest[k] for k in ("recipe", "settings", "calibration", "info")} == {
        k: before[k] for k in ("recipe", "settings", "calibration", "info")
    }
    assert artifact.load_analog(written) is not None
    assert (written / "tokenizer" / "tokenizer.json").read_bytes() == (compiled / "tokenizer" / "tokenizer.json").read_bytes()
    assert {"training.jsonl", "curve.png", "curve.svg"} <= set(manifest["files"])


def test_history_says_how_it_was_trained(found: Finetuned, written: Path) -> None:
    record = ntc.load(written).history[-1]
    assert record.options == found.config.to_json()
    assert record.sites == len(found.trained)
    assert record.drift is not None
    assert record.drift > 0
    assert record.notes["data"]["sha256"] == found.data["sha256"]
    assert record.notes["tokens"] == TOKENS
    assert record.notes["perplexity_after"] == pytest.approx(found.to_json()["perplexity_after"])


def test_log_and_curve(found: Finetuned, written: Path) -> None:
    rows = [json.loads(line) for line in (written / "training.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 2, 4, 6, 8, 10, 12]
    assert rows[0]["valid_perplexity_ann"] == pytest.approx(found.to_json()["perplexity_ann"])
    assert (written / "curve.png").read_bytes().startswith(b"\x89PNG")
    svg = (written / "curve.svg").read_text()
    assert "original, tuned" in svg


def test_the_baseline_saw_the_same_windows(found: Finetuned, written: Path) -> None:
    baseline = ntc.load(written / BASELINE)
    assert "spiking" not in baseline.facts
    figures = figures_of(baseline)
    assert figures["tokens"] == found.outcome.tokens
    assert figures["data_sha256"] == found.data["sha256"]
    assert figures["perplexity_after"] < figures["perplexity_before"]
    options = baseline.history[-1].options
    assert (options["ce"], options["kl"], options["lr"]) == (1.0, 0.0, 3e-3)
    assert (written / BASELINE / "training.jsonl").is_file()


def test_the_baseline_may_have_its_own_learning_rate(compiled: Path, text: Path, original: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.training.windows import PackedCorpus

    seen: list[tuple[int, bytes]] = []
    batch = PackedCorpus.batch

    def watched(self: Any, step: int, rows: int, rank: int = 0, world: int = 1) -> Any:
        ids = batch(self, step, rows, rank, world)
        seen.append((step, ids.numpy().tobytes()))
        return ids

    monkeypatch.setattr(PackedCorpus, "batch", watched)
    found = finetune(compiled, text, config=config(max_tokens=8 * 24 * 3), teacher=original, baseline=True, baseline_lr=1e-4)
    assert found.to_json()["baseline"]["lr"] == 1e-4
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


def test_a_baseline_from_an_earlier_run(written: Path, compiled: Path, text: Path, found: Finetuned, original: Program, tmp_path: Path) -> None:
    again = finetune(compiled, text, config=config(ce=1.0), teacher=original, baseline_from=written)
    assert again.baseline is not None
    assert again.to_json()["perplexity_tuned"] == pytest.approx(found.to_json()["perplexity_tuned"])
    write_finetuned(again, tmp_path / "out", source=compiled)
    assert figures_of(ntc.load(tmp_path / "out" / BASELINE)) == figures_of(ntc.load(written / BASELINE))
    with pytest.raises(ConfigError, match=r"was trained with group = all \(now ssa\), rows = 8 \(now 4\), 12 steps \(now 24\)"):
        finetune(compiled, text, config=config(group="ssa", rows=4), baseline_from=written / BASELINE)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    with pytest.raises(ConfigError, match="another training text"):
        finetune(compiled, other, config=config(), baseline_from=written)
    with pytest.raises(ConfigError, match="is spiking"):
        finetune(compiled, text, config=config(), baseline_from=compiled)
    with pytest.raises(ConfigError, match="leave out one"):
        finetune(compiled, text, config=config(), baseline_from=written, baseline=True)


def test_programs_and_models_as_teachers(compiled: Path, model: Path, written: Path, original: Program, text: Path) -> None:
    program = ntc.load(compiled)
    tokenizer = load_tokenizer(model)
    short = config(max_tokens=8 * 24 * 2)
    by_default = finetune(program, text, config=short, tokenizer=tokenizer)
    by_name = finetune(program, text, config=short, tokenizer=tokenizer, teacher=model)
    by_program = finetune(program, [text], config=short, tokenizer=tokenizer, teacher=original)
    losses = [[row.get("loss") for row in f.log] for f in (by_default, by_name, by_program)]
    assert losses[0] == losses[1] == losses[2]
    assert by_default.teacher == str(model)
    tuned = finetune(program, text, config=short, tokenizer=tokenizer, teacher=written / BASELINE)
    assert tuned.log[-1]["kl"] != by_default.log[-1]["kl"]


def test_no_teacher_is_needed_without_distillation(compiled: Path, text: Path, tmp_path: Path) -> None:
    program = ntc.load(compiled).named(str(tmp_path / "gone"))
    tokenizer = load_tokenizer(compiled / "tokenizer")
    found = finetune(program, text, config=config(ce=1.0, kl=0.0, max_tokens=8 * 24 * 2), tokenizer=tokenizer)
    assert found.teacher == ""
    assert found.perplexity_ann is None
    assert found.to_json()["perplexity_change"] is None
    with pytest.raises(ArtifactError, match="gone that the program was compiled from is not there: give a teacher"):
        finetune(program, text, config=config(), tokenizer=tokenizer)


def test_an_analog_program_is_trained_too(written: Path, text: Path) -> None:
    found = finetune(written / BASELINE, text, config=config(ce=1.0, kl=0.0))
    assert found.to_json()["firing_rate_after"] is None
    assert found.to_json()["perplexity_after"] < found.to_json()["perplexity_before"]


def test_validation_text_of_its_own(compiled: Path, text: Path, original: Program, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the dog sleeps. " * 40)
    found = finetune(compiled, text, config=config(max_tokens=8 * 24 * 2, validation_windows=5), validation=held_out, teacher=original)
    tokens = tokens_from(held_out, load_tokenizer(compiled / "tokenizer"), 24, 5 * 24)
    assert found.validation["sha256"] == tokens.sha256
    assert found.to_json()["perplexity_before"] == pytest.approx(perplexity(ntc.load(compiled), tokens), rel=1e-5)


def test_streaming(compiled: Path, text: Path, original: Program, tmp_path: Path) -> None:
    """Streamed text is read again from its beginning for the baseline."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("the dog sleeps. " * 40)
    found = finetune(compiled, text, config=config(max_tokens=8 * 24 * 3), streaming=True, validation=held_out, baseline=True, teacher=original)
    assert found.data["tokens"] is None
    assert figures_of(found.baseline)["data_sha256"] == found.data["sha256"]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give a validation text"):
        finetune(compiled, text, config=config(), streaming=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"config": config(rows=500)}, DataError, "too few for one step of 500 windows"),
        ({"config": config(window=25)}, ConfigError, "a window of 25 tokens is longer than the model's context of 24"),
        ({"config": config(group="thresholds"), "baseline": True}, ConfigError, "no baseline for the group thresholds"),
        ({"baseline": True, "baseline_lr": -1.0}, ConfigError, "lr is a positive number, got -1.0"),
        ({"data": "nowhere.txt"}, DataError, "nowhere.txt"),
        ({"teacher": "nowhere"}, ntc.CaptureError, "nowhere"),
        ({"validation": "nowhere.txt"}, DataError, "cannot read the text nowhere.txt"),
        ({"program": "nowhere"}, ArtifactError, "there is no folder nowhere"),
    ],
)
def test_what_is_refused_leaves_nothing(compiled: Path, text: Path, original: Program, tmp_path: Path, options: Any, error: Any, says: str) -> None:
    given = {"program": compiled, "data": text, "config": config(), "teacher": original, "work": tmp_path / "work", **options}
    with pytest.raises(error, match=says):
        finetune(given.pop("program"), given.pop("data"), **given)
    assert not (tmp_path / "work").exists()


def test_a_short_text_needs_a_validation_text(compiled: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the dog. " * 4)
    with pytest.raises(DataError, match="too few to hold out 1 windows of 24 for validation: give a validation text"):
        finetune(compiled, short, config=config(rows=1))


def test_a_failed_run_hands_over_its_best_program(compiled: Path, text: Path, original: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.training.watch import Divergence

    def see(self: Any, step: int, loss: float) -> None:
        if step == 9:
            raise TrainingError("the loss diverges")

    monkeypatch.setattr(Divergence, "see", see)
    with pytest.raises(TrainingError) as raised:
        finetune(compiled, text, config=config(lr=3e-3), teacher=original, work=tmp_path / "work", keep_best=True)
    best = raised.value.best
    assert isinstance(best, Finetuned)
    assert best.outcome.best_step == 6
    assert best.to_json()["perplexity_after"] < best.to_json()["perplexity_before"]
    with pytest.raises(TrainingError) as raised:
        finetune(compiled, text, config=config(lr=3e-3), teacher=original, work=tmp_path / "again")
    assert raised.value.best is None


def test_a_run_goes_on_in_its_baseline(compiled: Path, text: Path, original: Program, tmp_path: Path, found: Finetuned) -> None:
    def stop(news: News) -> None:
        if news.stage == "baseline: train" and news.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(compiled, text, config=config(lr=3e-3), teacher=original, baseline=True, work=tmp_path, news=stop)
    said: list[str] = []
    again = finetune(compiled, text, config=config(lr=3e-3), teacher=original, baseline=True, work=tmp_path, news=lambda n: said.append(n.message or n.stage))
    assert "train" not in said
    assert f"baseline: going on from step 8 of the run in {tmp_path}" in said
    assert again.to_json()["perplexity_tuned"] == found.to_json()["perplexity_tuned"]


def test_two_processes_are_one(compiled: Path, text: Path, original: Program, tmp_path: Path) -> None:
    """With half of each step's windows in either, the analog network has the same losses but for the order of float32 sums."""
    folder = tmp_path / "analog"
    folder.mkdir()
    artifact.save(original, folder)
    shutil.copytree(compiled / "tokenizer", folder / "tokenizer")
    artifact.seal(folder)
    options = [
        folder, "--data", text, "-o", tmp_path / "two", "--max-tokens", TOKENS, "--rows", 8, "--kl", 0, "--ce", 1, "--set", "log_every=1",
        "--no-bf16", "--json",
    ]  # fmt: skip
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 -m ntc"
    two = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "finetune", *map(str, options)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["steps"] == 12  # one process speaks
    one = finetune(folder, text, config=config(kl=0.0, ce=1.0, log_every=1, validate_every=50, warmup=None))
    rows = [json.loads(line) for line in (tmp_path / "two" / "training.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows[1:]] == pytest.approx([r["loss"] for r in one.log[1:]], rel=1e-4)
    assert rows[-1]["valid_perplexity"] == pytest.approx(one.log[-1]["valid_perplexity"], rel=1e-3)
