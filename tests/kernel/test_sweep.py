"""Which settings are worth it, and what a sweep keeps of an earlier one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntc import sweep as module
from ntc.errors import ArtifactError, ConfigError, DataError, PassError
from ntc.sweep import Plan, Setting, dominating, grid, sweep

coordinates = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.nan, math.inf])


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_the_front_is_what_no_point_dominates(points: list[tuple[float, float]]) -> None:
    known = {i: p for i, p in enumerate(points) if all(map(math.isfinite, p))}
    expected = {
        i for i, p in known.items() if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in known.values())
    }  # fmt: skip
    found = dominating(points)
    assert set(found) == expected
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_a_grid_is_every_combination_once() -> None:
    found = grid(["a", "b"], {"steps": [1, 2], "percentile": [90, 90]})
    assert [(s.recipe, dict(s.options)) for s in found] == [
        (name, {"steps": steps, "percentile": 90}) for name in "ab" for steps in (1, 2)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="the option steps is varied over no value"):
        grid(["a"], {"steps": []})


# Figures by T; T = 3 is dominated by T = 2, and T = 9 cannot be compiled.
FIGURES = {1: (10.0, 90.0), 2: (20.0, 70.0), 3: (30.0, 75.0), 4: (40.0, 60.0)}


class Bench:
    """Stands for compiling and measuring."""

    measured: list[int] = []

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def measure(self, setting: Setting) -> dict[str, Any]:
        steps = setting.options["steps"]
        Bench.measured.append(steps)
        if steps not in FIGURES:
            return {"error": f"no network of {steps} steps"}
        cost, perplexity = FIGURES[steps]
        energies = {"snn_pj": cost * 1e6, "ann_pj": 50e6, "reduction": 1 - cost / 50}
        return {
            "steps": steps, "perplexity": perplexity, "perplexity_ann": 50.0, "perplexity_change": perplexity / 50 - 1, "top1_agreement": 0.5,
            "cosine": 0.9, "kl": 0.1, "firing_rate": 0.2, "events_per_value": 0.2 * steps, "perplexity_change_interval": None,
            "energy": {"total": energies, "attention": {**energies, "snn_pj": -cost}}, "steps_times_rate": None, "uncounted_share": 0.0,
        }  # fmt: skip


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(module, "_Bench", Bench)
    Bench.measured = []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a text")
    return Plan(str(tmp_path / "model"), tmp_path / "text.txt")


def at(*steps: int) -> list[Setting]:
    return grid(["neurtransformer"], {"steps": list(steps)})


def test_points_front_and_files(plan: Plan, tmp_path: Path) -> None:
    found = sweep(plan, at(4, 1, 3, 2), tmp_path / "out", workers=1)
    assert [p["label"] for p in found["points"]] == ["T = 1", "T = 2", "T = 3", "T = 4"]
    assert found["front"] == ["T = 1", "T = 2", "T = 4"]
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written["points"] == found["points"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(found["files"]) == ["front.png", "front.svg", "points.jsonl", "sweep.json"]
    assert sweep(plan, at(4, 1, 3, 2), tmp_path / "out", cost="attention", workers=1)["front"] == ["T = 4"]  # costs are turned around there


def test_what_is_there_is_not_measured_again(plan: Plan, tmp_path: Path) -> None:
    sweep(plan, at(1, 2), tmp_path / "out", workers=1)
    points = tmp_path / "out" / "points.jsonl"
    points.write_text(points.read_text()[:-20])  # killed in the middle of a line
    Bench.measured = []
    found = sweep(plan, at(1, 2, 3), tmp_path / "out", workers=1)
    assert Bench.measured == [2, 3]
    assert len(found["points"]) == 3
    Bench.measured = []
    sweep(plan, at(1, 3), tmp_path / "out", workers=1)
    assert Bench.measured == []
    sweep(plan, at(1), tmp_path / "out", workers=1, overwrite=True)
    assert Bench.measured == [1]


def test_points_of_another_plan_are_not_mixed_with_these(plan: Plan, tmp_path: Path) -> None:
    sweep(plan, at(1), tmp_path / "out", workers=1)
    before = (tmp_path / "out" / "points.jsonl").read_bytes()
    (tmp_path / "text.txt").write_text("another text")
    with pytest.raises(ConfigError, match="has points of a sweep with other data: choose another folder, or give --overwrite"):
        sweep(plan, at(1), tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "points.jsonl").read_bytes() == before
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "model" / "config.json").write_text('{"n_layer": 2}')
    with pytest.raises(ConfigError, match="a sweep with other model:"):
        sweep(plan, at(1), tmp_path / "out", workers=1)


def test_a_setting_that_fails_is_said_and_tried_again(plan: Plan, tmp_path: Path) -> None:
    found = sweep(plan, at(9, 1), tmp_path / "out", workers=1)
    assert [(p["label"], p.get("error")) for p in found["points"]] == [("T = 1", None), ("T = 9", "no network of 9 steps")]
    Bench.measured = []
    sweep(plan, at(9, 1), tmp_path / "out", workers=1)
    assert Bench.measured == [9]
    with pytest.raises(ConfigError, match="none of the 1 settings could be measured; the first one says: no network of 9 steps"):
        sweep(plan, at(9), tmp_path / "out", workers=1)


def test_wrong_input_is_refused_before_any_work(plan: Plan, tmp_path: Path) -> None:
    for settings, says in (
        ([], "there is no setting to measure"), (grid(["neurtransformer"], {"stepz": [1]}), "stepz"), (grid(["nothing"], {}), "no recipe called 'nothing'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            sweep(plan, settings, tmp_path / "out")
    with pytest.raises(ConfigError, match="the cost of a sweep is total or attention, got 'all'"):
        sweep(plan, at(1), tmp_path / "out", cost="all")
    with pytest.raises(ConfigError, match="at least one process, got 0"):
        sweep(plan, at(1), tmp_path / "out", workers=0)
    with pytest.raises(ArtifactError, match="is no compiled folder"):
        sweep(plan, [Setting(folder=str(tmp_path / "model"))], tmp_path / "out")
    with pytest.raises(DataError, match="cannot read the text"):
        sweep(Plan(plan.model, tmp_path / "nowhere.txt"), at(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="holds something else than a sweep"):
        sweep(plan, at(1), tmp_path / "model")
    assert Bench.measured == []


def test_a_sentence_of_a_pass_becomes_that_of_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntc.sweep import _Bench

    def refuse(*arguments: object, **options: object) -> None:
        raise PassError("%h.0.attn has no integer form")

    monkeypatch.setattr(module, "compile_model", refuse)
    bench = object.__new__(_Bench)
    bench.plan, bench.analog, bench.tokenizer = Plan("nowhere", Path("text")), None, None  # type: ignore[assignment]
    assert bench.measure(Setting("neurtransformer", {})) == {"error": "%h.0.attn has no integer form"}
