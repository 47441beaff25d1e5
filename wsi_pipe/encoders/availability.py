"""Whether an encoder can be had and fits the grids it is asked for on, found out without loading it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wsi_pipe.encoders import hub
from wsi_pipe.encoders.base import MPP_TOLERANCE
from wsi_pipe.encoders.lr_file import LrHeader, read_lr_header
from wsi_pipe.encoders.naming import is_lr_file, split_stain
from wsi_pipe.encoders.own import handed_over
from wsi_pipe.encoders.registry import RegistryEntry, find_entry
from wsi_pipe.errors import ConfigError, ResolutionError, WeightsError
from wsi_pipe.geometry import TileSpec, level_label

__all__ = ["check_encoder", "fetch_weights", "to_download", "weights_file"]


def check_encoder(name: str, specs: Sequence[TileSpec], mpp_tolerance: float, *, random_weights: bool = False) -> None:
    """Raise what ``load_encoder`` or the first grid would, as far as that shows without loading anything.

    specs: the grids that it is asked for on. mpp_tolerance: by how much (relative) grids may be laid beside what is
    asked for. Raises UnknownEncoderError, WeightsError, or ResolutionError for an LR encoder on other tiles than its
    own.
    """
    name, stain = split_stain(name)
    if name == "texture" or handed_over(name) is not None:
        return
    if is_lr_file(name):
        if stain is not None:
            raise ConfigError(
                f"encoder {name} was distilled from tiles as they are", remedy=f"leave out +{stain}, or --normalise"
            )
        header = read_lr_header(Path(name))
        for spec in specs:
            _check_tiles(name, header, spec, mpp_tolerance)
        return
    base, _, checkpoint = name.partition("@")
    if checkpoint and not Path(checkpoint).is_file():
        raise WeightsError(f"{checkpoint}: there is no such file", remedy="give the path of a checkpoint")
    if base.startswith("timm:"):
        _check_timm(base.removeprefix("timm:"), random_weights or bool(checkpoint))
        return
    entry = find_entry(base)
    if checkpoint:
        return
    if entry.local_file is not None:
        if not entry.local_file.is_file():
            raise WeightsError(
                f"encoder {name}: {entry.local_file} is not there", remedy=f"put it there, or correct {entry.table}"
            )
    elif not random_weights:
        _check_hub(entry)


def _check_hub(entry: RegistryEntry) -> None:
    error = hub.obstacle(
        entry.name, entry.hub_id, entry.files, gated=entry.gated, repo_type=entry.hub_type, revision=entry.revision
    )
    if error is not None:
        raise error


def _check_timm(model: str, without_weights: bool) -> None:
    from wsi_pipe.encoders.architectures import timm_recipe

    _, facts = timm_recipe(model)
    if without_weights:
        return
    error = hub.obstacle(f"timm:{model}", facts["hub_id"], _timm_files(facts))
    if error is not None:
        raise error


def _timm_files(facts: dict[str, str]) -> tuple[str, ...]:
    return (facts["file"],) if facts["file"] else ("model.safetensors", "pytorch_model.bin")


def _check_tiles(name: str, header: LrHeader, spec: TileSpec, mpp_tolerance: float) -> None:
    wanted = header.tile.mpp
    label = level_label(wanted)
    # A grid may be laid at the slide's own scale, which lies so near what is asked for.
    if abs(spec.mpp - wanted) > (MPP_TOLERANCE + mpp_tolerance) * wanted:
        raise ResolutionError(
            f"encoder {name} was made for {wanted:g} um/px ({label}), but is asked for at {spec.label} "
            f"({spec.mpp:g} um/px)",
            remedy=f"use it on that level alone: -r {label}, or --encoder {label}={name}",
        )
    if header.tile.size_px != spec.size_px:
        raise ResolutionError(
            f"encoder {name} was made for tiles of {header.tile.size_px} px ({header.tile.size_px * wanted:g} um), but "
            f"the grid {spec.label} has tiles of {spec.size_px} px",
            remedy=f"cut tiles of that size: --tile-px {header.tile.size_px}",
        )


def weights_file(name: str) -> Path | None:
    """The file on this machine that an encoder's weights would be read from; None where there is none, or none needed.

    Raises UnknownEncoderError.
    """
    name, _ = split_stain(name)
    if name == "texture" or handed_over(name) is not None:
        return None
    base, _, checkpoint = name.partition("@")
    if is_lr_file(name) or checkpoint:
        path = Path(checkpoint or name)
        return path if path.is_file() else None
    if base.startswith("timm:"):
        from wsi_pipe.encoders.architectures import timm_recipe

        _, facts = timm_recipe(base.removeprefix("timm:"))
        return hub.find_local(name, facts["hub_id"], _timm_files(facts))
    entry = find_entry(base)
    if entry.local_file is not None:
        return entry.local_file if entry.local_file.is_file() else None
    return hub.find_local(entry.name, entry.hub_id, entry.files, repo_type=entry.hub_type, revision=entry.revision)


def to_download(name: str) -> str | None:
    """The page that an encoder's weights would come from; None where they are here, or not from the hub."""
    name, _ = split_stain(name)
    if name == "texture" or handed_over(name) is not None or is_lr_file(name) or "@" in name:
        return None
    if name.startswith("timm:"):
        from wsi_pipe.encoders.architectures import timm_recipe

        _, facts = timm_recipe(name.removeprefix("timm:"))
        found = hub.find_local(name, facts["hub_id"], _timm_files(facts))
        return None if found else f"https://huggingface.co/{facts['hub_id']}"
    entry = find_entry(name)
    if entry.local_file is not None or hub.find_local(
        entry.name, entry.hub_id, entry.files, repo_type=entry.hub_type, revision=entry.revision
    ):
        return None
    return entry.page


def fetch_weights(name: str) -> None:
    """Download an encoder's weights where they are not on this machine yet. Raises WeightsError."""
    name, _ = split_stain(name)
    if to_download(name) is None:
        return
    if name.startswith("timm:"):
        from wsi_pipe.encoders.architectures import timm_recipe

        _, facts = timm_recipe(name.removeprefix("timm:"))
        hub.download(name, facts["hub_id"], _timm_files(facts))
        return
    entry = find_entry(name)
    hub.download(
        entry.name, entry.hub_id, entry.files, gated=entry.gated, repo_type=entry.hub_type, revision=entry.revision
    )
