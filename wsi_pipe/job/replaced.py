"""Finished work whose slide's file, or whose encoder's weights, are others by now: found before any work.

Most slides cost a look at their files' sizes and times. Only where these are others than when the work was made are the
file's ends read, and only what is another file then is opened. Weights are compared with those that the index of the
job, or else the bag, says that features were made with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from wsi_pipe.bag import BagAttrs, read_feature_header, read_header
from wsi_pipe.config import CacheSettings, JobSettings
from wsi_pipe.encoders.availability import weights_file
from wsi_pipe.encoders.naming import draws_weights, slug_of
from wsi_pipe.encoders.random_id import RANDOM
from wsi_pipe.errors import BagError
from wsi_pipe.execute import run_bounded
from wsi_pipe.files import file_sha256
from wsi_pipe.job.changes import Call, Stale, refuse_stale, seconds_of, stale_work, stored_attrs
from wsi_pipe.job.fits import Identity, file_content, record_of
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.index import Mark, marks_of, seems_unchanged
from wsi_pipe.job.opening import open_entry
from wsi_pipe.job.ownership import is_feature_file_of_ours
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.record import read_outcomes, stamp_of
from wsi_pipe.manifest import SlideEntry, is_url

__all__ = ["file_weights", "is_made_of", "other_weights", "refuse_unfit", "replaced_slides"]

SLIDE_CPU_S = 60.0
"""Far more processor seconds than any reader takes to open a slide."""
NAMED = 5
UNSEEN = (BagError, OSError)
"""What keeps a file of the job shut. It is told when its slide's turn comes, and holds back no other."""


def refuse_unfit(root: Path, call: Call) -> None:
    """Raise StaleWorkError where the call would make finished work stale, or the files of its slides are others."""
    found = stale_work(root, call)
    replaced_slides(root, call, found)
    refuse_stale(root, found)


def replaced_slides(root: Path, call: Call, found: Stale) -> None:
    """Add the slides whose file is another than the one that their finished work was made of.

    A file that is not there, or cannot be opened, says nothing of the work; neither do URLs, which are not asked for.
    """
    outcomes = read_outcomes(root)
    if not outcomes:
        return
    paths, ids = JobPaths(root), []
    marks = marks_of(paths)
    for entry in call.entries:
        outcome, mark = outcomes.get(entry.slide_id), marks.get(entry.slide_id)
        stamp = "" if outcome is None or is_url(entry.path) else stamp_of(entry)
        if outcome is None or not stamp:
            continue
        if stamp == outcome.stamp and (mark is None or seems_unchanged(entry, mark)):
            continue
        try:
            attrs = stored_attrs(entry.slide_id, paths)
            if attrs is None or _is_its_file(attrs, entry, call.settings):
                continue
        except OSError:
            continue
        ids.append(entry.slide_id)
        kinds = list(_kinds_of_work(entry.slide_id, paths))
        for kind in kinds:
            found.what.setdefault(kind, set()).add(entry.slide_id)
        found.seconds += seconds_of(outcome, dict.fromkeys(kinds))
    if ids:
        what, it = ("another file", "it") if len(ids) == 1 else ("other files", "them")
        found.why[f"{what} in the place of {_named(ids)}"] = None
        found.remedies.append(
            f"put what the work was made of back, give what is there ids of its own in a slide list, or leave {it} out "
            "of the call"
        )


def _named(ids: list[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return ", ".join(ids[:NAMED]) + more


def _kinds_of_work(slide_id: str, paths: JobPaths) -> Iterator[str]:
    if paths.tissue(slide_id).is_file():
        yield "masks"
    yield "grids"
    if paths.bag(slide_id).is_file() or any(paths.features(slide_id, "x", "x").parent.glob("*.h5")):
        yield "features"


def _is_its_file(attrs: BagAttrs, entry: SlideEntry, settings: JobSettings) -> bool:
    made_of = str(record_of(attrs).get("file", ""))
    if made_of and made_of == file_content(entry.path):
        return True
    try:
        return is_made_of(attrs, entry, settings.reader, settings.cache)
    except Exception:
        # As in a run, what keeps it from being opened is its slide's own, and is told when its turn comes.
        return True


def is_made_of(attrs: BagAttrs, entry: SlideEntry, reader: str, cache: CacheSettings) -> bool:
    """Whether a bag is of the slide as it is, found in a child process, which a damaged slide may crash in place of
    this one. Raises what opening it does."""
    return run_bounded(partial(_is_of, attrs, reader=reader, cache=cache), SLIDE_CPU_S, entry)


def _is_of(attrs: BagAttrs, entry: SlideEntry, *, reader: str, cache: CacheSettings) -> bool:
    slide = open_entry(entry, reader, cache)
    try:
        return Identity(slide, entry.path).knows(attrs)
    finally:
        slide.close()


Weights = Callable[[str], str | None]
"""The SHA-256 of the weights that an encoder of the settings has now, by its name there; None where it is not known."""


def file_weights() -> Weights:
    """``Weights`` of encoders that are not loaded: of the files that would be, each read once, and only when asked."""
    known: dict[str, str | None] = {}

    def sha256(name: str) -> str | None:
        if name not in known:
            path = weights_file(name)
            try:
                known[name] = file_sha256(path) if path is not None else None
            except OSError:
                known[name] = None
        return known[name]

    return sha256


def other_weights(root: Path, call: Call, weights: Weights) -> Stale:
    """Features of the call's slides, at any resolution, that were made with other weights than the encoders of that
    name have now."""
    found, paths, outcomes = Stale(), JobPaths(root), read_outcomes(root)
    extract = call.settings.extract
    asked = dict.fromkeys(name for spec in call.settings.tile.specs for name in extract.encoders_of(spec.label))
    # Those that are drawn have a name of their own.
    names = {slug_of(name): name for name in asked if not (extract.random_weights and draws_weights(name))}
    if not outcomes or not names:
        return found
    marks = marks_of(paths)
    for entry in call.entries:
        try:
            held = _weights_of(entry.slide_id, names.keys(), marks.get(entry.slide_id), paths)
        except UNSEEN:
            continue
        others = {
            f"weights of {name} {made[:12]} -> {now[:12]}"
            for slug, name in names.items()
            for made in held.get(slug, ())
            if (now := weights(name)) and made != now[: len(made)]
        }
        if others:
            found.what.setdefault("features", set()).add(entry.slide_id)
            found.why |= dict.fromkeys(sorted(others))
            found.seconds += seconds_of(outcomes.get(entry.slide_id), {"features": ()})
    if found.what:
        found.remedies.append(f"put the earlier weights back (features of {_named(sorted(found.slides))})")
    return found


def _weights_of(slide_id: str, slugs: Collection[str], mark: Mark | None, paths: JobPaths) -> dict[str, set[str]]:
    """Encoder's slug -> hashes of the weights that a slide's features were made with, or their first characters."""
    found: dict[str, set[str]] = {}
    for place, sha256 in (mark.weights if mark is not None else {}).items():
        found.setdefault(place.partition("/")[2], set()).add(sha256)
    # All resolutions of one encoder have one hash: else the call that made them would have been refused.
    if found.keys() >= set(slugs):
        return found
    bag = paths.bag(slide_id)
    if bag.is_file():
        for own in read_guarded(read_header, bag).features.values():
            for slug, item in own.items():
                if item.weights != RANDOM:
                    found.setdefault(slug, set()).add(item.weights_sha256)
    for path in paths.features(slide_id, "x", "x").parent.glob("*.h5"):
        if is_feature_file_of_ours(path):
            held = read_guarded(read_feature_header, path)
            found.setdefault(held.slug, set()).add(held.features.weights_sha256)
    return found
