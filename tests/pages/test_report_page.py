"""``report.html`` in a real browser: quiet, complete, true to its data, readable at two widths and in two themes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from wsi_pipe.config import JobSettings
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.report import Section, write_report

Browser = Any  # the fixture's class lives in conftest.py, which cannot be imported by name


def outcomes_of(n: int) -> list[SlideOutcome]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        name = f"case {i // 2:03d} µ#{i:05d}"
        if i % 17 == 5:
            found.append(
                SlideOutcome(name, "failed", f"/s/{name}.svs", "open", f"reason {i}", "copy it again", "SlideOpenError")
            )
        elif i % 13 == 7:
            found.append(SlideOutcome(name, "empty", f"/s/{name}.svs", reason="no tissue", tiles={"5x": 0, "20x": 0}))
        else:
            lr = int(np.exp(rng.normal(6, 0.4))) if i != 3 else 4
            seconds = {"open": 0.1, "segment": 0.8, "tile": 0.05, "read": lr / 60, "encode": lr / 20, "assemble": 0.1}
            counts = {"tissue_mm2": lr / 4, "read_s.5x": lr / 600, "read_s.20x": lr / 66}
            found.append(
                SlideOutcome(
                    name, "done", f"/s/{name}.svs", tiles={"5x": lr, "20x": 15 * lr - i % 7},
                    counts=counts, seconds=seconds,
                )
            )  # fmt: skip
    return found


def draw_pictures(job: Path, outcomes: list[SlideOutcome]) -> None:
    (job / "thumbnails").mkdir()
    for i, outcome in enumerate(outcomes):
        if outcome.status == "failed":
            continue
        image = np.full((150, 200, 3), 240, np.uint8)
        cv2.circle(image, (60 + 5 * (i % 16), 75), 40, (190, 120, 210), -1)
        data = cv2.imencode(".jpg", image)[1].tobytes()
        (job / "thumbnails" / f"{outcome.slide_id}.jpg").write_bytes(data)
        (job / "thumbnails" / f"{outcome.slide_id}.grid.jpg").write_bytes(data)


def assert_quiet(browser: Browser) -> None:
    assert browser.errors == []
    assert [r for r in browser.requests if not r.startswith("file:")] == []


CONTRAST = """(() => {
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(x => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = 99;
  const text = "p, td, th, h1, h2, h3, .k, .v, .d, .chip, .muted, button:not(:disabled)";
  for (const e of document.querySelector("main").querySelectorAll(text)) {
    if (!e.offsetParent || !e.textContent.trim() || e.querySelector("img")) continue;
    const a = luminance(getComputedStyle(e).color), b = luminance(behind(e));
    worst = Math.min(worst, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return worst; })()"""


def worst_contrast(browser: Browser) -> float:
    """The lowest contrast ratio of text to what is behind it, as WCAG 2 defines it; it asks for 4.5."""
    return float(browser.evaluate(CONTRAST))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SlideOutcome]]:
    job = tmp_path_factory.mktemp("small job")
    outcomes = outcomes_of(20)
    draw_pictures(job, outcomes)
    section = Section("Classifier", ["It was trained."], ["model", "AUC"], [("student", 0.9)])
    return write_report(job, outcomes, JobSettings(), sections=[section]), outcomes


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_quiet(browser: Browser, small: tuple[Path, list[SlideOutcome]], width: int, dark: bool) -> None:
    page, _ = small
    browser.open(page, width=width, dark=dark)
    assert_quiet(browser)
    assert browser.requests == []  # twenty slides carry their pictures
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert worst_contrast(browser) >= 4.5


def test_figures_on_the_page_are_those_of_the_outcomes(
    browser: Browser, small: tuple[Path, list[SlideOutcome]]
) -> None:
    page, outcomes = small
    browser.open(page)
    done = [o for o in outcomes if o.status == "done"]
    failed = [o for o in outcomes if o.status == "failed"]
    cards = browser.evaluate(
        "[...document.querySelectorAll('#cards .card')].map(c => c.querySelector('.v').textContent)"
    )
    assert cards[0] == f"{len(done)} / {len(outcomes)}"
    assert cards[1] == f"{sum(sum(o.tiles.values()) for o in done):,}"
    assert cards[2].startswith(f"{sum(o.counts['tissue_mm2'] for o in done):,.0f}")
    hr, lr = (sum(o.tiles[label] for o in done) for label in ("20x", "5x"))
    assert f"the same tissue takes {hr / lr:.3g} times as many" in browser.evaluate("byId('levels').textContent")
    bars = browser.evaluate("[...document.querySelectorAll('#levels .bars')][0].getAttribute('aria-label')")
    assert bars == f"Tiles by resolution: 5x {lr:,}, 20x {hr:,}"
    rows = browser.evaluate(
        "[...document.querySelectorAll('#failures-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows == [[o.slide_id, "open", o.reason, "copy it again", o.path] for o in failed]
    stages = browser.evaluate(
        "[...document.querySelectorAll('#timings-table tbody tr')].map(r => r.cells[2].textContent)"
    )
    assert len(stages) == 6
    assert browser.evaluate("document.querySelectorAll('#slides-view article').length") == len(outcomes)
    names = browser.evaluate("[...document.querySelectorAll('#slides-view .name')].map(e => e.textContent)")
    assert names == [o.slide_id for o in outcomes]
    assert "few tiles" in browser.evaluate("document.querySelectorAll('#slides-view article')[3].textContent")
    assert "It was trained." in browser.evaluate("byId('extra-0').textContent")


def test_a_picture_opens_zooms_and_closes(browser: Browser, small: tuple[Path, list[SlideOutcome]]) -> None:
    page, outcomes = small
    browser.open(page)
    browser.evaluate("document.querySelectorAll('.shot')[1].click()")
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert browser.evaluate("byId('viewer').open") is True
    assert browser.evaluate("byId('viewer-title').textContent") == outcomes[1].slide_id
    zoom = browser.evaluate("look.zoom")
    browser.evaluate("byId('zoom-in').click()")
    assert browser.evaluate("look.zoom") == pytest.approx(1.5 * zoom)
    browser.evaluate("[...document.querySelectorAll('#viewer-kinds button')].at(-1).click()")
    assert browser.evaluate("byId('viewer-image').alt").endswith("grids")
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    browser.call("Input.dispatchKeyEvent", type="keyDown", **key)
    assert browser.evaluate("byId('viewer-title').textContent") == outcomes[2].slide_id
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27)
    assert browser.evaluate("byId('viewer').open") is False
    assert_quiet(browser)


def test_ten_thousand_slides_are_paged_searched_and_sorted(browser: Browser, tmp_path: Path) -> None:
    outcomes = outcomes_of(10_000)
    draw_pictures(tmp_path, outcomes[:40])
    page = write_report(tmp_path, outcomes, JobSettings())
    browser.open(page)
    assert_quiet(browser)
    assert browser.requests == []  # the table comes first, so no picture is fetched
    assert browser.evaluate("document.querySelectorAll('*').length") < 6000
    assert browser.evaluate("document.querySelectorAll('#slides-view tbody tr').length") == 50

    wanted = outcomes[4242].slide_id
    browser.evaluate(f"(s => {{ s.value = '{wanted}'; s.dispatchEvent(new Event('input')); }})(byId('slides-search'))")
    assert browser.evaluate("[...document.querySelectorAll('#slides-view td.id')].map(e => e.textContent)") == [wanted]
    browser.evaluate("(s => { s.value = ''; s.dispatchEvent(new Event('input')); })(byId('slides-search'))")
    browser.evaluate("showSlides({ sort: 'most', filter: 'done' })")
    first = browser.evaluate("document.querySelector('#slides-view tbody tr').cells[3].textContent")
    assert first == f"{max(o.tiles.get('20x', 0) for o in outcomes):,}"

    browser.evaluate("showSlides({ sort: 'order', filter: 'all', view: 'pictures' })")
    browser.evaluate("byId('slides').scrollIntoView(); new Promise(done => setTimeout(done, 500))")
    assert browser.requests  # now those that are seen are, from the folder
    assert len(browser.requests) <= 24
    assert_quiet(browser)
    assert browser.evaluate("document.querySelector('.shot img').naturalWidth") == 200
