"""The viewer: who may ask, and whether what it answers is what the files hold."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.view_server import MODEL, get, make_job, viewer
from wsi_pipe.bag import read_grids, read_header, read_level
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.slides import open_slide
from wsi_pipe.tiles import read_tiles
from wsi_pipe.view import Catalogue, write_single_page
from wsi_pipe.view.answers import Answers, NotThereError
from wsi_pipe.view.layers import components
from wsi_pipe.view.nearest import nearest_tiles
from wsi_pipe.view.opened import OpenSlides
from wsi_pipe.view.pixels import VIEW_PX, DeepZoom
from wsi_pipe.view.trial import SLIDERS, tried_settings


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def address(job: Path) -> Iterator[str]:
    with viewer(str(job)) as found:
        yield found


@pytest.fixture
def answers(job: Path) -> Iterator[Answers]:
    found = Answers(Catalogue.of_job(job))
    yield found
    found.close()


def test_only_who_knows_the_token_is_answered(address: str) -> None:
    base, token = address.rstrip("/").rsplit("/", 1)
    assert len(token) >= 20
    assert get(address)[0] == 200
    for wrong in ("", "x", token[:-1], token + "x", token.swapcase()):
        for path in ("", "slides", "slides/0", "static/view.js"):
            assert get(f"{base}/{wrong}/{path}")[0] == 404
    assert get(base + "/")[0] == 404


def test_a_page_elsewhere_cannot_ask_under_another_name(address: str) -> None:
    assert get(address, Host="evil.example")[0] == 400
    assert get(address, Host="127.0.0.1.evil.example:80")[0] == 400


def test_nothing_but_reading_is_offered(address: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert get(address + "slides", method)[0] == 405


@pytest.mark.parametrize(
    "path",
    ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "view.html", "/etc/passwd", "..%5capp.py", "view.js/../../app.py"],
)
def test_no_other_file_is_given(address: str, path: str) -> None:
    status, body = get(address + "static/" + path)
    assert status == 404
    assert b"import" not in body
    assert b"root:" not in body


@pytest.mark.parametrize(
    "path",
    ["slides/7", "slides/0/grids/7x", "slides/0/layers/5x/attention/none", "slides/0/layers/5x/cells/x",
     "slides/0/tiles/5x/99999.png", "slides/0/pictures/40/0_0.jpg", "slides/0/pictures/12/99_0.jpg",
     "slides/0/tiles/5x/0/nearest?encoder=none"],
)  # fmt: skip
def test_what_does_not_exist_is_said_so(address: str, path: str) -> None:
    status, body = get(address + path)
    assert status == 404
    assert json.loads(body)["error"]


def test_headers_keep_the_page_to_itself(address: str) -> None:
    import urllib.request

    with urllib.request.urlopen(address, timeout=60) as response:
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert response.headers["Referrer-Policy"] == "no-referrer"


def test_a_hundred_pictures_at_once_are_those_of_the_slide(job: Path, address: str) -> None:
    about = json.loads(get(address + "slides/0")[1])
    zoom = DeepZoom((about["size"][0], about["size"][1]))
    places = [
        (level, column, row)
        for level in range(zoom.max_level, zoom.max_level - 3, -1)
        for column in range(6)
        for row in range(5)
        if zoom.holds(level, column, row)
    ]
    wanted = (places * 5)[:100]
    with ThreadPoolExecutor(20) as pool:
        urls = [f"{address}slides/0/pictures/{level}/{column}_{row}.jpg" for level, column, row in wanted]
        found = list(pool.map(get, urls))
    assert [status for status, _ in found] == [200] * 100
    with open_slide(about["path"]) as slide:
        for (level, column, row), (_, body) in zip(places, found, strict=False):
            pixels = np.asarray(Image.open(io.BytesIO(body)))
            exact = zoom.read(slide, level, column, row)
            assert pixels.shape == exact.shape
            assert np.abs(pixels.astype(int) - exact).mean() < 4


def test_the_pyramid_covers_the_slide_and_no_more() -> None:
    zoom = DeepZoom((1300, 700))
    assert zoom.max_level == 11
    assert zoom.size_px(11) == (1300, 700)
    assert zoom.size_px(10) == (650, 350)
    assert zoom.size_px(0) == (1, 1)
    assert [zoom.holds(11, c, 0) for c in range(4)] == [True, True, True, False]
    assert [zoom.holds(11, 0, r) for r in range(3)] == [True, True, False]
    assert not zoom.holds(12, 0, 0)
    assert DeepZoom((1, 1)).holds(0, 0, 0)


def test_pictures_at_the_edges_are_cut_to_the_slide(job: Path) -> None:
    path = next((job.parent / "slides").glob("*.tif"))
    with open_slide(path) as slide:
        zoom = DeepZoom(slide.pyramid.size_l0)
        last = zoom.read(slide, zoom.max_level, 5, 4)
        assert last.shape == (2560 - 4 * VIEW_PX, 3072 - 5 * VIEW_PX, 3)
        coarse = zoom.read(slide, zoom.max_level - 3, 0, 0)
        assert coarse.shape == (320, 384, 3)
        whole = cv2.resize(slide.read_region(0, 0, 0, 3072, 2560), (384, 320), interpolation=cv2.INTER_AREA)
        assert np.abs(coarse.astype(int) - whole).mean() < 3


def test_a_tile_is_what_the_encoder_gets(address: str, job: Path) -> None:
    about = json.loads(get(address + "slides/1")[1])
    grid = read_grids(job / "bags" / f"{about['id']}.h5")[1]
    row = len(grid) // 2
    status, body = get(f"{address}slides/1/tiles/{grid.label}/{row}.png")
    with open_slide(about["path"]) as slide:
        wanted = read_tiles(slide, grid.corners_l0[[row]], grid.tile_size_l0, grid.spec.size_px)[0]
    assert status == 200
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), wanted)


def test_grids_and_layers_are_those_of_the_bag(answers: Answers, job: Path) -> None:
    about = answers.about(0)
    bag = job / "bags" / f"{about['id']}.h5"
    grids = read_grids(bag)
    assert [facts["label"] for facts in about["grids"]] == [grid.label for grid in grids] == ["5x", "20x"]
    for facts, grid in zip(about["grids"], grids, strict=True):
        answer = answers.grid(0, grid.label)
        assert answer["cells"] == grid.cells.ravel().tolist()
        assert facts["count"] == len(grid)
        assert (answer["parent"] is None) == (grid.parent is None)
    keys = {(layer["label"], layer["key"]) for layer in about["layers"]}
    assert {("5x", f"attention/{MODEL}"), ("20x", "tissue/fraction"), ("20x", "components/texture")} <= keys
    assert ("20x", f"attention/{MODEL}") not in keys
    attention = answers.layer(0, "5x", f"attention/{MODEL}")
    assert sum(attention["values"]) == pytest.approx(1, abs=1e-3)
    assert attention["top"] == pytest.approx(max(attention["values"]), rel=1e-4)
    assert answers.layer(0, "20x", "tissue/fraction")["values"] == pytest.approx(grids[1].tissue.tolist(), rel=1e-4)
    assert len(answers.layer(0, "20x", "components/texture")["colours"]) == 3 * len(grids[1])


def test_the_outline_is_the_mask(answers: Answers) -> None:
    about = answers.about(0)
    area = sum(_area(ring) for polygon in about["outline"] for ring in polygon)
    wanted = about["tissue_mm2"] * 1e6 / (about["mpp"][0] * about["mpp"][1])
    assert abs(area) == pytest.approx(wanted, rel=0.01)


def _area(ring: list[float]) -> float:
    points = np.asarray(ring).reshape(-1, 2)
    x, y = points.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@pytest.mark.parametrize("values", [{}, {"stain_min": 0.03, "stain_seed": 0.05}, {"min_tissue": 0.9, "close_um": 0.0}])
def test_a_trial_says_what_the_command_then_gives(answers: Answers, tmp_path: Path, values: dict[str, float]) -> None:
    found = answers.trial(0, values)
    listed = answers.catalogue.slides[0].entry
    options = [text for name, value in values.items() for text in ("--" + name.replace("_", "-"), str(value))]
    arguments = [
        "tile",
        listed.path,
        "-o",
        str(tmp_path / "job"),
        "-r",
        "20x",
        "-r",
        "5x",
        "--tile-px",
        "128",
        *options,
    ]
    assert run_group(group, "wsi-pipe", arguments) == 0
    header = read_header(next((tmp_path / "job" / "tiles").glob("*.h5")))
    assert found["tiles"] == {grid.label: len(grid) for grid in header.grids}


def test_settings_that_cannot_be_tried_are_refused(answers: Answers, address: str) -> None:
    with pytest.raises(ConfigError, match="cannot be tried"):
        answers.trial(0, {"random_weights": 1.0})
    status, body = get(address + "slides/0/trial?" + urllib.parse.urlencode({"stain_min": -1}))
    assert status == 400
    assert "stain_min" in json.loads(body)["error"]
    assert get(address + "slides/0/trial?stain_min=nan")[0] == 400
    assert get(address + "slides/0/trial?stain_min=much")[0] == 400


def test_every_slider_reaches_its_setting() -> None:
    base = JobSettings()
    for name, (low, high, _) in SLIDERS.items():
        value = (low + high) / 2
        segment, tile = tried_settings(base, {name: value})
        assert getattr(tile if name == "min_tissue" else segment, name) == value


def test_the_nearest_tiles_are_those_of_the_whole_matrix(answers: Answers, job: Path) -> None:
    bags = sorted((job / "bags").glob("*.h5"))
    features = [np.asarray(read_level(bag, "20x", "texture").features, np.float64) for bag in bags]
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in features]
    query = unit[0][4]
    every = [
        (float(row @ query), n, i) for n, values in enumerate(unit) for i, row in enumerate(values) if (n, i) != (0, 4)
    ]
    wanted = sorted(every, key=lambda found: -found[0])[:10]
    found = answers.nearest(0, "20x", 4, "texture", True, lambda: False)
    assert [(one["slide"], one["row"]) for one in found] == [(n, i) for _, n, i in wanted]
    assert [one["similarity"] for one in found] == pytest.approx([s for s, _, _ in wanted], abs=1e-3)
    alone = answers.nearest(0, "20x", 4, "texture", False, lambda: False)
    assert {one["slide"] for one in alone} == {0}
    assert len(alone) == min(10, len(features[0]) - 1)


def test_a_search_stops_when_nobody_waits(job: Path) -> None:
    bags = list(enumerate(sorted((job / "bags").glob("*.h5"))))
    query = np.asarray(read_level(bags[0][1], "20x", "texture").features[0])
    turns = iter([False, True])
    found = nearest_tiles(query, bags, "20x", "texture", stopped=lambda: next(turns))
    assert {number for _, number, _ in found} == {0}


def test_components_of_few_and_of_equal_tiles() -> None:
    assert components(np.zeros((1, 5))).tolist() == [[128, 128, 128]]
    assert (components(np.ones((6, 5))) == 128).all()
    line = np.outer(np.arange(50.0), [1, 2, 3, 4])
    first = components(line)[:, 0].astype(int)
    assert (np.diff(first) >= 0).all()
    assert first[0] == 0
    assert first[-1] == 255


def test_slides_not_looked_at_are_closed() -> None:
    closed: list[int] = []

    class Fake:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self) -> None:
            closed.append(self.number)

    held = OpenSlides(Fake, most=2)  # type: ignore[arg-type]
    with held.use(0):
        for number in (1, 2, 3):
            with held.use(number):
                pass
        assert 0 not in closed
    assert closed == [1, 2]
    held.close()
    assert sorted(closed) == [0, 1, 2, 3]


def test_a_slide_that_cannot_be_opened_is_told_and_tried_again(job: Path, tmp_path: Path) -> None:
    path = tmp_path / "late.tif"
    catalogue = Catalogue.of_slides([SlideEntry("late", str(path), "late")])
    answers = Answers(catalogue)
    from wsi_pipe.errors import WsiPipeError

    with pytest.raises(WsiPipeError, match=r"late\.tif"):
        answers.about(0)
    path.write_bytes(next((job.parent / "slides").glob("*.tif")).read_bytes())
    assert answers.about(0)["size"] == [3072, 2560]
    answers.close()


def test_a_damaged_bag_leaves_the_slide_to_look_at(job: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "job"
    shutil.copytree(job, copy)
    answers = Answers(Catalogue.of_job(copy))
    bag = copy / "bags" / f"{answers.catalogue.slides[0].entry.slide_id}.h5"
    bag.write_bytes(bag.read_bytes()[:500])
    about = answers.about(0)
    assert about["grids"] == []
    assert any(bag.name in note for note in about["notes"])
    assert answers.picture(0, about["max_level"], 0, 0)
    answers.close()


def test_ten_thousand_slides_are_listed_without_opening_one(tmp_path: Path) -> None:
    entries = [SlideEntry(f"s{i}", str(tmp_path / f"s{i}.svs"), f"c{i}") for i in range(10_000)]
    answers = Answers(Catalogue.of_slides(entries))
    listed = answers.slides()["slides"]
    assert len(listed) == 10_000
    assert listed[-1]["id"] == "s9999"
    with pytest.raises(NotThereError):
        answers.about(10_000)


def test_one_page_holds_slide_and_layers(job: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.of_job(job)
    made = write_single_page(catalogue, 0, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert made["bytes"] == len(text.encode()) < 15_000_000
    assert made["mpp"] == 2.0
    assert 'src="static' not in text
    assert 'href="static' not in text
    data = json.loads(text.split('id="embedded">', 1)[1].split("</script>", 1)[0])
    assert set(data) >= {"slides", "slides/0", "slides/0/grids/5x", f"slides/0/layers/5x/attention/{MODEL}", "pictures"}
    assert str(job) not in text


def test_a_page_that_is_too_large_is_made_coarser(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_single_page(Catalogue.of_job(job), 0, tmp_path / "page.html")
    most = int(whole["bytes"] * 0.97)
    monkeypatch.setattr("wsi_pipe.view.single.MOST_BYTES", most)
    made = write_single_page(Catalogue.of_job(job), 0, tmp_path / "page.html")
    assert made["bytes"] < most
    assert made["mpp"] > 2.0 or made["quality"] < 80
    monkeypatch.setattr("wsi_pipe.view.single.MOST_BYTES", 300_000)
    with pytest.raises(ConfigError, match="does not fit"):
        write_single_page(Catalogue.of_job(job), 0, tmp_path / "page.html")


def test_the_command_exports_one_slide(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = Catalogue.of_job(job).slides[1].entry.slide_id
    out = tmp_path / "one.html"
    assert run_group(group, "wsi-pipe", ["view", str(job), "--export", name, "-o", str(out)]) == 0
    assert "MB, up to 2 um/px" in capsys.readouterr().out
    assert out.stat().st_size > 100_000
    assert run_group(group, "wsi-pipe", ["view", str(job), "--export", "nobody"]) == 2
    assert run_group(group, "wsi-pipe", ["view", str(job), "-o", str(out)]) == 2
    assert run_group(group, "wsi-pipe", ["view", str(tmp_path / "none")]) == 2


def test_a_port_that_is_taken_is_an_error(job: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = urllib.parse.urlsplit(address).port
    assert run_group(group, "wsi-pipe", ["view", str(job), "--port", str(port)]) == 2
    assert "another --port" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_viewer_ends_when_it_is_told(job: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "wsi_pipe", "view", str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert get(address)[0] == 200
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            # A viewer that nobody told to end would outlive the tests.
            process.kill()
    assert process.returncode == code
    assert "Traceback" not in said
