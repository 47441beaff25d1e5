"""What runs in a process that can be killed: calls, one after the other, as long as its parent is there."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.connection import Connection

from wsi_pipe.errors import WorkerError

__all__ = ["serve"]

POLL_S = 0.2


def serve(descriptor: int, parent: int) -> None:
    """The worker process: calls until the pipe closes or the parent is gone. The parent alone answers to Ctrl-C, and to
    SIGTERM, which a batch system sends to all processes of a job at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(descriptor)
    while True:
        try:
            fn, item = pipe.recv()
        except (EOFError, OSError):
            return
        except Exception as error:
            pipe.send(("error", WorkerError(f"a task cannot be understood by its process ({error})")))
            continue
        try:
            answer = ("value", fn(item))
        except Exception as error:
            answer = ("error", error)
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            pipe.send(("error", WorkerError(f"a result cannot be sent back ({type(error).__name__}: {error})")))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a slide that nobody waits for must not write beside a new run."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
