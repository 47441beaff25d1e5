"""From measurements to answers: totals by stage, ratios with their intervals, doubts, and the books balanced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.benchmark.records import (
    ENCODE_STAGES,
    END_TO_END,
    FIXED_STAGES,
    READ_STAGES,
    STAGED,
    STAGES,
    TRANSFER,
    Arm,
    BenchmarkRecord,
    Measurement,
)

__all__ = [
    "ArchiveTotals",
    "ArmTotals",
    "Balance",
    "Comparison",
    "Ratio",
    "archive_totals",
    "arm_name",
    "balance",
    "comparisons",
    "stage_wall",
    "totals",
    "warnings_of",
]

REPLICATES = 4000
SEED = 20240229
CONFIDENCE = 0.95

Quantity = Callable[[Measurement], float]


def stage_wall(measurement: Measurement, stages: Sequence[str]) -> float:
    """Wall seconds of some stages of a pass."""
    return math.fsum(measurement.stages[s].wall_s for s in stages if s in measurement.stages)


def stage_cpu(measurement: Measurement, stages: Sequence[str]) -> float:
    """Processor seconds of some stages of a pass."""
    return math.fsum(measurement.stages[s].cpu_s for s in stages if s in measurement.stages)


def arm_name(record: BenchmarkRecord, arm_id: str) -> str:
    """An arm's name for people: with one encoder the resolution says it all."""
    arm = record.arm(arm_id)
    one = len({a.encoder for a in record.arms}) == 1
    return arm.label if one and arm.method == "native" else arm_id


@dataclass(frozen=True)
class Ratio:
    """``value`` = numerator / denominator, both summed over slides and averaged over repeats; None where that is 0.

    low, high: 95 % interval by bootstrap over slides and, within each, repeats; None where there was a single pass.
    """

    what: str
    unit: str
    numerator: float
    denominator: float
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Two arms, the dear one over the cheap one, in several respects. headline: the one that is told first."""

    title: str
    dear: str
    cheap: str
    headline: bool
    ratios: tuple[Ratio, ...]

    def ratio(self, what: str) -> Ratio | None:
        """The ratio of that name."""
        return next((r for r in self.ratios if r.what == what), None)


@dataclass(frozen=True)
class ArmTotals:
    """One arm, summed over slides and averaged over repeats.

    overview_bytes_read: of bytes_read; None where it was not counted. stages: name -> (wall seconds, processor seconds)
    of the stage passes, TRANSFER too, which ``encode`` holds: sums are over STAGES. run_stages: name -> wall seconds of
    the end-to-end passes, as ``wsi-pipe run`` reports them; they overlap. end_to_end_s, end_to_end_cpu_s: None for
    arms that have no such passes. energy_j: of the GPU, end to end. peak_memory_bytes, peak_memory_growth_bytes:
    the most of any pass, and the most that any added to what the process held already (all arms' encoders, say).
    """

    arm: str
    slides: int
    tiles: int
    native_tiles: int
    bytes_read: int
    bytes_written: int
    overview_bytes_read: int | None
    stages: dict[str, tuple[float, float]]
    run_stages: dict[str, float]
    end_to_end_s: float | None
    end_to_end_cpu_s: float | None
    energy_j: float | None
    gpu_busy_s: float | None
    peak_memory_bytes: int | None
    peak_memory_growth_bytes: int | None
    gpu_peak_memory_bytes: int | None

    def wall(self, stages: Sequence[str]) -> float:
        """Wall seconds of some stages."""
        return math.fsum(self.stages[s][0] for s in stages if s in self.stages)

    def cpu(self, stages: Sequence[str]) -> float:
        """Processor seconds of some stages."""
        return math.fsum(self.stages[s][1] for s in stages if s in self.stages)


@dataclass(frozen=True)
class Balance:
    """Whether processor seconds add up: those of all parts against those of the process, and what is not explained."""

    parts: dict[str, float]
    explained_s: float
    process_s: float

    @property
    def unexplained(self) -> float:
        """Share of the process's processor seconds that no part explains, 0 to 1."""
        return 1 - self.explained_s / self.process_s if self.process_s else 0.0


def _table(record: BenchmarkRecord, arm: str, kind: str, quantity: Quantity) -> NDArray[np.float64]:
    """A quantity by slide and repeat, float64 (slides, repeats)."""
    found = {(m.slide, m.repeat): quantity(m) for m in record.of(arm, kind)}
    rows = [[found[slide.slide_id, r] for r in range(record.repeats)] for slide in record.slides]
    return np.array(rows, np.float64).reshape(len(record.slides), record.repeats)


def bootstrap_ratio(
    dear: NDArray[np.float64], cheap: NDArray[np.float64], replicates: int = REPLICATES, seed: int = SEED
) -> tuple[float, float, float] | None:
    """Ratio of sums over slides of means over repeats, with its 95 % percentile interval; None for a sum of 0.

    dear, cheap: float64 (slides, repeats). Slides are drawn with replacement, and repeats within each slide drawn; both
    arms get the same draws, since they were measured in turns.
    """
    slides, repeats = dear.shape
    below = cheap.mean(1).sum()
    if below <= 0:
        return None
    rng = np.random.default_rng(seed)
    rows = rng.integers(slides, size=(replicates, slides, 1))
    columns = rng.integers(repeats, size=(replicates, slides, repeats))
    above = dear[rows, columns].mean(2).sum(1)
    under = cheap[rows, columns].mean(2).sum(1)
    ratios = above[under > 0] / under[under > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(dear.mean(1).sum() / below), float(low), float(high)


def _ratio(
    record: BenchmarkRecord, what: str, unit: str, dear: str, cheap: str, kind: str, quantity: Quantity
) -> Ratio:
    above, below = (_table(record, arm, kind, quantity) for arm in (dear, cheap))
    found = bootstrap_ratio(above, below)
    value, low, high = found if found else (None, None, None)
    if above.size < 2:
        low = high = None
    return Ratio(what, unit, float(above.mean(1).sum()), float(below.mean(1).sum()), value, low, high)


def _energy(m: Measurement) -> float:
    return m.gpu.energy_j if m.gpu is not None and m.gpu.energy_j is not None else 0.0


def comparisons(record: BenchmarkRecord) -> list[Comparison]:
    """High against low resolution first, then encoders on one level, then the peers' way of reading on each level."""
    native = [arm for arm in record.arms if arm.method == "native"]
    found: list[Comparison] = []
    coarsest, finest = max(a.mpp for a in native), min(a.mpp for a in native)
    if coarsest > finest:
        pairs = [(h, c) for h in native if h.mpp == finest for c in native if c.mpp == coarsest]
        same = [(h, c) for h, c in pairs if h.encoder == c.encoder]
        # With one encoder a level the pair is what would be run; with several, like is set against like as well.
        head = pairs[-1] if len(pairs) == 1 or not same else same[0]
        ordered = [head, *(pair for pair in pairs if pair != head)]
        for dear, cheap in ordered:
            title = f"{dear.label} against {cheap.label}"
            if dear.encoder == cheap.encoder:
                title += f", {dear.encoder}" if len(ordered) > 1 else ""
            else:
                title += f": {dear.encoder} against {cheap.encoder}"
            found.append(_compare(record, title, dear, cheap, headline=(dear, cheap) == head))
    for label in dict.fromkeys(arm.label for arm in native):
        for a, b in itertools.combinations([arm for arm in native if arm.label == label], 2):
            found.append(
                _compare(record, f"encoders at {label}: {a.encoder} against {b.encoder}", a, b, headline=False)
            )
    for peer in (arm for arm in record.arms if arm.method != "native"):
        own = next(arm for arm in native if arm.label == peer.label)
        ratio = _ratio(record, "reading", "s", peer.id, own.id, STAGED, lambda m: stage_wall(m, READ_STAGES))
        title = f"reading at {peer.label}: one region a tile with OpenSlide against wsi-pipe"
        found.append(Comparison(title, peer.id, own.id, False, (ratio,)))
    return found


def _compare(record: BenchmarkRecord, title: str, dear: Arm, cheap: Arm, *, headline: bool) -> Comparison:
    staged: list[tuple[str, str, Quantity]] = [
        ("reading", "s", lambda m: stage_wall(m, READ_STAGES)),
        ("encoding", "s", lambda m: stage_wall(m, ENCODE_STAGES)),
        ("writing", "s", lambda m: stage_wall(m, ("write",))),
        ("fixed: open, segment, plan", "s", lambda m: stage_wall(m, FIXED_STAGES)),
        ("all stages, processor", "s", lambda m: stage_cpu(m, STAGES)),
        ("tiles", "tiles", lambda m: float(m.tiles)),
        ("native tiles decoded", "tiles", lambda m: float(m.native_tiles)),
        ("bytes read", "B", lambda m: float(m.bytes_read)),
        ("bytes written", "B", lambda m: float(m.bytes_written)),
    ]
    whole: list[tuple[str, str, Quantity]] = [
        ("end to end", "s", lambda m: m.wall_s),
        ("end to end, but open, segment, tile", "s", lambda m: m.wall_s - stage_wall(m, ("open", "segment", "tile"))),
        ("end to end, processor", "s", lambda m: m.cpu_s),
    ]
    if all(m.gpu is not None and m.gpu.energy_j is not None for m in record.of(dear.id, END_TO_END)):
        whole.append(("energy of the GPU, end to end", "J", _energy))
    ratios = [_ratio(record, what, unit, dear.id, cheap.id, END_TO_END, q) for what, unit, q in whole]
    ratios += [_ratio(record, what, unit, dear.id, cheap.id, STAGED, q) for what, unit, q in staged]
    return Comparison(title, dear.id, cheap.id, headline, tuple(ratios))


def totals(record: BenchmarkRecord) -> list[ArmTotals]:
    """Every arm, in the record's order."""
    return [_totals(record, arm) for arm in record.arms]


def _totals(record: BenchmarkRecord, arm: Arm) -> ArmTotals:
    staged, whole = record.of(arm.id, STAGED), record.of(arm.id, END_TO_END)
    n = record.repeats

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / n

    present = [s for s in (*STAGES, TRANSFER) if any(s in m.stages for m in staged)]
    stages = {
        s: (mean([stage_wall(m, (s,)) for m in staged]), mean([stage_cpu(m, (s,)) for m in staged])) for s in present
    }
    overviews = [m.overview_bytes_read for m in staged if m.overview_bytes_read is not None]
    energies = [m.gpu.energy_j for m in whole if m.gpu is not None and m.gpu.energy_j is not None]
    busy = [m.gpu.busy_s for m in whole if m.gpu is not None and m.gpu.busy_s is not None]
    device = [m.gpu.peak_memory_bytes for m in whole if m.gpu is not None and m.gpu.peak_memory_bytes is not None]
    return ArmTotals(
        arm=arm.id,
        slides=len(record.slides),
        tiles=round(mean([m.tiles for m in staged])),
        native_tiles=round(mean([m.native_tiles for m in staged])),
        bytes_read=round(mean([m.bytes_read for m in staged])),
        bytes_written=round(mean([m.bytes_written for m in staged])),
        overview_bytes_read=round(mean(overviews)) if len(overviews) == len(staged) else None,
        stages=stages,
        run_stages={
            s: mean([stage_wall(m, (s,)) for m in whole]) for s in dict.fromkeys(s for m in whole for s in m.stages)
        },
        end_to_end_s=mean([m.wall_s for m in whole]) if whole else None,
        end_to_end_cpu_s=mean([m.cpu_s for m in whole]) if whole else None,
        energy_j=mean(energies) if energies else None,
        gpu_busy_s=mean(busy) if busy else None,
        peak_memory_bytes=max((m.peak_memory_bytes for m in whole if m.peak_memory_bytes), default=None),
        peak_memory_growth_bytes=max(
            (m.peak_memory_growth_bytes for m in whole if m.peak_memory_growth_bytes is not None), default=None
        ),
        gpu_peak_memory_bytes=max(device, default=None),
    )


def balance(record: BenchmarkRecord) -> Balance:
    """Processor seconds by part: what is paid once, the stages, the end-to-end passes; and the process's own count."""
    parts = {name: spent.cpu_s for name, spent in record.once.items()}
    # The copy that was made once more for its own clock belongs to no arm's sum, and yet the process did it.
    for stage in (*STAGES, TRANSFER):
        cpu = math.fsum(stage_cpu(m, (stage,)) for m in record.measurements if m.kind == STAGED)
        if cpu:
            parts[stage] = cpu
    if record.archive:
        parts["passes over all slides"] = math.fsum(one.cpu_s for one in record.archive)
    parts["end-to-end passes"] = math.fsum(m.cpu_s for m in record.measurements if m.kind == END_TO_END)
    return Balance(parts, math.fsum(parts.values()), record.process.cpu_s)


@dataclass(frozen=True)
class ArchiveTotals:
    """All slides in one pass of one arm, means over repeats.

    outside_s: processor seconds beside those of encoding, as the stage passes have them. gpu energy is not among them.
    """

    arm: str
    slides: int
    tiles: int
    wall_s: float
    cpu_s: float
    outside_s: float

    @property
    def slides_an_hour(self) -> float:
        """Slides that this machine takes in an hour."""
        return 3600 * self.slides / self.wall_s


def archive_totals(record: BenchmarkRecord) -> dict[str, ArchiveTotals]:
    """Every arm that took all slides in one pass, by its id."""
    encoding = {arm.arm: arm.cpu(ENCODE_STAGES) for arm in totals(record)}
    found = {}
    for arm in record.arms:
        passes = [one for one in record.archive if one.arm == arm.id]
        if not passes:
            continue
        wall, cpu = (math.fsum(getattr(one, name) for one in passes) / len(passes) for name in ("wall_s", "cpu_s"))
        outside = max(cpu - encoding[arm.id], 0.0)
        found[arm.id] = ArchiveTotals(arm.id, passes[0].slides, passes[0].tiles, wall, cpu, outside)
    return found


MIN_SLIDES = 5
MIN_REPEATS = 3
MIN_TILES = 3000
MIN_SECONDS = 0.2
MAX_FOREIGN = 0.05
MAX_SPREAD = 0.10
MAX_UNEXPLAINED = 0.05


def warnings_of(record: BenchmarkRecord) -> list[str]:
    """What speaks against taking the figures at their word, in sentences."""
    found = []
    if record.interrupted:
        found.append(
            f"The benchmark ended early, {record.interrupted}. What is shown are the rounds that are complete."
        )
    if record.foreign_load > MAX_FOREIGN:
        found.append(
            f"Other programs used {100 * record.foreign_load:.0f} % of the machine meanwhile: measure again when it is "
            "idle."
        )
    spread = _spread(record)
    if spread > MAX_SPREAD:
        found.append(
            f"Repeats of one and the same pass differ by {100 * spread:.0f} % (median): the machine was noisy; raise "
            "--repeats or measure when it is idle."
        )
    if record.repeats < MIN_REPEATS:
        few = "One repeat says" if record.repeats == 1 else f"{record.repeats} repeats say"
        found.append(f"{few} little about noise: give --repeats {MIN_REPEATS} or more.")
    n = len(record.slides)
    if n == 1:
        found.append("One slide was measured: the intervals cover its repeats, and say nothing about other slides.")
    elif n < MIN_SLIDES:
        found.append(f"{n} slides are few: the intervals are rough, and other slides may lie outside.")
    finest = min((a for a in record.arms if a.method == "native"), key=lambda a: a.mpp)
    tiles = [m.tiles for m in record.of(finest.id, STAGED)]
    if tiles and max(tiles) < MIN_TILES:
        found.append(
            f"The largest slide has {max(tiles):,} tiles at {finest.label}: on slides of {MIN_TILES:,} and more the "
            "fixed costs weigh less, so low resolution saves more than is shown here."
        )
    for arm in record.arms:
        seconds = [m.wall_s for m in record.of(arm.id, END_TO_END)]
        if seconds and float(np.median(seconds)) < MIN_SECONDS:
            found.append(f"A pass of {arm.id} takes {1000 * float(np.median(seconds)):.0f} ms: too short to time well.")
    unexplained = balance(record).unexplained
    if abs(unexplained) > MAX_UNEXPLAINED:
        found.append(
            f"{100 * unexplained:.0f} % of the processor time belongs to no stage: the stages' figures are short."
        )
    found += [f"Left out: {slide}: {reason}." for slide, reason in record.skipped.items()]
    return found


def _spread(record: BenchmarkRecord) -> float:
    """Median over slides and arms of the relative standard deviation of repeats, end to end; 0 for one repeat."""
    if record.repeats < 2:
        return 0.0
    spreads = []
    for arm in record.arms:
        if arm.method == "native":
            walls = _table(record, arm.id, END_TO_END, lambda m: m.wall_s)
            spreads += (walls.std(1, ddof=1) / walls.mean(1)).tolist()
    return float(np.median(spreads))
