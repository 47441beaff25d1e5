"""Where work runs: here, in processes that die or hang, and on a real Dask scheduler with real workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from wsi_pipe.errors import ConfigError, DeviceError, SlideOpenError, TaskTimeoutError, WorkerError
from wsi_pipe.execute import Done, Failed, KillableWorker, Where, run

# What runs elsewhere is named by module and must be importable there: built-ins and the project's own functions are.
EVAL = partial(eval)


def values(results: Sequence[object]) -> dict[str, object]:
    return {str(r.item): r.value for r in results if isinstance(r, Done)}


def errors(results: Sequence[object]) -> dict[str, Exception]:
    return {str(r.item): r.error for r in results if isinstance(r, Failed)}


@pytest.mark.parametrize("where", [Where(), Where(workers=2), Where(timeout_s=60)], ids=["here", "two", "killable"])
def test_every_item_comes_back_once(where: Where) -> None:
    items = [f"{n} * {n}" for n in range(20)]
    assert values(list(run(EVAL, items, where))) == {f"{n} * {n}": n * n for n in range(20)}


@pytest.mark.parametrize("where", [Where(), Where(workers=2)], ids=["here", "two"])
def test_an_error_costs_its_own_item(where: Where) -> None:
    results = list(run(EVAL, ["1", "1 / 0", "2"], where))
    assert values(results) == {"1": 1, "2": 2}
    assert isinstance(errors(results)["1 / 0"], ZeroDivisionError)


def test_our_errors_keep_their_remedy_between_processes() -> None:
    raising = "(_ for _ in ()).throw(__import__('wsi_pipe.errors').errors.SlideOpenError('gone', remedy='look'))"
    ((_, error),) = errors(list(run(EVAL, [raising], Where(timeout_s=60)))).items()
    assert isinstance(error, SlideOpenError)
    assert (error.message, error.remedy) == ("gone", "look")


def test_a_process_that_dies_costs_its_own_item() -> None:
    kill = "__import__('os').kill(__import__('os').getpid(), 9)"
    results = list(run(EVAL, ["1", kill, "2", "3"], Where(workers=2, retries=1)))
    assert values(results) == {"1": 1, "2": 2, "3": 3}
    error = errors(results)[kill]
    assert isinstance(error, WorkerError)
    assert "SIGKILL" in str(error)


@pytest.mark.slow
def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on two cores have one each, also for the threads of libraries; one worker alone has them all."""
    from wsi_pipe.cores import CORES_VARIABLE, LIBRARY_VARIABLES, core_shares

    for name in LIBRARY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CORES_VARIABLE, "2")
    counts = (
        "(__import__('wsi_pipe.encoders.texture').encoders.texture.TextureEncoder().threads, "
        "__import__('wsi_pipe.cores').cores.available_cores(), __import__('torch').get_num_threads(), "
        "__import__('cv2').getNumThreads(), "
        "*(lib['num_threads'] for lib in __import__('threadpoolctl').threadpool_info()))"
    )
    results = list(run(EVAL, [counts, f"{counts} + ()"], Where(workers=2)))
    assert len(results) == 2
    for result in results:
        assert isinstance(result, Done)
        assert len(result.value) > 4
        assert set(result.value) == {1}
    (alone,) = run(EVAL, [counts], Where(timeout_s=60))
    assert isinstance(alone, Done)
    assert alone.value[:2] == (2, 2)
    monkeypatch.setenv(CORES_VARIABLE, "7")
    assert core_shares(3) == [3, 2, 2]
    assert core_shares(9) == [1] * 9


def test_a_retry_gets_a_fresh_process(tmp_path: Path) -> None:
    flag = tmp_path / "seen"
    once = (
        f"7 if __import__('os').path.exists({str(flag)!r}) "
        f"else (open({str(flag)!r}, 'w').close(), __import__('os').abort())"
    )
    assert values(list(run(EVAL, [once], Where(workers=2, retries=1)))) == {once: 7}


def test_a_time_out_really_ends_the_process() -> None:
    hang = "(print, __import__('time').sleep(600))"
    start = time.monotonic()
    results = list(run(EVAL, ["1", hang, "2"], Where(workers=2, timeout_s=2)))
    assert time.monotonic() - start < 60
    assert values(results) == {"1": 1, "2": 2}
    assert isinstance(errors(results)[hang], TaskTimeoutError)
    assert "--timeout" in str(errors(results)[hang])


@pytest.mark.slow
def test_getting_ready_is_not_in_an_items_time() -> None:
    """Starting a process and loading an encoder once ended the first slides of a tight time-out."""
    ready = partial(eval, "__import__('time').sleep(3)")
    items = ["1", "2", "__import__('time').sleep(600)", "3"]
    results = list(run(EVAL, items, Where(timeout_s=2), ready=ready))
    assert values(results) == {"1": 1, "2": 2, "3": 3}
    assert isinstance(errors(results)[items[2]], TaskTimeoutError)


def test_what_goes_wrong_in_getting_ready_is_said() -> None:
    raising = "(_ for _ in ()).throw(__import__('wsi_pipe.errors').errors.DeviceError('no GPU'))"
    (first,) = run(EVAL, ["1"], Where(workers=2), ready=partial(eval, raising), blames_worker=blamed)
    assert isinstance(first, Failed)
    assert isinstance(first.error, DeviceError)


def test_closing_early_ends_the_workers() -> None:
    results = run(EVAL, ["__import__('os').getpid()"] * 2 + ["__import__('time').sleep(600)"] * 2, Where(workers=2))
    first = next(results)
    assert isinstance(first, Done)
    results.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(first.value, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from wsi_pipe.execute import KillableWorker\n"
        "worker = KillableWorker(); print(worker.call(eval, \"__import__('os').getpid()\", None), flush=True)\n"
        "worker.call(eval, \"__import__('time').sleep(600)\", None)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_items_are_taken_as_they_are_needed() -> None:
    taken = []

    def items() -> Iterator[str]:
        for n in range(100):
            taken.append(n)
            yield str(n)

    results = run(EVAL, items(), Where(workers=2))
    next(results)
    assert len(taken) <= 4
    results.close()


def blamed(error: Exception) -> bool:
    return isinstance(error, DeviceError)


def unfit(marker: Path, then: str) -> str:
    """An item that only the process which comes first cannot do."""
    raising = "(_ for _ in ()).throw(__import__('wsi_pipe.errors').errors.DeviceError('the GPU fell off the bus'))"
    me = "str(__import__('os').getpid())"
    # Opening with "x" succeeds for one process alone.
    return (
        f"{raising} if (__import__('os').path.exists({str(marker)!r}) and open({str(marker)!r}).read() == {me}) or "
        f"(not __import__('os').path.exists({str(marker)!r}) and open({str(marker)!r}, 'x').write({me})) else {then}"
    )


def test_a_worker_that_is_to_blame_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = [unfit(tmp_path / "unfit", f"(__import__('time').sleep(0.1), {n})[1]") for n in range(12)]
    results = list(run(EVAL, items, Where(workers=2), blames_worker=blamed))
    assert not errors(results)
    assert sorted(values(results).values()) == list(range(12))  # type: ignore[type-var]
    assert [record.getMessage() for record in caplog.records] == [
        next(record.getMessage() for record in caplog.records if "GPU fell off the bus" in record.getMessage())
    ]


def test_what_no_worker_can_do_is_said_and_tried_on_each_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    raising = "(_ for _ in ()).throw(__import__('wsi_pipe.errors').errors.DeviceError('no GPU'))"
    bad = f"(open({str(count)!r}, 'a').write('x'), {raising})"
    results = run(EVAL, [bad, *(f"{bad} + ({n},)" for n in range(20))], Where(workers=2), blames_worker=blamed)
    first = next(results)
    assert isinstance(first, Failed)
    assert isinstance(first.error, DeviceError)
    results.close()
    assert count.read_text() == "xx"


def test_what_cannot_be_sent_back_is_an_error_of_its_item() -> None:
    results = list(run(EVAL, ["lambda: 0", "1"], Where(timeout_s=60)))
    assert values(results) == {"1": 1}
    assert "cannot be sent back" in str(errors(results)["lambda: 0"])


def test_workers_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run(EVAL, [], Where(workers=0))


def test_dask_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("dask", "distributed")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(WorkerError, match=r"Dask cannot be imported .*'wsi-pipe\[cluster\]'"):
        list(run(EVAL, ["1"], Where(scheduler="tcp://127.0.0.1:1", connect_s=1.0)))
    for where in (Where(), Where(workers=2)):
        assert values(list(run(EVAL, ["1 + 1"], where))) == {"1 + 1": 2}


def test_no_scheduler_there() -> None:
    with pytest.raises(WorkerError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1 .*dask scheduler"):
        list(run(EVAL, ["1"], Where(scheduler="tcp://127.0.0.1:1", connect_s=1.0)))


class FakeFuture:
    """A Dask future whose result cannot be fetched."""

    def __init__(self, status: str, error: Exception) -> None:
        self.status, self.error = status, error

    def result(self, timeout: float) -> object:
        raise self.error


def test_a_connection_that_breaks_is_not_an_items_fault() -> None:
    """A scheduler killed while a result was on its way once failed that slide."""
    from wsi_pipe.execute.scheduler import _outcome

    where = Where(scheduler="tcp://x:1")
    with pytest.raises(WorkerError, match="tcp://x:1 went away"):
        _outcome("a", FakeFuture("finished", ConnectionResetError("by peer")), where)
    # Lost with its worker: Dask computes it again, however long that takes.
    lost: object = _outcome("a", FakeFuture("finished", TimeoutError()), where)
    assert lost is None
    died: object = _outcome("a", FakeFuture("error", RuntimeError("KilledWorker")), where)
    assert isinstance(died, Failed)


def test_threads_of_one_process_have_killable_children_of_their_own() -> None:
    """A Dask worker may run several threads: one child for all would mix up their answers."""
    from concurrent.futures import ThreadPoolExecutor

    from wsi_pipe import execute
    from wsi_pipe.execute import own

    items = [f"(__import__('time').sleep(0.05), {n})[1]" for n in range(12)]
    try:
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(partial(execute.run_killable, EVAL, 60.0), items)) == list(range(12))
        assert 1 <= len(own._own_workers) <= 3
    finally:
        execute.end_own_workers()


@pytest.mark.slow
def test_code_that_never_comes_back_is_ended_by_what_it_computed() -> None:
    from wsi_pipe import execute

    loop = "sum(iter(int, 1))"  # in C: no Python code sees a signal meanwhile
    try:
        pid = execute.run_bounded(EVAL, 60.0, "__import__('os').getpid()")
        with pytest.raises(TaskTimeoutError, match="computed for more than 1 s"):
            execute.run_bounded(EVAL, 1.0, loop)
        with pytest.raises(WorkerError, match="SIGABRT"):
            execute.run_bounded(EVAL, 1.0, "__import__('os').abort()")
        # Waiting is not computing, and the child stays for the next.
        assert execute.run_bounded(EVAL, 0.5, "__import__('time').sleep(1.0)") is None
        others = {execute.run_bounded(EVAL, 60.0, "__import__('os').getpid()") for _ in range(3)}
        assert len(others) == 1
        assert others != {pid}
    finally:
        execute.end_own_workers()


def test_an_interrupted_call_leaves_no_answer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from multiprocessing.connection import Connection

    worker = KillableWorker()
    try:
        assert worker.call(eval, "1", None) == 1
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "poll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                worker.call(eval, "2", None)
        assert worker.call(eval, "3", None) == 3
    finally:
        worker.kill()


def test_one_worker_serves_many_calls_in_one_process() -> None:
    worker = KillableWorker()
    try:
        pids = {worker.call(eval, "__import__('os').getpid()", 60) for _ in range(3)}
        assert len(pids) == 1
        assert pids != {os.getpid()}
    finally:
        worker.kill()


@pytest.mark.slow
def test_dask_runs_everything_once_also_when_a_worker_is_killed(cluster: Any) -> None:
    cluster.scheduler()
    workers = [cluster.worker("--no-nanny") for _ in range(3)]
    items = [f"(__import__('time').sleep(0.2), {n})[1]" for n in range(30)]
    results = []
    for result in run(EVAL, items, Where(scheduler=cluster.address)):
        results.append(result)
        if len(results) == 5:
            workers[0].kill()
    assert sorted(values(results).values()) == list(range(30))  # type: ignore[type-var]
    assert len(results) == 30


@pytest.mark.slow
def test_dask_worker_that_is_to_blame_does_not_end_the_run(cluster: Any, tmp_path: Path) -> None:
    cluster.scheduler()
    workers = [cluster.worker("--no-nanny") for _ in range(3)]
    # Were the unfit one alone there at first, no worker would be left.
    with Client(cluster.address) as client:
        client.wait_for_workers(3, timeout=60)
    items = [unfit(tmp_path / "unfit", f"(__import__('time').sleep(0.2), {n})[1]") for n in range(30)]
    results = []
    for result in run(EVAL, items, Where(scheduler=cluster.address), blames_worker=blamed):
        results.append(result)
        if len(results) == 10:
            # One of those that others' items are bound to goes away as well.
            fit = next(worker for worker in workers if str(worker.pid) != (tmp_path / "unfit").read_text())
            fit.kill()
    assert not errors(results)
    assert sorted(values(results).values()) == list(range(30))  # type: ignore[type-var]


@pytest.mark.slow
def test_dask_says_when_no_worker_is_left(cluster: Any) -> None:
    cluster.scheduler()
    for _ in range(2):
        cluster.worker("--no-nanny")
    raising = "(_ for _ in ()).throw(__import__('wsi_pipe.errors').errors.DeviceError('no GPU'))"
    results = run(EVAL, [raising] * 20, Where(scheduler=cluster.address), blames_worker=blamed)
    first = next(results)
    assert isinstance(first, Failed)
    assert isinstance(first.error, DeviceError)
    results.close()


@pytest.mark.slow
def test_dask_items_that_are_not_there_yet_hold_nothing_up(cluster: Any) -> None:
    cluster.scheduler()
    cluster.worker()
    seen: list[object] = []

    def items() -> Iterator[str | Done[str, int] | None]:
        yield "1 + 1"
        while not seen:
            yield None
        yield Done("ready", 5)
        yield "3"

    for result in run(EVAL, items(), Where(scheduler=cluster.address)):
        seen.append(result)  # noqa: PERF402 (the items look at it meanwhile)
    assert values(seen) == {"1 + 1": 2, "ready": 5, "3": 3}


@pytest.mark.slow
def test_dask_time_outs_and_resources(cluster: Any) -> None:
    cluster.scheduler()
    cluster.worker("--resources", "GPU=1")
    cluster.worker()
    where = Where(scheduler=cluster.address, timeout_s=5, resources={"GPU": 1})
    parent = "__import__('os').getppid()"
    hang = "__import__('time').sleep(600)"
    results = list(run(EVAL, [parent, hang, f"{parent} + 0", f"{parent} + 0 + 0"], where))
    assert isinstance(errors(results)[hang], TaskTimeoutError)
    assert len(set(values(results).values())) == 1, "only the worker with the resource may run these"


@pytest.mark.slow
def test_dask_scheduler_going_away_is_said(cluster: Any) -> None:
    scheduler = cluster.scheduler()
    cluster.worker()
    items = [f"(__import__('time').sleep(0.3), {n})[1]" for n in range(50)]
    results = run(EVAL, items, Where(scheduler=cluster.address, connect_s=5.0))
    assert isinstance(next(results), Done)
    scheduler.kill()
    with pytest.raises(WorkerError, match="went away; start it again"):
        list(results)
