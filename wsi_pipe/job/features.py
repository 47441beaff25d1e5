"""The last two stages of one slide: which features are missing, and the bag made of those that are there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping

import numpy as np

from wsi_pipe.bag import (
    Bag,
    BagAttrs,
    BagHeader,
    BagLevel,
    Features,
    TileValues,
    check_bag,
    check_feature_file,
    read_bag,
    read_feature_file,
    read_feature_header,
    read_header,
    read_quality,
    write_bag,
    write_feature_file,
)
from wsi_pipe.config import ExtractSettings
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.errors import BagError
from wsi_pipe.extract import SlideFeatures
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.fingerprints import features_fingerprint, grid_fingerprint
from wsi_pipe.job.guard import problems_guarded, read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepare import Prepared
from wsi_pipe.job.record import utc_now
from wsi_pipe.quality import QUALITY_METHODS, QUALITY_VERSION

__all__ = ["Wanted", "assemble", "missing_features", "store_features", "wanted_features"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One encoder's features of one grid, as the settings want them; fingerprint tells them from any other."""

    label: str
    info: EncoderInfo
    fingerprint: str

    @property
    def place(self) -> str:
        """Where they stand in a bag, "20x/uni"."""
        return f"{self.label}/{self.info.slug}"


def wanted_features(
    prepared: Prepared, settings: ExtractSettings, encoders: Mapping[str, EncoderInfo], reader: str
) -> list[Wanted]:
    """What the settings want of a slide, coarsest grid first, encoders in the order given."""
    wanted = []
    for grid in prepared.grids:
        source = grid_fingerprint(prepared.attrs.slide_fingerprint, grid)
        for name in settings.encoders_of(grid.label):
            info = encoders[name]
            own = features_fingerprint(
                source,
                reader,
                encoder=info.name,
                weights_sha256=info.weights_sha256,
                precision=info.precision,
                transform=info.transform,
                dim=info.dim,
                layers=settings.layers,
                dtype=settings.dtype,
            )
            wanted.append(Wanted(grid.label, info, own))
    return wanted


def missing_features(prepared: Prepared, wanted: Iterable[Wanted], paths: JobPaths) -> list[Wanted]:
    """Those of ``wanted`` that are neither in the slide's bag nor in a feature file of their own."""
    wanted = list(wanted)
    held = _held(prepared, {item.fingerprint for item in wanted}, paths)
    return [item for item in wanted if item.fingerprint not in held and not _file_holds(prepared, item, paths)]


def _header(prepared: Prepared, paths: JobPaths) -> BagHeader | None:
    """The header of the slide's bag, or None where there is no readable one."""
    try:
        return read_guarded(read_header, paths.bag(prepared.entry.slide_id))
    except BagError:
        return None


def _held(prepared: Prepared, wanted: set[str], paths: JobPaths) -> set[str]:
    """Fingerprints of the features in the slide's bag.

    Where others than just these are wanted the bag will be made anew out of it, which a damaged one is not fit for.
    """
    header = _header(prepared, paths)
    if header is None:
        return set()
    held = header.fingerprints
    return set() if held != wanted and problems_guarded(check_bag, paths.bag(prepared.entry.slide_id)) else held


def _file_holds(prepared: Prepared, item: Wanted, paths: JobPaths) -> bool:
    path = paths.features(prepared.entry.slide_id, item.label, item.info.slug)
    try:
        header = read_guarded(read_feature_header, path)
    except BagError:
        return False
    return header.fingerprint == item.fingerprint and not problems_guarded(check_feature_file, path)


def computed_features(computed: SlideFeatures, wanted: Iterable[Wanted]) -> dict[str, tuple[Wanted, Features]]:
    """What the engine computed of ``wanted``, by fingerprint."""
    found = {}
    for item in wanted:
        values = computed.features.get(item.label, {}).get(item.info.slug)
        if values is None:
            continue
        layers = computed.layers.get(item.label, {}).get(item.info.slug, {})
        features = Features(
            encoder=item.info.name,
            values=values,
            weights_sha256=item.info.weights_sha256,
            licence=item.info.licence,
            precision=item.info.precision,
            transform=json.dumps(item.info.transform, sort_keys=True),
            fingerprint=item.fingerprint,
            layers={str(block): data for block, data in layers.items()},
        )
        found[item.fingerprint] = (item, features)
    return found


def computed_quality(computed: SlideFeatures, label: str) -> dict[str, TileValues]:
    """What the engine measured of a level's tiles."""
    return {
        name: TileValues(values, {"method": QUALITY_METHODS[name], "version": float(QUALITY_VERSION)})
        for name, values in computed.quality.get(label, {}).items()
    }


def store_features(prepared: Prepared, computed: SlideFeatures, wanted: Iterable[Wanted], paths: JobPaths) -> None:
    """Write what the engine computed, one file an encoder and grid. Raises OutputError when it cannot be written."""
    slide_id = prepared.entry.slide_id
    for item, features in computed_features(computed, wanted).values():
        path = paths.features(slide_id, item.label, item.info.slug)
        quality = computed_quality(computed, item.label)
        write_feature_file(path, slide_id, item.label, item.info.slug, features, quality)


def assemble(
    prepared: Prepared,
    wanted: Iterable[Wanted],
    settings: ExtractSettings,
    paths: JobPaths,
    *,
    keep_features: bool,
    computed: SlideFeatures | None = None,
) -> bool:
    """Put grids and features together in the slide's bag; False where the bag was already right.

    computed: features that were made just now and have no files.
    Features that the settings do not want any more leave the bag; attention stays where its grid is unchanged. The
    feature files are removed once the bag holds them, unless ``keep_features``. Raises BagError when features are
    missing, OutputError when the bag cannot be written.
    """
    wanted, slide_id = list(wanted), prepared.entry.slide_id
    path = paths.bag(slide_id)
    primary = next((item for item in wanted if item.label == prepared.attrs.primary_level), None)
    attrs = dataclasses.replace(prepared.attrs, primary_encoder=primary.info.slug if primary else "")
    if _is_right(attrs, {item.fingerprint for item in wanted}, prepared, paths):
        _clean(slide_id, paths, keep_features)
        return False
    try:
        # Read here only once a process that may hang in it has found it sound.
        old = read_bag(path) if path.is_file() and not problems_guarded(check_bag, path) else None
    except BagError:
        old = None
    old_features = {f.fingerprint: f for level in (old.levels if old else ()) for f in level.features.values()}
    fresh = {key: value for key, (_, value) in computed_features(computed, wanted).items()} if computed else {}
    labels = _annotation(prepared, paths)
    levels = []
    for grid in prepared.grids:
        own = {
            item.info.slug: fresh.get(item.fingerprint)
            or old_features.get(item.fingerprint)
            or _stored(prepared, item, grid, paths, settings.dtype)
            for item in wanted
            if item.label == grid.label
        }
        attention = _kept_attention(old, grid, attrs.slide_fingerprint)
        measured = computed_quality(computed, grid.label) if computed else {}
        quality = (
            measured
            or _kept_quality(old, grid, attrs.slide_fingerprint)
            or _stored_quality(prepared, wanted, grid, paths)
        )
        levels.append(BagLevel(grid, own, attention, labels.get(grid.label, {}), quality))
    write_bag(path, Bag(dataclasses.replace(attrs, created_utc=utc_now()), tuple(levels)))
    _clean(slide_id, paths, keep_features)
    return True


def _annotation(prepared: Prepared, paths: JobPaths) -> dict[str, Mapping[str, TileValues]]:
    """By level, what each class of the slide's annotations covers of each tile."""
    if not prepared.attrs.annotation:
        return {}
    if prepared.annotation is not None:
        return dict(prepared.annotation)
    levels = read_guarded(read_bag, paths.tiles(prepared.entry.slide_id)).levels
    return {level.grid.label: level.annotation for level in levels}


def _is_right(attrs: BagAttrs, fingerprints: set[str], prepared: Prepared, paths: JobPaths) -> bool:
    """Whether the slide's bag has these attributes, whenever it was made, and just these features."""
    header = _header(prepared, paths)
    if header is None:
        return False
    same = dataclasses.replace(header.attrs, created_utc=attrs.created_utc) == attrs
    return same and header.fingerprints == fingerprints


def _stored(prepared: Prepared, item: Wanted, grid: TileGrid, paths: JobPaths, dtype: str) -> Features:
    """Features from their file; (0, D) for a grid without tiles."""
    if not len(grid):
        info = item.info
        return Features(
            encoder=info.name,
            values=np.zeros((0, info.dim), dtype),
            weights_sha256=info.weights_sha256,
            licence=info.licence,
            precision=info.precision,
            transform=json.dumps(info.transform, sort_keys=True),
            fingerprint=item.fingerprint,
        )
    path = paths.features(prepared.entry.slide_id, item.label, item.info.slug)
    features = read_feature_file(path)
    if features.fingerprint != item.fingerprint:
        raise BagError(f"{path}: belongs to other settings", remedy="run wsi-pipe extract with the settings of now")
    return features


def _kept_attention(
    old: Bag | None, grid: TileGrid, slide: str
) -> Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Attention over the very same tiles of the very same slide."""
    for level in old.levels if old else ():
        if old and grid_fingerprint(old.attrs.slide_fingerprint, level.grid) == grid_fingerprint(slide, grid):
            return level.attention
    return {}


def _kept_quality(old: Bag | None, grid: TileGrid, slide: str) -> Mapping[str, TileValues]:
    """What was measured of the very same tiles of the very same slide, where it was measured as now."""
    for level in old.levels if old else ():
        if old and grid_fingerprint(old.attrs.slide_fingerprint, level.grid) == grid_fingerprint(slide, grid):
            current = all(item.attrs.get("version") == QUALITY_VERSION for item in level.quality.values())
            return level.quality if current else {}
    return {}


def _stored_quality(
    prepared: Prepared, wanted: Iterable[Wanted], grid: TileGrid, paths: JobPaths
) -> Mapping[str, TileValues]:
    """What the feature files of a grid hold of its tiles; nothing where they were written before it was measured."""
    for item in wanted:
        path = paths.features(prepared.entry.slide_id, item.label, item.info.slug)
        if item.label == grid.label and len(grid) and path.is_file():
            quality = read_quality(path)
            if quality and all(len(values.values) == len(grid) for values in quality.values()):
                return quality
    return {}


def _clean(slide_id: str, paths: JobPaths, keep_features: bool) -> None:
    if not keep_features:
        shutil.rmtree(paths.root / "features" / slide_id, ignore_errors=True)
