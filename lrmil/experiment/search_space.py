"""Which settings a search may try: names of settings with values or ranges, and draws from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lrmil.config import TrainSettings
from wsi_pipe.errors import ConfigError
from wsi_pipe.override import changed, keys_of

__all__ = ["DEFAULT_SPACE", "Axis", "SearchSpace"]

DEFAULT_SPACE = (
    "learning_rate=1e-4..3e-3:log",
    "weight_decay=1e-5..1e-2:log",
    "model.dropout=0..0.5",
    "model.hidden=32,64,128,256",
)
"""What is searched where nothing is named."""
DIGITS = 3
"""Of a number that is drawn: settings that people can read, and write down again."""


@dataclass(frozen=True)
class Axis:
    """One setting, by its dotted name, and what it may be: ``values``, or anything from ``low`` to ``high``.

    log: draws are even in the logarithm. whole: the setting is a whole number.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False

    @classmethod
    def parse(cls, text: str) -> Axis:
        """From ``model.hidden=64,128`` or ``learning_rate=1e-4..1e-2:log``. Raises ConfigError."""
        key, equals, rest = text.partition("=")
        key, rest = key.strip(), rest.strip()
        if not key or not equals or not rest:
            raise ConfigError(
                f"--search {text}: is not of the form KEY=VALUES",
                remedy="write KEY=A,B,C for values, KEY=LOW..HIGH or KEY=LOW..HIGH:log for a range",
            )
        if key not in set(keys_of(TrainSettings)):
            raise ConfigError(
                f"--search {text}: there is no setting {key!r}",
                remedy="name one as the settings file does: model.hidden",
            )
        if ".." not in rest:
            return cls(key, tuple(dict.fromkeys(value.strip() for value in rest.split(","))))
        span, colon, how = rest.partition(":")
        try:
            low, high = (float(end) for end in span.split(".."))
        except ValueError:
            low = high = math.nan
        if not low < high or (colon and how != "log") or (how and not low > 0):
            raise ConfigError(
                f"--search {text}: is no range",
                remedy="write KEY=LOW..HIGH with LOW below HIGH; with :log both above 0",
            )
        return cls(key, (), low, high, bool(how))

    def draw(self, rng: np.random.Generator) -> str:
        """A value, as ``--set`` takes it."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return self._written(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))

    @property
    def ends(self) -> tuple[str, ...]:
        """What its setting must take for all draws to be taken: every value, or both ends."""
        return self.values or (self._written(self.low), self._written(self.high))

    def _written(self, value: float) -> str:
        return str(round(value)) if _is_whole(self.key) else f"{value:g}"


@dataclass(frozen=True)
class SearchSpace:
    """Settings to start from, and the axes along which they are changed."""

    base: TrainSettings
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, base: TrainSettings, texts: Sequence[str]) -> SearchSpace:
        """From ``--search`` options; ``DEFAULT_SPACE`` where there are none. Raises ConfigError, also for a value that
        its setting does not take."""
        axes = tuple(Axis.parse(text) for text in texts or DEFAULT_SPACE)
        keys = [axis.key for axis in axes]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ConfigError(f"--search names {twice} twice", remedy="name it once, with all its values")
        for axis in axes:
            for value in axis.ends:
                changed(base, [f"{axis.key}={value}"])
        return cls(base, axes)

    def trials(self, count: int, seed: int) -> list[tuple[str, ...]]:
        """The changes of ``count`` trials at most, each of ``KEY=VALUE``: first none, the settings as they are, then
        draws without repeats. Fewer where the space holds fewer."""
        rng = np.random.default_rng(seed)
        found: dict[tuple[str, ...], None] = {(): None}
        for _ in range(50 * count):
            if len(found) >= count:
                break
            found[tuple(f"{axis.key}={axis.draw(rng)}" for axis in self.axes)] = None
        return list(found)[:count]

    def settings(self, changes: Sequence[str]) -> TrainSettings:
        """The settings of a trial."""
        return changed(self.base, changes) if changes else self.base


def _is_whole(key: str) -> bool:
    place: Any = TrainSettings()
    for part in key.split("."):
        place = getattr(place, part)
    return isinstance(place, int) and not isinstance(place, bool)
