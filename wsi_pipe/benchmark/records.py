"""What a benchmark measured, as frozen values, and their file: ``benchmark.json``, described in ``docs/benchmark.md``.

Nothing in the file is derived from something else in it: ratios, intervals and projections are computed anew whenever
the file is read, so that ``wsi-pipe benchmark --from`` may answer other questions of old measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsi_pipe.config import from_mapping, to_mapping
from wsi_pipe.errors import ConfigError
from wsi_pipe.files import parse_json, write_text_atomically

__all__ = [
    "ENCODE_STAGES",
    "END_TO_END",
    "FIXED_STAGES",
    "READ_STAGES",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STAGED",
    "STAGES",
    "TRANSFER",
    "ArchivePass",
    "Arm",
    "BenchmarkRecord",
    "GpuSpent",
    "Machine",
    "Measurement",
    "SlideFacts",
    "Spent",
    "read_record",
    "write_record",
]

SCHEMA = "wsi-pipe benchmark"
SCHEMA_VERSION = 1

FIXED_STAGES = ("open", "segment", "plan")
"""What a slide costs before its first tile, whatever the resolution."""
READ_STAGES = ("fetch", "decode", "resample", "handle", "read")
"""Slide to tiles. ``handle`` is planning and passing on; ``read`` stands for all of it where it cannot be divided."""
ENCODE_STAGES = ("encode",)
TRANSFER = "transfer"
"""The copy of tiles to the device, made once more by itself. ``encode`` holds the copy already: this is shown as a part
of it, and no sum of stages has it."""
STAGES = (*FIXED_STAGES, *READ_STAGES, *ENCODE_STAGES, "write")

STAGED = "stages"
"""Kind of measurement: stage after stage, nothing else going on, so that each has its own seconds."""
END_TO_END = "end_to_end"
"""Kind of measurement: as ``wsi-pipe run`` works, reading, encoding and writing at the same time."""


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock and seconds of processor time (all threads of the process)."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class GpuSpent:
    """What the GPUs that arms run on did meanwhile. energy_j: of the whole boards, by NVML. utilisation: mean share of
    time in which a kernel ran, 0 to 1. busy_s: utilisation times seconds, of all of them. peak_memory_bytes: allocated
    by this process at most."""

    energy_j: float | None = None
    utilisation: float | None = None
    busy_s: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way of doing it, which is compared with others.

    label, mpp, size_px: the tiles. encoder: its name; weights_sha256 and dim are the encoder's. device: where it
    computes; several are separated by commas. reader: as given to ``open_slide``. method: "native" (``stream_tiles``),
    or "openslide" (one region for each tile, the peers' way).
    """

    id: str
    label: str
    mpp: float
    size_px: int
    encoder: str
    dim: int
    weights_sha256: str
    precision: str = "float32"
    device: str = "cpu"
    reader: str = "auto"
    method: str = "native"
    batch_size: int = 64


@dataclass(frozen=True)
class SlideFacts:
    """A slide that was measured; bytes on disk, pixels of level 0, um/px, tissue in mm2."""

    slide_id: str
    path: str
    bytes: int
    width_l0: int
    height_l0: int
    mpp: float
    vendor: str
    reader: str
    tissue_mm2: float


@dataclass(frozen=True)
class Measurement:
    """One pass of one arm over one slide.

    order: its place among all passes. kind: STAGED or END_TO_END. stages: by name; for END_TO_END their wall seconds
    overlap, and processor time is known of the whole only (0 in the stages). native_tiles: blocks of the file that
    were decoded for tiles. bytes_read: as the reader counts them, of the overview that tissue is found on and of the
    tiles' blocks; for END_TO_END also of the file's header and what its fingerprint is made of, each time that the run
    opens the file. io_read_bytes: all that the process read, as the system counts it, if it does. bytes_written: the
    bag. peak_memory_bytes: resident, of the process. overview_bytes_read: the overview's part of bytes_read, which does
    not depend on the resolution; None for END_TO_END, and in older files, whose bytes_read lacks it.
    peak_memory_growth_bytes: of peak_memory_bytes, what was not held when the pass began.
    """

    slide: str
    arm: str
    repeat: int
    order: int
    kind: str
    wall_s: float
    cpu_s: float
    stages: Mapping[str, Spent]
    tiles: int
    native_tiles: int
    bytes_read: int
    bytes_written: int
    io_read_bytes: int | None = None
    peak_memory_bytes: int | None = None
    gpu: GpuSpent | None = None
    overview_bytes_read: int | None = None
    peak_memory_growth_bytes: int | None = None


@dataclass(frozen=True)
class ArchivePass:
    """All slides in one pass of one arm, as ``wsi-pipe run`` takes an archive: the next slides are prepared and read
    while one is encoded.

    slides, tiles: how many. gpu: as in ``Measurement``.
    """

    arm: str
    repeat: int
    wall_s: float
    cpu_s: float
    slides: int
    tiles: int
    gpu: GpuSpent | None = None


@dataclass(frozen=True)
class Machine:
    """Where it was measured. cores: that the process may use. versions: of what the figures depend on."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    gpu: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkRecord:
    """Everything that was measured.

    once: what is paid once a process: "start-up" (imports too), "load encoders", "warm up"; and "left out", passes that
    are not among the measurements, of slides that failed or a round that was broken off. repeats: complete rounds.
    interrupted: when and why measuring ended before all rounds were complete. archive: passes over all slides at once,
    of arms that go through ``run``, where there are several slides. cache: "warm" or "cold".
    process: the whole process from its start to the end of the last pass. foreign_load: share of the machine's
    processors that other programs used meanwhile, 0 to 1. skipped: slides left out, with the reason.
    """

    created_utc: str
    wsi_pipe_version: str
    command: str
    machine: Machine
    repeats: int
    cache: str
    threads: int
    arms: tuple[Arm, ...]
    slides: tuple[SlideFacts, ...]
    measurements: tuple[Measurement, ...]
    once: Mapping[str, Spent]
    process: Spent
    foreign_load: float = 0.0
    skipped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    interrupted: str | None = None
    archive: tuple[ArchivePass, ...] = ()
    schema: str = SCHEMA
    schema_version: int = SCHEMA_VERSION

    def arm(self, arm_id: str) -> Arm:
        """The arm of that id."""
        return next(arm for arm in self.arms if arm.id == arm_id)

    def of(self, arm_id: str, kind: str) -> list[Measurement]:
        """The measurements of an arm and a kind, by slide and repeat."""
        found = [m for m in self.measurements if m.arm == arm_id and m.kind == kind]
        return sorted(found, key=lambda m: (m.slide, m.repeat))


def write_record(path: Path, record: BenchmarkRecord) -> None:
    """Write ``benchmark.json``. Raises OutputError when it cannot be written."""
    text = json.dumps(to_mapping(record), indent=1, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def read_record(path: Path) -> BenchmarkRecord:
    """Read ``benchmark.json``.

    Raises ConfigError naming the file when it is not there, not a benchmark, of a later version, or incomplete.
    """
    try:
        values: Any = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", remedy="give the benchmark.json of a run") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})", remedy="give the benchmark.json of a run") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: is not a benchmark of wsi-pipe", remedy="give the benchmark.json of a run")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: is of version {values.get('schema_version')}, this program reads {SCHEMA_VERSION}",
            remedy="use the wsi-pipe that wrote it, or measure anew",
        )
    try:
        record = from_mapping(BenchmarkRecord, values, str(path))
    except TypeError as error:
        raise ConfigError(f"{path}: is incomplete: {error}", remedy="measure anew") from error
    arms, slides = {a.id for a in record.arms}, {s.slide_id for s in record.slides}
    for m in record.measurements:
        if m.arm not in arms or m.slide not in slides:
            raise ConfigError(f"{path}: a measurement names an arm or a slide that the file does not list")
    if any(one.arm not in arms for one in record.archive):
        raise ConfigError(f"{path}: a pass over all slides names an arm that the file does not list")
    return record
