"""Resolution as files state it, and which files make up a slide."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_pipe.slides import open_slide
from wsi_pipe.slides.array import ArraySlide
from wsi_pipe.slides.metadata import ome_mpp, plausible_mpp, resolution_tags_mpp
from wsi_pipe.slides.parts import dicom_series, folder_series, is_dicom, slide_files


def ome(attributes: str, before: str = "") -> str:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{before}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="600" SizeY="400" {attributes}/></Image>'
        '<Image ID="Image:1"><Pixels ID="Pixels:1" SizeX="60" SizeY="40" PhysicalSizeX="9" PhysicalSizeY="8"/>'
        "</Image></OME>"
    )


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.26"', (0.25, 0.26)),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.26" PhysicalSizeYUnit="μm"', (0.25, 0.26)),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="2.6E-4" PhysicalSizeYUnit="mm"', (0.25, 0.26)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1" PhysicalSizeYUnit="pixel"', None),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="reference frame" PhysicalSizeY="1"', None),
        ('PhysicalSizeX="0.25"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="0"', None),
        ('PhysicalSizeX="nan" PhysicalSizeY="0.25"', None),
        ('PhysicalSizeX="-0.25" PhysicalSizeY="0.25"', None),
        ('PhysicalSizeX="a" PhysicalSizeY="0.25"', None),
        ('PhysicalSizeX="352" PhysicalSizeY="352"', None),
        ("", None),
    ],
)
def test_ome(attributes: str, mpp: tuple[float, float] | None) -> None:
    assert ome_mpp(ome(attributes), (600, 400)) == (None if mpp is None else pytest.approx(mpp))


def test_ome_of_another_image_or_none() -> None:
    label = ome('PhysicalSizeX="0.25" PhysicalSizeY="0.25"')
    assert ome_mpp(label, (60, 40)) == (9, 8)
    assert ome_mpp(label, (600, 399)) is None
    assert ome_mpp("<OME", (600, 400)) is None
    assert ome_mpp("", (600, 400)) is None


def test_xml_that_declares_entities_is_not_read() -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    assert ome_mpp(ome('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', bomb), (600, 400)) is None


@pytest.mark.parametrize(
    ("x", "y", "unit", "mpp"),
    [
        (40000, 40000, 3, (0.25, 0.25)),
        (101600, 50800, 2, (0.25, 0.5)),
        (72, 72, 2, None),
        (300, 300, 2, None),
        (28.35, 28.35, 3, None),
        (40000, 40000, 1, None),
        (0, 40000, 3, None),
    ],
)
def test_resolution_tags(x: float, y: float, unit: int, mpp: tuple[float, float] | None) -> None:
    assert resolution_tags_mpp(x, y, unit) == (None if mpp is None else pytest.approx(mpp))


def test_what_a_microscope_can_have() -> None:
    assert plausible_mpp(0.1, 12.0) == (0.1, 12.0)
    for value in (0.0, 0.001, 264.6, 352.8, float("inf"), float("nan")):
        assert plausible_mpp(value, 0.25) is None
        assert plausible_mpp(0.25, value) is None


def test_the_files_of_a_slide(tmp_path: Path) -> None:
    one = tmp_path / "a.svs"
    one.write_bytes(b"x")
    assert slide_files(one) == [one]
    mirax = tmp_path / "b.mrxs"
    mirax.write_bytes(b"x")
    (tmp_path / "b").mkdir()
    for name in ("Slidedat.ini", "Index.dat", "Data0000.dat", "Data0001.dat"):
        (tmp_path / "b" / name).write_bytes(b"y")
    assert slide_files(mirax) == [mirax, tmp_path / "b" / "Index.dat", tmp_path / "b" / "Slidedat.ini"]
    vms = tmp_path / "c.vms"
    vms.write_text("[Virtual Microscope Specimen]\nImageFile=c.jpg\nImageFile(1,0)=c1.jpg\nMacroImage=m.jpg\n")
    for name in ("c.jpg", "c1.jpg", "m.jpg"):
        (tmp_path / name).write_bytes(b"z")
    assert slide_files(vms) == [vms, tmp_path / "c.jpg", tmp_path / "c1.jpg"]


def dicom(path: Path, series: str, instance: str) -> Path:
    from pydicom.dataset import Dataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"  # type: ignore[assignment]
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"  # type: ignore[assignment]
    meta.MediaStorageSOPInstanceUID = instance  # type: ignore[assignment]
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = meta.MediaStorageSOPClassUID, instance, series
    data.save_as(path, enforce_file_format=True)
    return path


def test_a_dicom_series_is_its_instances_whatever_their_names(tmp_path: Path) -> None:
    second = dicom(tmp_path / "a.dcm", "1.2.3", "1.2.3.2")
    first = dicom(tmp_path / "z.dcm", "1.2.3", "1.2.3.1")
    other = dicom(tmp_path / "without extension", "1.2.4", "1.2.4.1")
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    (tmp_path / "folder.dcm").mkdir()
    assert is_dicom(first)
    assert not is_dicom(tmp_path / "notes.txt")
    assert dicom_series(first) == dicom_series(second) == [first, second] == slide_files(second)
    assert folder_series(tmp_path) == [[first, second], [other]]
    assert dicom_series(tmp_path / "broken.dcm") == [tmp_path / "broken.dcm"]


def test_an_array_slide_checks_what_it_is_given() -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    cases: tuple[tuple[list[Any], str], ...] = (
        ([], "at least one level"),
        ([rgb[..., 0]], "uint8"),
        ([rgb.astype(np.float32)], "uint8"),
        ([rgb[:0]], "uint8"),
        ([rgb, rgb], "fall in size"),
        ([rgb[::2, ::2], rgb], "fall in size"),
    )
    for levels, cause in cases:
        with pytest.raises(ValueError, match=cause):
            ArraySlide(levels)
    with pytest.raises(ValueError, match="empty"):
        ArraySlide([rgb], block_px=(0, 16))


def test_missing_blocks_of_an_array_slide_are_none_and_white() -> None:
    rgb = np.full((40, 60, 3), 9, np.uint8)
    slide = ArraySlide([rgb], mpp=0.5, block_px=(20, 16), missing={(0, 1, 0)}, associated={"label": rgb})
    assert slide.fetch(slide.planes[0], [(1, 0)]) == [None]
    expected = rgb.copy()
    expected[:16, 20:40] = 255
    assert np.array_equal(slide.read_region(0, 0, 0, 60, 40), expected)
    assert (slide.stats.blocks_missing, slide.stats.blocks_decoded) == (1, 8)
    assert list(slide.associated_images()) == ["label"]
    assert slide.info.fingerprint != ArraySlide([rgb[:, ::-1] + 1], mpp=0.5).info.fingerprint
    assert slide.info.fingerprint == ArraySlide([rgb.copy()]).info.fingerprint


def test_the_twin_slides_state_one_resolution(shared_slides: Path) -> None:
    for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region-dicom"):
        for reader in ("tiff", "openslide"):
            with closing(open_slide(shared_slides / name, reader=reader)) as slide:
                assert slide.pyramid.mpp == pytest.approx((0.499, 0.499), rel=1e-6)
