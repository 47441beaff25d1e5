"""What stands for the hash of weights that were drawn rather than learnt, and how it is told from a hash of a file.

No torch here: bags are read without it.
"""

from __future__ import annotations

import hashlib
import itertools
from functools import lru_cache
from importlib import metadata

__all__ = ["RANDOM", "RANDOM_SUFFIX", "is_random", "is_random_id", "random_weights_id"]

RANDOM = "random"
"""What features of such weights say in their attribute ``weights``."""
RANDOM_SUFFIX = "-random"
"""What the name and the slug of such an encoder end with, so that its features have a place of their own."""


def random_weights_id(slug: str) -> str:
    """What stands for the weights' hash when they are random: the name, and the versions that draw them.

    slug: of the encoder without RANDOM_SUFFIX.
    """
    import timm
    import torch

    return _id(slug, torch.__version__, timm.__version__)


def _id(slug: str, torch: str, timm: str) -> str:
    return hashlib.sha256(f"random weights 1: {slug}, torch {torch}, timm {timm}".encode()).hexdigest()


@lru_cache(maxsize=1024)
def is_random_id(slug: str, weights_sha256: str) -> bool:
    """Whether a hash stands for random weights of the encoder called ``slug``.

    Bags of version 0.1.0 say it in no other way. The versions that drew them are not known: the installed ones are
    tried, and all that were published while that version was in use.
    """
    bare = slug.removesuffix(RANDOM_SUFFIX)
    return any(_id(bare, torch, timm) == weights_sha256 for torch, timm in _versions())


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    builds = ("", "+cpu", "+cu118", "+cu121", "+cu124", "+cu126", "+cu128", "+cu129", "+cu130")
    numbers = [f"2.{minor}.{patch}" for minor in range(4, 17) for patch in range(3)]
    torches = [f"{number}{build}" for number in numbers for build in builds]
    timms = [f"1.0.{patch}" for patch in range(24, 41)]
    for package, versions in (("torch", torches), ("timm", timms)):
        try:
            versions.insert(0, metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return tuple(itertools.product(dict.fromkeys(torches), dict.fromkeys(timms)))


def is_random(encoder: str, weights_sha256: str) -> bool:
    """Whether features, by what they say of their encoder's name and weights, were made with random weights."""
    from wsi_pipe.encoders.naming import slug_of

    return encoder.endswith(RANDOM_SUFFIX) or is_random_id(slug_of(encoder), weights_sha256)
