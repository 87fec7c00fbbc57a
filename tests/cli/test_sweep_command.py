"""``ntc sweep`` on a tiny model: the figures are those of the other commands, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import run_ntc
from tests.cli.refusals import refused


def test_the_figures_are_those_of_evaluate_and_energy(model: Path, compiled: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("sweep", model, "--data", text, "-o", tmp_path / "out", "--json", "--workers", 1)
    ran = run_ntc(*arguments, "--steps", "1,2", "--also", compiled)
    assert ran.code == 0, ran.err
    points = {p["label"]: p for p in ran.json["points"]}
    assert set(points) == {"T = 1", "T = 2", str(compiled)}
    run_ntc("compile", model, "-o", tmp_path / "two", "--steps", 2, "--no-measure")
    for folder, label in ((tmp_path / "two", "T = 2"), (compiled, str(compiled))):
        quality = run_ntc("evaluate", folder, "--data", text, "--against", model, "--max-tokens", 8192, "--json").json
        cost = run_ntc("energy", folder, "--data", text, "--json").json
        assert points[label]["perplexity"] == pytest.approx(quality["perplexity"], rel=1e-6)
        assert points[label]["firing_rate"] == pytest.approx(quality["firing_rate"], rel=1e-6)
        assert points[label]["energy"]["total"]["snn_pj"] == pytest.approx(cost["total"]["snn_pj"], rel=1e-6)
        assert points[label]["energy"]["attention"]["snn_pj"] == pytest.approx(cost["attention"]["ssa_pj"], rel=1e-6)
    report = tmp_path / "front.html"
    shown = run_ntc(*(a for a in arguments if a != "--json"), "--steps", "1,2", "--also", compiled, "--report", report)
    page = report.read_text(encoding="utf-8")
    assert f"ntc sweep {model} --data {text} -o {tmp_path / 'out'} --steps 1,2 --also {compiled} --cost total" in page and "<svg" in page
    assert "Wrote" in shown.out
    assert "no other setting is better in both" in shown.out
    assert sum(line.startswith("*") for line in shown.out.splitlines()) == len(ran.json["front"])


def test_two_processes_measure_what_one_does(model: Path, text: Path, tmp_path: Path) -> None:
    found = [
        run_ntc("sweep", model, "--data", text, "-o", tmp_path / str(n), "--steps", "1,2", "--workers", n, "--json").json["points"] for n in (1, 2)
    ]
    for one, two in zip(*found, strict=True):
        assert one["label"] == two["label"]
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-6)
        assert one["energy"]["total"]["snn_pj"] == pytest.approx(two["energy"]["total"]["snn_pj"], rel=1e-6)


def test_bad_options(model: Path, text: Path, tmp_path: Path) -> None:
    given = ("sweep", model, "--data", text, "-o", tmp_path / "out")
    refused(*given, "--vary", "percentile", says="--vary takes KEY=VALUE, got 'percentile'")
    refused(*given, "--steps", "one", says="steps")
    refused(*given, "--cost", "all", says="the cost of a sweep is total or attention")
    refused(*given, "--also", model, says="is no compiled folder")
    (tmp_path / "notes.html").write_text("my notes")
    refused(*given, "--report", tmp_path / "notes.html", says="is no page of ntc sweep: it is left as it is")
    assert not (tmp_path / "out").exists()
