"""One slide in one file to send: pictures up to 5x with its grids and layers, for any browser, without a network."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from wsi_pipe.errors import ConfigError
from wsi_pipe.files import write_text_atomically
from wsi_pipe.pages import embed_json
from wsi_pipe.slides.base import Slide
from wsi_pipe.view.answers import Answers
from wsi_pipe.view.app import page_html, static_text
from wsi_pipe.view.catalogue import Catalogue
from wsi_pipe.view.pixels import DeepZoom, jpeg

__all__ = ["write_single_page"]

FINEST_MPP = 2.0
MOST_BYTES = 15_000_000
QUALITIES = (80, 65, 50, 35)


def write_single_page(catalogue: Catalogue, number: int, path: Path) -> dict[str, Any]:
    """Write a page with one slide of a catalogue; gives {"mpp", "quality", "bytes"} of what it holds.

    The finest pictures are of the power of two nearest to 2 um/px (5x); where the file would be larger than 15 MB, they
    are compressed more, and then left out level by level. Raises ConfigError where even the coarsest would not fit,
    OutputError where the file cannot be written, and what reading the slide raises.
    """
    answers = Answers(catalogue)
    try:
        about = answers.about(number)
        data: dict[str, Any] = {"slides": answers.slides() | {"job": "", "sliders": []}}
        data["slides"]["slides"] = [catalogue.slides[number].to_json()]
        base = "slides/0"
        for grid in about["grids"]:
            data[f"{base}/grids/{grid['label']}"] = answers.grid(number, grid["label"])
        for layer in about["layers"]:
            place = f"{base}/layers/{layer['label']}/{layer['key']}"
            data[place] = answers.layer(number, layer["label"], layer["key"])
        data[base] = about | {"finest_level": about["max_level"], "alone": True, "path": ""}
        with answers.slide(number) as slide:
            room = MOST_BYTES - len(_page(data | {"pictures": {}}).encode())
            pictures, finest, quality = _pictures(slide, about["mpp"], room)
    finally:
        answers.close()
    # The page takes the slide for one whose finest level is the finest one here.
    scale = 2 ** (about["max_level"] - finest)
    data[base]["finest_level"] = finest
    data["pictures"] = pictures
    mpp = about["mpp"][0] * scale if about["mpp"] else None
    text = _page(data)
    write_text_atomically(path, text)
    return {"mpp": mpp, "quality": quality, "bytes": len(text.encode())}


def _pictures(slide: Slide, mpp: list[float] | None, room: int) -> tuple[dict[str, str], int, int]:
    zoom = DeepZoom(slide.pyramid.size_l0)
    finest = zoom.max_level
    while finest > 0 and mpp is not None and mpp[0] * 2 ** (zoom.max_level - finest) * 2**0.5 < FINEST_MPP:
        finest -= 1
    while finest >= 0:
        for quality in QUALITIES:
            found = _encoded(slide, zoom, finest, quality, room)
            if found is not None:
                return found, finest, quality
        finest -= 1
    raise ConfigError(
        "the slide does not fit into a page of 15 MB", remedy="look at it with wsi-pipe view, without --export"
    )


def _encoded(slide: Slide, zoom: DeepZoom, finest: int, quality: int, room: int) -> dict[str, str] | None:
    """Data URIs of all pictures up to a level, or None as soon as they take more than ``room`` characters."""
    found: dict[str, str] = {}
    for level in range(finest, -1, -1):
        row = 0
        while zoom.holds(level, 0, row):
            column = 0
            while zoom.holds(level, column, row):
                encoded = base64.b64encode(jpeg(zoom.read(slide, level, column, row), quality)).decode()
                name = f"{level}/{column}_{row}"
                # With the marks of JSON around both.
                room -= len(encoded) + len(name) + 6
                if room < 0:
                    return None
                found[name] = encoded
                column += 1
            row += 1
    return found


def _page(data: dict[str, Any]) -> str:
    """The viewer's page with everything that it would ask for inside."""
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    html = page_html().replace(
        '<meta charset="utf-8">',
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
    )
    html = html.replace(
        '<link rel="stylesheet" href="static/view.css">', "<style>\n" + static_text("view.css") + "\n</style>"
    )
    embedded = '<script type="application/json" id="embedded">' + embed_json(data) + "</script>"
    for name in ("openseadragon.min.js", "paint.js", "view.js"):
        # A string in the program could end the element.
        text = static_text(name).replace("</script", "<\\/script")
        html = html.replace(f'<script src="static/{name}"></script>', f"{embedded}\n<script>\n{text}\n</script>")
        embedded = ""
    return html
