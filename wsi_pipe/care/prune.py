"""Taking features and resolutions out of a job: the only way in which finished work leaves it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.bag import (
    Bag,
    BagAttrs,
    BagHeader,
    check_bag,
    read_bag,
    read_feature_header,
    read_header,
    write_bag,
)
from wsi_pipe.config import JobSettings, dump_toml, to_mapping
from wsi_pipe.encoders.naming import slug_of
from wsi_pipe.errors import BagError, ConfigError, ManifestError
from wsi_pipe.files import output_error, write_text_atomically
from wsi_pipe.geometry import TileGrid
from wsi_pipe.job import JobPaths, load_settings, load_slides, utc_now
from wsi_pipe.job.changes import Change, note_changes
from wsi_pipe.job.fits import FIRST_TILE_SETTINGS, in_order, record_of, tile_fingerprint
from wsi_pipe.job.guard import problems_guarded, read_guarded
from wsi_pipe.job.lock import hold_job
from wsi_pipe.job.masks import stored_mask_content
from wsi_pipe.job.ownership import is_feature_file_of_ours
from wsi_pipe.job.partial import prune_part, stored_places
from wsi_pipe.manifest import SlideEntry, settings_of

__all__ = ["Pruning", "Wish", "prune_job", "prune_list"]


@dataclass(frozen=True)
class Wish:
    """What is to go. encoders: (level label or "*", name); resolutions: labels of whole levels; random: all features of
    random weights."""

    encoders: tuple[tuple[str, str], ...] = ()
    resolutions: tuple[str, ...] = ()
    random: bool = False

    def takes(self, label: str, slug: str, weights: str) -> bool:
        """Whether features are to go."""
        if label in self.resolutions or (self.random and weights):
            return True
        return any(level in ("*", label) and slug in (name, slug_of(name)) for level, name in self.encoders)


@dataclass(frozen=True)
class Pruning:
    """What goes of one slide. features: "20x/uni" and the like, of its bag, its feature files and of what a run that
    was stopped kept; levels: whole levels; size_bytes: of the values. files: feature files that go. problem: why
    nothing can be taken out, or None."""

    slide_id: str
    features: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    size_bytes: int = 0
    files: tuple[str, ...] = ()
    problem: str | None = None


def prune_list(root: Path, wish: Wish) -> list[Pruning]:
    """What would go of each slide of the job at ``root``; slides of which nothing would are left out.

    Raises ManifestError when ``root`` is no job, ConfigError where none of its resolutions or encoders would be left.
    """
    settings = load_settings(root)
    if settings is None:
        raise ManifestError(f"{root}: is not a job directory", remedy="give the folder that wsi-pipe run wrote")
    _settings_left(settings, wish)
    paths = JobPaths(root)
    return [found for entry in load_slides(root) if (found := _of_slide(entry.slide_id, paths, wish)) is not None]


def _of_slide(slide_id: str, paths: JobPaths, wish: Wish) -> Pruning | None:
    header: BagHeader | None = None
    problem = None
    # A slide that never got to its bag has grids of their own.
    for path in (paths.bag(slide_id), paths.tiles(slide_id)):
        if header is None and problem is None and path.is_file():
            try:
                header = read_guarded(read_header, path)
            except BagError as error:
                problem = error.message
    if problem is not None:
        return Pruning(slide_id, problem=problem)
    sizes = Counter[str]()
    for grid in header.grids if header else ():
        for slug, item in (header.features[grid.label] if header else {}).items():
            if wish.takes(grid.label, slug, item.weights):
                sizes[f"{grid.label}/{slug}"] += len(grid) * item.dim * 2 * (1 + len(item.layers))
    files = dict(_feature_files(slide_id, paths, wish))
    for path, place in files.items():
        sizes[place] += path.stat().st_size
    sizes.update(stored_places(slide_id, paths, wish.takes))
    levels = tuple(grid.label for grid in header.grids if grid.label in wish.resolutions) if header else ()
    if not sizes and not levels:
        return None
    return Pruning(slide_id, tuple(sizes), levels, sum(sizes.values()), tuple(map(str, files)))


def _feature_files(slide_id: str, paths: JobPaths, wish: Wish) -> Iterator[tuple[Path, str]]:
    """The feature files of a slide that are to go, as far as they say what they are, and what each holds."""
    folder = paths.features(slide_id, "x", "x").parent
    for path in sorted(folder.glob("*.h5")):
        if not is_feature_file_of_ours(path):
            continue
        try:
            held = read_guarded(read_feature_header, path)
        except BagError:
            # It counts for nothing, and is written over where these features are wanted again.
            continue
        if wish.takes(held.level, held.slug, held.features.weights):
            yield path, f"{held.level}/{held.slug}"


def prune_job(root: Path, wish: Wish) -> list[Pruning]:
    """Take out what ``prune_list`` lists, of bags, grids and the job's settings, and return it.

    A bag that is broken stays as it is and is named. Raises as ``prune_list``; JobLockedError while a run is at work,
    OutputError when the job cannot be written.
    """
    with hold_job(root, {"started_utc": utc_now(), "until": "prune"}):
        listed = prune_list(root, wish)
        settings, paths = load_settings(root), JobPaths(root)
        assert settings is not None
        entries = {entry.slide_id: entry for entry in load_slides(root)}
        done = [_prune_slide(item, entries[item.slide_id], settings, paths, wish) for item in listed]
        write_text_atomically(paths.config, dump_toml(_settings_left(settings, wish)))
        gone = sorted({place for item in done if not item.problem for place in (*item.features, *item.levels)})
        note_changes(paths, [Change("", "pruned", place, "none") for place in gone])
    return done


def _prune_slide(item: Pruning, entry: SlideEntry, settings: JobSettings, paths: JobPaths, wish: Wish) -> Pruning:
    if item.problem:
        return dataclasses.replace(item, problem=f"is left as it is: {item.problem}")
    # The grids' own file first: where this ends in between, the bag still holds all, and the next call goes on.
    made: list[tuple[Path, Bag | None]] = []
    try:
        for path in (paths.tiles(item.slide_id), paths.bag(item.slide_id)):
            header = read_guarded(read_header, path) if path.is_file() else None
            if header is None or not _loses(header, wish):
                continue
            if problems := problems_guarded(check_bag, path):
                return dataclasses.replace(item, problem=f"is left as it is: {problems[0]}")
            made.append((path, _left_of_bag(path, header, entry, settings, paths, wish)))
    except BagError as error:
        return dataclasses.replace(item, problem=error.message)
    for path, bag in made:
        if bag is None:
            _remove(path)
        else:
            write_bag(path, bag)
    for name in item.files:
        _remove(Path(name))
    with contextlib.suppress(OSError):
        paths.features(item.slide_id, "x", "x").parent.rmdir()
    prune_part(item.slide_id, paths, wish.takes)
    return item


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error


def _loses(header: BagHeader, wish: Wish) -> bool:
    held = ((grid.label, slug, item) for grid in header.grids for slug, item in header.features[grid.label].items())
    return any(grid.label in wish.resolutions for grid in header.grids) or any(
        wish.takes(label, slug, item.weights) for label, slug, item in held
    )


def _left_of_bag(
    path: Path, header: BagHeader, entry: SlideEntry, settings: JobSettings, paths: JobPaths, wish: Wish
) -> Bag | None:
    """A bag, or a file of grids, without what goes; None where no grid is left: the next run makes the slide anew.

    Raises BagError where it is not known what the grids were laid with.
    """
    gone = [grid.label for grid in header.grids if grid.label in wish.resolutions]
    if len(gone) == len(header.grids):
        return None
    attrs = _without_levels(header, entry, settings, paths, gone)
    bag = read_bag(path)
    kept = {grid.label: grid for grid in left_of([level.grid for level in bag.levels], gone)}
    levels = []
    for level in bag.levels:
        if level.grid.label not in kept:
            continue
        own = {slug: f for slug, f in level.features.items() if not wish.takes(level.grid.label, slug, f.weights)}
        levels.append(dataclasses.replace(level, grid=kept[level.grid.label], features=own))
    primary = next(level for level in levels if level.grid.label == attrs.primary_level)
    first = attrs.primary_encoder if attrs.primary_encoder in primary.features else next(iter(primary.features), "")
    made_of = {features.fingerprint for level in levels for features in level.features.values()}
    vectors = {name: vector for name, vector in bag.slide.items() if vector.features in made_of}
    return Bag(dataclasses.replace(attrs, primary_encoder=first, created_utc=utc_now()), tuple(levels), vectors)


def left_of(grids: Sequence[TileGrid], gone: Sequence[str]) -> Iterator[TileGrid]:
    """The grids without some, coarsest first; a parent index then leads to the next coarser one that is left."""
    up: Any = None
    first = True
    for grid in grids:
        # Rows of this grid -> rows of the last one that was kept.
        parent = grid.parent if up is None or grid.parent is None else up[grid.parent]
        if grid.label in gone:
            up = parent
            continue
        yield dataclasses.replace(grid, parent=None if first else parent)
        first, up = False, None


def _without_levels(
    header: BagHeader, entry: SlideEntry, settings: JobSettings, paths: JobPaths, gone: Sequence[str]
) -> BagAttrs:
    """The attributes once some levels are gone, with the fingerprint of those that are left.

    Raises BagError where it is not known what the grids were laid with.
    """
    attrs = header.attrs
    if not gone:
        return attrs
    record = dict(record_of(attrs))
    held = tuple(sorted(grid.spec.mpp for grid in header.grids))
    tile = record.get("tile") or _record_of_first_version(attrs, entry, settings, paths, held)
    left = sorted(grid.spec.mpp for grid in header.grids if grid.label not in gone)
    tile = {**tile, "settings": {**tile["settings"], "resolutions": left}}
    record["tile"] = tile
    own = tile_fingerprint(attrs.fingerprint_segment, tile["mask"], tile["settings"], int(tile["version"]))
    labels = [grid.label for grid in header.grids if grid.label not in gone]
    primary = attrs.primary_level if attrs.primary_level in labels else labels[0]
    return dataclasses.replace(
        attrs, fingerprint_tile=own, made_with=json.dumps(record, sort_keys=True), primary_level=primary
    )


def _record_of_first_version(
    attrs: BagAttrs, entry: SlideEntry, settings: JobSettings, paths: JobPaths, held: tuple[float, ...]
) -> dict[str, Any]:
    """What files of version 0.1.0 do not say: worked out, and proven by the fingerprint that they have."""
    import itertools

    content = stored_mask_content(paths.tissue(entry.slide_id), (attrs.width_l0, attrs.height_l0))
    _, tile = settings_of(entry, settings.segment, settings.tile)
    plain = to_mapping(in_order(dataclasses.replace(tile, resolutions=held)))
    first = {name: value for name, value in plain.items() if name in FIRST_TILE_SETTINGS}
    for order in itertools.permutations(held):
        made = first | {"resolutions": order}
        if content and tile_fingerprint(attrs.fingerprint_segment, content, made, 1) == attrs.fingerprint_tile:
            return {"version": 1, "mask": content, "settings": first}
    raise BagError(f"{entry.slide_id}: what its grids were laid with is not known", remedy="make it anew: run --redo")


def _settings_left(settings: JobSettings, wish: Wish) -> JobSettings:
    """The job's settings without what is to go. Raises ConfigError where no resolution or encoder would be left."""
    specs = [spec for spec in settings.tile.specs if spec.label not in wish.resolutions]
    if not specs:
        raise ConfigError("no resolution of the job would be left", remedy="delete the job's folder instead")
    encoders = {
        spec.label: tuple(
            name for name in settings.extract.encoders_of(spec.label) if not wish.takes(spec.label, slug_of(name), "")
        )
        for spec in specs
    }
    if not any(encoders.values()):
        raise ConfigError("no encoder of the job would be left", remedy="delete the job's folder instead")
    alike = len(set(encoders.values())) == 1
    named = {"*": next(iter(encoders.values()))} if alike else {label: own for label, own in encoders.items() if own}
    tile = dataclasses.replace(settings.tile, resolutions=tuple(sorted(spec.mpp for spec in specs)))
    primary = None if settings.primary in wish.resolutions else settings.primary
    return dataclasses.replace(
        settings, primary=primary, tile=tile, extract=dataclasses.replace(settings.extract, encoders=named)
    )
