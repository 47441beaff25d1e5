"""The last two stages of one slide: which features are missing, and the bag made of those that are there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

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
from wsi_pipe.encoders.random_id import RANDOM, RANDOM_SUFFIX
from wsi_pipe.errors import BagError
from wsi_pipe.extract import SlideFeatures
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job.fingerprints import features_fingerprint, grid_fingerprint
from wsi_pipe.job.fits import features_fit
from wsi_pipe.job.guard import problems_guarded, read_guarded
from wsi_pipe.job.ownership import is_feature_file_of_ours, refuse_other_features
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.prepared import Prepared, stale_error
from wsi_pipe.job.record import utc_now
from wsi_pipe.quality import QUALITY_METHODS, QUALITY_VERSION

__all__ = [
    "Wanted",
    "assemble",
    "attrs_of_bag",
    "computed_features",
    "computed_quality",
    "missing_features",
    "refuse_foreign_features",
    "store_features",
    "wanted_features",
]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One encoder's features of one grid, as the settings want them; fingerprint tells them from any other.

    name: the encoder's in the settings. source: fingerprint of the grid.
    """

    label: str
    info: EncoderInfo
    fingerprint: str
    name: str = ""
    source: str = ""

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
        if grid.label not in prepared.asked:
            continue
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
            wanted.append(Wanted(grid.label, info, own, name, source))
    return wanted


def missing_features(
    prepared: Prepared, wanted: Iterable[Wanted], settings: ExtractSettings, reader: str, paths: JobPaths, *, redo: bool
) -> list[Wanted]:
    """Those of ``wanted`` that are neither in the slide's bag nor in a feature file of their own.

    What an earlier version made counts as there, but with ``redo``. Raises StaleWorkError where features of that name
    were made otherwise, unless ``redo``.
    """
    wanted = list(wanted)
    bag = _sound_header(prepared, {item.fingerprint for item in wanted}, paths)
    missing = []
    for item in wanted:
        held = bag.features.get(item.label, {}).get(item.info.slug) if bag else None
        if held is not None and held.weights == RANDOM and not item.info.random:
            # They stand under the encoder's own name in bags of version 0.1.0, and get one of theirs in the next.
            held = None
        if held is None:
            if not _file_holds(prepared, item, settings, reader, paths, redo=redo):
                missing.append(item)
            continue
        fit = features_fit(held, item.source, reader, item.info, settings)
        if fit.kind == "same" or (fit.kind == "older" and not redo):
            continue
        if fit.kind == "other" and not redo:
            same_tiles = _source_of(bag, item.label) == item.source
            why = fit.why if same_tiles else ("on other tiles",)
            raise stale_error(prepared.entry, f"its features of {item.info.name} at {item.label}", why)
        if not _file_holds(prepared, item, settings, reader, paths, redo=redo):
            missing.append(item)
    return missing


def refuse_foreign_features(slide_id: str, missing: Iterable[Wanted], paths: JobPaths) -> None:
    """Raise NotOursError where a file of others lies in the place of one of ``missing``, before they are computed."""
    refuse_other_features(*(paths.features(slide_id, item.label, item.info.slug) for item in missing))


def _source_of(bag: BagHeader | None, label: str) -> str:
    grids = [grid for grid in (bag.grids if bag else ()) if grid.label == label]
    return grid_fingerprint(bag.attrs.slide_fingerprint, grids[0]) if bag and grids else ""


def _header(prepared: Prepared, paths: JobPaths) -> BagHeader | None:
    """The header of the slide's bag, or None where there is no readable one."""
    try:
        return read_guarded(read_header, paths.bag(prepared.entry.slide_id))
    except BagError:
        return None


def _sound_header(prepared: Prepared, wanted: set[str], paths: JobPaths) -> BagHeader | None:
    """The header of the slide's bag.

    Where others than just these features are wanted the bag will be made anew out of it, which a damaged one is not fit
    for.
    """
    header = _header(prepared, paths)
    if header is None or wanted <= header.fingerprints:
        return header
    return None if problems_guarded(check_bag, paths.bag(prepared.entry.slide_id)) else header


def _file_holds(
    prepared: Prepared, item: Wanted, settings: ExtractSettings, reader: str, paths: JobPaths, *, redo: bool
) -> bool:
    path = paths.features(prepared.entry.slide_id, item.label, item.info.slug)
    try:
        header = read_guarded(read_feature_header, path)
    except BagError:
        return False
    if problems_guarded(check_feature_file, path):
        return False
    fit = features_fit(header.features, item.source, reader, item.info, settings)
    if fit.kind == "other" and not redo:
        raise stale_error(prepared.entry, f"its features of {item.info.name} at {item.label}", fit.why)
    return fit.kind == "same" or (fit.kind == "older" and not redo)


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
            weights=RANDOM if item.info.random else "",
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
        refuse_other_features(path)
        quality = computed_quality(computed, item.label)
        write_feature_file(path, slide_id, item.label, item.info.slug, features, quality)


def assemble(
    prepared: Prepared,
    wanted: Iterable[Wanted],
    missing: Iterable[Wanted],
    settings: ExtractSettings,
    paths: JobPaths,
    *,
    keep_features: bool,
    computed: SlideFeatures | None = None,
) -> tuple[bool, tuple[str, ...]]:
    """Put grids and features together in the slide's bag; whether it was not right already, and notes.

    missing: those of ``wanted`` that the bag did not hold. computed: features that were made just now and have no
    files. What the bag holds beside them on the same tiles stays: features of other encoders, attention. What was on
    tiles that are no more is left out, which the notes say. The feature files are removed once the bag holds them,
    unless ``keep_features``. Raises BagError when features are missing, OutputError when the bag cannot be written.
    """
    wanted, slide_id = list(wanted), prepared.entry.slide_id
    path = paths.bag(slide_id)
    lacking = {item.place for item in missing}
    header = _header(prepared, paths)
    attrs = attrs_of_bag(prepared, wanted, header)
    if header is not None and not _lacks(header, attrs, prepared, wanted, lacking):
        _clean(slide_id, wanted, paths, keep_features)
        return False, ()
    try:
        # Read here only once a process that may hang in it has found it sound.
        old = read_bag(path) if path.is_file() and not problems_guarded(check_bag, path) else None
    except BagError:
        old = None
    before = {level.grid.label: level for level in (old.levels if old else ())}
    slide = old.attrs.slide_fingerprint if old else ""
    fresh = {key: value for key, (_, value) in computed_features(computed, wanted).items()} if computed else {}
    labels = _annotation(prepared, paths)
    levels, lost = [], []
    for grid in prepared.grids:
        held = before.get(grid.label)
        same = held is not None and grid_fingerprint(slide, held.grid) == grid_fingerprint(
            attrs.slide_fingerprint, grid
        )
        kept = _under_own_names(held.features) if held is not None and same else {}
        own = dict(kept)
        for item in (item for item in wanted if item.label == grid.label):
            slug = item.info.slug
            if item.place in lacking or slug not in kept:
                features = fresh.get(item.fingerprint)
                own[slug] = features if features is not None else _stored(prepared, item, grid, paths, settings.dtype)
            # Asked again each time: a case may have been corrected.
            saw = item.info.seen.part_of(attrs.case_id, attrs.slide_fingerprint)
            own[slug] = dataclasses.replace(own[slug], encoder_saw=saw)
        if held is not None and not same:
            lost += [f"{grid.label}/{slug}" for slug in _under_own_names(held.features) if slug not in own]
        attention = held.attention if held is not None and same else {}
        measured = computed_quality(computed, grid.label) if computed else {}
        quality = (
            measured
            or _kept_quality(old, grid, attrs.slide_fingerprint)
            or _stored_quality(prepared, wanted, grid, paths)
        )
        levels.append(BagLevel(grid, own, attention, labels.get(grid.label, {}), quality))
    attrs = attrs_of_bag(prepared, wanted, header, levels)
    # A vector of the whole slide holds for as long as the features do that it was made of.
    made_of = {features.fingerprint for level in levels for features in level.features.values()}
    vectors = {name: vector for name, vector in (old.slide.items() if old else ()) if vector.features in made_of}
    write_bag(path, Bag(dataclasses.replace(attrs, created_utc=utc_now()), tuple(levels), vectors))
    _clean(slide_id, wanted, paths, keep_features)
    gone = f"features of tiles that are no more left its bag: {', '.join(lost)}"
    return True, (gone,) if lost else ()


def _annotation(prepared: Prepared, paths: JobPaths) -> dict[str, Mapping[str, TileValues]]:
    """By level, what each class of the slide's annotations covers of each tile."""
    if not prepared.attrs.annotation:
        return {}
    if prepared.annotation is not None:
        return dict(prepared.annotation)
    tiles, slide_id = paths.tiles(prepared.entry.slide_id), prepared.entry.slide_id
    levels = read_guarded(read_bag, tiles if tiles.is_file() else paths.bag(slide_id)).levels
    return {level.grid.label: level.annotation for level in levels}


def _under_own_names(features: Mapping[str, Features]) -> dict[str, Features]:
    """Features by slug, those of random weights under a name that says so: version 0.1.0 gave them the encoder's."""
    found = {}
    for slug, item in features.items():
        if item.weights == RANDOM and not slug.endswith(RANDOM_SUFFIX):
            item = dataclasses.replace(item, encoder=f"{item.encoder}{RANDOM_SUFFIX}")
            slug = f"{slug}{RANDOM_SUFFIX}"
        found[slug] = item
    return found


def attrs_of_bag(
    prepared: Prepared, wanted: Sequence[Wanted], header: BagHeader | None, levels: Sequence[BagLevel] = ()
) -> BagAttrs:
    """The root attributes. What ``/features`` links to stays, as long as it is there."""
    level = prepared.attrs.primary_level
    primary = next((item.info.slug for item in wanted if item.label == level), "")
    if header is not None and header.attrs.primary_level == level and header.attrs.primary_encoder:
        primary = header.attrs.primary_encoder
    for own in levels:
        if own.grid.label == level and primary not in own.features:
            primary = next(iter(own.features), "")
    return dataclasses.replace(prepared.attrs, primary_encoder=primary)


def _lacks(header: BagHeader, attrs: BagAttrs, prepared: Prepared, wanted: Sequence[Wanted], lacking: set[str]) -> bool:
    """Whether a bag is to be written anew: its attributes (but its date) or grids are others, or it lacks features."""
    if dataclasses.replace(header.attrs, created_utc=attrs.created_utc) != attrs or lacking:
        return True
    held = {grid.label: grid_fingerprint(header.attrs.slide_fingerprint, grid) for grid in header.grids}
    now = {grid.label: grid_fingerprint(attrs.slide_fingerprint, grid) for grid in prepared.grids}
    return held != now or any(item.info.slug not in header.features.get(item.label, {}) for item in wanted)


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
            weights=RANDOM if info.random else "",
        )
    path = paths.features(prepared.entry.slide_id, item.label, item.info.slug)
    return read_feature_file(path)


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


def _clean(slide_id: str, wanted: Iterable[Wanted], paths: JobPaths, keep_features: bool) -> None:
    """Remove the feature files that the bag holds now, and their folder once it is empty; nothing else of it."""
    if keep_features:
        return
    files = {paths.features(slide_id, item.label, item.info.slug) for item in wanted}
    with contextlib.suppress(OSError):
        for path in files:
            if is_feature_file_of_ours(path):
                path.unlink()
        for folder in {path.parent for path in files}:
            folder.rmdir()
