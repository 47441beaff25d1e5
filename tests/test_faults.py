"""What happens around a run: sources that die, folders that vanish, workers that are killed, lines cut short."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from wsi_pipe.bag import check_bag
from wsi_pipe.cli import group, run_group
from wsi_pipe.config import JobSettings
from wsi_pipe.errors import OutputError
from wsi_pipe.execute import Where
from wsi_pipe.job import append_outcome, open_job, read_outcomes
from wsi_pipe.job import dispatch as dispatching
from wsi_pipe.job.dispatch import dispatch
from wsi_pipe.manifest import collect_slides
from wsi_pipe.outcome import SlideOutcome

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


def lines(job: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job / "outcomes.jsonl").read_text().splitlines()]


class DyingServer(ThreadingHTTPServer):
    """Serves one file by ranges, and drops every connection once it has sent ``budget`` bytes."""

    daemon_threads = True

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.budget, self.sent = data, len(data), 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DyingServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        data = self.server.data
        match = re.match(r"bytes=(\d+)-(\d+)$", self.headers.get("Range", ""))
        start, stop = (int(match[1]), min(int(match[2]) + 1, len(data))) if match else (0, len(data))
        room = max(self.server.budget - self.server.sent, 0)
        if not room:
            self.close_connection = True
            return
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(stop - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        part = data[start : min(stop, start + room)]
        self.server.sent += len(part)
        self.wfile.write(part)
        self.close_connection = len(part) < stop - start


@pytest.fixture
def server(tmp_path: Path, make_slide: MakeSlide) -> Iterator[DyingServer]:
    found = DyingServer(make_slide(tmp_path / "far.svs").read_bytes())
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def test_a_source_that_dies_half_way_fails_its_slide_and_succeeds_later(
    tmp_path: Path, server: DyingServer, make_slide: MakeSlide
) -> None:
    near, job = make_slide(tmp_path / "near.svs", seed=1), tmp_path / "job"
    url = f"http://127.0.0.1:{server.server_address[1]}/far.svs"
    server.budget = len(server.data) // 2
    arguments = ("run", url, near, "-o", job, "-r", "20x", "--cache", tmp_path / "cache")
    assert cli(*arguments) == 1
    outcomes = read_outcomes(job)
    assert {name: o.status for name, o in outcomes.items()} == {"far": "failed", "near": "done"}
    assert [line["slide_id"] for line in lines(job)].count("far") == 1
    assert url in str(outcomes["far"].reason)
    assert outcomes["far"].error in ("SlideOpenError", "SlideReadError")
    assert [path.name for path in (job / "bags").iterdir()] == ["near.h5"]
    assert not list(tmp_path.rglob("*.partial"))
    server.sent, server.budget = 0, 100 * len(server.data)
    assert cli(*arguments) == 0
    assert check_bag(job / "bags/far.h5") == []


@pytest.mark.slow
@pytest.mark.parametrize("where", [Where(), Where(workers=2)], ids=["here", "workers"])
def test_a_job_folder_removed_meanwhile_ends_the_run_and_is_not_made_anew(
    tmp_path: Path, make_slide: MakeSlide, where: Where
) -> None:
    for seed in range(6):
        make_slide(tmp_path / "in" / f"s{seed}.svs", seed=seed)
    entries, settings = collect_slides([str(tmp_path / "in")]), JobSettings()
    paths = open_job(tmp_path / "job", settings, entries)
    outcomes = dispatch(entries, settings, paths, where, until="segment")
    next(outcomes)
    shutil.move(tmp_path / "job", tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="the output folder is gone: restore it"):
        list(outcomes)
    assert not (tmp_path / "job/outcomes.jsonl").exists()
    shutil.rmtree(tmp_path / "job", ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", tmp_path / "job")
    assert len(list(dispatch(entries, settings, paths, where, until="segment"))) == 6


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["here", "workers"])
def test_space_that_runs_out_during_a_run_ends_it_whole_and_it_resumes(
    options: list[str],
    tmp_path: Path,
    make_slide: MakeSlide,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed in range(8):
        make_slide(tmp_path / "in" / f"s{seed}.svs", seed=seed)
    job, usage = tmp_path / "job", type(shutil.disk_usage(tmp_path))
    opened: list[str] = []

    def nearly_full(path: Path) -> Any:
        # Looked at before each slide: from the fourth on there is no room.
        if path == job:
            opened.append(str(path))
        return usage(10**12, 10**12, 10**12 if len(opened) <= 3 else 50 << 20)

    with monkeypatch.context() as patch:
        patch.setattr(dispatching.shutil, "disk_usage", nearly_full)
        assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", *options) == 1
    assert opened == [str(job)] * 4, "a run that is short of space looks at no further slide"
    told = capsys.readouterr().err
    assert f"{job}: only 50 MiB of space are left; free some space" in told
    assert "Traceback" not in told
    # Those that had been taken are done; nothing else was begun, and nothing is half-written.
    done = read_outcomes(job)
    assert sorted((name, outcome.status) for name, outcome in done.items()) == [(f"s{n}", "done") for n in range(3)]
    bags = {bag: bag.read_bytes() for bag in sorted((job / "bags").glob("*.h5"))}
    assert [bag.stem for bag in bags] == ["s0", "s1", "s2"]
    assert not [problem for bag in bags for problem in check_bag(bag)]
    assert not list(job.rglob("*.partial"))
    assert {path.stem for path in (job / "tissue").iterdir()} == {"s0", "s1", "s2"}

    assert cli("run", "-o", job, *options) == 0
    assert [outcome.status for outcome in read_outcomes(job).values()] == ["done"] * 8
    assert {bag: bag.read_bytes() for bag in bags} == bags


def test_a_line_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    paths = open_job(tmp_path, JobSettings(), [])
    append_outcome(paths, SlideOutcome("a", "done"))
    with paths.outcomes.open("ab") as file:
        file.write(b'{"slide_id": "b", "sta')
    append_outcome(paths, SlideOutcome("c", "done"))
    with paths.outcomes.open("ab") as file:
        file.write(b"17\n[]\n\xff\n")
    assert list(read_outcomes(tmp_path)) == ["a", "c"]


def test_slides_that_are_done_are_handed_out_as_they_are_looked_at(tmp_path: Path, make_slide: MakeSlide) -> None:
    """A run that resumes shows where it is before the first slide that needs work is through."""
    for seed in range(3):
        make_slide(tmp_path / "in" / f"s{seed}.svs", seed=seed)
    assert cli("run", tmp_path / "in", "-o", tmp_path / "job", "-r", "5x", "--limit", "2") == 0
    settings = JobSettings(tile=JobSettings().tile)
    entries = collect_slides([str(tmp_path / "in")])
    taken = []

    def feed() -> Iterator[Any]:
        for entry in entries:
            taken.append(entry.slide_id)
            yield entry

    from wsi_pipe.job import load_settings
    from wsi_pipe.job.run import process

    paths = open_job(tmp_path / "job", load_settings(tmp_path / "job") or settings, entries)
    results = process(feed(), load_settings(tmp_path / "job") or settings, paths)
    first = next(results)
    assert (first.slide_id, "assemble" in first.cached, taken) == ("s0", True, ["s0"])
    assert [outcome.slide_id for outcome in results] == ["s1", "s2"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--resources", "ENC=1"]], ids=["one phase", "two phases"])
def test_a_dask_worker_killed_during_a_run(
    tmp_path: Path, make_slide: MakeSlide, cluster: Any, options: list[str]
) -> None:
    for seed in range(8):
        make_slide(tmp_path / "in" / f"s{seed}.svs", seed=seed)
    (tmp_path / "in/bad.svs").write_bytes(b"no")
    cluster.scheduler()
    workers = [cluster.worker("--no-nanny", "--resources", "ENC=1") for _ in range(2)]
    if options:
        cluster.worker("--no-nanny")
    job = tmp_path / "job"
    command = [sys.executable, "-m", "wsi_pipe", "run", "in", "-o", "job", "--scheduler", cluster.address, *options]
    # Relative paths: workers have working directories of their own.
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (job / "outcomes.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        workers[0].kill()
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "Traceback" not in err
    counts = Counter(line["slide_id"] for line in lines(job))
    assert counts == Counter([*(f"s{n}" for n in range(8)), "bad"])
    assert {name for name, o in read_outcomes(job).items() if o.status == "failed"} == {"bad"}
    assert sorted(path.stem for path in (job / "bags").glob("*.h5")) == [f"s{n}" for n in range(8)]
    assert all(check_bag(path) == [] for path in (job / "bags").glob("*.h5"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--resources", "ENC=1"]], ids=["one phase", "two phases"])
def test_a_dask_scheduler_killed_during_a_run(
    tmp_path: Path, make_slide: MakeSlide, cluster: Any, options: list[str]
) -> None:
    slides = [f"s{seed}" for seed in range(10)]
    for seed, name in enumerate(slides):
        make_slide(tmp_path / f"in/{name}.svs", seed=seed)
    job = tmp_path / "job"
    command = [sys.executable, "-m", "wsi_pipe", "run", "in", "-o", "job", *options]
    scheduler = cluster.scheduler()
    for _ in range(2):
        cluster.worker("--no-nanny", "--resources", "ENC=1")
    command += ["--scheduler", cluster.address]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (job / "outcomes.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        scheduler.kill()
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "Traceback" not in err, err
    (said,) = (line for line in err.splitlines() if line.startswith("wsi-pipe: error: "))
    assert f"the Dask scheduler at {cluster.address} went away; start it again and run the same command" in said
    before = lines(job)
    assert 0 < len(before) < len(slides), "the scheduler was killed too early or too late"
    assert {line["status"] for line in before} == {"done"}
    noted = {line["slide_id"] for line in before}
    bags = {path.stem: path.stat().st_ino for path in (job / "bags").glob("*.h5")}
    assert bags.keys() >= noted

    cluster.scheduler()
    for _ in range(2):
        cluster.worker("--no-nanny", "--resources", "ENC=1")
    again = subprocess.run(
        [*command, "--scheduler", cluster.address], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert "Traceback" not in again.stderr
    after = lines(job)[len(before) :]
    # A bag whose outcome never arrived is noted now; those that were noted are not noted again.
    assert Counter(line["slide_id"] for line in lines(job)) == Counter(slides)
    assert {line["slide_id"] for line in after if "assemble" in line["cached"]} == bags.keys() - noted
    assert {name: (job / f"bags/{name}.h5").stat().st_ino for name in bags} == bags
    assert all(check_bag(job / f"bags/{name}.h5") == [] for name in slides)
    assert not list(job.rglob("*.partial"))


@pytest.mark.slow
def test_the_example_of_a_local_cluster_runs(tmp_path: Path, make_slide: MakeSlide) -> None:
    make_slide(tmp_path / "in/a.svs")
    make_slide(tmp_path / "in/b.svs", seed=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).parents[1] / "pipelines/cluster/local.sh"
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "in"), str(tmp_path / "job"), "1"],
        env=os.environ | {"PATH": programs, "PORT": port},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in (tmp_path / "job/bags").glob("*.h5")) == ["a", "b"]
    with socket.socket() as gone:
        deadline = time.monotonic() + 30
        while gone.connect_ex(("127.0.0.1", int(port))) == 0 and time.monotonic() < deadline:
            time.sleep(0.2)
    assert time.monotonic() < deadline, "the scheduler outlived the script"
