"""What became of a job: text, CSV, JSON, and one HTML page that stands by itself."""

from __future__ import annotations

from wsi_pipe.report.page import Picture, Section, write_report
from wsi_pipe.report.summary import slides_csv, summarise, summary_table

__all__ = ["Picture", "Section", "slides_csv", "summarise", "summary_table", "write_report"]
