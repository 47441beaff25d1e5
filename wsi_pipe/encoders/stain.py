"""Tiles in the colours of one reference, before an encoder sees them: Macenko's method and Reinhard's, tile by tile.

Everything is estimated on the tile itself, so that features depend neither on a batch nor on a slide's other tiles. A
tile with too little stain to tell, and what of a tile is background, stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsi_pipe.encoders.base import Encoder, EncoderInfo, FeatureArray, PendingFeatures, TileArray
from wsi_pipe.encoders.naming import STAINS
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.encoders.torch_encoder import ReplicatedEncoder, TorchEncoder
from wsi_pipe.errors import ConfigError

__all__ = ["REFERENCES", "StainNormaliser", "macenko", "reinhard", "stained"]

VERSION = 1
LIGHT = 240.0
"""Grey level of unstained glass, Io of Macenko's method."""
LEAST_OD = 0.15
"""Optical density, natural logarithm, from which a channel counts as stained."""
LEAST_STAINED = 0.02
"""Share of a tile that must be stained for its colours to be estimated."""
EDGE = 1.0
"""Percentile of angles at which a stain's direction is taken, and of concentrations that are left above its most."""

REFERENCES: dict[str, dict[str, list[Any]]] = {
    "macenko": {
        "stains": [[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]],
        "most": [1.9705, 1.0308],
    },
    "reinhard": {
        "mean": [8.63234435, -0.11501964, 0.03868433],
        "sd": [0.57506023, 0.10403329, 0.01364062],
    },
}
"""What tiles are brought to. Macenko: optical densities of haematoxylin and eosin (R, G, B), and the concentrations at
the 99th percentile, as in mitkovetta/staining-normalization. Reinhard: mean and standard deviation in l, alpha, beta,
as HistomicsTK gives them for a slide of TCGA."""

_LMS = [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]


def _density(tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Optical densities float32 (B, P, 3) of uint8 tiles (B, H, W, 3), and which pixels take light in every colour,
    from which stains are told, and which in any, which are changed; bool (B, P)."""
    grey = tiles.flatten(1, 2).to(torch.float32)
    density = -torch.log((grey + 1) / LIGHT)
    takes = density >= LEAST_OD
    return density, takes.all(dim=-1), takes.any(dim=-1)


def _percentile(values: Tensor, which: Tensor, percent: float) -> Tensor:
    """The percentile of the chosen values of each row, (B,): the value at that rank, without interpolation."""
    ordered = torch.where(which, values, torch.inf).sort(dim=1).values
    count = which.sum(dim=1)
    place = ((count - 1).clamp_min(0) * (percent / 100)).round().long()
    return torch.where(count > 0, ordered.gather(1, place[:, None])[:, 0], 0.0)


def macenko(tiles: Tensor) -> Tensor:
    """Tiles uint8 (B, H, W, 3) with the stains of the reference in the place of their own.

    Source: Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009.
    """
    reference = REFERENCES["macenko"]
    wanted = torch.tensor(reference["stains"], dtype=torch.float32, device=tiles.device)
    most = torch.tensor(reference["most"], dtype=torch.float32, device=tiles.device)
    density, stained, changed = _density(tiles)
    weight = stained.to(torch.float32)[..., None]
    count = weight.sum(dim=1).clamp_min(1)
    centred = (density - (density * weight).sum(dim=1, keepdim=True) / count[:, None]) * weight
    spread = centred.transpose(1, 2) @ centred / count[..., None]
    # The plane of the two stains: the two directions of most variance, each towards more of every colour.
    plane = torch.linalg.eigh(spread.double()).eigenvectors[:, :, [2, 1]].float()
    plane = plane * torch.where(plane[:, :1] < 0, -1.0, 1.0)
    along = density @ plane
    angle = torch.atan2(along[..., 1], along[..., 0])
    ends = [_percentile(angle, stained, EDGE), _percentile(angle, stained, 100 - EDGE)]
    found = [plane @ torch.stack([end.cos(), end.sin()], dim=1)[..., None] for end in ends]
    low, high = found[0][..., 0], found[1][..., 0]
    # Haematoxylin takes more red than eosin does.
    first = low[:, :1] > high[:, :1]
    own = torch.stack([torch.where(first, low, high), torch.where(first, high, low)], dim=2)
    own = own / own.norm(dim=1, keepdim=True).clamp_min(1e-6)
    # Least squares on two directions of length one, whose angle has this cosine.
    cosine = (own[:, :, 0] * own[:, :, 1]).sum(dim=1)
    apart = 1 - cosine.square()
    along = density @ own
    amounts = (along - along.flip(-1) * cosine[:, None, None]) / apart.clamp_min(1e-6)[:, None, None]
    limits = torch.stack([_percentile(amounts[..., k], stained, 100 - EDGE) for k in range(2)], dim=1)
    scaled = amounts * (most / limits.clamp_min(1e-6))[:, None]
    out = LIGHT * torch.exp(-(scaled @ wanted.T)) - 1
    tells = (limits > 1e-3).all(dim=1) & (apart > 1e-4)
    return _only_where(tiles, out, stained, changed, tells)


def reinhard(tiles: Tensor) -> Tensor:
    """Tiles uint8 (B, H, W, 3) whose stained pixels have the mean and spread of the reference in l, alpha, beta.

    Source: Reinhard et al., Color transfer between images, IEEE Computer Graphics and Applications 21, 2001.
    """
    reference = REFERENCES["reinhard"]
    mean, sd = (torch.tensor(reference[name], dtype=torch.float32, device=tiles.device) for name in ("mean", "sd"))
    lms = torch.tensor(_LMS, dtype=torch.float32, device=tiles.device)
    turn = torch.tensor([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]], device=tiles.device)
    turn = turn / turn.norm(dim=1, keepdim=True)
    _, _, stained = _density(tiles)
    colour = torch.log((tiles.flatten(1, 2).to(torch.float32) + 1) @ lms.T) @ turn.T
    weight = stained.to(torch.float32)[..., None]
    count = weight.sum(dim=1, keepdim=True).clamp_min(1)
    own_mean = (colour * weight).sum(dim=1, keepdim=True) / count
    own_sd = (((colour - own_mean).square() * weight).sum(dim=1, keepdim=True) / count).sqrt()
    moved = (colour - own_mean) / own_sd.clamp_min(1e-6) * sd + mean
    out = torch.exp(moved @ turn) @ torch.linalg.inv(lms).T - 1
    return _only_where(tiles, out, stained, stained, (own_sd[:, 0] > 1e-4).all(dim=1))


def _only_where(tiles: Tensor, out: Tensor, stained: Tensor, changed: Tensor, tells: Tensor) -> Tensor:
    """``out`` as grey values in the pixels that are changed, of the tiles that tell; else what was there."""
    tells = tells & (stained.to(torch.float32).mean(dim=1) >= LEAST_STAINED) & torch.isfinite(out).all(dim=(1, 2))
    new = out.nan_to_num(0).clamp(0, 255).round().to(torch.uint8)
    return torch.where((changed & tells[:, None])[..., None], new, tiles.flatten(1, 2)).view(tiles.shape)


_METHODS: dict[str, Callable[[Tensor], Tensor]] = {"macenko": macenko, "reinhard": reinhard}
assert set(_METHODS) == set(STAINS)


class StainNormaliser:
    """A method by name, a part of the batch at a time, so that large tiles take little memory."""

    AT_ONCE = 1 << 22
    """Pixels."""

    def __init__(self, method: str) -> None:
        self._method = _METHODS[method]

    def __call__(self, tiles: Tensor) -> Tensor:
        """Tiles uint8 (B, H, W, 3) on any device; the given ones stay as they are."""
        if not len(tiles):
            return tiles
        size = max(1, self.AT_ONCE // max(1, tiles.shape[1] * tiles.shape[2]))
        parts = [self._method(tiles[at : at + size]) for at in range(0, len(tiles), size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _info(info: EncoderInfo, method: str) -> EncoderInfo:
    """Facts of an encoder that sees normalised tiles: name and slug of its own, the reference in its transform."""
    tail = RANDOM_SUFFIX if info.random else ""
    name, slug = (text.removesuffix(tail) + f"+{method}{tail}" for text in (info.name, info.slug))
    stain = {"method": method, "version": VERSION, "reference": REFERENCES[method]}
    return dataclasses.replace(info, name=name, slug=slug, transform={**info.transform, "stain": stain})


class _StainedEncoder:
    """An encoder of any kind behind a normaliser that runs on the CPU."""

    def __init__(self, encoder: Encoder, method: str) -> None:
        self._encoder = encoder
        self._normalise = StainNormaliser(method)
        self.info = _info(encoder.info, method)

    def __getattr__(self, name: str) -> Any:
        # How it likes to be fed; layers would come of a network, which is not behind this.
        if name in ("shares_batches", "in_flight", "suggest_batch", "release"):
            return getattr(self._encoder, name)
        raise AttributeError(name)

    def _normalised(self, tiles: TileArray) -> TileArray:
        source = torch.from_numpy(np.require(tiles, requirements=("C", "W")))
        normalised: TileArray = self._normalise(source).numpy()
        return normalised

    def encode(self, tiles: TileArray) -> FeatureArray:
        """See Encoder.encode."""
        return self._encoder.encode(self._normalised(tiles))

    def submit(self, tiles: TileArray) -> PendingFeatures:
        """See Encoder.submit."""
        return self._encoder.submit(self._normalised(tiles))


def stained(encoder: Encoder, method: str, *, own: bool = True) -> Encoder:
    """The encoder behind a normaliser: of a network on the network's device, of others on the CPU.

    own: it may be changed, since nobody else holds it. Raises ConfigError for an encoder that was made for tiles as
    they are.
    """
    if encoder.info.mpp_required:
        raise ConfigError(
            f"encoder {encoder.info.name} was distilled from tiles as they are",
            remedy=f"leave out +{method}: its features of other colours would mean something else",
        )
    if own and isinstance(encoder, (TorchEncoder, ReplicatedEncoder)):
        for replica in encoder.replicas if isinstance(encoder, ReplicatedEncoder) else (encoder,):
            replica.prepare = StainNormaliser(method)
            replica.info = _info(replica.info, method)
        return encoder
    return _StainedEncoder(encoder, method)
