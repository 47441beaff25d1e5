"""What a search for slides passed over: counted by kind, with the first names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FIRST_NAMES", "PassedOver"]

FIRST_NAMES = 5


@dataclass
class _Kind:
    count: int = 0
    names: list[str] = field(default_factory=list)


class PassedOver:
    """Counts of files that look like slides and were not taken, by kind; ``bool()`` tells whether there are any.

    It keeps a few names of each kind: a folder may hold 100,000 plain images.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, kind: str, path: object) -> None:
        """Count a file. kind: what it is and why it was not taken, said of several ("Philips iSyntax, not read")."""
        found = self._kinds.setdefault(kind, _Kind())
        found.count += 1
        if len(found.names) < FIRST_NAMES:
            # Names that are no UTF-8 go into reports and JSON as well.
            found.names.append(str(path).encode("utf-8", "backslashreplace").decode())

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __iter__(self) -> Iterator[tuple[str, int, list[str]]]:
        """(kind, count, first names) of each kind, in the order in which they were met."""
        return iter([(kind, found.count, list(found.names)) for kind, found in self._kinds.items()])

    def lines(self) -> list[str]:
        """One line a kind, for people."""
        said = []
        for kind, count, names in self:
            more = f" and {count - len(names):,} more" if count > len(names) else ""
            said.append(f"passed over: {count:,} {'file' if count == 1 else 'files'}, {kind}: {', '.join(names)}{more}")
        return said

    def to_json(self) -> list[dict[str, Any]]:
        """A list of {"kind", "count", "names"}."""
        return [{"kind": kind, "count": count, "names": names} for kind, count, names in self]

    @classmethod
    def from_json(cls, data: object) -> PassedOver:
        """What ``to_json`` gave; what is damaged in it is left out."""
        made = cls()
        for item in data if isinstance(data, list) else []:
            if isinstance(item, dict) and isinstance(item.get("count"), int) and isinstance(item.get("names"), list):
                names = [str(name) for name in item["names"][:FIRST_NAMES]]
                made._kinds[str(item.get("kind", ""))] = _Kind(item["count"], names)
        return made
