"""Which settings are worth it, and what a sweep keeps of an earlier one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntc.errors import ArtifactError, ConfigError, DataError, PassError
from ntc.sweep import Plan, Setting, bench, dominating, grid, sweep
from ntc.sweep.chart import Dot, scatter
from ntc.sweep.document import MARK, page

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
    monkeypatch.setattr(bench, "Bench", Bench)
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
    assert (
        sorted(p.name for p in (tmp_path / "out").iterdir())
        == sorted(found["files"])
        == ["front.png", "front.svg", "points.jsonl", "sweep.json"]
    )
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
    def refuse(*arguments: object, **options: object) -> None:
        raise PassError("%h.0.attn has no integer form")

    monkeypatch.setattr(bench, "compile_model", refuse)
    one = object.__new__(bench.Bench)
    one.plan, one.analog, one.tokenizer = Plan("nowhere", Path("text")), None, None  # type: ignore[assignment]
    assert one.measure(Setting("neurtransformer", {})) == {"error": "%h.0.attn has no integer form"}


# ------------------------------------------------------------------------------------------------ the page


def html(plan: Plan, folder: Path, *steps: int, cost: str = "total") -> str:
    return page(sweep(plan, at(*steps), folder, cost=cost, workers=1), "ntc sweep again", {"ntc-compiler": "1"})


def test_the_page_says_what_the_sweep_does(plan: Plan, tmp_path: Path) -> None:
    text = html(plan, tmp_path / "out", 1, 2, 3, 4, 9)
    assert text.splitlines()[1] == MARK
    visible = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    for part in (
        "3 of 4 settings are beaten by no other in both perplexity and energy of the whole network.", "T = 9 no network of 9 steps",
        "T = 1: perplexity 90.00 instead of 50.00, 80.0 % less energy; T = 2: perplexity 70.00", "ntc sweep again", "horowitz-45nm-fp32",
        hashlib.sha256(b"a text").hexdigest(), "no chip was measured", "energy of the whole network [µJ per token]", "+80.0 %",
    ):  # fmt: skip
        assert part in visible, part
    assert "<script" not in text and not re.search(r'(?:src|href)\s*=\s*"', text), "nothing is loaded"
    assert text.count("<circle") == 4 and text.count('<circle class="front"') == 3 and text.count('<rect class="original"') == 1
    assert text.count('<tr class="best">') == 3
    assert text == html(plan, tmp_path / "out", 1, 2, 3, 4, 9), "the same sweep gives the same bytes"
    assert "One of 2 settings is beaten by no other in both" in html(plan, tmp_path / "out", 1, 2, cost="attention")


def test_labels_of_the_page_are_no_markup(plan: Plan, tmp_path: Path) -> None:
    data = sweep(plan, at(1, 2, 9), tmp_path / "out", workers=1)
    for row in data["points"]:
        row["label"] = "<img src=x onerror=alert(1)>"
    text = page({**data, "model": "<b>m</b>"}, "<i>", {})
    assert "<img" not in text and "<b>m" not in text and "&lt;img" in text


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(1.001, 1e5)), min_size=1, max_size=14))
def test_a_chart_holds_its_points_and_no_label_covers_another(points: list[tuple[float, float]]) -> None:
    dots = [Dot(x, y, f"setting {i}", "", "front" if i % 2 else "beaten") for i, (x, y) in enumerate(points)]
    chart = scatter(dots, "x", "y", "label")
    for dot in chart["dots"]:
        assert chart["left"] <= dot["x"] <= chart["right"] and chart["top"] <= dot["y"] <= chart["bottom"]
    rising = sorted(range(len(points)), key=lambda i: points[i][0])
    assert [chart["dots"][i]["x"] for i in rising] == sorted(dot["x"] for dot in chart["dots"])
    falling = sorted(range(len(points)), key=lambda i: -points[i][1])
    assert [chart["dots"][i]["y"] for i in falling] == sorted(dot["y"] for dot in chart["dots"])
    assert 1 <= len(chart["y_ticks"]) <= 8 and 1 <= len(chart["x_ticks"]) <= 10
    boxes = []
    for dot in (d for d in chart["dots"] if d["text"]):
        width, at_x, anchor = 7.2 * len(dot["label"]), dot["text"]["x"], dot["text"]["anchor"]
        left = at_x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, dot["text"]["y"] - 11, left + width, dot["text"]["y"] + 2))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_a_browser_shows_the_page(browser: Any, plan: Plan, tmp_path: Path, width: int, scheme: str) -> None:
    out = tmp_path / "front.html"
    out.write_text(html(plan, tmp_path / "out", 1, 2, 3, 4, 9), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view, trouble, requests = context.new_page(), [], []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(out.as_uri())
    assert trouble == [] and requests == [out.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "nothing is too wide"
    # Every label lies in the picture, and the front is drawn in another colour than what is beaten.
    assert view.evaluate(
        """() => {
            const svg = document.querySelector('svg.plot'), frame = svg.getBoundingClientRect();
            const inside = [...svg.querySelectorAll('circle, rect, text')].every((e) => {
                const box = e.getBoundingClientRect();
                return box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
            });
            const fill = (which) => getComputedStyle(svg.querySelector(which)).fill;
            return inside && new Set([fill('.front'), fill('.beaten'), fill('.original')]).size === 3;
        }"""
    )
    view.emulate_media(media="print")
    view.set_viewport_size({"width": 690, "height": 980})
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "a printed table is not cut off"
    context.close()
