"""Features as other tools read them: one file a format, one table of formats, one function that exports a job.

What each tool needs was read in its own loaders; ``docs/interop.md`` says in which version.
"""

from __future__ import annotations

from wsi_pipe.interop.export import Exported, Plan, export_job, plan_export
from wsi_pipe.interop.table import EXPORTERS

__all__ = ["EXPORTERS", "Exported", "Plan", "export_job", "plan_export"]
