"""The viewer's page in a browser: what it draws, asks and says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.view_server import MODEL, make_job, viewer
from wsi_pipe.bag import read_grids
from wsi_pipe.cli import group, run_group
from wsi_pipe.view import Catalogue

READY = "state.restoring === false && Boolean(pane()?.about) && pane().viewer.world.getItemCount() === 1"
DRAWN = """(text => {
    let sum = 0;
    for (let i = 0; i < text.length; i += 1) sum = (sum * 31 + text.charCodeAt(i)) % 1000003;
    return sum;
})(pane().canvas.toDataURL())"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("view-page"))


@pytest.fixture(scope="module")
def address(job: Path) -> Iterator[str]:
    with viewer(str(job)) as found:
        yield found


def wait(browser: Any, condition: str) -> None:
    """Until an expression holds in the page; the limit ends what hangs and is far off on any machine."""
    deadline = time.monotonic() + 120
    while not browser.evaluate(condition):
        assert time.monotonic() < deadline, f"never: {condition}"
        browser.evaluate("new Promise(done => setTimeout(done, 50))")


def show(browser: Any, address: str, **how: Any) -> None:
    # Another fragment alone would not load the page again.
    browser.open("about:blank")
    browser.open(address, **how)
    wait(browser, READY)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_opens_without_a_word_on_the_console(
    browser: Any, address: str, tmp_path: Path, width: int, dark: bool
) -> None:
    show(browser, address, width=width, dark=dark)
    assert browser.errors == []
    assert browser.requests
    assert all(request.startswith(address) for request in browser.requests)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for tab in ("list", "side", "slide"):
        browser.evaluate(f"showTab('{tab}')")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot(tmp_path / "page.png", whole=False)


def test_layers_show_and_hide(browser: Any, address: str) -> None:
    show(browser, address)
    for layer in (f"value:5x:attention/{MODEL}", "grid:20x", "outline", "value:20x:components/texture"):
        box = f"document.querySelector('[data-layer=\"{layer}\"] input[type=checkbox]')"
        if browser.evaluate(f"{box}.checked"):
            browser.evaluate(f"{box}.click()")
        off = browser.evaluate(DRAWN)
        browser.evaluate(f"{box}.click()")
        wait(browser, f"{DRAWN} !== {off}")
        browser.evaluate(f"{box}.click()")
        wait(browser, f"{DRAWN} === {off}")
    assert browser.errors == []


def test_a_legend_tells_what_even_attention_would_be(browser: Any, address: str, job: Path) -> None:
    show(browser, address)
    wait(browser, "document.querySelector('.legend-bar') !== null")
    text = browser.evaluate("document.querySelector('.legend-bar').textContent")
    bag = job / "bags" / f"{Catalogue.of_job(job).slides[0].entry.slide_id}.h5"
    assert f"uniform: {1 / len(read_grids(bag)[0]):.3g}" in text


def test_a_click_shows_the_tile_of_the_bag(browser: Any, address: str, job: Path) -> None:
    show(browser, address)
    _, fine = read_grids(job / "bags" / f"{Catalogue.of_job(job).slides[0].entry.slide_id}.h5")
    row = len(fine) // 3
    x, y = (fine.corners_l0[row] + [fine.tile_size_l0[0] / 2, fine.tile_size_l0[1] / 2]).tolist()
    place = browser.evaluate(
        "(view => { const box = pane().viewer.container.getBoundingClientRect(); "
        f"return [box.left + ({x} - view.x) * view.k, box.top + ({y} - view.y) * view.k]; }})(viewOf(pane()))"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
    wait(browser, "document.querySelectorAll('#tile figcaption').length === 2")
    captions = browser.evaluate("[...document.querySelectorAll('#tile figcaption')].map(c => c.textContent)")
    assert fine.parent is not None
    assert captions[0] == f"20x, tile {row}, in tile {fine.parent[row]} of 5x"
    assert captions[1].startswith(f"5x, tile {fine.parent[row]}, ")
    assert captions[1].endswith(f"{(fine.parent == fine.parent[row]).sum()} children at 20x")
    wait(browser, "[...document.querySelectorAll('#tile img')].every(i => i.complete && i.naturalWidth === 128)")
    wait(browser, "document.querySelectorAll('#tile .values tr').length >= 3")
    value = browser.evaluate(
        "[...document.querySelectorAll('#tile .values tr')]"
        ".find(row => row.textContent.startsWith('20x tissue')).lastChild.textContent"
    )
    assert float(value) == pytest.approx(float(fine.tissue[row]), abs=6e-3)
    in_job = "[...document.querySelectorAll('#tile button')].find(button => button.textContent === 'In the job')"
    wait(browser, f"{in_job} !== undefined")
    browser.evaluate(f"{in_job}.click()")
    wait(browser, "document.querySelectorAll('.near button').length === 10")
    browser.evaluate("document.querySelector('.near button').click()")
    assert browser.errors == []


def test_a_slider_gives_the_count_of_the_command(browser: Any, address: str, job: Path, tmp_path: Path) -> None:
    show(browser, address)
    browser.evaluate("byId('trial-toggle').click()")
    wait(browser, "byId('trial-result')?.textContent.includes('tiles at 20x')")
    before = browser.evaluate("byId('trial-result').textContent")
    browser.evaluate(
        "(slider => { slider.value = 0.95; slider.dispatchEvent(new Event('input')); })"
        "(document.querySelector('[data-setting=min_tissue]'))"
    )
    wait(browser, f"!['', {before!r}].includes(byId('trial-result').textContent)")
    after = browser.evaluate("byId('trial-result').textContent")
    path = Catalogue.of_job(job).slides[0].entry.path
    arguments = ["tile", path, "-o", str(tmp_path / "job"), "-r", "20x", "-r", "5x", "--tile-px", "128"]
    assert run_group(group, "wsi-pipe", [*arguments, "--min-tissue", "0.95"]) == 0
    fine = read_grids(next((tmp_path / "job" / "tiles").glob("*.h5")))[1]
    assert f"{len(fine)} tiles at 20x" in after
    assert "--min-tissue 0.95" in browser.evaluate("byId('trial-how').textContent")


def test_two_views_move_together(browser: Any, address: str) -> None:
    show(browser, address)
    browser.evaluate("split()")
    wait(browser, "state.panes.length === 2 && Boolean(state.panes[1].about) && viewOf(state.panes[1]) !== null")
    wait(browser, "state.active === 1")
    browser.evaluate("goTo(pane(), { x: 900, y: 700, um: 0.5 })")
    wait(browser, "(p => Math.hypot(p.x - 900, p.y - 700) < 4 && Math.abs(p.um - 0.5) < 0.01)(placeOf(state.panes[0]))")
    browser.evaluate("byId('sync').click(); goTo(pane(), { x: 1500, y: 1500, um: 1 })")
    wait(browser, "Math.abs(placeOf(state.panes[1]).x - 1500) < 4")
    assert browser.evaluate("Math.hypot(placeOf(state.panes[0]).x - 900, placeOf(state.panes[0]).y - 700) < 4")
    browser.evaluate("split()")
    assert browser.evaluate("state.panes.length") == 1
    assert browser.errors == []


def test_a_link_leads_back(browser: Any, address: str) -> None:
    show(browser, address)
    browser.evaluate("openSlide(pane(), 1)")
    wait(browser, f"pane().number === 1 && {READY}")
    browser.evaluate("goTo(pane(), { x: 1000, y: 800, um: 0.5 }); toggle(pane(), pane().layers.get('grid:20x'), true)")
    link = browser.evaluate("linkText()")
    show(browser, f"{address}#{link}")
    assert browser.evaluate("pane().number") == 1
    wait(browser, "(p => Math.hypot(p.x - 1000, p.y - 800) < 4 && Math.abs(p.um - 0.5) < 0.01)(placeOf(pane()))")
    assert browser.evaluate("pane().layers.get('grid:20x').on") is True


def test_search_and_keys(browser: Any, address: str, job: Path) -> None:
    show(browser, address)
    second = Catalogue.of_job(job).slides[1].entry.slide_id
    browser.evaluate(f"byId('search').value = '{second}'; byId('search').dispatchEvent(new Event('input'))")
    assert browser.evaluate("[...document.querySelectorAll('.row b')].map(b => b.textContent)") == [second]
    browser.evaluate("byId('search').value = ''; byId('search').dispatchEvent(new Event('input'))")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="n", text="n" if kind == "keyDown" else "")
    wait(browser, f"pane().number === 1 && {READY}")


def test_names_from_files_are_text(browser: Any, job: Path, tmp_path: Path) -> None:
    slide = next((job.parent / "slides").glob("*.tif"))
    odd = tmp_path / "<img src=x onerror=alert(1)>.tif"
    odd.write_bytes(slide.read_bytes())
    with viewer(str(odd)) as address:
        show(browser, address)
        assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        assert browser.errors == []


def test_a_page_to_send_needs_no_network(browser: Any, job: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    name = Catalogue.of_job(job).slides[0].entry.slide_id
    assert run_group(group, "wsi-pipe", ["view", str(job), "--export", name, "-o", str(page)]) == 0
    browser.open(page)
    wait(browser, READY)
    wait(browser, "pane().viewer.world.getItemAt(0).getFullyLoaded()")
    assert [r for r in browser.requests if not r.startswith("blob:")] == []
    assert browser.errors == []
    assert browser.evaluate("pane().layers.has('outline') && pane().layers.has('grid:20x')")
