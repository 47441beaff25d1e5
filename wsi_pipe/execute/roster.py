"""The workers of a Dask scheduler: which are fit, which are to blame, and what is missing where none is."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from wsi_pipe.errors import WorkerError
from wsi_pipe.execute.items import Where, left_out

__all__ = ["Identity", "Workers", "difference"]

Identity = Callable[[], Mapping[str, str]]
"""What must be the same on a worker as here: a function of a module, so that the worker runs its own."""

PACKAGE = "wsi-pipe"
TELL_FIRST_S, TELL_AGAIN_S = 10.0, 60.0
STRIKES = 3
"""Items that a worker could not do and another could, before it gets no more."""

_log = logging.getLogger(__name__)


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """In what another identity differs, in words; empty where it does not."""
    keys = [key for key in dict.fromkeys((*here, *there)) if here.get(key) != there.get(key)]
    return ", ".join(f"{key} {there.get(key, 'unknown')} instead of {here.get(key, 'none')}" for key in keys)


class Workers:
    """Which of a scheduler's workers may have work: those that offer the resources and are of this version, but for
    those to blame.

    identity: None takes every worker for fit.
    """

    def __init__(self, client: Any, where: Where, identity: Identity | None = None) -> None:
        self._client, self._where, self._identity = client, where, identity
        self.expected: dict[str, str] = dict(identity()) if identity else {}
        self._blamed: dict[str, Exception] = {}
        self._answers: dict[str, str | None] = {}
        """By address: what is wrong with a worker, empty for one that is fit, None while it is asked."""
        self._known: dict[str, bool] = {}
        """Addresses of the workers that are there, and whether they offer the resources."""
        self._open: dict[str, int] = {}
        self._strikes: dict[str, int] = {}
        self._lacking_since: float | None = None
        self._told_at = 0.0

    def look(self) -> None:
        """See who is there, and ask who is new."""
        wanted = (self._where.resources or {}).items()
        known: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        self._known = {
            address: all((facts.get("resources") or {}).get(name, 0) >= amount for name, amount in wanted)
            for address, facts in known.items()
        }
        for address in self._known:
            if self._identity is not None and address not in self._answers:
                self._answers[address] = None
                # In a thread of its own: one that hangs would hold up the others.
                threading.Thread(target=self._ask, args=(address,), name="greet", daemon=True).start()

    def present(self) -> set[str]:
        """Addresses of the workers that are there, offer the resources and are of this version."""
        fit = {address for address, offers in self._known.items() if offers}
        return fit if self._identity is None else {address for address in fit if self._answers.get(address) == ""}

    def for_new(self) -> set[str]:
        """Workers for an item that nobody has tried."""
        return {
            address
            for address in self.present() - self._blamed.keys()
            if self._strikes.get(address, 0) + self._open.get(address, 0) < STRIKES
        }

    def for_another_try(self, tried: set[str]) -> set[str]:
        """Workers for an item that ``tried`` could not do."""
        return self.present() - self._blamed.keys() - tried

    @property
    def all_to_blame(self) -> Exception | None:
        """The error of the last that was blamed, where workers are there and all were."""
        present = self.present()
        if not present or present - self._blamed.keys():
            return None
        return next(reversed(self._blamed.values()), None)

    def blame(self, worker: str, error: Exception) -> None:
        """Give ``worker`` no more work."""
        if worker not in self._blamed and self.present() - self._blamed.keys() - {worker}:
            left_out(f"the worker at {worker}", error)
        self._blamed[worker] = error

    def praise(self, worker: str) -> None:
        """What a worker had at hand when it was blamed has come out well: it is fit again."""
        self._blamed.pop(worker, None)
        self._strikes.pop(worker, None)

    def is_other(self, worker: str, text: str) -> None:
        """A worker turned out to be of another version than when it was asked."""
        self._refuse(worker, text)

    def doubt(self, worker: str) -> None:
        """A worker could not do an item, which another will try."""
        self._open[worker] = self._open.get(worker, 0) + 1

    def resolve(self, worker: str, *, other_could: bool) -> None:
        """Another has tried what ``worker`` could not do."""
        self._open[worker] = max(self._open.get(worker, 0) - 1, 0)
        if not other_could:
            return
        self._strikes[worker] = self._strikes.get(worker, 0) + 1
        if self._strikes[worker] >= STRIKES:
            self.blame(
                worker,
                WorkerError(
                    f"it failed {self._strikes[worker]} items in a row that others could do",
                    remedy="see whether the slides' folder is mounted there",
                ),
            )

    def tell_what_lacks(self) -> None:
        """Say, after a while and again and again, why nothing goes on. Raises WorkerError after ``wait_workers_s``."""
        now = time.monotonic()
        if self._lacking_since is None:
            self._lacking_since, self._told_at = now, now + TELL_FIRST_S - TELL_AGAIN_S
        limit_s = self._where.wait_workers_s
        if limit_s is not None and now - self._lacking_since >= limit_s:
            raise WorkerError(f"no Dask worker can take work after {limit_s:g} s: {self.lack()}", remedy=self._remedy())
        if now - self._told_at >= TELL_AGAIN_S:
            self._told_at = now
            _log.warning("waiting for Dask workers: %s; %s", self.lack(), self._remedy())

    def lacks_nothing(self) -> None:
        """There is a worker: what was lacking is forgotten."""
        self._lacking_since = None

    def lack(self) -> str:
        """What is missing, in words."""
        if not self._known:
            return f"the scheduler at {self._where.scheduler} has none"
        wanted = ", ".join(f"{name}={amount:g}" for name, amount in (self._where.resources or {}).items())
        offering = [address for address, offers in self._known.items() if offers]
        if not offering:
            return f"none of {len(self._known)} offers {wanted}"
        wrong = [f"{address} {self._answers.get(address) or 'does not answer yet'}" for address in offering]
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return f"none of {len(offering)}{f' with {wanted}' if wanted else ''} is fit: {shown}"

    def _remedy(self) -> str:
        if not any(self._known.values()):
            extra = "".join(f" --resources {name}={n:g}" for name, n in (self._where.resources or {}).items())
            return f"start some with 'dask worker {self._where.scheduler}{extra}'"
        return "install the same wsi-pipe there as here, and start the workers anew"

    def _ask(self, address: str) -> None:
        """Find out whether a worker is of this version; without the package it cannot even answer in its words."""
        assert self._identity is not None
        try:
            found = self._run(address, importlib.metadata.version, PACKAGE)
            if isinstance(found, importlib.metadata.PackageNotFoundError):
                self._refuse(address, f"has no {PACKAGE} installed")
                return
            there = self._run(address, self._identity)
        except Exception as error:
            there = error
        if isinstance(there, Mapping):
            text = difference(self.expected, there)
            if text:
                self._refuse(address, f"is of another version: {text}")
            else:
                self._answers[address] = ""
        elif isinstance(there, (OSError, TimeoutError)):
            # It went away, or comes back: it is asked again when it is seen again.
            self._answers.pop(address, None)
        else:
            self._refuse(address, f"cannot say its version ({type(there).__name__}: {there})")

    def _run(self, address: str, function: Callable[..., Any], *arguments: Any) -> Any:
        answers = self._client.run(function, *arguments, workers=[address], on_error="return")
        return answers.get(address, TimeoutError("no answer"))

    def _refuse(self, address: str, text: str) -> None:
        if self._answers.get(address) != text:
            self._answers[address] = text
            _log.warning("the Dask worker at %s gets no work: it %s", address, text)
