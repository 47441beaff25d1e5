"""Several processes that train one student together, a device each; and what they say to each other."""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lrmil.errors import TrainingError
from wsi_pipe.cores import CORES_VARIABLE, core_shares, cores_environment
from wsi_pipe.encoders.devices import resolve_devices
from wsi_pipe.errors import ConfigError, WsiPipeError, in_words

__all__ = ["ALONE", "Ranks", "launch", "speaks", "started_by_torchrun", "torchrun_ranks", "training_devices"]

T = TypeVar("T")
A = TypeVar("A")
Say = Callable[[str], object]

PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the others: the first one may run the teacher over an archive meanwhile."""
CAUSE_S = 3.0
"""How long, in seconds, a better reason is waited for than that a process lost the others."""


LOST, SILENT, FAILED = range(3)
"""Why a process ended: it missed another one, it did not say, or it said."""
CONNECTION = ("gloo", "Connection closed", "Connection reset", "NCCL")
"""Words of errors that say no more than that another process is gone."""


@dataclass(frozen=True)
class Ranks:
    """One process of ``count``, the ``rank``-th. The first one writes; batches are dealt out to all."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        self.summed(np.zeros(1))

    def summed(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over all processes, in their order, so that all have the same to the bit."""
        if self.count == 1:
            return values
        own = torch.from_numpy(np.ascontiguousarray(values, np.float64))
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return np.asarray(torch.stack(found).sum(0).numpy())

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first one does what is inside, and then the others, which find what it has made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


ALONE = Ranks()


def training_devices(text: str) -> list[str]:
    """The devices of a comma-separated list, "auto" for all GPUs; "cpu" may stand there more than once.

    Raises DeviceError for one that is not there, ConfigError for a GPU that is given twice or for GPUs beside CPUs.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = (
        ["cpu"] * len(names) if names and set(names) == {"cpu"} else [str(d) for d in resolve_devices(names or "auto")]
    )
    if len({name.split(":")[0] for name in found}) > 1:
        raise ConfigError(f"devices {', '.join(found)} are not of one kind", remedy="give GPUs alone, or CPUs alone")
    return found


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that ``torchrun`` started."""
    # Some clusters set one or the other of these on their own account.
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process tells the user what came out: the first one of ``torchrun``, or the only one."""
    return not started_by_torchrun() or int(os.environ["RANK"]) == 0


@contextlib.contextmanager
def torchrun_ranks(devices: Sequence[str]) -> Iterator[tuple[Ranks, str]]:
    """This process's place among those of ``torchrun``, and its device.

    devices: one for each process of this machine, or one kind for all ("cpu"), or none: the GPU of its number.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if len(devices) > 1 and local >= len(devices):
        raise ConfigError(
            f"{len(devices)} devices for process {local + 1} of this machine",
            remedy="start as many as there are devices",
        )
    cuda = torch.cuda.is_available() and list(devices) != ["cpu"]
    own = devices[local] if len(devices) > 1 else f"cuda:{local}" if cuda else "cpu"
    with _joined(Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), own, "env://") as ranks:
        yield ranks, own


@contextlib.contextmanager
def _joined(ranks: Ranks, device: str, meeting: str) -> Iterator[Ranks]:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(torch.device(device))
    # Numbers on the CPU go by gloo in any case: sums of figures, and waiting for the first one.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=ranks.rank, world_size=ranks.count, timeout=PATIENCE)
    # Not where something failed: NCCL may wait there for processes that will never come.
    yield ranks
    dist.destroy_process_group()


def launch(work: Callable[[A, Ranks, str, Say], T], argument: A, devices: Sequence[str], say: Say) -> T:
    """What ``work(argument, ranks, device, say)`` returns in the first of as many new processes as there are devices.

    work: a function of a module. The processes share the cores of this one. As soon as one fails, or this one is
    interrupted, all are ended. Raises what a process raised first; TrainingError where it ended without a word.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    ends: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="lrmil-ranks-") as folder:
        meeting = f"file://{folder}/meeting"
        try:
            for rank, cores in enumerate(core_shares(len(devices))):
                ours, theirs = context.Pipe(duplex=False)
                task = (work, argument, Ranks(rank, len(devices)), devices[rank], meeting, theirs)
                process = context.Process(target=_run, args=task, name=f"lrmil-rank-{rank}", daemon=True)
                with _environment(cores_environment(cores)):
                    process.start()
                theirs.close()
                processes.append(process)
                ends[ours] = rank
            return _followed(ends, processes, devices, say)  # type: ignore[no-any-return]
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _followed(ends: dict[Connection, int], processes: Sequence[Any], devices: Sequence[str], say: Say) -> Any:
    """The first one's result, when all are done."""
    result: Any = None
    finished: set[int] = set()
    told: set[int] = set()
    # How good a reason it is, and what is raised for it.
    failure: tuple[int, Exception] | None = None
    while ends and (failure is None or failure[0] < FAILED):
        ready = wait(list(ends), CAUSE_S if failure else None)
        if not ready:
            break
        for end in ready:
            assert isinstance(end, Connection)
            rank, found = ends[end], None
            try:
                kind, value = end.recv()
            except EOFError:
                del ends[end]
                processes[rank].join(5)
                if rank not in finished | told:
                    text = f"the process on {devices[rank]} ended ({_ending(processes[rank].exitcode)})"
                    remedy = "check memory and device, then run again: it goes on"
                    found = SILENT, TrainingError(text, remedy=remedy)
            else:
                if kind == "say":
                    say(value)
                elif kind == "done":
                    finished.add(rank)
                    result = value if rank == 0 else result
                else:
                    told.add(rank)
                    found = (FAILED if kind == "failed" else LOST), value
            if found is not None and (failure is None or found[0] > failure[0]):
                failure = found
    if failure is not None:
        raise failure[1]
    if len(finished) < len(processes):
        raise TrainingError("a process ended without a word", remedy="run again: it goes on where it was")
    return result


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"


def _run(work: Any, argument: Any, ranks: Ranks, device: str, meeting: str, inbox: Connection) -> None:
    """A new process, from its start to its end. Exits with 1 where it failed and said so."""
    import multiprocessing

    # Should the process that started this one vanish, nobody waits for what is done here.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.environ[CORES_VARIABLE]))
    try:
        with _joined(ranks, device, meeting):
            result = work(argument, ranks, device, lambda text: inbox.send(("say", text)))
        inbox.send(("done", result))
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        _tell(error, device, inbox)
        # Not by the ordinary way, on which the group's threads may wait for the others.
        os._exit(1)


def _tell(error: Exception, device: str, inbox: Connection) -> None:
    """Send what a process failed with: "failed", or "lost" where it is no more than that another one is gone."""
    if isinstance(error, WsiPipeError):
        inbox.send(("failed", error))
    else:
        message, remedy = in_words(error)
        lost = isinstance(error, dist.DistError) or any(word in message for word in CONNECTION)
        if not lost:
            # Whatever it is, its trace is for who mends it.
            traceback.print_exc()
        told = TrainingError(f"the process on {device} failed: {message}", remedy=remedy)
        inbox.send(("lost" if lost else "failed", told))
    inbox.close()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
