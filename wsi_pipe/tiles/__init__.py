"""Tiles of a slide as a stream of batches: planned by native block, each fetched and decoded once, on any threads."""

from __future__ import annotations

from wsi_pipe.tiles.stream import DEFAULT_MEMORY_BYTES, TileBatch, read_tiles, stream_tiles
from wsi_pipe.tiles.timing import StreamStats

__all__ = ["DEFAULT_MEMORY_BYTES", "StreamStats", "TileBatch", "read_tiles", "stream_tiles"]
