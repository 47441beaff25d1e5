"""Names of encoders beyond their own: which of them mean the same features, and what other tools call those."""

from __future__ import annotations

from contextlib import suppress

from wsi_pipe.encoders.base import encoder_slug
from wsi_pipe.encoders.naming import slug_of
from wsi_pipe.encoders.random_id import RANDOM_SUFFIX
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import UnknownEncoderError

__all__ = ["name_elsewhere", "same_encoder", "slug_asked_for"]


def slug_asked_for(name: str) -> str:
    """The slug of a name as it may stand on a command line or in a file: an encoder's own, an alias, another tool's
    name for it, or its slug in bags, with the ending of random weights or without."""
    bare = name.removesuffix(RANDOM_SUFFIX)
    return slug_of(bare) + name[len(bare) :]


def same_encoder(name: str, other: str) -> bool:
    """Whether two names are one encoder's; see ``slug_asked_for``."""
    return slug_asked_for(name) == slug_asked_for(other)


def name_elsewhere(slug: str, tool: str, dim: int | None = None) -> str:
    """What another tool calls the features of a slug; the slug itself where it has no name of its own for them.

    dim: of the features, which must be the encoder's, since tools differ in what they take of one network.
    """
    bare = slug.removesuffix(RANDOM_SUFFIX)
    with suppress(UnknownEncoderError):
        entry = find_entry(bare)
        if encoder_slug(entry.name) == bare and dim in (None, entry.dim):
            return entry.elsewhere.get(tool, bare) + slug[len(bare) :]
    return slug
