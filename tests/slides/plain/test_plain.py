"""Plain images and unusual TIFFs: what is handled gives the right pixels, what is not is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from wsi_pipe.errors import NotAPictureError, SlideError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides import open_slide
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.plain import image as image_module
from wsi_pipe.slides.writing.write import write_pyramid

Pixels = NDArray[Any]


@pytest.fixture(scope="module")
def rgb() -> RGBArray:
    rng = np.random.default_rng(5)
    return np.asarray(cv2.GaussianBlur(rng.integers(0, 256, (500, 700, 3), np.uint8), (0, 0), 1.5), np.uint8)


@pytest.fixture(scope="module")
def alpha() -> NDArray[np.uint8]:
    return np.tile(np.arange(700, dtype=np.uint16)[None] % 256, (500, 1)).astype(np.uint8)


def read(path: Path) -> RGBArray:
    with closing(open_slide(path, reader="image")) as slide:
        return slide.read_region(0, 0, 0, *slide.pyramid.size_l0)


def on_white(colour: Pixels, alpha: Pixels) -> Pixels:
    weight = alpha[..., None].astype(np.float64) / 255
    return np.asarray(colour * weight + 255 * (1 - weight))


def three(grey: Pixels) -> Pixels:
    return np.repeat(grey[..., None], 3, axis=2)


def test_png_of_every_kind(tmp_path: Path, rgb: RGBArray, alpha: NDArray[np.uint8]) -> None:
    grey = rgb[..., 0]
    files: dict[str, tuple[Pixels, Pixels]] = {
        "rgb": (rgb, rgb),
        "grey": (grey, three(grey)),
        "rgba": (np.dstack([rgb, alpha]), on_white(rgb, alpha)),
        "16 bits": (rgb.astype(np.uint16) * 257, rgb),
        "16 bits grey": (grey.astype(np.uint16) * 257 + 100, three(grey)),
    }
    for name, (stored, expected) in files.items():
        path = tmp_path / f"{name}.png"
        order = stored if stored.ndim == 2 else stored[..., [2, 1, 0, 3][: stored.shape[2]]]
        cv2.imwrite(str(path), order)
        assert np.abs(read(path) - expected).max() <= 0.5 + 1e-9, name


def test_grey_jpeg_and_webp(tmp_path: Path, rgb: RGBArray) -> None:
    cv2.imwrite(str(tmp_path / "grey.jpg"), rgb[..., 0], [cv2.IMWRITE_JPEG_QUALITY, 98])
    found = read(tmp_path / "grey.jpg")
    assert np.abs(found - three(rgb[..., 0]).astype(np.int16)).mean() < 1.5
    assert np.array_equal(found[..., 0], found[..., 2])
    cv2.imwrite(str(tmp_path / "a.webp"), rgb[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])
    assert np.array_equal(read(tmp_path / "a.webp"), rgb)


@pytest.mark.parametrize("form", ["jp2", "j2k"])
def test_jpeg_2000_files_and_codestreams(tmp_path: Path, rgb: RGBArray, form: str) -> None:
    path = tmp_path / f"a.{form}"
    path.write_bytes(imagecodecs.jpeg2k_encode(rgb, level=0, reversible=True, codecformat=form))
    assert np.array_equal(read(path), rgb)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_dots_per_inch_are_no_resolution(tmp_path: Path, rgb: RGBArray, suffix: str) -> None:
    from PIL import Image

    path = tmp_path / f"a{suffix}"
    # 25,400 dots an inch would be 1 um/px: plausible, and still a printing hint.
    Image.fromarray(rgb).save(path, dpi=(25400, 25400))
    with closing(open_slide(path)) as slide:
        assert slide.pyramid.mpp is None
        assert slide.info.mpp_source == "none"


TIFFS: dict[str, tuple[Callable[[RGBArray], Pixels], Callable[[RGBArray], Pixels], dict[str, Any]]] = {
    "raw": (lambda p: p, lambda p: p, {"photometric": "rgb"}),
    "raw, strips of 100": (lambda p: p, lambda p: p, {"photometric": "rgb", "rowsperstrip": 100}),
    "LZW with predictor": (lambda p: p, lambda p: p, {"photometric": "rgb", "compression": "lzw", "predictor": True}),
    "big-endian": (lambda p: p, lambda p: p, {"photometric": "rgb", "byteorder": ">"}),
    "BigTIFF": (lambda p: p, lambda p: p, {"photometric": "rgb", "bigtiff": True}),
    "Zstandard tiles": (lambda p: p, lambda p: p, {"photometric": "rgb", "compression": "zstd", "tile": (64, 128)}),
    "lossless WebP tiles": (
        lambda p: p,
        lambda p: p,
        {"photometric": "rgb", "compression": "webp", "compressionargs": {"lossless": True}, "tile": (256, 256)},
    ),
    "planes": (
        lambda p: np.moveaxis(p, 2, 0),
        lambda p: p,
        {"photometric": "rgb", "planarconfig": "separate", "rowsperstrip": 33, "compression": "packbits"},
    ),
    "planes in tiles": (
        lambda p: np.moveaxis(p, 2, 0),
        lambda p: p,
        {"photometric": "rgb", "planarconfig": "separate", "tile": (128, 128), "compression": "zlib"},
    ),
    "grey": (lambda p: p[..., 0], lambda p: three(p[..., 0]), {"photometric": "minisblack", "compression": "zlib"}),
    "white is zero": (lambda p: p[..., 0], lambda p: three(255 - p[..., 0]), {"photometric": "miniswhite"}),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiffs(tmp_path: Path, rgb: RGBArray, name: str) -> None:
    stored, shown, options = TIFFS[name]
    path = tmp_path / "a.tif"
    writer = {key: options.pop(key) for key in ("byteorder", "bigtiff") if key in (options := dict(options))}
    tifffile.imwrite(path, stored(rgb), metadata=None, **writer, **options)
    assert np.array_equal(read(path), shown(rgb))


def test_tiff_palette(tmp_path: Path, rgb: RGBArray) -> None:
    colours = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", rgb[..., 0], photometric="palette", colormap=colours)
    expected = (colours >> 8).T[rgb[..., 0]]
    assert np.array_equal(read(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
def test_tiff_alpha(tmp_path: Path, rgb: RGBArray, alpha: NDArray[np.uint8], kind: str) -> None:
    stored = np.round(rgb * (alpha[..., None] / 255)).astype(np.uint8) if kind == "assocalpha" else rgb
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([stored, alpha]), photometric="rgb", extrasamples=[kind])
    # A channel of unspecified meaning is no transparency.
    expected = rgb if kind == "unspecified" else on_white(rgb, alpha)
    assert np.abs(read(tmp_path / "a.tif") - expected.astype(np.float64)).max() <= 1


def test_missing_tiles_are_white(tmp_path: Path, rgb: RGBArray) -> None:
    def tiles() -> Any:
        for row in range(0, 512, 128):
            for column in range(0, 768, 128):
                yield None if (row, column) == (128, 256) else padded[row : row + 128, column : column + 128]

    padded = np.pad(rgb, ((0, 12), (0, 68), (0, 0)))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tiles(), shape=rgb.shape, dtype=np.uint8, tile=(128, 128), photometric="rgb", metadata=None)
    expected = rgb.copy()
    expected[128:256, 256:384] = 255
    with closing(open_slide(path, reader="image")) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 700, 500), expected)
        assert slide.stats.blocks_missing == 1


def test_one_long_strip_is_read_in_parts(tmp_path: Path) -> None:
    rows = np.arange(9000, dtype=np.uint32)
    pixels = np.repeat(np.stack([rows % 256, rows // 256, rows % 7], axis=1)[:, None].astype(np.uint8), 1000, axis=1)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=9000, metadata=None)
    with closing(open_slide(path, reader="image")) as slide:
        assert slide.planes[0].block_px[1] < 500
        assert np.array_equal(slide.read_region(0, 100, 6100, 50, 800), pixels[6100:6900, 100:150])
        assert slide.stats.blocks_decoded < 6
    packed = tmp_path / "b.tif"
    tifffile.imwrite(packed, pixels, photometric="rgb", rowsperstrip=9000, compression="zlib", metadata=None)
    with closing(open_slide(packed, reader="image")) as slide:
        assert "in one piece" in slide.info.reader_reason
        assert np.array_equal(slide.read_region(0, 100, 6100, 50, 800), pixels[6100:6900, 100:150])


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("16-bit", {"dtype": np.uint16}, "16-bit uint16 samples"),
        ("float", {"dtype": np.float32}, "32-bit float32 samples"),
        ("signed", {"dtype": np.int8}, "int8 samples"),
        ("CMYK", {"dtype": np.uint8, "photometric": "separated", "samples": 4}, "CMYK"),
        ("Lab", {"dtype": np.uint8, "photometric": "cielab"}, "CIE L"),
        ("two stains", {"dtype": np.uint8, "photometric": "minisblack", "samples": 2}, "samples a pixel"),
        ("five channels", {"dtype": np.uint8, "photometric": "minisblack", "samples": 5}, "samples a pixel"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, name: str, options: dict[str, Any], cause: str) -> None:
    pixels = np.zeros((64, 96, options.pop("samples", 3)), options.pop("dtype"))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, **({"photometric": "rgb"} | options), planarconfig="contig", metadata=None)
    with pytest.raises(UnsupportedSlideError, match=cause) as caught:
        open_slide(path, reader="image")
    assert "export it as" in str(caught.value)


def test_a_cmyk_jpeg_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("CMYK", (90, 70), (10, 20, 30, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(UnsupportedSlideError, match="cmyk"):
        open_slide(tmp_path / "a.jpg")


def test_an_image_larger_than_may_be_unpacked_is_refused(
    tmp_path: Path, rgb: RGBArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "MAX_WHOLE_BYTES", 1_000_000)
    cv2.imwrite(str(tmp_path / "a.png"), rgb)
    with pytest.raises(UnsupportedSlideError, match="vips tiffsave"):
        open_slide(tmp_path / "a.png")


def write_pages(path: Path, pages: list[tuple[RGBArray, dict[str, Any]]]) -> None:
    with tifffile.TiffWriter(path) as file:
        for pixels, options in pages:
            file.write(pixels, photometric="rgb", metadata=None, compression="zlib", rowsperstrip=50, **options)


def shrunk(rgb: RGBArray, factor: int) -> RGBArray:
    size = (rgb.shape[1] // factor, rgb.shape[0] // factor)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def levels(path: Path) -> list[tuple[int, int]]:
    with closing(open_slide(path, reader="image")) as slide:
        for index, level in enumerate(slide.pyramid.levels):
            assert slide.read_region(index, 0, 0, *level.size_px).shape == (level.size_px[1], level.size_px[0], 3)
        return [level.size_px for level in slide.pyramid.levels]


PYRAMID = [(700, 500), (350, 250), (175, 125)]


def test_pages_marked_as_reduced_are_levels(tmp_path: Path, rgb: RGBArray) -> None:
    label: tuple[RGBArray, dict[str, Any]] = (np.zeros((90, 80, 3), np.uint8), {})
    small = [(shrunk(rgb, factor), {"subfiletype": 1}) for factor in (4, 2)]
    write_pages(tmp_path / "a.tif", [(rgb, {}), *small, label])
    assert levels(tmp_path / "a.tif") == PYRAMID


def test_unmarked_pages_at_whole_fractions_are_levels_and_others_are_not(tmp_path: Path, rgb: RGBArray) -> None:
    macro: tuple[RGBArray, dict[str, Any]] = (shrunk(rgb, 2)[:, :300], {})
    write_pages(tmp_path / "a.tif", [(shrunk(rgb, 2), {}), (rgb, {}), macro, (shrunk(rgb, 4), {})])
    assert levels(tmp_path / "a.tif") == PYRAMID


def test_sub_images_are_levels(tmp_path: Path, rgb: RGBArray) -> None:
    write_pages(
        tmp_path / "a.tif",
        [(rgb, {"subifds": 2}), (shrunk(rgb, 2), {"subfiletype": 1}), (shrunk(rgb, 4), {"subfiletype": 1})],
    )
    assert levels(tmp_path / "a.tif") == PYRAMID


def test_pages_of_one_size_are_a_stack_and_refused(tmp_path: Path, rgb: RGBArray) -> None:
    write_pages(tmp_path / "a.tif", [(rgb, {}), (rgb, {})])
    with pytest.raises(UnsupportedSlideError, match="2 images of 700 x 500 px"):
        open_slide(tmp_path / "a.tif", reader="image")
    tifffile.imwrite(tmp_path / "b.ome.tif", np.stack([rgb[..., 0]] * 4), metadata={"axes": "CYX"})
    with pytest.raises(UnsupportedSlideError, match="channels, focal planes or times"):
        open_slide(tmp_path / "b.ome.tif")


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        ({"resolution": (20000, 25000), "resolutionunit": "CENTIMETER"}, (0.5, 0.4), "tiff.XResolution (cm)"),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, (0.5, 0.5), "tiff.XResolution (inch)"),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None, "none"),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None, "none"),
        ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None, "none"),
        ({}, None, "none"),
        ({"imagej": True, "resolution": (2.0, 4.0), "metadata": {"unit": "um"}}, (0.5, 0.25), "imagej.unit"),
        ({"imagej": True, "resolution": (2.0, 2.0), "metadata": {"unit": "pixel"}}, None, "none"),
    ],
)
def test_mpp_of_plain_tiffs(
    tmp_path: Path, rgb: RGBArray, options: dict[str, Any], mpp: tuple[float, float] | None, source: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", **options)
    with closing(open_slide(path, reader="image")) as slide:
        assert slide.pyramid.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-6))
        assert slide.info.mpp_source == source


def test_mpp_of_an_svs(tmp_path: Path, rgb: RGBArray) -> None:
    for mpp, source in ((0.2527, "aperio.MPP"), (None, "none")):
        write_pyramid(tmp_path / "a.svs", [rgb], mpp=mpp)
        with closing(open_slide(tmp_path / "a.svs", reader="image")) as slide:
            assert slide.pyramid.mpp == (None if mpp is None else (mpp, mpp))
            assert slide.info.mpp_source == source


@pytest.mark.parametrize("form", ["png", "jpg", "jp2", "tif"])
def test_a_truncated_image_is_an_error_and_prints_nothing(
    tmp_path: Path, rgb: RGBArray, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a.{form}"
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    if form == "tif":
        tifffile.imwrite(path, noise, photometric="rgb", compression="zlib", rowsperstrip=64, metadata=None)
    else:
        cv2.imwrite(str(path), noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(SlideError) as caught, closing(open_slide(path, reader="image")) as slide:
        slide.read_region(0, 0, 0, 900, 700)
    assert str(caught.value).startswith(str(path))
    assert caught.value.remedy
    assert capfd.readouterr().err == ""


def test_a_damaged_strip_is_an_error_and_the_others_are_not(tmp_path: Path, rgb: RGBArray) -> None:
    path = tmp_path / "a.tif"
    tall = np.tile(rgb, (4, 1, 1))
    tifffile.imwrite(path, tall, photometric="rgb", compression="zlib", rowsperstrip=500, metadata=None)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[3]
    data = bytearray(path.read_bytes())
    data[offset + 1000 : offset + 3000] = bytes(2000)
    path.write_bytes(data)
    with closing(open_slide(path, reader="image")) as slide:
        assert np.array_equal(slide.read_region(0, 0, 0, 700, 1500), tall[:1500])
        with pytest.raises(SlideReadError, match=r"a\.tif: level 0, tile column 0, row 3: segment 3"):
            slide.read_region(0, 0, 1500, 700, 10)


def test_what_is_known_of_a_plain_image_is_not_called_damaged(tmp_path: Path) -> None:
    import PIL.Image

    rng = np.random.default_rng(8)
    deep = rng.integers(0, 4096, (64, 80, 3), np.uint16)
    (tmp_path / "deep.jp2").write_bytes(imagecodecs.jpeg2k_encode(deep, bitspersample=12, level=0))
    frames = [PIL.Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].convert("CMYK").save(tmp_path / "inks.jpg")
    words = {"deep.jp2": "other than 8-bit unsigned", "moving.webp": "3 pictures", "inks.jpg": "cmyk"}
    for name, part in words.items():
        with pytest.raises(NotAPictureError, match=part) as caught:
            open_slide(tmp_path / name)
        assert "damaged" not in str(caught.value)
