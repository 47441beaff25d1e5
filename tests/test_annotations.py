"""Annotated regions of slides in jobs: from a file to the bag, its picture, and as the tissue itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import shapely
from numpy.typing import NDArray

from wsi_pipe.bag import check_bag, read_bag, read_header, read_level
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings, TileSettings
from wsi_pipe.errors import MaskError
from wsi_pipe.geometry import TissueMask
from wsi_pipe.job import JobPaths, open_job, read_outcomes
from wsi_pipe.job import given as given_module
from wsi_pipe.job.given import read_geojson
from wsi_pipe.job.run import process
from wsi_pipe.manifest import SlideEntry, read_manifest, write_manifest
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.tissue import mask_to_geojson

MakeSlide = Callable[..., Path]
Box = tuple[float, float, float, float]


def cli(*arguments: object) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def feature(box: Box, name: str | None, colour: tuple[int, int, int] = (200, 0, 0), kind: str = "annotation") -> Any:
    x, y, w, h = box
    ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]
    properties: dict[str, Any] = {"objectType": kind}
    if name is not None:
        properties["classification"] = {"name": name, "color": list(colour)}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def write_geojson(path: Path, features: Iterable[Any], **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features), **more}))
    return path


def expected_fractions(path: Path, label: str, boxes: Iterable[Box], cut: Iterable[Box] = ()) -> NDArray[np.float64]:
    """By clipping with shapely, from what the bag says of its tiles."""
    with h5py.File(path) as bag:
        cells = bag["levels"][label]["cells"]
        low = cells.attrs["origin_l0"] + cells[()] * cells.attrs["stride_l0"]
        high = low + cells.attrs["tile_size_l0"]
    tiles = shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1])
    area = shapely.unary_union([shapely.box(x, y, x + w, y + h) for x, y, w, h in boxes])
    area = area.difference(shapely.unary_union([shapely.box(x, y, x + w, y + h) for x, y, w, h in cut]))
    found: NDArray[np.float64] = shapely.area(shapely.intersection(tiles, area)) / shapely.area(tiles)
    return found


TUMOUR: tuple[Box, ...] = ((300, 300, 500, 417), (700, 600, 301, 250))
NECROSIS: Box = (400, 400, 350, 330)
OVER: Box = (1100, 500, 900, 400)
"""Over the right edge, into the part of a 5x tile that lies beyond it."""
IGNORED: Box = (320, 320, 100, 45)


def annotated(path: Path) -> Path:
    return write_geojson(
        path,
        [
            *(feature(box, "Tumour") for box in TUMOUR),
            feature(NECROSIS, "Tumour: Necrosis", (90, 90, 90)),
            feature((-100, 900, 500, 200), "Stroma/fat", (0, 0, 250)),
            feature(OVER, "Edge", (0, 200, 0)),
            feature(IGNORED, "Ignore*"),
            feature((5, 5, 10, 10), None),
            feature((5, 5, 10, 10), "Tumour", kind="cell"),
        ],
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, make_slide: MakeSlide) -> Path:
    folder = tmp_path_factory.mktemp("annotated")
    slide, file = make_slide(folder / "s.svs"), annotated(folder / "s.geojson")
    assert cli("run", slide, "-o", folder / "job", "--annotations", file) == 0
    return folder / "job"


def test_the_bag_holds_the_fraction_of_every_class(job: Path) -> None:
    path = job / "bags/s.h5"
    assert check_bag(path) == []
    cases = {
        "Tumour": (TUMOUR, (200, 0, 0), "Tumour"),
        "Tumour: Necrosis": ([NECROSIS], (90, 90, 90), "Tumour: Necrosis"),
        "Edge": ([(1100.0, 500.0, 436.0, 400.0)], (0, 200, 0), "Edge"),
        "Stroma_fat": ([(-100.0, 900.0, 500.0, 200.0)], (0, 0, 250), "Stroma/fat"),
    }
    with h5py.File(path) as bag:
        for label in ("5x", "20x"):
            group = bag["levels"][label]["annotation"]
            assert set(group) == set(cases)
            for slug, (boxes, colour, name) in cases.items():
                data = group[slug]
                assert data.dtype == np.float32
                assert (data.attrs["class"], tuple(data.attrs["color"])) == (name, colour)
                expected = expected_fractions(path, label, boxes, [IGNORED])
                assert expected.max() > 0.02
                assert np.abs(data[()] - expected).max() < 0.005
        about = json.loads(bag.attrs["annotation"])
        assert bag.attrs["schema_version"] == 1
        assert bag.attrs["bounds_l0"].tolist() == [0, 0, 1536, 1280]
        # What other tools read is as it was.
        assert sorted(bag) == ["coords", "features", "levels"]
    assert [item["name"] for item in about["classes"]] == ["Tumour", "Tumour: Necrosis", "Stroma/fat", "Edge"]
    level = read_level(path, "20x")
    assert np.array_equal(level.annotation["Stroma/fat"], read_bag(path).levels[1].annotation["Stroma_fat"].values)


def test_what_does_not_count_is_said_in_outcome_status_and_report(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = read_outcomes(job)["s"]
    over = "object 4, from (-100, 900) to (400, 1100); object 5, from (1100, 500) to (2000, 900)"
    assert outcome.notes == (
        "annotations: 1 cell ignored: only annotations count",
        f"annotations: cut at the edge of the slide of 1536 x 1280 px: {over}",
        "annotations: 1 annotation without a class left out",
    )
    cli("status", job)
    assert "1 annotation without a class left out" in capsys.readouterr().out
    assert "1 annotation without a class left out" in (job / "report.html").read_text()
    assert "1 annotation without a class left out" in (job / "report.csv").read_text()


def test_the_picture_of_the_grids_shows_the_classes(job: Path) -> None:
    with_classes = cv2.imread(str(job / "thumbnails/s.grid.jpg")).astype(int)
    bare = cv2.imread(str(job / "thumbnails/s.raw.jpg"))
    scale = with_classes.shape[1] / 1536
    x, y = round(1100 * scale), round(640 * scale)
    assert bare.shape[1] / 1536 > 0
    inside = with_classes[round(700 * scale) : round(840 * scale), round(720 * scale) : round(990 * scale)]
    outside = with_classes[y : y + round(200 * scale), x : x + round(100 * scale)]
    # Red is what the class is tinted with; green and blue go down.
    ratio = [part[..., 2].mean() / part[..., 1].mean() for part in (inside, outside)]
    assert ratio[0] > 1.2 * ratio[1]


def test_another_file_is_read_anew_and_features_are_kept(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, file, job = make_slide(tmp_path / "s.svs"), annotated(tmp_path / "s.geojson"), tmp_path / "job"
    assert cli("run", slide, "-o", job) == 0
    before = read_header(job / "bags/s.h5")
    assert cli("run", slide, "-o", job, "--annotations", file) == 0
    first = read_outcomes(job)["s"]
    assert set(first.cached) == {"segment", "extract"}
    one = read_bag(job / "bags/s.h5")
    assert one.levels[1].annotation["Tumour"].values.max() > 0.8
    # The file is remembered; a run that finds it as it was does nothing.
    stamp = (job / "bags/s.h5").stat().st_mtime_ns
    assert cli("run", slide, "-o", job) == 0
    assert cli("run", "-o", job) == 0
    assert (job / "bags/s.h5").stat().st_mtime_ns == stamp
    assert cli("verify", job) == 0
    write_geojson(file, [feature((300, 300, 10, 10), "Other")])
    capsys.readouterr()
    assert cli("verify", job) == 1
    assert "annotations" in capsys.readouterr().out
    assert cli("run", slide, "-o", job) == 0
    assert set(read_outcomes(job)["s"].cached) == {"segment", "extract"}
    two = read_bag(job / "bags/s.h5")
    assert set(two.levels[0].annotation) == {"Other"}
    assert read_header(job / "bags/s.h5").fingerprints == before.fingerprints
    assert np.array_equal(two.levels[1].features["texture"].values, one.levels[1].features["texture"].values)
    assert cli("verify", job) == 0
    assert cli("run", slide, "-o", job, "--annotations", "none") == 0
    three = read_bag(job / "bags/s.h5")
    assert three.levels[0].annotation == {}
    assert three.attrs.annotation == ""
    assert cli("verify", job) == 0


def test_other_grids_are_compared_anew(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide, file, job = make_slide(tmp_path / "s.svs"), annotated(tmp_path / "s.geojson"), tmp_path / "job"
    for px in (256, 128):
        assert cli("tile", slide, "-o", job, "-r", "20x", "--annotations", file, "--tile-px", px, "--redo") == 0
        (level,) = read_bag(job / "tiles/s.h5").levels
        assert level.annotation["Tumour"].values.shape == (len(level.grid),)
        expected = expected_fractions(job / "tiles/s.h5", "20x", TUMOUR, [IGNORED])
        assert np.abs(level.annotation["Tumour"].values - expected).max() < 0.005


def test_verify_finds_grids_that_were_compared_with_another_file(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    slide, job = make_slide(tmp_path / "s.svs"), tmp_path / "job"
    assert cli("run", slide, "-o", job, "-r", "5x") == 0
    assert cli("tile", slide, "-o", job, "-r", "5x", "--annotations", annotated(tmp_path / "a.geojson")) == 0
    capsys.readouterr()
    assert cli("verify", job) == 1
    assert "other annotations" in capsys.readouterr().out


def test_a_class_is_the_tissue(tmp_path: Path, make_slide: MakeSlide) -> None:
    slide, file, job = make_slide(tmp_path / "s.svs"), annotated(tmp_path / "s.geojson"), tmp_path / "job"
    command = ("tile", slide, "-o", job, "-r", "20x", "--annotations", file, "--tissue-class", "tumour: necrosis")
    assert cli(*command) == 0
    (level,) = read_bag(job / "tiles/s.h5").levels
    expected = expected_fractions(job / "tiles/s.h5", "20x", [NECROSIS], [IGNORED])
    assert len(level.grid) in (1, 2, 3, 4)
    assert np.abs(level.grid.tissue - expected).max() < 0.05
    # A slide without the class is empty with the reason, not failed: most slides of a cohort may be.
    assert cli("tile", slide, "-o", job, "-r", "20x", "--tissue-class", "Mucin") == 2, "finished work would be stale"
    assert cli("tile", slide, "-o", job, "-r", "20x", "--tissue-class", "Mucin", "--redo") == 0
    outcome = read_outcomes(job)["s"]
    assert outcome.status == "empty"
    assert outcome.reason == "no area of class Mucin: there is Tumour, Tumour: Necrosis, Stroma/fat, Edge, no class"
    assert cli("tile", slide, "-o", job, "-r", "20x", "--tissue-class", "none", "--redo") == 0
    assert read_outcomes(job)["s"].status == "done"


def test_columns_of_a_slide_list(tmp_path: Path, make_slide: MakeSlide) -> None:
    make_slide(tmp_path / "a.svs")
    make_slide(tmp_path / "b.svs", seed=1)
    annotated(tmp_path / "drawn/a.geojson")
    table = tmp_path / "slides.csv"
    table.write_text(
        "slide,annotations,tissue_class,frame\na.svs,drawn/a.geojson,Tumour; Stroma/fat,QuPath\nb.svs,,,\n"
    )
    a, b = read_manifest(table)
    assert a.annotations == str(tmp_path / "drawn/a.geojson")
    assert (a.tissue_class, a.frame) == (("Tumour", "Stroma/fat"), "qupath")
    assert (b.annotations, b.tissue_class, b.frame) == (None, (), None)
    write_manifest(tmp_path / "again.csv", [a, b])
    assert read_manifest(tmp_path / "again.csv") == [
        dataclasses.replace(entry, path=str(Path(entry.path).absolute())) for entry in (a, b)
    ]
    assert cli("tile", "--slides", table, "-o", tmp_path / "job", "-r", "20x") == 0
    assert set(read_bag(tmp_path / "job/tiles/a.h5").levels[0].annotation) >= {"Tumour", "Stroma_fat"}
    assert read_bag(tmp_path / "job/tiles/b.h5").levels[0].annotation == {}
    table.write_text("slide,frame\na.svs,micrometres\n")
    assert cli("tile", "--slides", table, "-o", tmp_path / "job") == 2


def test_a_folder_holds_the_files_of_many_slides(
    tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = [make_slide(tmp_path / "in" / f"{name}.svs") for name in "abc"]
    for name in ("a", "c", "spare"):
        write_geojson(tmp_path / "drawn" / f"{name}.geojson", [feature((300, 300, 400, 400), f"Class {name}")])
    job = tmp_path / "job"
    assert cli("tile", *slides, "-o", job, "-r", "5x", "--annotations", tmp_path / "drawn") == 0
    said = capsys.readouterr().err
    assert "1 slides without a file in it: b" in said
    assert "1 files of no slide given: spare" in said
    found = [set(read_bag(job / f"tiles/{name}.h5").levels[0].annotation) for name in "abc"]
    assert found == [{"Class a"}, set(), {"Class c"}]
    for wrong, message in (
        (("--annotations", tmp_path / "in"), "holds no file for any of the 3 slides"),
        (("--annotations", tmp_path / "drawn/a.geojson"), "one file for 3 slides"),
        (("--annotations", "none", "--tissue-class", "Tumour"), "no annotations"),
    ):
        assert cli("tile", *slides, "-o", tmp_path / "other", "-r", "5x", *wrong) == 2
        assert message in capsys.readouterr().err


# -- slides with bounds -----------------------------------------------------------------------------------------------

CORNER = (1000, 600)


@pytest.fixture
def with_bounds(
    tmp_path: Path, tissue_picture: Callable[..., NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[SlideOutcome, JobPaths]]:
    """``f(entry changes)``: tile and encode a slide as MIRAX has them: a scan of 1536 x 1280 px at (1000, 600)."""
    canvas = np.full((2560, 3072, 3), 255, np.uint8)
    picture = tissue_picture()
    canvas[CORNER[1] : CORNER[1] + 1280, CORNER[0] : CORNER[0] + 1536] = picture
    small = cv2.resize(canvas, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)

    def opened(*_: Any, **__: Any) -> ArraySlide:
        slide = ArraySlide([canvas, small], mpp=0.5)
        slide.info = dataclasses.replace(slide.info, bounds_l0=(*CORNER, 1536, 1280))
        return slide

    monkeypatch.setattr("wsi_pipe.job.prepare.open_entry", opened)
    monkeypatch.setattr("wsi_pipe.job.run.open_entry", opened)
    entry = SlideEntry("s", str(tmp_path / "s.mrxs"), "s")

    def run(until: Any = "assemble", redo: bool = False, **changes: Any) -> tuple[SlideOutcome, JobPaths]:
        settings = JobSettings(tile=TileSettings(resolutions=(2.0,)), redo=redo)
        own = dataclasses.replace(entry, **changes)
        paths = open_job(tmp_path / "job", settings, [own])
        (outcome,) = process([own], settings, paths, until=until)
        return outcome, paths

    return run


def test_a_mask_from_qupath_lies_where_it_was_drawn(
    tmp_path: Path, with_bounds: Callable[..., tuple[SlideOutcome, JobPaths]]
) -> None:
    file = write_geojson(tmp_path / "qupath.geojson", [feature((100, 100, 512, 512), "Tissue")])
    outcome, paths = with_bounds("tile", mask=str(file))
    (level,) = read_bag(paths.tiles("s")).levels
    expected = expected_fractions(paths.tiles("s"), "5x", [(1100, 700, 512, 512)])
    assert np.abs(level.grid.tissue - expected).max() < 0.02
    assert level.grid.coords[:, 0].min() == 1024
    assert outcome.notes[0].startswith(
        "mask: coordinates are counted from the corner of the scan's bounds at (1000, 600)"
    )
    # The job's own mask is again in QuPath's frame, says so, and is read back to the same place, without a new note.
    stored = json.loads(paths.tissue("s").read_text())
    assert stored["wsi_pipe"]["frame"] == "qupath"
    assert stored["wsi_pipe"]["origin_l0"] == list(CORNER)
    ring = np.array(stored["features"][0]["geometry"]["coordinates"][0])
    assert np.abs(ring.min(0) - 100).max() <= 16
    again, _ = with_bounds("tile", mask=str(file))
    assert set(again.cached) == {"segment", "tile"}
    assert again.notes == outcome.notes
    # The same numbers, counted from the whole image, are another place.
    with_bounds("tile", redo=True, mask=str(file), frame="image")
    (other,) = read_bag(paths.tiles("s")).levels
    assert other.grid.coords.tolist() == [[0, 0]]


def test_annotations_from_qupath_lie_where_they_were_drawn(
    tmp_path: Path, with_bounds: Callable[..., tuple[SlideOutcome, JobPaths]]
) -> None:
    file = write_geojson(tmp_path / "qupath.geojson", [feature((500, 400, 500, 500), "Tumour")])
    outcome, paths = with_bounds(annotations=str(file))
    assert outcome.status == "done"
    (level,) = read_bag(paths.bag("s")).levels
    expected = expected_fractions(paths.bag("s"), "5x", [(1500, 1000, 500, 500)])
    assert expected.max() > 0.15
    assert np.abs(level.annotation["Tumour"].values - expected).max() < 0.005
    assert read_header(paths.bag("s")).attrs.bounds_l0 == (*CORNER, 1536, 1280)
    assert outcome.notes[0].startswith("annotations: coordinates are counted from the corner of the scan's bounds")


def test_a_job_of_a_version_that_knew_one_frame_goes_on(
    with_bounds: Callable[..., tuple[SlideOutcome, JobPaths]],
) -> None:
    """Its mask counts from the whole image; it is kept, and written again as QuPath counts."""
    outcome, paths = with_bounds()
    data = json.loads(paths.tissue("s").read_text())
    scale = data["wsi_pipe"]["scale_l0"]
    mask = np.zeros(data["wsi_pipe"]["mask_size_px"][::-1], bool)
    mask[60:100, 90:130] = True
    old = mask_to_geojson(TissueMask(mask, (scale[0], scale[1])))
    member = {k: v for k, v in data["wsi_pipe"].items() if k not in ("frame", "origin_l0")}
    paths.tissue("s").write_text(json.dumps({**old, "wsi_pipe": member}))
    outcome, _ = with_bounds("segment")
    assert outcome.cached == ("segment",)
    new = json.loads(paths.tissue("s").read_text())
    assert new["wsi_pipe"]["fingerprint"] == member["fingerprint"]
    shift = np.subtract(*(d["features"][0]["geometry"]["coordinates"][0][0] for d in (old, new)))
    assert shift.tolist() == list(CORNER)


# -- files that cannot be used ----------------------------------------------------------------------------------------


def test_files_that_would_fill_the_memory_are_refused_before_they_are_parsed(
    tmp_path: Path, make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of ten million points took 19 GB."""
    path = tmp_path / "many.geojson"
    ring = ",".join(f"[{n},{n % 7}]" for n in range(2000))
    path.write_text('{"type":"Polygon","coordinates":[[' + ring + "]]}")
    assert read_geojson(path)[0]["type"] == "Polygon"
    monkeypatch.setattr(given_module.json, "loads", lambda _: pytest.fail("was parsed"))
    monkeypatch.setattr(given_module, "MOST_POINTS", 1000)
    with pytest.raises(MaskError, match="some 2,002 points, more than 1,000") as error:
        read_geojson(path)
    assert "annotations alone" in str(error.value.remedy)
    monkeypatch.setattr(given_module, "MOST_BYTES", 5000)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(MaskError, match="MiB are more"):
        read_geojson(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "is not JSON"),
        (b"[" * 100_000, "is nested without end"),
        (b"\x1f\x8b\x08\x00", "is compressed"),
        (b"PK\x03\x04", "is compressed"),
        (b"\xff\xfe\x00\x01", "is not JSON"),
        (b"{}", "has no type"),
        (json.dumps(feature((9000, 9000, 50, 50), "Tumour")).encode(), "outside the slide"),
    ],
)
def test_a_file_that_cannot_be_used_fails_its_slide_and_is_named(
    tmp_path: Path, make_slide: MakeSlide, content: bytes, message: str
) -> None:
    slide, file = make_slide(tmp_path / "s.svs"), tmp_path / "a.geojson"
    file.write_bytes(content)
    for option in ("--annotations", "--mask"):
        job = tmp_path / option[2:]
        assert cli("tile", slide, "-o", job, "-r", "5x", option, file) == 1
        outcome = read_outcomes(job)["s"]
        assert outcome.error == "MaskError"
        assert message in str(outcome.reason)
        assert str(file) in str(outcome.reason)


def test_outcomes_of_earlier_versions_have_no_notes() -> None:
    line = SlideOutcome("s", "done").to_json()
    del line["notes"]
    assert SlideOutcome.from_json(line).notes == ()
    noted = SlideOutcome("s", "done", notes=("one", "two"))
    assert SlideOutcome.from_json(json.loads(json.dumps(noted.to_json()))) == noted


def test_tissue_by_class_needs_a_file(tmp_path: Path, make_slide: MakeSlide) -> None:
    table = tmp_path / "slides.csv"
    make_slide(tmp_path / "s.svs")
    table.write_text("slide,tissue_class\ns.svs,Tumour\n")
    assert cli("tile", "--slides", table, "-o", tmp_path / "job", "-r", "5x") == 1
    assert "has no annotations" in str(read_outcomes(tmp_path / "job")["s"].reason)
