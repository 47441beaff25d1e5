"""Which version made what a job holds of a slide, and whether any of it is of random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.bag import BagHeader, read_header
from wsi_pipe.errors import BagError
from wsi_pipe.geometry import FloatPair
from wsi_pipe.job import JobPaths, fingerprints
from wsi_pipe.job.fits import record_of
from wsi_pipe.job.guard import read_guarded

__all__ = ["Age", "age_of", "random_features"]


@dataclass(frozen=True)
class Age:
    """older: "0.1.0 (tissue, grids)" where an earlier version made these parts, else "". random: "20x/uni-random" and
    the like. mpp, mpp_source: of the slide, None and "none" where no file tells."""

    older: str = ""
    random: tuple[str, ...] = ()
    mpp: FloatPair | None = None
    mpp_source: str = "none"


def age_of(slide_id: str, paths: JobPaths) -> Age:
    """What the files of a slide say of who made them. Says nothing of files that cannot be read."""
    for path in (paths.bag(slide_id), paths.tiles(slide_id)):
        try:
            header = read_guarded(read_header, path)
        except BagError:
            continue
        parts = list(_older_parts(header, paths.tissue(slide_id)))
        made_by = str(record_of(header.attrs).get("wsi_pipe") or header.attrs.wsi_pipe_version)
        older = f"{made_by} ({', '.join(parts)})" if parts else ""
        return Age(older, random_features(header), header.attrs.mpp_l0, header.attrs.mpp_source)
    return Age()


def random_features(header: BagHeader) -> tuple[str, ...]:
    """Level and encoder, "20x/uni-random", of a bag's features that were made with random weights."""
    return tuple(
        f"{label}/{slug}" for label, own in header.features.items() for slug, item in own.items() if item.weights
    )


def _older_parts(header: BagHeader, tissue: Path) -> list[str]:
    parts = []
    own = _words_of(tissue)
    made = own.get("made_with") if isinstance(own.get("made_with"), dict) else {}
    if own and int((made or {}).get("version", 1)) < fingerprints.SEGMENT_VERSION:
        parts.append("tissue")
    if int(record_of(header.attrs).get("tile", {}).get("version", 1)) < fingerprints.TILE_VERSION:
        parts.append("grids")
    return parts


def _words_of(path: Path) -> dict[str, Any]:
    try:
        own = json.loads(path.read_bytes())["wsi_pipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return own if isinstance(own, dict) else {}
