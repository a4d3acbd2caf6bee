"""The report in a real browser: telephone and desktop, light and dark, by keyboard; skips without Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_runs import write_lines, write_run

from simpo.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Of every element that has text of its own: its contrast with what lies behind it.
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const e of document.querySelectorAll('body, body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    if (e.closest('.unseen, .skip, details:not([open]) > :not(summary)')) continue;
    const style = getComputedStyle(e);
    let back = null;
    for (let p = e; p && !back; p = p.parentElement) {
      const c = parse(getComputedStyle(p).backgroundColor);
      if (c[3] > 0) back = c;
    }
    const ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName, e.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        path = CHROMIUM or play.chromium.executable_path  # the system's, or what `playwright install` left
        if not Path(path).exists():
            pytest.skip("no Chromium here")
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("browser") / "a-run-with-a-long-name", max_length=4096)
    row = {
        "kind": "displacement",
        "level": "warn",
        "step": 20,
        "since_step": 12,
        "saw": "chosen falls",
        "advice": "less",
    }
    write_lines(folder / "guard.jsonl", [row])
    return write_report([folder])


@pytest.mark.long
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen_and_can_be_read(browser: Any, page_file: Path, width: int, mode: str) -> None:
    page, said = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=mode), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(page_file.resolve().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for summary in page.query_selector_all("main > section > details > summary, .answer summary"):
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dim = [each for each in page.evaluate(CONTRAST) if each[0] < 4.5]
    assert dim == []
    widths = page.evaluate("[...document.querySelectorAll('.chart > svg')].map(e => e.getBoundingClientRect().width)")
    assert min(widths) > 250
    small = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(page.evaluate(small)) >= 9  # pixels
    assert said == []
    page.close()


@pytest.mark.long
def test_everything_is_reached_by_the_keyboard_and_shows_that_it_is(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(page_file.resolve().as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    reached = page.evaluate("document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")
    seen = set()
    for _ in range(reached + 5):
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        seen.add((page.evaluate("document.activeElement.tagName"), outline))
        page.keyboard.press("Tab")
    tags = {tag for tag, _ in seen if tag != "BODY"}
    assert tags >= {"A", "SUMMARY", "DIV", "PRE"}
    assert all(outline != "none" for tag, outline in seen if tag != "BODY")
    summary = page.locator("summary", has_text="The numbers")
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open] table").count() == 1
    page.close()
