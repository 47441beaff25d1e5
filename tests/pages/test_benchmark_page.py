"""``benchmark.html`` in a real browser: quiet, readable, and its figures are those of ``benchmark.json``."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_pipe.benchmark import Assumptions, BenchmarkRecord
from wsi_pipe.benchmark.analysis import comparisons, totals
from wsi_pipe.benchmark.projection import project
from wsi_pipe.benchmark.records import END_TO_END, STAGED, Arm, Machine, Measurement, SlideFacts, Spent
from wsi_pipe.benchmark.render import write_outputs

Browser = Any  # the fixture's class lives in conftest.py, which cannot be imported by name

LR = Arm("5x texture", "5x", 2.0, 256, "texture", 162, "0" * 64)
HR = Arm("20x texture", "20x", 0.5, 256, "texture", 162, "0" * 64)
PEER = dataclasses.replace(HR, id="20x openslide", method="openslide", reader="openslide")


def record_of(arms: tuple[Arm, ...] = (LR, HR, PEER)) -> BenchmarkRecord:
    rng = np.random.default_rng(0)
    slides = tuple(SlideFacts(f"slide <{i}>", f"/s/{i}.svs", 1, 9, 9, 0.25, "aperio", "tiff", 80.0) for i in range(4))
    measurements = []
    for repeat in range(3):
        for i, slide in enumerate(slides):
            for arm in arms:
                size = (i + 1) * (15.0 if arm.label == "20x" else 1.0) * rng.uniform(0.95, 1.05)
                names = ("read",) if arm.method == "openslide" else ("fetch", "decode", "resample", "handle")
                stages = {name: Spent(size * rng.uniform(0.1, 0.5), size * 0.4) for name in (*names, "encode")}
                stages |= {"open": Spent(0.1, 0.1), "segment": Spent(0.7, 0.6), "plan": Spent(0.01, 0.01)}
                stages["write"] = Spent(0.05, 0.05)
                wall = math.fsum(s.wall_s for s in stages.values())
                tiles = int((i + 1) * 200 * (15 if arm.label == "20x" else 1))
                counts = (tiles, 4 * tiles, 20_000 * tiles, 324 * tiles)
                one = Measurement(slide.slide_id, arm.id, repeat, 0, STAGED, wall, wall, stages, *counts)
                measurements.append(one)
                if arm.method == "native":
                    rest = dataclasses.replace(one, kind=END_TO_END, wall_s=0.8 * wall, peak_memory_bytes=1 << 29)
                    measurements.append(rest)
    cpu = math.fsum(m.cpu_s for m in measurements)
    return BenchmarkRecord(
        created_utc="2026-01-01T00:00:00Z",
        wsi_pipe_version="1",
        command="wsi-pipe benchmark </script><b>x</b>",
        machine=Machine("a processor", 2, 8 << 30, "Linux", "3.11.7"),
        repeats=3,
        cache="warm",
        threads=2,
        arms=arms,
        slides=slides,
        measurements=tuple(measurements),
        once={"start-up": Spent(1.0, 2.0)},
        process=Spent(100.0, cpu + 2.0),
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchmarkRecord]:
    record = record_of()
    return write_outputs(tmp_path_factory.mktemp("page"), record, Assumptions(price_per_hour=2.0))[2], record


def shown(value: float) -> str:
    """About three significant figures, as the page's ``number``."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_is_quiet(browser: Browser, drawn: tuple[Path, BenchmarkRecord], width: int, dark: bool) -> None:
    browser.open(drawn[0], width=width, dark=dark)
    assert browser.errors == []
    assert browser.requests == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(v) for v in background[4:-1].split(",")[:3]) < 200) == dark
    # No text of a chart is cut off or wider than its panel.
    assert browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].every(s => [...s.querySelectorAll('text')].every(t =>"
        " t.getBoundingClientRect().right <= innerWidth && t.getBoundingClientRect().left >= 0))"
    )


def test_the_answer_and_its_intervals_are_those_of_the_record(
    browser: Browser, drawn: tuple[Path, BenchmarkRecord]
) -> None:
    page, record = drawn
    browser.open(page)
    head = next(c for c in comparisons(record) if c.headline)
    for what in ("end to end", "reading", "encoding"):
        ratio = head.ratio(what)
        assert ratio is not None
        assert ratio.value is not None
        assert ratio.low is not None
        assert ratio.high is not None
        text = browser.evaluate(f"document.querySelector('.card[data-what=\"{what}\"]').textContent")
        assert f"1/{shown(ratio.value)}95 % interval 1/{shown(ratio.low)} to 1/{shown(ratio.high)}" in text
    whole = head.ratio("end to end")
    assert whole is not None
    assert whole.value is not None
    assert browser.evaluate("byId('title').textContent") == f"5x costs 1/{shown(whole.value)} of 20x, end to end"
    label = browser.evaluate("document.querySelector('#forest svg').getAttribute('aria-label')")
    assert label.count(";") == len([r for r in head.ratios if r.value]) - 1


def test_tables_hold_the_figures_of_the_record(browser: Browser, drawn: tuple[Path, BenchmarkRecord]) -> None:
    page, record = drawn
    browser.open(page)
    rows = browser.evaluate(
        "[...document.querySelectorAll('#stage-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    by_name = {row[0]: row[1:] for row in rows}
    low, high, peer = totals(record)
    assert by_name["decode"][:3] == [shown(low.stages["decode"][0]), shown(high.stages["decode"][0]), "–"]
    assert by_name["read"][:3] == ["–", "–", shown(peer.stages["read"][0])]
    assert by_name["end to end, overlapped"][:2] == [shown(low.end_to_end_s or 0), shown(high.end_to_end_s or 0)]
    assert by_name["decode"][3] == shown(high.stages["decode"][0] / low.stages["decode"][0])
    slides = browser.evaluate(
        "[...document.querySelectorAll('#slide-table tbody tr')].map(r => r.cells[0].textContent)"
    )
    assert slides == [s.slide_id for s in record.slides]
    assert browser.evaluate("byId('others').hidden") is False
    assert "1/" in browser.evaluate("byId('cards').textContent")
    assert "</script><b>x</b>" in browser.evaluate("byId('footer').textContent")


def test_the_copy_to_a_device_is_shown_as_a_part_of_encoding(browser: Browser, tmp_path: Path) -> None:
    record = record_of((LR, HR))
    copied = tuple(
        dataclasses.replace(m, stages={**m.stages, "transfer": Spent(9.0, 9.0)}) for m in record.measurements
    )
    shown_rows = []
    for one in (record, dataclasses.replace(record, measurements=copied)):
        browser.open(write_outputs(tmp_path, one, Assumptions())[2])
        assert browser.errors == []
        shown_rows.append(
            browser.evaluate(
                "[...document.querySelectorAll('#stage-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
            )
        )
    without, with_copy = shown_rows
    # Four slides of 9 s; no other figure of the table moves.
    assert [row for row in with_copy if row not in without] == [["of which transfer", "36", "36", "1"]]
    assert [row for row in with_copy if row in without] == without


def test_processor_seconds_are_a_click_away(browser: Browser, drawn: tuple[Path, BenchmarkRecord]) -> None:
    page, record = drawn
    browser.open(page)
    before = browser.evaluate("document.querySelector('#bars .bars').getAttribute('aria-label')")
    browser.evaluate("[...document.querySelectorAll('#clock button')][1].click()")
    after = browser.evaluate("document.querySelector('#bars .bars').getAttribute('aria-label')")
    assert before != after
    cpu = sum(c for _, c in totals(record)[1].stages.values())
    assert f"20x {shown(cpu)}" in after.replace("\u202f", " ") or f"{shown(cpu / 60)}" in after


def test_an_archive_of_another_size_scales(browser: Browser, drawn: tuple[Path, BenchmarkRecord]) -> None:
    page, record = drawn
    browser.open(page)
    cells = "[...document.querySelectorAll('#archive-table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    first = project(record, Assumptions(price_per_hour=2.0))
    assert [row[1] for row in browser.evaluate(cells)] == [shown(p.hours) for p in first]
    assert [row[5] for row in browser.evaluate(cells)] == [shown(p.cost or 0) for p in first]
    typed = "f.value = 123456; f.dispatchEvent(new Event('input'));"
    browser.evaluate(f"(f => {{ {typed} }})(document.querySelector('#archive-tools input'))")
    other = project(record, Assumptions(slides=123_456, price_per_hour=2.0))
    assert [row[1] for row in browser.evaluate(cells)] == [shown(p.hours) for p in other]
    assert browser.errors == []


def test_a_single_pass_is_drawn_without_intervals(browser: Browser, tmp_path: Path) -> None:
    record = record_of((LR, HR))
    one = tuple(m for m in record.measurements if m.repeat == 0 and m.slide == record.slides[0].slide_id)
    record = dataclasses.replace(record, repeats=1, slides=record.slides[:1], measurements=one)
    browser.open(write_outputs(tmp_path, record, Assumptions())[2])
    assert browser.errors == []
    assert "no interval: a single pass" in browser.evaluate("byId('cards').textContent")
    assert "NaN" not in browser.evaluate("document.body.innerHTML")


def test_one_resolution_gives_a_page_without_a_comparison(browser: Browser, tmp_path: Path) -> None:
    page = write_outputs(tmp_path, record_of((HR,)), Assumptions())[2]
    browser.open(page, width=390)
    assert browser.errors == []
    assert browser.evaluate("byId('title').textContent") == "What reading and encoding cost"
    assert browser.evaluate("document.querySelectorAll('#stage-table tbody tr').length") > 5
