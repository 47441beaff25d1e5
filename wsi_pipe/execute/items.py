"""Where work runs, and what comes back of an item."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Done", "Failed", "Where", "left_out"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Where:
    """Where work runs.

    workers: processes on this machine; 1 without a time-out is this process itself. scheduler: address of a Dask
    scheduler, which then decides. timeout_s: seconds that one item may take. retries: how often an item is tried
    again after its process died. resources: what a Dask worker must offer, such as {"GPU": 1}.
    connect_s: seconds to wait for a scheduler. wait_workers_s: how long a scheduler may be without a worker that can
    take work; for ever where None.
    """

    workers: int = 1
    scheduler: str | None = None
    timeout_s: float | None = None
    retries: int = 1
    resources: dict[str, float] | None = None
    connect_s: float = 20.0
    wait_workers_s: float | None = None

    @property
    def here(self) -> bool:
        """Whether work runs in this very process."""
        return self.scheduler is None and self.workers == 1 and self.timeout_s is None


@dataclass(frozen=True)
class Done(Generic[T, R]):
    """An item and what the callable returned; worker: who did it, empty for this process."""

    item: T
    value: R
    worker: str = field(default="", compare=False)


@dataclass(frozen=True)
class Failed(Generic[T]):
    """An item whose process died, took too long, or whose callable raised; the error says which. worker: as in Done."""

    item: T
    error: Exception
    worker: str = field(default="", compare=False)


def left_out(worker: str, error: Exception) -> None:
    """Say once that a worker that is to blame for ``error`` gets no more work."""
    logging.getLogger(__name__).warning("%s gets no more work, others take over: %s", worker, error)
