"""``ntc finetune`` and ``ntc compile --finetune``: for people and with --json, stopped and resumed, refused with one sentence."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import TEXT, content, run_ntc, start_ntc
from tests.cli.refusals import nothing_left, refused
from tests.cli.test_commands import check_keys, result, shown

QUICK = ("--max-tokens", 8 * 24 * 6, "--blockwise-tokens", 0, "--rows", 8, "--no-bf16", "--lr", 3e-3, "--set", "warmup=1")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(TEXT * 80, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quick(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Options of a run that takes no time: its teacher lies in a folder and need not be captured."""
    from ntc import artifact
    from ntc.training.prepare import network_from

    folder = tmp_path_factory.mktemp("original") / "original"
    folder.mkdir()
    artifact.save(network_from(model), folder)
    artifact.seal(folder)
    return (*QUICK, "--teacher", folder)


def test_json(compiled: Path, words: Path, tmp_path: Path) -> None:
    data = result("finetune", compiled, "--data", words, "-o", tmp_path / "out", *QUICK, "--baseline", "--validate-every", 3)
    check_keys("finetune", data)
    assert data["steps"] == 6
    assert data["perplexity_after"] < data["perplexity_before"]
    assert data["config"]["lr"] == 3e-3
    assert data["config"]["warmup"] == 1
    names = {f["name"] for f in data["files"]}
    assert {"program.safetensors", "training.jsonl", "curve.png", "curve.svg", "baseline/program.safetensors"} <= names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # the work folder is gone
    quality = result("evaluate", tmp_path / "out", "--data", words, "--max-tokens", 480)  # finds the baseline by itself
    assert quality["perplexity_tuned"] is not None
    assert quality["tuned_training"] == {"same": True, "differences": []}


def test_table(compiled: Path, words: Path, quick: Any, tmp_path: Path) -> None:
    out = shown("finetune", compiled, "--data", words, "-o", tmp_path / "out", *quick)
    for part in ("Fine-tuned", "6 steps", "words.txt", "before", "after", "original", "perplexity", "firing rates  q", "Next: ntc evaluate"):
        assert part in out, part
    assert "original, tuned" not in out


def test_work_is_kept_on_demand_and_the_log_is_that_of_the_folder(compiled: Path, words: Path, quick: Any, tmp_path: Path) -> None:
    result("finetune", compiled, "--data", words, "-o", tmp_path / "out", *quick, "--keep-work")
    work = tmp_path / "out.work"
    assert {"training.last.pt", "training.jsonl"} <= {p.name for p in work.iterdir()}
    assert (work / "training.jsonl").read_bytes() == (tmp_path / "out" / "training.jsonl").read_bytes()


def test_the_same_command_goes_on_after_a_kill(compiled: Path, words: Path, quick: Any, tmp_path: Path) -> None:
    arguments = ("finetune", compiled, "--data", words, *quick, "--max-tokens", 8 * 24 * 120, "--save-every", 5, "--set", "log_every=5")
    process = start_ntc(*arguments, "-o", tmp_path / "out")
    log = tmp_path / "out.work" / "training.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.read_text().count("\n") > 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    refused(*arguments, "--lr", 0.1, "-o", tmp_path / "out", says=r"was begun with lr = 0.003 \(now 0.1\): give the same again")
    ran = run_ntc(*arguments, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert re.search(r"going on from step \d+ of the run in", ran.err)
    assert ran.json["resumed_step"] > 0
    assert ran.json["resumed_step"] % 5 == 0
    assert ran.json["steps"] == 120
    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(0, 121, 5))


def test_ctrl_c(compiled: Path, words: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.training.loop import Trainer

    say = Trainer._say

    def stop(self: Any, stage: str, *more: Any) -> None:
        say(self, stage, *more)
        if stage == "train" and self.state.step == 3:
            signal.raise_signal(signal.SIGINT)

    arguments = ("finetune", compiled, "--data", words, "-o", tmp_path / "out", *quick)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_say", stop)
        ran = run_ntc(*arguments)
    assert (ran.code, ran.err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "out").exists()
    assert result(*arguments)["resumed_step"] == 3


def test_failure_and_keep_best(compiled: Path, words: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.errors import TrainingError
    from ntc.training.watch import Divergence

    def see(self: Any, step: int, loss: float) -> None:
        if step == 5:
            raise TrainingError("the loss diverges")

    monkeypatch.setattr(Divergence, "see", see)
    arguments = ("finetune", compiled, "--data", words, *quick, "--validate-every", 2)
    refused(*arguments, "-o", tmp_path / "a", says="the loss diverges$")
    assert not (tmp_path / "a").exists()
    refused(*arguments, "-o", tmp_path / "b", "--keep-best", says=r"the loss diverges; the best program so far, of step 4 with perplexity .* is in .*b$")
    assert result("energy", tmp_path / "b")["tokens"]


def test_warnings_are_shown_once(compiled: Path, words: Path, quick: Any, tmp_path: Path) -> None:
    ran = run_ntc("finetune", compiled, "--data", words, "-o", tmp_path / "out", *quick, "--target-rate", 0.01, "--json")
    assert ran.code == 0, ran.err
    (warning,) = [w for w in ran.json["warnings"] if "above the target rate of 0.01" in w]
    assert ran.err.count("above the target rate") == 1
    assert warning in ran.err.replace("\n", " ")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--group", "attention"), "no group of parameters is called 'attention'"),
        (("--max-minutes", 1), "a run ends after max_tokens or after max_minutes"),
        (("--lr", "fast"), "--lr"),
        (("--set", "weight-decay=-1"), "weight_decay is a number, not negative, got -1"),
        (("--set", "weight_decy=1"), "no option 'weight_decy'; did you mean weight_decay"),
        (("--set", "clip"), "--set takes KEY=VALUE, got 'clip'"),
        (("--surrogate", "tanh"), "no surrogate gradient is called 'tanh'"),
        (("--window", 25), "window of 25 tokens is longer than the model's context of 24"),
        (("--rows", 7, "--accumulate", 2), "7 windows per step do not divide into 2"),
        (("--teacher", "nowhere/at/all"), "nowhere/at/all"),
        (("--baseline", "--group", "thresholds"), "there is no baseline for the group thresholds"),
        (("--baseline-from", "nowhere"), "there is no folder nowhere"),
        (("--validation", "nowhere.txt"), "cannot read the text nowhere.txt"),
        (("--streaming",), "give a validation text"),
    ],
)
def test_bad_options(compiled: Path, words: Path, tmp_path: Path, options: tuple[Any, ...], says: str) -> None:
    refused("finetune", compiled, "--data", words, "-o", tmp_path / "out", *QUICK, *options, says=says)
    nothing_left(tmp_path)


def test_bad_folders_and_texts(model: Path, compiled: Path, words: Path, copied: Path, tmp_path: Path) -> None:
    before = content(copied)
    refused("finetune", model, "--data", words, "-o", tmp_path / "out", says="holds no compiled program")
    refused("finetune", compiled, "--data", tmp_path / "none.txt", "-o", tmp_path / "out", says=r"none\.txt")
    refused("finetune", compiled, "--data", words, "-o", copied, says="is not empty; choose another one, or give --overwrite")
    refused("finetune", copied, "--data", words, "-o", copied, "--overwrite", says="is the folder of the program itself")
    refused("finetune", compiled, "-o", tmp_path / "out", says="--data")
    assert content(copied) == before
    nothing_left(tmp_path, copied.name)


# ------------------------------------------------------------------------------------------------ all the way from a model


def test_compile_goes_all_the_way(model: Path, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = result("compile", model, "-o", out, "--finetune", words, "--finetune-tokens", 1_000, "--group", "ssa", "--emit", "netlist")
    check_keys("compile", {**data, "finetune": None})
    check_keys("finetune", {**data["finetune"], "folder": "", "from": "", "files": data["files"]})
    assert data["finetune"]["group"] == "ssa"
    assert data["seconds"]["finetune"] > 0
    assert {"program.safetensors", "netlist.json", "training.jsonl", "curve.svg"} <= {f["name"] for f in data["files"]}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["history"][-1]["name"] == "finetune"
    assert "training.jsonl" in manifest["files"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    measured = result("evaluate", out, "--data", model / "calibration.txt", "--max-tokens", data["quality"]["tokens"])
    assert measured["perplexity"] == pytest.approx(data["quality"]["perplexity"], rel=1e-6)  # what was measured is what was written


def test_compile_refuses_before_it_begins(model: Path, words: Path, tmp_path: Path) -> None:
    refused("compile", model, "-o", tmp_path / "out", "--finetune", tmp_path / "none.txt", says=r"none\.txt")
    refused("compile", model, "-o", tmp_path / "out", "--finetune-tokens", 5, says="--finetune-tokens is for fine-tuning: give the text")
    refused("compile", model, "-o", tmp_path / "out", "--group", "ssa", says="--group is for fine-tuning")
    refused("compile", model, "-o", tmp_path / "out", "--finetune", words, "--group", "all of it", says="no group of parameters")
    nothing_left(tmp_path)


def test_the_bar_is_shown_on_a_terminal_and_messages_everywhere() -> None:
    import io

    from rich.console import Console

    from ntc.cli.output import Output
    from ntc.cli.training_progress import training_progress
    from ntc.training.state import News

    figures = {"loss": 1.2345, "valid_perplexity": 98.76, "rates": {"h.0.q": 0.25, "h.0.k": 0.35}, "tokens_per_second": 2345.6, "seconds_left": 42.0}
    for terminal, silent in ((True, False), (False, False), (True, True)):
        stream = io.StringIO()
        output = Output(False, 0, Console(file=io.StringIO()), Console(file=stream, force_terminal=terminal, width=120), io.StringIO())
        with training_progress(output, silent=silent) as news:
            news(News("load"))
            news(News("resume", message="going on from step 7"))
            news(News("train", 8, 20, figures))
            news(News("warning", message="dead layer"))
        shown = stream.getvalue()
        bar = all(part in shown for part in ("8/20", "loss 1.234", "perplexity 98.8", "rate 0.300", "42.0 s left", "2,346 tokens/s"))
        assert bar is (terminal and not silent)
        assert ("going on from step 7" in shown and "dead layer" in shown) is not silent
