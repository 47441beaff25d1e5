"""The workers of a Dask scheduler, and what is known against each."""

from __future__ import annotations

from typing import Any

from wsi_pipe.execute.items import Where, left_out

__all__ = ["Workers"]


class Workers:
    """Which of a scheduler's workers may have work: those that offer the resources, but for those to blame."""

    def __init__(self, client: Any, where: Where) -> None:
        self._client, self._where = client, where
        self._blamed: dict[str, Exception] = {}

    def blame(self, worker: str, error: Exception) -> None:
        """Give ``worker`` no more work, as far as others are there."""
        if worker not in self._blamed and self.others():
            left_out(f"the worker at {worker}", error)
        self._blamed[worker] = error

    def praise(self, worker: str) -> None:
        """What a worker had at hand when it was blamed has come out well: it is fit again."""
        self._blamed.pop(worker, None)

    def present(self) -> set[str]:
        """Addresses of the workers that are there and offer the resources."""
        wanted = (self._where.resources or {}).items()
        known: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return {
            address
            for address, facts in known.items()
            if all((facts.get("resources") or {}).get(name, 0) >= amount for name, amount in wanted)
        }

    def others(self) -> set[str] | None:
        """Workers that nothing is known against; None where that is so of all, or none at all is there."""
        if not self._blamed:
            return None
        present = self.present()
        return present - self._blamed.keys() if present else None

    @property
    def last_error(self) -> Exception | None:
        """Why the last one was blamed."""
        return next(reversed(self._blamed.values()), None)
