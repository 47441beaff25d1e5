"""Whether what a job holds is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsi_pipe.bag import BagHeader, FeatureHeader, check_bag, read_attrs, read_header, unreachable
from wsi_pipe.care.age import age_of, random_features
from wsi_pipe.care.sources import SourceReport, Sources
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.naming import slug_of
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.errors import BagError, FileAccessError, ManifestError
from wsi_pipe.files import parse_json
from wsi_pipe.job import JobPaths, fingerprints, load_settings, load_slides, read_outcomes
from wsi_pipe.job.fingerprints import features_fingerprint, grid_fingerprint
from wsi_pipe.job.guard import problems_guarded, read_guarded
from wsi_pipe.manifest import SlideEntry
from wsi_pipe.outcome import SlideOutcome
from wsi_pipe.slides.opening import READERS

__all__ = ["Finding", "verify_bags", "verify_job"]


@dataclass(frozen=True)
class Finding:
    """What a check says of one bag; no problems where it is right.

    stale: the bag is sound and its own slide's, and its problems are only that the job's settings, the slide's file or
    an encoder's are others by now: the next run brings it up to date, and keeps the features that still fit. unseen:
    it cannot be looked at (another process holds it, permissions, a mount), so that its problem says nothing of it and
    it is not verified either. remarks: what could not be compared and why, which is not held against the bag.
    """

    slide_id: str
    path: str
    status: str
    problems: tuple[str, ...] = ()
    stale: bool = False
    unseen: bool = False
    remarks: tuple[str, ...] = ()


def verify_bags(bags: Sequence[Path]) -> Iterator[Finding]:
    """Check single bags: schema, shapes, finite features, parents, links. A bag that HDF5 loops or crashes on is a
    finding as well."""
    for path in bags:
        try:
            problems = problems_guarded(check_bag, path)
            attrs = read_guarded(read_header, path).attrs
            yield Finding(attrs.slide_id, str(path), attrs.status, tuple(problems))
        except BagError:
            yield Finding(path.stem, str(path), "unreadable", tuple(problems))
        except FileAccessError as error:
            yield _unseen(path.stem, path, error)


def verify_job(root: Path, *, sources: bool = True) -> Iterator[Finding]:
    """Check every slide of a job: its bag as ``verify_bags`` does, that mask, grids and features belong together, and
    that the slide's file and the encoders' are those that it was made of, as far as they are still there. sources: off
    to look at no slide and no encoder file.

    Slides that failed or are waiting are findings without problems of their own. Raises ManifestError when ``root``
    is not a job.
    """
    paths = JobPaths(root)
    entries, settings = load_slides(root), load_settings(root)
    if not entries or settings is None:
        raise ManifestError(f"{root}: is not a job directory", remedy="give the folder of wsi-pipe run, or bags")
    outcomes = read_outcomes(root)
    known = {entry.slide_id: entry for entry in entries}
    compared = Sources(settings) if sources else None
    for slide_id in sorted(known):
        yield _verify_slide(known[slide_id], paths, settings, outcomes.get(slide_id), compared)
    for path in sorted(paths.bags.glob("*.h5")) if paths.bags.is_dir() else []:
        if path.stem not in known:
            yield Finding(path.stem, str(path), "orphan", ("belongs to no slide of this job",))


def _unseen(slide_id: str, path: Path, error: FileAccessError) -> Finding:
    said = error.message.removeprefix(f"{path.absolute()}: ").removeprefix(f"{path}: ")
    problem = f"{said}; {error.remedy}" if error.remedy else said
    return Finding(slide_id, str(path), "unseen", (problem,), unseen=True)


def _verify_slide(
    entry: SlideEntry, paths: JobPaths, settings: JobSettings, outcome: SlideOutcome | None, sources: Sources | None
) -> Finding:
    path = paths.bag(entry.slide_id)
    try:
        return _verify_bag(entry, path, paths, settings, outcome, sources)
    except FileAccessError as error:
        return _unseen(entry.slide_id, path, error)
    except OSError as error:
        if (outside := unreachable(path, error)) is None:
            raise
        return _unseen(entry.slide_id, path, outside)


def _verify_bag(
    entry: SlideEntry,
    path: Path,
    paths: JobPaths,
    settings: JobSettings,
    outcome: SlideOutcome | None,
    sources: Sources | None,
) -> Finding:
    slide_id = entry.slide_id
    if not path.is_file():
        if outcome is None:
            return Finding(slide_id, str(path), "waiting")
        if outcome.status == "failed":
            return Finding(slide_id, str(path), "failed")
        problems = ("has no bag though it was finished",) if "assemble" in outcome.seconds else ()
        return Finding(slide_id, str(path), "missing" if problems else "waiting", problems)
    problems_found = problems_guarded(check_bag, path)
    if problems_found:
        return Finding(slide_id, str(path), "broken", tuple(problems_found))
    bag = read_guarded(read_header, path)
    wrong = tuple(_wrong(bag, slide_id, settings))
    source = sources.compare(bag, entry) if sources else SourceReport()
    remarks = list(source.remarks)
    stale = (*_stale(bag, slide_id, paths, settings, remarks), *source.changes)
    status = "stale" if stale and not wrong else bag.attrs.status
    said = (*remarks, *_said(slide_id, bag, paths))
    return Finding(slide_id, str(path), status, (*wrong, *stale), stale=bool(stale and not wrong), remarks=said)


def _said(slide_id: str, bag: BagHeader, paths: JobPaths) -> Iterator[str]:
    """What is right and worth a word all the same."""
    for place in random_features(bag):
        yield f"its features {place} are of random weights"
    if older := age_of(slide_id, paths).older:
        yield f"made by wsi-pipe {older}: kept as it is, run --redo makes it anew"


def _wrong(bag: BagHeader, slide_id: str, settings: JobSettings) -> Iterator[str]:
    """What no settings of the job can have made."""
    if bag.attrs.slide_id != slide_id:
        yield f"is the bag of another slide, {bag.attrs.slide_id!r}"
    for label, slug, features, source in _features_of(bag):
        known = _known_transform(features)
        if known is None:
            yield f"{label}: the transform of {slug} is not JSON"
        elif not _made_from(features, known, source, settings, any_settings=True):
            yield f"{label}: features of {slug} belong to another slide or grid"


def _stale(bag: BagHeader, slide_id: str, paths: JobPaths, settings: JobSettings, remarks: list[str]) -> Iterator[str]:
    """What the next run does by itself. remarks: gets what could not be compared."""
    stored = _stored_fingerprint(paths.tissue(slide_id))
    if stored is not None and stored != bag.attrs.fingerprint_segment:
        yield "was made from another tissue mask: run again"
    try:
        tiles = read_guarded(read_attrs, paths.tiles(slide_id))
        if tiles.fingerprint_tile != bag.attrs.fingerprint_tile:
            yield "was made from other grids: run again"
        elif tiles.annotation != bag.attrs.annotation:
            yield "was compared with other annotations: run again"
    except BagError:
        # Grids may be deleted once the bag holds them.
        pass
    except FileAccessError as error:
        remarks.append(f"{error.message}: not compared")
    wanted = {spec.label: spec for spec in settings.tile.specs}
    have = {grid.label: grid.spec for grid in bag.grids}
    if wanted.keys() - have.keys():
        yield f"has grids at {', '.join(have)}, the job wants {', '.join(wanted)}: run again"
    elif any(have[label] != spec for label, spec in wanted.items()):
        yield "has tiles of another size than the job wants: run --redo makes it anew"
    for grid in bag.grids:
        here = bag.features[grid.label]
        names = settings.extract.encoders_of(grid.label) if grid.label in wanted else ()
        # A job that was made with random weights says so, and lacks nothing.
        lacking = [name for name in names if not {slug_of(name), f"{slug_of(name)}{RANDOM_SUFFIX}"} & here.keys()]
        if lacking:
            yield f"{grid.label}: lacks the features of {', '.join(lacking)}: run again"
    for label, slug, features, source in _features_of(bag):
        known = _known_transform(features)
        if known is not None and not _made_from(features, known, source, settings):
            yield f"{label}: features of {slug} were made with other settings: run --redo makes them anew"


def _features_of(bag: BagHeader) -> Iterator[tuple[str, str, FeatureHeader, str]]:
    """Level, slug, header and the fingerprint of the grid of all features in a bag."""
    for grid in bag.grids:
        source = grid_fingerprint(bag.attrs.slide_fingerprint, grid)
        for slug, features in bag.features[grid.label].items():
            yield grid.label, slug, features, source


def _known_transform(features: FeatureHeader) -> Mapping[str, Any] | None:
    try:
        transform = parse_json(features.transform)
    except ValueError:
        return None
    return transform if isinstance(transform, dict) else None


def _made_from(
    features: FeatureHeader,
    transform: Mapping[str, Any],
    source: str,
    settings: JobSettings,
    *,
    any_settings: bool = False,
) -> bool:
    """Whether features are of this grid, with the job's settings or (``any_settings``) with any they may have had."""
    extract = settings.extract
    # Layers that are stored and not asked for any more do no harm.
    ways = [(settings.reader, extract.layers, extract.dtype)]
    if not set(extract.layers) - set(features.layers):
        ways += [(settings.reader, layers, extract.dtype) for layers in itertools.permutations(features.layers)]
    if any_settings:
        layers = dict.fromkeys((extract.layers, features.layers))
        ways += itertools.product(READERS, layers, ("float16", "float32"))
    return any(
        features.fingerprint
        == features_fingerprint(
            source,
            reader,
            encoder=features.encoder,
            weights_sha256=features.weights_sha256,
            precision=features.precision,
            transform=transform,
            dim=features.dim,
            layers=layers,
            dtype=dtype,
            version=version,
        )
        for reader, layers, dtype in ways
        for version in range(fingerprints.EXTRACT_VERSION, 0, -1)
    )


def _stored_fingerprint(path: Path) -> str | None:
    try:
        return str(parse_json(path.read_bytes())["wsi_pipe"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
