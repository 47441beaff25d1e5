"""Reading bags and feature files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag.safety import refuse_unsafe, unreachable
from wsi_pipe.bag.values import (
    PER_TILE,
    SCHEMA,
    SCHEMA_VERSION,
    Bag,
    BagAttrs,
    BagLevel,
    FeatureArray,
    Features,
    SlideVector,
    TileValues,
    content_digest,
)
from wsi_pipe.encoders.elsewhere import same_encoder
from wsi_pipe.encoders.random_id import is_random_id
from wsi_pipe.errors import BagError, FileAccessError
from wsi_pipe.geometry import TileGrid, TileSpec

__all__ = [
    "BagHeader",
    "BagLevelView",
    "FeatureFileHeader",
    "FeatureHeader",
    "open_bag",
    "read_attention",
    "read_attrs",
    "read_bag",
    "read_feature_file",
    "read_feature_header",
    "read_grids",
    "read_header",
    "read_level",
    "read_quality",
    "read_slide_vectors",
]


@contextmanager
def open_bag(path: Path, schema: str = SCHEMA) -> Iterator[Any]:
    """Open an HDF5 file of this schema for reading.

    Raises BagError when it is not there, not HDF5 (or truncated), of another schema, of a later version, or takes data
    from other files; FileAccessError when it cannot be looked at, which says nothing of it.
    """
    try:
        # Locked as far as the file system has locks: one that somebody writes to must not be taken for a damaged one.
        file = h5py.File(path, "r", locking="best-effort")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BagError(f"{path}: no such file") from error
    except OSError as error:
        if (outside := unreachable(path, error)) is not None:
            raise outside from error
        raise BagError(f"{path}: not a readable HDF5 file ({_first_line(error)})") from error
    with file:
        try:
            attrs = file.attrs
            found, version = attrs.get("schema"), int(attrs.get("schema_version", 0))
            if found != schema:
                raise BagError(f"{path}: is not a {schema} file (schema {found!r})")
            if version > SCHEMA_VERSION:
                raise BagError(
                    f"{path}: has schema version {version}, this program reads up to {SCHEMA_VERSION}",
                    remedy="update wsi-pipe",
                )
            refuse_unsafe(path, file)
            yield file
        except (BagError, FileAccessError):
            raise
        except _DAMAGE as error:
            if (outside := unreachable(path, error)) is not None:
                raise outside from error
            raise BagError(f"{path}: is damaged ({_first_line(error)})") from error


_DAMAGE = (KeyError, RuntimeError, OSError, ValueError, TypeError, IndexError, AttributeError, MemoryError)
"""What flipped bits give: h5py's own errors for damaged groups, links and chunks; attributes and shapes that make no
sense; sizes that no memory holds."""


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_ADDED = ("bounds_l0", "annotation", "left_out")
"""Attributes that bags of earlier versions lack."""


def read_attrs(path: Path) -> BagAttrs:
    """The root attributes of a bag. Raises BagError when the file is not a bag or lacks one."""
    with open_bag(path) as file:
        return _attrs(path, file)


def _attrs(path: Path, file: Any) -> BagAttrs:
    values: dict[str, Any] = {}
    attrs = file.attrs
    for name in (f.name for f in fields(BagAttrs)):
        if name in ("scene", "z"):
            values[name] = int(attrs[name]) if name in attrs else None
            continue
        if name == "made_with" and name not in attrs:
            # Files of version 0.1.0 do not have it.
            values[name] = ""
            continue
        try:
            value = attrs[name]
        except KeyError as error:
            if name in _ADDED:
                continue
            raise BagError(f"{path}: lacks the attribute {name}") from error
        if name == "bounds_l0":
            x, y, width, height = (int(number) for number in value)
            values[name] = (x, y, width, height)
        elif name == "mpp_l0":
            values[name] = (float(value[0]), float(value[1]))
        elif name in ("width_l0", "height_l0"):
            values[name] = int(value)
        else:
            values[name] = str(value)
    return BagAttrs(**values)


def level_labels(file: Any) -> list[str]:
    """Labels of a bag's levels, coarsest first."""
    if "levels" not in file:
        return []
    groups = file["levels"]
    return sorted(groups, key=lambda label: -float(groups[label]["cells"].attrs["mpp"]))


def grid_of(group: Any) -> TileGrid:
    """The grid stored in a level's group, or in a mapping of its data sets."""
    cells = group["cells"]
    attrs = cells.attrs
    spec = TileSpec(float(attrs["mpp"]), int(attrs["tile_size_px"]), int(attrs.get("overlap_px", 0)))

    def pair(name: str) -> tuple[float, float]:
        x, y = attrs[name]
        return (float(x), float(y))

    return TileGrid(
        spec=spec,
        mpp_effective=pair("mpp_effective"),
        origin_l0=pair("origin_l0"),
        stride_l0=pair("stride_l0"),
        tile_size_l0=pair("tile_size_l0"),
        cells=cells[()],
        tissue=group["tissue"][()],
        parent=group["parent"][()] if "parent" in group else None,
        upsampled=bool(attrs["upsampled"]),
        min_tissue=float(attrs["min_tissue"]),
    )


def read_grids(path: Path) -> tuple[TileGrid, ...]:
    """The grids of a bag or tile file, coarsest first, without features."""
    with open_bag(path) as file:
        return tuple(grid_of(file["levels"][label]) for label in level_labels(file))


def weights_of(slug: str, attrs: Any) -> str:
    """ "random" where features were made with weights that were drawn, else "". Files of version 0.1.0 do not say so,
    but their weights' hash stands for random ones."""
    if "weights" in attrs:
        return str(attrs["weights"])
    return "random" if is_random_id(slug, str(attrs.get("weights_sha256", ""))) else ""


@dataclass(frozen=True)
class FeatureHeader:
    """What one encoder's features say of themselves; dim: D; layers: the blocks whose CLS is stored too; weights:
    "random" where they were drawn; sha256: of the values, "" in bags of earlier versions."""

    encoder: str
    weights_sha256: str
    precision: str
    transform: str
    fingerprint: str
    dim: int
    layers: tuple[int, ...] = ()
    weights: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class BagHeader:
    """A bag or tile file without its features: grids coarsest first, headers by level label and encoder slug."""

    attrs: BagAttrs
    grids: tuple[TileGrid, ...]
    features: dict[str, dict[str, FeatureHeader]]

    @property
    def fingerprints(self) -> set[str]:
        """Of all features."""
        return {header.fingerprint for level in self.features.values() for header in level.values()}


def read_header(path: Path) -> BagHeader:
    """All of a bag but its features. Raises BagError when the file is not a bag or is damaged."""
    with open_bag(path) as file:
        labels = level_labels(file)
        groups = {label: file["levels"][label] for label in labels}
        return BagHeader(
            _attrs(path, file),
            tuple(grid_of(groups[label]) for label in labels),
            {label: _feature_headers(groups[label]) for label in labels},
        )


def _feature_headers(group: Any) -> dict[str, FeatureHeader]:
    names = ("encoder", "weights_sha256", "precision", "transform", "fingerprint")
    return {
        slug: FeatureHeader(
            **{name: str(data.attrs[name]) for name in names},
            dim=int(data.shape[1]),
            layers=_blocks_of(group, slug),
            weights=weights_of(slug, data.attrs),
            sha256=str(data.attrs.get("sha256", "")),
        )
        for slug, data in (group["features"].items() if "features" in group else ())
    }


def _blocks_of(group: Any, slug: str) -> tuple[int, ...]:
    layers = group.get("layers", {})
    return tuple(sorted(int(block) for block in layers[slug])) if slug in layers else ()


def _values_of(data: Any) -> FeatureArray:
    """Stored features. Raises ValueError where they are not what was written."""
    values: FeatureArray = data[()]
    if "sha256" in data.attrs and content_digest([values]) != str(data.attrs["sha256"]):
        raise ValueError(f"{data.name} is not what was written: its digest differs")
    return values


def _features_of(group: Any, slug: str) -> Features:
    data = group["features"][slug]
    attrs = data.attrs
    layers = group["layers"][slug] if "layers" in group and slug in group["layers"] else {}
    return Features(
        values=_values_of(data),
        layers={block: _values_of(layers[block]) for block in layers},
        **{
            name: str(attrs[name])
            for name in ("encoder", "weights_sha256", "licence", "precision", "transform", "fingerprint")
        },
        weights=weights_of(slug, attrs),
        encoder_saw=str(attrs.get("encoder_saw", "")),
    )


def _tile_values(group: Any) -> dict[str, dict[str, TileValues]]:
    """What a level holds of one number a tile: kind -> slug -> values."""
    return {
        kind: {
            slug: TileValues(data[()], {name: _plain_attr(value) for name, value in data.attrs.items()})
            for slug, data in group[kind].items()
        }
        for kind in PER_TILE
        if kind in group
    }


def _plain_attr(value: Any) -> str | float | tuple[int, ...]:
    if isinstance(value, np.ndarray):
        return tuple(int(number) for number in value)
    return value if isinstance(value, str) else float(value)


def read_bag(path: Path) -> Bag:
    """A whole bag in memory. Raises BagError when the file is not a bag or is damaged."""
    with open_bag(path) as file:
        levels = []
        for label in level_labels(file):
            group = file["levels"][label]
            slugs = list(group["features"]) if "features" in group else []
            attention = group.get("attention", {})
            levels.append(
                BagLevel(
                    grid=grid_of(group),
                    features={slug: _features_of(group, slug) for slug in slugs},
                    attention={model: attention[model][()] for model in attention},
                    **_tile_values(group),
                )
            )
        return Bag(_attrs(path, file), tuple(levels), _vectors(file))


def _vectors(file: Any) -> dict[str, SlideVector]:
    return {
        name: SlideVector(
            values=_values_of(data),
            **{item.name: str(data.attrs.get(item.name, "")) for item in fields(SlideVector) if item.name != "values"},
        )
        for name, data in (file["slide"].items() if "slide" in file else ())
    }


def read_slide_vectors(path: Path) -> dict[str, SlideVector]:
    """The vectors of the whole slide that a bag holds, by name. Raises BagError when it is no bag or is damaged."""
    with open_bag(path) as file:
        return _vectors(file)


def read_attention(path: Path, model: str) -> dict[str, NDArray[np.float32]]:
    """A model's attention by level label, float32 (N,) each, wherever the bag holds it.

    Raises BagError that names what there is where it holds none of that model.
    """
    with open_bag(path) as file:
        groups = {label: file["levels"][label].get("attention", {}) for label in level_labels(file)}
        found = {label: group[model][()] for label, group in groups.items() if model in group}
        if not found:
            have = ", ".join(sorted({name for group in groups.values() for name in group})) or "none"
            raise BagError(f"{path}: has no attention of {model}", remedy=f"what it has: {have}")
        return found


@dataclass(frozen=True)
class BagLevelView:
    """What a MIL model needs of one level of a bag: features, geometry, and where they come from.

    features: (N, D) float16 or float32. parent: int32 (N,) rows in the next coarser level, None for the coarsest;
    parent_label: the label of that level. layers: CLS of blocks, (N, D) each, when they are stored. annotation: by
    name of the class, the fraction of each tile that its regions cover, float32 (N,). quality: by measure, float32
    (N,), as far as the bag holds any. encoder_saw: see ``Features``.
    """

    attrs: BagAttrs
    grid: TileGrid
    encoder: str
    slug: str
    weights_sha256: str
    features: FeatureArray
    fingerprint: str
    parent_label: str | None
    layers: dict[str, FeatureArray]
    annotation: dict[str, NDArray[np.float32]]
    weights: str = ""
    quality: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    encoder_saw: str = ""


def read_level(path: Path, label: str, encoder: str | None = None, *, layers: bool = False) -> BagLevelView:
    """One level of a bag with one encoder's features; ``encoder`` is a name, an alias or a slug, None for the only one.

    Raises BagError naming what the bag has when it lacks the level or the encoder.
    """
    with open_bag(path) as file:
        labels = level_labels(file)
        if label not in labels:
            raise BagError(f"{path}: has no level {label}", remedy=f"its levels are {', '.join(labels) or 'none'}")
        group = file["levels"][label]
        slugs = list(group["features"]) if "features" in group else []
        names = {slug: str(group["features"][slug].attrs["encoder"]) for slug in slugs}
        wanted = [slug for slug in slugs if encoder in (None, slug, names[slug])]
        if encoder and not wanted:
            wanted = [slug for slug in slugs if same_encoder(names[slug], encoder)]
        if len(wanted) != 1:
            have = ", ".join(names.values()) or "none"
            what = f"no features of {encoder}" if encoder else f"features of {len(slugs)} encoders"
            raise BagError(f"{path}: has {what} at {label}", remedy=f"choose an encoder it has: {have}")
        slug = wanted[0]
        found = _features_of(group, slug) if layers else None
        data = group["features"][slug]
        position = labels.index(label)
        per_tile = _tile_values(group)
        return BagLevelView(
            attrs=_attrs(path, file),
            grid=grid_of(group),
            encoder=names[slug],
            slug=slug,
            weights_sha256=str(data.attrs["weights_sha256"]),
            features=found.values if found else _values_of(data),
            fingerprint=str(data.attrs["fingerprint"]),
            parent_label=labels[position - 1] if position else None,
            layers=dict(found.layers) if found else {},
            annotation={
                str(item.attrs.get("class", slug)): item.values for slug, item in per_tile.get("annotation", {}).items()
            },
            weights=weights_of(slug, data.attrs),
            quality={name: item.values for name, item in per_tile.get("quality", {}).items()},
            encoder_saw=str(data.attrs.get("encoder_saw", "")),
        )


@dataclass(frozen=True)
class FeatureFileHeader:
    """What a feature file says of itself without its values; shape: (N, D)."""

    slide_id: str
    level: str
    slug: str
    fingerprint: str
    shape: tuple[int, int]
    features: FeatureHeader


def read_feature_header(path: Path) -> FeatureFileHeader:
    """The header of a feature file. Raises BagError when it is not one."""
    with open_bag(path, f"{SCHEMA}-features") as file:
        slug = str(file.attrs["slug"])
        data = file["features"][slug]
        rows, dim = data.shape
        return FeatureFileHeader(
            slide_id=str(file.attrs["slide_id"]),
            level=str(file.attrs["level"]),
            slug=slug,
            fingerprint=str(data.attrs["fingerprint"]),
            shape=(int(rows), int(dim)),
            features=_feature_headers(file)[slug],
        )


def read_feature_file(path: Path) -> Features:
    """The features in a feature file. Raises BagError when it is not one or is damaged."""
    with open_bag(path, f"{SCHEMA}-features") as file:
        return _features_of(file, str(file.attrs["slug"]))


def read_quality(path: Path) -> dict[str, TileValues]:
    """What a feature file holds of the quality of its tiles; nothing in files of earlier versions.

    Raises BagError when it is not a feature file or is damaged.
    """
    with open_bag(path, f"{SCHEMA}-features") as file:
        return _tile_values(file).get("quality", {})


def finite(values: NDArray[Any]) -> bool:
    """Whether all values are finite."""
    return bool(np.isfinite(values).all())
