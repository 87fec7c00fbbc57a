"""The energy report as a page: what it says, that nothing in it is markup, and how a browser takes it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from programs import TOKENS, canonical, spiking

from ntc.energy import load_constants, measure_energy
from ntc.energy.bars import Bar, stacked
from ntc.energy.document import MARK, page
from ntc.energy.headline import headline
from ntc.energy.wording import count, energy, percent
from ntc.errors import ArtifactError
from ntc.folders import check_page, write_page

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return measure_energy(spiking(), canonical(), TOKENS).to_json(sensitivity=True)


def html(data: dict[str, Any], name: str = "demo") -> str:
    return page(data, name, f"ntc energy {name}", {"ntc-compiler": "1"})


def test_headline_names_its_baselines(data: dict[str, Any]) -> None:
    first, second = headline(data)
    assert re.fullmatch(
        r"Spiking attention takes [\d.]+ % less energy than the original in fp32 and [\d.]+ times the energy of that in int8, by arithmetic alone\.",
        first,
    )
    assert "with memory" in second and "costed as 45 nm CMOS, 0.9 V, fp32; per token, decode." in second
    alone = {**data, "baselines": {"attention": [], "total": []}}
    assert "than the original in the same arithmetic, by" in headline(alone)[0]
    shares = {"attention": [{"baseline": "x", "compute": {"reduction": r}, "compute_and_memory": {"reduction": r}} for r in (-0.5, None)]}
    odd = {**data, "baselines": {**shares, "total": [{"baseline": "x", "compute": {"reduction": None}, "compute_and_memory": {"reduction": 0}}]}}
    assert headline(odd)[0] == "Spiking attention takes 50.0 % more energy than the original in x, by arithmetic alone."
    assert "takes energy that nothing can be compared with, by arithmetic alone; 0.0 % less energy than the original in x" in headline(odd)[1]


def test_the_page_says_what_the_report_does(data: dict[str, Any]) -> None:
    text = html(data)
    assert text.splitlines()[1] == MARK
    for part in (
        headline(data)[0], "not mapped", "Every multiply-accumulate of both networks is counted", "Sensitivity", "partial sums",
        data["data_sha256"], "Horowitz", "ntc energy demo", "perplexity of this program", "transformer.h.1", "3 bits", "T·r",
        "attention products", "softmax", "FFN", "lm_head", "placed on no chip",
    ):  # fmt: skip
        assert part in text, part
    assert "<script" not in text and "http-equiv" in text
    assert not re.search(r'(?:src|href)\s*=\s*"', text), "nothing is loaded"
    assert text == html(data), "the same report gives the same bytes"


def test_the_originals_quality_stands_beside(data: dict[str, Any]) -> None:
    assert "original 60.70, same 96 tokens" in html({**data, "quality": {"perplexity": 61.5, "perplexity_ann": 60.7}})
    assert "same run, same 96 tokens" in html(data)
    assert "perplexity" not in html({**data, "quality": {"perplexity": None, "perplexity_ann": None}}).split("</header>")[0]


def test_uncounted_ops_are_listed(data: dict[str, Any]) -> None:
    row = {"side": "ann", "node": "einsum", "op": "einsum", "module": "m", "macs": 64.0}
    text = html({**data, "uncounted": [row], "uncounted_share": 0.25})
    assert "25.0 %" in text and "einsum" in text and "Every multiply-accumulate" not in text


def test_texts_are_no_markup(data: dict[str, Any]) -> None:
    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        names = ("data_sha256", "title", "source", "scope", "id", "node", "module", "op", "block", "kind", "baseline", "number", "remark")
        return HOSTILE if isinstance(value, str) and key in names else value

    text = html(spoil(copy.deepcopy(data)), HOSTILE)
    assert "<img" not in text and "&lt;img" in text


def test_a_report_of_nothing_that_spikes() -> None:
    same = measure_energy(canonical(n_layer=1), canonical(n_layer=1), TOKENS, load_constants("horowitz-45nm-int8"))
    text = html(same.to_json(sensitivity=True))
    assert "T·r" not in text and "spikes per neuron and step" not in text
    assert "0.0 % less energy than that in int8" in headline(same.to_json())[0]


def test_numbers_as_text() -> None:
    assert [count(x) for x in (None, 0, 12.5, 9999, 12345, 4.2e6, 7e9, 3e12)] == ["not known", "0", "12.5", "9,999", "12.35 k", "4.2 M", "7 G", "3 T"]
    assert [energy(x) for x in (0, 12.5, 1234, 4.2e6, 7e9, 3e12)] == ["0 pJ", "12.5 pJ", "1.234 nJ", "4.2 µJ", "7 mJ", "3 J"]
    assert [percent(x) for x in (None, 0.5, -0.25, -3)] == ["–", "50.0 %", "-25.0 %", "4.0 × as much"]


def test_bars_add_up() -> None:
    chart = stacked([Bar("a", {"x": 3.0, "y": 1.0}), Bar("b", {"y": 2.0, "z": 0.0}, True)], "pJ", 1.0, "label")
    first, second = chart["rows"]
    assert sum(p["width"] for p in first["pieces"]) == pytest.approx(2 * sum(p["width"] for p in second["pieces"]), abs=0.05)
    assert first["pieces"][1]["colour"] == second["pieces"][0]["colour"] != first["pieces"][0]["colour"]
    assert [part["name"] for part in chart["legend"]] == ["x", "y"], "what is nowhere is in no legend"
    assert [t["text"] for t in chart["ticks"]] == ["0 pJ", "1", "2", "3", "4"]
    assert stacked([Bar("a", {})], "pJ", 1.0, "empty")["rows"][0]["pieces"] == []


def test_places_that_are_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"is a folder; give a file, such as .*report.html"):
        check_page(tmp_path, MARK, "ntc energy", "report.html")
    with pytest.raises(ArtifactError, match="there is no folder"):
        check_page(tmp_path / "none" / "x.html", MARK, "ntc energy", "report.html")
    mine = tmp_path / "mine.html"
    mine.write_text("my notes")
    with pytest.raises(ArtifactError, match="is no page of ntc energy: it is left as it is"):
        check_page(mine, MARK, "ntc energy", "report.html")
    out = tmp_path / "out.html"
    for _ in range(2):
        check_page(out, MARK, "ntc energy", "report.html")
        write_page(out, html(data))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["mine.html", "out.html"]
    with pytest.raises(ArtifactError, match="cannot write"):
        write_page(tmp_path / "none" / "x.html", "")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_a_browser_shows_it(browser: Any, data: dict[str, Any], tmp_path: Path, width: int, scheme: str) -> None:
    out = tmp_path / "report.html"
    out.write_text(html(data), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view, trouble, requests = context.new_page(), [], []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(out.as_uri())
    assert trouble == [] and requests == [out.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "nothing is too wide"
    assert view.locator("svg.bars").count() == 2
    # Every piece of a bar has a colour of its own, and lies in the picture; no text of a chart runs out of it.
    assert view.evaluate(
        """() => [...document.querySelectorAll('svg.bars')].every((svg) => {
            const frame = svg.getBoundingClientRect();
            const inside = [...svg.querySelectorAll('rect, text')].every((e) => {
                const box = e.getBoundingClientRect();
                return box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.bottom <= frame.bottom + 1;
            });
            const colours = new Set([...svg.querySelectorAll('rect')].map((e) => getComputedStyle(e).fill));
            return inside && colours.size >= 3 && !colours.has('rgb(0, 0, 0)');
        })"""
    )
    view.locator("summary").click()
    assert view.locator("details tbody tr").count() == len(data["nodes"]["snn"])
    view.emulate_media(media="print")
    view.set_viewport_size({"width": 690, "height": 980})  # A4 between its margins
    assert view.evaluate("getComputedStyle(document.querySelector('main')).maxWidth") == "none"
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "a printed table is not cut off"
    context.close()
