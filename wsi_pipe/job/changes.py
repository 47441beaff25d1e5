"""What a call would change in a job, found before any work: nothing that is finished is made anew unless it is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipe import __version__
from wsi_pipe.bag import BagAttrs, read_attrs
from wsi_pipe.config import ExtractSettings, JobSettings, SegmentSettings, TileSettings
from wsi_pipe.encoders.naming import draws_weights
from wsi_pipe.errors import BagError, ConfigError, StaleWorkError
from wsi_pipe.files import file_sha256
from wsi_pipe.job.fits import differences, record_of, shown
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.private import told
from wsi_pipe.job.record import append_line, load_settings, load_slides, merged_settings, read_outcomes, utc_now
from wsi_pipe.manifest import SETTING_COLUMNS, SlideEntry, settings_of
from wsi_pipe.masking import mask_secrets
from wsi_pipe.outcome import TIMES, SlideOutcome

__all__ = [
    "Call",
    "Change",
    "Stale",
    "call_of",
    "duration",
    "note_changes",
    "refuse_stale",
    "seconds_of",
    "stale_work",
    "stored_attrs",
    "unfit_work",
]


@dataclass(frozen=True)
class Change:
    """One value of a slide, or of the job's settings (slide_id ""), that is another after this call."""

    slide_id: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.slide_id + ': ' if self.slide_id else ''}{self.what} {self.old} -> {self.new}"


@dataclass(frozen=True)
class Call:
    """What a call means in its job.

    settings: of its work. stored: of the job from now on, which is what was asked for in all calls so far. entries:
    the slides to work on. changes: of the job and of its slides.
    """

    settings: JobSettings
    stored: JobSettings
    entries: list[SlideEntry]
    changes: tuple[Change, ...] = ()


@dataclass
class Stale:
    """Finished work that would not fit any more. why: the changes that do it. what: kind of work -> slides. seconds:
    what it took, as far as outcomes know. remedies: beside making it anew."""

    why: dict[str, None] = field(default_factory=dict)
    what: dict[str, set[str]] = field(default_factory=dict)
    seconds: float = 0.0
    remedies: list[str] = field(default_factory=list)

    @property
    def slides(self) -> set[str]:
        """Ids of all slides concerned."""
        return set().union(*self.what.values()) if self.what else set()


def call_of(root: Path, given: JobSettings, entries: Sequence[SlideEntry], *, part: bool = False) -> Call:
    """What a call with these settings on these slides means in the job at ``root``, which need not be there yet.

    given: the job's own settings with what the call states otherwise. part: the call is about some slides of the job
    alone (``--only``, ``--limit``): then the job's settings stay as they are, and what the call states is noted with
    its slides. Raises ConfigError for a setting that all slides of a job share, in such a call.
    """
    held = load_settings(root)
    listed = {entry.slide_id: entry for entry in load_slides(root)}
    entries = list(entries)
    if held is None:
        return Call(given, given, entries, tuple(_slide_changes(entries, listed)))
    if part:
        own = _of_some_slides(held, given)
        entries = [dataclasses.replace(entry, overrides={**entry.overrides, **own}) for entry in entries]
        tile = dataclasses.replace(held.tile, resolutions=given.tile.resolutions)
        work = dataclasses.replace(given, segment=held.segment, tile=tile)
        stored = held
    else:
        stored = merged_settings(root, held, _without_drawn(given, held))
        work = given
    if given.redo:
        # What is made anew takes all features with it that stand on it: they are made anew as well.
        both = merged_settings(root, held, work)
        work = dataclasses.replace(both, redo=True, extract=_random_as(both.extract, work.extract))
    changes = [*_setting_changes(held, stored), *_slide_changes(entries, listed)]
    return Call(work, stored, entries, tuple(changes))


def _without_drawn(given: JobSettings, held: JobSettings) -> JobSettings:
    """The settings without encoders whose weights this call draws: the next call wants none of them."""
    if not given.extract.random_weights:
        return given
    encoders = {
        label: tuple(name for name in names if not draws_weights(name))
        for label, names in given.extract.encoders.items()
    }
    if not any(encoders.values()):
        encoders = {"*": (), **held.extract.encoders}
    return dataclasses.replace(given, extract=dataclasses.replace(given.extract, encoders=encoders))


def _random_as(extract: ExtractSettings, call: ExtractSettings) -> ExtractSettings:
    return dataclasses.replace(extract, random_weights=call.random_weights)


_CHANGES_RESULTS = {"extract": ("layers", "dtype", "precision")}
"""Settings of a stage that matter to what it makes, of stages where not all do."""


def _matter(settings: JobSettings) -> dict[str, Any]:
    """Settings that matter to results, by name; resolutions and encoders, to which calls only add, are none of them."""
    found: dict[str, Any] = {"reader": settings.reader, "primary": settings.primary}
    for stage, group in (("segment", settings.segment), ("tile", settings.tile)):
        found |= {f"{stage}.{f.name}": getattr(group, f.name) for f in dataclasses.fields(group)}
    found |= {f"extract.{name}": getattr(settings.extract, name) for name in _CHANGES_RESULTS["extract"]}
    del found["tile.resolutions"]
    return found


def _setting_changes(old: JobSettings, new: JobSettings) -> Iterator[Change]:
    before, after = _matter(old), _matter(new)
    for name, value in after.items():
        if before[name] != value:
            yield Change("", name.rpartition(".")[2], shown(before[name]), shown(value))


def _of_some_slides(held: JobSettings, given: JobSettings) -> dict[str, Any]:
    """What a call about some slides states otherwise than the job, as columns of a slide list."""
    columns = {f"{stage}.{name}": column for column, (stage, name) in SETTING_COLUMNS.items()}
    before, found = _matter(held), {}
    for name, value in _matter(given).items():
        if before[name] == value:
            continue
        if name not in columns:
            short = name.rpartition(".")[2]
            raise ConfigError(
                f"{short} {shown(before[name])} -> {shown(value)} is a setting of the whole job, which --only "
                "and --limit leave as it is",
                remedy="leave out --only and --limit, or give another job with -o",
            )
        found[columns[name]] = value
    return found


_OF_A_SLIDE = ("slide_id", "path", "overrides", "stated", "hides")


def _slide_changes(entries: Iterable[SlideEntry], listed: Mapping[str, SlideEntry]) -> Iterator[Change]:
    for entry in entries:
        old = listed.get(entry.slide_id)
        if old is None:
            continue
        if old.path != entry.path:
            was, now = (_told_value(entry, "path", one.path) for one in (old, entry))
            yield Change(entry.slide_id, "path", was, now)
        for item in dataclasses.fields(SlideEntry):
            if item.name not in _OF_A_SLIDE and getattr(old, item.name) != getattr(entry, item.name):
                was, now = (_told_value(entry, item.name, getattr(one, item.name)) for one in (old, entry))
                yield Change(entry.slide_id, item.name, was, now)
        for column in sorted(old.overrides.keys() | entry.overrides.keys()):
            before, after = old.overrides.get(column), entry.overrides.get(column)
            if before != after:
                was, now = ("as the job's" if value is None else shown(value) for value in (before, after))
                yield Change(entry.slide_id, column, was, now)


_FILES = ("path", "mask", "annotations")


def _told_value(entry: SlideEntry, name: str, value: object) -> str:
    """A value as the log of changes and the screen may show it: without names that the job hides, and secrets.

    Of files of an anonymised job nothing is said: folders of the place that a slide was moved from name people too.
    """
    if entry.hides and name in _FILES and value is not None:
        return "(left out)"
    return mask_secrets(told(entry, shown(value)))


def note_changes(paths: JobPaths, changes: Iterable[Change]) -> None:
    """Add changes to the job's ``changes.jsonl``. Raises OutputError when it cannot be written."""
    for change in changes:
        line = {"time_utc": utc_now(), "wsi_pipe": __version__, **dataclasses.asdict(change)}
        append_line(paths.changes, json.dumps(line, ensure_ascii=False))


def stale_work(root: Path, call: Call) -> Stale:
    """Finished work of the call's slides that its changes would make stale, judged by what files say of themselves.

    Nothing is opened where nothing changes. What no setting tells, as a slide's file that was replaced, is for
    ``job.replaced``.
    """
    held = load_settings(root)
    found = Stale()
    if held is None or not call.changes:
        return found
    paths, outcomes = JobPaths(root), read_outcomes(root)
    listed = {entry.slide_id: entry for entry in load_slides(root)}
    job_wide = {change.what for change in call.changes if not change.slide_id}
    touched = {change.slide_id for change in call.changes if change.slide_id and change.what not in _HARMLESS}
    for entry in call.entries:
        if not job_wide and entry.slide_id not in touched:
            continue
        try:
            kinds = _stale_of(entry, listed.get(entry.slide_id, entry), held, call.settings, paths)
        except OSError:
            # What cannot be looked at now fails its slide when its turn comes, and no other.
            continue
        for kind, why in kinds.items():
            found.what.setdefault(kind, set()).add(entry.slide_id)
            found.why |= dict.fromkeys(why)
        if kinds:
            found.seconds += seconds_of(outcomes.get(entry.slide_id), kinds)
    return found


_OF_A_MASK = ("mask", "tissue_class", "frame")
_HARMLESS = ("path", "case_id", "annotations")
"""Changes of a slide that leave its grids and features as they are."""


def _stale_of(
    entry: SlideEntry, old: SlideEntry, held: JobSettings, new: JobSettings, paths: JobPaths
) -> dict[str, tuple[str, ...]]:
    """Kind of finished work -> why it would be stale, for one slide."""
    kinds: dict[str, tuple[str, ...]] = {}
    attrs = stored_attrs(entry.slide_id, paths)
    before, after = settings_of(old, held.segment, held.tile), settings_of(entry, new.segment, new.tile)
    why = list(_picture_changes(entry, old, attrs))
    if held.reader != new.reader:
        why.append(f"reader {held.reader} -> {new.reader}")
    own = _own_words(paths.tissue(entry.slide_id))
    if own is not None:
        why += _mask_changes(entry, old, own, before[0], after[0])
        if why:
            kinds["masks"] = tuple(why)
    if attrs is not None:
        record = record_of(attrs).get("tile", {}).get("settings")
        of_tiles = differences(_without(record if record is not None else before[1]), _sans(after[1]))
        if why or of_tiles:
            kinds["grids"] = (*why, *of_tiles)
    if paths.bag(entry.slide_id).is_file() or any((paths.root / "features" / entry.slide_id).glob("*.h5")):
        of_features = _feature_changes(held.extract, new.extract)
        if kinds or of_features:
            kinds["features"] = (*kinds.get("grids", tuple(why)), *of_features)
    return kinds


def unfit_work(entry: SlideEntry, settings: JobSettings, paths: JobPaths) -> dict[str, tuple[str, ...]]:
    """Kind of finished work of a slide -> why it does not fit the job's settings of now, by what files say of
    themselves; empty where all does."""
    return _stale_of(entry, entry, settings, settings, paths)


def _without(made: Mapping[str, Any] | TileSettings) -> dict[str, Any]:
    values = dict(made) if isinstance(made, Mapping) else dataclasses.asdict(made)
    values["resolutions"] = list(_ANY)
    return values


_ANY = (1.0,)


def _sans(settings: TileSettings) -> TileSettings:
    """The settings with resolutions that make no difference."""
    return dataclasses.replace(settings, resolutions=_ANY)


def stored_attrs(slide_id: str, paths: JobPaths) -> BagAttrs | None:
    """What the grids of a slide say of it; None where there are none that can be read."""
    for path in (paths.tiles(slide_id), paths.bag(slide_id)):
        try:
            return read_guarded(read_attrs, path)
        except BagError:
            continue
    return None


def _own_words(path: Path) -> dict[str, Any] | None:
    """What a stored mask says of itself; None where there is none."""
    try:
        own = json.loads(path.read_bytes())["wsi_pipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return own if isinstance(own, dict) else None


def _picture_changes(entry: SlideEntry, old: SlideEntry, attrs: BagAttrs | None) -> Iterator[str]:
    """Changes of what is read of the file, and of its resolution."""
    for item in dataclasses.fields(SlideEntry):
        if item.name in (*_OF_A_SLIDE, *_HARMLESS, *_OF_A_MASK, "mpp", "mpp_if_missing"):
            continue
        before, after = getattr(old, item.name), getattr(entry, item.name)
        if before != after:
            yield f"{item.name} {shown(before)} -> {shown(after)}"
    if (old.mpp, old.mpp_if_missing) == (entry.mpp, entry.mpp_if_missing) or attrs is None:
        return
    # What is given to slides that state none is nothing to those that do.
    by_file = attrs.mpp_source not in ("user", "none")
    mpp = entry.mpp or (attrs.mpp_l0 if by_file else entry.mpp_if_missing)
    if mpp is not None and tuple(mpp) != attrs.mpp_l0:
        yield f"mpp {shown(attrs.mpp_l0)} -> {shown(mpp)}"
    elif mpp is None:
        yield f"mpp {shown(attrs.mpp_l0)} -> none"


def _mask_changes(
    entry: SlideEntry, old: SlideEntry, own: Mapping[str, Any], before: SegmentSettings, after: SegmentSettings
) -> Iterator[str]:
    made = own["settings"] if isinstance(own.get("settings"), dict) else {}
    given = entry.mask or (entry.annotations if entry.tissue_class else None)
    if given:
        try:
            now = file_sha256(Path(given))
        except OSError:
            # It is told when the slide's turn comes.
            return
        if made.get("mask") != now:
            yield f"mask {old.mask or 'none'} -> {given}"
        if list(made.get("classes", ())) != list(entry.tissue_class):
            yield f"tissue_class {shown(made.get('classes'))} -> {shown(entry.tissue_class)}"
        if old.frame != entry.frame:
            yield f"frame {shown(old.frame)} -> {shown(entry.frame)}"
    elif "mask" in made:
        yield f"mask {old.mask or 'given'} -> none"
    else:
        yield from differences(made.get("settings", dataclasses.asdict(before)), after)


def _feature_changes(before: ExtractSettings, after: ExtractSettings) -> list[str]:
    changes = []
    if before.dtype != after.dtype:
        changes.append(f"dtype {before.dtype} -> {after.dtype}")
    if after.precision not in ("auto", before.precision):
        changes.append(f"precision {before.precision} -> {after.precision}")
    if set(after.layers) - set(before.layers):
        changes.append(f"layers {shown(before.layers)} -> {shown(after.layers)}")
    return changes


_STAGES_OF = {
    "masks": ("segment", "tile", "extract", "assemble"),
    "grids": ("tile", "extract", "assemble"),
    "features": ("extract", "assemble"),
}


def seconds_of(outcome: SlideOutcome | None, kinds: Mapping[str, object]) -> float:
    """What kinds of work took for one slide, as far as its outcome knows."""
    if outcome is None:
        return 0.0
    times = {time for kind in kinds for stage in _STAGES_OF[kind] for time in TIMES[stage]}
    return sum(float(value) for name, value in outcome.seconds.items() if name in times)


def refuse_stale(root: Path, stale: Stale) -> None:
    """Raise StaleWorkError where finished work would be stale: what, how many slides, how long, and what to do."""
    if not stale.what:
        return
    count = len(stale.slides)
    parts = ", ".join(f"{kind} of {len(ids)}" for kind, ids in stale.what.items())
    took = duration(stale.seconds) if stale.seconds else "a time that the job does not know"
    shown_why = list(stale.why)[:5]
    more = f" and {len(stale.why) - 5} more changes" if len(stale.why) > 5 else ""
    slides = f"{count} slide{'s' if count > 1 else ''}"
    raise StaleWorkError(
        f"{root}: {'; '.join(shown_why)}{more} would make finished work of {slides} stale "
        f"({parts}), which took {took} by the job's own timings; nothing was done",
        remedy="; ".join([*stale.remedies, "--redo makes it anew here, another -o keeps both"]),
    )


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever says something."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.1f} s"
