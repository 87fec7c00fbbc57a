"""Exact resume: whenever a run stops, it goes on with the same losses, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ntc.errors import ArtifactError, ConfigError
from ntc.program import Program
from ntc.training.checkpoint import WorkFolder, check_same_run, locked, remove
from ntc.training.state import News, Outcome
from tests.training.killed_child import train
from tests.training.training_cases import WINDOW, config, trainer

STEPS = 12


def plain(rows: Any) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def same_tensors(a: Program, b: Program) -> bool:
    return all(torch.equal(t, b.tensor(n)) for n, t in a.tensors.items())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return trainer(tmp_path_factory.mktemp("whole")).run()


def interrupted(folder: Path, at: int, stage: str = "train") -> None:
    """A run that Ctrl-C stops after so many steps, or in the middle of a validation."""

    def stop(news: News) -> None:
        if news.stage == stage and run.state.step == at:
            raise KeyboardInterrupt

    run = trainer(folder, news=stop)
    with pytest.raises(KeyboardInterrupt):
        run.run()


@pytest.mark.parametrize("stage", ["train", "validate"])
@pytest.mark.parametrize("at", [4, 8])
def test_ctrl_c_loses_nothing(tmp_path: Path, uninterrupted: Outcome, at: int, stage: str) -> None:
    interrupted(tmp_path, at, stage)
    run = trainer(tmp_path)
    assert run.resumed_step == at  # not only the last planned checkpoint
    outcome = run.run()
    assert plain(outcome.rows) == plain(uninterrupted.rows)
    assert plain(logged(tmp_path)) == plain(uninterrupted.rows)
    assert same_tensors(outcome.program, uninterrupted.program)


def test_every_step_may_be_the_last(tmp_path: Path, uninterrupted: Outcome) -> None:
    for at in range(1, STEPS):
        interrupted(tmp_path, at)
    outcome = trainer(tmp_path).run()
    assert plain(outcome.rows) == plain(uninterrupted.rows)
    assert same_tensors(outcome.program, uninterrupted.program)


def test_rows_behind_the_checkpoint_are_dropped(tmp_path: Path, uninterrupted: Outcome) -> None:
    run = trainer(tmp_path, config(save_every=5, validate_every=100))
    run._look()
    for _ in range(8):
        run._advance()
        run._look()
    assert [r["step"] for r in logged(tmp_path)] == list(range(9))
    again = trainer(tmp_path, config(save_every=5, validate_every=100))  # as after a kill: nothing was saved since step 5
    assert again.resumed_step == 5
    assert [r["step"] for r in logged(tmp_path)] == list(range(6))
    assert [r["loss"] for r in again.run().rows[1:]] == [r["loss"] for r in uninterrupted.rows[1:]]


def test_a_finished_run_is_not_run_again(tmp_path: Path, uninterrupted: Outcome) -> None:
    trainer(tmp_path).run()
    news: list[News] = []
    again = trainer(tmp_path, news=news.append).run()
    assert not [n for n in news if n.stage == "train"]
    assert same_tensors(again.program, uninterrupted.program)
    assert plain(again.rows) == plain(uninterrupted.rows)


def test_a_resumed_run_says_so(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    news: list[News] = []
    trainer(tmp_path, news=news.append)
    assert [n.message for n in news if n.stage == "resume"] == [f"going on from step 3 of the run in {tmp_path}"]


# ------------------------------------------------------------------------------------------------ kills


def test_sigkill(tmp_path: Path, uninterrupted: Outcome) -> None:
    """Killed three times where it hurts: amid the steps, wherever that process was."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.killed_child"])
    killed = 0
    for rows in (2, 6, 10):
        child = context.Process(target=train, args=(tmp_path,))
        child.start()
        assert child.pid is not None
        log = tmp_path / "training.jsonl"
        deadline = time.monotonic() + 120
        while child.is_alive() and time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= rows):
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        child.close()
    assert killed == 3
    run = trainer(tmp_path)
    assert run.resumed_step is not None
    outcome = run.run()
    assert plain(outcome.rows) == plain(uninterrupted.rows)
    assert plain(logged(tmp_path)) == plain(uninterrupted.rows)
    assert same_tensors(outcome.program, uninterrupted.program)


# ------------------------------------------------------------------------------------------------ refusals


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    before = (tmp_path / "training.last.pt").read_bytes()
    with pytest.raises(ConfigError, match=r"was begun with lr = 0.003 \(now 0.1\), warmup = 2 \(now default\): give the same again"):
        trainer(tmp_path, config(lr=0.1, warmup=None))
    with pytest.raises(ConfigError, match="was begun with another training text: give"):
        trainer(tmp_path, identity={"training text": "another"})
    trainer(tmp_path, config(save_every=1, save_minutes=9.0))  # when it is saved is nobody's business
    assert (tmp_path / "training.last.pt").read_bytes() == before


def test_differences_are_those_of_the_options() -> None:
    same = {"config": {"lr": 0.1, "rows": 4}, "program": "a"}
    check_same_run(same, same, Path("x"))
    with pytest.raises(ConfigError, match=r"rows = 4 \(now 8\), seed = default \(now 3\), another program: give"):
        check_same_run(same, {"config": {"lr": 0.1, "rows": 8, "seed": 3}, "program": "b"}, Path("x"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "list"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    work = WorkFolder(tmp_path)
    work.save(work.last, {"raw": {"w": torch.zeros(1000)}})
    whole = work.last.read_bytes()
    work.last.write_bytes({"truncated": whole[:-500], "garbage": b"\xff" * 100, "empty": b"", "list": b""}[damage])
    if damage == "list":
        torch.save([1, 2], work.last)
    with pytest.raises(ArtifactError, match=r"checkpoint.*; delete .* to begin anew"):
        work.load(work.last)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    work = WorkFolder(tmp_path)
    torch.save({"raw": Evil()}, work.last)
    with pytest.raises(ArtifactError, match="damaged"):
        work.load(work.last)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder(tmp_path)
    work.save(work.last, {"step": 1})

    def full(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*training.last.pt: No space left on device"):
        work.save(work.last, {"step": 2})
    assert work.load(work.last) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["training.last.pt"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "new")
    assert work.load(work.last) is None


def test_processes_but_the_first_write_nothing(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "other", writes=False)
    work.save(work.last, {"step": 1})
    work.append({"step": 1})
    work.rewrite([])
    assert not (tmp_path / "other").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "work"):
        with pytest.raises(ConfigError, match="another run works in"), locked(tmp_path / "work"):
            pass
        (tmp_path / "work" / "training.last.pt").write_bytes(b"")
    with locked(tmp_path / "work"):
        pass
    assert (tmp_path / "work" / "training.last.pt").exists()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "work"):
        (tmp_path / "work" / "training.jsonl").write_text("")
    assert not (tmp_path / "work").exists()


def test_removing_a_work_folder_leaves_what_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    WorkFolder(folder).save(folder / "training.last.pt", {})
    (folder / "notes.txt").write_text("mine")
    remove(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    remove(folder)
    assert not folder.exists()


def test_rows_are_json_without_nan(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.append({"step": 1, "loss": float("nan"), "rates": {"q": float("inf"), "k": 0.5}})
    assert logged(tmp_path) == [{"step": 1, "loss": None, "rates": {"q": None, "k": 0.5}}]


def test_the_window_size_is_the_one_of_the_cases() -> None:
    assert config().step_tokens == 4 * WINDOW
    assert config().steps() == STEPS
