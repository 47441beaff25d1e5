"""Tiles of many slides through encoders: reading runs ahead, batches fill up across slides, results come back in time.

Four things go on at once. One thread takes slides from the caller's iterable (which may segment them on the way) a
little ahead. Reading threads open them and put batches of tiles into a queue that holds a bounded number of bytes. An
encoding thread makes batches of the encoders' own size of them, submits these, and sorts the results into their
slides. The caller's thread gets each slide as it is finished and may write it while the next ones are computed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wsi_pipe.encoders.base import Encoder, LayeredEncoder, block_indices
from wsi_pipe.encoders.naming import check_slugs
from wsi_pipe.errors import ConfigError, DeviceError
from wsi_pipe.extract.encoding import Encoding
from wsi_pipe.extract.lines import END, POLL_S, Lines, StoppedError
from wsi_pipe.extract.reading import Reading
from wsi_pipe.extract.values import ExtractItem, PartRows, Progress, SlideFailure, SlideFeatures, SlidePart
from wsi_pipe.stopping import StopRequested

__all__ = ["ExtractItem", "PartRows", "SlideFailure", "SlideFeatures", "SlidePart", "extract_features"]

KEEP_EVERY_S = 120.0
"""How often what there is of slides that take longer is handed out, for who may be killed."""


def extract_features(
    items: Iterable[ExtractItem],
    encoders: Mapping[str, Encoder],
    *,
    batch_size: int | None = None,
    read_threads: int | None = None,
    memory_bytes: int = 2 << 30,
    dtype: str = "float16",
    layers: Sequence[int] = (),
    progress: Progress | None = None,
    stopped: threading.Event | None = None,
    keep: Callable[[SlidePart], None] | None = None,
    keep_every_s: float = KEEP_EVERY_S,
) -> Generator[SlideFeatures | SlideFailure]:
    """Features of every slide of ``items``, each as soon as it is finished.

    items: consumed lazily, in another thread, a little ahead of reading. encoders: by the names that the items use. A
    level is read once, whatever the number of its encoders. batch_size: tiles of an encoder's batch, None for the
    encoder's own choice. read_threads: see ``stream_tiles``. memory_bytes: for tiles that are read and not yet
    encoded; the features of slides under way come on top, and for a GPU what page-locked memory, which comes in powers
    of two, is larger than its tiles. dtype: "float16" or "float32", of what is handed out.
    layers: blocks whose CLS is handed out beside the features (-1 is the last). progress: called with slide_id, label
    and the number of tiles encoded, from the encoding thread. stopped: set here once the work ends early, by an error
    or by the caller: ``items`` that wait for something must look at it and end, else the end waits for them.
    keep: called, in the caller's thread, with what there is of each slide that is not finished when the work ends
    early, and every ``keep_every_s`` before. Given back in ``ExtractItem.parts`` it need not be computed again, and the
    features are those of work that was never interrupted.

    A slide whose reading or whose features fail (also by a resolution that its encoder was not made for) comes out as
    a SlideFailure. Raises ConfigError for layers that an encoder has not, for two encoders of one slug, and for a name
    that ``encoders`` has not, and DeviceError, which concerns all slides. What ``items`` itself raises is raised here.
    Raises StopRequested once this thread's work is told to stop (``wsi_pipe.stopping``): no further batch begins.
    """
    if dtype not in ("float16", "float32"):
        raise ConfigError(f"feature dtype {dtype!r} must be float16 or float32")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch size {batch_size} must be at least 1")
    check_slugs((name, encoder.info.slug) for name, encoder in encoders.items())
    if layers:
        for name, encoder in encoders.items():
            depth = encoder.depth if isinstance(encoder, LayeredEncoder) else 0
            block_indices(layers, depth, name)
    return _run(
        items,
        dict(encoders),
        batch_size,
        read_threads,
        memory_bytes,
        np.dtype(dtype),
        tuple(layers),
        progress,
        stopped,
        keep,
        keep_every_s,
    )


def _run(
    items: Iterable[ExtractItem],
    encoders: Mapping[str, Encoder],
    batch_size: int | None,
    read_threads: int | None,
    memory_bytes: int,
    dtype: np.dtype[Any],
    layers: tuple[int, ...],
    progress: Progress | None,
    stopped: threading.Event | None,
    keep: Callable[[SlidePart], None] | None,
    keep_every_s: float,
) -> Generator[SlideFeatures | SlideFailure]:
    # Where slides share batches, two are read at a time, so that opening one does not keep the device waiting.
    readers = 2 if any(getattr(encoder, "shares_batches", False) for encoder in encoders.values()) else 1
    # Half for the tiles that wait, half for the native tiles that the readers hold decoded.
    lines = Lines(memory_bytes // 2, stopped)
    reading = Reading(
        lines,
        encoders,
        readers=readers,
        batch_size=batch_size,
        threads=read_threads,
        memory_bytes=memory_bytes // 2 // readers,
    )
    encoding = Encoding(lines, encoders, batch_size=batch_size, dtype=dtype, layers=layers, progress=progress)

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except (StoppedError, StopRequested):
            return
        except BaseException as error:  # whatever it is, it is raised again in the caller's thread
            lines.fail(error)

    work: list[tuple[str, Callable[[], None]]] = [("items", lambda: reading.take_items(items))]
    work += [("read", reading.read)] * readers + [("encode", encoding.run)]
    threads = [
        threading.Thread(target=guarded, args=(run,), name=f"wsi-pipe-{name}", daemon=True) for name, run in work
    ]
    for thread in threads:
        thread.start()
    try:
        kept, kept_at = 0, time.monotonic()
        while True:
            if lines.stopped.asked:
                raise StopRequested
            try:
                result = lines.done.get(timeout=POLL_S)
            except queue.Empty:
                if keep is not None and time.monotonic() - kept_at > keep_every_s:
                    kept, kept_at = _keep(encoding, keep, kept), time.monotonic()
                continue
            if result is END:
                break
            if isinstance(result, BaseException):
                raise result
            yield result
            # Not before: what the caller could not finish with is not finished.
            encoding.handed_over(result.slide_id)
    finally:
        lines.close(threads)
        if keep is not None:
            _keep(encoding, keep, 0)
        if not any(thread.is_alive() for thread in threads):
            for encoder in encoders.values():
                # Not so important that a device that failed is worth a second error.
                with contextlib.suppress(DeviceError):
                    getattr(encoder, "release", lambda: None)()


def _keep(encoding: Encoding, keep: Callable[[SlidePart], None], kept: int) -> int:
    """Hand out what there is of slides under way where it is other than ``kept`` features; how many there are."""
    parts = encoding.parts()
    tiles = sum(part.tiles for part in parts)
    if tiles != kept:
        for part in parts:
            keep(part)
    return tiles
