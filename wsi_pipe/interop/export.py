"""A job's features in another tool's files: which slides have them, what is written, and what is left out and why."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag import content_digest, read_header, read_level, skim_file
from wsi_pipe.config import fingerprint
from wsi_pipe.encoders.elsewhere import same_encoder, slug_asked_for
from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.errors import BagError, ConfigError, JobLockedError, OutputError, WsiPipeError
from wsi_pipe.files import TEMPORARY_SUFFIX, atomic_path, is_temporary, remove_partial_files
from wsi_pipe.interop.record import ExportRecord
from wsi_pipe.interop.table import EXPORTERS
from wsi_pipe.interop.values import Exporter, Given, SlideFeatures
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.record import load_slides, read_outcomes
from wsi_pipe.locking import hold_file
from wsi_pipe.ownership import claim_folder

__all__ = ["Chosen", "Exported", "Plan", "bags_of", "choose_features", "export_job", "plan_export"]

MARKER = ".wsi-pipe-export"
LOCK = ".wsi-pipe-export.lock"
FOLDERS = (".zarr",)
"""Endings of what is a folder of files."""


@dataclass(frozen=True)
class Exported:
    """What became of one slide.

    status: "written"; "unchanged", it was right already; "empty", a slide without tiles, which the tool cannot read;
    "left out", it lacks these features; "failed"; or "kept", a file of an earlier export whose slide is not exported
    now. reason: why, of the last four.
    """

    slide_id: str
    status: Literal["written", "unchanged", "empty", "left out", "failed", "kept"]
    reason: str = ""
    tiles: int = 0


@dataclass(frozen=True)
class Chosen:
    """One encoder's features of one level of a job: in which bags. absent: slides without them, with the reason.
    encoder: its name as the bags hold it."""

    root: Path
    level: str
    slug: str
    encoder: str
    bags: dict[str, Path]
    absent: dict[str, str]


@dataclass(frozen=True)
class Plan(Chosen):
    """What is to be exported, and for which tool."""

    exporter: Exporter

    @property
    def key(self) -> str:
        """What tells this export from others in one folder."""
        return f"{self.exporter.name}/{self.level}/{self.slug}"


def plan_export(
    root: Path, to: str, level: str | None = None, encoder: str | None = None, *, allow_random: bool = False
) -> Plan:
    """Look at the bags of a job, or of a folder of bags, and choose what is exported; see ``choose_features``."""
    found = choose_features(root, level, encoder, allow_random=allow_random)
    return Plan(root, found.level, found.slug, found.encoder, found.bags, found.absent, EXPORTERS[to])


def choose_features(
    root: Path, level: str | None = None, encoder: str | None = None, *, allow_random: bool = False
) -> Chosen:
    """Choose one encoder's features of one level of a job, or of a folder of bags.

    level: a label such as "20x"; encoder: its name, an alias, or its slug; None where the bags hold only one.
    Raises ConfigError where the choice is not clear, no slide has such features, or they are of random weights and not
    ``allow_random``.
    """
    paths, absent = bags_of(root)
    contents: dict[str, _Contents] = {}
    for slide_id, path in paths.items():
        try:
            found = read_guarded(_contents, path)
            if found.slide_id != slide_id:
                absent[slide_id] = f"{path} is the bag of another slide, {found.slide_id}"
                continue
            contents[slide_id] = found
        except WsiPipeError as error:
            absent[slide_id] = error.message
    held = {
        (label, slug): encoder
        for found in contents.values()
        for label, features in found.features.items()
        for slug, (encoder, _) in features.items()
    }
    label, slug = _choice(root, held, level, encoder)
    chosen: dict[str, Path] = {}
    for slide_id, found in contents.items():
        item = found.features.get(label, {}).get(slug)
        if item is None:
            absent[slide_id] = _lacking(found, label, slug)
            continue
        if item[1] == RANDOM and not allow_random:
            raise ConfigError(
                f"{slide_id}: features of {item[0]} were made with random weights: no tool should learn from them",
                remedy="name another encoder (--encoder), or say --allow-random for a test",
            )
        chosen[slide_id] = paths[slide_id]
    order = list(paths) + [slide_id for slide_id in absent if slide_id not in paths]
    named = {slide_id: absent[slide_id] for slide_id in order if slide_id in absent}
    return Chosen(root, label, slug, held[label, slug], chosen, named)


@dataclass(frozen=True)
class _Contents:
    """What of a bag's header is kept while all are looked at: features by level and slug, (encoder, weights)."""

    slide_id: str
    features: dict[str, dict[str, tuple[str, str]]]


def _contents(path: Path) -> _Contents:
    header = read_header(path)
    return _Contents(
        header.attrs.slide_id,
        {
            label: {slug: (item.encoder, item.weights) for slug, item in features.items()}
            for label, features in header.features.items()
        },
    )


def bags_of(root: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Bags by slide id, and the slides of a job that have none, with the reason."""
    job = JobPaths(root)
    if not (job.marker.is_file() or job.config.is_file()):
        found = {path.stem: path for path in sorted(root.glob("*.h5")) if not path.name.startswith(".")}
        if not found:
            raise ConfigError(f"{root}: is neither a job nor a folder of bags", remedy="give the folder of run --out")
        return found, {}
    bags: dict[str, Path] = {}
    absent: dict[str, str] = {}
    outcomes = read_outcomes(root)
    for entry in load_slides(root):
        path = job.bag(entry.slide_id)
        if path.is_file():
            bags[entry.slide_id] = path
        else:
            end = outcomes.get(entry.slide_id)
            why = f"it failed: {end.reason}" if end is not None and end.status == "failed" else "it has no bag yet"
            absent[entry.slide_id] = why
    return bags, absent


def _choice(root: Path, held: dict[tuple[str, str], str], level: str | None, encoder: str | None) -> tuple[str, str]:
    slug = slug_asked_for(encoder) if encoder else None
    fits = [place for place in held if level in (None, place[0]) and slug in (None, place[1])]
    if encoder and not fits:
        # Under a slug of its own, as of bags of earlier versions and of other programs.
        fits = [
            p for p, name in held.items() if level in (None, p[0]) and (encoder == p[1] or same_encoder(name, encoder))
        ]
    if len(fits) == 1:
        return fits[0]
    have = ", ".join(f"{label}/{slug}" for label, slug in sorted(held)) or "none at all"
    asked = "/".join(part or "any" for part in (level, encoder))
    if not fits:
        raise ConfigError(f"{root}: no slide has features of {asked}", remedy=f"what there is: {have}")
    raise ConfigError(
        f"{root}: features of {len(fits)} encoders or resolutions fit {asked}",
        remedy=f"choose with -r and -e one of {have}",
    )


def _lacking(found: _Contents, label: str, slug: str) -> str:
    if label not in found.features:
        return f"its bag has no level {label}, only {', '.join(found.features) or 'none'}"
    held = ", ".join(found.features[label]) or "none"
    return f"its bag has no features of {slug} at {label}, only {held}"


def export_job(plan: Plan, out: Path, *, progress: Callable[[int, int], object] | None = None) -> Iterator[Exported]:
    """Write the features of a plan into ``out``; one result a slide, in the order of the job.

    ``out`` must be new, empty, or of earlier exports. Files that are right already stay as they are; files that this
    program did not write are never written over. A slide that cannot be read ends itself alone.
    Raises NotOursError for a folder of others, ConfigError where it holds another export of the same format whose files
    would have the same names, OutputError when it cannot be written.
    """
    exporter = plan.exporter
    claim_folder(out, MARKER, "an export")
    busy = f"{out}: another export writes here"
    with hold_file(out / LOCK, {}, lambda who: JobLockedError(f"{busy} ({who})", remedy="wait for it")):
        _remove_leavings(out)
        record = ExportRecord(out)
        _refuse_other(record, plan, out)
        seen: set[str] = set()
        given: list[Given] = []
        total = len(plan.bags)
        for number, (slide_id, path) in enumerate(plan.bags.items(), start=1):
            result = _export_slide(plan, slide_id, path, record, out, seen, given)
            if progress is not None:
                progress(number, total)
            yield result
        for slide_id, reason in plan.absent.items():
            yield Exported(slide_id, "left out", reason)
        for place, text in exporter.tables(given, plan.encoder):
            seen.add(str(place))
            _put(record, place, plan.key, fingerprint(exporter.version, text), out, _writer_of(text))
        for name in sorted(record.files_of(plan.key) - seen):
            yield Exported(Path(name).name, "kept", f"{out / name} is of a slide that is not exported now")


def _writer_of(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8", newline="")


def _refuse_other(record: ExportRecord, plan: Plan, out: Path) -> None:
    if not plan.exporter.shared:
        return
    others = record.others(plan.exporter.name, plan.key)
    if others:
        raise ConfigError(
            f"{out}: holds {plan.exporter.title} files of {others[0].partition('/')[2]} already, which go by the same "
            "names",
            remedy="give another --out",
        )


def _export_slide(
    plan: Plan,
    slide_id: str,
    path: Path,
    record: ExportRecord,
    out: Path,
    seen: set[str],
    given: list[Given],
) -> Exported:
    try:
        exporter = plan.exporter
        slide, digest = _outline(path, plan)
        tiles, dim = slide.features.shape
        places = exporter.files(slide)
        seen |= {str(place) for place in places}
        if not tiles and not exporter.takes_empty:
            reason = slide.attrs.empty_reason or f"no tile at {plan.level}"
            return Exported(slide_id, "empty", f"{reason}: {exporter.title} takes no slide without tiles")
        of_grid, of_features = _sources(plan, slide, digest)
        wanted = [
            (place, plan.key.rpartition("/")[0], of_grid) if exporter.of_grid(place) else (place, plan.key, of_features)
            for place in places
        ]
        lacking = [item for item in wanted if not record.is_right(*item)]
        if lacking:
            # Read in full only where something is to be written.
            slide = _read(path, plan)
        for place, key, source in lacking:
            _put(record, place, key, source, out, _bound(exporter, slide, place))
        given.append(Given(slide_id, slide.case_id, tiles, dim))
        return Exported(slide_id, "written" if lacking else "unchanged", tiles=tiles)
    except OutputError:
        raise
    except WsiPipeError as error:
        return Exported(slide_id, "failed", str(error))


def _bound(exporter: Exporter, slide: SlideFeatures, place: Path) -> Callable[[Path], object]:
    return lambda path: exporter.write(slide, path, place)


def _outline(path: Path, plan: Plan) -> tuple[SlideFeatures, str]:
    """All of a slide but its features, which are zeros of their shape that take no memory; and what tells them from
    others: fingerprint and digest. Raises BagError."""
    header = read_guarded(read_header, path)
    item = header.features[plan.level][plan.slug]
    grid = next(grid for grid in header.grids if grid.label == plan.level)
    slide = SlideFeatures(
        attrs=header.attrs,
        grid=grid,
        encoder=item.encoder,
        slug=plan.slug,
        weights_sha256=item.weights_sha256,
        features=np.broadcast_to(np.float32(0), (len(grid), item.dim)),
        weights=item.weights,
    )
    return slide, f"{item.fingerprint} {item.sha256}"


def _read(path: Path, plan: Plan) -> SlideFeatures:
    """The features of one bag, checked against their digest. Raises BagError."""
    read_guarded(skim_file, path)
    view = read_level(path, plan.level, plan.slug)
    values = view.features
    if not np.isfinite(values).all():
        raise BagError(
            f"{path}: features of {view.encoder} hold NaN or infinity", remedy="run wsi-pipe verify --repair"
        )
    return SlideFeatures(
        attrs=view.attrs,
        grid=view.grid,
        encoder=view.encoder,
        slug=view.slug,
        weights_sha256=view.weights_sha256,
        features=np.ascontiguousarray(values, np.float32),
        weights=view.weights,
        annotation=view.annotation,
        quality=view.quality,
    )


def _sources(plan: Plan, slide: SlideFeatures, digest: str) -> tuple[str, str]:
    """What a slide's tiles and what its features are: files of others are written anew."""
    attrs, grid = slide.attrs, slide.grid
    tiles = fingerprint(
        plan.exporter.version, attrs.slide_id, attrs.mpp_l0, (attrs.width_l0, attrs.height_l0), grid.spec,
        grid.origin_l0, grid.stride_l0, grid.tile_size_l0, grid.min_tissue, _digest(grid.cells), _digest(grid.tissue),
    )  # fmt: skip
    features = fingerprint(
        tiles, plan.key, slide.origins, digest, attrs.slide_path, attrs.status, attrs.empty_reason, attrs.annotation
    )
    return tiles, features


def _digest(values: NDArray[Any]) -> str:
    return content_digest([values])


def _put(record: ExportRecord, place: Path, key: str, source: str, out: Path, write: Callable[[Path], object]) -> bool:
    """Write one file or folder unless it is right already; whether it was written. Raises OutputError, NotOursError."""
    if record.is_right(place, key, source):
        return False
    record.claim(place, key, source)
    target = out / place
    # A folder cannot be flushed as a whole, nor renamed over another.
    with atomic_path(target, durable=target.suffix not in FOLDERS) as temporary:
        try:
            write(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if temporary.is_dir() and target.is_dir():
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")
            os.replace(target, aside)
            shutil.rmtree(aside, ignore_errors=True)
    record.done(place, key, source)
    return True


def _remove_leavings(out: Path) -> None:
    """What calls that were killed left of files and folders that they had not finished; nobody else writes here."""
    for folder in [path for path in out.rglob(".*.partial") if path.is_dir() and is_temporary(path.name)]:
        shutil.rmtree(folder, ignore_errors=True)
    remove_partial_files(out, [path for path in out.iterdir() if path.is_dir()])
