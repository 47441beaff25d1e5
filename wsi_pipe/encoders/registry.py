"""The table of known encoders: ``registry.toml`` of this package, and files of the same form that users add."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from wsi_pipe.config import from_mapping
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.errors import ConfigError, UnknownEncoderError
from wsi_pipe.files import parse_toml

__all__ = ["ENCODER_FILES_VARIABLE", "RegistryEntry", "find_entry", "load_registry", "read_registry"]

ENCODER_FILES_VARIABLE = "WSI_PIPE_ENCODERS"
LOADERS = ("hub", "local")
GRAPHS = ("onnx", "torchscript")
KEY_NAMES = ("timm", "hf-vit", "hf-clip", "hf-siglip", "keep", "own")
FREE_LICENCES = frozenset({"Apache-2.0", "BSD-3-Clause", "CC-BY-4.0", "GPL-3.0", "MIT"})
"""Licences that allow commercial use; whoever reads a licence of its own may find that it does too."""


@dataclass(frozen=True)
class RegistryEntry:
    """One encoder of the table.

    title: the name its authors use. loader: "hub" (weights from ``hub_id``) or "local" (weights only from ``file``,
    a path relative to the table's). files: names on the hub in order of preference; hub_type: "model" or "dataset".
    nested, prefix: the key under which a checkpoint holds the weights, and what stands before each of their names.
    revision, sha256: the commit of the hub, and the hash of each file at it, as a source states them.
    keys: how names become the network's, one of ``KEY_NAMES``; "own" takes them as they are. ignore: patterns of
    entries of no use. architecture, args, dim, pooling: see Recipe; also one of ``GRAPHS``. input_px, resize_px, mean,
    std, interpolation: see Preprocessing. parameters: of the network, in millions. mpp: recommended um/px, where its
    authors state one. mpp_min, mpp_max: the ends of what it was trained at, where that is more than one. precision: the
    half precision that its authors run it in, "auto" where they name none. elsewhere: tool to its name for the same
    features; these are aliases too. licence, gated, paper: as on its page. sources: where these facts were read.
    trusted: the maker of a TorchScript file is. verified: False where a fact could not be checked; ``note`` says which.
    """

    name: str
    title: str
    architecture: str
    dim: int
    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    loader: str = "hub"
    hub_id: str = ""
    hub_type: str = "model"
    files: tuple[str, ...] = ()
    revision: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None
    nested: str | None = None
    prefix: str = ""
    keys: str = "timm"
    ignore: tuple[str, ...] = ()
    pooling: str = "model"
    resize_px: int | None = None
    interpolation: str = "bilinear"
    parameters: int | None = None
    mpp: float | None = None
    mpp_min: float | None = None
    mpp_max: float | None = None
    precision: str = "auto"
    gated: bool = False
    paper: str = ""
    aliases: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    trusted: bool = False
    verified: bool = True
    note: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    table: str = ""

    def __post_init__(self) -> None:
        if self.loader not in LOADERS:
            raise ConfigError(f"loader {self.loader!r} must be one of {', '.join(LOADERS)}")
        if self.keys not in KEY_NAMES:
            raise ConfigError(f"keys {self.keys!r} must be one of {', '.join(KEY_NAMES)}")
        if self.loader == "hub" and not (self.hub_id and self.files):
            raise ConfigError("an encoder from the hub needs hub_id and files")
        if self.loader == "local" and not self.file:
            raise ConfigError("a local encoder needs file, the path of its weights")
        if self.architecture in GRAPHS and self.loader != "local":
            raise ConfigError(f"an encoder that is one {self.architecture} file needs loader = 'local' and file")
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"precision {self.precision!r} must be auto, float32, bfloat16 or float16")
        if self.mpp is not None and self.mpp <= 0:
            raise ConfigError(f"mpp {self.mpp} must be above zero")
        if (self.mpp_min is None) != (self.mpp_max is None):
            raise ConfigError("mpp_min and mpp_max go together")
        if self.mpp_min is not None and self.mpp_max is not None and not 0 < self.mpp_min <= self.mpp_max:
            raise ConfigError(f"mpp_min {self.mpp_min} must be above zero and at most mpp_max {self.mpp_max}")
        if self.revision and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ConfigError(f"revision {self.revision!r} must be a commit of the hub, 40 hexadecimal digits")
        bad = [name for name, value in self.sha256.items() if not re.fullmatch(r"[0-9a-f]{64}", value)]
        if bad:
            raise ConfigError(f"sha256 of {bad[0]} must be 64 hexadecimal digits")
        _ = self.recipe  # the recipe's own checks

    @property
    def recipe(self) -> Recipe:
        """How the encoder is built and fed."""
        pre = Preprocessing(self.input_px, self.mean, self.std, self.interpolation, self.resize_px)
        return Recipe(self.architecture, self.dim, pre, self.pooling, dict(self.args))

    @property
    def mpp_range(self) -> tuple[float, float] | None:
        """The finest and the coarsest um/px that it was trained at; None where no source states any."""
        if self.mpp_min is not None and self.mpp_max is not None:
            return (self.mpp_min, self.mpp_max)
        return None if self.mpp is None else (self.mpp, self.mpp)

    @property
    def commercial(self) -> bool:
        """Whether its licence is one of ``FREE_LICENCES``."""
        return self.licence in FREE_LICENCES

    @property
    def page(self) -> str:
        """The address of its page on the hub, empty for local weights."""
        kind = "datasets/" if self.hub_type == "dataset" else ""
        return f"https://huggingface.co/{kind}{self.hub_id}" if self.hub_id else ""

    @property
    def local_file(self) -> Path | None:
        """The weights' file of a local encoder."""
        return Path(self.table).parent / self.file if self.file else None


def read_registry(path: Path) -> dict[str, RegistryEntry]:
    """The encoders of one TOML table by name.

    Raises ConfigError that names the file, the encoder and the setting when something is missing, unknown, or wrong.
    """
    try:
        tables = parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", remedy="give a TOML file that can be read") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    entries: dict[str, RegistryEntry] = {}
    for name, values in tables.items():
        where = f"{path}: [{name}]"
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name!r} stands outside any table", remedy="begin each encoder with [name]")
        if any(character in name for character in "@:/, "):
            raise ConfigError(f"{where}: a name must not contain any of '@:/,' or spaces")
        entries[name] = _entry(name, values, path, where)
    return entries


def _entry(name: str, values: Mapping[str, Any], path: Path, where: str) -> RegistryEntry:
    required = ("title", "architecture", "dim", "input_px", "mean", "std", "licence")
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(
            f"{where}: {', '.join(missing)} not given", remedy=f"every encoder needs {', '.join(required)}"
        )
    plain = dict(values)
    for reserved in ("name", "table"):
        if reserved in plain:
            raise ConfigError(f"{where}: unknown setting {reserved!r}")
    # Arguments are whatever the architecture takes, so they are not typed here.
    args = plain.pop("args", {})
    if not isinstance(args, dict):
        raise ConfigError(f"{where}: args must be a table")
    entry = from_mapping(RegistryEntry, {**plain, "name": name, "table": str(path)}, where)
    object.__setattr__(entry, "args", args)
    return entry


@cache
def _builtin() -> dict[str, RegistryEntry]:
    return read_registry(Path(__file__).with_name("registry.toml"))


def load_registry(files: Sequence[Path] | None = None) -> dict[str, RegistryEntry]:
    """All known encoders by name: this package's, then those of the users' files, which may replace them.

    files: by default those that the environment variable WSI_PIPE_ENCODERS lists (separated as PATH is).
    """
    if files is None:
        files = [Path(item) for item in os.environ.get(ENCODER_FILES_VARIABLE, "").split(os.pathsep) if item]
    entries = dict(_builtin())
    for path in files:
        entries.update(read_registry(path))
    return entries


def _names(entry: RegistryEntry) -> tuple[str, ...]:
    return (*entry.elsewhere.values(), *entry.aliases, entry.name)


def find_entry(name: str) -> RegistryEntry:
    """The encoder of that name or alias, in any case. Raises UnknownEncoderError with the nearest names."""
    entries = load_registry()
    by_name = {alias.lower(): entry for entry in entries.values() for alias in _names(entry)}
    entry = by_name.get(name.lower())
    if entry is None:
        near = difflib.get_close_matches(name.lower(), by_name, n=3)
        raise UnknownEncoderError(
            f"there is no encoder {name!r}",
            remedy=(f"did you mean {', '.join(near)}? " if near else "")
            + "'wsi-pipe encoders' lists them; timm models are written timm:MODEL, files end in .safetensors",
        )
    return entry
