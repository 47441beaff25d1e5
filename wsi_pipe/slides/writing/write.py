"""Writing tiled pyramidal TIFF slides, tile by tile, in the dialects that scanners and converters use.

For tests, the demo and benchmarks: the odd forms that readers must cope with can be made on purpose (JPEG stored as RGB
without a marker that says so, tables kept apart, tiles left out). Sources: TIFF 6.0 and its Technical Note 2 on JPEG;
Aperio's "Digital Slides and Third-Party Data Interchange" for the description and compressions 33003 and 33005; the
OME-TIFF specification, "Sub-resolutions".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from wsi_pipe.files import atomic_path
from wsi_pipe.geometry import MICROMETRES_PER_MAGNIFICATION, FloatPair, IntPair
from wsi_pipe.slides.base import RGBArray
from wsi_pipe.slides.native import user_mpp
from wsi_pipe.slides.writing.encode import TileEncoder

__all__ = ["TileSource", "write_pyramid"]

Compression = Literal["jpeg", "jpeg2000", "deflate", "none"]
Style = Literal["aperio", "generic", "ome"]

BIGTIFF_BYTES = 1 << 31
"""Pixels of this many bytes or more are written as BigTIFF: classic offsets end at 4 GiB, whatever the codec saves."""


class TileSource(Protocol):
    """A level that hands out tiles, so that a slide larger than memory can be written.

    A ``tile_px`` attribute, where there is one, must equal the writer's.
    """

    @property
    def size_px(self) -> IntPair:
        """(width, height) of the level."""

    def tile(self, column: int, row: int) -> RGBArray:
        """Pixels of a tile, uint8 (h, w, 3), cut at the level's borders."""


@dataclass(frozen=True)
class _ArrayLevel:
    pixels: RGBArray
    tile_px: int

    @property
    def size_px(self) -> IntPair:
        return (self.pixels.shape[1], self.pixels.shape[0])

    def tile(self, column: int, row: int) -> RGBArray:
        t = self.tile_px
        return self.pixels[row * t : (row + 1) * t, column * t : (column + 1) * t]


def write_pyramid(
    path: str | Path,
    levels: Sequence[RGBArray | TileSource],
    *,
    mpp: float | FloatPair | None,
    compression: Compression = "jpeg",
    quality: int = 85,
    tile_px: int = 256,
    style: Style = "aperio",
    jpeg_colour: Literal["ycbcr", "rgb"] = "ycbcr",
    subsampling: Literal["444", "422", "420"] = "422",
    jpeg_tables: bool = False,
    planar: bool = False,
    objective_power: float | None = None,
    missing: AbstractSet[tuple[int, int, int]] = frozenset(),
    associated: Mapping[str, RGBArray] | None = None,
    icc: bytes | None = None,
    bigtiff: bool | None = None,
) -> None:
    """Write a slide; one row of tiles at most is in memory, apart from what ``levels`` hold themselves.

    levels: finest first, uint8 (H, W, 3) arrays or tile sources. mpp: micrometres per level-0 pixel, None to leave it
    out. quality: of JPEG 1 to 100, of JPEG 2000 a peak signal-to-noise ratio in dB, 0 for lossless. tile_px: a multiple
    of 16, as TIFF demands. style: "aperio" (an SVS), "generic" (a plain tiled TIFF with resolution tags) or "ome" (one
    image with SubIFDs). jpeg_colour: what is stored: YCbCr with ``subsampling``, or RGB, as Aperio does it, without an
    Adobe marker and with component numbers 1 to 3; of Aperio's JPEG 2000, compression 33003 or 33005. jpeg_tables:
    tables in a tag of their own and tiles without. planar: three grey images a tile instead of one in colour.
    objective_power: Aperio's AppMag, by default 10 / mpp rounded. missing: tiles (level, column, row) written with byte
    count 0. associated: "thumbnail", "label", "macro" (Aperio only). bigtiff: by default from 2 GiB of pixels on.

    Raises ValueError for options that do not go together, OutputError when the file cannot be written.
    """
    import tifffile

    given = user_mpp(mpp)
    if tile_px < 16 or tile_px % 16:
        raise ValueError(f"tile_px {tile_px} must be a multiple of 16")
    if associated and style != "aperio":
        raise ValueError(f"associated images are written in the style aperio only, not {style}")
    if style == "aperio" and given is not None and given[0] != given[1]:
        raise ValueError(f"Aperio files state one mpp for both axes, not {given}")
    sources = [_source(level, tile_px) for level in levels]
    if not sources:
        raise ValueError("a slide needs at least one level")
    encoder = TileEncoder(compression, quality, tile_px, jpeg_colour, subsampling, jpeg_tables, planar, style)
    pixels = sum(source.size_px[0] * source.size_px[1] * 3 for source in sources)
    big = pixels >= BIGTIFF_BYTES if bigtiff is None else bigtiff
    extra = dict(associated or {})
    with (
        atomic_path(Path(path)) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=big, ome=style == "ome") as tiff,
    ):
        for index, source in enumerate(sources):
            options = encoder.tiff_options(source.size_px)
            options |= _style_options(style, index, sources, given, encoder, objective_power)
            if icc and index == 0:
                options["iccprofile"] = icc
            tiff.write(_tiles(source, encoder, tile_px, index, missing), **options)
            if style == "aperio" and index == 0 and "thumbnail" in extra:
                _write_associated(tiff, "thumbnail", extra.pop("thumbnail"))
        for name, image in extra.items():
            _write_associated(tiff, name, image)


def _source(level: RGBArray | TileSource, tile_px: int) -> TileSource:
    if isinstance(level, np.ndarray):
        if level.ndim != 3 or level.shape[2] != 3 or level.dtype != np.uint8 or level.size == 0:
            raise ValueError(f"a level must be uint8 (H, W, 3) with pixels in it, not {level.dtype} {level.shape}")
        return _ArrayLevel(level, tile_px)
    own = getattr(level, "tile_px", tile_px)
    if own != tile_px:
        raise ValueError(f"the level hands out tiles of {own} px, {tile_px} px are to be written")
    return level


def _tiles(
    source: TileSource, encoder: TileEncoder, tile_px: int, level: int, missing: AbstractSet[tuple[int, int, int]]
) -> Iterator[bytes]:
    width, height = source.size_px
    columns, rows = -(-width // tile_px), -(-height // tile_px)
    # Planar TIFF holds all tiles of one channel, then all of the next.
    for channel in encoder.passes:
        for row in range(rows):
            for column in range(columns):
                if (level, column, row) in missing:
                    yield b""
                    continue
                tile = source.tile(column, row)
                expected = (min(tile_px, height - row * tile_px), min(tile_px, width - column * tile_px), 3)
                if tile.shape != expected or tile.dtype != np.uint8:
                    raise ValueError(
                        f"level {level}, tile column {column}, row {row}: {tile.dtype} {tile.shape} came, uint8 "
                        f"{expected} is needed"
                    )
                yield encoder.encode(tile, channel)


def _style_options(
    style: Style,
    index: int,
    sources: Sequence[TileSource],
    mpp: FloatPair | None,
    encoder: TileEncoder,
    objective_power: float | None,
) -> dict[str, Any]:
    downsample = sources[0].size_px[0] / sources[index].size_px[0]
    options: dict[str, Any] = {}
    if style == "aperio":
        options["description"] = _aperio_text(index, sources, mpp, encoder, objective_power)
        options["metadata"] = None
        options["software"] = False
        return options
    if mpp is not None:
        options["resolution"] = tuple(10000.0 / (value * downsample) for value in mpp)
        options["resolutionunit"] = "CENTIMETER"
    options["subfiletype"] = 1 if index else 0
    if style == "generic" or index:
        options["metadata"] = None
        options["software"] = False
        return options
    options["subifds"] = len(sources) - 1
    physical = {} if mpp is None else {"PhysicalSizeX": mpp[0], "PhysicalSizeY": mpp[1]}
    units = {} if mpp is None else {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    options["metadata"] = {"axes": "CYX" if encoder.planar else "YXS", **physical, **units}
    return options


def _aperio_text(
    index: int,
    sources: Sequence[TileSource],
    mpp: FloatPair | None,
    encoder: TileEncoder,
    objective_power: float | None,
) -> str:
    (width, height), (level_w, level_h) = sources[0].size_px, sources[index].size_px
    arrow = f" -> {level_w}x{level_h}" if index else ""
    text = f"Aperio Image Library v12.0.16\r\n{width}x{height} [0,0 {width}x{height}] {encoder.aperio_note}{arrow}"
    power = objective_power
    if power is None and mpp is not None:
        power = round(MICROMETRES_PER_MAGNIFICATION / mpp[0])
    if power is not None:
        text += f"|AppMag = {power:g}"
    if mpp is not None:
        text += f"|MPP = {mpp[0]:.10g}"
    return text


def _write_associated(tiff: Any, name: str, image: RGBArray) -> None:
    height, width = image.shape[:2]
    tiff.write(
        image,
        photometric="rgb",
        # Readers take the first image in strips for the thumbnail, and the others by the word in their description.
        rowsperstrip=min(height, 64),
        compression=None if name == "thumbnail" else "lzw",
        subfiletype={"label": 1, "macro": 9}.get(name, 0),
        description=f"Aperio Image Library v12.0.16\r\n{name if name != 'thumbnail' else ''} {width}x{height}",
        metadata=None,
        software=False,
    )
