"""What a job knows and does not tell: the files behind anonymised ids, and the secrets of URLs.

Both lie in JOB/private, which its owner alone can read: ``identities.csv``, a slide list with the real paths, and
``salt``. Everything else in the job is written without them, so a job is handed on by leaving this folder out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from wsi_pipe.errors import ConfigError, ManifestError, WsiPipeError, in_words
from wsi_pipe.files import atomic_path, output_error
from wsi_pipe.ids import same_name, without_suffix
from wsi_pipe.job.paths import JobPaths
from wsi_pipe.manifest import SlideEntry, is_url, manifest_text, read_manifest
from wsi_pipe.masking import MASK, has_secret, mask_secrets
from wsi_pipe.tables import read_table

__all__ = [
    "PRIVATE_SCHEME",
    "anonymised",
    "check_told",
    "hidden_slides",
    "job_salt",
    "load_identities",
    "public",
    "revealed",
    "told",
    "told_of",
    "write_identities",
]

PRIVATE_SCHEME = "private://"
"""What stands in place of an anonymised slide's path in the list that anybody may read."""

ID_HEX = 16
"""64 bits: two of a million slides share an id in one of 37 million archives."""

ORIGINALS = ("original_id", "original_case")


def job_salt(root: Path, given: Path | None = None) -> bytes:
    """The salt of an anonymised job: the one it has, else that of the file ``given``, else a new one.

    Raises ConfigError when the job has another salt than ``given``, or was made before and its salt is gone: slides
    would get other ids than they have.
    """
    paths = JobPaths(root)
    wanted = _read_salt(given) if given is not None and given.is_file() else None
    if paths.salt.is_file():
        own = _read_salt(paths.salt)
        if wanted is not None and wanted != own:
            raise ConfigError(f"{root}: was made with another salt than {given}", remedy="leave out --salt")
        return own
    if paths.slides.is_file():
        raise ConfigError(
            f"{root}: is an anonymised job without its folder private: it can be looked at, and not gone on with",
            remedy=f"put {paths.salt.parent} back, or make a new job",
        )
    if wanted is not None:
        return wanted
    made = secrets.token_hex(32)
    if given is not None:
        _write_private(given, made + "\n")
    return made.encode()


def _read_salt(path: Path) -> bytes:
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}", remedy="anonymised jobs are gone on with by who made them"
        ) from error
    if len(salt) < 16:
        raise ConfigError(f"{path}: a salt of {len(salt)} bytes is guessed", remedy="give a file with 16 or more")
    return salt


def _hashed(salt: bytes, name: str) -> str:
    # Slides and cases alike, so that a slide that is its own case still is: lrmil says then that no case is known. A
    # letter in front, since a spreadsheet takes 12e4567890123456 for a number.
    return "x" + hmac.new(salt, same_name(name).encode(), hashlib.sha256).hexdigest()[:ID_HEX]


def anonymised(entries: Iterable[SlideEntry], salt: bytes) -> list[SlideEntry]:
    """The entries under ids from a salted hash (HMAC-SHA256) of their own; equal cases get equal ids.

    ``hides`` of each holds its own id, its own case, and the names that must not be told.
    """
    found = []
    for entry in entries:
        if entry.hides:
            # A mask may have been given since.
            found.append(dataclasses.replace(entry, hides=(*entry.hides[:2], *_names(entry))))
            continue
        found.append(
            dataclasses.replace(
                entry,
                slide_id=_hashed(salt, entry.slide_id),
                case_id=_hashed(salt, entry.case_id),
                hides=(entry.slide_id, entry.case_id, *_names(entry)),
            )
        )
    return found


def _names(entry: SlideEntry) -> list[str]:
    """Whatever a message may call the slide's files: paths, folders, names and stems."""
    names = []
    for value in (entry.path, entry.mask, getattr(entry, "annotations", None)):
        if value:
            last = re.split(r"[?#]", value, maxsplit=1)[0].rstrip("/").rpartition("/")[2] if is_url(value) else ""
            last = last or os.path.basename(value)
            names += [value, mask_secrets(value), os.path.dirname(value), last, without_suffix(last)]
            names.append(os.path.splitext(last)[0])
            if not is_url(value):
                names.append(os.path.realpath(value))
    return list(dict.fromkeys(names))


MOST_INSIDE = 10_000


def _names_inside(path: str) -> list[str]:
    """Names and stems of the files that a slide of several is made of, which messages name as well."""
    if is_url(path):
        return []
    folder = os.path.dirname(path) if path.lower().endswith((".dcm", ".ome.tif", ".ome.tiff")) else path
    try:
        with os.scandir(folder) as found:
            names = [item.name for item in islice(found, MOST_INSIDE) if item.is_file()]
    except OSError:
        return []
    return [part for name in names for part in (name, os.path.splitext(name)[0])]


def revealed(entries: Iterable[SlideEntry]) -> list[SlideEntry]:
    """The inverse of ``anonymised``, for naming new slides beside those that a job holds."""
    return [
        dataclasses.replace(entry, slide_id=entry.hides[0], case_id=entry.hides[1], hides=()) if entry.hides else entry
        for entry in entries
    ]


def public(entry: SlideEntry) -> SlideEntry:
    """An entry as anybody may read it: without what it hides, and without the secrets of its URL."""
    if not entry.hides:
        return dataclasses.replace(entry, path=entry.shown_path) if has_secret(entry.path) else entry
    gone = {name: None for name in ("mask", "annotations") if hasattr(entry, name)}
    return dataclasses.replace(entry, path=PRIVATE_SCHEME + entry.slide_id, hides=(), **gone)  # type: ignore[arg-type]


def check_told(entry: SlideEntry) -> None:
    """Raise ManifestError for an entry of which only the public half is known: it cannot be opened."""
    if entry.path.startswith(PRIVATE_SCHEME) or (is_url(entry.path) and MASK in entry.path):
        raise ManifestError(
            f"{entry.slide_id}: where its file lies stands in the job's private/identities.csv, which is not there or "
            "belongs to another user",
            remedy="let who made the job go on with it, or name the slides again",
        )


def write_identities(root: Path, entries: Sequence[SlideEntry], salt: bytes | None) -> None:
    """Note what the public list leaves out, and the salt, for the owner's eyes. Raises OutputError.

    Raises ConfigError when the job got another salt meanwhile, from a run that began at the same time.
    """
    paths = JobPaths(root)
    kept = [entry for entry in entries if entry.hides or has_secret(entry.path)]
    if salt is not None and not paths.salt.is_file():
        _write_private(paths.salt, salt.decode() + "\n")
    elif salt is not None and _read_salt(paths.salt) != salt:
        raise ConfigError(f"{root}: another run made this job meanwhile", remedy="run again")
    if kept or paths.identities.is_file():
        more = {name: [e.hides[i] if e.hides else "" for e in kept] for i, name in enumerate(ORIGINALS)}
        _write_private(paths.identities, manifest_text(kept, more))


def _write_private(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    with atomic_path(path) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)


def load_identities(root: Path, *, strict: bool = False) -> dict[str, SlideEntry]:
    """The entries that the public list tells in part only, by id; none where the file is not there or not ours.

    strict: raise ManifestError where it is there and cannot be read, since writing it anew would lose it.
    """
    path = JobPaths(root).identities
    try:
        with open(path, "rb") as handle:
            if handle.read(1) == b"":
                return {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        if not strict:
            return {}
        raise ManifestError(
            f"{path}: {error.strerror or error}", remedy="let who made the job go on with it"
        ) from error
    table = read_table(path, "list of identities")
    if not table.rows:
        return {}
    places = [table.find(name) for name in ORIGINALS]
    entries = read_manifest(path, own=True)
    found = {}
    for entry, (_, cells) in zip(entries, table.rows, strict=True):
        original, case = (cells[place] if place is not None else "" for place in places)
        hides = (original, case, *_names(entry)) if original else ()
        found[entry.slide_id] = dataclasses.replace(entry, hides=hides)
    return found


def hidden_slides(root: Path) -> list[SlideEntry]:
    """The slides of a job whose files its bags do not tell; none where ``root`` is no such job of ours."""
    return list(load_identities(root).values())


def told_of(entry: SlideEntry, error: Exception) -> tuple[str, str | None]:
    """``in_words``, without what the entry hides."""
    reason, remedy = in_words(error)
    if entry.hides and not isinstance(error, WsiPipeError):
        # The text of an error of other libraries may quote whatever stands in the file.
        return f"{type(error).__name__}, whose text is left out: this job is anonymised", remedy
    return told(entry, reason), told(entry, remedy) if remedy else remedy


def told(entry: SlideEntry, text: str) -> str:
    """``text`` without the names that the entry hides; in their place stands its id.

    Of what a message quotes, which may be metadata of the file, and of long numbers, which may be dates or numbers of
    patients, nothing is left either.
    """
    if not entry.hides or not text:
        return text
    for name in sorted({*entry.hides, *_names_inside(entry.path)}, key=len, reverse=True):
        if len(name) > 2:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", entry.slide_id, text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![\w.])(?:/[^\s/'\",:;()]+){2,}/?", "(path)", text)
    text = re.sub(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"", "(left out)", text)
    return re.sub(r"(?<![A-Za-z\d])\d{6,}(?![A-Za-z\d])", "(left out)", text)
