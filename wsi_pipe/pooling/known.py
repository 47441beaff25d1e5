"""Slide encoders by name, and the tiles and tile features that each was made for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from wsi_pipe.encoders.elsewhere import same_encoder
from wsi_pipe.errors import ConfigError, ResolutionError, UnknownEncoderError
from wsi_pipe.geometry import TileGrid, level_label

__all__ = ["SLIDE_ENCODERS", "SlideEncoder", "find_slide_encoder"]

TOLERANCE = 0.025
"""Relative distance within which a grid's scale and tiles are those that were asked for, as for tile encoders."""

TRIDENT = "https://github.com/mahmoodlab/TRIDENT/blob/main/README.md"
RAW2FEATURES = "https://github.com/CraigMyles/raw2features/blob/main/src/raw2features"


@dataclass(frozen=True)
class SlideEncoder:
    """A slide encoder.

    kind: "plain" (no weights), "attention" (needs attention that the bag holds), "network" (built here) or "remote"
    (code of its makers). network: which of ``networks.NETWORKS``. encoder: the tile encoder whose features it takes,
    "" for any. dim: of its vector, None where it follows from the features. mpp, tile_um: resolution and side of the
    tiles that it was made for, None for any. hub_id, files: of the weights on the hub; none for weights that lie
    elsewhere, which ``page`` names. sha256: of the weights as a source states it.
    """

    name: str
    title: str
    kind: Literal["plain", "attention", "network", "remote"]
    encoder: str = ""
    dim: int | None = None
    mpp: float | None = None
    tile_um: float | None = None
    network: str = ""
    hub_id: str = ""
    files: tuple[str, ...] = ()
    revision: str = ""
    sha256: str = ""
    page: str = ""
    licence: str = ""
    paper: str = ""
    sources: tuple[str, ...] = ()

    def check(self, encoder: str, dim: int, grid: TileGrid) -> None:
        """Raise ConfigError for features of another tile encoder, ResolutionError for tiles of another scale or size.

        encoder: its name or slug; dim: of its features.
        """
        if self.encoder and not same_encoder(encoder, self.encoder):
            raise ConfigError(
                f"slide encoder {self.name} takes features of {self.encoder}, not of {encoder}",
                remedy=f"compute them: wsi-pipe run ... -e {self.encoder}",
            )
        if self.mpp is not None and abs(grid.spec.mpp / self.mpp - 1) > TOLERANCE:
            raise ResolutionError(
                f"slide encoder {self.name} was made for tiles at {level_label(self.mpp)} ({self.mpp:g} um/px), not at "
                f"{grid.label}",
                remedy=f"give -r {level_label(self.mpp)}",
            )
        side = grid.spec.size_px * grid.spec.mpp
        if self.tile_um is not None and abs(side / self.tile_um - 1) > TOLERANCE:
            raise ResolutionError(
                f"slide encoder {self.name} was made for tiles of {self.tile_um:g} um, and these are {side:g} um",
                remedy=f"cut tiles of {round(self.tile_um / grid.spec.mpp)} px: --tile-px",
            )


def _feather(name: str, encoder: str, tile_um: float | None, repo: str, revision: str, sha256: str) -> SlideEncoder:
    return SlideEncoder(
        name, f"FEATHER on {encoder}", "network", encoder, 512, 0.5 if tile_um else None, tile_um, "feather",
        f"MahmoodLab/abmil.base.{repo}.pc108-24k", ("model.safetensors",), revision, sha256,
        licence="CC-BY-NC-ND-4.0", paper="https://arxiv.org/abs/2506.09022",
        sources=(TRIDENT, "https://github.com/mahmoodlab/MIL-Lab/blob/main/src/models/abmil.py"),
    )  # fmt: skip


_ALL = (
    SlideEncoder("mean", "Mean of the tiles' features", "plain"),
    SlideEncoder("mean-spread", "Mean and standard deviation of the tiles' features", "plain"),
    SlideEncoder(
        "top-attention", "Mean of the tiles that a model attends to most, as EAGLE selects them", "attention",
    ),
    SlideEncoder(
        "chief", "CHIEF", "network", "ctranspath", 768, 1.0, 256.0, "chief",
        page="https://github.com/hms-dbmi/CHIEF", licence="AGPL-3.0 by TRIDENT, GPL-3.0 by raw2features",
        sha256="6a46d200b32a65e5ce4774611b889b5f1bbf7a39f9111321a2a1b5dbdb9996b8",
        paper="https://doi.org/10.1038/s41586-024-07894-z",
        sources=(TRIDENT, f"{RAW2FEATURES}/slide_embedders/chief.py"),
    ),
    SlideEncoder(
        "madeleine", "MADELEINE", "network", "conch", 512, 1.0, 256.0, "madeleine", "MahmoodLab/madeleine",
        ("model.pt",), "a5eca29194526644eaa725cbad62c0b5023007db",
        "34437fe7cf6e1d9b6fb41ef592416ef890dc07c599ca1cc8d1ff00c40ce23496",
        licence="MIT on its page, CC-BY-NC-ND-4.0 in its repository", paper="https://arxiv.org/abs/2408.02859",
        sources=(TRIDENT, "https://github.com/mahmoodlab/MADELEINE/blob/main/madeleine/models/Model.py"),
    ),
    SlideEncoder(
        "tangle", "TANGLE v2, pan-cancer", "network", "uni", 512, network="tangle",
        page="https://github.com/mahmoodlab/TANGLE", licence="CC-BY-NC-ND-4.0",
        sha256="786d43c9ce0bd257f954faa0e484e543402eea1e0d014ab71398c3c872b17d55",
        paper="https://arxiv.org/abs/2405.11618", sources=(f"{RAW2FEATURES}/slide_embedders/tangle.py",),
    ),
    _feather(
        "feather", "conch_v1_5", 256.0, "conch_v15", "423c894c738294e8b0ac38938108180a2c21dd43",
        "08a40daa9e00cca62c65d26f00f7765f5c1b2fe58532806aeda521cb1bc8a708",
    ),
    _feather(
        "feather-uni2", "uni2-h", 128.0, "uni_v2", "7c0a057001e369ff6b55833188775bdb21f9b8c8",
        "d9c2612d55615999043539f6abc4fe44902ed1680fdbfb3bc81f6b2915ba451d",
    ),
    _feather(
        "feather-uni", "uni", None, "uni", "9290d7720a2260501cf9cbbbc1f6b7134b251637",
        "19b7edb4582ea534f63c74b8b83735c0529388d1b8f26945786cce9d0b4aea19",
    ),
    SlideEncoder(
        "titan", "TITAN", "remote", "conch_v1_5", 768, 0.5, 256.0, hub_id="MahmoodLab/TITAN",
        revision="dac6773d9961cfc75503440676ff157a2c6e8d2e", licence="CC-BY-NC-ND-4.0",
        paper="https://doi.org/10.1038/s41591-025-03982-3", sources=(TRIDENT,),
    ),
    SlideEncoder(
        "prism", "PRISM", "remote", "virchow", 1280, 0.5, 112.0, hub_id="paige-ai/Prism",
        revision="b5ef311e78a0811c71ecf618f6f7140e9ebb5fc6", licence="CC-BY-NC-ND-4.0",
        paper="https://arxiv.org/abs/2405.10254", sources=(TRIDENT,),
    ),
)  # fmt: skip

SLIDE_ENCODERS = {item.name: item for item in _ALL}
"""By name."""


def find_slide_encoder(name: str) -> SlideEncoder:
    """The slide encoder of that name. Raises UnknownEncoderError with the nearest names."""
    found = SLIDE_ENCODERS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), SLIDE_ENCODERS, n=2)
        raise UnknownEncoderError(
            f"there is no slide encoder {name!r}",
            remedy=(f"did you mean {' or '.join(near)}? " if near else "") + f"known are {', '.join(SLIDE_ENCODERS)}",
        )
    return found
