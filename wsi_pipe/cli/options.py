"""Options that several commands share, and the settings made of them.

An option that is not given is None: then the settings file, the job's own settings or the default decide.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from wsi_pipe.cli import messages
from wsi_pipe.cli.environment import from_environment
from wsi_pipe.cli.regions import region_options, with_regions
from wsi_pipe.config import (
    CacheSettings,
    ExtractSettings,
    JobSettings,
    SegmentSettings,
    TileSettings,
    call_only_in,
    load_toml,
)
from wsi_pipe.encoders.naming import is_lr_file
from wsi_pipe.errors import ConfigError, ManifestError
from wsi_pipe.execute import Where
from wsi_pipe.geometry import MPP_BOUNDS, in_mpp_bounds, level_label, parse_resolution
from wsi_pipe.job.private import anonymised, check_told, revealed
from wsi_pipe.job.record import load_settings, load_slides, read_outcomes
from wsi_pipe.manifest import SETTING_COLUMNS, SlideEntry, collect_slides
from wsi_pipe.override import changed, parse_changes, refuse_twice
from wsi_pipe.shards import Shard, parse_shard
from wsi_pipe.slides.passed_over import PassedOver

__all__ = [
    "RESOLUTION",
    "RESOLUTIONS",
    "changes_option",
    "changes_option_of",
    "collect_entries",
    "extract_options",
    "flat",
    "job_option",
    "parse_mpp",
    "part_options",
    "primary_option",
    "segment_options",
    "settings_from",
    "slide_options",
    "tile_options",
    "where_from",
    "where_options",
]

F = TypeVar("F", bound=Callable[..., Any])


class Resolution(click.ParamType[float]):
    """A resolution such as 20x or 0.5um, as um/px."""

    name = "RES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse, or fail with the remedy."""
        if isinstance(value, float):
            return value
        try:
            return parse_resolution(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


RESOLUTION = Resolution()


class Resolutions(click.ParamType[tuple[float, ...]]):
    """Resolutions such as 20x,5x, as um/px; with ``callback=flat`` an option that can be repeated gives one tuple."""

    name = "RES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse, or fail with the remedy."""
        if isinstance(value, tuple):
            return value
        return tuple(RESOLUTION.convert(part, param, ctx) for part in str(value).split(","))


def flat(ctx: click.Context, param: click.Parameter, value: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """All resolutions of an option, in their order."""
    return tuple(mpp for part in value for mpp in part)


RESOLUTIONS = Resolutions()


def changes_option_of(example: str, where: str = "") -> Callable[[F], F]:
    """--set, as ``wsi_pipe.override`` understands it. where: a sentence on where settings are listed."""
    return click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Any setting by its name in the settings file, such as {example}; repeatable. {where}".strip(),
    )


def changes_option(function: F) -> F:
    """--set of a job's settings."""
    return changes_option_of("segment.stain_min=0.02", "wsi-pipe init lists them.")(function)


def _stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def slide_options(function: F) -> F:
    """SLIDES and what is known of them."""
    return _stack(
        click.argument("sources", metavar="[SLIDES]...", nargs=-1),
        click.option(
            "--slides",
            "manifest",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="CSV",
            help="Slide list with the columns slide, slide_id, case_id, mpp, mask, scene, z, annotations, "
            "tissue_class, frame and per-slide settings.",
        ),
        click.option(
            "--slide-mpp",
            metavar="UM",
            help="Resolution of level 0 in um/px, X or XxY, of slides whose file states none.",
        ),
        click.option(
            "--override-mpp",
            is_flag=True,
            help="Take --slide-mpp also where the file states another; a slide list's column still goes first.",
        ),
        click.option(
            "--scene",
            type=click.IntRange(0),
            metavar="N",
            help="Which scan, of files that hold several, from 0; of every slide given.  [the only one]",
        ),
        click.option(
            "--z",
            type=click.IntRange(0),
            metavar="N",
            help="Which focal plane, of files that hold a stack, from 0.  [the middle one]",
        ),
        click.option(
            "--reader",
            type=click.Choice(["auto", "tiff", "openslide", "image", "zarr", "czi"]),
            help="Which reader opens slides.  [auto]",
        ),
    )(function)


def job_option(function: F) -> F:
    """The job directory and the settings file."""
    return _stack(
        click.option(
            "-o",
            "--out",
            "job",
            type=click.Path(path_type=Path, file_okay=False),
            required=True,
            metavar="JOB",
            help="Job directory; made if it is not there. Settings not given here are those it was made with.",
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="TOML",
            help="Settings file, as wsi-pipe init writes one, or config.toml of a job.",
        ),
        changes_option,
        click.option(
            "--anonymise/--no-anonymise",
            default=None,
            help="Ids from a salted hash, and no path, name or date of a slide in what is written; for the whole job, "
            "set when it is made.  [off]",
        ),
        click.option(
            "--salt",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="With --anonymise: the salt, made if it is not there; jobs of one salt give a patient one id.",
        ),
        part_options,
        click.option(
            "--shard",
            metavar="K/N",
            help="Just the K-th of N parts of the slides, told apart by a hash of their ids: for N machines that are "
            "given the same slides, each with a JOB of its own.",
        ),
        click.option(
            "--redo", is_flag=True, help="Make finished work anew where it is stale, or of an earlier version."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )(function)


def part_options(function: F) -> F:
    """Some slides of those that are named, or of the job."""
    return _stack(
        click.option("--only", multiple=True, metavar="ID", help="Just this slide; repeatable."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="Just the first N slides."),
    )(function)


def where_options(function: F) -> F:
    """Where work runs, and what is told of it."""
    return _stack(
        click.option(
            "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine."
        ),
        click.option("--scheduler", metavar="ADDRESS", help="Run on this Dask scheduler, such as tcp://host:8786."),
        click.option(
            "--resources",
            metavar="NAME=N",
            help="With --scheduler: extract only on workers that offer this, such as GPU=1; the rest runs on any.",
        ),
        click.option(
            "--wait-workers",
            type=click.FloatRange(min=0),
            metavar="S",
            help="With --scheduler: give up when no worker can take work for so many seconds.  [waits for ever]",
        ),
        click.option(
            "--timeout", type=click.FloatRange(min=1), metavar="S", help="End a slide after so many seconds.  [never]"
        ),
        click.option("--retry-failed", is_flag=True, help="Just the slides that failed before."),
        click.option(
            "--cache",
            "cache_dir",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Where remote slides are copied when their format cannot be read by ranges.  [the user's cache]",
        ),
        click.option(
            "--cache-size", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Of --cache.  [64]"
        ),
        click.option(
            "--log-json", metavar="FILE", help="Write what happens as JSON lines into FILE, or - for standard error."
        ),
    )(function)


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
    if not values["scheduler"]:
        # What the environment says of a scheduler is for the calls that have one.
        values = {**values, **{name: None for name in ("resources", "wait_workers") if _of_environment(name)}}
        resources = resources if values["resources"] else None
    elif _of_environment("workers"):
        values = {**values, "workers": 1}
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


def _of_environment(name: str) -> bool:
    ctx = click.get_current_context(silent=True)
    return ctx is not None and from_environment(ctx, name)


def segment_options(function: F) -> F:
    """One option for every segment setting, and those of what is drawn on slides."""
    hints = typing.get_type_hints(SegmentSettings)
    options: list[Callable[[F], F]] = [region_options]
    for column, (stage, name) in SETTING_COLUMNS.items():
        if stage != "segment":
            continue
        item = next(f for f in dataclasses.fields(SegmentSettings) if f.name == name)
        text = str(item.metadata.get("help", "")) or name.replace("_", " ")
        text = f"{text[:1].upper()}{text[1:]}."
        flag = "--" + column.replace("_", "-")
        shown = f"{text}  [{_shown(item.default)}]"
        if hints[name] is bool:
            options.append(click.option(f"{flag}/--no-{flag[2:]}", f"segment_{name}", default=None, help=shown))
        else:
            choices = item.metadata.get("choices")
            kind: Any = click.Choice(list(choices)) if choices else hints[name]
            unit = str(item.metadata.get("unit", "")).upper()
            options.append(click.option(flag, f"segment_{name}", type=kind, metavar=unit or None, help=shown))
    return _stack(*options)(function)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def tile_options(function: F) -> F:
    """What grids are laid."""
    return _stack(
        click.option(
            "-r",
            "--resolution",
            "resolutions",
            type=RESOLUTIONS,
            multiple=True,
            callback=flat,
            metavar="RES,RES",
            help="Resolutions of the grids, such as 20x,5x or 0.5um; repeatable.  [20x,5x]",
        ),
        click.option("--tile-px", "tile_tile_px", type=click.IntRange(8), help="Side of a tile in pixels.  [256]"),
        click.option("--overlap", "tile_overlap_px", type=click.IntRange(0), help="Pixels that neighbours share.  [0]"),
        click.option(
            "--min-tissue",
            "tile_min_tissue",
            type=click.FloatRange(0, 1),
            help="Tissue fraction from which a judging cell counts.  [0.25]",
        ),
        click.option("--judge-um", "tile_judge_um", type=float, help="Side of a judging cell in um.  [128]"),
        click.option(
            "--mpp-tolerance",
            "tile_mpp_tolerance",
            type=click.FloatRange(0, 0.25, max_open=True),
            help="Cut at the slide's own scale when it is this near (relative) to what is asked for.  [0.025]",
        ),
        click.option(
            "--min-sharpness",
            "tile_min_sharpness",
            type=click.FloatRange(0),
            help="Leave out tiles less sharp than this; about 1 is in focus at 20x, 0.35 blurred by 1 um.  [0: none]",
        ),
        click.option(
            "--allow-upsampling/--no-allow-upsampling",
            "tile_allow_upsampling",
            default=None,
            help="Serve resolutions that the slide does not have.  [off: more than 10 % finer is an error]",
        ),
    )(function)


def _encoder_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the completion of shells: names of encoders, behind a resolution too."""
    from wsi_pipe.encoders.registry import load_registry

    head, sign, name = incomplete.rpartition("=")
    return [f"{head}{sign}{known}" for known in ("texture", *load_registry()) if known.startswith(name)]
def primary_option(function: F) -> F:
    """Which level other programs find in bags."""
    return click.option(
        "--primary",
        type=RESOLUTION,
        metavar="RES",
        help="Resolution that /coords and /features of bags lead to, where other programs look.  [the coarsest]",
    )(function)


def extract_options(function: F) -> F:
    """Which features, and on what."""
    return _stack(
        click.option(
            "-e",
            "--encoder",
            "encoders",
            multiple=True,
            metavar="[RES=]NAME",
            shell_complete=_encoder_names,
            help="Encoder for all resolutions, or for one (5x=NAME); repeatable. See wsi-pipe encoders.  [texture]",
        ),
        click.option("--layers", metavar="N,N", help="Store the CLS of these ViT blocks too, or none.  [none]"),
        click.option(
            "--dtype", "extract_dtype", type=click.Choice(["float16", "float32"]), help="Of stored features.  [float16]"
        ),
        click.option(
            "--precision",
            "extract_precision",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Of the encoder's arithmetic.  [auto: half where the hardware has it]",
        ),
        click.option("--devices", metavar="DEV,DEV", help="cpu, cuda:0, several with commas, or auto.  [auto]"),
        click.option(
            "--batch-size", "extract_batch_size", type=click.IntRange(1), help="Tiles a batch.  [found by trial]"
        ),
        click.option("--compile/--no-compile", "extract_compile", default=None, help="Use torch.compile.  [off]"),
        click.option(
            "--read-threads", "extract_read_threads", type=click.IntRange(1), help="Reading threads.  [cores]"
        ),
        click.option(
            "--memory", "extract_memory_mib", type=click.IntRange(64), metavar="MIB", help="Budget for tiles.  [2048]"
        ),
        click.option(
            "--random-weights",
            "extract_random_weights",
            is_flag=True,
            help="Of this call alone: draw weights rather than download them, for tests. Such features are called "
            "NAME-random; weights given as a file are loaded.",
        ),
    )(function)


def settings_from(values: Mapping[str, Any], job: Path | None, config: Path | None) -> JobSettings:
    """Settings from options, over the settings file, over the job's own, over the defaults.

    Raises ConfigError when one is refused.
    """
    base = load_toml(JobSettings, config) if config else (job and load_settings(job)) or JobSettings()
    source = config or (job / "config.toml" if job else None)
    for name in call_only_in(JobSettings, source) if source else ():
        option = "--" + name.rpartition(".")[2].replace("_", "-")
        messages.note(f"{name} in {config or 'the job'} is ignored: {option} is said in each call")
    changes = tuple(values.get("changes") or ())
    base = changed(base, changes, example="segment.stain_min=0.02")
    if any(keys[:2] == ("extract", "encoders") for keys, _ in parse_changes(changes)):
        named = {label: tuple(map(_absolute_file, names)) for label, names in base.extract.encoders.items()}
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
    _check_encoder_levels(settings)
    return settings


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
        found.setdefault(label, []).append(_absolute_file(name.strip()))
    return {label: tuple(dict.fromkeys(names)) for label, names in found.items()}


def _absolute_file(name: str) -> str:
    """An encoder whose weights are a file by its whole path: bags and settings name it, and are read elsewhere."""
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
) -> list[SlideEntry]:
    """The slides that a command is to work on: those named, or those that the job holds already.

    What folders hold that looks like a slide and is not among them is told on standard error, and put into
    ``passed_over``; so is what was assumed of slide lists. salt: of an anonymised job, whose slides get ids hashed with
    it. Raises ManifestError or ConfigError.
    """
    sources, manifest = values["sources"], values["manifest"]
    listed = load_slides(job) if job else []
    if sources or manifest:
        passed = PassedOver() if passed_over is None else passed_over
        notes: list[str] = []
        named = revealed(listed)
        entries = collect_slides(sources, manifest, job=named, passed_over=passed, notes=notes)
        for text in notes:
            messages.note(text)
        for line in passed.lines():
            click.echo(line, err=True)
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
    entries = with_regions(entries, values)
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
        entries = _of_shard(entries, parse_shard(values["shard"]))
    if values.get("retry_failed") and job:
        ends = read_outcomes(job)
        entries = [e for e in entries if e.slide_id in ends and ends[e.slide_id].status == "failed"]
    return entries[: values["limit"]] if values.get("limit") else entries


def _of_shard(entries: list[SlideEntry], shard: Shard) -> list[SlideEntry]:
    """Those of one shard, by the ids that they have where nothing is hidden: each job hides them in its own way."""
    own = [entry for entry in entries if shard.holds(entry.hides[0] if entry.hides else entry.slide_id)]
    click.echo(f"note: shard {shard} holds {len(own):,} of {len(entries):,} slides", err=True)
    return own
