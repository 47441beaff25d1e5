"""OME-Zarr stores written here with zarr: versions 2 and 3, axes in any order, shards, series, channels, URLs."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from tests.slides.dicom.test_scale import blobs
from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.zarr.reader import ZarrSlide, open_zarr

Picture = NDArray[np.uint8]
MPP = 0.25


@functools.cache
def picture(seed: int = 1, width: int = 300, height: int = 220) -> Picture:
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), 2.0)
    found = np.clip(170 + 150 * noise, 1, 255).astype(np.uint8)
    found.setflags(write=False)
    return found


def halves(full: Picture, count: int) -> list[Picture]:
    found = [full]
    for _ in range(count - 1):
        last = found[-1]
        size = (last.shape[1] // 2, last.shape[0] // 2)
        found.append(np.asarray(cv2.resize(last[: 2 * size[1], : 2 * size[0]], size, interpolation=cv2.INTER_AREA)))
    return found


def arranged(level: Picture, axes: str) -> NDArray[Any]:
    """A picture (h, w, 3) with its dimensions in the order of ``axes``; others than y, x and c have one entry."""
    whole = level.reshape(1, 1, *level.shape)
    return whole.transpose(["tzyxc".index(axis) for axis in axes]) if len(axes) == 5 else _fewer(whole, axes)


def _fewer(whole: NDArray[Any], axes: str) -> NDArray[Any]:
    dropped = tuple(i for i, axis in enumerate("tzyxc") if axis not in axes)
    left = [axis for axis in "tzyxc" if axis in axes]
    return np.squeeze(whole, dropped).transpose([left.index(axis) for axis in axes])


def colours(*names: str, labels: tuple[str, ...] = ("0", "1", "2")) -> dict[str, Any]:
    return {"channels": [{"color": c, "label": text} for c, text in zip(names, labels, strict=True)]}


RGB = ("FF0000", "00FF00", "0000FF")
WHITES = ("FFFFFF", "FFFFFF", "FFFFFF")
NAMED = colours(*RGB, labels=("Red", "Green", "Blue"))
UNNAMED = "three channels without names are taken for red, green and blue, as their background is bright"


def write_image(
    group: Any,
    levels: list[NDArray[Any]],
    axes: str = "tczyx",
    *,
    version: int = 3,
    chunk: int = 64,
    shard: int = 0,
    unit: str | None = "micrometer",
    scales: list[float] | None = None,
    one_chunk_per_channel: bool = True,
    omero: Any = NAMED,
    compressor: Any = "auto",
    fill: int = 0,
    mpp: float = MPP,
    **image: Any,
) -> None:
    """Levels, their arrays arranged already, and the OME metadata, into an open group."""
    datasets = []
    for i, level in enumerate(levels):
        sides = {"y": chunk, "x": chunk, "c": 1 if one_chunk_per_channel else 3}
        chunks = tuple(min(sides.get(axis, 1), n) for axis, n in zip(axes, level.shape, strict=True))
        options: dict[str, Any] = {"chunks": chunks, "dtype": level.dtype, "fill_value": fill}
        if shard:
            options["shards"] = tuple(c * (shard if axis in "yx" else 1) for c, axis in zip(chunks, axes, strict=True))
        if compressor != "auto":
            options["compressors"] = compressor
        elif version == 2:
            options["compressors"] = numcodecs.Blosc("lz4")
        array = group.create_array(str(i), shape=level.shape, **options)
        array[...] = level
        scale = (scales or [2.0**k for k in range(len(levels))])[i]
        values = [mpp * scale if axis in "xy" else 1.0 for axis in axes]
        datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": values}]})
    kinds = {"t": "time", "c": "channel"}
    described = []
    for axis in axes:
        found = {"name": axis, "type": kinds.get(axis, "space")}
        described.append(found | ({"unit": unit} if unit and axis in "xyz" else {}))
    multiscale = {"axes": described, "datasets": datasets, "name": "/", **image}
    ome: dict[str, Any] = {"multiscales": [multiscale]} | ({"omero": omero} if omero else {})
    if version == 3:
        group.attrs["ome"] = {"version": "0.5", **ome}
    else:
        multiscale["version"] = "0.4"
        group.attrs.update(ome)


def store(
    path: Path, levels: list[Picture] | None = None, axes: str = "tczyx", *, version: int = 3, **options: Any
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == 3 else 2)
    write_image(
        group, [arranged(level, axes) for level in levels or halves(picture(), 2)], axes, version=version, **options
    )
    return path


def whole(slide: ZarrSlide | Any, level: int = 0) -> Picture:
    return np.asarray(slide.read_region(level, 0, 0, *slide.pyramid.levels[level].size_px), np.uint8)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("axes", ["tczyx", "cyx", "yxc", "czyx", "xyc", "tyxc"])
def test_axes_in_any_order(tmp_path: Path, version: int, axes: str) -> None:
    levels = halves(picture(), 3)
    path = store(tmp_path / "a.ome.zarr", levels, axes, version=version)
    with open_slide(path) as slide:
        assert slide.info.reader == "zarr"
        assert slide.info.notes == ()
        assert [level.size_px for level in slide.pyramid.levels] == [(300, 220), (150, 110), (75, 55)]
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2), (4, 4)]
        assert slide.pyramid.mpp == (MPP, MPP)
        assert slide.planes[0].block_px == (64, 64)
        for i, level in enumerate(levels):
            assert np.array_equal(whole(slide, i), level)


OPTIONS: dict[str, dict[str, Any]] = {
    "shards": {"shard": 2},
    "shards of whole colour": {"shard": 2, "one_chunk_per_channel": False},
    "one chunk for colours": {"one_chunk_per_channel": False},
    "gzip": {"compressor": zarr.codecs.GzipCodec()},
    "plain": {"compressor": None},
    "blosc": {"compressor": zarr.codecs.BloscCodec(cname="zstd")},
    "zlib of version 2": {"version": 2, "compressor": numcodecs.Zlib()},
    "zstd of version 2": {"version": 2, "compressor": numcodecs.Zstd()},
    "plain of version 2": {"version": 2, "compressor": None},
    "chunks larger than the image": {"chunk": 512},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_of_chunk(tmp_path: Path, kind: str) -> None:
    path = store(tmp_path / "a.zarr", **OPTIONS[kind])
    with open_slide(path) as slide:
        for i, level in enumerate(halves(picture(), 2)):
            assert np.array_equal(whole(slide, i), level)


def test_each_chunk_is_read_once(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", one_chunk_per_channel=False)
    with open_zarr(path) as slide:
        before, requests = slide.stats.blocks_decoded, slide.stats.requests
        whole(slide)
        # 5 x 4 chunks.
        assert slide.stats.blocks_decoded - before == 20
        assert slide.stats.requests - requests == 20


def test_threads_read_what_one_reads(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", shard=2)
    with open_zarr(path) as slide, ThreadPoolExecutor(4) as pool:
        places = [(x, y) for x in range(0, 300, 37) for y in range(0, 220, 41)]
        found = list(pool.map(lambda place: slide.read_region(0, *place, 50, 50), places))
        for (x, y), pixels in zip(places, found, strict=True):
            truth = picture()[y : y + 50, x : x + 50]
            assert np.array_equal(pixels[: truth.shape[0], : truth.shape[1]], truth)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("micrometer", 1.0), ("nanometer", 1e-3), ("millimeter", 1e3), ("um", 1.0), ("µm", 1.0), (None, None),
     ("second", None)],
)  # fmt: skip
def test_units(tmp_path: Path, unit: str | None, factor: float | None) -> None:
    path = store(tmp_path / "a.zarr", unit=unit)
    with open_zarr(path) as slide:
        assert slide.pyramid.mpp == (None if factor is None else pytest.approx((MPP * factor, MPP * factor)))
        assert (slide.info.mpp_source == "none") == (factor is None)
    with open_slide(path, mpp=0.5) as given:
        assert given.pyramid.mpp == (0.5, 0.5)
        assert given.info.mpp_source == "user"


def test_the_transformation_of_the_whole_image_counts_too(tmp_path: Path) -> None:
    steps = [{"type": "scale", "scale": [1, 1, 1, 2, 2]}]
    with open_zarr(store(tmp_path / "a.zarr", coordinateTransformations=steps)) as slide:
        assert slide.pyramid.mpp == (2 * MPP, 2 * MPP)
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2)]


@pytest.mark.parametrize(("scales", "kept"), [([1, 2.01], 2), ([1, 2.0005], 2), ([1, 3], 1), ([1, 1], 1)])
def test_a_level_is_at_the_scale_that_is_stated_or_is_left_out(tmp_path: Path, scales: list[float], kept: int) -> None:
    with open_zarr(store(tmp_path / "a.zarr", scales=scales)) as slide:
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2)][:kept]
        assert len(slide.info.notes) == 2 - kept
        if kept == 1:
            assert "150 x 110 px (1) is left out: the scale of" in slide.info.notes[0]


def edit(path: Path, change: Any) -> None:
    """Change the OME metadata of a group of version 3."""
    document = json.loads((path / "zarr.json").read_text())
    change(document["attributes"]["ome"])
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(("shift", "kept"), [(0.5 * MPP, 2), (1.0 * MPP, 2), (40 * MPP, 1)])
def test_a_level_that_is_shifted_is_left_out(tmp_path: Path, shift: float, kept: int) -> None:
    path = store(tmp_path / "a.zarr")

    def move(ome: Any) -> None:
        ome["multiscales"][0]["datasets"][1]["coordinateTransformations"].append(
            {"type": "translation", "translation": [0, 0, 0, shift, shift]}
        )

    edit(path, move)
    with open_zarr(path) as slide:
        assert len(slide.pyramid.levels) == kept
        assert all("is shifted by" in note for note in slide.info.notes)


def test_focal_planes(tmp_path: Path) -> None:
    planes = [picture(seed) for seed in range(4)]
    stack = np.stack([arranged(plane, "cyx") for plane in planes], axis=1)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    write_image(group, [stack, stack[..., ::2, ::2]], "czyx")
    with open_slide(tmp_path / "a.zarr") as slide:
        assert np.array_equal(whole(slide), planes[1])
        assert slide.info.notes == ("focal plane 1 of 0 to 3, the middle one is read (--z N takes another)",)
    prints = set()
    for z, plane in enumerate(planes):
        with open_slide(tmp_path / "a.zarr", z=z) as slide:
            assert np.array_equal(whole(slide), plane)
            assert np.array_equal(whole(slide, 1), plane[::2, ::2])
            prints.add(slide.info.fingerprint)
    assert len(prints) == 4
    with pytest.raises(NotAPictureError, match="--z 4 was asked for, but the level 0 has 4 focal planes"):
        open_slide(tmp_path / "a.zarr", z=4)


@pytest.mark.parametrize(
    ("levels", "omero", "reason"),
    [
        ([picture().astype(np.uint16)], None, "type uint16"),
        ([picture().astype(np.int8)], None, "type int8"),
        ([picture().astype(np.float32)], None, "type float32"),
        ([picture()[..., :1]], None, "1 channel"),
        ([np.dstack([picture(), picture()[..., :2]])], None, "5 channels"),
        ([picture()], colours(*RGB, labels=("DAPI", "FITC", "Cy3")), r"fluorescence channels \(DAPI, FITC, Cy3\)"),
        ([picture()], colours("0000FF", "00FF00", "FF0000"), "channels in the colours 0000FF"),
        ([picture()], colours(*WHITES, labels=("Blue", "Green", "Red")), "channels named Blue, Green, Red, not red"),
        ([picture()], colours(*WHITES, labels=("Hematoxylin", "Eosin", "DAB")), "channels named Hematoxylin, Eosin"),
        ([picture()], colours(*WHITES, labels=("Residual", "Gamma", "Bright")), "channels named Residual"),
    ],
)
def test_what_is_no_brightfield_picture_in_colour_is_refused_for_good(
    tmp_path: Path, levels: list[Any], omero: Any, reason: str
) -> None:
    path = store(tmp_path / "a.zarr", levels, omero=omero)
    with pytest.raises(NotAPictureError, match=reason) as caught:
        open_slide(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "omero",
    [
        None, NAMED, colours(*RGB), colours(*WHITES), {"channels": "x"}, colours(*WHITES, labels=("H&E",) * 3),
        colours(*RGB, labels=("Channel 0", "Channel 1", "Channel 2")),
        colours(*RGB, labels=("TL Brightfield", "TL Brightfield", "TL Brightfield #2")),
    ],
)  # fmt: skip
def test_three_channels_are_red_green_and_blue(tmp_path: Path, omero: Any) -> None:
    with open_slide(store(tmp_path / "a.zarr", omero=omero)) as slide:
        assert np.array_equal(whole(slide), picture())
        assert slide.info.notes == (() if omero is NAMED else (UNNAMED,))


def test_three_channels_without_names_on_black_are_refused(tmp_path: Path) -> None:
    glowing = np.ascontiguousarray(255 - picture() // 2 - 120)
    with pytest.raises(NotAPictureError, match="on a dark background"):
        open_slide(store(tmp_path / "a.zarr", [glowing], omero=None))
    with open_slide(store(tmp_path / "b.zarr", [glowing], omero=NAMED)) as slide:
        assert np.array_equal(whole(slide), glowing)


def test_a_level_of_another_picture_is_left_out(tmp_path: Path) -> None:
    levels, others = (halves(blobs(640, 480, seed), 3) for seed in (3, 7))
    levels[1] = others[1]
    with open_slide(store(tmp_path / "a.zarr", levels, omero=NAMED)) as slide:
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (4, 4)]
        assert slide.info.notes[0].endswith("(1) is left out: it shows another picture than the next finer one")


def test_time_points_are_refused(tmp_path: Path) -> None:
    twice = np.concatenate([arranged(picture(), "tczyx")] * 2)
    write_image(zarr.open_group(tmp_path / "a.zarr", mode="w"), [twice])
    with pytest.raises(NotAPictureError, match="2 time points"):
        open_slide(tmp_path / "a.zarr")


def collection(
    path: Path, series: list[list[Picture]], *, version: int = 2, xml: str = "", listed: bool = True
) -> Path:
    """As bioformats2raw writes it."""
    root = zarr.open_group(path, mode="w", zarr_format=version)
    layout = {"bioformats2raw.layout": 3}
    root.attrs.update(layout if version == 2 else {"ome": {"version": "0.5", **layout}})
    for i, levels in enumerate(series):
        write_image(root.create_group(str(i)), [arranged(level, "tczyx") for level in levels], version=version)
    ome = root.create_group("OME")
    if listed:
        names = {"series": [str(i) for i in range(len(series))]}
        ome.attrs.update(names if version == 2 else {"ome": names})
    if xml:
        (path / "OME" / "METADATA.ome.xml").write_text(xml)
    return path


def ome_xml(*images: tuple[str, str]) -> str:
    """Names, and attributes of the one channel."""
    elements = "".join(
        f'<Image Name="{name}"><Pixels><Channel {channel}/></Pixels></Image>' for name, channel in images
    )
    return f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{elements}</OME>'


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("listed", [True, False])
def test_a_collection_of_one_scan_is_that_scan(tmp_path: Path, version: int, listed: bool) -> None:
    path = collection(tmp_path / "a.zarr", [halves(picture(), 2)], version=version, listed=listed)
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), picture())
        assert slide.info.notes == ()
        assert len(slide.pyramid.levels) == 2
    # The series by itself.
    with open_slide(path / "0") as slide:
        assert np.array_equal(whole(slide), picture())


def test_label_and_macro_are_no_scans(tmp_path: Path) -> None:
    rgb = 'SamplesPerPixel="3"'
    xml = ome_xml(("slide.svs", rgb), ("label image", rgb), ("macro image", rgb))
    series = [halves(picture(), 2), [picture(2, 90, 80)], [picture(3, 200, 90)]]
    with open_slide(collection(tmp_path / "a.zarr", series, xml=xml)) as slide:
        assert np.array_equal(whole(slide), picture())
        assert "series 1 (90 x 80 px), 2 (200 x 90 px) are taken for label or macro images" in slide.info.notes[0]
        found = slide.associated_images()
        assert set(found) == {"label", "macro"}
        assert np.array_equal(found["label"], picture(2, 90, 80))
    # Without names: small, and without levels.
    series = [[picture(2, 60, 50)], halves(picture(), 2)]
    with open_slide(collection(tmp_path / "b.zarr", series)) as slide:
        assert np.array_equal(whole(slide), picture())


def test_several_scans_want_a_scene(tmp_path: Path) -> None:
    series = [halves(picture(seed), 2) for seed in (1, 2, 3)]
    path = collection(tmp_path / "a.zarr", series)
    with pytest.raises(NotAPictureError, match=r"3 scans: series 0 \(300 x 220 px\), .*--scene N"):
        open_slide(path)
    prints = set()
    for i in range(3):
        with open_slide(path, scene=i) as slide:
            assert np.array_equal(whole(slide), picture(i + 1))
            prints.add(slide.info.fingerprint)
    assert len(prints) == 3
    with pytest.raises(NotAPictureError, match="--scene 3 was asked for, but the store holds 3 series"):
        open_slide(path, scene=3)
    with pytest.raises(NotAPictureError, match="holds one image"):
        open_slide(store(tmp_path / "b.zarr"), scene=1)


@pytest.mark.parametrize(
    "channel",
    [
        'ContrastMethod="Fluorescence"',
        'IlluminationType="Epifluorescence"',
        'EmissionWavelength="461.0"',
        'Name="DAPI"',
    ],
)
def test_what_the_ome_xml_declares_counts(tmp_path: Path, channel: str) -> None:
    path = collection(tmp_path / "a.zarr", [halves(picture(), 2)], xml=ome_xml(("a", channel)))
    with pytest.raises(NotAPictureError, match="declares no brightfield picture"):
        open_slide(path)
    for i, words in enumerate(("", ' EmissionWavelength="585" Fluor="TL"')):
        xml = ome_xml(("a", f'ContrastMethod="Brightfield"{words}'))
        open_slide(collection(tmp_path / f"b{i}.zarr", [halves(picture(), 2)], xml=xml)).close()
    damaged = collection(tmp_path / "c.zarr", [halves(picture(), 2)], xml="<OME")
    open_slide(damaged).close()


@pytest.mark.parametrize("fill", [0, 255, 200])
def test_chunks_that_are_not_stored_are_background(tmp_path: Path, fill: int) -> None:
    path = store(tmp_path / "a.zarr", fill=fill)
    for channel in range(3):
        (path / "0" / "c" / "0" / str(channel) / "0" / "1" / "2").unlink()
    with open_zarr(path) as slide:
        truth = picture().copy()
        truth[64:128, 128:192] = 255 if fill == 0 else fill
        assert np.array_equal(whole(slide), truth)
        assert slide.stats.blocks_missing == (1 if fill == 0 else 0)


def test_a_closed_slide_says_so(tmp_path: Path) -> None:
    slide = open_zarr(store(tmp_path / "a.zarr"))
    slide.close()
    slide.close()
    with pytest.raises(SlideReadError, match="closed"):
        slide.read_region(0, 0, 0, 10, 10)


def test_the_fingerprint_goes_with_the_contents(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr")
    shutil.copytree(path, tmp_path / "b" / "other.zarr")
    with open_zarr(path) as first, open_zarr(tmp_path / "b" / "other.zarr") as second:
        assert first.info.fingerprint == second.info.fingerprint
    darker = [level.copy() for level in halves(picture(), 2)]
    darker[1][60:, 100:] -= 1
    with open_zarr(store(tmp_path / "c.zarr", darker)) as third:
        assert third.info.fingerprint != first.info.fingerprint
    edit(path, lambda ome: ome["multiscales"][0].update(name="renamed"))
    with open_zarr(path) as again:
        assert again.info.fingerprint == first.info.fingerprint


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda o: o.clear(), UnsupportedSlideError, "without OME metadata"),
        (lambda o: o.update(multiscales=[]), UnsupportedSlideError, "damaged"),
        (lambda o: o.update(multiscales=3), UnsupportedSlideError, "damaged"),
        (lambda o: o["multiscales"][0].update(datasets=[]), UnsupportedSlideError, "0 levels"),
        (lambda o: o["multiscales"][0]["datasets"][0].update(path="../b"), UnsupportedSlideError, "leads out"),
        (lambda o: o["multiscales"][0]["datasets"][0].update(path="/etc"), UnsupportedSlideError, "leads out"),
        (lambda o: o["multiscales"][0]["datasets"][0].update(path="none"), SlideError, "none"),
        (lambda o: o["multiscales"][0].update(axes=[{"name": "q"}] * 5), UnsupportedSlideError, "axes"),
        (lambda o: o["multiscales"][0].update(axes=[{"name": n} for n in "yxc"]), UnsupportedSlideError, "numbers|dim"),
        (lambda o: o.update(version="0.9"), UnsupportedSlideError, "version 0.9"),
        (lambda o: o.update({"multiscales": None, "plate": {}}), UnsupportedSlideError, "damaged"),
        (
            lambda o: o["multiscales"][0]["datasets"][0].update(coordinateTransformations=[{"type": "affine"}]),
            UnsupportedSlideError,
            "affine",
        ),
        (
            lambda o: o["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].update(scale=[0] * 5),
            UnsupportedSlideError,
            "above zero",
        ),
    ],
)  # fmt: skip
def test_metadata_that_are_not_understood(tmp_path: Path, change: Any, error: type[Exception], reason: str) -> None:
    path = store(tmp_path / "a.zarr")
    edit(path, change)
    with pytest.raises(error, match=reason) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)


def test_plates_and_arrays_are_named(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "plate.zarr", mode="w").attrs["ome"] = {"version": "0.5", "plate": {}}
    with pytest.raises(NotAPictureError, match="a plate of many fields"):
        open_slide(tmp_path / "plate.zarr")
    with pytest.raises(UnsupportedSlideError, match="a Zarr array without OME metadata"):
        open_slide(store(tmp_path / "a.zarr") / "0")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(SlideError, match=r"empty\.zarr: no Zarr metadata"):
        open_slide(tmp_path / "empty.zarr")


def test_codecs_that_tell_no_size_or_unpickle_are_refused(tmp_path: Path) -> None:
    for codec in (numcodecs.BZ2(), numcodecs.LZMA()):
        path = store(tmp_path / f"{codec.codec_id}.zarr", version=2, compressor=codec)
        with pytest.raises(UnsupportedSlideError, match=codec.codec_id):
            open_slide(path)


@pytest.mark.parametrize("kind", ["cut", "empty", "noise"])
def test_a_damaged_chunk_is_an_error_with_its_place(tmp_path: Path, kind: str) -> None:
    path = store(tmp_path / "a.zarr", one_chunk_per_channel=False)
    chunk = path / "0" / "c" / "0" / "0" / "0" / "1" / "2"
    data = chunk.read_bytes()
    chunk.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff" * len(data)}[kind])
    place = pytest.raises((SlideOpenError, SlideReadError), match=r"a\.zarr: level 0, tile column .*, row 1")
    with place, open_zarr(path) as slide:
        whole(slide)


def bombs() -> dict[str, tuple[dict[str, Any], bytes]]:
    import zlib

    zeros = bytes(60_000_000)
    blosc = bytearray(numcodecs.Blosc("lz4").encode(bytes(1000)))
    blosc[4:8] = (2_000_000_000).to_bytes(4, "little")
    return {
        "zstd": ({}, bytes(numcodecs.Zstd().encode(zeros))),
        "gzip": ({"compressor": zarr.codecs.GzipCodec()}, numcodecs.GZip().encode(zeros)),
        "zlib": ({"version": 2, "compressor": numcodecs.Zlib()}, zlib.compress(zeros)),
        "blosc": ({"compressor": zarr.codecs.BloscCodec()}, bytes(blosc)),
        "plain": ({"compressor": None}, zeros),
    }


OPENED = """
import os, sys, tracemalloc
from wsi_pipe.errors import SlideOpenError
from wsi_pipe.slides import open_slide
tracemalloc.start()
try:
    open_slide(sys.argv[1])
except SlideOpenError as error:
    print(tracemalloc.get_traced_memory()[1], error, flush=True)
    # Threads of the reader may be at work still: they are not waited for, and tracing is not stopped under them.
    os._exit(0)
"""
"""In a process of its own, since Python may crash where tracing is stopped while another thread takes memory."""


@pytest.mark.parametrize("kind", ["zstd", "gzip", "zlib", "blosc", "plain"])
def test_chunks_that_become_too_large_are_refused_before_they_do(tmp_path: Path, kind: str) -> None:
    options, data = bombs()[kind]
    path = store(tmp_path / "a.zarr", **options)
    chunk = path / "0" / ("0.0.0.0.0" if options.get("version") == 2 else "c/0/0/0/0/0")
    assert chunk.is_file()
    chunk.write_bytes(data)
    ended = subprocess.run([sys.executable, "-c", OPENED, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    peak, _, said = ended.stdout.partition(" ")
    assert "bytes" in said
    assert int(peak) < 20_000_000


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("version", [2, 3])
def test_a_store_behind_a_url(tmp_path: Path, web: str, version: int) -> None:
    local = store(tmp_path / "a.ome.zarr", version=version)
    with open_slide(f"{web}/a.ome.zarr") as slide, open_slide(local) as same:
        assert np.array_equal(whole(slide), picture())
        assert slide.info.fingerprint == same.info.fingerprint
        assert slide.stats.bytes_fetched > 0
    with pytest.raises(SlideError, match=r"none\.zarr"):
        open_slide(f"{web}/none.zarr")


def test_shards_behind_a_url_in_memory() -> None:
    import fsspec

    group = zarr.open_group("memory://shards.zarr", mode="w")
    write_image(group, [arranged(level, "cyx") for level in halves(picture(), 2)], "cyx", shard=4)
    try:
        with open_slide("memory://shards.zarr") as slide:
            assert np.array_equal(whole(slide), picture())
            assert np.array_equal(slide.read_region(0, 100, 70, 30, 30), picture()[70:100, 100:130])
    finally:
        fsspec.filesystem("memory").rm("/shards.zarr", recursive=True)


def test_nested_json_and_large_documents_are_errors(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr")
    for text in ("[" * 100_000, '{"zarr_format": 3}', "", "null", " " * (1 << 25)):
        (path / "zarr.json").write_text(text)
        with pytest.raises(SlideError, match=r"a\.zarr"):
            open_slide(path)
