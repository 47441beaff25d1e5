"""LR encoder files: a network distilled to low resolution, with all that is needed to run it, in one safetensors file.

docs/lr-encoder.md describes the format. ``write_lr_encoder`` is the only place that writes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_pipe import __version__
from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.encoders.base import EncoderInfo, encoder_slug
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.encoders.tensor_file import tensors_sha256, write_tensor_file
from wsi_pipe.errors import ConfigError, WeightsError
from wsi_pipe.files import atomic_path, parse_json
from wsi_pipe.geometry import TileSpec
from wsi_pipe.seen import Seen

if TYPE_CHECKING:
    from torch import Tensor

    from wsi_pipe.encoders.architectures import PooledNetwork

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "LrHeader",
    "header_from_json",
    "load_lr_network",
    "read_lr_header",
    "tensors_sha256",
    "write_lr_encoder",
]

METADATA_KEY = "wsi_pipe_lr_encoder"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LrHeader:
    """What an LR encoder's file says of itself.

    recipe: architecture, arguments, dimension, pooling and preprocessing. tile: the resolution and size of the tiles
    that it was made for. training: how it was trained, JSON-able, free in form. tensors_sha256: over names, dtypes,
    shapes and bytes of all tensors. format_version: 1.
    """

    recipe: Recipe
    tile: TileSpec
    licence: str
    name: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    tensors_sha256: str = ""
    format_version: int = FORMAT_VERSION
    written_by: str = f"wsi-pipe {__version__}"

    def to_json(self) -> str:
        """The header as JSON text, as the file's metadata holds it."""
        return json.dumps(_plain(self), sort_keys=True, allow_nan=False)


def _plain(header: LrHeader) -> dict[str, Any]:
    values = to_mapping(dataclasses.replace(header, training={}, recipe=dataclasses.replace(header.recipe, args={})))
    values["training"] = dict(header.training)
    values["recipe"]["args"] = dict(header.recipe.args)
    return values


def header_from_json(text: str, where: str) -> LrHeader:
    """The inverse of ``LrHeader.to_json``. Raises WeightsError, naming ``where``, when it is damaged or later."""
    try:
        values = parse_json(text)
        version = values.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise WeightsError(
                f"{where} has format version {version}, and this wsi-pipe reads up to {FORMAT_VERSION}",
                remedy="use a newer wsi-pipe",
            )
        training = values.pop("training", {})
        recipe = values.pop("recipe")
        args = recipe.pop("args", {})
        preprocessing = from_mapping(Preprocessing, recipe.pop("preprocessing"), "preprocessing")
        recipe = Recipe(preprocessing=preprocessing, args=args, **recipe)
        tile = from_mapping(TileSpec, values.pop("tile"), "tile")
        return LrHeader(recipe=recipe, tile=tile, training=training, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{where}: its LR encoder metadata is damaged: {error}", remedy="write it again") from error


def write_lr_encoder(
    path: Path,
    network: PooledNetwork | Mapping[str, Tensor],
    *,
    recipe: Recipe,
    tile: TileSpec,
    licence: str,
    name: str = "",
    training: Mapping[str, Any] | None = None,
) -> LrHeader:
    """Write an LR encoder that ``load_encoder`` loads; the file appears whole or not at all.

    network: the distilled network, or the state dict of its trunk (the architecture's own key names). recipe: builds
    an equal network. tile: what it was distilled on; grids at another resolution will be refused. licence: of these
    weights, which a teacher's licence may bind. training: anything JSON-able worth keeping.

    Raises WeightsError when the tensors do not fit the recipe or give another dimension, ConfigError when ``training``
    is not JSON-able, OutputError when the file cannot be written.
    """
    import torch

    from wsi_pipe.encoders.architectures import PooledNetwork, build_unfilled
    from wsi_pipe.encoders.building import check_dimension
    from wsi_pipe.encoders.weights import load_into

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: an LR encoder's file must end in .safetensors")
    given = network.trunk.state_dict() if isinstance(network, PooledNetwork) else network
    # clone: tensors that share memory cannot be stored, and float32 so that a file does not depend on a precision.
    state = {
        key: value.detach().to("cpu", torch.float32 if value.is_floating_point() else None).contiguous().clone()
        for key, value in given.items()
    }
    label = name or path.stem
    built = build_unfilled(recipe, name=label)
    load_into(built.trunk, state, label, "the network")
    check_dimension(built, recipe, label, "these weights")
    header = LrHeader(recipe, tile, licence, label, dict(training or {}), tensors_sha256(state))
    try:
        text = header.to_json()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training information is not JSON-able: {error}") from error
    with atomic_path(path, check=lambda written: _check_tensors(written, header)) as temporary:
        write_tensor_file(temporary, state, {METADATA_KEY: text})
    return header


def _check_tensors(path: Path, header: LrHeader) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a valid safetensors file: {error}", remedy="write it again") from error
    if tensors_sha256(state) != header.tensors_sha256:
        raise WeightsError(
            f"{path}: its tensors are not those that its metadata was written for", remedy="copy or write it again"
        )
    return state


def read_lr_header(path: Path) -> LrHeader:
    """What an LR encoder's file says of itself, read without loading its tensors.

    Raises WeightsError when the file is missing, damaged, not an LR encoder, or of a later format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file", remedy="give the path of an LR encoder")
    try:
        with safe_open(path, framework="numpy") as handle:
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is not a valid safetensors file: {error}", remedy="copy or write it again"
        ) from error
    if METADATA_KEY not in metadata:
        raise WeightsError(
            f"{path} is not an LR encoder: it has no {METADATA_KEY} metadata",
            remedy="for plain weights write NAME@FILE or timm:MODEL@FILE",
        )
    return header_from_json(metadata[METADATA_KEY], str(path))


def load_lr_network(path: Path, name: str) -> tuple[PooledNetwork, Recipe, EncoderInfo]:
    """Network, recipe and facts of an LR encoder's file. Raises WeightsError when it is damaged."""
    from wsi_pipe.encoders.architectures import build_unfilled
    from wsi_pipe.encoders.building import check_dimension
    from wsi_pipe.encoders.weights import file_sha256, load_into

    header = read_lr_header(path)
    slug = encoder_slug(path.stem)
    network, weights = build_unfilled(header.recipe, name=name), file_sha256(path)
    load_into(network.trunk, _check_tensors(path, header), name, str(path))
    check_dimension(network, header.recipe, name, str(path))
    info = EncoderInfo(
        name,
        slug,
        header.recipe.dim,
        weights,
        header.licence,
        input_px=header.recipe.preprocessing.input_px,
        mpp=header.tile.mpp,
        mpp_required=True,
        tile_px=header.tile.size_px,
        seen=_seen(header, path),
    )
    return network, header.recipe, info


def _seen(header: LrHeader, path: Path) -> Seen:
    try:
        return Seen.from_json(header.training.get("seen"))
    except ValueError as error:
        raise WeightsError(f"{path}: {error}", remedy="write it again") from error
