"""Which frame of a DICOM instance is which tile of which focal plane.

References: DICOM PS3.3 C.7.6.17.3 (TILED_FULL: columns, rows, then depth from the glass upward, then optical paths),
C.8.12.6.1 (plane position of sparse frames).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.geometry import IntPair
from wsi_pipe.slides.dicom.instance import Instance, organization

__all__ = ["Places", "middle_plane", "places"]

MAX_PLANES = 1000


@dataclass(frozen=True)
class Places:
    """The cell (column, row) and the focal plane (0 nearest to the glass) of each frame, in the order of frames."""

    cells: Sequence[IntPair]
    planes: Sequence[int]
    count: int


def middle_plane(count: int) -> int:
    """The plane that is taken where none is asked for: the middle one, the one nearer to the glass of two."""
    return (count - 1) // 2


def places(instances: Sequence[Instance], grid: IntPair, block_px: IntPair, size_px: IntPair) -> Places:
    """Where the frames of a level's instances, which follow one another, belong.

    grid: (columns, rows) of tiles. Raises UnsupportedSlideError where a frame's place is not known for certain, its
    subclass NotAPictureError where the file states another number of frames than it has, or several optical paths, or
    planes that are not told apart, share the level.
    """
    first = instances[0]
    counts = [instance.frames for instance in instances]
    if organization(first) == "TILED_FULL":
        return _full(first, grid, sum(counts))
    found = [place for instance in instances for place in _sparse(instance, block_px, size_px)]
    return _by_height(first, found)


def _full(first: Instance, grid: IntPair, frames: int) -> Places:
    planes = first.number("TotalPixelMatrixFocalPlanes", 1)
    if first.optical_paths > 1:
        raise _several_paths(first, first.optical_paths)
    tiles = grid[0] * grid[1]
    if not 0 < planes <= MAX_PLANES or frames != tiles * planes:
        of_planes = f" in {planes} focal planes" if planes != 1 else ""
        # Final: OpenSlide takes the first frames for the slide, whatever follows them.
        raise NotAPictureError(
            f"{first.source.name}: {frames} frames for {grid[0]} x {grid[1]} tiles{of_planes}: frames are lacking, or "
            "focal planes or optical paths are there that the file does not state"
        )
    cells = [(i % grid[0], i // grid[0]) for i in range(tiles)]
    return Places(cells * planes, [plane for plane in range(planes) for _ in range(tiles)], planes)


@dataclass(frozen=True)
class _Sparse:
    cell: IntPair
    height: float | None
    path: str


def _sparse(instance: Instance, block_px: IntPair, size_px: IntPair) -> list[_Sparse]:
    groups = instance.tags.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != instance.frames:
        # Final: OpenSlide leaves frames without a position blank.
        raise NotAPictureError(f"{instance.source.name}: {len(groups)} frame positions for {instance.frames} frames")
    found = []
    for group in groups:
        try:
            position = group.PlanePositionSlideSequence[0]
            x = int(position.ColumnPositionInTotalImagePixelMatrix) - 1
            y = int(position.RowPositionInTotalImagePixelMatrix) - 1
            height = position.get("ZOffsetInSlideCoordinateSystem")
            place = _Sparse((x // block_px[0], y // block_px[1]), _rounded(height), _path_of(group))
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UnsupportedSlideError(f"{instance.source.name}: a frame's position is missing or damaged") from error
        if x % block_px[0] or y % block_px[1] or not (0 <= x < size_px[0] and 0 <= y < size_px[1]):
            raise UnsupportedSlideError(f"{instance.source.name}: a frame at ({x}, {y}) px lies off the grid of tiles")
        found.append(place)
    return found


def _rounded(height: Any) -> float | None:
    # Writers compute the height of each frame; planes are tenths of a micrometre apart at least.
    return None if height is None else round(float(height), 4)


def _path_of(group: Any) -> str:
    identified = group.get("OpticalPathIdentificationSequence") or []
    return str(identified[0].get("OpticalPathIdentifier", "")) if len(identified) else ""


def _by_height(first: Instance, found: Sequence[_Sparse]) -> Places:
    """Planes from the frames' heights, where cells have several frames or the file states several planes."""
    name = first.source.name
    paths = {place.path for place in found}
    if len(paths) > 1 or (first.optical_paths > 1 and paths == {""}):
        raise _several_paths(first, max(len(paths), first.optical_paths))
    cells = [place.cell for place in found]
    stated = first.number("TotalPixelMatrixFocalPlanes", 1)
    most = max(Counter(cells).values(), default=1)
    if most == 1 and stated == 1:
        # Scanners that focus anew for each tile give each a height of its own: one plane all the same.
        return Places(cells, [0] * len(cells), 1)
    heights = sorted({place.height for place in found if place.height is not None})
    known = all(place.height is not None for place in found)
    if not known or len(heights) != max(most, stated) or len({(p.cell, p.height) for p in found}) != len(found):
        raise NotAPictureError(
            f"{name}: more than one frame for a place: the file states {stated} focal planes, its frames lie at "
            f"{len(heights)} heights, up to {most} at one place; which one is meant is not stated"
        )
    index = {height: i for i, height in enumerate(heights)}
    return Places(cells, [index[place.height] for place in found if place.height is not None], len(heights))


def _several_paths(first: Instance, count: int) -> NotAPictureError:
    return NotAPictureError(
        f"{first.source.name}: {count} optical paths (channels) in one image are not read",
        remedy="export the brightfield picture as a slide of its own",
    )
