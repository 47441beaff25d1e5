"""Frozen settings of the stages, TOML in and out, and fingerprints.

A stage's fingerprint covers its own settings and whatever it builds on, so that changing a setting redoes just the
stages that it touches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from wsi_pipe.errors import ConfigError
from wsi_pipe.files import parse_toml
from wsi_pipe.geometry import TileSpec, level_label, parse_resolution

__all__ = [
    "CacheSettings",
    "ExtractSettings",
    "JobSettings",
    "SegmentSettings",
    "TileSettings",
    "call_only_in",
    "dump_toml",
    "fingerprint",
    "from_mapping",
    "load_toml",
    "to_mapping",
    "told_of",
    "typed_setting",
]

S = TypeVar("S")

READERS = ("auto", "tiff", "openslide", "image", "zarr", "czi")
SEGMENT_METHODS = ("stain", "od", "otsu-saturation")


def _told(text: str, unit: str = "", **more: Any) -> dict[str, Any]:
    """What is told of a setting, by its command-line option and in a settings file that ``init`` writes.

    unit: of a number. more: ``choices`` of a word; ``absent``, what None stands for, and an ``example`` of the other.
    """
    return {"help": text, "unit": unit, **more}


def _option(default: Any, text: str, unit: str = "", **more: Any) -> Any:
    """A settings field with what is told of it, see ``_told``."""
    return field(default=default, metadata=_told(text, unit, **more))


CALL_ONLY = {"call_only": True}
"""Metadata of a field that an option of one call sets: no settings file holds it, and none can switch it on."""


@dataclass(frozen=True)
class SegmentSettings:
    """How tissue is found. Lengths in um, areas in um2, densities in units of optical density (OD, log10).

    Every field's ``metadata["help"]`` says what it does; ``wsi_pipe.tissue`` says how. Raises ConfigError for a
    method that does not exist or a threshold out of its range.
    """

    mpp: float = _option(8.0, "resolution at which tissue is found and the mask is stored", "um/px")
    method: str = _option(
        "stain",
        "stain: colour that haematoxylin, eosin and DAB have and grey has not; od: optical density by Otsu's "
        "threshold; otsu-saturation: HSV saturation by Otsu's threshold, as CLAM does",
        choices=SEGMENT_METHODS,
    )
    stain_min: float = _option(0.012, "stain density from which a pixel counts as pale tissue", "OD")
    stain_seed: float = _option(0.022, "stain density that each piece of tissue must reach somewhere", "OD")
    edge_share: float = _option(0.3, "share of the stain density nearby from which a pixel at an edge counts", "share")
    noise_factor: float = _option(
        6.0, "pale tissue must also exceed this many standard deviations of the background", "SD"
    )
    white_min: float = _option(200.0, "darkest grey level (0 to 255) that can be the slide's background", "grey")
    smooth_um: float = _option(6.0, "standard deviation of the Gaussian that is applied before the thresholds", "um")
    close_um: float = _option(24.0, "gaps up to twice this width are closed, so that fat holds together", "um")
    min_area_um2: float = _option(10_000.0, "smaller pieces of tissue are dropped", "um2")
    max_hole_um2: float = _option(20_000.0, "smaller holes are filled", "um2")
    drop_pen: bool = _option(True, "leave out blue, green and red pen and tissue ink")
    drop_dark: bool = _option(True, "leave out black pen, dark debris and other dark grey matter")
    pen_od: float = _option(0.20, "optical density from which pen is recognised by its colour", "OD")
    dark_od: float = _option(0.50, "optical density from which grey counts as black pen or debris", "OD")
    mark_area_um2: float = _option(5_000.0, "smaller spots of pen or debris are not looked at", "um2")
    mark_margin_um: float = _option(48.0, "width around pen and debris in which faint colour is dropped too", "um")
    edge_width_um: float = _option(
        80.0, "straight lines thinner than this and 20 times longer are edges of glass", "um"
    )
    dark_background: float = _option(
        90.0, "a slide without white whose grey levels mostly lie below is fluorescence", "grey"
    )

    def __post_init__(self) -> None:
        if self.method not in SEGMENT_METHODS:
            raise ConfigError(f"tissue method {self.method!r} must be one of {', '.join(SEGMENT_METHODS)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{f.name} {value} must be a finite number, zero or above")
        if self.mpp <= 0:
            raise ConfigError(f"mpp {self.mpp} um/px must be above zero")
        if self.edge_share > 1:
            raise ConfigError(f"edge_share {self.edge_share} must lie between 0 and 1")
        if self.stain_seed < self.stain_min:
            raise ConfigError(f"stain_seed {self.stain_seed} must be at least stain_min {self.stain_min}")
        for name in ("white_min", "dark_background"):
            if getattr(self, name) > 255:
                raise ConfigError(f"{name} {getattr(self, name)} must be a grey level, 0 to 255")


@dataclass(frozen=True)
class TileSettings:
    """Which grids are laid.

    resolutions: um/px of each grid. tile_px: side of a tile in pixels. overlap_px: pixels shared with the next tile.
    min_tissue: a tile is kept if one judging cell in it has at least this fraction of tissue. judge_um: side of the
    judging cell. mpp_tolerance: relative distance within which tiles are cut at a dyadic scale of the slide.
    max_upsampling: relative amount by which a request may be finer than the slide. allow_upsampling: no limit to that.
    min_sharpness: tiles that are less sharp are left out, and so are those inside them; 0 asks for none to be.
    """

    resolutions: tuple[float, ...] = _option(
        (0.5, 2.0), 'of each grid; written 0.5, "0.5um" or "20x"; 0.5 is 20x and 2 is 5x', "um/px"
    )
    tile_px: int = _option(256, "side of a tile", "px")
    overlap_px: int = _option(0, "what neighbouring tiles share", "px")
    min_tissue: float = _option(0.25, "tissue fraction from which a judging cell counts", "share")
    judge_um: float = _option(128.0, "side of a judging cell", "um")
    mpp_tolerance: float = _option(
        0.025, "relative distance within which tiles are cut at the slide's own scale, pixel for pixel", "share"
    )
    max_upsampling: float = _option(
        0.10, "relative amount by which a grid may be finer than the slide; more is an error", "share"
    )
    allow_upsampling: bool = _option(False, "no limit to that")
    min_sharpness: float = _option(
        0.0, "leave out tiles that are less sharp; about 1 is in focus at 20x, 0 leaves out none", "sharpness"
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_sharpness) and self.min_sharpness >= 0):
            raise ConfigError(f"min_sharpness {self.min_sharpness} must be a finite number, zero or above")
        if not self.resolutions:
            raise ConfigError("no resolution is given", remedy="give at least one, such as -r 20x")
        if not 0 <= self.min_tissue <= 1:
            raise ConfigError(f"min_tissue {self.min_tissue} must lie between 0 and 1")
        if not 0 <= self.mpp_tolerance < 0.25:
            raise ConfigError(f"mpp_tolerance {self.mpp_tolerance} must be at least 0 and below 0.25")
        if not (math.isfinite(self.judge_um) and self.judge_um > 0):
            raise ConfigError(f"judge_um {self.judge_um} must be above zero")
        labels = [spec.label for spec in self.specs]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"a resolution is given twice: {', '.join(labels)}")

    @property
    def specs(self) -> tuple[TileSpec, ...]:
        """The requested grids, coarsest first."""
        return tuple(TileSpec(mpp, self.tile_px, self.overlap_px) for mpp in sorted(self.resolutions, reverse=True))


@dataclass(frozen=True)
class ExtractSettings:
    """Which features are computed and how.

    encoders: level label, or "*" for all levels, to encoder names. layers: blocks of a ViT whose CLS is stored too.
    dtype: of the stored features. The rest changes speed, not results, and is left out of the fingerprint:
    precision does change results a little, so it is in. random_weights: of one call only, see ``CALL_ONLY``.
    """

    encoders: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"*": ("texture",)},
        metadata=_told('encoders of a resolution ("5x"), or of all that are not named ("*")'),
    )
    layers: tuple[int, ...] = _option((), "blocks of a ViT whose CLS is stored too, -1 for the last", "block")
    dtype: str = _option("float16", "number format of stored features", choices=("float16", "float32"))
    precision: str = _option(
        "auto",
        "number format of the encoder's arithmetic; auto takes half where the hardware has it",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    random_weights: bool = field(default=False, metadata=CALL_ONLY)
    batch_size: int | None = _option(None, "tiles a batch", "tiles", absent="found by trial", example=64)
    devices: tuple[str, ...] = _option(("auto",), 'such as "cpu", "cuda:0"; auto takes every GPU, else the CPU')
    compile: bool = _option(False, "compile the encoder with torch.compile")
    read_threads: int | None = _option(
        None, "threads that read and decode tiles", "threads", absent="one a core", example=8
    )
    memory_mib: int = _option(2048, "budget for tiles that wait for the encoder", "MiB")

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"feature dtype {self.dtype!r} must be float16 or float32")
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"precision {self.precision!r} must be auto, float32, bfloat16 or float16")
        if not any(self.encoders.values()):
            raise ConfigError("no encoder is given", remedy="name at least one, such as texture")
        if not self.devices:
            raise ConfigError("no device is given", remedy="name at least one, or auto")
        for name, least in (("batch_size", 1), ("read_threads", 1), ("memory_mib", 16)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} must be at least {least}")

    def encoders_of(self, label: str) -> tuple[str, ...]:
        """Names of the encoders that run on the level ``label``: its own where it has any, else those for all."""
        return tuple(self.encoders.get(label) or self.encoders.get("*", ()))


@dataclass(frozen=True)
class CacheSettings:
    """Where remote slides are copied to when their format cannot be read by byte ranges.

    folder: None for the user's cache folder. gib: the copies together take no more; the least recently used go first.
    """

    folder: str | None = _option(
        None, "where the copies lie", absent="the user's cache folder, or WSI_PIPE_CACHE", example="/scratch/slides"
    )
    gib: float = _option(64.0, "what all copies together may take; the least recently used go first", "GiB")

    def __post_init__(self) -> None:
        if not self.gib > 0:
            raise ConfigError(f"a cache of {self.gib} GiB holds nothing", remedy="give a size above zero")


@dataclass(frozen=True)
class JobSettings:
    """Settings of a job; ``config.toml`` of a job directory. cache changes no result.

    anonymise: ids are hashed, and nothing that the job writes names a slide's file; set when the job is made. redo: of
    one call only, see ``CALL_ONLY``: finished work that is stale is made anew. primary: label of the level that
    ``/coords`` and ``/features`` of bags lead to, in slides that have it; None for the coarsest.
    """

    segment: SegmentSettings = field(default=SegmentSettings(), metadata=_told("How tissue is found."))
    tile: TileSettings = field(default=TileSettings(), metadata=_told("Which grids are laid."))
    extract: ExtractSettings = field(
        default_factory=ExtractSettings, metadata=_told("Which features are computed, and how.")
    )
    reader: str = _option("auto", "which reader opens slides; auto takes the fastest that can", choices=READERS)
    cache: CacheSettings = field(
        default=CacheSettings(),
        metadata=_told("Copies of slides behind URLs whose format cannot be read by byte ranges."),
    )
    anonymise: bool = _option(
        False, "ids from a salted hash, and no path, name or date of a slide in what is written; set when a job is made"
    )
    primary: str | None = _option(
        None, "resolution that /coords and /features of bags lead to", absent="the coarsest", example="20x"
    )
    redo: bool = field(default=False, metadata=CALL_ONLY)

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise ConfigError(f"reader {self.reader!r} must be one of {', '.join(READERS)}")
        if self.primary is not None:
            object.__setattr__(self, "primary", level_label(parse_resolution(self.primary)))


def told_of(item: dataclasses.Field[Any]) -> str:
    """What a setting does, with its unit."""
    text, unit = item.metadata.get("help", ""), item.metadata.get("unit", "")
    return f"{text}, {unit}" if unit else text


def fingerprint(*parts: object) -> str:
    """SHA-256, in hex, over the canonical JSON of ``parts`` (settings, strings, numbers, mappings, sequences)."""
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_mapping(settings: Any) -> dict[str, Any]:
    """A settings value as plain mappings and lists, without what is None (TOML has no null) and what is of one call."""
    plain = _plain(settings)
    assert isinstance(plain, dict)
    return plain


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (f for f in dataclasses.fields(value) if not f.metadata.get("call_only"))
        pairs = ((f.name, getattr(value, f.name)) for f in kept)
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form")


def from_mapping(cls: type[S], values: Mapping[str, Any], where: str = "settings") -> S:
    """A settings value from plain mappings, types checked. A field's ``metadata["also"]`` holds other names of it.

    What is of one call only is passed over, whatever it says (``call_only_in`` tells). Raises ConfigError for an
    unknown key, a value of the wrong type, or one that the settings class refuses; the message begins with ``where``.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    of_a_call = {f.name for f in fields if f.metadata.get("call_only")}
    known = {f.name for f in fields} - of_a_call
    others = {name: f.name for f in fields for name in f.metadata.get("also", ())}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = others.get(name, name)
        if key in of_a_call:
            continue
        if key not in known:
            raise ConfigError(f"{where}: unknown setting {key!r}", remedy=f"known ones are {', '.join(sorted(known))}")
        arguments[key] = _typed(hints[key], value, f"{where}.{key}")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", remedy=error.remedy) from error


def typed_setting(cls: type[Any], name: str, value: Any, where: str) -> Any:
    """A value as the type of one setting of a settings class. Raises ConfigError for another type."""
    return _typed(typing.get_type_hints(cls)[name], value, f"{where}.{name}")


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(typing.cast(type[Any], hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(_typed(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(k): _typed(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, str) and where.rpartition(".")[2].startswith("resolutions"):
        try:
            return parse_resolution(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.message}", remedy=error.remedy) from error
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and origin is None
        and isinstance(value, hint)
        and (hint is bool or not isinstance(value, bool))
    ):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: {value!r} is not a valid {wanted}")


def load_toml(cls: type[S], path: Path) -> S:
    """Settings of class ``cls`` from a TOML file. Raises ConfigError naming the file when it is missing or wrong."""
    try:
        values = parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", remedy="give a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return from_mapping(cls, values, str(path))


def call_only_in(cls: type[Any], path: Path) -> list[str]:
    """What a settings file switches on that only an option of a call can: it is passed over, which is to be said.

    Earlier versions kept such settings in ``config.toml``. Names as ``extract.random_weights``; none where the file
    cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return []
    return list(_call_only(cls, values, ""))


def _call_only(cls: type[Any], values: Mapping[str, Any], where: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        value = values.get(item.name)
        if item.metadata.get("call_only"):
            if value:
                yield f"{where}{item.name}"
        elif dataclasses.is_dataclass(hints[item.name]) and isinstance(value, Mapping):
            yield from _call_only(typing.cast(type[Any], hints[item.name]), value, f"{where}{item.name}.")


def dump_toml(settings: Any) -> str:
    """Settings as TOML text that ``load_toml`` reads back to an equal value."""
    import tomli_w

    return tomli_w.dumps(to_mapping(settings))
