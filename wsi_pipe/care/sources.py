"""Whether what bags were made of is still the same: the slide's file, and the files of encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from wsi_pipe.bag import BagHeader
from wsi_pipe.config import JobSettings
from wsi_pipe.encoders.naming import is_lr_file, slug_of
from wsi_pipe.errors import in_words
from wsi_pipe.job.prepare import open_entry
from wsi_pipe.manifest import SlideEntry, is_url

__all__ = ["Sources"]


class Sources:
    """The slides and encoder files of a job as they are now. An encoder's file is read once, however many bags.

    What is not there any more is not held against a bag: slides may be put away once their features are made. Slides
    behind URLs are not asked for.
    """

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._hashes: dict[Path, str | None] = {}

    def changes(self, bag: BagHeader, entry: SlideEntry) -> Iterator[str]:
        """What a bag was made of that is another by now; the next run makes just that anew."""
        now = self._slide_now(entry)
        if now is not None and now[0] != bag.attrs.slide_fingerprint:
            yield f"its slide {entry.path} {now[1]} since: run again"
        for grid in bag.grids:
            weights = {slug: header.weights_sha256 for slug, header in bag.features[grid.label].items()}
            for name in self._settings.extract.encoders_of(grid.label):
                path = _file_of(name)
                held = weights.get(slug_of(name))
                if path is None or held is None:
                    continue
                sha256 = self._sha256(path)
                if sha256 is not None and sha256 != held:
                    yield f"{grid.label}: {path} holds other weights than those of its features: run again"

    def _slide_now(self, entry: SlideEntry) -> tuple[str, str] | None:
        """The fingerprint of the slide's file and what is to be said where it is another; None where there is none."""
        if is_url(entry.path) or not Path(entry.path).exists():
            return None
        try:
            slide = open_entry(entry, self._settings.reader, self._settings.cache)
        except Exception as error:
            # As in a run, an error that nobody foresaw is its slide's own. It opened when the bag was made.
            return "", f"was changed and does not open ({in_words(error)[0]})"
        try:
            return slide.info.fingerprint, "was replaced or changed"
        finally:
            slide.close()

    def _sha256(self, path: Path) -> str | None:
        if path not in self._hashes:
            try:
                with open(path, "rb") as handle:
                    self._hashes[path] = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError:
                self._hashes[path] = None
        return self._hashes[path]


def _file_of(name: str) -> Path | None:
    """The file that an encoder's name points at: an LR encoder's, or the weights behind an "@"."""
    if is_lr_file(name):
        return Path(name)
    _, _, checkpoint = name.partition("@")
    return Path(checkpoint) if checkpoint else None
