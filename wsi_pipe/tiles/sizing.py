"""How a stream of tiles is divided: tiles to a job, batches made ahead, and who may take how much of the memory."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_pipe.geometry import IntPair

__all__ = ["GROUP_TILES", "Sizes", "group_size", "share_memory"]

GROUP_TILES = 16
"""Tiles to a group, where the grid is large enough: enough for fetches of many blocks in a row."""

MOST_GROUP_TILES, MOST_WHOLE_GROUP_TILES = 32, 64
"""Tiles to a group of a large grid: a job costs about a millisecond under Python's lock, whatever it holds, since
decoding takes the caches. The second where tiles consist of whole blocks, so that a job holds none beside them."""

FEW_THREADS, JOBS_OF_FEW, JOBS_OF_MANY = 4, 8, 4
"""A grid is divided into no fewer jobs for each thread. Few threads wait longer for the last job than for the lock."""

JOB_PIXELS = 1 << 24
"""Stored pixels under a group, at most, where that is more than one tile."""

NEAR_TILES = 64
"""Blocks that only groups of this many tiles more need are not worth spilling."""

BATCHES_AHEAD, JOBS_AHEAD = 2, 2
"""Batches that are begun, if memory allows, before the one asked for is taken; more, where these are fewer jobs for
each thread."""


def group_size(
    tiles: int, threads: int, read_px: int, patch_px: IntPair, block_px: IntPair, memory_bytes: int, *, whole: bool
) -> int:
    """How many tiles go into a group.

    tiles: of the grid. read_px: stored pixels under a tile. patch_px, block_px: (width, height) in sample pixels, of
    what a tile is made from. whole: whether tiles consist of whole blocks, which go straight into them.
    """
    most = MOST_WHOLE_GROUP_TILES
    if not whole:
        under_tile = 3
        for patch, block in zip(patch_px, block_px, strict=True):
            under_tile *= (-(-patch // block) + 1) * block
        # What running jobs hold beside their tiles.
        most = min(MOST_GROUP_TILES, memory_bytes // 4 // (threads * under_tile))
    jobs = threads * (JOBS_OF_FEW if threads <= FEW_THREADS else JOBS_OF_MANY)
    size = max(min(tiles // jobs, most), GROUP_TILES)
    return max(min(size, JOB_PIXELS // read_px), 1)


@dataclass(frozen=True)
class Sizes:
    """ahead: batches that may be begun before the one asked for is taken. near: blocks that only so many groups more
    need are not spilled. shelf_bytes: what the shelf may hold in memory."""

    ahead: int
    near: int
    shelf_bytes: int


def share_memory(
    memory_bytes: int, threads: int, batch_size: int, batch_bytes: int, group_tiles: int, job_bytes: int
) -> Sizes:
    """Batches go first, then the blocks of the jobs that run (``job_bytes`` each); the shelf has the rest."""
    ahead = -(-JOBS_AHEAD * threads * min(group_tiles, batch_size) // batch_size)
    ahead = max(min(ahead, memory_bytes // 4 // max(batch_bytes, 1)), BATCHES_AHEAD)
    taken = (ahead + 1) * batch_bytes + threads * job_bytes
    return Sizes(ahead, max(NEAR_TILES // group_tiles, 1), max(memory_bytes - taken, memory_bytes // 4))
