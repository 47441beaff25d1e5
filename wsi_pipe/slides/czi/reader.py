"""Zeiss CZI slides in brightfield, local or behind a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from wsi_pipe.errors import NotAPictureError, SlideError, SlideOpenError, SlideReadError
from wsi_pipe.geometry import FloatPair, IntPair, Level, Pyramid
from wsi_pipe.slides.base import ReadStats, RGBArray, SlideInfo
from wsi_pipe.slides.codecs.decode import CodecError, decode_jpeg_stream, read_jpeg_head
from wsi_pipe.slides.czi.image import CziImage, Kept
from wsi_pipe.slides.czi.meaning import facts_of, one_plane, one_scene
from wsi_pipe.slides.czi.segments import Attachment, SubBlock, read_file
from wsi_pipe.slides.czi.tiles import COMPRESSIONS
from wsi_pipe.slides.native import MAX_WHOLE_PX, NativeSlide, build_pyramid, user_mpp
from wsi_pipe.slides.storage.source import Source, open_source, slide_fingerprint

__all__ = ["CziSlide", "open_czi"]

MAX_FACTOR = 1 << 16
MAX_ATTACHMENT_BYTES = 1 << 26


class CziSlide(NativeSlide):
    """A slide in a CZI file; see ``open_czi``."""

    def __init__(
        self, path: str, source: Source, mpp: FloatPair | None, scene: int | None, z: int | None, stats: ReadStats
    ) -> None:
        file = read_file(source)
        facts = facts_of(path, file.xml)
        tiles, notes = one_scene(path, file.subblocks, scene)
        tiles, said = one_plane(path, tiles, z)
        if facts.other_light:
            raise NotAPictureError(
                f"{path}: the file declares no brightfield picture: {facts.other_light}",
                remedy="give a brightfield slide",
            )
        levels, origin, left_out = _levels(path, source, tiles)
        notes += said + left_out
        images = [image for image, _ in levels]
        for image in images:
            build_pyramid(path, [image], None)
            image.probe()
        pyramid = Pyramid(
            tuple(Level(image.size_px, (float(factor), float(factor))) for image, factor in levels),
            facts.mpp if mpp is None else mpp,
        )
        codecs = sorted({COMPRESSIONS[tile.compression] for tile in tiles})
        info = SlideInfo(
            path=path,
            vendor="zeiss",
            reader="czi",
            reader_reason=f"CZI with {' and '.join(codecs)} tiles, read by its own structure",
            fingerprint=slide_fingerprint([source], [image.size_px for image in images]),
            mpp_source="user" if mpp is not None else "none" if facts.mpp is None else "czi.Scaling",
            objective_power=facts.power,
            properties={"czi.origin": f"{origin[0]},{origin[1]}"},
            scene=scene,
            z=z,
            notes=tuple(notes),
        )
        super().__init__(info, pyramid, images, stats)
        self._source, self._attachments = source, file.attachments

    def associated_images(self) -> Mapping[str, RGBArray]:
        """See Slide.associated_images; those that are stored as JPEG."""
        found: dict[str, RGBArray] = {}
        for part in self._attachments:
            name = {"Thumbnail": "thumbnail", "Label": "label", "SlidePreview": "macro"}.get(part.name)
            if name is not None and name not in found and part.kind.upper() in ("JPG", "JPEG"):
                try:
                    found[name] = _jpeg(self._source, part)
                except CodecError:
                    # "As far as the file has them": a thumbnail that does not decode is no reason to fail.
                    continue
        return found

    def close(self) -> None:
        """See Slide.close."""
        self._source.close()
        super().close()


def _jpeg(source: Source, part: Attachment) -> RGBArray:
    if part.length > MAX_ATTACHMENT_BYTES:
        raise CodecError("the attachment is out of bounds")
    data = source.read(part.offset, part.length)
    head = read_jpeg_head(data)
    if head.components != 3 or head.size_px[0] * head.size_px[1] > MAX_WHOLE_PX:
        raise CodecError("the attachment is no colour picture of a fit size")
    return decode_jpeg_stream(data, head.size_px, 3, 1)


def _levels(
    path: str, source: Source, tiles: Sequence[SubBlock]
) -> tuple[list[tuple[CziImage, int]], IntPair, list[str]]:
    """The levels as (image, level-0 pixels per pixel), finest first, the stage position of their corner, and notes."""
    by_factor: dict[int, list[SubBlock]] = {}
    odd = 0
    for tile in tiles:
        factor = _factor(tile)
        if factor is None:
            odd += 1
            continue
        by_factor.setdefault(factor, []).append(tile)
    notes = [f"{odd} tiles at a scale that is no whole number are left out"] if odd else []
    if 1 not in by_factor:
        raise SlideOpenError(f"{path}: the file has no tiles at full resolution", remedy="export the slide again")
    left, top, right, bottom = _box(by_factor[1])
    kept = Kept()
    levels: list[tuple[CziImage, int]] = []
    for factor, part in sorted(by_factor.items()):
        # As far as the tiles go: half a pixel at the edge is stored or not.
        size = (
            min(-(-(right - left) // factor), max(round((t.at[0] - left) / factor) + t.stored_px[0] for t in part)),
            min(-(-(bottom - top) // factor), max(round((t.at[1] - top) / factor) + t.stored_px[1] for t in part)),
        )
        if levels and (size[0] >= levels[-1][0].size_px[0] or size[1] > levels[-1][0].size_px[1]):
            continue
        image = CziImage(source, part, (left, top), size, factor, kept)
        if any(
            not image.covers(
                (tile.at[0] + share * tile.size_px[0] - left) / factor,
                (tile.at[1] + share * tile.size_px[1] - top) / factor,
            )
            for tile in by_factor[1]
            for share in (0.25, 0.75)
        ):
            notes.append(f"the level at 1/{factor} is left out: its tiles do not cover the slide")
            continue
        levels.append((image, factor))
    return levels, (left, top), notes


def _box(tiles: Sequence[SubBlock]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what tiles cover, in level-0 pixels."""
    return (
        min(tile.at[0] for tile in tiles),
        min(tile.at[1] for tile in tiles),
        max(tile.at[0] + tile.size_px[0] for tile in tiles),
        max(tile.at[1] + tile.size_px[1] for tile in tiles),
    )


def _factor(tile: SubBlock) -> int | None:
    """Level-0 pixels per stored pixel; None where it is no whole number, or not the same both ways."""
    longer = 0 if tile.stored_px[0] >= tile.stored_px[1] else 1
    factor = round(tile.size_px[longer] / tile.stored_px[longer])
    if not 0 < factor <= MAX_FACTOR:
        return None
    # Sides are rounded to whole pixels of either, up or down.
    fits = all(abs(stored * factor - size) <= factor for size, stored in zip(tile.size_px, tile.stored_px, strict=True))
    return factor if fits and (factor > 1 or tile.size_px == tile.stored_px) else None


def open_czi(
    path: str | Path, *, mpp: float | FloatPair | None = None, scene: int | None = None, z: int | None = None
) -> CziSlide:
    """Open a Zeiss CZI file, or URL of one, that holds a brightfield slide.

    mpp: micrometres per level-0 pixel, one value or (x, y), instead of what the file states. scene: as the file numbers
    them. z: the focal plane, from 0; the middle one by default. Coordinates count from the corner of the scene's tiles.
    Raises SlideOpenError when the file is not there or damaged, UnsupportedSlideError when its structure is not
    understood, its subclass NotAPictureError when it is no brightfield slide in 8-bit colour, holds several scenes of
    which none was asked for, or not the one that was.
    """
    given = user_mpp(mpp)
    stats = ReadStats()
    source = open_source(path, stats)
    try:
        return CziSlide(str(path), source, given, scene, z, stats)
    except SlideReadError as error:
        source.close()
        raise SlideOpenError(error.message, remedy=error.remedy) from error
    except SlideError:
        source.close()
        raise
    except BaseException:
        source.close()
        raise
