"""Pictures to look at: thumbnails with tissue outlines or tile grids, and the panel below any picture.

Every picture is an RGB array, uint8 (H, W, 3), at most ``max_px`` wide and high without the panel below it, which
holds the legend and a scale bar. Outlines have a white casing, so that they show on pink, purple and white alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import OutputError
from wsi_pipe.files import atomic_path
from wsi_pipe.geometry import FloatPair, TileGrid, TissueMask
from wsi_pipe.tissue import Region, fill_polygons, trace_mask

__all__ = [
    "GRID_COLOURS",
    "TISSUE_COLOUR",
    "ColourBar",
    "Outlines",
    "thumbnail_with_contours",
    "thumbnail_with_grids",
    "viridis",
    "with_panel",
    "write_image",
]

RGB = tuple[int, int, int]
Picture = NDArray[np.uint8]
Outlines = Sequence[Sequence[NDArray[np.int64]]]
"""What ``trace_mask`` gives."""

TISSUE_COLOUR: RGB = (0, 128, 64)
GRID_COLOURS: tuple[RGB, ...] = ((16, 72, 200), (0, 140, 105), (196, 120, 0), (90, 90, 90))
"""Of the grids, the coarsest first."""

_MAX_PX = 1600
_MIN_PX = 900
_SHIFT = 4
_INK = (40, 40, 40)
_SEEN_PX = 0.75
_PLAIN_POINTS = 8


@dataclass(frozen=True)
class _Entry:
    """A line of the legend."""

    colour: RGB
    text: str
    solid: bool = False


@dataclass(frozen=True)
class ColourBar:
    """A bar from limits[0] to limits[1]. colours: uint8 (256, 3), those of viridis by default."""

    label: str
    limits: tuple[float, float]
    colours: Picture | None = None


def thumbnail_with_contours(
    rgb: Picture,
    mask: TissueMask,
    *,
    um_per_px: FloatPair | None = None,
    title: str = "",
    max_px: int = _MAX_PX,
    outlines: Outlines | None = None,
) -> Picture:
    """A thumbnail with the outlines of the tissue.

    rgb: uint8 (H, W, 3), the whole slide. mask: of the whole slide, at any scale. um_per_px: of rgb, for scale bar and
    area. outlines: the mask's (``trace_mask``), where they are known. An empty mask gives the thumbnail with the reason
    below it.
    """
    picture, zoom = _sized(rgb, max_px)
    scale = (picture.shape[1] / mask.mask.shape[1], picture.shape[0] / mask.mask.shape[0])
    polygons = trace_mask(mask.mask) if outlines is None else outlines
    rings = [ring * scale for rings in polygons for ring in rings]
    _draw_rings(picture, rings, TISSUE_COLOUR, 2.0)
    if mask.is_empty:
        entries = [_Entry((150, 150, 150), mask.empty_reason or "no tissue")]
    else:
        share = f"tissue, {mask.mask.mean():.0%} of the slide"
        if um_per_px is not None:
            area = rgb.shape[0] * rgb.shape[1] * um_per_px[0] * um_per_px[1] * float(mask.mask.mean()) / 1e6
            share += f", {area:.3g} mm²"
        entries = [_Entry(TISSUE_COLOUR, share)]
    return _with_panel(picture, entries, _um(um_per_px, zoom), title)


def thumbnail_with_grids(
    rgb: Picture,
    scale_l0: FloatPair,
    grids: Sequence[TileGrid],
    *,
    mask: TissueMask | None = None,
    um_per_px: FloatPair | None = None,
    title: str = "",
    max_px: int = _MAX_PX,
    regions: Sequence[Region] = (),
    outlines: Outlines | None = None,
) -> Picture:
    """A thumbnail with the tiles of one or more grids.

    rgb: uint8 (H, W, 3), the whole slide. scale_l0: level-0 pixels per pixel of rgb, (x, y). grids: any number,
    coarsest first, each in its own colour; the coarser ones have the thicker lines. mask: drawn too, if given, by its
    ``outlines`` where they are known.
    regions: annotated classes, filled with a tint of their colours, those of less ground over those of more.
    """
    import cv2

    picture, zoom = _sized(rgb, max_px)
    per_l0 = (zoom[0] / scale_l0[0], zoom[1] / scale_l0[1])
    painted = [_filled(region, per_l0, picture.shape) for region in regions]
    for region, filled in sorted(zip(regions, painted, strict=True), key=lambda pair: -int(pair[1].sum())):
        picture[filled] = np.rint(0.62 * picture[filled] + 0.38 * np.array(region.colour)).astype(np.uint8)
    order = sorted(range(len(grids)), key=lambda i: grids[i].tile_size_l0[0])
    entries: list[_Entry] = []
    for position, i in enumerate(order):
        grid, colour = grids[i], GRID_COLOURS[i % len(GRID_COLOURS)]
        entries.insert(0, _Entry(colour, _grid_text(grid)))
        if len(grid) == 0:
            continue
        low = grid.corners_l0 * per_l0
        high = low + np.asarray(grid.tile_size_l0) * per_l0
        size_px = float((high - low)[0].min())
        finest = position == 0 and len(grids) > 1
        if size_px < 4:  # lines would run together: a tint says where tiles are
            tint = picture.copy()
            for (x0, y0), (x1, y1) in zip(np.rint(low).astype(int), np.rint(high).astype(int), strict=True):
                cv2.rectangle(tint, (int(x0), int(y0)), (int(x1), int(y1)), colour, -1)
            picture = np.asarray(cv2.addWeighted(picture, 0.65, tint, 0.35, 0), np.uint8)
            continue
        # On whole pixels: thin lines between two pixels would be pale.
        low, high = np.rint(low) + 0.5, np.rint(high) + 0.5
        corners = np.stack([low, np.stack([high[:, 0], low[:, 1]], 1), high, np.stack([low[:, 0], high[:, 1]], 1)], 1)
        if finest:
            _draw_rings(picture, list(corners), colour, 1.0, casing=0.0)
        else:
            _draw_rings(picture, list(corners), colour, 2.0, casing=1.0)
    if mask is not None:
        scale = (picture.shape[1] / mask.mask.shape[1], picture.shape[0] / mask.mask.shape[0])
        polygons = trace_mask(mask.mask) if outlines is None else outlines
        _draw_rings(picture, [r * scale for rings in polygons for r in rings], (0, 0, 0), 1.0, casing=1.0)
        entries.append(_Entry((0, 0, 0), "tissue"))
    for region, filled in zip(regions, painted, strict=True):
        lines = [ring * per_l0 for rings in region.polygons for ring in rings]
        _draw_rings(picture, lines, region.colour, 2.0, casing=1.0)
        entries.append(_Entry(region.colour, _region_text(region, filled, um_per_px, zoom), solid=True))
    return _with_panel(picture, entries, _um(um_per_px, zoom), title)


def _filled(region: Region, per_l0: FloatPair, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Where a region lies in a picture, without what is to be ignored."""
    size = (shape[1], shape[0])
    filled = fill_polygons([[ring * per_l0 for ring in rings] for rings in region.polygons], size)
    if region.cut:
        filled &= ~fill_polygons([[ring * per_l0 for ring in rings] for rings in region.cut], size)
    return filled


def _region_text(region: Region, filled: NDArray[np.bool_], um_per_px: FloatPair | None, zoom: FloatPair) -> str:
    noun = "area" if len(region.polygons) == 1 else "areas"
    text = f"{region.name}: {len(region.polygons):,} {noun}"
    if um_per_px is None:
        return text
    ground = float(filled.sum()) * um_per_px[0] / zoom[0] * um_per_px[1] / zoom[1] / 1e6
    return f"{text}, {ground:.3g} mm²"


def _grid_text(grid: TileGrid) -> str:
    mpp = grid.mpp_effective[0]
    noun = "tile" if len(grid) == 1 else "tiles"
    return f"{grid.label}: {len(grid):,} {noun} of {grid.spec.size_px} px, {mpp:.4g} µm/px"


@lru_cache(maxsize=1)
def viridis() -> Picture:
    """The 256 colours of viridis, uint8 (256, 3): even steps to the eye, and told apart with any colour vision."""
    import cv2

    ramp = np.arange(256, dtype=np.uint8)[None]
    return np.ascontiguousarray(cv2.applyColorMap(ramp, cv2.COLORMAP_VIRIDIS)[0, :, ::-1], np.uint8)


def with_panel(
    picture: Picture,
    *,
    title: str = "",
    lines: Sequence[str] = (),
    um_per_px: float | None = None,
    bar: ColourBar | None = None,
) -> Picture:
    """A picture with a white panel below it: title, colour bar, lines, and a scale bar where um_per_px is known.

    picture: uint8 (H, W, 3). What does not fit is cut with an ellipsis.
    """
    return _with_panel(picture, [], um_per_px, title, bar, lines)


def write_image(path: Path | str, rgb: Picture, *, quality: int = 90) -> None:
    """Write a picture as PNG or JPEG, by the name's ending, whole or not at all.

    Raises OutputError when the folder cannot be written or the ending is neither .png, .jpg nor .jpeg.
    """
    from PIL import Image

    path = Path(path)
    kinds: dict[str, dict[str, Any]] = {
        ".png": {"format": "PNG"},
        ".jpg": {"format": "JPEG", "quality": quality, "subsampling": 0, "comment": b"wsi-pipe"},
        ".jpeg": {"format": "JPEG", "quality": quality, "subsampling": 0, "comment": b"wsi-pipe"},
    }
    options = kinds.get(path.suffix.lower())
    if options is None:
        raise OutputError(f"cannot write {path}: pictures are PNG or JPEG", remedy="end its name in .png or .jpg")
    # Three a slide, and no result depends on one: none is worth waiting for the disk.
    with atomic_path(path, durable=False) as temporary, open(temporary, "wb") as handle:
        Image.fromarray(np.ascontiguousarray(rgb)).save(handle, **options)


# -- drawing ----------------------------------------------------------------------------------------------------------


def _sized(rgb: Picture, max_px: int) -> tuple[Picture, FloatPair]:
    """A copy whose longer side is at most ``max_px`` and, where that is possible, at least 900; and the zoom."""
    import cv2

    height, width = rgb.shape[:2]
    longest = max(height, width)
    zoom = min(max_px, max(longest, min(_MIN_PX, max_px))) / longest
    size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
    if zoom == 1:
        return rgb.copy(), (1.0, 1.0)
    way = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    picture = np.asarray(cv2.resize(rgb, size, interpolation=way), np.uint8)
    return picture, (size[0] / width, size[1] / height)


def _um(um_per_px: FloatPair | None, zoom: FloatPair) -> float | None:
    return None if um_per_px is None else um_per_px[0] / zoom[0]


def _draw_rings(
    picture: Picture, rings: Sequence[NDArray[Any]], colour: RGB, width: float, *, casing: float = 1.5
) -> None:
    """Closed lines through points (x, y), pixel (c, r) covering [c, c + 1) x [r, r + 1), in place."""
    import cv2

    if not rings:
        return
    paths = [np.rint((_plainer(ring) - 0.5) * (1 << _SHIFT)).astype(np.int32).reshape(-1, 1, 2) for ring in rings]
    if casing > 0:
        thickness = max(1, round(width + 2 * casing))
        cv2.polylines(picture, paths, True, (255, 255, 255), thickness, cv2.LINE_AA, _SHIFT)
    cv2.polylines(picture, paths, True, colour, max(1, round(width)), cv2.LINE_AA, _SHIFT)


def _plainer(ring: NDArray[Any]) -> NDArray[Any]:
    """A ring without the points that change it by less than what is seen: outlines along pixels are stairs."""
    import cv2

    if len(ring) <= _PLAIN_POINTS:
        return ring
    return np.asarray(cv2.approxPolyDP(ring.astype(np.float32).reshape(-1, 1, 2), _SEEN_PX, True)).reshape(-1, 2)


def _with_panel(
    picture: Picture,
    entries: Sequence[_Entry],
    um_per_px: float | None,
    title: str,
    bar: ColourBar | None = None,
    lines: Sequence[str] = (),
) -> Picture:
    """The picture with a title, a legend, a colour bar and a scale bar on white below it."""
    from PIL import Image, ImageDraw

    width = picture.shape[1]
    size = int(np.clip(width / 55, 13, 22))
    line = round(size * 1.6)
    margin = size
    font = _font(size)
    right = _scale_bar(width, um_per_px)
    room = width - 2 * margin - (right[0] + 2 * margin if right else 0)
    rows = ([title] if title else []) + [e.text for e in entries] + list(lines)
    panel_height = margin + line * max(len(rows) + (1 if bar else 0), 1) + margin // 2
    # The panel alone: PIL takes and gives back copies, of which the picture would need three.
    image = Image.new("RGB", (width, panel_height), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.line([(0, 0), (width, 0)], fill=(205, 205, 205))
    y = margin
    if title:
        draw.text((margin, y + line // 2), _fitted(draw, title, font, room), fill=_INK, font=font, anchor="lm")
        y += line
    for entry in entries:
        top = y + (line - size) // 2
        tint = tuple(round(255 - 0.38 * (255 - value)) for value in entry.colour) if entry.solid else None
        draw.rectangle([margin, top, margin + size, top + size], fill=tint, outline=entry.colour, width=3)
        text = _fitted(draw, entry.text, font, room - 2 * size)
        draw.text((margin + 2 * size, y + line // 2), text, fill=_INK, font=font, anchor="lm")
        y += line
    if bar is not None:
        _colour_bar(image, draw, font, (margin, y), max(room, 1), line, bar)
        y += line
    for text in lines:
        draw.text((margin, y + line // 2), _fitted(draw, text, font, room), fill=_INK, font=font, anchor="lm")
        y += line
    if right is not None and um_per_px is not None:
        length, text = right
        x1, y1 = width - margin, margin + line
        draw.rectangle([x1 - length, y1, x1, y1 + max(3, size // 4)], fill=_INK)
        draw.text((x1 - length / 2, y1 - line // 2), text, fill=_INK, font=font, anchor="mm")
    return np.concatenate([picture, np.asarray(image, np.uint8)])


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings along: PIL's own font has no µ and few accents.

    Where it lies is asked for without importing matplotlib, which takes longer than a slide.
    """
    from PIL import ImageFont

    spec = find_spec("matplotlib")
    assert spec is not None, "matplotlib is a requirement"
    assert spec.origin is not None, "matplotlib is a package with a file"
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _colour_bar(image: Any, draw: Any, font: Any, at: tuple[int, int], room: int, line: int, bar: ColourBar) -> None:
    from PIL import Image

    x, y = at
    texts = [f"{bar.label}  {bar.limits[0]:.3g}", f"{bar.limits[1]:.3g}"]
    widths = [round(draw.textlength(text, font=font)) for text in texts]
    gap = line // 2
    length = max(20, min(240, room - sum(widths) - 2 * gap))
    draw.text((x, y + line // 2), texts[0], fill=_INK, font=font, anchor="lm")
    colours = viridis() if bar.colours is None else bar.colours
    ramp = colours[np.tile(np.linspace(0, 255, length).astype(np.uint8), (line * 2 // 3, 1))]
    image.paste(Image.fromarray(ramp), (x + widths[0] + gap, y + line // 6))
    draw.text((x + widths[0] + 2 * gap + length, y + line // 2), texts[1], fill=_INK, font=font, anchor="lm")


def _fitted(draw: Any, text: str, font: Any, room: float) -> str:
    """The text, cut where it does not fit."""
    if draw.textlength(text, font=font) <= room:
        return text
    while text and draw.textlength(text + "…", font=font) > room:
        text = text[:-1]
    return text + "…"


def _scale_bar(width_px: int, um_per_px: float | None) -> tuple[int, str] | None:
    """Length in pixels and text of a bar of 1, 2 or 5 times a power of ten um, at most a fifth of the width."""
    if um_per_px is None:
        return None
    longest = width_px * um_per_px / 5
    power = 10.0 ** np.floor(np.log10(longest))
    um = max(step * power for step in (1, 2, 5) if step * power <= longest)
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
    return max(1, round(um / um_per_px)), text
