"""Looking after a job: how far it is, whether its outputs are right, and putting aside those that are not."""

from __future__ import annotations

from wsi_pipe.care.prune import Pruning, Wish, prune_job, prune_list
from wsi_pipe.care.repair import Quarantine, Repair, quarantine_of, repair_job
from wsi_pipe.care.status import JobStatus, SlideResolution, job_status
from wsi_pipe.care.verify import Finding, verify_bags, verify_job

__all__ = [
    "Finding",
    "JobStatus",
    "Pruning",
    "Quarantine",
    "Repair",
    "SlideResolution",
    "Wish",
    "job_status",
    "prune_job",
    "prune_list",
    "quarantine_of",
    "repair_job",
    "verify_bags",
    "verify_job",
]
