"""What became of one slide."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from wsi_pipe.masking import mask_secrets

__all__ = [
    "FOCUS_FIGURES",
    "MPP_OUTLIER_RULE",
    "STAGES",
    "STAGE_TIMES",
    "SlideOutcome",
    "Stage",
    "Status",
    "focus_of",
    "mpp_outliers",
]

Status = Literal["done", "empty", "failed"]
Stage = Literal["open", "segment", "tile", "extract", "assemble"]
STAGES: tuple[Stage, ...] = ("open", "segment", "tile", "extract", "assemble")
TIMES = {
    "segment": ("segment",),
    "tile": ("tile",),
    "extract": ("read", "encode", "extract"),
    "assemble": ("assemble",),
}
"""Which entries of ``seconds`` belong to a stage that may be valid already."""

STAGE_TIMES = ("open", *(time for times in TIMES.values() for time in times))
"""What of ``seconds`` is a slide's own work, in its order. "read" and "encode" go on at the same time; "extract" is
what comes after them, storing the features."""


@dataclass(frozen=True)
class SlideOutcome:
    """The end of one slide in one run.

    reason: why it is empty or failed; remedy: what the user can do. stage: where it failed. seconds: wall seconds by
    stage. tiles: kept tiles by level label. cached: stages that were valid already and not run again. costs: the
    seconds of "read" and "encode" by the features that they went into, level and encoder ("20x/uni"); nothing for
    features that were valid already. notes: what the user should know of how the file was understood, of what of a mask
    or of annotations did not count, and else of the slide though nothing is wrong with it. mpp: (x, y) um per level-0
    pixel; mpp_source: who states it. stamp: size and time of its file when it was read, "" of a URL.
    """

    slide_id: str
    status: Status
    path: str = ""
    stage: Stage | None = None
    reason: str | None = None
    remedy: str | None = None
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    tiles: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    cached: tuple[str, ...] = ()
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    finished_utc: str = ""
    notes: tuple[str, ...] = ()
    mpp: tuple[float, float] | None = None
    mpp_source: str = ""
    stamp: str = ""
    mark: Any = None
    """What the job's index is to hold of the slide; it goes from the process that did it to the one that notes it, and
    is no part of what is stored."""

    def __post_init__(self) -> None:
        # Outcomes are logged, stored and shown: secrets of URLs stay out whoever makes one.
        for name in ("path", "reason", "remedy", "error"):
            value = getattr(self, name)
            if (isinstance(value, str) and "=" in value) or "://" in (value or ""):
                object.__setattr__(self, name, mask_secrets(value))
        if self.notes:
            object.__setattr__(self, "notes", tuple(map(mask_secrets, self.notes)))

    @property
    def nothing_new(self) -> bool:
        """Whether the run found all of it valid and made nothing."""
        went_through = {stage for stage, times in TIMES.items() if any(time in self.seconds for time in times)}
        return self.status != "failed" and went_through <= set(self.cached)

    def keeping(self, before: SlideOutcome) -> SlideOutcome:
        """This outcome with the times and counts of ``before``, the slide's last, for what is still its.

        That is all of a stage that was valid already; and where only some features were made, as when an encoder is
        added, the times of the others are added to theirs. ``before`` may be of a run that did not come to features
        and knows only what they cost.
        """
        times = [time for stage in self.cached for time in TIMES.get(stage, ()) if time in before.seconds]
        seconds = {**self.seconds, **{time: before.seconds[time] for time in times}}
        kept = before.counts if "extract" in self.cached else self._focus_still_of(before)
        counts = {**kept, **self.counts}
        # Features that this run was not about are still there, and so is what they cost.
        costs = {**before.costs, **{key: own or before.costs.get(key, {}) for key, own in self.costs.items()}}
        # Where all features were valid the sums may be known already.
        known = {*seconds, *counts} if "extract" in self.cached else set()
        for key in (key for key in costs if not self.costs.get(key)) if self.costs else ():
            for part, spent in costs[key].items():
                for sums, name in ((seconds, part), (counts, f"{part}_s.{key.partition('/')[0]}")):
                    if name not in known:
                        sums[name] = sums.get(name, 0.0) + spent
        return replace(self, seconds=seconds, counts=counts, costs=costs)

    def _focus_still_of(self, before: SlideOutcome) -> dict[str, float]:
        """What ``before`` knows of the focus of tiles that are still there: a run measures the levels that it is about,
        and one that failed none."""
        found = {}
        for name, value in focus_of(before.counts).items():
            label = name.partition(".")[2]
            count = self.tiles.get(label)
            if self.status == "failed" or (count is not None and before.tiles.get(label, count) == count):
                found[name] = value
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-able values, one line of ``outcomes.jsonl``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "mark"}
        # As asdict does, in a tenth of its time: a job has a hundred thousand of these.
        for name in ("seconds", "tiles", "counts"):
            values[name] = dict(values[name])
        values["costs"] = {place: dict(spent) for place, spent in self.costs.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SlideOutcome:
        """The inverse of ``to_json``; unknown keys of later versions are ignored.

        Raises TypeError or ValueError for what ``to_json`` cannot have made.
        """
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and k != "mark"}
        known["cached"] = tuple(known.get("cached", ()))
        known["notes"] = tuple(str(note) for note in known.get("notes") or ())
        known["mpp"] = tuple(map(float, known["mpp"])) if known.get("mpp") else None
        outcome = cls(**known)
        texts = (outcome.path, outcome.reason, outcome.remedy, outcome.error, outcome.stage, outcome.finished_utc)
        numbers = [*_values(outcome.seconds), *_values(outcome.tiles), *_values(outcome.counts)]
        numbers += [number for parts in _values(outcome.costs) for number in _values(parts)]
        sound = (
            isinstance(outcome.slide_id, str)
            and outcome.status in ("done", "empty", "failed")
            and all(text is None or isinstance(text, str) for text in (*texts, outcome.mpp_source, outcome.stamp))
            and all(isinstance(text, str) for text in (*outcome.cached, *outcome.notes))
            and all(isinstance(number, int | float) for number in numbers)
            and (outcome.mpp is None or len(outcome.mpp) == 2)
        )
        if not sound:
            raise ValueError("not an outcome of a slide")
        return outcome


def _values(table: object) -> list[Any]:
    if not isinstance(table, Mapping):
        raise ValueError("not an outcome of a slide")
    return list(table.values())


FOCUS_FIGURES = ("sharpness_p5", "sharpness_median", "sharpness_p95", "blurred_tiles", "folded_tiles", "bubble_tiles")
"""Counts of an outcome, by level, that say how sharp its tiles are."""


def focus_of(counts: Mapping[str, float]) -> dict[str, float]:
    """Those of an outcome's counts that say how sharp its tiles are."""
    return {name: value for name, value in counts.items() if name.partition(".")[0] in FOCUS_FIGURES}


NEAR_MPP = 0.10
MPP_OUTLIER_RULE = (
    "A slide's um per pixel is an outlier where at most one slide in twenty, and no other in a small job, lies within "
    f"{NEAR_MPP:.0%} of it, while half of the job's slides lie within {NEAR_MPP:.0%} of one another."
)


def mpp_outliers(mpp: Mapping[str, tuple[float, float] | None]) -> Iterator[str]:
    """Ids of slides whose um per pixel stands alone in a job, by MPP_OUTLIER_RULE; none of fewer than four slides.

    A scan at another magnification is one of several; a resolution that was mistyped, or a magnification given in its
    place, is nobody else's.
    """
    known = {slide_id: sum(pair) / 2 for slide_id, pair in mpp.items() if pair is not None}
    values = sorted(known.values())
    if len(values) < 4:
        return
    near = {value: _near(values, value) for value in dict.fromkeys(values)}
    if 2 * max(near.values()) < len(values):
        return
    for slide_id, value in known.items():
        if near[value] <= max(1, len(values) // 20):
            yield slide_id


def _near(values: list[float], value: float) -> int:
    """How many of sorted values lie within NEAR_MPP of one of them."""
    return bisect_right(values, value * (1 + NEAR_MPP)) - bisect_left(values, value / (1 + NEAR_MPP))
