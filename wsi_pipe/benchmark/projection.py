"""What an archive would cost: hours, gigabytes, kilowatt-hours and money, with every assumption in words."""

from __future__ import annotations

from dataclasses import dataclass

from wsi_pipe.benchmark.analysis import ArchiveTotals, ArmTotals, archive_totals, totals
from wsi_pipe.benchmark.records import BenchmarkRecord

__all__ = ["Assumptions", "Projection", "assumptions_in_words", "project"]

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Assumptions:
    """What a projection rests on.

    slides: in a year. watts_per_core: drawn by a busy core with its share of the machine; what others say, not
    measured. price_per_hour, price_per_kwh: in ``currency``, 0 where they do not count.
    """

    slides: int = 10_000
    watts_per_core: float = 10.0
    price_per_hour: float = 0.0
    price_per_kwh: float = 0.0
    currency: str = "EUR"


@dataclass(frozen=True)
class Projection:
    """One arm over an archive, on one such machine working alone. cost: None where no price was given."""

    arm: str
    hours: float
    gigabytes_read: float
    gigabytes_written: float
    kwh: float
    cost: float | None


def project(record: BenchmarkRecord, assumptions: Assumptions) -> list[Projection]:
    """Every arm that was measured end to end."""
    at_once = archive_totals(record)
    return [_project(t, at_once.get(t.arm), assumptions) for t in totals(record) if t.end_to_end_s is not None]


def _project(arm: ArmTotals, at_once: ArchiveTotals | None, a: Assumptions) -> Projection:
    factor = a.slides / arm.slides
    # An archive is taken in one pass, where that was measured.
    wall_s, cpu_s = (
        (at_once.wall_s, at_once.cpu_s) if at_once else (arm.end_to_end_s or 0.0, arm.end_to_end_cpu_s or 0.0)
    )
    hours = factor * wall_s / SECONDS_PER_HOUR
    joules = cpu_s * a.watts_per_core + (arm.energy_j or 0.0)
    kwh = factor * joules / JOULES_PER_KWH
    priced = a.price_per_hour > 0 or a.price_per_kwh > 0
    return Projection(
        arm=arm.arm,
        hours=hours,
        gigabytes_read=factor * arm.bytes_read / 1e9,
        gigabytes_written=factor * arm.bytes_written / 1e9,
        kwh=kwh,
        cost=hours * a.price_per_hour + kwh * a.price_per_kwh if priced else None,
    )


def assumptions_in_words(record: BenchmarkRecord, a: Assumptions) -> list[str]:
    """The assumptions, a sentence each."""
    n = len(record.slides)
    tissue = sum(slide.tissue_mm2 for slide in record.slides) / n
    measured = any(t.energy_j is not None for t in totals(record))
    how = "all slides in one pass" if record.archive else "one slide at a time"
    words = [
        f"{a.slides:,} slides a year, on average like the {n} measured here ({tissue:,.0f} mm2 of tissue each).",
        f"One machine as described, one process, {how}; {record.cache} cache, storage as fast as here.",
        f"Energy: processor seconds times {a.watts_per_core:g} W a core, which is assumed"
        + (", plus what the GPU drew, which was measured." if measured else "; no GPU was measured."),
    ]
    if a.price_per_hour > 0 or a.price_per_kwh > 0:
        words.append(f"Money: {a.price_per_hour:g} {a.currency} an hour and {a.price_per_kwh:g} {a.currency} a kWh.")
    return words
