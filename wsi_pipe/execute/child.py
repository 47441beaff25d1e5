"""What runs in a process that can be killed: calls, one after the other, as long as its parent is there.

Beside the pipe for calls there is a line for the parent's word to stop, which a thread of its own listens to: the call
under way is told by ``wsi_pipe.stopping``, and by an exception in the main thread, wherever that is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from types import FrameType

from wsi_pipe.errors import WorkerError
from wsi_pipe.stopping import StopRequested, is_interrupt, putting_by, stop_event

__all__ = ["PUTTING_BY", "STOPPED", "serve"]

POLL_S = 0.2
STOPPED = "stopped"
"""The kind of answer of a call that ended because it was told to."""
PUTTING_BY = b"putting by"
"""What the process says once it writes what it has, which takes its time."""


def serve(descriptor: int, line: int, parent: int) -> None:
    """The worker process: calls until the pipe closes or the parent is gone. The parent alone answers to Ctrl-C, and to
    SIGTERM, which a batch system sends to all processes of a job at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, _raise)
    threading.Thread(target=_listen, args=(Connection(line), parent), daemon=True).start()
    pipe = Connection(descriptor)
    try:
        while _serve_one(pipe):
            pass
    except StopRequested:
        # Between two calls, or while an answer was sent.
        pass
    # Not Python's own ending: threads that compute or hang would be waited for, or abort.
    os._exit(0)


def _serve_one(pipe: Connection) -> bool:
    """One call; False where there are no more."""
    try:
        fn, item = pipe.recv()
    except (EOFError, OSError):
        return False
    except Exception as error:
        pipe.send(("error", WorkerError(f"a task cannot be understood by its process ({error})")))
        return True
    try:
        answer = ("value", fn(item))
    except StopRequested:
        pipe.send((STOPPED, None))
        return False
    except Exception as error:
        answer = ("error", error)
    try:
        pipe.send(answer)
    except (BrokenPipeError, ConnectionResetError):
        return False
    except Exception as error:
        pipe.send(("error", WorkerError(f"a result cannot be sent back ({type(error).__name__}: {error})")))
    return True


def _raise(number: int, frame: FrameType | None) -> None:
    # Who looked at the event before this came is on the way out already, and puts by what there is.
    if not is_interrupt(sys.exc_info()[1]):
        raise StopRequested


def _listen(line: Connection, parent: int) -> None:
    """Pass on the word to stop, and end this process when its parent is gone: a slide that nobody waits for must not
    write beside a new run."""
    told = False
    with contextlib.suppress(EOFError, OSError):  # the parent has dropped this process, or is gone
        while os.getppid() == parent:
            if told and putting_by.is_set():
                line.send_bytes(PUTTING_BY)
                told = False
            if line.poll(POLL_S):
                line.recv_bytes()
                told = True
                stop_event().set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    os._exit(1)
