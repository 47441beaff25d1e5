"""Encoders that this process was handed ready, by name; see ``wp.register_encoder``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_pipe.encoders.base import Encoder

__all__ = ["forget", "handed_over", "remember"]

_held: dict[str, Encoder] = {}


def remember(name: str, encoder: Encoder) -> None:
    """Hold an encoder under a name, in the place of one that was held there."""
    _held[name] = encoder


def forget(name: str) -> None:
    """Hold it no longer; nothing where it is not held."""
    _held.pop(name, None)


def handed_over(name: str) -> Encoder | None:
    """The encoder of that name, None where there is none."""
    return _held.get(name)
