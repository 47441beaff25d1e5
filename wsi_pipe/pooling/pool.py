"""Every bag of a job gets a vector of the whole slide."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.bag import (
    BagLevelView,
    SlideVector,
    read_attention,
    read_grids,
    read_level,
    read_slide_vectors,
    skim_file,
    write_attention,
    write_slide_vector,
)
from wsi_pipe.encoders import hub
from wsi_pipe.encoders.pins import check_pin
from wsi_pipe.errors import BagError, ConfigError, OutputError, WeightsError, WsiPipeError
from wsi_pipe.files import file_sha256
from wsi_pipe.interop.export import Chosen, choose_features
from wsi_pipe.job.guard import read_guarded
from wsi_pipe.pooling.attending import most_attended
from wsi_pipe.pooling.known import SlideEncoder, find_slide_encoder

if TYPE_CHECKING:
    from wsi_pipe.pooling.networks import SlideNetwork
    from wsi_pipe.pooling.remote import RemoteEncoder

__all__ = ["Pooled", "pool_job"]

TOP = 25
"""Tiles that EAGLE takes."""


@dataclass(frozen=True)
class Pooled:
    """What became of one slide.

    status: "written"; "unchanged", its vector was there; "empty", it has no tiles; "left out", it has no such features;
    "failed". reason: why, of the last three. vector: float32 (D,), where there is one.
    """

    slide_id: str
    status: Literal["written", "unchanged", "empty", "left out", "failed"]
    reason: str = ""
    case_id: str = ""
    tiles: int = 0
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Ready:
    """A slide encoder with its weights. sha256: of their file, "" where it has none."""

    spec: SlideEncoder
    network: SlideNetwork | None = None
    remote: RemoteEncoder | None = None
    sha256: str = ""
    attention: str = ""
    top: int = TOP
    device: str = "cpu"

    @property
    def made(self) -> str:
        """JSON text on what a vector is made with beside features and weights."""
        more: dict[str, Any] = {}
        if self.spec.kind == "attention":
            more = {"attention": self.attention, "top": self.top}
        elif self.spec.kind == "remote":
            more = {"revision": self.spec.revision}
        return json.dumps(more, sort_keys=True)


def pool_job(
    root: Path,
    slide_encoder: str,
    *,
    level: str | None = None,
    encoder: str | None = None,
    name: str | None = None,
    attention: str | None = None,
    top: int = TOP,
    weights: Path | None = None,
    trust_remote_code: bool = False,
    allow_random: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[Pooled]:
    """Give every bag of a job, or of a folder of bags, the vector of a slide encoder; one result a slide, in order.

    level, encoder: of the tile features; by default those that the slide encoder needs, else the only ones there are.
    name: under which the vector stands in the bags, by default the slide encoder's. attention, top: for
    "top-attention", whose attention in the bags is taken, and how many tiles. weights: a file of one's own. A slide
    whose bag cannot be read ends itself alone; a vector that is right already stays.

    Raises UnknownEncoderError, WeightsError, ConfigError or ResolutionError for what does not fit, before anything is
    written, OutputError when a bag cannot be written.
    """
    spec = find_slide_encoder(slide_encoder)
    if (attention is not None) != (spec.kind == "attention"):
        raise ConfigError(
            f"slide encoder {spec.name} {'needs' if spec.kind == 'attention' else 'takes no'} attention",
            remedy="name a model whose attention the bags hold: --attention (lrmil predict --attention writes it)"
            if spec.kind == "attention"
            else "leave out --attention",
        )
    if top < 1:
        raise ConfigError(f"top {top} must be at least 1")
    chosen = choose_features(root, level, encoder or spec.encoder or None, allow_random=allow_random)
    _check_first(spec, chosen)
    ready = _ready(spec, weights, trust_remote_code, attention or "", top, device)
    label = name or spec.name
    if "/" in label or not label.strip("."):
        raise ConfigError(f"{label!r} is no name for a vector", remedy="give one without slashes")
    return _pooled(chosen, ready, label, progress)


def _check_first(spec: SlideEncoder, chosen: Chosen) -> None:
    """What every slide of a job shares shows on the first."""
    for path in chosen.bags.values():
        try:
            view = _view(path, chosen)
        except BagError:
            continue
        spec.check(chosen.encoder, view.features.shape[1], view.grid)
        return


def _ready(spec: SlideEncoder, weights: Path | None, trust: bool, attention: str, top: int, device: str) -> _Ready:
    if spec.kind in ("plain", "attention"):
        if weights is not None:
            raise ConfigError(f"slide encoder {spec.name} has no weights", remedy="leave out --weights")
        return _Ready(spec, attention=attention, top=top)
    if spec.kind == "remote":
        from wsi_pipe.pooling.remote import RemoteEncoder

        if weights is not None:
            raise ConfigError(f"slide encoder {spec.name} comes with its makers' code alone")
        return _Ready(spec, remote=RemoteEncoder(spec, trust=trust, device=device), device=device)
    from wsi_pipe.pooling.networks import load_network

    path = weights or _weights(spec)
    sha256 = file_sha256(path) if path.is_file() else ""
    if weights is None:
        check_pin(spec.name, spec.hub_id, path, sha256, {path.name: spec.sha256})
    network = load_network(spec.network, path, spec.name)
    return _Ready(spec, network=network.to(device), sha256=sha256, device=device)


def _weights(spec: SlideEncoder) -> Path:
    if spec.hub_id:
        return hub.download(spec.name, spec.hub_id, spec.files, gated=True, revision=spec.revision)
    found = hub.find_local(spec.name, "", ())
    if found is None:
        raise WeightsError(
            f"weights of slide encoder {spec.name} lie on no hub: {spec.page} says where",
            remedy=f"download them there and give them with --weights FILE (stated SHA-256 {spec.sha256})",
        )
    return found


def _view(path: Path, chosen: Chosen) -> BagLevelView:
    read_guarded(skim_file, path)
    return read_level(path, chosen.level, chosen.slug)


def _pooled(
    chosen: Chosen, ready: _Ready, name: str, progress: Callable[[int, int], object] | None
) -> Iterator[Pooled]:
    for number, (slide_id, path) in enumerate(chosen.bags.items(), start=1):
        yield _pool_slide(slide_id, path, chosen, ready, name)
        if progress is not None:
            progress(number, len(chosen.bags))
    for slide_id, reason in chosen.absent.items():
        yield Pooled(slide_id, "left out", reason)


def _pool_slide(slide_id: str, path: Path, chosen: Chosen, ready: _Ready, name: str) -> Pooled:
    try:
        view = _view(path, chosen)
        case = view.attrs.case_id
        if not len(view.features):
            return Pooled(slide_id, "empty", view.attrs.empty_reason or f"no tile at {chosen.level}", case)
        ready.spec.check(chosen.encoder, view.features.shape[1], view.grid)
        held = read_slide_vectors(path).get(name)
        facts = (ready.spec.name, chosen.level, chosen.slug, view.fingerprint, ready.sha256, ready.made)
        if held is not None and facts == (
            held.slide_encoder, held.level, held.encoder, held.features, held.weights_sha256, held.made
        ) and ready.spec.kind != "attention":  # fmt: skip
            return Pooled(slide_id, "unchanged", "", case, len(view.features), held.values)
        vector, weights = _vector(path, view, ready)
        made = SlideVector(
            vector, ready.spec.name, chosen.level, chosen.slug, view.fingerprint, ready.sha256,
            ready.spec.licence, ready.made, view.encoder_saw,
        )  # fmt: skip
        if weights is not None:
            write_attention(path, chosen.level, name, weights)
        write_slide_vector(path, name, made)
        return Pooled(slide_id, "written", "", case, len(view.features), vector)
    except OutputError:
        raise
    except WsiPipeError as error:
        return Pooled(slide_id, "failed", str(error))


def _vector(path: Path, view: BagLevelView, ready: _Ready) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The vector, and the attention over the tiles where a network gives one. Raises BagError unless it is finite."""
    tiles = np.ascontiguousarray(view.features, np.float32)
    weights: NDArray[np.float32] | None = None
    if ready.spec.name == "mean":
        found = tiles.mean(axis=0, dtype=np.float64)
    elif ready.spec.name == "mean-spread":
        found = np.concatenate([tiles.mean(axis=0, dtype=np.float64), tiles.std(axis=0, dtype=np.float64)])
    elif ready.spec.kind == "attention":
        rows = most_attended(read_grids(path), view.grid.label, read_attention(path, ready.attention), ready.top)
        if not len(rows):
            raise BagError(f"{path}: no tile at {view.grid.label} lies in those of most attention")
        found = tiles[rows].mean(axis=0, dtype=np.float64)
    elif ready.remote is not None:
        found = ready.remote.encode(tiles, view.grid.coords, round(view.grid.tile_size_l0[0])).astype(np.float64)
    else:
        found, weights = _by_network(tiles, ready)
    if ready.spec.dim is not None and len(found) != ready.spec.dim:
        raise WeightsError(f"slide encoder {ready.spec.name} gave {len(found)} numbers, not {ready.spec.dim}")
    if not np.isfinite(found).all():
        raise BagError(f"{path}: slide encoder {ready.spec.name} gave NaN or infinity")
    return found.astype(np.float32), weights


def _by_network(tiles: NDArray[np.float32], ready: _Ready) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    import torch

    assert ready.network is not None
    try:
        with torch.inference_mode():
            vector, weights = ready.network(torch.from_numpy(tiles).to(ready.device))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"slide encoder {ready.spec.name} does not take {tiles.shape[1]} features: {first}"
        ) from error
    return vector.double().cpu().numpy(), weights.float().cpu().numpy()
