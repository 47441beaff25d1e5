"""The one entry: where the items of a run are done."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar, cast

from wsi_pipe.errors import ConfigError
from wsi_pipe.execute.items import Done, Failed, Where
from wsi_pipe.execute.pool import in_processes
from wsi_pipe.execute.scheduler import on_scheduler

__all__ = ["run"]

T = TypeVar("T")
R = TypeVar("R")


def run(
    fn: Callable[[T], R],
    items: Iterable[T | Done[T, R] | None],
    where: Where,
    *,
    blames_worker: Callable[[Exception], bool] = lambda error: False,
    ready: Callable[[], object] | None = None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """Apply ``fn`` to every item; results come as they are finished, in no fixed order.

    items: consumed lazily, a few ahead of what is finished. fn: a picklable callable when it runs elsewhere. Closing
    the generator ends the workers. On a scheduler, an item that is a Done comes back as it is, and None means that the
    next item is not there yet. blames_worker: whether an error that ``fn`` raised is its worker's fault rather than the
    item's: that worker gets no more items, and the item goes to another; it is Failed only once there is no other.
    ready: called in each process that can be killed before its first item; outside the item's time, as is the start.
    Raises WorkerError when a scheduler cannot be reached or goes away; what was handed out before stays valid.
    """
    if where.workers < 1:
        raise ConfigError(f"{where.workers} workers: at least 1 is needed")
    if where.scheduler:
        return on_scheduler(fn, items, where, blames_worker, ready)
    known = cast("Iterable[T]", items)
    return _here(fn, known) if where.here else in_processes(fn, known, where, blames_worker, ready)


def _here(fn: Callable[[T], R], items: Iterable[T]) -> Generator[Done[T, R] | Failed[T]]:
    for item in items:
        try:
            value = fn(item)
        except Exception as error:
            yield Failed(item, error)
        else:
            yield Done(item, value)
