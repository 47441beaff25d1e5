"""One process that can be killed, seen from its parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from wsi_pipe.cores import cores_environment
from wsi_pipe.errors import TaskTimeoutError, WorkerError
from wsi_pipe.execute.child import STOPPED

__all__ = ["KillableWorker"]

T = TypeVar("T")
R = TypeVar("R")

POLL_S = 0.2
KILL_GRACE_S = 2.0
STOP_GRACE_S, PUT_BY_S = 1.6, 60.0
"""What a call that is told to stop has to begin to put by what it has, and to do so, before its process is ended."""
READY_S = 600.0
"""What a process may take to load what all items need, where items have a time-out."""


class KillableWorker:
    """One process that runs one callable at a time, keeps what it has loaded, and can be killed.

    cores: how many it may use, all of this process's by default.
    """

    def __init__(self, cores: int | None = None) -> None:
        self._environment = None if cores is None else os.environ | cores_environment(cores)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._line: Connection | None = None
        """For the word to stop, which the process hears while it works on a call."""
        self._ready: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.exit_code: int | None = None
        """Of the process that died in the last call, where one did and its code is known."""

    def call(
        self,
        fn: Callable[[T], R],
        item: T,
        timeout_s: float | None,
        stop: threading.Event | None = None,
        ready: Callable[[], object] | None = None,
    ) -> R:
        """``fn(item)`` in the process.

        ready: called in a process before its first item and outside the item's time, to load what all items need.

        Raises what ``fn`` raises; TaskTimeoutError when it takes longer than ``timeout_s`` and WorkerError when the
        process dies, both after the process is gone (the next call starts another). ``stop`` set by another thread
        ends the call by WorkerError: what runs in the process is told (``wsi_pipe.stopping``) and has a moment.
        """
        pipe = self._start()
        # Also without anything to load a process takes its time to start.
        ready = ready or (None if timeout_s is None else _nothing)
        if ready is not None and self._ready is not self._process:
            limit_s = None if timeout_s is None else max(timeout_s, READY_S)
            self._ask(pipe, _call_ready, ready, limit_s, stop, "getting ready")
            self._ready = self._process
        return self._ask(pipe, fn, item, timeout_s, stop, "it")

    def _ask(
        self,
        pipe: Connection,
        fn: Callable[[T], R],
        item: T,
        timeout_s: float | None,
        stop: threading.Event | None,
        what: str,
    ) -> R:
        self.exit_code = None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            pipe.send((fn, item))
            while not pipe.poll(POLL_S):
                if stop is not None and stop.is_set():
                    self._stop(pipe)
                    raise WorkerError("stopped")
                if deadline is not None and time.monotonic() > deadline:
                    self.kill()
                    raise TaskTimeoutError(
                        f"{'' if what == 'it' else what + ' '}took longer than {timeout_s:g} s and was ended",
                        remedy="give more time with --timeout, or leave the slide out",
                    )
            kind, value = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.exit_code = self._exit_code()
            self.kill()
            raise WorkerError(
                f"its process died ({_cause(self.exit_code)})",
                remedy="too little memory or a damaged slide: try fewer --workers, or leave the slide out",
            ) from error
        except BaseException:
            # An interrupt between question and answer: the next call would get this one's answer.
            self.kill()
            raise
        if kind == STOPPED:
            self.kill()
            raise WorkerError("stopped")
        if kind == "error":
            raise value
        result: R = value
        return result

    def _start(self) -> Connection:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                ours, theirs = multiprocessing.Pipe()
                line, heard = multiprocessing.Pipe()
                # Not multiprocessing.Process: Dask's own workers are daemons, which may not have children of that kind.
                numbers = f"{theirs.fileno()}, {heard.fileno()}, {os.getpid()}"
                code = f"from wsi_pipe.execute.child import serve; serve({numbers})"
                # A process group of its own: a terminal's Ctrl-C is the parent's to answer, also while this one starts.
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[theirs.fileno(), heard.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=self._environment,
                    process_group=0,
                )
                theirs.close()
                heard.close()
                self._pipe, self._line = ours, line
            assert self._pipe is not None
            return self._pipe

    def _stop(self, pipe: Connection) -> None:
        """Have the call under way end by itself, and the process in any case."""
        with contextlib.suppress(OSError, EOFError):
            with self._lock:
                line = self._line
            if line is not None:
                line.send_bytes(b"stop")
                # Its answer, or the end of its process.
                if not pipe.poll(STOP_GRACE_S) and line.poll(0):
                    pipe.poll(PUT_BY_S)
        self.kill()

    def _exit_code(self) -> int | None:
        process = self._process
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(KILL_GRACE_S)
        return None

    def kill(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            process, ends = self._process, (self._pipe, self._line)
            self._process = self._pipe = self._line = None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_GRACE_S)
        for end in ends:
            if end is not None:
                end.close()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _nothing() -> None:
    pass


def _call_ready(ready: Callable[[], object]) -> None:
    ready()
