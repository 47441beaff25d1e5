"""Whether finished work fits what is wanted now: just so, as an earlier version would have made it, or not.

A stage's fingerprint holds the version of the stage beside the slide and the settings. What an earlier version made is
told from what other settings made by computing the fingerprint again with the earlier version: all that differs then is
the version. Files say what they were made with (``made_with``, and ``settings`` of a mask); those of version 0.1.0 say
less, and what they do not say is tried.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wsi_pipe.bag import BagAttrs, FeatureHeader
from wsi_pipe.config import ExtractSettings, SegmentSettings, TileSettings, fingerprint, to_mapping
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.geometry import IntPair, TileGrid
from wsi_pipe.job import fingerprints as versions
from wsi_pipe.job.fingerprints import features_fingerprint
from wsi_pipe.slides.base import ReadStats, Slide
from wsi_pipe.slides.opening import READERS
from wsi_pipe.slides.storage.source import FileSource, is_url, slide_fingerprint, slide_fingerprints

__all__ = [
    "FIRST_TILE_SETTINGS",
    "Fit",
    "Identity",
    "differences",
    "features_fit",
    "file_content",
    "grids_fit",
    "grids_record",
    "in_order",
    "mask_fit",
    "mask_record",
    "record_of",
    "segment_fingerprint",
    "shown",
    "tile_fingerprint",
]

FIRST_TILE_SETTINGS = (
    "resolutions", "tile_px", "overlap_px", "min_tissue", "judge_um", "mpp_tolerance", "max_upsampling",
    "allow_upsampling",
)  # fmt: skip
"""Of version 0.1.0, whose files do not say which settings their grids were laid with."""

MOST_TABLES = 1 << 10
"""Level tables that are tried to tell whether a file is the one that an earlier version read."""


@dataclass(frozen=True)
class Fit:
    """same: just what would be made now. older: what an earlier version made of the same, with the same settings.
    other: of another slide, or with other settings; why: which, in words."""

    kind: Literal["same", "older", "other"]
    why: tuple[str, ...] = ()


class Identity:
    """What a slide's file is known by: its fingerprint, and those that earlier versions may have given it.

    They differ where a later version finds other levels in a file: the file is the same all the same.
    """

    def __init__(self, slide: Slide, path: str) -> None:
        self.now = slide.info.fingerprint
        self._path = path
        self._stats = slide.stats
        self._sizes = [level.size_px for level in slide.pyramid.levels]
        self._known: list[str] = []
        self._older: tuple[str, ...] | None = None
        self._content: str | None = None

    def fingerprints(self) -> Iterator[str]:
        """That of now first; the others are worked out only when they are asked for."""
        yield self.now
        yield from self._known
        if self._older is None:
            self._older = tuple(self._with_other_tables())
        yield from self._older

    def knows(self, attrs: BagAttrs) -> bool:
        """Whether a bag or a tile file was made of this very file."""
        if attrs.slide_fingerprint == self.now:
            return True
        content = str(record_of(attrs).get("file", ""))
        if content and content == self.content:
            self._known.append(attrs.slide_fingerprint)
        if content:
            return content == self.content
        return attrs.slide_fingerprint in self.fingerprints()

    @property
    def content(self) -> str:
        """SHA-256 over the file's size and ends alone, "" of what is not one local file."""
        if self._content is None:
            self._content = file_content(self._path, self._stats)
        return self._content

    def _with_other_tables(self) -> Iterator[str]:
        if is_url(self._path) or not Path(self._path).is_file() or not self._sizes:
            return
        first, *rest = self._sizes
        tables: list[list[IntPair]] = [
            [first, *some] for count in range(len(rest)) for some in itertools.combinations(rest, count)
        ]
        with closing(FileSource(self._path, self._stats)) as source:
            yield from slide_fingerprints([source], tables[:MOST_TABLES])


def file_content(path: str, stats: ReadStats | None = None) -> str:
    """SHA-256 over a file's size and ends, "" of what is not one local file. Raises OSError where it cannot be read."""
    if is_url(path) or not Path(path).is_file():
        return ""
    with closing(FileSource(path, ReadStats() if stats is None else stats)) as source:
        return slide_fingerprint([source], [])


def record_of(attrs: BagAttrs) -> Mapping[str, Any]:
    """What a bag or a tile file says that its grids were made with; empty of version 0.1.0."""
    try:
        record = json.loads(attrs.made_with) if attrs.made_with else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def shown(value: object) -> str:
    """A setting's value in a message."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        # Two numbers of one thing, as um per pixel in x and y, or a list.
        pair = len(value) == 2 and all(isinstance(item, float) for item in value)
        return ("x" if pair else ", ").join(shown(item) for item in value) if value else "none"
    return "none" if value is None else str(value)


def differences(made: Mapping[str, Any], wanted: object) -> tuple[str, ...]:
    """Settings that differ, as "min_tissue 0.25 -> 0.9". What was not a setting then counts as its default."""
    defaults = to_mapping(type(wanted)())
    now = to_mapping(wanted)
    names = {name: (made.get(name, defaults.get(name)), now.get(name)) for name in now | defaults}
    return tuple(f"{name} {shown(old)} -> {shown(new)}" for name, (old, new) in names.items() if old != new)


def mask_fit(
    own: Mapping[str, Any],
    identity: Identity,
    mpp: Sequence[float],
    reader: str,
    how: Mapping[str, Any],
    settings: SegmentSettings,
) -> Fit:
    """Of a stored mask. own: what its GeoJSON says of itself. how: what the stage would use now."""
    stored = own.get("fingerprint")
    made = own["made_with"] if isinstance(own.get("made_with"), dict) else {}
    made_how = own["settings"] if isinstance(own.get("settings"), dict) else how
    made_mpp = tuple(made.get("mpp", mpp))
    readers = [made["reader"]] if "reader" in made else list(dict.fromkeys((reader, *READERS)))
    for slide in identity.fingerprints():
        for version, made_reader in itertools.product(range(versions.SEGMENT_VERSION, 0, -1), readers):
            if fingerprint("segment", version, slide, made_mpp, made_reader, made_how) != stored:
                continue
            why = [] if made_mpp == tuple(mpp) else [f"mpp {shown(made_mpp)} -> {shown(mpp)}"]
            why += [] if made_reader == reader else [f"reader {made_reader} -> {reader}"]
            why += _differences_of_how(made_how, how, settings)
            if why:
                return Fit("other", tuple(why))
            return Fit("same" if version == versions.SEGMENT_VERSION and slide == identity.now else "older")
    return Fit("other", ("the slide's file or its um per pixel is another",))


def _differences_of_how(made: Mapping[str, Any], wanted: Mapping[str, Any], settings: SegmentSettings) -> list[str]:
    if ("mask" in made) != ("mask" in wanted):
        return ["a mask of the user's -> tissue that is found" if "mask" in made else "tissue found -> a mask given"]
    if made.get("mask") != wanted.get("mask"):
        return ["another mask is given"]
    why = [] if "mask" in wanted else list(differences(made.get("settings", {}), settings))
    # Files of version 0.1.0 say nothing of the frame.
    unsaid = set() if "frame" in made else {"frame"}
    others = sorted((made.keys() | wanted.keys()) - {"mask", "settings"} - unsaid)
    return why + [f"{name} {shown(made.get(name))} -> {shown(wanted.get(name))}" for name in others
                  if made.get(name) != wanted.get(name)]  # fmt: skip


def segment_fingerprint(slide: str, mpp: Sequence[float], reader: str, how: Mapping[str, Any]) -> str:
    """Of a mask. slide: the file's fingerprint. how: the mask given, or the settings by which tissue is found."""
    return fingerprint("segment", versions.SEGMENT_VERSION, slide, mpp, reader, how)


def tile_fingerprint(
    segment: str, content: str, settings: TileSettings | Mapping[str, Any], version: int | None = None
) -> str:
    """Of grids. segment: fingerprint of their mask; content: SHA-256 of its pixels. version: by default that of now."""
    plain = to_mapping(in_order(settings)) if isinstance(settings, TileSettings) else settings
    return fingerprint("tile", versions.TILE_VERSION if version is None else version, segment, content, plain)


def in_order(settings: TileSettings) -> TileSettings:
    """The settings with resolutions in one order: in which they were given makes no difference."""
    return dataclasses.replace(settings, resolutions=tuple(sorted(settings.resolutions)))


def mask_record(mpp: Sequence[float], reader: str, package: str) -> dict[str, Any]:
    """What a mask's GeoJSON says that it was made with, beside the settings."""
    return {"wsi_pipe": package, "version": versions.SEGMENT_VERSION, "mpp": list(mpp), "reader": reader}


def grids_record(content: str, settings: TileSettings, identity: Identity, package: str) -> str:
    """JSON text for ``BagAttrs.made_with``."""
    record = {
        "wsi_pipe": package,
        "file": identity.content,
        "tile": {"version": versions.TILE_VERSION, "mask": content, "settings": to_mapping(in_order(settings))},
    }
    return json.dumps(record, sort_keys=True)


def grids_fit(
    attrs: BagAttrs,
    grids: Sequence[TileGrid],
    segment: str,
    content: str,
    settings: TileSettings,
    *,
    mask_is_older: bool,
) -> Fit:
    """Of stored grids, at the resolutions that they have: which are asked for now is not looked at.

    segment, content: fingerprint and pixels' SHA-256 of the mask that is there. mask_is_older: an earlier version made
    it, and may have drawn its pixels a little otherwise.
    """
    held = tuple(sorted(grid.spec.mpp for grid in grids))
    wanted = dataclasses.replace(settings, resolutions=held)
    if attrs.fingerprint_segment != segment:
        return Fit("other", ("another tissue mask",))
    record = record_of(attrs).get("tile")
    if isinstance(record, dict):
        version = int(record["version"])
        own = tile_fingerprint(segment, record["mask"], record["settings"], version)
        if own != attrs.fingerprint_tile:
            return Fit("other", ("what they say of themselves does not belong to them",))
        why = differences(record["settings"], wanted)
        if record["mask"] != content and not mask_is_older:
            why = ("another tissue mask", *why)
        if why:
            return Fit("other", why)
        return Fit("same" if version == versions.TILE_VERSION and not mask_is_older else "older")
    first = {name: value for name, value in to_mapping(wanted).items() if name in FIRST_TILE_SETTINGS}
    later = {name: value for name, value in to_mapping(wanted).items() if name not in FIRST_TILE_SETTINGS}
    why = differences(to_mapping(TileSettings()) | first, wanted) if later else ()
    for version in range(versions.TILE_VERSION, 0, -1):
        for order in itertools.permutations(held) if len(held) < 6 else (held, held[::-1]):
            made = first | {"resolutions": order}
            if tile_fingerprint(segment, content, made, version) == attrs.fingerprint_tile:
                if why:
                    return Fit("other", why)
                return Fit("same" if version == versions.TILE_VERSION and not mask_is_older else "older")
    visible = [
        (name, old, new)
        for grid in grids
        for name, old, new in (
            ("tile_px", grid.spec.size_px, settings.tile_px),
            ("overlap_px", grid.spec.overlap_px, settings.overlap_px),
            ("min_tissue", grid.min_tissue, settings.min_tissue),
        )
        if old != new
    ]
    if not visible and not why and mask_is_older:
        # The mask is the same, but this version may draw its pixels otherwise, so that no fingerprint can fit.
        return Fit("older")
    seen = dict.fromkeys(f"{name} {shown(old)} -> {shown(new)}" for name, old, new in visible)
    return Fit("other", (*seen, *why) or ("other settings of tiles",))


def features_fit(held: FeatureHeader, source: str, reader: str, info: EncoderInfo, settings: ExtractSettings) -> Fit:
    """Of stored features. source: fingerprint of their grid (``grid_fingerprint``).

    Layers that are stored and not asked for now do no harm. "auto" is whatever precision they were made with: another
    machine must not make the work of this one stale.
    """
    precision = held.precision if settings.precision == "auto" else info.precision
    lacking = set(settings.layers) - set(held.layers)
    why = []
    if held.weights_sha256 != info.weights_sha256:
        why.append(f"weights {held.weights_sha256[:12]} -> {info.weights_sha256[:12]}")
    if held.precision != precision:
        why.append(f"precision {held.precision} -> {precision}")
    if lacking:
        why.append(f"layers {_listed(held.layers)} -> {_listed(settings.layers)}")
    if why:
        return Fit("other", tuple(why))
    for version, layers in itertools.product(
        range(versions.EXTRACT_VERSION, 0, -1), _orders(settings.layers, held.layers)
    ):
        own = features_fingerprint(
            source,
            reader,
            encoder=info.name,
            weights_sha256=info.weights_sha256,
            precision=precision,
            transform=info.transform,
            dim=info.dim,
            layers=layers,
            dtype=settings.dtype,
            version=version,
        )
        if own == held.fingerprint:
            return Fit("same" if version == versions.EXTRACT_VERSION else "older")
    return Fit("other", ("other numbers, pixels or settings of the encoder",))


def _orders(asked: tuple[int, ...], held: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """In which orders the layers that are held may have been asked for: fingerprints hold them so, files sorted."""
    if set(asked) == set(held):
        yield asked
    yield from itertools.islice(itertools.permutations(held), 720)


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "none"
