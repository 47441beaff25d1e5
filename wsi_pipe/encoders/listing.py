"""Which encoders there are, which can be loaded now, and what the others lack."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_pipe.encoders import hub
from wsi_pipe.encoders.registry import RegistryEntry, load_registry

__all__ = ["EncoderListing", "list_encoders"]


@dataclass(frozen=True)
class EncoderListing:
    """One line of ``wsi-pipe encoders``.

    loads: True where ``load_encoder`` needs nothing more than what is on this machine. lacks: what it needs
    otherwise, and how to get it; empty where it loads. weights: the file that it would load. The rest as in
    RegistryEntry.
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
        found = hub.find_local(entry.name, entry.hub_id, entry.files, repo_type=entry.hub_type)
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
    )
