"""What low resolution saves: high against low resolution on one's own slides and machine, stage by stage."""

from __future__ import annotations

from wsi_pipe.benchmark.projection import Assumptions
from wsi_pipe.benchmark.records import BenchmarkRecord, read_record, write_record

__all__ = ["Assumptions", "BenchmarkRecord", "read_record", "write_record"]
