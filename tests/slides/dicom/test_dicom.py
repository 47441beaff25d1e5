"""DICOM slides written here with pydicom: offset tables of every kind, sparse tiling, concatenations, colours."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import openslide
import PIL.Image
import pydicom
import pytest
import simplejpeg
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, generate_uid

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.codecs.decode import CodecError
from wsi_pipe.slides.dicom.frames import join_fragments
from wsi_pipe.slides.dicom.reader import WSI_STORAGE, open_dicom
from wsi_pipe.slides.tiff.reader import open_tiff

Picture = NDArray[np.uint8]

SERIES, OTHER_SERIES = generate_uid(entropy_srcs=["a series"]), generate_uid(entropy_srcs=["another"])


@pytest.fixture(scope="module")
def picture() -> Picture:
    rng = np.random.default_rng(7)
    noise = cv2.GaussianBlur(rng.normal(size=(300, 420, 3)), (0, 0), 2.5)
    return np.clip(180 + 180 * noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def half(picture: Picture) -> Picture:
    return cv2.resize(picture, (210, 150), interpolation=cv2.INTER_AREA).astype(np.uint8)


def tiles_of(pixels: Picture, tile: int) -> list[Picture]:
    h, w = (-(-n // tile) * tile for n in pixels.shape[:2])
    padded = np.pad(pixels, ((0, h - pixels.shape[0]), (0, w - pixels.shape[1]), (0, 0)), mode="edge")
    return [padded[y : y + tile, x : x + tile].copy() for y in range(0, h, tile) for x in range(0, w, tile)]


def item(data: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data


def padded(data: bytes) -> bytes:
    return data + bytes(len(data) % 2)


def encapsulated(frames: Sequence[bytes], table: str, pieces: int = 1) -> tuple[bytes, bytes, bytes]:
    """Pixel data, extended offsets and lengths; ``table``: "basic", "extended" or "none"."""
    body, offsets, lengths = b"", [], []
    for frame in frames:
        offsets.append(len(body))
        lengths.append(len(frame))
        step = -(-len(frame) // pieces) + (-(-len(frame) // pieces)) % 2
        body += b"".join(item(padded(frame[i : i + step])) for i in range(0, len(frame), step))
    basic = item(b"".join(struct.pack("<I", o) for o in offsets) if table == "basic" else b"")
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    many = [b"".join(struct.pack("<Q", v) for v in values) for values in (offsets, lengths)]
    return basic + body + end, *(many if table == "extended" else (b"", b""))


def write_level(
    path: Path,
    pixels: Picture,
    *,
    tile: int = 128,
    syntax: str = JPEGBaseline8Bit,
    colour: str = "YBR_FULL_422",
    table: str = "basic",
    pieces: int = 1,
    frames: Sequence[bytes] | None = None,
    cells: Sequence[tuple[int, int]] | None = None,
    offset: tuple[int, int] = (0, 0),
    kind: str = "VOLUME",
    series: str = SERIES,
    mm_per_px: tuple[float, float] = (0.00025, 0.00026),
    **tags: Any,
) -> Path:
    """One instance; ``cells`` (column, row) make it TILED_SPARSE, ``mm_per_px`` is (x, y)."""
    if frames is None:
        frames = [simplejpeg.encode_jpeg(t, 92, colorsubsampling="422") for t in tiles_of(pixels, tile)]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = WSI_STORAGE
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    meta.TransferSyntaxUID = syntax
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = WSI_STORAGE, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID = series, generate_uid(entropy_srcs=["study"])
    ds.Modality, ds.ImageType = "SM", ["ORIGINAL", "PRIMARY", kind, "NONE"]
    ds.Rows, ds.Columns = tile, tile
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = pixels.shape[1], pixels.shape[0]
    ds.NumberOfFrames, ds.SamplesPerPixel, ds.PlanarConfiguration = len(frames), 3, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PhotometricInterpretation = colour
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = [mm_per_px[1], mm_per_px[0]]
    shared.PixelMeasuresSequence = Items([measures])
    ds.SharedFunctionalGroupsSequence = Items([shared])
    ds.DimensionOrganizationType = "TILED_FULL" if cells is None else "TILED_SPARSE"
    if cells is not None:
        groups = []
        for column, row in cells:
            position, group = Dataset(), Dataset()
            position.ColumnPositionInTotalImagePixelMatrix = column * tile + 1 + offset[0]
            position.RowPositionInTotalImagePixelMatrix = row * tile + 1 + offset[1]
            group.PlanePositionSlideSequence = Items([position])
            groups.append(group)
        ds.PerFrameFunctionalGroupsSequence = Items(groups)
    for name, value in tags.items():
        setattr(ds, name, value)
    if syntax == ExplicitVRLittleEndian:
        data = b"".join(frames)
        ds.PixelData = data + bytes(len(data) % 2)
    else:
        ds.PixelData, offsets, lengths = encapsulated(frames, table, pieces)
        ds["PixelData"].is_undefined_length = True
        if offsets:
            ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = offsets, lengths
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path


def near(a: Picture, b: Picture, mean: float = 5.0) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b).mean()) < mean


@pytest.mark.parametrize(("table", "pieces"), [("basic", 1), ("basic", 3), ("extended", 1), ("none", 1)])
def test_frames_are_found_by_every_table(
    tmp_path: Path, picture: Picture, half: Picture, table: str, pieces: int
) -> None:
    write_level(tmp_path / "b.dcm", half, table=table, pieces=pieces, mm_per_px=(0.0005, 0.00052))
    path = write_level(tmp_path / "a.dcm", picture, table=table, pieces=pieces)
    with open_dicom(path) as slide:
        assert [level.size_px for level in slide.pyramid.levels] == [(420, 300), (210, 150)]
        expected = [
            simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(t, 92, colorsubsampling="422"))
            for t in tiles_of(picture, 128)
        ]
        whole = np.concatenate([np.concatenate(expected[r * 4 : r * 4 + 4], axis=1) for r in range(3)])
        assert np.array_equal(slide.read_region(0, 0, 0, 420, 300), whole[:300, :420])
        assert near(slide.read_region(1, 0, 0, 210, 150), half)
        # Spacing is rows first in the file; x here is 0.25.
        assert slide.pyramid.mpp == pytest.approx((0.25, 0.26))
        assert slide.info.mpp_source == "dicom.PixelSpacing"
        assert slide.info.vendor == "dicom"


def test_any_file_of_the_series_opens_the_whole(tmp_path: Path, picture: Picture, half: Picture) -> None:
    a = write_level(tmp_path / "a.dcm", picture)
    b = write_level(tmp_path / "b.dcm", half, mm_per_px=(0.0005, 0.00052))
    write_level(tmp_path / "c.dcm", picture[::-1].copy(), series=OTHER_SERIES)
    (tmp_path / "notes.txt").write_text("no DICOM")
    (tmp_path / "copy of b.dcm").write_bytes(b.read_bytes())
    with open_dicom(a) as first, open_dicom(b) as second:
        assert first.pyramid == second.pyramid
        assert len(first.pyramid.levels) == 2
        assert first.info.fingerprint == second.info.fingerprint
        assert near(second.read_region(0, 0, 0, 420, 300), picture)


def test_sparse_tiling_leaves_missing_tiles_white(tmp_path: Path, picture: Picture) -> None:
    cells = [(3, 2), (0, 0), (1, 1)]
    tiles = tiles_of(picture, 128)
    frames = [simplejpeg.encode_jpeg(tiles[r * 4 + c], 92) for c, r in cells]
    path = write_level(tmp_path / "a.dcm", picture, frames=frames, cells=cells, colour="YBR_FULL_422")
    with open_dicom(path) as slide:
        data = slide.fetch(slide.planes[0], [(0, 0), (1, 0), (3, 2)])
        assert [d is None for d in data] == [False, True, False]
        pixels = slide.read_region(0, 0, 0, 420, 300)
        assert near(pixels[:128, :128], picture[:128, :128])
        assert near(pixels[128:256, 128:256], picture[128:256, 128:256])
        assert near(pixels[256:, 384:], picture[256:, 384:])
        assert (pixels[:128, 128:] == 255).all()


def test_full_tiling_that_lacks_frames_is_declined(tmp_path: Path, picture: Picture) -> None:
    frames = [simplejpeg.encode_jpeg(tile, 92) for tile in tiles_of(picture, 128)][:7]
    # Per-frame groups without positions do not make it sparse.
    groups = Items([Dataset() for _ in frames])
    for name, tags in (("a", {"PerFrameFunctionalGroupsSequence": groups}), ("b", dict[str, Any]())):
        (tmp_path / name).mkdir()
        path = write_level(tmp_path / name / "a.dcm", picture, frames=frames, **tags)
        with pytest.raises(UnsupportedSlideError, match="7 frames for 4 x 3 tiles: frames are lacking"):
            open_dicom(path)


def test_frames_marked_as_rgb_under_tags_that_say_ycbcr_are_declined(tmp_path: Path, picture: Picture) -> None:
    adobe = b"\xff\xee" + (14).to_bytes(2, "big") + b"Adobe" + bytes((0, 100, 0, 0, 0, 0, 0))
    frames = []
    for tile in tiles_of(picture, 128):
        planes = (np.ascontiguousarray(tile[..., i]) for i in range(3))
        stream = simplejpeg.encode_jpeg_yuv_planes(*planes, 95)
        frames.append(stream[:2] + adobe + stream[20:])
    for colour in ("YBR_FULL_422", "RGB"):
        (tmp_path / colour).mkdir()
        write_level(tmp_path / colour / "a.dcm", picture, frames=frames, colour=colour)
    with pytest.raises(UnsupportedSlideError, match="marked as RGB, the DICOM tags say YCbCr"):
        open_dicom(tmp_path / "YBR_FULL_422" / "a.dcm")
    with open_dicom(tmp_path / "RGB" / "a.dcm") as slide:
        assert np.abs(slide.read_region(0, 0, 0, 420, 300).astype(int) - picture).max() <= 12


def test_jpeg_stored_as_rgb(tmp_path: Path, picture: Picture) -> None:
    frames = []
    for tile in tiles_of(picture, 128):
        planes = (np.ascontiguousarray(tile[..., i]) for i in range(3))
        stream = simplejpeg.encode_jpeg_yuv_planes(*planes, 95)
        assert stream[2:4] == b"\xff\xe0"
        frames.append(stream[:2] + stream[20:])
    path = write_level(tmp_path / "a.dcm", picture, frames=frames, colour="RGB")
    with open_dicom(path) as slide:
        assert np.abs(slide.read_region(0, 0, 0, 420, 300).astype(int) - picture).max() <= 12


@pytest.mark.parametrize(
    ("syntax", "colour", "options"),
    [
        (JPEG2000, "YBR_ICT", {"level": 45, "mct": True}),
        (JPEG2000, "RGB", {"level": 45, "mct": False}),
        (JPEG2000Lossless, "YBR_RCT", {"reversible": True, "mct": True}),
        (JPEG2000, "YBR_FULL", {"reversible": True, "mct": False}),
    ],
)
def test_jpeg_2000_frames(tmp_path: Path, picture: Picture, syntax: str, colour: str, options: dict[str, Any]) -> None:
    frames = []
    for tile in tiles_of(picture, 128):
        pixels = cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]] if colour == "YBR_FULL" else tile
        pixels = np.ascontiguousarray(pixels)
        frames.append(bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", **{"level": 0, **options})))
    path = write_level(tmp_path / "a.dcm", picture, frames=frames, syntax=syntax, colour=colour)
    with open_dicom(path) as slide:
        assert near(slide.read_region(0, 0, 0, 420, 300), picture, 3)
        assert [p.reduce for p in slide.planes] == [1, 2, 4, 8]


def test_uncompressed_frames(tmp_path: Path, picture: Picture) -> None:
    frames = [t.tobytes() for t in tiles_of(picture, 100)]
    options: dict[str, Any] = {"syntax": ExplicitVRLittleEndian, "colour": "RGB"}
    path = write_level(tmp_path / "a.dcm", picture, tile=100, frames=frames, **options)
    with open_dicom(path) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 420, 300), picture)


def test_concatenated_pieces_make_one_level(tmp_path: Path, picture: Picture) -> None:
    frames = [simplejpeg.encode_jpeg(t, 92, colorsubsampling="422") for t in tiles_of(picture, 128)]
    parts = [frames[:5], frames[5:6], frames[6:]]
    for i, part in enumerate(parts):
        tags = {"ConcatenationUID": "1.2.3", "InConcatenationNumber": i + 1, "InConcatenationTotalNumber": 3}
        path = write_level(tmp_path / f"{3 - i}.dcm", picture, frames=part, **tags)
    with open_dicom(path) as slide:
        assert len(slide.pyramid.levels) == 1
        assert near(slide.read_region(0, 0, 0, 420, 300), picture)
    (tmp_path / "2.dcm").unlink()
    with pytest.raises(UnsupportedSlideError, match="2 of 3 pieces"):
        open_dicom(path)


def test_label_and_overview_are_not_levels(tmp_path: Path, picture: Picture, half: Picture) -> None:
    path = write_level(tmp_path / "a.dcm", picture)
    write_level(tmp_path / "b.dcm", half, kind="LABEL")
    write_level(tmp_path / "c.dcm", half[::2, ::2].copy(), kind="OVERVIEW")
    with open_dicom(path) as slide:
        assert len(slide.pyramid.levels) == 1
        found = slide.associated_images()
        assert set(found) == {"label", "macro"}
        assert near(found["label"], half)


def test_objective_and_profile(tmp_path: Path, picture: Picture) -> None:
    optical = Dataset()
    optical.ObjectiveLensPower, optical.ICCProfile = 40, b"a profile " * 10
    path = write_level(tmp_path / "a.dcm", picture, OpticalPathSequence=Items([optical]))
    with open_dicom(path, mpp=0.5) as slide:
        assert slide.info.objective_power == 40
        assert slide.info.icc == b"a profile " * 10
        assert slide.pyramid.mpp == (0.5, 0.5)
        assert slide.info.mpp_source == "user"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "no whole-slide image"),
        ({"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1}, "only 8-bit RGB"),
        ({"BitsAllocated": 16, "BitsStored": 12}, "only 8-bit RGB"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"TotalPixelMatrixFocalPlanes": 3}, "focal planes"),
        ({"TotalPixelMatrixRows": 3000}, "frames for"),
        ({"kind": "LABEL"}, "no VOLUME image"),
        ({"syntax": "1.2.840.10008.1.2.4.80"}, "transfer syntax"),
        ({"cells": [(i % 4, i // 4) for i in range(11)] + [(0, 0)]}, "more than one frame"),
        ({"cells": [(i % 4, i // 4) for i in range(12)], "offset": (3, 0)}, "off the grid"),
        ({"Rows": 100}, "frames for|128 x 128"),
    ],
)
def test_what_is_not_understood_is_declined(
    tmp_path: Path, picture: Picture, changes: dict[str, Any], reason: str
) -> None:
    path = write_level(tmp_path / "a.dcm", picture, **changes)
    with pytest.raises(UnsupportedSlideError, match=reason) as caught:
        open_dicom(path)
    assert str(path) in str(caught.value)


def test_fragments_without_a_table_that_do_not_match_are_declined(tmp_path: Path, picture: Picture) -> None:
    path = write_level(tmp_path / "a.dcm", picture, table="none", pieces=2)
    with pytest.raises(UnsupportedSlideError, match="fragments for 12 frames"):
        open_dicom(path)


def test_other_files_are_declined_or_damaged(tmp_path: Path) -> None:
    text = tmp_path / "a.dcm"
    text.write_bytes(b"no DICOM" * 100)
    with pytest.raises(UnsupportedSlideError, match="not a DICOM file"):
        open_dicom(text)
    with pytest.raises(SlideOpenError, match="No such file"):
        open_dicom(tmp_path / "none.dcm")


def test_a_truncated_file_is_an_error_and_not_white(tmp_path: Path, picture: Picture) -> None:
    for table in ("basic", "extended", "none"):
        path = write_level(tmp_path / f"{table}.dcm", picture, table=table, series=generate_uid())
        data = path.read_bytes()
        for part in (0.3, 0.6, 0.9):
            path.write_bytes(data[: int(part * len(data))])
            with pytest.raises(SlideError) as caught, open_dicom(path) as slide:
                slide.read_region(0, 0, 0, 420, 300)
            assert isinstance(caught.value, SlideOpenError | SlideReadError)


def test_fragments_that_are_cut_short_are_errors() -> None:
    assert bytes(join_fragments(item(b"abcd") + item(b"ef"))) == b"abcdef"
    for data in (b"", b"abc", item(b"abcd")[:-1], struct.pack("<HHI", 0xFFFE, 0xE000, 1 << 31)):
        with pytest.raises(CodecError):
            join_fragments(data)


def test_a_real_series_is_what_openslide_reads(shared_slides: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = shared_slides / "CMU-1-Small-Region-dicom"
    before = pydicom.config.settings.reading_validation_mode
    slide = open_dicom(folder / "level-3-frames-0-1.dcm")
    assert pydicom.config.settings.reading_validation_mode == before
    assert not recwarn.list
    with slide, openslide.OpenSlide(folder / "level-0-frames-0-30.dcm") as theirs:
        assert tuple(level.size_px for level in slide.pyramid.levels) == theirs.level_dimensions
        assert slide.pyramid.levels[6].downsample == (64.0, 64.0)
        for level, size in enumerate(theirs.level_dimensions):
            image = theirs.read_region((0, 0), level, size)
            white = PIL.Image.new("RGB", size, (255, 255, 255))
            white.paste(image, mask=image.getchannel("A"))
            d = np.abs(slide.read_region(level, 0, 0, *size).astype(int) - np.asarray(white))
            print(f"level {level} {size}: max {d.max()}, mean {d.mean():.4f}")
            assert d.max() <= 2
            assert d.mean() <= 0.5
        # Its twin was compressed once less: the same picture in the same place, not the same bytes.
        with open_tiff(shared_slides / "CMU-1-Small-Region.svs") as twin:
            a, b = (s.read_region(0, 500, 500, 1000, 1000).astype(np.float64) for s in (slide, twin))
        errors = {
            (dx, dy): np.abs(a[2:-2, 2:-2] - b[2 + dy : 998 + dy, 2 + dx : 998 + dx]).mean()
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
        }
        assert min(errors, key=errors.__getitem__) == (0, 0)
        assert errors[0, 0] < 8
