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

from wsi_pipe import asked
from wsi_pipe.asked import parse_encoders, parse_mpp
from wsi_pipe.cli import messages
from wsi_pipe.cli.environment import from_environment
from wsi_pipe.cli.regions import region_options
from wsi_pipe.config import JobSettings, SegmentSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import parse_resolution
from wsi_pipe.manifest import SETTING_COLUMNS, SlideEntry
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
    "parse_encoders",
    "parse_mpp",
    "part_options",
    "primary_option",
    "segment_options",
    "settings_from",
    "settled",
    "slide_options",
    "tell",
    "tile_options",
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
        click.option("--limit", type=click.IntRange(1), metavar="N", help="Just the first of the slides.  [all]"),
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


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a call's options, less what the environment says of schedulers and workers to calls that have
    none, or the other."""
    if not values["scheduler"]:
        return {**values, **{name: None for name in ("resources", "wait_workers") if _of_environment(name)}}
    return {**values, "workers": 1} if _of_environment("workers") else dict(values)


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
        click.option(
            "--normalise",
            type=click.Choice(["none", "macenko", "reinhard"]),
            help="Bring tiles to one reference's colours first; features are NAME+macenko then.  [as named]",
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


def tell(line: str) -> None:
    """A line for the user, on standard error; notes not with -q."""
    kinds = {"note: ": messages.note, "warning: ": messages.warning}
    for mark, say in kinds.items():
        if line.startswith(mark):
            say(line.removeprefix(mark))
            return
    click.echo(line, err=True)


def settings_from(values: Mapping[str, Any], job: Path | None, config: Path | None) -> JobSettings:
    """See ``wsi_pipe.asked``; what is to be known is told on standard error."""
    return asked.settings_from(values, job, config, tell)


def collect_entries(
    values: Mapping[str, Any],
    job: Path | None = None,
    passed_over: PassedOver | None = None,
    *,
    salt: bytes | None = None,
) -> list[SlideEntry]:
    """See ``wsi_pipe.asked``; what is to be known is told on standard error."""
    return asked.collect_entries(values, job, passed_over, salt=salt, say=tell)
