"""What a DICOM series is: focal planes, optical paths, light, images of one size, missing tags; refusals are final."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

from tests.slides.dicom.test_dicom import near, tiles_of, write_level
from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.dicom.reader import open_dicom

Picture = NDArray[np.uint8]
SIZE_PX = (300, 200)


def shade(value: int) -> Picture:
    rng = np.random.default_rng(value)
    return np.asarray(value + rng.integers(0, 20, (SIZE_PX[1], SIZE_PX[0], 3)), np.uint8)


PLANES = [shade(value) for value in (40, 90, 140, 190)]


def stack(path: Path, planes: list[Picture], **options: Any) -> Path:
    """Planes one after another, uncompressed, as TILED_FULL orders them."""
    frames = [tile.tobytes() for plane in planes for tile in tiles_of(plane, 128)]
    options = {"syntax": ExplicitVRLittleEndian, "colour": "RGB", "frames": frames} | options
    return write_level(path, planes[0], **options)


def whole(slide: Any) -> Picture:
    return np.asarray(slide.read_region(0, 0, 0, *slide.pyramid.size_l0), np.uint8)


@pytest.mark.parametrize(("count", "middle"), [(2, 0), (3, 1), (4, 1)])
def test_the_middle_focal_plane_is_read_unless_another_is_asked_for(tmp_path: Path, count: int, middle: int) -> None:
    path = stack(tmp_path / "a.dcm", PLANES[:count], TotalPixelMatrixFocalPlanes=count)
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), PLANES[middle])
        note = f"focal plane {middle} of 0 to {count - 1}, the middle one is read (--z N takes another)"
        assert slide.info.notes == (note,)
    seen = set()
    for z in range(count):
        with open_slide(path, z=z) as slide:
            assert np.array_equal(whole(slide), PLANES[z])
            assert slide.info.z == z
            assert "as asked for" in slide.info.notes[0]
            seen.add(slide.info.fingerprint)
    assert len(seen) == count
    with pytest.raises(NotAPictureError, match=f"--z {count} was asked for, but the slide has {count} focal planes"):
        open_slide(path, z=count)


@pytest.mark.parametrize(("count", "frames"), [(3, 18), (1, 5)])
def test_no_reader_takes_frames_that_are_not_as_many_as_stated(tmp_path: Path, count: int, frames: int) -> None:
    """Of focal planes that the file does not state OpenSlide shows the first."""
    data = [tile.tobytes() for plane in PLANES[:count] for tile in tiles_of(plane, 128)][:frames]
    path = stack(tmp_path / "a.dcm", PLANES[:1], frames=data)
    for reader in ("auto", "openslide"):
        with pytest.raises(NotAPictureError, match=f"{frames} frames for 3 x 2 tiles"):
            open_slide(path, reader=reader)


def test_no_reader_takes_frames_without_a_position(tmp_path: Path) -> None:
    import pydicom

    path = at_heights(tmp_path / "a.dcm", [(i % 3, i // 3, None) for i in range(6)], {None: PLANES[0]})
    data = pydicom.dcmread(path)
    data.PerFrameFunctionalGroupsSequence = Items(list(data.PerFrameFunctionalGroupsSequence)[:-1])
    data.save_as(path)
    for reader in ("auto", "openslide"):
        with pytest.raises(NotAPictureError, match="5 frame positions for 6 frames"):
            open_slide(path, reader=reader)


def at_heights(path: Path, places: list[tuple[int, int, float | None]], planes: dict[float | None, Picture]) -> Path:
    """Sparse frames at (column, row, height)."""
    frames = [tiles_of(planes[z], 128)[r * 3 + c].tobytes() for c, r, z in places]
    cells = [(c, r) for c, r, _ in places]
    path = write_level(path, PLANES[0], syntax=ExplicitVRLittleEndian, colour="RGB", frames=frames, cells=cells)
    import pydicom

    data = pydicom.dcmread(path)
    for group, (_, _, z) in zip(data.PerFrameFunctionalGroupsSequence, places, strict=True):
        if z is not None:
            group.PlanePositionSlideSequence[0].ZOffsetInSlideCoordinateSystem = z
    data.save_as(path)
    return path


def test_sparse_frames_belong_to_the_plane_of_their_height(tmp_path: Path) -> None:
    heights = {2.5: PLANES[2], 0.5: PLANES[0], 1.5: PLANES[1]}
    places = [(c, r, z) for c in range(3) for r in range(2) for z in heights]
    path = at_heights(tmp_path / "a.dcm", [*places], {**heights})
    for z in (None, 0, 1, 2):
        with open_slide(path, z=z) as slide:
            assert np.array_equal(whole(slide), PLANES[1 if z is None else z])


def test_a_height_for_each_tile_is_still_one_plane(tmp_path: Path) -> None:
    """Scanners that focus anew at each tile write it down."""
    places = [(c, r, 0.1 * (c + 3 * r)) for c in range(3) for r in range(2)]
    path = at_heights(tmp_path / "a.dcm", [*places], dict.fromkeys((z for _, _, z in places), PLANES[0]))
    with open_slide(path) as slide:
        assert np.array_equal(whole(slide), PLANES[0])
        assert slide.info.notes == ()


@pytest.mark.parametrize("last", [(0, 0, 1.0), (0, 0, 0.0), (0, 0, None)])
def test_frames_whose_plane_is_not_clear_are_refused(tmp_path: Path, last: tuple[int, int, float | None]) -> None:
    places: list[tuple[int, int, float | None]] = [(c, r, 0.1 * c) for c in range(3) for r in range(2)]
    path = at_heights(
        tmp_path / "a.dcm", [*places, last], dict.fromkeys([z for _, _, z in places] + [last[2]], PLANES[0])
    )
    with pytest.raises(NotAPictureError, match="more than one frame for a place"):
        open_slide(path)


def test_levels_with_other_planes_than_level_0_are_left_out(tmp_path: Path) -> None:
    path = stack(tmp_path / "a.dcm", PLANES[:3], TotalPixelMatrixFocalPlanes=3)
    halves = [plane[::2, ::2].copy() for plane in PLANES]
    stack(tmp_path / "b.dcm", halves[:1], mm_per_px=(0.0005, 0.00052))
    with open_slide(path) as slide:
        assert len(slide.pyramid.levels) == 1
        assert "150 x 100 px is left out: it has 1 focal planes" in slide.info.notes[1]
    stack(tmp_path / "b.dcm", halves[:3], mm_per_px=(0.0005, 0.00052), TotalPixelMatrixFocalPlanes=3)
    with open_slide(path, z=2) as slide:
        assert [level.downsample for level in slide.pyramid.levels] == [(1, 1), (2, 2)]
        assert np.array_equal(slide.read_region(1, 0, 0, 150, 100), halves[2])


def test_one_plane_has_no_second(tmp_path: Path) -> None:
    path = stack(tmp_path / "a.dcm", PLANES[:1])
    with open_slide(path, z=0) as slide:
        assert np.array_equal(whole(slide), PLANES[0])
    with pytest.raises(NotAPictureError, match="one focal plane"):
        open_slide(path, z=1)
    with pytest.raises(NotAPictureError, match="one scan"):
        open_slide(path, scene=1)


def light(code: str) -> Dataset:
    path, kind = Dataset(), Dataset()
    kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning = code, "DCM", "light"
    path.OpticalPathIdentifier, path.IlluminationTypeCodeSequence = code, Items([kind])
    return path


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"OpticalPathSequence": Items([light("111743")])}, "epifluorescence"),
        ({"OpticalPathSequence": Items([light("111747")])}, "phase contrast"),
        ({"OpticalPathSequence": Items([light("111744"), light("111741")])}, "2 optical paths"),
        ({"NumberOfOpticalPaths": 3}, "3 optical paths"),
        ({"ImageType": ["ORIGINAL", "PRIMARY"]}, "ImageType of a.dcm is missing"),
        ({"ImageType": None}, "ImageType of a.dcm is missing"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}, "ImageType of a.dcm is LOCALIZER"),
        ({"PixelRepresentation": 1}, "signed"),
        ({"BitsAllocated": 16, "BitsStored": 12}, "12 unsigned bits in 16"),
    ],
)
def test_a_refusal_for_what_the_picture_means_is_final(tmp_path: Path, tags: dict[str, Any], reason: str) -> None:
    path = write_level(tmp_path / "a.dcm", PLANES[0], **tags)
    with pytest.raises(NotAPictureError, match=reason) as caught:
        open_slide(path)
    assert "damaged" not in str(caught.value)
    assert "openslide" not in str(caught.value).lower()


def test_brightfield_light_is_read(tmp_path: Path) -> None:
    for code in ("111744", "111741"):
        path = write_level(tmp_path / "a.dcm", PLANES[0], OpticalPathSequence=Items([light(code)]))
        with open_slide(path) as slide:
            assert near(whole(slide), PLANES[0], 12)


def test_an_image_twice_is_refused_and_other_images_are_named(tmp_path: Path) -> None:
    write_level(tmp_path / "a.dcm", PLANES[0])
    write_level(tmp_path / "b.dcm", PLANES[1])
    with pytest.raises(NotAPictureError, match="same size of 300 x 200 px"):
        open_slide(tmp_path / "a.dcm")
    write_level(tmp_path / "b.dcm", PLANES[1], ImageType=["DERIVED", "PRIMARY", "", "NONE"])
    with open_slide(tmp_path / "a.dcm") as slide:
        assert near(whole(slide), PLANES[0], 12)
        assert slide.info.notes == ("b.dcm is left out: its ImageType is missing, not VOLUME",)


def test_a_transfer_syntax_is_no_meaning(tmp_path: Path) -> None:
    """Another reader may know it."""
    frames = [simplejpeg.encode_jpeg(tile, 90) for tile in tiles_of(PLANES[0], 128)]
    path = write_level(tmp_path / "a.dcm", PLANES[0], frames=frames, syntax="1.2.840.10008.1.2.4.201")
    with pytest.raises(UnsupportedSlideError, match="transfer syntax") as caught:
        open_dicom(path)
    assert not isinstance(caught.value, NotAPictureError)
