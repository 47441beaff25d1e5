"""One vector a slide: from the features of its tiles, by a mean or by a slide encoder.

``known`` lists slide encoders and what each needs, ``networks`` builds those whose architecture is small, ``remote``
loads what only its makers' code can compute, ``pool`` goes through a job.
"""

from __future__ import annotations

from wsi_pipe.pooling.known import SLIDE_ENCODERS, SlideEncoder, find_slide_encoder
from wsi_pipe.pooling.pool import Pooled, pool_job
from wsi_pipe.pooling.table import write_slide_table

__all__ = ["SLIDE_ENCODERS", "Pooled", "SlideEncoder", "find_slide_encoder", "pool_job", "write_slide_table"]
