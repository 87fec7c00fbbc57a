"""The reference model, killed twenty times at random moments: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import ntc
from tests.cli.conftest import start_ntc

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "examples" / "gpt2-books"
KILLS, STEPS, SAVE_EVERY = 20, 120, 3

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (REFERENCE / "config.json").is_file(), reason="needs the reference model")]


def command(folder: Path, out: Path) -> list[object]:
    return [
        "finetune", folder, "--data", REFERENCE / "calibration.txt", "-o", out, "--window", 64, "--rows", 2, "--max-tokens", 128 * STEPS, "--blockwise-tokens", 0,
        "--save-every", SAVE_EVERY, "--validate-every", 40, "--validation-windows", 4, "--set", "log_every=1", "--no-compile", "--baseline",
    ]  # fmt: skip


def rows(log: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in log.read_text().splitlines()]


def lines(work: Path) -> int:
    return sum(p.read_text().count("\n") for p in work.glob("*.jsonl"))


def test_twenty_kills(tmp_path: Path) -> None:
    ntc.write(ntc.compile(REFERENCE), tmp_path / "program")
    whole = start_ntc(*command(tmp_path / "program", tmp_path / "whole"))
    _, said = whole.communicate(timeout=1800)
    assert whole.returncode == 0, said
    pick, work = random.Random(0), tmp_path / "killed.work"
    for number in range(KILLS):
        process = start_ntc(*command(tmp_path / "program", tmp_path / "killed"))
        begun, deadline = lines(work), time.monotonic() + 600
        if number % 5:  # while it trains; every fifth time wherever it is on its way there
            while process.poll() is None and lines(work) < begun + SAVE_EVERY + 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(pick.uniform(0.0, 1.0))
        else:
            time.sleep(pick.uniform(0.0, 12.0))
        assert process.poll() is None, f"the run was over before kill {number + 1}: make it longer"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed").exists()
    last = start_ntc(*command(tmp_path / "program", tmp_path / "killed"), "--json")
    out, said = last.communicate(timeout=1800)
    assert last.returncode == 0, said
    assert "going on from step" in said
    assert json.loads(out)["resumed_step"] is not None
    for log in ("training.jsonl", "baseline/training.jsonl"):
        assert rows(tmp_path / "killed" / log) == rows(tmp_path / "whole" / log)
    for weights in ("program.safetensors", "baseline/program.safetensors"):
        assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
