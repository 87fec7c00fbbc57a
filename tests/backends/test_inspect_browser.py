"""The page of ntc inspect in a headless Chromium at two widths: no error, no request, nothing too wide; click, keyboard, sorting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inspect_cases import HOSTILE, float_program, folder_of, hostile_netlist

from ntc_backends.inspect_page.activity import run
from ntc_backends.inspect_page.document import page
from ntc_backends.inspect_page.prompt import Prompt
from ntc_backends.inspect_page.subject import open_subject

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")

IDS = tuple(i % 29 for i in range(20))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ordinary page, and one of a netlist in which every text is markup."""
    root = tmp_path_factory.mktemp("pages")
    subject = open_subject(folder_of(float_program(), root / "tiny"))
    hostile = open_subject(hostile_netlist(root / "hostile"))
    texts = {"ordinary": tuple(f"token{i}" for i in IDS), "hostile": (HOSTILE,) * len(IDS)}
    for name, shown in (("ordinary", subject), ("hostile", hostile)):
        html = page(shown, Prompt(IDS, texts[name], HOSTILE), run(shown, IDS))
        (root / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: root / f"{name}.html" for name in texts}


class Opened:
    """A page, with everything that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def settle(self) -> None:
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def too_wide(self) -> list[str]:
        """What can be seen to reach beyond the right edge of the window; what scrolls or is cut by itself ends where that does."""
        found: list[str] = self.page.evaluate(
            """() => [...document.body.querySelectorAll('*')].filter((e) => {
                const box = e.getBoundingClientRect();
                let right = box.right;  // of what can be seen of it
                for (let p = e.parentElement; p; p = p.parentElement)
                    if (getComputedStyle(p).overflowX !== 'visible') right = Math.min(right, p.getBoundingClientRect().right);
                return box.width && right > document.documentElement.clientWidth + 1;
            }).map((e) => e.tagName + '.' + e.getAttribute('class') + ' ' + e.textContent.slice(0, 40))"""
        )
        return found


def painted(opened: Opened, canvas: str) -> int:
    """How many colours a canvas has."""
    return int(
        opened.page.evaluate(
            """(id) => { const c = document.getElementById(id);
                const pixels = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
                return new Set(pixels).size; }""",
            canvas,
        )
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (420, "dark")])
def test_it_opens_draws_and_fits(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    opened = Opened(browser, pages["ordinary"], width, scheme)
    view = opened.page
    opened.settle()
    assert painted(opened, "raster") > 3 and painted(opened, "traces") > 3

    # A block opens by click, another one by keyboard; its boxes can be seen.
    blocks = view.locator(".section > details[data-section^='transformer']")
    first, second = blocks.nth(0), blocks.nth(1)
    assert first.evaluate("e => e.open") and not second.evaluate("e => e.open")
    second.locator("> summary").click()
    assert second.evaluate("e => e.open")
    kind = "wide" if width > 1000 else "narrow"
    assert second.locator(f"svg.{kind} .box.population").first.is_visible()
    second.locator("> summary").focus()
    view.keyboard.press("Enter")
    assert not second.evaluate("e => e.open")
    view.keyboard.press("Space")
    assert second.evaluate("e => e.open")
    view.locator("[data-open='all']").click()
    assert opened.too_wide() == []
    assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    # A population is chosen by its box, with the keyboard, and by the arrows of the raster.
    box = second.locator(f"svg.{kind} a.box.population").nth(1)
    box.focus()
    view.keyboard.press("Enter")
    name = box.get_attribute("data-population")
    assert name is not None and name in view.locator("#raster-text").inner_text()
    assert name in (view.locator("#raster").get_attribute("aria-label") or "")
    view.locator("#raster").focus()
    view.keyboard.press("ArrowRight")
    assert name not in view.locator("#raster-text").inner_text()
    assert view.locator("#histogram svg rect").count() > 3
    view.locator("#raster").hover(position={"x": 200, "y": 40})
    assert "Token " in view.locator("#raster-text").inner_text()
    if width < 1000:
        view.locator("#first-token").focus()
        view.keyboard.press("End")
        assert "of 20" in view.locator("#first-text").inner_text()
        assert "to 20" in view.locator("#traces-text").inner_text()

    # Boxes hold their texts, and no canvas is wider than its place.
    assert view.evaluate(
        f"""() => [...document.querySelectorAll('svg.{kind} .box')].every((g) => {{
            const rect = g.querySelector('rect').getBoundingClientRect(), text = g.querySelector('text').getBoundingClientRect();
            return text.left >= rect.left - 1 && text.right <= rect.right + 1 && text.top >= rect.top - 1 && text.bottom <= rect.bottom + 1;
        }})"""
    )
    assert opened.too_wide() == []
    assert opened.trouble == []
    assert opened.requests == [pages["ordinary"].as_uri()]


def test_tables_sort_by_value(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["ordinary"], 1280)
    head = opened.page.locator("#populations th", has_text=re.compile("^Rate"))
    column = "[...document.querySelectorAll('#populations tbody tr')].map((r) => Number(r.cells[3].dataset.value))"
    head.locator("button").click()
    rates = opened.page.evaluate(column)
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").press("Enter")
    assert opened.page.evaluate(column) == sorted(rates)
    assert opened.trouble == []


@pytest.mark.parametrize("width", [1280, 420])
def test_hostile_texts_do_nothing(browser: Any, pages: dict[str, Path], width: int) -> None:
    opened = Opened(browser, pages["hostile"], width)
    opened.page.locator("[data-open='all']").click()
    opened.page.locator("#next").click()
    opened.settle()
    assert opened.trouble == []
    assert opened.requests == [pages["hostile"].as_uri()]
    assert opened.page.locator("img").count() == 0
    assert HOSTILE in opened.page.locator(".token").first.inner_text()
    assert opened.too_wide() == []


def test_it_prints_in_light_colours(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    opened = Opened(browser, pages["ordinary"], 1280, "dark")
    opened.page.pdf(path=str(tmp_path / "page.pdf"), format="A4", print_background=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
    assert opened.trouble == []
