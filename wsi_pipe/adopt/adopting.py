"""Bags out of another tool's features: coordinates checked against the slide, tiles mapped into our own grids."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.adopt.foreign import ForeignTiles, read_foreign
from wsi_pipe.adopt.mapping import map_tiles
from wsi_pipe.bag import Bag, BagLevel, Features, write_bag
from wsi_pipe.config import ExtractSettings, JobSettings, SegmentSettings, TileSettings, fingerprint
from wsi_pipe.encoders import load_encoder
from wsi_pipe.encoders.base import Encoder
from wsi_pipe.encoders.elsewhere import slug_asked_for
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import BagError, EncoderError, ResolutionError, UnknownEncoderError, WsiPipeError
from wsi_pipe.extract import ExtractItem, SlideFailure, SlideFeatures, extract_features
from wsi_pipe.files import file_sha256
from wsi_pipe.geometry import FloatPair, TileGrid, TileSpec, TissueMask, level_label
from wsi_pipe.job.alone import FoundTissue, lay_grids
from wsi_pipe.job.fingerprints import features_fingerprint, grid_fingerprint
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.record import append_outcome, utc_now
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.slides.base import Slide

__all__ = ["ADOPTED", "Adopted", "adopt", "settings_of_job"]

ADOPTED = "adopted"
"""What stands for the precision of features that another tool computed."""
MPP_TOLERANCE = 0.05
"""Relative difference of the resolution that the tiles have on the slide from the one that the file states."""
MASK_STEPS = 8
"""Pixels of the mask to the side of a tile."""
SIMILAR = 0.95
"""Cosine of the features of a tile, theirs and encoded again, below which a spot check fails."""


@dataclass(frozen=True)
class Adopted:
    """What became of one file. status: "done" or "failed" with reason and remedy.

    tiles: of the bag that have features; of_tiles: in the file. exact: each is one of theirs, else overlap means.
    covered: mean share of a tile that theirs cover. checked: median cosine of the spot check, NaN without one.
    """

    slide_id: str
    status: str
    reason: str = ""
    remedy: str = ""
    tiles: int = 0
    of_tiles: int = 0
    exact: bool = False
    covered: float = math.nan
    checked: float = math.nan
    notes: tuple[str, ...] = ()


def adopt(
    files: Sequence[tuple[Path, SlideEntry]],
    tool: str,
    paths: JobPaths,
    settings: JobSettings,
    *,
    encoder: str | None = None,
    coarser: Sequence[float] = (),
    check: int = 0,
    device: str = "auto",
) -> Iterator[Adopted]:
    """A bag for each file into a job, one result each; what goes wrong with one stops no other.

    files: with their slides. encoder: what the features are called, by default as the file says. coarser: um per pixel
    of grids above, which get no features. check: tiles a slide that are encoded again and compared, where the encoder
    can be loaded. A bag that is there is made again where it was made of the same file, else its slide
    fails.
    """
    loaded: dict[str, Encoder | str] = {}
    for path, entry in files:
        try:
            result = _adopt_one(path, entry, tool, paths, settings, encoder, coarser, check, device, loaded)
        except (WsiPipeError, OSError) as error:
            remedy = error.remedy or "" if isinstance(error, WsiPipeError) else ""
            reason = error.message if isinstance(error, WsiPipeError) else str(error)
            result = Adopted(entry.slide_id, "failed", reason, remedy)
            append_outcome(
                paths,
                SlideOutcome(
                    entry.slide_id, "failed", entry.path, "assemble", reason, remedy or None, type(error).__name__,
                    finished_utc=utc_now(),
                ),
            )  # fmt: skip
        yield result


def settings_of_job(
    files: Sequence[tuple[Path, SlideEntry]],
    tool: str,
    settings: JobSettings,
    *,
    encoder: str | None = None,
    coarser: Sequence[float] = (),
) -> JobSettings:
    """The settings of a job that these files would be of, by the first that can be placed on its slide.

    Where none can, ``settings`` themselves.
    """
    for path, entry in files:
        try:
            foreign = read_foreign(path, tool)
            with closing(open_entry(entry, settings.reader, settings.cache)) as slide:
                _, _, mpp = _placed(foreign, slide)
        except (WsiPipeError, OSError):
            # Told when it is its turn.
            continue
        extract, name = settings.extract, _known(encoder or foreign.encoder)[0]
        if foreign.features is not None and name:
            dtype = str(foreign.features.dtype)
            extract = dataclasses.replace(extract, encoders={level_label(mpp): (name,)}, dtype=dtype)
        tile = _tile_settings(settings.tile, foreign, mpp, coarser)
        return dataclasses.replace(settings, tile=tile, extract=extract)
    return settings


def _tile_settings(tile: TileSettings, foreign: ForeignTiles, mpp: float, coarser: Sequence[float]) -> TileSettings:
    above = tuple(m for m in coarser if m > mpp)
    return dataclasses.replace(tile, resolutions=(mpp, *above), tile_px=foreign.tile_px, overlap_px=0)


def _adopt_one(
    path: Path,
    entry: SlideEntry,
    tool: str,
    paths: JobPaths,
    settings: JobSettings,
    encoder: str | None,
    coarser: Sequence[float],
    check: int,
    device: str,
    loaded: dict[str, Encoder | str],
) -> Adopted:
    foreign = read_foreign(path, tool)
    name = encoder or foreign.encoder
    if not name and foreign.features is not None:
        raise BagError(f"{path}: does not say which encoder made its features", remedy="name it: --encoder NAME")
    name, slug = _known(name)
    slide = open_entry(entry, settings.reader, settings.cache)
    try:
        corners, side, mpp = _placed(foreign, slide)
        tile = _tile_settings(settings.tile, foreign, mpp, coarser)
        stamp = fingerprint({"adopted": tool, "file": file_sha256(path)})
        mask = _mask(corners, side, slide.pyramid.size_l0)
        prepared = lay_grids(entry, slide, FoundTissue(mask, SegmentSettings(), stamp), _without_judging(tile))
        notes = []
        cosines: list[float] = []
        if check and foreign.features is not None and len(corners):
            cosines, said = _spot_check(name, entry, foreign, corners, side, mpp, check, device, settings, loaded)
            notes += [said]
    finally:
        slide.close()
    label = level_label(mpp)
    grids = {grid.label: grid for grid in prepared.grids}
    mapped = map_tiles(grids[label], corners, side, foreign.features)
    if not len(mapped.rows):
        raise BagError(f"{path}: no tile of it covers half a tile of the slide's grid", remedy="is it this slide's?")
    fine = grids[label].take(mapped.rows)
    told = {
        "adopted": tool,
        "file": path.name,
        "file_sha256": file_sha256(path),
        "tiles": len(corners),
        "mapped": "tile by tile" if mapped.exact else "mean of overlapping tiles by area",
    }
    features = {}
    if mapped.values is not None:
        mark = features_fingerprint(
            grid_fingerprint(prepared.attrs.slide_fingerprint, fine),
            settings.reader,
            encoder=name,
            weights_sha256="",
            precision=ADOPTED,
            transform=told,
            dim=mapped.values.shape[1],
            layers=(),
            dtype=str(mapped.values.dtype),
        )
        features[slug] = Features(name, mapped.values, "", "", ADOPTED, json.dumps(told, sort_keys=True), mark)
    levels = [
        BagLevel(fine, features) if grid.label == label else BagLevel(grid)
        for grid in (grids[grid.label] for grid in prepared.grids)
    ]
    attrs = dataclasses.replace(
        prepared.attrs,
        primary_level=label,
        primary_encoder=slug if features else "",
        created_utc=utc_now(),
    )
    bag = paths.bag(entry.slide_id)
    _refuse_other(bag, stamp)
    write_bag(bag, Bag(attrs, tuple(levels)))
    if not mapped.exact:
        notes += ["its tiles lie on no grid of this program: features are means by overlap"]
    tiles = {grid.label: len(fine) if grid.label == label else len(grid) for grid in prepared.grids}
    append_outcome(
        paths,
        SlideOutcome(
            entry.slide_id, "done", entry.path, tiles=tiles, notes=tuple(notes), mpp=slide.pyramid.mpp,
            mpp_source=slide.info.mpp_source, finished_utc=utc_now(),
        ),
    )  # fmt: skip
    low = float(np.median(cosines)) if cosines else math.nan
    reason = f"encoded again, tiles have a median cosine of {low:.3f} to theirs" if low < SIMILAR else ""
    return Adopted(
        entry.slide_id,
        "failed" if reason else "done",
        reason,
        "is it this slide's file, and this encoder? the bag is written all the same" if reason else "",
        len(fine),
        len(corners),
        mapped.exact,
        float(mapped.covered.mean()),
        low,
        tuple(notes),
    )


def _known(name: str) -> tuple[str, str]:
    """The encoder's own name where it is known here under one, and its slug."""
    slug = slug_asked_for(name) if name else ""
    try:
        return find_entry(slug).name, slug
    except UnknownEncoderError:
        return name, slug


def _placed(foreign: ForeignTiles, slide: Slide) -> tuple[NDArray[np.float64], FloatPair, float]:
    """Corners and side in level-0 pixels, and the um per pixel of the tiles, all checked against the slide."""
    own = slide.pyramid.isotropic_mpp
    if own is None:
        raise ResolutionError(f"{foreign.path}: the slide states no resolution", remedy="give it: --slide-mpp X")
    size = slide.pyramid.size_l0
    if foreign.size_l0 is not None and foreign.size_l0 != size:
        raise BagError(
            f"{foreign.path}: was made of a slide of {foreign.size_l0[0]} x {foreign.size_l0[1]} px, this one has "
            f"{size[0]} x {size[1]}",
            remedy="give the slide that the tool read",
        )
    corners = foreign.corners / np.asarray(own) if foreign.um else foreign.corners
    side = foreign.side
    if math.isnan(side):
        steps = [np.diff(np.unique(corners[:, axis])) for axis in (0, 1)]
        found = [float(step[step > 0].min()) for step in steps if (step > 0).any()]
        if not found:
            raise BagError(f"{foreign.path}: does not say how large its tiles are", remedy="export it again")
        pair = (min(found), min(found))
    else:
        pair = (side / own[0], side / own[1]) if foreign.um else (side, side)
    if len(corners) and ((corners < -1).any() or (corners >= np.asarray(size)).any()):
        off = int(((corners < -1) | (corners >= np.asarray(size))).any(axis=1).sum())
        raise BagError(
            f"{foreign.path}: {off} of {len(corners)} tiles lie off the slide of {size[0]} x {size[1]} px",
            remedy="give the slide that the tool read",
        )
    cut = pair[0] * own[0] / foreign.tile_px
    if foreign.mpp is not None and abs(cut - foreign.mpp) > MPP_TOLERANCE * foreign.mpp:
        raise BagError(
            f"{foreign.path}: says {foreign.mpp:.4g} um/px, but its tiles of {foreign.tile_px} px have {cut:.4g} on "
            "this slide",
            remedy="check the slide's resolution: --slide-mpp, --override-mpp",
        )
    return corners, pair, foreign.mpp if foreign.mpp is not None else cut


def _mask(corners: NDArray[np.float64], side: FloatPair, size: tuple[int, int]) -> TissueMask:
    """Where the tiles lie: what is kept of the grids."""
    scale = (side[0] / MASK_STEPS, side[1] / MASK_STEPS)
    shape = (math.ceil(size[1] / scale[1]), math.ceil(size[0] / scale[0]))
    mask = np.zeros(shape, bool)
    for x, y in np.rint(corners / scale).astype(int).tolist():
        mask[max(y, 0) : y + MASK_STEPS, max(x, 0) : x + MASK_STEPS] = True
    return TissueMask(mask, scale, None if mask.any() else "the other tool has no tile of it")


def _without_judging(tile: TileSettings) -> TileSettings:
    """Every cell that a tile of theirs reaches into; how much of it is covered is judged when features are mapped."""
    return dataclasses.replace(tile, min_tissue=0.05, min_sharpness=0.0)


def _refuse_other(bag: Path, stamp: str) -> None:
    from wsi_pipe.bag import read_header
    from wsi_pipe.job.guard import read_guarded

    if not bag.exists():
        return
    held = read_guarded(read_header, bag).attrs
    if held.fingerprint_segment != stamp:
        raise BagError(f"{bag}: is there already, made of something else", remedy="give another job: -o")


def _spot_check(
    name: str,
    entry: SlideEntry,
    foreign: ForeignTiles,
    corners: NDArray[np.float64],
    side: FloatPair,
    mpp: float,
    count: int,
    device: str,
    settings: JobSettings,
    loaded: dict[str, Encoder | str],
) -> tuple[list[float], str]:
    """Cosines of some tiles' features with those that the encoder gives now, and what is to be said of it."""
    if name not in loaded:
        try:
            loaded[name] = load_encoder(name, device=device, precision="auto")
        except EncoderError as error:
            loaded[name] = error.message
    ready = loaded[name]
    if isinstance(ready, str):
        return [], f"not checked by encoding tiles again: {ready}"
    rows = np.unique(np.linspace(0, len(corners) - 1, min(count, len(corners))).round().astype(int))
    # The very tiles of the file: cells of one pixel, so that any corner is one.
    grid = TileGrid(
        TileSpec(mpp, foreign.tile_px), (mpp, mpp), (0.0, 0.0), (1.0, 1.0), side,
        np.rint(corners[rows]).astype(np.int32), np.ones(len(rows), np.float32),
    )  # fmt: skip
    item = ExtractItem(
        entry.slide_id, lambda: open_entry(entry, settings.reader, settings.cache), [grid], {grid.label: (name,)}
    )
    with closing(extract_features([item], {name: ready}, dtype=ExtractSettings().dtype)) as computing:
        results = list(computing)
    for result in results:
        if isinstance(result, SlideFailure):
            raise result.error
    (computed,) = (result for result in results if isinstance(result, SlideFeatures))
    (values,) = computed.features[grid.label].values()
    assert foreign.features is not None
    theirs, own = np.asarray(foreign.features[rows], np.float64), np.asarray(values, np.float64)
    if theirs.shape != own.shape:
        raise BagError(f"{foreign.path}: has {theirs.shape[1]} features, {name} gives {own.shape[1]}")
    size = np.linalg.norm(theirs, axis=1) * np.linalg.norm(own, axis=1)
    cosines = ((theirs * own).sum(axis=1) / np.where(size > 0, size, 1.0)).tolist()
    return cosines, f"{len(rows)} tiles encoded again, cosine {min(cosines):.4f} to {max(cosines):.4f}"
