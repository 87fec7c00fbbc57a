"""The benchmark of generation runs, and its rows say what they compare; the times are nobody's promise."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "generation.py"


def test_it_runs_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--contexts", "6,20", "--layers", "1", "--width", "32", "--vocabulary", "61", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *sizes, "--json", "--plot", str(tmp_path / "plot")])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(BENCHMARK), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert stopped.value.code == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {(r["form"].split()[0], r["context"]): r for r in rows}
    assert set(found) == {("spiking", 6), ("spiking", 20), ("softmax", 6), ("softmax", 20)}
    assert all(found[form, 6]["ratio"] == 1 for form in ("spiking", "softmax"))
    assert all(r["milliseconds"] > 0 and r["ratio"] > 0 for r in rows)
    assert found["spiking", 6]["state_bytes"] == found["spiking", 20]["state_bytes"]
    assert found["softmax", 20]["state_bytes"] - found["softmax", 6]["state_bytes"] == 14 * 2 * 32 * 4
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8").startswith("<?xml")
