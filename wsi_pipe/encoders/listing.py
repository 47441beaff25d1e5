"""Which encoders there are, which can be loaded now, and what the others lack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from wsi_pipe.encoders import hub
from wsi_pipe.encoders.pins import recorded_revision
from wsi_pipe.encoders.registry import RegistryEntry, load_registry

__all__ = ["EncoderListing", "list_encoders", "ranked"]


@dataclass(frozen=True)
class EncoderListing:
    """One line of ``wsi-pipe encoders``.

    loads: True where ``load_encoder`` needs nothing more than what is on this machine. lacks: what it needs
    otherwise, and how to get it; empty where it loads. weights: the file that it would load. The rest as in
    RegistryEntry. fit: how an encoder fits the resolution that was asked for, in words, where one was.
    """

    name: str
    title: str
    dim: int
    input_px: int | None
    mpp: float | None
    pooling: str
    precision: str
    licence: str
    gated: bool
    page: str
    paper: str
    loads: bool
    lacks: str = ""
    weights: str = ""
    verified: bool = True
    note: str = ""
    mpp_range: tuple[float, float] | None = None
    parameters: int | None = None
    commercial: bool = True
    revision: str = ""
    fit: str = ""


def list_encoders() -> list[EncoderListing]:
    """See ``wsi_pipe.encoders.list_encoders``."""
    token = hub.has_token()
    return [_texture(), *(_listing(entry, token) for entry in load_registry().values())]


def _texture() -> EncoderListing:
    from wsi_pipe.encoders.texture import TextureEncoder

    info = TextureEncoder(threads=1).info
    return EncoderListing(
        info.name, "Texture (no weights)", info.dim, None, None, "none", "float32", info.licence, False, "", "", True
    )


def _listing(entry: RegistryEntry, token: bool) -> EncoderListing:
    if entry.loader == "local":
        path = entry.local_file
        assert path is not None
        found = path if path.is_file() else None
        lacks = f"the file {path}"
    else:
        found = hub.find_local(entry.name, entry.hub_id, entry.files, repo_type=entry.hub_type, revision=entry.revision)
        steps = []
        if entry.gated:
            steps.append(f"licence accepted at {entry.page}")
            if not token:
                steps.append("login (hf auth login)")
        steps.append("download (at first use)")
        lacks = ", ".join(steps)
    return EncoderListing(
        entry.name,
        entry.title,
        entry.dim,
        entry.input_px,
        entry.mpp,
        entry.pooling,
        entry.precision,
        entry.licence,
        entry.gated,
        entry.page,
        entry.paper,
        found is not None,
        "" if found is not None else lacks,
        str(found or ""),
        entry.verified,
        entry.note,
        entry.mpp_range,
        entry.parameters,
        entry.commercial,
        recorded_revision(entry.hub_id, entry.revision) if entry.hub_id else "",
    )


def ranked(found: Sequence[EncoderListing], mpp: float) -> list[EncoderListing]:
    """Encoders by how well they suit ``mpp`` um/px, best first, each with its ``fit`` in words.

    First those whose range of training holds it, then the others by their distance from it in powers of two, last
    those of which no range is stated; among equals the smaller network. What needs no weights suits any.
    """

    def place(item: EncoderListing) -> tuple[float, int, str]:
        away = _octaves(item, mpp)
        return (math.inf if away is None else round(abs(away), 2), item.parameters or 0, item.name)

    return [dataclasses.replace(item, fit=_fit(item, mpp)) for item in sorted(found, key=place)]


def _octaves(item: EncoderListing, mpp: float) -> float | None:
    """How many powers of two ``mpp`` is coarser (above zero) or finer than an encoder's range; None: not stated."""
    if item.mpp_range is None:
        return 0.0 if item.input_px is None else None
    finest, coarsest = item.mpp_range
    if finest <= mpp <= coarsest:
        return 0.0
    return math.log2(mpp / (coarsest if mpp > coarsest else finest))


def _fit(item: EncoderListing, mpp: float) -> str:
    away = _octaves(item, mpp)
    if away is None:
        return "no resolution is stated"
    if away == 0:
        return "trained at it" if item.mpp_range else "any"
    return f"{2 ** abs(away):.3g} times {'coarser' if away > 0 else 'finer'} than trained"
