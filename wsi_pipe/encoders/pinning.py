"""Accepting the newest weights of an encoder: what was pinned, and what is from now on."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_pipe.encoders import hub
from wsi_pipe.encoders.pins import Pin, read_pins, write_pin
from wsi_pipe.encoders.registry import find_entry
from wsi_pipe.errors import ConfigError

__all__ = ["Repinned", "pin_encoder"]


@dataclass(frozen=True)
class Repinned:
    """before: None where nothing was pinned. now: what is pinned."""

    name: str
    file: str
    before: Pin | None
    now: Pin

    @property
    def moved(self) -> bool:
        """Whether the weights are others than before."""
        return self.before is not None and self.before.sha256 != self.now.sha256


def pin_encoder(name: str) -> Repinned:
    """Take the hub's newest weights of a registry's encoder (those of the cache without a network), and pin them.

    Raises UnknownEncoderError, WeightsError, or ConfigError for an encoder whose weights come from no hub.
    """
    entry = find_entry(name)
    if not entry.hub_id:
        raise ConfigError(f"encoder {name} has no weights on the hub", remedy="its bags name the hash of its file")
    path = hub.download(
        entry.name, entry.hub_id, entry.files, gated=entry.gated, repo_type=entry.hub_type, newest=hub.reachable()
    )
    before = read_pins().get(f"{entry.hub_id}/{path.name}")
    if before is None and path.name in entry.sha256:
        before = Pin(entry.sha256[path.name], entry.revision)
    return Repinned(entry.name, str(path), before, write_pin(entry.hub_id, path))
