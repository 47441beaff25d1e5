"""Slide lists: what is found, how slides are named, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_pipe.config import SegmentSettings, TileSettings
from wsi_pipe.errors import ManifestError
from wsi_pipe.manifest import SlideEntry, collect_slides, read_manifest, settings_of, write_manifest


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def ids(entries: list[SlideEntry]) -> list[str]:
    return [entry.slide_id for entry in entries]


def test_folders_are_searched_for_slides_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b/two.svs", "a one.ndpi", "b/c/🔬.tiff", "label.png", "notes.txt", ".hidden.svs", "b/Slidedat.ini"):
        touch(tmp_path / name)
    assert ids(collect_slides([str(tmp_path)])) == ["a one", "two", "🔬"]


def test_a_named_file_is_taken_whatever_its_extension(tmp_path: Path) -> None:
    assert ids(collect_slides([str(touch(tmp_path / "x.png")), "http://127.0.0.1:1/y.svs"])) == ["x", "y"]


def test_one_file_given_twice_is_one_slide(tmp_path: Path) -> None:
    path = str(touch(tmp_path / "a.svs"))
    assert ids(collect_slides([path, path, str(tmp_path)])) == ["a"]


def test_slides_of_one_name_get_different_ids(tmp_path: Path) -> None:
    for name in ("p/1/s.svs", "p/2/s.svs", "q/2/s.svs", "q/t.svs"):
        touch(tmp_path / name)
    assert sorted(ids(collect_slides([str(tmp_path)]))) == ["1--s", "p--2--s", "q--2--s", "t"]


def test_ids_differ_by_more_than_case(tmp_path: Path) -> None:
    for name in ("a/S.svs", "b/s.svs"):
        touch(tmp_path / name)
    assert sorted(ids(collect_slides([str(tmp_path)]))) == ["a--S", "b--s"]


def test_a_name_too_long_for_an_id_is_cut_and_stays_unique(tmp_path: Path) -> None:
    for end in "ab":
        touch(tmp_path / f"{'ä' * 110}{end}.svs")
    first, second = ids(collect_slides([str(tmp_path)]))
    assert first != second
    assert max(len(first.encode()), len(second.encode())) <= 180


def test_slides_of_a_job_keep_their_ids_and_nobody_takes_them(tmp_path: Path) -> None:
    old = touch(tmp_path / "a" / "s.svs")
    job = collect_slides([str(old)])
    new = touch(tmp_path / "b" / "s.svs")
    assert ids(collect_slides([str(tmp_path)], job=job)) == ["s", "b--s"]
    assert ids(collect_slides([str(new)], job=job)) == ["b--s"]
    old.unlink()
    assert ids(collect_slides([str(new)], job=job)) == ["s"], "it was moved"


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "in/a.svs")
    (tmp_path / "in/slides.csv").write_text("slide,mask\na.svs,m.geojson\n")
    monkeypatch.chdir(tmp_path)
    found = collect_slides(["in/a.svs", "./in/a.svs"])
    assert [entry.path for entry in found] == [str(tmp_path / "in/a.svs")]
    (listed,) = collect_slides([], Path("in/slides.csv"))
    assert (listed.path, listed.mask) == (str(tmp_path / "in/a.svs"), str(tmp_path / "in/m.geojson"))


def test_a_name_that_is_not_utf8_is_refused_with_a_remedy(tmp_path: Path) -> None:
    import os

    (tmp_path / "in").mkdir()
    os.close(os.open(os.fsencode(tmp_path / "in") + b"/M\xfcller.svs", os.O_CREAT | os.O_WRONLY))
    with pytest.raises(ManifestError, match="not UTF-8; rename it"):
        collect_slides([str(tmp_path / "in")])


def test_rows_are_counted_as_an_editor_does_and_settings_that_bound_each_other_may_both_be_given(
    tmp_path: Path,
) -> None:
    (entry,) = read_manifest(write_csv(tmp_path, "slide,stain_min,stain_seed\na.svs,0.05,0.1\n"))
    assert entry.overrides == {"stain_min": 0.05, "stain_seed": 0.1}
    with pytest.raises(ManifestError, match="row 4: mpp"):
        read_manifest(write_csv(tmp_path, "slide,mpp\na.svs,1\n\nb.svs,x\n"))
    with pytest.raises(ManifestError, match="give a CSV"):
        read_manifest(write_csv(tmp_path, "slide\n" + "x" * 200_000 + "\n"))


def test_slides_that_differ_in_extension_alone_keep_it(tmp_path: Path) -> None:
    for name in ("q/t.svs", "q/t.ndpi", "q/u.svs"):
        touch(tmp_path / name)
    assert ids(collect_slides([str(tmp_path)])) == ["t.ndpi", "t.svs", "u"]


def test_ome_and_dicom_names(tmp_path: Path) -> None:
    touch(tmp_path / "x.ome.tif")
    touch(tmp_path / "case 7" / "level-0.dcm")
    assert ids(collect_slides([str(tmp_path)])) == ["x", "case 7"]


def test_links_that_lead_back_do_not_hang(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.svs")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert ids(collect_slides([str(tmp_path)])) == ["x"]


def test_a_folder_named_like_a_slide_is_a_slide_that_will_fail(tmp_path: Path) -> None:
    (tmp_path / "x.svs").mkdir()
    assert ids(collect_slides([str(tmp_path / "x.svs")])) == ["x"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "no slides in this folder"),
        ([], "no slides are given"),
    ],
)
def test_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=message):
        collect_slides(sources)


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "slides.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path,
        "\ufeffslide, slide_id, case_id, mpp, mask, min_tissue, mask_mpp, allow_upsampling\n"
        "in/a.svs,A,case-1,0.25,m.geojson,0.5,,yes\n"
        '"/abs/b c.svs",,case-1,0.25x0.26,,,16,\n'
        "s3://bucket/c.svs,,,,,,,\n",
    )
    first, second, third = read_manifest(path)
    assert first == SlideEntry(
        "A", str(tmp_path / "in/a.svs"), "case-1", (0.25, 0.25), str(tmp_path / "m.geojson"),
        {"min_tissue": 0.5, "allow_upsampling": True},
    )  # fmt: skip
    assert (second.slide_id, second.case_id, second.mpp, second.path) == ("b c", "case-1", (0.25, 0.26), "/abs/b c.svs")
    assert (third.slide_id, third.case_id, third.path) == ("c", "c", "s3://bucket/c.svs")
    segment, tile = settings_of(second, SegmentSettings(), TileSettings())
    assert (segment.mpp, tile) == (16.0, TileSettings())
    assert settings_of(first, SegmentSettings(), TileSettings())[1].min_tissue == 0.5


def test_planes_and_scans_may_be_written_as_tables_with_gaps_write_them(tmp_path: Path) -> None:
    """pandas makes 2.0 of 2 where another row has none."""
    table = tmp_path / "a.csv"
    table.write_text("slide,scene,z\na.svs,2.0,\nb.svs,,10.00\n")
    assert [(e.scene, e.z) for e in read_manifest(table)] == [(2, None), (None, 10)]
    table.write_text("slide,z\na.svs,1.5\n")
    with pytest.raises(ManifestError, match=r"'1\.5' is not a number"):
        read_manifest(table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na.svs\n", "has no column 'slide', but 'name'; .* columns among slide, slide_id, case_id, mpp, mask"),
        ("slide,mmp\na.svs,0.5\n", "unknown column 'mmp': did you mean 'mpp'"),
        ("wsi,path\na.svs,b.svs\n", "the columns 'wsi' and 'path' may both be 'slide'; name the right one 'slide'"),
        ("slide,mpp,mpp\na.svs,1,1\n", "column 'mpp' stands twice"),
        ("slide,mpp\na.svs,0.25\nb.svs,20x\n", "row 3: mpp '20x' is not a resolution; write um/px"),
        ("slide,mpp\na.svs,0.25\nb.svs,0.04\n", "row 3: mpp '0.04' is outside 0.05 to 20 um/px; write um/px"),
        ("slide,mpp\na.svs,0.5x25\n", "row 2: mpp '0.5x25' is outside 0.05 to 20 um/px"),
        ("slide,scene\na.svs,1\nb.svs,-1\n", "row 3: '-1' is not a number of a scan or focal plane"),
        ("slide,z\na.svs,middle\n", "row 2: 'middle' is not a number of a scan or focal plane \\(column 'z'\\)"),
        ("slide,mpp\na.svs,-1\n", "row 2: mpp '-1'"),
        ("slide,mpp\na.svs\n", "row 2: has fewer cells"),
        ("slide\na.svs,b\n", "row 2: has more cells"),
        ("slide\n,\n", "lists no slides"),
        ("slide,slide_id\na.svs,x\n\nb.svs,x.svs\n", "rows 2 and 4: the ids 'x' and 'x.svs' are one slide"),
        ("slide,slide_id\na.svs,\n,x\n", "row 3: the cell 'slide' is empty"),
        ("slide,slide_id\na.svs,x/y\n", "row 2: the id 'x/y' cannot be a file name; use for example 'x_y'"),
        ("slide,slide_id\na.svs,x\nb.svs,X\n", "two slides have the id 'X': .*a.svs and .*b.svs; give each its own id"),
        ("slide,min_tissue\na.svs,lots\n", r"row 2: 'lots' is not a float \(column 'min_tissue'\)"),
        ("slide,min_tissue\na.svs,7\n", r"row 2.*min_tissue 7.0 must lie between 0 and 1"),
        ("slide,allow_upsampling\na.svs,perhaps\n", "row 2: 'perhaps' is not a bool"),
        ("slide\n", "lists no slides"),
    ],
)
def test_bad_csv_names_row_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(write_csv(tmp_path, text))
    assert "slides.csv" in str(caught.value)


def test_binary_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_bytes(b"\xff\xfe\x00slide")
    with pytest.raises(ManifestError, match="give a CSV in UTF-8"):
        read_manifest(tmp_path / "slides.csv")


NAMES = st.text(st.characters(categories=("L", "N", "So"), include_characters=" ,-_'"), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAMES.map(str.strip).filter(bool), unique_by=str.casefold, min_size=1, max_size=5),
    mpp=st.one_of(st.none(), st.tuples(st.floats(0.05, 20), st.floats(0.05, 20))),
    tissue=st.one_of(st.none(), st.floats(0, 1)),
    scene=st.one_of(st.none(), st.integers(0, 40)),
    z=st.one_of(st.none(), st.integers(0, 40)),
)
def test_round_trip(
    tmp_path: Path,
    names: list[str],
    mpp: tuple[float, float] | None,
    tissue: float | None,
    scene: int | None,
    z: int | None,
) -> None:
    overrides = {} if tissue is None else {"min_tissue": tissue}
    entries = [SlideEntry(name, f"/slides/{name}.svs", f"case {name}", mpp, None, overrides) for name in names]
    entries[0] = dataclasses.replace(entries[0], scene=scene, z=z)
    path = tmp_path / "written.csv"
    write_manifest(path, entries)
    assert read_manifest(path) == entries


def test_a_file_by_another_path_is_the_slide_that_the_job_has(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.svs", "b.svs"):
        (folder / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(folder)
    job = [SlideEntry("first", str(folder / "a.svs"), "p"), SlideEntry("b", str(folder / "b.svs"), "q")]
    linked = collect_slides([str(tmp_path / "link")], job=job)
    assert [(e.slide_id, e.path, e.case_id) for e in linked] == [
        ("first", str(tmp_path / "link/a.svs"), "p"), ("b", str(tmp_path / "link/b.svs"), "q"),
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.svs").write_bytes(b"")
    assert [e.slide_id for e in collect_slides([str(tmp_path / "other/a.svs")], job=job)] == ["a"]


def test_a_file_that_is_named_twice_is_one_slide(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.svs").write_bytes(b"")
    (tmp_path / "a.svs").symlink_to(folder / "a.svs")
    notes: list[str] = []
    twice = [str(folder), str(folder / "../in/a.svs"), str(tmp_path / "a.svs")]
    assert [(e.slide_id, e.path) for e in collect_slides(twice, notes=notes)] == [("a", str(folder / "a.svs"))]
    assert notes == [
        f"{path} is the same file as {folder / 'a.svs'}: one slide"
        for path in (f"{folder}/../in/a.svs", tmp_path / "a.svs")
    ]


def test_who_names_a_file_names_all_its_scans_in_the_job(tmp_path: Path) -> None:
    (tmp_path / "a.scn").write_bytes(b"")
    path = str(tmp_path / "a.scn")
    job = [SlideEntry(f"a{scene}", path, "p", scene=scene) for scene in range(2)]
    assert collect_slides([path], job=job) == job
