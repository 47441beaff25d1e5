"""Ctrl-C and SIGTERM: said at once, heard wherever they fall, and a second one ends the process on the spot.

The first sets the word to stop (``wsi_pipe.stopping``), which whatever takes batches looks at, and is raised in the
main thread, which may wait or compute. What is raised can be swallowed: Python prints and drops it in its own callbacks
(``__del__``, weak references), and libraries catch everything here and there. So a thread looks whether the main thread
is on its way out, and raises it again where it is not.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from wsi_pipe.stopping import StopRequested, is_interrupt, stop_event

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_TERMINATED",
    "TerminatedError",
    "end",
    "keep_interrupts",
    "raise_if_interrupted",
    "was_terminated",
]

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

SAME_S = 0.3
"""Signals so close to the first are the same one: the terminal and a wrapper (timeout, srun, uv) both pass it on."""
LOOK_S = 0.2
FINISH_S = 1.0
"""How long the functions that libraries registered for the end of the process may take."""


class TerminatedError(StopRequested):
    """SIGTERM came: what ends for Ctrl-C ends for this as well."""


_heard: list[int] = []
"""Signals that came, so that one whose exception some library swallowed is not lost."""
_first_at = 0.0
_again = False
"""Whether the signal that comes next is the first one once more, raised by this module."""
_over = threading.Event()


def _hear(number: int, frame: object) -> None:
    global _again, _first_at
    if _again:
        _again = False
        if is_interrupt(sys.exc_info()[1]):
            return
    elif _heard:
        if time.monotonic() - _first_at < SAME_S:
            return
        _end_now(number)
    else:
        _heard.append(number)
        _first_at = time.monotonic()
        stop_event().set()
        _say("stopping ... (once more ends at once)")
        # Not threading.Thread, which takes locks that the main thread may hold at this moment.
        _thread.start_new_thread(_look_after, ())
    raise_if_interrupted()


def raise_if_interrupted() -> None:
    """Raise again what Ctrl-C or SIGTERM raised before: for who goes on, and so has not seen it."""
    if _heard:
        raise TerminatedError if _heard[0] == signal.SIGTERM else KeyboardInterrupt


def was_terminated(error: BaseException) -> bool:
    """Whether SIGTERM rather than Ctrl-C is behind an interruption."""
    return isinstance(error, TerminatedError) or isinstance(error.__cause__, TerminatedError) or _last_was_sigterm()


def _last_was_sigterm() -> bool:
    return bool(_heard) and _heard[0] == signal.SIGTERM


def _look_after() -> None:
    """Raise the signal again in the main thread as long as nothing there is on its way out because of it."""
    missed = 0
    while not _over.wait(LOOK_S):
        missed = 0 if _on_its_way() else missed + 1
        # Between two frames it is seen nowhere for an instant: twice is no chance.
        if missed >= 2:
            missed = 0
            _raise_again()


def _raise_again() -> None:
    global _again
    _again = True
    # A real signal, which also ends the calls of the operating system that the main thread waits in.
    signal.pthread_kill(threading.main_thread().ident or 0, _heard[0])


def _raise_soon() -> None:
    """A moment later, when the callback that dropped it is over."""
    time.sleep(0.05)
    _raise_again()


def _on_its_way() -> bool:
    """Whether the main thread is handling an interrupt: in its ``except`` and ``finally``, or while something else that
    happened there is handled."""
    # (type, value, traceback) before Python 3.12, the value since.
    found: Any = sys._current_exceptions().get(threading.main_thread().ident or 0)
    return is_interrupt(found[1] if isinstance(found, tuple) else found)


def _say(text: str) -> None:
    # Not through sys.stderr: the signal may have come while that was written to.
    name = os.path.basename(sys.argv[0]).removesuffix(".py") if sys.argv and sys.argv[0] else "wsi-pipe"
    name = os.path.basename(os.path.dirname(sys.argv[0])).replace("_", "-") if name == "__main__" else name
    with contextlib.suppress(OSError):
        os.write(2, f"\n{name}: {text}\n".encode())


def _end_now(number: int) -> NoReturn:
    _say("ended at once; what is half-written is deleted by the next run")
    _leave(128 + number)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        # Written to at this very moment, or closed.
        with contextlib.suppress(Exception):
            if stream is sys.stderr and stream.isatty():
                # Progress bars hide the cursor.
                stream.write("\x1b[?25h")
            stream.flush()
    os._exit(code)


def end(code: int) -> NoReturn:
    """End the process with this exit code.

    After an interruption without Python's own ending: that waits for threads which hang or compute, and takes the
    interpreter from under native code, which aborts then.
    """
    _over.set()
    if not _heard:
        sys.exit(code)
    late = threading.Timer(FINISH_S, _leave, [code])
    late.daemon = True
    late.start()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    _leave(code)


def keep_interrupts() -> None:
    """Make sure that Ctrl-C is heard: where it falls into a callback of Python's own, Python prints and drops it.

    SIGTERM, with which SLURM and Kubernetes announce the end, is heard as well: Python would die of it on the spot.
    """
    signal.signal(signal.SIGTERM, _hear)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _hear)
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        if _heard:
            _thread.start_new_thread(_raise_soon, ())

    sys.unraisablehook = hook
