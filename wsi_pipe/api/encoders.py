"""What ``encode`` takes as an encoder: a name, one that is ready, a network, or any callable on tiles."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_pipe.asked import absolute_file
from wsi_pipe.config import ExtractSettings
from wsi_pipe.encoders import encoder_of_job
from wsi_pipe.encoders.base import Encoder, EncoderInfo, check_finite, encoder_slug
from wsi_pipe.encoders.naming import split_stain
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import ConfigError, EncoderOutputError, UnknownEncoderError

if TYPE_CHECKING:
    import torch

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CallableEncoder",
    "EncodesTiles",
    "ready_encoder",
    "register_encoder",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TilesIn = NDArray[np.uint8]
EncodesTiles = Callable[[TilesIn], Any]
"""Features (B, D), an array or a tensor, of tiles uint8 (B, H, W, 3), RGB."""


@dataclass(frozen=True)
class _Ready:
    """Features of a call that is over already."""

    features: NDArray[np.float32]

    def result(self) -> NDArray[np.float32]:
        return self.features


class CallableEncoder:
    """Any callable on tiles as an encoder.

    It gets uint8 (B, H, W, 3), RGB, contiguous, and gives (B, D). info: its ``dim`` is what the callable must give.
    Nothing is known of what it computes but its name, and ``version``, which the hash in a bag is made of.
    """

    def __init__(self, function: EncodesTiles, info: EncoderInfo) -> None:
        self._function = function
        self.info = info

    @classmethod
    def of(cls, function: EncodesTiles, name: str, version: str, tile_px: int) -> CallableEncoder:
        """The encoder, its width found by a call with one white tile of ``tile_px``. Raises EncoderOutputError."""
        sha256 = hashlib.sha256(f"callable\0{name}\0{version}".encode()).hexdigest()
        transform = {"callable": name, "version": version}
        info = EncoderInfo(name, encoder_slug(name), 1, sha256, "not stated", transform=transform)
        tile = np.full((1, tile_px, tile_px, 3), 255, np.uint8)
        dim = cls(function, info)._called(tile).shape[1]
        return cls(function, EncoderInfo(name, info.slug, dim, sha256, info.licence, transform=transform))

    def _called(self, tiles: TilesIn) -> NDArray[np.float32]:
        given: Any = self._function(tiles)
        if hasattr(given, "detach"):
            given = given.detach().cpu().float().numpy()
        features = np.asarray(given)
        if features.ndim != 2 or len(features) != len(tiles) or not np.issubdtype(features.dtype, np.number):
            raise EncoderOutputError(
                f"{self.info.name} gave {features.dtype} {features.shape} for {len(tiles)} tiles",
                remedy="give numbers (B, D), a row for each tile",
            )
        return np.ascontiguousarray(features, np.float32)

    def encode(self, tiles: TilesIn) -> NDArray[np.float32]:
        """See Encoder.encode."""
        features = self._called(tiles)
        if features.shape[1] != self.info.dim:
            raise EncoderOutputError(
                f"{self.info.name} gave {features.shape[1]} features, and {self.info.dim} of the tile before",
                remedy="give as many for every tile",
            )
        return check_finite(features, self.info.name)

    def submit(self, tiles: TilesIn) -> _Ready:
        """See Encoder.submit."""
        return _Ready(self.encode(tiles))


def ready_encoder(
    encoder: str | Encoder | torch.nn.Module | EncodesTiles,
    settings: ExtractSettings,
    *,
    tile_px: int,
    name: str | None = None,
    version: str = "",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_px: int | None = None,
) -> Encoder:
    """The encoder that ``encoder`` stands for.

    A name is loaded as the command line does. A network is copied, put on the device of ``settings`` and gets float32
    images (B, 3, H, W), ``(tile / 255 - mean) / std``, resized to ``input_px`` where that is given. Any other callable
    gets the tiles as they are. Raises ConfigError for arguments that do not go together and for a name that is taken,
    and what loading an encoder raises.
    """
    plain = ExtractSettings()
    own = {"name": name, "version": version, "mean": mean, "std": std, "input_px": input_px}
    for option in ("devices", "precision", "compile", "random_weights"):
        value = getattr(settings, option)
        own[option.removesuffix("s") if option == "devices" else option] = (
            None if value == getattr(plain, option) else value
        )
    if isinstance(encoder, str):
        _refuse(own, HARDWARE, "an encoder that goes by its name")
        return encoder_of_job(absolute_file(encoder), settings)
    if _is_module(encoder):
        _refuse(own, ("name", "version", "mean", "std", "input_px", *HARDWARE[:3]), "a network")
        return _of_network(encoder, settings, tile_px, name, version, mean, std, input_px)
    if isinstance(encoder, Encoder):
        _refuse(own, (), "an encoder that is ready")
        return encoder
    if not callable(encoder):
        raise ConfigError(
            f"a {type(encoder).__name__} is no encoder", remedy="give a name, a torch.nn.Module, or a callable on tiles"
        )
    _refuse(own, ("name", "version"), "a callable")
    return CallableEncoder.of(encoder, _own_name(encoder, name), version, tile_px)


def register_encoder(
    name: str,
    encoder: Encoder | torch.nn.Module | EncodesTiles,
    *,
    version: str = "",
    tile_px: int = 256,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_px: int | None = None,
    mpp: float | None = None,
    licence: str | None = None,
    device: str = "auto",
) -> Encoder:
    """Give an encoder of your own a name that jobs, grids and ``load_encoder`` of this process know.

    encoder: a callable on tiles uint8 (B, H, W, 3) that gives (B, D); a network on images float32 (B, 3, S, S),
    ``(tile / 255 - mean) / std`` (ImageNet's by default), resized to ``input_px`` where that is given; or one that is
    ready. version: tells a callable's features from those of an earlier version of it. tile_px: side of the tile that
    its width is tried with. mpp: um/px that it was made for. device: of a network. A name that was registered before
    is given anew. It is known in this process alone: for the command line and for worker processes write a TOML table
    (docs/encoders.md).

    Raises ConfigError for a name that is taken and for arguments that do not go with it, EncoderOutputError for one
    that gives no features (B, D).
    """
    from wsi_pipe.encoders.own import forget, remember

    forget(name)
    settings = ExtractSettings(devices=tuple(device.split(",")))
    made: Any = ready_encoder(
        encoder, settings, tile_px=tile_px, name=name, version=version, mean=mean, std=std, input_px=input_px
    )
    facts = {"mpp": mpp, "licence": licence}
    try:
        made.info = dataclasses.replace(made.info, **{key: value for key, value in facts.items() if value is not None})
    except AttributeError:
        if any(facts.values()):
            raise ConfigError("mpp and licence are given with an encoder that states its own") from None
    remember(name, made)
    ready: Encoder = made
    return ready


HARDWARE = ("device", "precision", "compile", "random_weights")


def _refuse(own: dict[str, Any], known: Sequence[str], what: str) -> None:
    unknown = [name for name, value in own.items() if value not in (None, "") and name not in known]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)} is given with {what}", remedy="leave it out")


def _is_module(value: Any) -> bool:
    import sys

    # Who holds a network has imported torch; nobody else need.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _own_name(encoder: Any, given: str | None) -> str:
    name = given or getattr(encoder, "__name__", None) or type(encoder).__name__
    if not encoder_slug(name) or name == "<lambda>":
        raise ConfigError("the encoder has no name to stand under in bags", remedy="give one: name='my-encoder'")
    taken = name == "texture" or name.endswith((RANDOM_SUFFIX, ".safetensors")) or name.startswith("timm:")
    taken = taken or split_stain(name)[1] is not None
    with contextlib.suppress(UnknownEncoderError):
        taken = taken or bool(find_entry(name))
    if taken:
        raise ConfigError(
            f"{name!r} is the name of an encoder of this program, which yours is not", remedy="give another: name='...'"
        )
    return str(name)


def _of_network(
    network: Any,
    settings: ExtractSettings,
    tile_px: int,
    name: str | None,
    version: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_px: int | None,
) -> Encoder:
    import torch

    from wsi_pipe.encoders.architectures import PooledNetwork
    from wsi_pipe.encoders.devices import resolve_devices
    from wsi_pipe.encoders.recipe import Preprocessing, Recipe
    from wsi_pipe.encoders.torch_encoder import TorchEncoder

    own = _own_name(network, name)
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}\0{version}".encode())
    for key, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"\0{key}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        # Bytes, since numpy has no bfloat16.
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    device = resolve_devices(",".join(settings.devices))[0]
    # The caller's stays as it is, in mode, place and precision.
    trunk = copy.deepcopy(network).to(device).eval()
    preprocessing = Preprocessing(input_px, _three(mean, IMAGENET_MEAN), _three(std, IMAGENET_STD))
    side = input_px or tile_px
    with torch.inference_mode():
        out = trunk(torch.zeros((1, 3, side, side), device=device))
    if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != 1:
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise EncoderOutputError(
            f"{own} gave {shape} for one image (1, 3, {side}, {side})", remedy="give a network that ends in (B, D)"
        )
    recipe = Recipe(f"torch:{own}", int(out.shape[1]), preprocessing)
    info = EncoderInfo(own, encoder_slug(own), recipe.dim, digest.hexdigest(), "not stated", input_px=input_px)
    # Half precision is for networks that are known to bear it.
    precision = "float32" if settings.precision == "auto" else settings.precision
    compiled = settings.compile
    return TorchEncoder(
        PooledNetwork(trunk, "model"), recipe, info, device=device, precision=precision, compile=compiled
    )


def _three(given: Sequence[float] | None, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values: ArrayLike = default if given is None else given
    numbers = np.asarray(values, float).reshape(-1)
    if len(numbers) != 3:
        raise ConfigError(f"mean and std are three numbers each, not {len(numbers)}")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))
