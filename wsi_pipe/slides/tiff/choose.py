"""Which picture of a TIFF is the slide: the largest of the main series, or an error that says why none is.

This stands before every reader, so that what one refuses for its meaning no other takes for something else. It looks at
directories alone; ``levels`` then compares what candidates for levels show.
"""

from __future__ import annotations

from collections.abc import Sequence

from wsi_pipe.errors import NotAPictureError, UnsupportedSlideError
from wsi_pipe.slides.storage.source import Source
from wsi_pipe.slides.tiff.choose_ome import choose_ome
from wsi_pipe.slides.tiff.choose_pages import choose_pages
from wsi_pipe.slides.tiff.ifd import Directory
from wsi_pipe.slides.tiff.layout import DESCRIPTION, parse_xml
from wsi_pipe.slides.tiff.ome import OME_NAMESPACE, OmeImage, ome_images
from wsi_pipe.slides.tiff.pages import pages_of
from wsi_pipe.slides.tiff.picture import Chosen

__all__ = ["choose"]

MAX_DESCRIPTION_BYTES = 1 << 26


def choose(
    source: Source,
    directories: Sequence[Directory],
    scene: int | None = None,
    z: int | None = None,
    *,
    all_levels: bool = False,
) -> Chosen:
    """The slide of a TIFF whose vendor has no structure of its own (generic, OME, Aperio and its like).

    scene, z: which scan and focal plane, from 0. all_levels: whatever is smaller and bears no name is marked as a
    level thereby. Raises NotAPictureError where the samples, channels, times or scans are no one picture, or the scan
    or plane is not there; UnsupportedSlideError where there is no image at all.
    """
    name = source.name
    first = directories[0]
    text = first.text(DESCRIPTION) if first.count(DESCRIPTION) <= MAX_DESCRIPTION_BYTES else ""
    images: list[OmeImage] = []
    if OME_NAMESPACE in text[:4096]:
        try:
            images = ome_images(name, parse_xml(name, text))
        except NotAPictureError:
            raise
        except UnsupportedSlideError:
            # A damaged description says nothing; the directories still do.
            images = []
    if images:
        return choose_ome(source, directories, images, scene, z)
    return choose_pages(source, pages_of(directories), text, scene, z, all_levels=all_levels)
