"""The store behind an OME-Zarr slide: a folder or a URL, counted, bounded, and read-only.

The zarr library finds and decodes chunks. A chunk comes from an untrusted store, so what it says of its decoded size is
checked before a codec allocates by it.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from wsi_pipe.errors import SlideError, SlideOpenError, SlideReadError, UnsupportedSlideError
from wsi_pipe.slides.base import ReadStats
from wsi_pipe.slides.storage.remote import CONNECT_S, SILENCE_S
from wsi_pipe.slides.storage.source import is_url

__all__ = ["GuardedStore", "array_of", "attributes_of", "open_store", "reading"]

MAX_DOCUMENT_BYTES = 1 << 24
"""Of a metadata document: consolidated ones of large collections have a few hundred kilobytes."""

DOCUMENTS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
CODECS = frozenset({"blosc", "zstd", "gzip", "zlib", "bytes", "crc32c", "transpose", "sharding_indexed"})
"""What chunks may be compressed with. Others of numcodecs give no size beforehand, and one of them unpickles."""

SLACK = 1 << 16


class DamagedChunkError(ValueError):
    """A chunk is larger, or says that it becomes larger, than it can be."""


@dataclass(frozen=True)
class _Limit:
    """chunk_bytes: of a chunk decoded; stored_bytes: of what is stored under one key."""

    chunk_bytes: int
    stored_bytes: int
    codec: str


class GuardedStore(WrapperStore[Store]):
    """A store that counts what is read, and refuses what is larger than it can be."""

    def __init__(self, store: Store, name: str = "", stats: ReadStats | None = None) -> None:
        super().__init__(store)
        self.name = name
        self.stats = stats or ReadStats()
        self.local = isinstance(store, LocalStore)
        self.shut = threading.Event()
        self.limits: dict[str, _Limit] = {}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """See Store.get. Raises SlideReadError once the slide is closed, DamagedChunkError beyond the limits."""
        if self.shut.is_set():
            raise SlideReadError(f"{self.name}: the slide is closed")
        document = key.rpartition("/")[2] in DOCUMENTS
        limit = None if document else self._limit_of(key)
        most = MAX_DOCUMENT_BYTES if limit is None else limit.stored_bytes
        if byte_range is None and isinstance(self._store, LocalStore):
            path = self._store.root / key
            if path.is_file() and path.stat().st_size > most:
                raise DamagedChunkError(f"{key} has {path.stat().st_size:,} bytes, at most {most:,} are possible")
        value = await super().get(key, prototype, byte_range)
        if value is None:
            return None
        self.stats.add(bytes_fetched=len(value), requests=1)
        if len(value) > most:
            raise DamagedChunkError(f"{key} has {len(value):,} bytes, at most {most:,} are possible")
        if limit is not None:
            _check(key, value.to_bytes(), limit)
        return value

    def _limit_of(self, key: str) -> _Limit | None:
        found = [path for path in self.limits if not path or key.startswith(f"{path}/")]
        return self.limits[max(found, key=len)] if found else None


def _check(key: str, data: bytes, limit: _Limit) -> None:
    """Raise DamagedChunkError where a chunk says that it becomes larger than its array's chunks are."""
    declared = 0
    if limit.codec == "blosc" and len(data) >= 16 and int.from_bytes(data[12:16], "little") == len(data):
        declared = int.from_bytes(data[4:8], "little")
    elif limit.codec == "zstd" and data[:4] == b"\x28\xb5\x2f\xfd":
        declared = _zstd_size(data, limit.chunk_bytes)
    elif limit.codec in ("gzip", "zlib"):
        try:
            declared = len(zlib.decompressobj(47).decompress(data, limit.chunk_bytes + SLACK + 1))
        except zlib.error:
            # The codec says so as well, with the chunk's place.
            return
    if declared > limit.chunk_bytes + SLACK:
        raise DamagedChunkError(f"{key} becomes {declared:,} bytes, a chunk has {limit.chunk_bytes:,}")


def _zstd_size(data: bytes, most: int) -> int:
    """The content size that a Zstandard frame states (RFC 8878, 3.1.1.1); decoded where it states none."""
    descriptor = data[4] if len(data) > 4 else 0
    single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6]
    width = 1 if single and not width else width
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    if width:
        return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
    import imagecodecs

    try:
        return len(imagecodecs.zstd_decode(data, out=most + SLACK))
    except (ValueError, RuntimeError) as error:
        raise DamagedChunkError(f"a Zstandard frame is damaged, or too large: {error}") from error


def open_store(path: str | Path, stats: ReadStats) -> GuardedStore:
    """The store at a local folder or an fsspec URL. Raises SlideOpenError when no file system is there for a URL."""
    if not is_url(path):
        return GuardedStore(LocalStore(Path(path), read_only=True), str(path), stats)
    url = str(path)
    options: dict[str, Any] = {}
    if url.split("://", 1)[0] in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return GuardedStore(FsspecStore.from_url(url, storage_options=options, read_only=True), url, stats)
    except (ValueError, ImportError) as error:
        raise SlideOpenError(
            f"{url}: {error}", remedy="use a local path, http(s)://, or a URL whose fsspec package is installed"
        ) from error


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn what zarr, its codecs and file systems raise into SlideReadError. ``what`` is read."""
    try:
        yield
    except SlideError:
        raise
    except MemoryError as error:
        raise SlideReadError(f"{name}: {what}: out of memory") from error
    except Exception as error:  # codecs and file systems raise errors of their own libraries
        raise SlideReadError(
            f"{name}: {what} cannot be read: {type(error).__name__}: {error}".replace("\n", " "),
            remedy="the store is incomplete or damaged: copy it again, or leave the slide out",
        ) from error


def attributes_of(store: GuardedStore, path: str) -> dict[str, Any]:
    """The attributes of a group. Raises SlideReadError where its metadata are damaged, UnsupportedSlideError where
    nothing, or no group, is there."""
    shown = f"{store.name}/{path}" if path else store.name
    try:
        with reading(store.name, f"the metadata of {path or 'the store'}"):
            node = zarr.open(store=store, path=path, mode="r", use_consolidated=False)
            attributes = dict(node.attrs)
    except SlideReadError as error:
        if isinstance(error.__cause__, FileNotFoundError | KeyError):
            raise UnsupportedSlideError(f"{shown}: no Zarr metadata are there") from error
        raise
    if isinstance(node, zarr.Array):
        raise UnsupportedSlideError(
            f"{shown}: a Zarr array without OME metadata", remedy="give the OME-Zarr image that it belongs to"
        )
    return attributes


def array_of(store: GuardedStore, path: str) -> Any:
    """A zarr.Array of the store, whose chunks are bounded from then on.

    Raises SlideReadError where its metadata are damaged, UnsupportedSlideError for codecs that are not read.
    """
    with reading(store.name, f"the metadata of the array {path}"):
        array = zarr.open_array(store=store, path=path, mode="r")
        codecs = _codecs(array.metadata)
    unknown = sorted(codecs - CODECS)
    if unknown:
        raise UnsupportedSlideError(
            f"{store.name}: the chunks of {path} are coded with {', '.join(unknown)}, which is not read",
            remedy="write the store with Zstandard or Blosc",
        )
    itemsize = array.dtype.itemsize
    chunk, shard = (_product(shape) * itemsize for shape in (array.chunks, array.shards or array.chunks))
    compressor = next(iter(sorted(codecs & {"blosc", "zstd", "gzip", "zlib"})), "none")
    # What does not compress grows a little; a shard has an index of 16 bytes a chunk, and its own checks.
    store.limits[path] = _Limit(chunk, 2 * shard + SLACK + 16 * (shard // max(chunk, 1)), compressor)
    return array


def _codecs(metadata: Any) -> set[str]:
    document = metadata.to_dict()
    if document.get("zarr_format") == 2:
        parts = [document.get("compressor"), *(document.get("filters") or [])]
        return {_name(part, "id") for part in parts if part is not None}
    found: set[str] = set()
    pending = list(document.get("codecs") or [])
    while pending:
        part = pending.pop()
        found.add(_name(part, "name"))
        if isinstance(part, dict):
            inner = part.get("configuration") or {}
            pending += [*(inner.get("codecs") or []), *(inner.get("index_codecs") or [])]
    return found


def _name(part: Any, key: str) -> str:
    return str(part.get(key, part)) if isinstance(part, dict) else str(getattr(part, "codec_id", part))


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for side in shape:
        found *= int(side)
    return found
