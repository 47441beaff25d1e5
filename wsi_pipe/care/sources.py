"""Whether what bags were made of is still the same: the slide's file, its annotations, and the files of encoders."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wsi_pipe.bag import BagHeader, read_header
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.naming import is_lr_file, slug_of, split_stain
from wsi_pipe.errors import BagError, in_words
from wsi_pipe.job.annotate import stored_annotation
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.job.replaced import is_made_of
from wsi_pipe.manifest import SlideEntry, is_url

__all__ = ["SourceReport", "Sources"]

GONE = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True)
class SourceReport:
    """changes: what is another by now, so that the next run makes something anew. remarks: what could not be compared,
    and why; that says nothing of the bag."""

    changes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Sources:
    """The slides, annotations and encoder files of a job as they are now. A file is read once, however many bags.

    What is not there any more is not held against a bag: slides may be put away once their features are made. Slides
    behind URLs are not asked for.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._hashes: dict[Path, str | OSError] = {}

    def compare(self, bag: BagHeader, entry: SlideEntry) -> SourceReport:
        """What a bag was made of beside what is there now."""
        found = [*self._of_slide(bag, entry), *self._of_annotations(bag, entry), *self._of_encoders(bag)]
        return SourceReport(
            tuple(text for changed, text in found if changed), tuple(text for changed, text in found if not changed)
        )

    def changes_of_slide(self, entry: SlideEntry, paths: JobPaths) -> tuple[str, ...]:
        """What changed of a slide's file since its work was made; none where that does not show."""
        for path in (paths.bag(entry.slide_id), paths.tiles(entry.slide_id)):
            try:
                bag = read_guarded(read_header, path)
            except BagError:
                continue
            return tuple(text for changed, text in self._of_slide(bag, entry) if changed)
        return ()

    def _of_slide(self, bag: BagHeader, entry: SlideEntry) -> Iterator[tuple[bool, str]]:
        """Whether it is a change, and what is to be said."""
        if is_url(entry.path):
            return
        path = Path(entry.path).absolute()
        try:
            os.stat(path)
        except GONE:
            return
        except OSError as error:
            yield False, f"{_slide(entry)} cannot be looked at ({error.strerror}): not compared"
            return
        try:
            here = dataclasses.replace(entry, path=str(path))
            same = is_made_of(bag.attrs, here, self._settings.reader, self._settings.cache)
        except Exception as error:
            # As in a run, an error that nobody foresaw is its slide's own. It opened when the bag was made, but a mount
            # that is lost or a library that is missing keeps it shut as much as a change does.
            yield False, f"{_slide(entry)} cannot be opened ({in_words(error)[0]}): not compared"
            return
        if not same:
            yield True, f"{_slide(entry)} was replaced or changed since: run --redo makes it anew"

    def _of_annotations(self, bag: BagHeader, entry: SlideEntry) -> Iterator[tuple[bool, str]]:
        if entry.annotations is None:
            return
        sha256 = self._sha256(Path(entry.annotations))
        if isinstance(sha256, OSError):
            if not isinstance(sha256, GONE):
                yield (
                    False,
                    f"its annotations {entry.annotations} cannot be looked at ({sha256.strerror}): not compared",
                )
        elif sha256 != stored_annotation(bag.attrs.annotation).get("sha256"):
            yield True, f"its annotations {entry.annotations} are others by now: run again"

    def _of_encoders(self, bag: BagHeader) -> Iterator[tuple[bool, str]]:
        for grid in bag.grids:
            weights = {slug: header.weights_sha256 for slug, header in bag.features[grid.label].items()}
            for name in self._settings.extract.encoders_of(grid.label):
                path = _file_of(name)
                held = weights.get(slug_of(name))
                if path is None or held is None:
                    continue
                sha256 = self._sha256(path)
                if isinstance(sha256, OSError):
                    if not isinstance(sha256, GONE):
                        yield False, f"{grid.label}: {path} cannot be looked at ({sha256.strerror}): not compared"
                elif sha256 != held:
                    what = f"{path} holds other weights than those of its features"
                    yield True, f"{grid.label}: {what}: run --redo makes them anew"

    def _sha256(self, path: Path) -> str | OSError:
        if path not in self._hashes:
            try:
                with open(path, "rb") as handle:
                    self._hashes[path] = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                self._hashes[path] = error
        return self._hashes[path]


def _slide(entry: SlideEntry) -> str:
    """The slide as it may be named: in an anonymised job its path is not told."""
    return " ".join(part for part in ("its slide", entry.shown_path) if part)


def _file_of(name: str) -> Path | None:
    """The file that an encoder's name points at: an LR encoder's, or the weights behind an "@"."""
    name, _ = split_stain(name)
    if is_lr_file(name):
        return Path(name)
    _, _, checkpoint = name.partition("@")
    return Path(checkpoint) if checkpoint else None
