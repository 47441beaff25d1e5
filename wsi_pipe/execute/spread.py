"""The one entry: where the items of a run are done."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar, cast

from wsi_pipe.errors import ConfigError
from wsi_pipe.execute.items import Done, Failed, Where
from wsi_pipe.execute.pool import in_processes
from wsi_pipe.execute.roster import Identity
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
    doubts: Callable[[R], str | None] = lambda value: None,
    identity: Identity | None = None,
    ready: Callable[[], object] | None = None,
) -> Generator[Done[T, R] | Failed[T], None, None]:
    """Apply ``fn`` to every item; results come as they are finished, in no fixed order.

    items: consumed lazily, a few ahead of what is finished. fn: a picklable callable when it runs elsewhere. Closing
    the generator ends the workers. An item that is a Done comes back as it is, and None means that the next item is not
    there yet; where work runs in this process, items are neither. blames_worker: whether an error that ``fn`` raised is
    its worker's fault rather than the item's: that worker gets no more items, and the item goes to another; it is
    Failed only once there is no other. doubts: on a scheduler, why a value may be its worker's doing rather than the
    item's, in words, or None: another worker tries the item as well, until two say the same; a worker that several
    times could not do what others could gets no more items. identity: on a scheduler, what must be the same on a worker
    as here; others get no items, and it is said in what they differ. ready: called in each process that can be killed
    before its first item; outside the item's time, as is the start.
    Raises WorkerError when a scheduler cannot be reached or goes away; what was handed out before stays valid.
    """
    if where.workers < 1:
        raise ConfigError(f"{where.workers} workers: at least 1 is needed")
    if where.scheduler:
        return on_scheduler(fn, items, where, blames_worker, doubts, identity, ready)
    if where.here:
        return _here(fn, cast("Iterable[T]", items))
    return in_processes(fn, items, where, blames_worker, ready)


def _here(fn: Callable[[T], R], items: Iterable[T]) -> Generator[Done[T, R] | Failed[T]]:
    for item in items:
        try:
            value = fn(item)
        except Exception as error:
            yield Failed(item, error)
        else:
            yield Done(item, value)
