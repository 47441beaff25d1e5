"""From an encoder's name to an encoder on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsi_pipe.encoders import hub
from wsi_pipe.encoders.architectures import PooledNetwork, build_unfilled, timm_recipe
from wsi_pipe.encoders.base import EncoderInfo
from wsi_pipe.encoders.building import build_random, check_dimension
from wsi_pipe.encoders.devices import resolve_devices, shared_precision
from wsi_pipe.encoders.graphs import graph_network
from wsi_pipe.encoders.lr_file import load_lr_network
from wsi_pipe.encoders.naming import is_lr_file, slug_of
from wsi_pipe.encoders.pins import check_pin
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX, random_weights_id
from wsi_pipe.encoders.recipe import Recipe
from wsi_pipe.encoders.registry import GRAPHS, RegistryEntry, find_entry
from wsi_pipe.encoders.torch_encoder import ReplicatedEncoder, TorchEncoder
from wsi_pipe.encoders.weights import (
    KEY_MAPS,
    State,
    file_sha256,
    load_into,
    read_state,
    without_prefix,
)
from wsi_pipe.errors import ConfigError, WeightsError

__all__ = ["load_torch_encoder", "normalised_state"]


@dataclass(frozen=True)
class _Source:
    """Where an encoder's weights come from and how they are read.

    path: an own checkpoint. known_as: the name under which weights lie in a folder, the table's where an alias was
    given. The rest as in RegistryEntry.
    """

    known_as: str
    path: Path | None = None
    hub_id: str = ""
    hub_type: str = "model"
    files: tuple[str, ...] = ()
    gated: bool = False
    revision: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    trusted: bool = False
    nested: str | None = None
    prefix: str = ""
    keys: str = "timm"
    ignore: tuple[str, ...] = ()


def load_torch_encoder(
    name: str,
    *,
    device: str | Sequence[str] = "auto",
    precision: str = "auto",
    random_weights: bool = False,
    compile: bool = False,
    input_px: int | None = None,
) -> TorchEncoder | ReplicatedEncoder:
    """See ``wsi_pipe.encoders.load_encoder``; everything but "texture"."""
    devices = resolve_devices(device)
    base, at, checkpoint = name.partition("@")
    distilled = is_lr_file(name)
    if random_weights and (distilled or checkpoint):
        raise ConfigError(f"encoder {name} names weights, and random weights are asked for", remedy="choose one")
    if at and not checkpoint:
        raise ConfigError(f"encoder {name!r} names no file after '@'", remedy=f"write {base}@FILE")
    preferred = "auto"
    if distilled:
        if input_px is not None:
            raise ConfigError(f"encoder {name} states its own input side", remedy="leave out input_px")
        network, recipe, info = load_lr_network(Path(name), name)
    else:
        if base.startswith("timm:"):
            recipe, info, source = _from_timm(base.removeprefix("timm:"), name)
        else:
            entry = find_entry(base)
            recipe, info, source = _from_registry(entry, name)
            preferred = entry.precision
        # Weights that a table gives as a file are given as much as those behind an "@".
        random_weights = random_weights and source.path is None
        if checkpoint:
            source = dataclasses.replace(source, path=Path(checkpoint))
        if input_px is not None:
            recipe = _resized(recipe, input_px)
        network, weights = _network(recipe, info, source, random_weights=random_weights, input_px=input_px)
        info = dataclasses.replace(info, weights_sha256=weights, input_px=recipe.preprocessing.input_px)
        if random_weights:
            named, slug = f"{info.name}{RANDOM_SUFFIX}", f"{info.slug}{RANDOM_SUFFIX}"
            info = dataclasses.replace(info, name=named, slug=slug, random=True)
    precision = shared_precision(precision, preferred, devices)
    replicas = []
    for place in devices:
        # Each replica needs weights of its own; the last may have the network itself.
        copy = network if place is devices[-1] else _copy(network)
        replicas.append(TorchEncoder(copy, recipe, info, device=place, precision=precision, compile=compile))
    return replicas[0] if len(replicas) == 1 else ReplicatedEncoder(replicas)


def _copy(network: PooledNetwork) -> PooledNetwork:
    import copy

    return copy.deepcopy(network)


def _resized(recipe: Recipe, input_px: int) -> Recipe:
    pre = dataclasses.replace(recipe.preprocessing, input_px=input_px, resize_px=None)
    return dataclasses.replace(recipe, preprocessing=pre)


def _from_timm(model: str, name: str) -> tuple[Recipe, EncoderInfo, _Source]:
    recipe, facts = timm_recipe(model)
    info = EncoderInfo(name, slug_of(name), recipe.dim, "", facts["licence"], input_px=recipe.preprocessing.input_px)
    classifier = facts["classifier"]
    heads = [classifier] if isinstance(classifier, str) else list(classifier or ())
    return recipe, info, _Source(
        known_as=f"timm:{model}",
        hub_id=facts["hub_id"],
        files=(facts["file"],) if facts["file"] else ("model.safetensors", "pytorch_model.bin"),
        ignore=tuple(rf"{head.replace('.', chr(92) + '.')}\..*" for head in heads),
    )  # fmt: skip


def _from_registry(entry: RegistryEntry, name: str) -> tuple[Recipe, EncoderInfo, _Source]:
    info = EncoderInfo(name, slug_of(name), entry.dim, "", entry.licence, input_px=entry.input_px, mpp=entry.mpp)
    return entry.recipe, info, _Source(
        known_as=entry.name,
        path=entry.local_file,
        hub_id=entry.hub_id,
        hub_type=entry.hub_type,
        files=entry.files,
        gated=entry.gated,
        revision=entry.revision,
        sha256=entry.sha256,
        trusted=entry.trusted,
        nested=entry.nested,
        prefix=entry.prefix,
        keys=entry.keys,
        ignore=entry.ignore,
    )  # fmt: skip


def _network(
    recipe: Recipe, info: EncoderInfo, source: _Source, *, random_weights: bool, input_px: int | None
) -> tuple[PooledNetwork, str]:
    """The network with its weights, and what identifies them."""
    name = info.name
    if random_weights:
        return build_random(recipe, info.slug, input_px=input_px), random_weights_id(info.slug)
    path = source.path or hub.download(
        source.known_as,
        source.hub_id,
        source.files,
        gated=source.gated,
        repo_type=source.hub_type,
        revision=source.revision,
    )
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file", remedy="give the path of a checkpoint")
    sha256 = file_sha256(path)
    if source.path is None:
        check_pin(source.known_as, source.hub_id, path, sha256, source.sha256)
    if recipe.architecture in GRAPHS:
        network = PooledNetwork(graph_network(recipe.architecture, path, trusted=source.trusted), "model").eval()
        check_dimension(network, recipe, name, str(path))
        return network, sha256
    network = build_unfilled(recipe, name=name, input_px=input_px)
    state = normalised_state(network, read_state(path, source.nested), name, str(path), source.prefix, source.keys)
    load_into(network.trunk, state, name, str(path), ignore=source.ignore)
    check_dimension(network, recipe, name, str(path))
    return network, sha256


def normalised_state(
    network: PooledNetwork, state: State, name: str, source: str, prefix: str = "", keys: str = "timm"
) -> State:
    """A checkpoint's tensors under the key names of the network's trunk; for the arguments see RegistryEntry.

    Raises WeightsError when the names cannot be brought there.
    """
    if prefix and any(key.startswith(prefix) for key in state):
        state = without_prefix(state, prefix)
    own = network.trunk.state_dict()
    # Of the same names, a position embedding may still be of another grid.
    if keys in KEY_MAPS and (
        state.keys() != own.keys() or any(value.shape != own[key].shape for key, value in state.items())
    ):
        try:
            return KEY_MAPS[keys](state, network.trunk)
        except (KeyError, RuntimeError, AttributeError, ValueError) as error:
            raise WeightsError(
                f"{source} does not fit encoder {name}: {type(error).__name__} {error}",
                remedy="check that the file belongs to this encoder and is complete",
            ) from error
    return state
