"""What an encoder's name on the command line stands for, and its one name in paths, without loading anything."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.own import handed_over
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import ConfigError, EncoderError, UnknownEncoderError

__all__ = [
    "STAINS",
    "check_slugs",
    "draws_weights",
    "is_lr_file",
    "known_dim",
    "slug_of",
    "split_stain",
    "with_stain",
]

STAINS = ("macenko", "reinhard")
"""Stain normalisations that may stand behind an encoder's name, ``NAME+macenko``."""


def split_stain(name: str) -> tuple[str, str | None]:
    """An encoder's name without the stain normalisation behind it, and that; None where there is none."""
    base, plus, method = name.rpartition("+")
    return (base, method) if plus and base and method in STAINS else (name, None)


def with_stain(name: str, method: str) -> str:
    """An encoder's name with that stain normalisation in the place of any, without one for "none"."""
    base, _ = split_stain(name)
    return base if method == "none" else f"{base}+{method}"


def is_lr_file(name: str) -> bool:
    """True where a name is the path of an LR encoder, and not NAME@FILE."""
    base, at, _ = name.partition("@")
    # A folder's name may hold an "@" too.
    return name.endswith(".safetensors") and not base.startswith("timm:") and (not at or Path(name).is_file())


def draws_weights(name: str) -> bool:
    """Whether ``--random-weights`` draws the weights of an encoder: of one that has any, and whose none is a file."""
    name, _ = split_stain(name)
    base, _, checkpoint = name.partition("@")
    if name == "texture" or checkpoint or is_lr_file(name) or handed_over(name) is not None:
        return False
    if base.startswith("timm:"):
        return True
    with suppress(EncoderError, ConfigError):
        return find_entry(base).local_file is None
    return True


def slug_of(name: str) -> str:
    """The slug of an encoder's name: one for a name and its aliases in any case, and for a file wherever it lies."""
    name, stain = split_stain(name)
    if stain is not None:
        return f"{slug_of(name)}+{stain}"
    if is_lr_file(name):
        return encoder_slug(Path(name).stem)
    base, _, checkpoint = name.partition("@")
    if not base.startswith("timm:"):
        # Unknown are "texture", an encoder that was handed over ready, and one of a table that is not at hand.
        with suppress(UnknownEncoderError):
            base = find_entry(base).name
    return encoder_slug(f"{base}@{Path(checkpoint).stem}" if checkpoint else base)


def known_dim(name: str) -> int | None:
    """How many features the encoder of that name gives, as far as that can be told without loading it: not of timm's
    models, nor of what is not there."""
    name, _ = split_stain(name)
    with suppress(EncoderError, ConfigError):
        ready = handed_over(name)
        if ready is not None:
            return ready.info.dim
        if is_lr_file(name):
            from wsi_pipe.encoders.lr_file import read_lr_header

            return read_lr_header(Path(name)).recipe.dim
        base = name.partition("@")[0]
        if base == "texture":
            from wsi_pipe.encoders.texture import TextureEncoder

            return TextureEncoder().info.dim
        if not base.startswith("timm:"):
            return find_entry(base).dim
    return None


def check_slugs(slugs: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError where two encoders of (name, slug) share a slug: their features would have one place."""
    first: dict[str, str] = {}
    for name, slug in slugs:
        other = first.setdefault(slug, name)
        if other != name:
            raise ConfigError(
                f"encoders {other} and {name} are both called {slug!r} in bags, where each needs a name of its own",
                remedy="give one of them, or rename one's file",
            )
