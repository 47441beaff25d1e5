"""What a call asks for: settings, slides and where work runs, from values by the names of the command line's options.

The command line and ``wsi_pipe.Job`` ask alike. An option that is not given is None or absent: then the settings file,
the job's own settings or the default decide. ``say`` is told what is to be known of how the values were understood.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wsi_pipe.config import (
    CacheSettings,
    ExtractSettings,
    JobSettings,
    SegmentSettings,
    TileSettings,
    call_only_in,
    load_toml,
)
from wsi_pipe.encoders.naming import is_lr_file, split_stain, with_stain
from wsi_pipe.errors import ConfigError, ManifestError
from wsi_pipe.execute import Where
from wsi_pipe.geometry import MPP_BOUNDS, in_mpp_bounds, level_label, parse_resolution
from wsi_pipe.job.private import anonymised, check_told, revealed
from wsi_pipe.job.record import load_settings, load_slides, read_outcomes
from wsi_pipe.manifest import SlideEntry, collect_slides
from wsi_pipe.override import changed, parse_changes, refuse_twice
from wsi_pipe.shards import Shard, parse_shard
from wsi_pipe.slides.passed_over import PassedOver

__all__ = [
    "Say",
    "absolute_file",
    "collect_entries",
    "parse_encoders",
    "parse_mpp",
    "settings_from",
    "where_from",
    "with_regions",
]

Say = Callable[[str], object]
"""Takes a line that is to be told to the user."""

ENDINGS = (".geojson", ".json")
NONE = "none"
"""What takes away what an earlier run was given."""


def settings_from(values: Mapping[str, Any], job: Path | None, config: Path | None, say: Say) -> JobSettings:
    """Settings from options, over the settings file, over the job's own, over the defaults.

    Raises ConfigError when one is refused.
    """
    base = load_toml(JobSettings, config) if config else (job and load_settings(job)) or JobSettings()
    source = config or (job / "config.toml" if job else None)
    for name in call_only_in(JobSettings, source) if source else ():
        option = "--" + name.rpartition(".")[2].replace("_", "-")
        say(f"note: {name} in {config or 'the job'} is ignored: {option} is said in each call")
    changes = tuple(values.get("changes") or ())
    base = changed(base, changes, example="segment.stain_min=0.02")
    if any(keys[:2] == ("extract", "encoders") for keys, _ in parse_changes(changes)):
        named = {label: tuple(map(absolute_file, names)) for label, names in base.extract.encoders.items()}
        base = dataclasses.replace(base, extract=dataclasses.replace(base.extract, encoders=named))
    parts: dict[str, dict[str, Any]] = {"segment": {}, "tile": {}, "extract": {}}
    for name, value in values.items():
        stage, _, item = name.partition("_")
        if stage in parts and item and value is not None:
            parts[stage][item] = value
    if values.get("resolutions"):
        parts["tile"]["resolutions"] = tuple(values["resolutions"])
    if values.get("encoders"):
        parts["extract"]["encoders"] = parse_encoders(values["encoders"])
    elif values.get("resolutions"):
        # Encoders of resolutions that are not asked for now are none of this call's.
        labels = {"*", *map(level_label, values["resolutions"])}
        own = {label: names for label, names in base.extract.encoders.items() if label in labels}
        parts["extract"] |= {"encoders": own} if own else {}
    if values.get("devices"):
        parts["extract"]["devices"] = tuple(part.strip() for part in values["devices"].split(","))
    if values.get("layers"):
        parts["extract"]["layers"] = _layers(values["layers"])
    _refuse_twice(changes, parts, values)
    try:
        settings = dataclasses.replace(
            base,
            segment=_replaced(base.segment, parts["segment"]),
            tile=_replaced(base.tile, parts["tile"]),
            extract=_replaced(base.extract, parts["extract"]),
            reader=values.get("reader") or base.reader,
            cache=_cache(base.cache, values),
            anonymise=_anonymise(values.get("anonymise"), base, job),
            primary=_primary(values, base),
            redo=bool(values.get("redo")),
        )
    except TypeError as error:
        raise ConfigError(f"options: {error}") from error
    if values.get("normalise"):
        settings = _normalised(settings, values["normalise"], say)
    _check_encoder_levels(settings)
    return settings


def _normalised(settings: JobSettings, method: str, say: Callable[[str], object]) -> JobSettings:
    """The settings with that stain normalisation behind every encoder's name; LR encoders stay as they are."""
    encoders = settings.extract.encoders
    for name in dict.fromkeys(name for names in encoders.values() for name in names):
        if is_lr_file(name) and method != "none":
            say(f"note: {name} was distilled from tiles as they are, and gets them so: --normalise is not for it")
    named = {
        label: tuple(dict.fromkeys(name if is_lr_file(name) else with_stain(name, method) for name in names))
        for label, names in encoders.items()
    }
    return dataclasses.replace(settings, extract=dataclasses.replace(settings.extract, encoders=named))


def _refuse_twice(changes: tuple[str, ...], parts: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any]) -> None:
    """Raises ConfigError where --set and an option of its own say the same setting."""
    own = {f"{stage}.{name}" for stage, names in parts.items() for name in names}
    if not values.get("encoders"):
        # Those that are left of the job's, not said in this call.
        own.discard("extract.encoders")
    others = {"reader": "reader", "anonymise": "anonymise", "cache_dir": "cache.folder", "cache_size": "cache.gib"}
    own |= {key for name, key in others.items() if values.get(name) is not None}
    refuse_twice(changes, own)


def _anonymise(asked: bool | None, base: JobSettings, job: Path | None) -> bool:
    """Whether the job is anonymised. Raises ConfigError where it was made the other way."""
    own = load_settings(job) if job else None
    wanted = asked if asked is not None else base.anonymise or bool(own and own.anonymise)
    if own is not None and wanted != own.anonymise:
        why = (
            "with --anonymise: without it, names would stand beside the ids that hide them"
            if own.anonymise
            else "without --anonymise: what it holds already names its slides"
        )
        raise ConfigError(f"{job}: was made {why}", remedy="make a new job with --out")
    return wanted


def _primary(values: Mapping[str, Any], base: JobSettings) -> str | None:
    """The label of ``--primary``, else as before. Raises ConfigError for a resolution that no bag would have."""
    asked = values.get("primary")
    if asked is None:
        return base.primary
    known = {level_label(mpp) for mpp in (*(values.get("resolutions") or ()), *base.tile.resolutions)}
    if level_label(asked) not in known:
        raise ConfigError(
            f"--primary {level_label(asked)} is none of the resolutions {', '.join(sorted(known))}",
            remedy=f"add -r {level_label(asked)}",
        )
    return level_label(asked)


def _cache(base: CacheSettings, values: Mapping[str, Any]) -> CacheSettings:
    folder = values.get("cache_dir")
    return CacheSettings(str(folder.absolute()) if folder else base.folder, values.get("cache_size") or base.gib)


T = TypeVar("T", SegmentSettings, TileSettings, ExtractSettings)


def _replaced(base: T, changes: Mapping[str, Any]) -> T:
    return dataclasses.replace(base, **changes) if changes else base


def parse_encoders(given: tuple[str, ...] | list[str]) -> dict[str, tuple[str, ...]]:
    """``("a", "5x=b")`` as ``{"*": ("a",), "5x": ("b",)}``; a resolution may be written 20x or 0.5um."""
    found: dict[str, list[str]] = {}
    for text in given:
        head, sign, name = text.partition("=")
        label = "*"
        if sign:
            try:
                label = level_label(parse_resolution(head))
            except ConfigError:
                # A model's own name or path may hold an equals sign.
                name = text
        else:
            name = text
        if not name.strip():
            raise ConfigError(f"--encoder {text!r} names no encoder", remedy="write NAME or 5x=NAME")
        found.setdefault(label, []).append(absolute_file(name.strip()))
    return {label: tuple(dict.fromkeys(names)) for label, names in found.items()}


def absolute_file(name: str) -> str:
    """An encoder whose weights are a file by its whole path: bags and settings name it, and are read elsewhere."""
    name, stain = split_stain(name)
    if stain is not None:
        return with_stain(absolute_file(name), stain)
    if is_lr_file(name):
        return str(Path(name).absolute())
    base, _, checkpoint = name.partition("@")
    return f"{base}@{Path(checkpoint).absolute()}" if checkpoint and Path(checkpoint).is_file() else name


def _check_encoder_levels(settings: JobSettings) -> None:
    labels = [spec.label for spec in settings.tile.specs]
    for label in settings.extract.encoders:
        if label != "*" and label not in labels:
            raise ConfigError(
                f"an encoder is given for {label}, but the grids are {', '.join(labels)}",
                remedy=f"add -r {label}, or name one of the grids",
            )


def _layers(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--layers {text!r} is not a list of numbers", remedy="write for example --layers 0,1,10"
        ) from error


def parse_mpp(text: str | None) -> tuple[float, float] | None:
    """``--slide-mpp`` as (x, y) um/px. Raises ConfigError when it is not one or two numbers that a microscope has."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.lower().split("x")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not in_mpp_bounds(values[0], values[-1]):
        bounds = f"{MPP_BOUNDS[0]:g} to {MPP_BOUNDS[1]:g} um/px"
        cause = f"is outside {bounds}" if len(values) in (1, 2) else "is not a resolution"
        raise ConfigError(f"--slide-mpp {text!r} {cause}", remedy="write um/px such as 0.2527, or 0.25x0.26")
    return (values[0], values[-1])


def collect_entries(
    values: Mapping[str, Any],
    job: Path | None = None,
    passed_over: PassedOver | None = None,
    *,
    salt: bytes | None = None,
    say: Say,
) -> list[SlideEntry]:
    """The slides that a command is to work on: those named, or those that the job holds already.

    What folders hold that looks like a slide and is not among them is told to ``say``, and put into ``passed_over``; so
    is what was assumed of slide lists. salt: of an anonymised job, whose slides get ids hashed with
    it. Raises ManifestError or ConfigError.
    """
    sources, manifest = values["sources"], values["manifest"]
    listed = load_slides(job) if job else []
    if sources or manifest:
        passed = PassedOver() if passed_over is None else passed_over
        notes: list[str] = []
        named = revealed(listed)
        entries = collect_slides(sources, manifest, job=named, passed_over=passed, notes=notes)
        for line in [*(f"note: {note}" for note in notes), *passed.lines()]:
            say(line)
    else:
        entries = listed
        if not entries:
            raise ManifestError("no slides are given", remedy="name slide files, folders, URLs or a CSV")
    mpp = parse_mpp(values.get("slide_mpp"))
    if mpp is None and values.get("override_mpp"):
        raise ConfigError("--override-mpp needs --slide-mpp", remedy="give the resolution with --slide-mpp")
    if mpp and values.get("override_mpp"):
        entries = [e if e.mpp and "mpp" in e.stated else e.stating(mpp=mpp) for e in entries]
    elif mpp:
        entries = [entry.stating(mpp_if_missing=mpp) for entry in entries]
    for name in ("scene", "z"):
        given = values.get(name)
        if given is not None:
            # What a list says of one slide goes first.
            entries = [e if name in e.stated else e.stating(**{name: given}) for e in entries]
    entries = with_regions(entries, values, say)
    if salt is not None:
        entries = anonymised(entries, salt)
    if job:
        for entry in entries:
            check_told(entry)
    if values.get("only"):
        wanted = set(values["only"])
        # Who made an anonymised job may call its slides by their own names.
        wanted |= {entry.slide_id for entry in entries if entry.hides and entry.hides[0] in wanted}
        wanted -= {entry.hides[0] for entry in entries if entry.hides}
        unknown = wanted - {entry.slide_id for entry in entries}
        if unknown:
            raise ManifestError(f"no slide has the id {', '.join(sorted(unknown))}", remedy="see wsi-pipe info for ids")
        entries = [entry for entry in entries if entry.slide_id in wanted]
    if values.get("shard"):
        entries = _of_shard(entries, parse_shard(values["shard"]), say)
    if values.get("retry_failed") and job:
        ends = read_outcomes(job)
        entries = [e for e in entries if e.slide_id in ends and ends[e.slide_id].status == "failed"]
    return entries[: values["limit"]] if values.get("limit") else entries


def _of_shard(entries: list[SlideEntry], shard: Shard, say: Say) -> list[SlideEntry]:
    """Those of one shard, by the ids that they have where nothing is hidden: each job hides them in its own way."""
    own = [entry for entry in entries if shard.holds(entry.hides[0] if entry.hides else entry.slide_id)]
    say(f"note: shard {shard} holds {len(own):,} of {len(entries):,} slides")
    return own


def where_from(values: Mapping[str, Any]) -> Where:
    """Where work runs. Raises ConfigError when the options do not fit together."""
    resources = None
    if values["resources"]:
        name, sign, amount = values["resources"].partition("=")
        try:
            resources = {name: float(amount)}
        except ValueError:
            sign = ""
        if not (sign and name):
            raise ConfigError(
                f"--resources {values['resources']!r} is not understood", remedy="write for example GPU=1"
            )
    if resources and not values["scheduler"]:
        raise ConfigError("--resources needs --scheduler", remedy="give the address of a Dask scheduler")
    if values["scheduler"] and values["workers"] > 1:
        raise ConfigError(
            "--workers and --scheduler are given", remedy="the scheduler knows its workers: leave out --workers"
        )
    wait_s = values.get("wait_workers")
    if wait_s is not None and not values["scheduler"]:
        raise ConfigError("--wait-workers needs --scheduler", remedy="give the address of a Dask scheduler")
    return Where(values["workers"], values["scheduler"], values["timeout"], resources=resources, wait_workers_s=wait_s)


def with_regions(entries: Sequence[SlideEntry], values: Mapping[str, Any], say: Say) -> list[SlideEntry]:
    """Slides with what these options say; the cells of a slide list go first.

    Raises ConfigError when a file is given for several slides, or a folder holds none for any of them.
    """
    found = list(entries)
    if values.get("mask"):
        if len(found) != 1:
            raise ConfigError(
                f"--mask is for one slide, {len(found)} are given", remedy="use the column mask of a CSV (--slides)"
            )
        found = [found[0].stating(mask=str(values["mask"].absolute()))]
    annotations: Path | None = values.get("annotations")
    if annotations is not None and str(annotations) == NONE and not annotations.exists():
        found = [entry.stating(annotations=None) for entry in found]
    elif annotations is not None:
        found = _annotated(found, annotations, say)
    classes = tuple(dict.fromkeys(name.strip() for name in values.get("tissue_class") or () if name.strip()))
    if classes == (NONE,):
        found = [entry.stating(tissue_class=()) for entry in found]
    elif classes:
        found = [entry.stating(tissue_class=classes) for entry in found]
        if not any(entry.annotations or entry.mask for entry in found):
            raise ConfigError("--tissue-class is given, but no annotations", remedy="give --annotations or --mask")
    if values.get("frame"):
        found = [e if "frame" in e.stated else e.stating(frame=values["frame"]) for e in found]
    return found


def _annotated(entries: Sequence[SlideEntry], where: Path, say: Say) -> list[SlideEntry]:
    if not where.is_dir():
        if len(entries) != 1:
            raise ConfigError(
                f"--annotations {where} is one file for {len(entries)} slides",
                remedy="give a folder with <slide_id>.geojson of each, or use the column annotations of a CSV",
            )
        return [entries[0].stating(annotations=str(where.absolute()))]
    files = {path.stem: path for path in sorted(where.iterdir(), reverse=True) if path.suffix.lower() in ENDINGS}
    found = [
        entry.stating(annotations=str(files[entry.slide_id].absolute())) if entry.slide_id in files else entry
        for entry in entries
    ]
    lacking = [entry.slide_id for entry in found if not entry.annotations]
    if len(lacking) == len(found):
        raise ConfigError(
            f"--annotations {where}: holds no file for any of the {len(found)} slides",
            remedy=f"name them by the slides' ids, such as {found[0].slide_id}.geojson",
        )
    spare = sorted(set(files) - {entry.slide_id for entry in entries})
    for what, names in (("slides without a file in it", lacking), ("files of no slide given", spare)):
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            say(f"--annotations {where}: {len(names):,} {what}: {', '.join(names[:5])}{more}")
    return found
