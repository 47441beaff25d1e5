"""What is known of a Dask scheduler's workers: versions, shares that are missing on one, and what is said of none."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from wsi_pipe.errors import WorkerError
from wsi_pipe.execute import Done, Where, run
from wsi_pipe.execute import roster as rostering
from wsi_pipe.execute.roster import STRIKES, Workers, difference
from wsi_pipe.job.dispatch import _may_be_the_worker
from wsi_pipe.job.identity import versions
from wsi_pipe.outcome import SlideOutcome


class FakeClient:
    """A scheduler's workers, what they offer and what they answer."""

    def __init__(self, **workers: Mapping[str, Any]) -> None:
        self.workers = workers

    def scheduler_info(self, n_workers: int = 5) -> dict[str, Any]:
        return {"workers": {name: {"resources": facts.get("offers", {})} for name, facts in self.workers.items()}}

    def run(self, function: Callable[..., Any], *arguments: Any, workers: list[str], on_error: str) -> dict[str, Any]:
        facts = self.workers[workers[0]]
        if arguments:
            return {workers[0]: facts.get("package", "0.1.0")}
        return {workers[0]: facts.get("identity", {"wsi-pipe": "1", "bag schema": "2"})}


def here() -> Mapping[str, str]:
    return {"wsi-pipe": "1", "bag schema": "2"}


def known(client: Any, where: Where | None = None) -> Workers:
    workers = Workers(client, where or Where(scheduler="tcp://there:1"), here)
    workers.look()
    for thread in threading.enumerate():
        if thread.name == "greet":
            thread.join(10)
    return workers


def test_a_difference_is_named() -> None:
    assert difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert (
        difference({"a": "1", "b": "2"}, {"a": "0", "c": "3"})
        == "a 0 instead of 1, b unknown instead of 2, c 3 instead of none"
    )


def test_workers_of_another_version_get_nothing_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    missing = rostering.importlib.metadata.PackageNotFoundError("wsi-pipe")
    client = FakeClient(
        same={},
        other={"identity": {"wsi-pipe": "0", "bag schema": "2"}},
        none={"package": missing},
        odd={"identity": 3},
    )
    workers = known(client)
    workers.look()
    assert workers.present() == {"same"}
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [
        "the Dask worker at none gets no work: it has no wsi-pipe installed",
        "the Dask worker at odd gets no work: it cannot say its version (int: 3)",
        "the Dask worker at other gets no work: it is of another version: wsi-pipe 0 instead of 1",
    ]


def test_what_is_missing_is_named() -> None:
    gpu = Where(scheduler="tcp://there:1", resources={"GPU": 1.0})
    assert known(FakeClient()).lack() == "the scheduler at tcp://there:1 has none"
    assert known(FakeClient(a={}, b={}), gpu).lack() == "none of 2 offers GPU=1"
    old = {"identity": {"wsi-pipe": "0", "bag schema": "2"}, "offers": {"GPU": 2}}
    assert known(FakeClient(a=old, b={}), gpu).lack() == (
        "none of 1 with GPU=1 is fit: a is of another version: wsi-pipe 0 instead of 1"
    )


def test_nobody_there_is_said_after_a_while_and_again_and_ends_where_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(rostering.time, "monotonic", lambda: clock[0])
    workers = known(FakeClient(), Where(scheduler="tcp://there:1", wait_workers_s=200))
    said = []
    for second in range(0, 200, 5):
        clock[0] = float(second)
        workers.tell_what_lacks()
        said += [second] * len(caplog.records)
        caplog.clear()
    assert said == [10, 70, 130, 190]
    clock[0] = 200.0
    with pytest.raises(WorkerError, match="can take work after 200 s: the scheduler at") as told:
        workers.tell_what_lacks()
    assert "dask worker tcp://there:1" in str(told.value)
    # Once there was one, the time begins anew.
    workers.lacks_nothing()
    workers.tell_what_lacks()


def test_a_worker_that_cannot_do_what_others_can_is_benched(caplog: pytest.LogCaptureFixture) -> None:
    workers = known(FakeClient(bad={}, good={}))
    for n in range(STRIKES):
        assert workers.for_new() == {"bad", "good"}, n
        workers.doubt("bad")
    # As many as that in doubt: it gets nothing new until others have tried them.
    assert workers.for_new() == {"good"}
    workers.resolve("bad", other_could=False)
    assert workers.for_new() == {"bad", "good"}
    for _ in range(2):
        workers.resolve("bad", other_could=True)
    assert workers.for_new() == {"bad", "good"}
    workers.praise("bad")
    for _ in range(STRIKES):
        workers.doubt("bad")
        workers.resolve("bad", other_could=True)
    assert workers.for_new() == {"good"}
    assert workers.for_another_try({"good"}) == set()
    assert "the worker at bad gets no more work" in caplog.text


@pytest.mark.parametrize(
    ("outcome", "doubted"),
    [
        (SlideOutcome("a", "failed", stage="open", error="SlideOpenError", reason="no such file"), True),
        (SlideOutcome("a", "failed", stage="segment", error="MaskError", reason="no such file"), True),
        (SlideOutcome("a", "failed", stage="extract", error="SlideReadError", reason="damaged"), False),
        (SlideOutcome("a", "done"), False),
    ],
)
def test_what_another_worker_may_be_able_to_open(outcome: SlideOutcome, doubted: bool) -> None:
    assert (_may_be_the_worker(outcome) is not None) is doubted


def test_tls_without_a_certificate_is_said() -> None:
    with pytest.raises(WorkerError, match="wants a certificate"):
        list(run(len, ["a"], Where(scheduler="tls://127.0.0.1:1")))


def test_versions_are_texts() -> None:
    assert all(isinstance(text, str) and text for text in versions().values())


# ---------------------------------------------------------------- with a real scheduler


def with_workers(cluster: Any, count: int) -> None:
    from distributed import Client

    cluster.scheduler()
    for _ in range(count):
        cluster.worker("--no-nanny")
    with Client(cluster.address) as client:
        client.wait_for_workers(count, timeout=120)


def share(path: str) -> str:
    """A slide's name where the worker has the share, else a failure."""
    import os

    folder, _, name = path.partition("|")
    mounted = not os.path.exists(f"{folder}/{os.getpid()}")
    if not os.path.exists(f"{folder}/bad"):
        try:
            os.close(os.open(f"{folder}/bad", os.O_CREAT | os.O_EXCL))
            open(f"{folder}/{os.getpid()}", "w").close()
            mounted = False
        except FileExistsError:
            pass
    if name.startswith("damaged"):
        return f"failed {name}: damaged"
    time.sleep(0.05)
    return name if mounted else f"failed {name}: no such file"


def failed(value: str) -> str | None:
    return value if value.startswith("failed") else None


@pytest.mark.slow
def test_dask_worker_without_the_share_costs_no_slide(
    cluster: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_workers(cluster, 2)
    names = [f"s{n}" for n in range(40)] + [f"damaged{n}" for n in range(4)]
    results = list(
        run(share, [f"{tmp_path}|{name}" for name in names], Where(scheduler=cluster.address), doubts=failed)
    )
    came = sorted(result.value for result in results if isinstance(result, Done))
    assert came == sorted([f"s{n}" for n in range(40)] + [f"failed damaged{n}: damaged" for n in range(4)])
    assert "gets no more work, others take over: it failed 3 items in a row that others could do" in caplog.text


def other_version() -> Mapping[str, str]:
    """On every process another."""
    import os

    return {"process": str(os.getpid())}


@pytest.mark.slow
def test_dask_workers_of_another_version_get_nothing(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    with_workers(cluster, 1)
    where = Where(scheduler=cluster.address, wait_workers_s=5)
    with pytest.raises(WorkerError, match="is of another version: process"):
        list(run(len, ["a"], where, identity=other_version))
    assert list(run(len, ["a"], where, identity=versions)) == [Done("a", 1)]


def until_stopped(folder: str) -> str:
    from wsi_pipe.stopping import StopRequested, stop_event

    Path(folder, "begun").touch()
    # In a process that can be killed, the word comes as an exception as well.
    with contextlib.suppress(StopRequested):
        stop_event().wait(60)
    if not stop_event().is_set():
        return "never told"
    Path(folder, "kept").touch()
    raise StopRequested


@pytest.mark.slow
@pytest.mark.parametrize("timeout_s", [None, 300])
def test_dask_tasks_end_with_their_client(cluster: Any, tmp_path: Path, timeout_s: float | None) -> None:
    with_workers(cluster, 1)
    code = (
        "import sys; from wsi_pipe.execute import run, Where; from wsi_pipe.cli import signals\n"
        "from tests.test_dask_workers import until_stopped\n"
        "signals.keep_interrupts()\n"
        f"where = Where(scheduler={cluster.address!r}, timeout_s={timeout_s!r})\n"
        f"try:\n    list(run(until_stopped, [{str(tmp_path)!r}] * 3, where))\n"
        "except KeyboardInterrupt:\n    signals.end(130)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 130
    deadline = time.monotonic() + 60
    while not (tmp_path / "kept").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "kept").exists()
