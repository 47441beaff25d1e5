"""Tiles as image files, for looking at."""

from __future__ import annotations

from wsi_pipe.bag import read_grids
from wsi_pipe.config import JobSettings
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.pictures import write_image
from wsi_pipe.tiles import stream_tiles

__all__ = ["save_tile_images"]


def save_tile_images(entry: SlideEntry, settings: JobSettings, paths: JobPaths, extension: str, most: int) -> int:
    """Write up to ``most`` tiles of each grid, spread evenly over it, as ``tiles/<id>/<level>/<column>_<row>.<ext>``.

    Returns how many were written. Raises SlideError when the slide cannot be read, OutputError when the folder cannot
    be written.
    """
    count = 0
    slide = open_entry(entry, settings.reader, settings.cache)
    try:
        for grid in read_grids(paths.tiles(entry.slide_id)):
            some = grid.spread(most)
            folder = paths.tile_images(entry.slide_id, grid.label)
            for batch in stream_tiles(slide, some):
                for pixels, index in zip(batch.pixels, batch.index, strict=True):
                    column, row = some.cells[index]
                    write_image(folder / f"{column}_{row}.{extension}", pixels)
                    count += 1
    finally:
        slide.close()
    return count
