"""Running a callable over many items: in this process, in processes that can be killed, or on a Dask scheduler.

Knows no stage: ``fn(item)`` returns a value, and what it returns comes back as it is finished. A process that dies or
takes too long costs its own item only. Nothing but items and results crosses a process boundary.

``items`` holds what all share; ``child`` is what runs in a process that can be killed, ``worker`` its owner, ``own``
the children that calls of this process share; ``pool`` and ``scheduler`` (with its ``roster`` of workers) spread items;
``spread`` chooses between them.
"""

from wsi_pipe.execute.items import Done, Failed, Where
from wsi_pipe.execute.own import end_own_workers, run_bounded, run_killable
from wsi_pipe.execute.spread import run
from wsi_pipe.execute.worker import KillableWorker

__all__ = ["Done", "Failed", "KillableWorker", "Where", "end_own_workers", "run", "run_bounded", "run_killable"]
