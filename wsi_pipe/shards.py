"""Parts of an archive that machines work on without knowing of each other: ``--shard 3/16``.

A slide belongs to the shard that a hash of its id names. So the order of the list does not matter, every slide is in
one shard and in no other, and a slide that is added to the archive moves none of those that are there.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from wsi_pipe.errors import ConfigError
from wsi_pipe.ids import same_name

__all__ = ["Shard", "parse_shard"]

MOST = 100_000


@dataclass(frozen=True)
class Shard:
    """One of ``count`` parts of an archive, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, slide_id: str) -> bool:
        """Whether the slide of this id belongs to the shard."""
        digest = hashlib.sha256(same_name(slide_id).encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1


def parse_shard(text: str) -> Shard:
    """``3/16`` as a shard. Raises ConfigError for anything else, and for numbers that are none of a shard."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count <= MOST:
        raise ConfigError(
            f"--shard {text!r} names no part of an archive", remedy="write K/N, the K-th of N parts, from 1/N to N/N"
        )
    return Shard(number, count)
