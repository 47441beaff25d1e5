"""Several processes on one student: shares that add up to the whole, the same weights, and one end for all."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrmil.distill import DistillRequest, DistillSettings, run_distillation
from lrmil.distill.feed import Feed
from lrmil.distill.pixels import PixelSource, _Tiles
from lrmil.distill.ranks import ALONE, Ranks, launch, training_devices
from lrmil.distill.student import Student
from lrmil.distill.targets import target_stats
from lrmil.distill.train import _loss, variances_of
from lrmil.errors import SplitError, TrainingError
from tests.lrmil.test_distill_feed import CPU, slide
from tests.lrmil.test_distill_teachers import network
from wsi_pipe.errors import ConfigError, DeviceError

QUICK = DistillSettings(
    epochs=3, batch_size=7, lr=1e-3, precision="float32", val_fraction=0.4, threads=1, patience=9, stain=0.1
)


@pytest.mark.parametrize("cache", [0, 64])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_of_a_batch_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, cache: int, count: int) -> None:
    read: list[tuple[int, int]] = []

    def tiles(self: PixelSource, number: int, rows: Any, threads: int) -> _Tiles:
        every = np.random.default_rng(number).integers(0, 256, (len(self.slides[number]), 64, 64, 3), np.uint8)
        read.append((number, len(every if rows is None else rows)))
        return _Tiles(every if rows is None else every[rows], rows)

    monkeypatch.setattr(PixelSource, "_read", tiles)
    slides = [slide(i, 4, 5 + i, (5, 7), np.float32) for i in range(3)]
    stats = target_stats(slides, standardise=False)
    # Of the 18 tiles the last batch has 4: with 8 processes some have none of their own.
    settings = DistillSettings(batch_size=7, cache_mib=cache, threads=1)
    torch.manual_seed(0)
    student = Student(network("test_vit"), blocks=[2], layer_dims=[5], final_dim=7, k=4, side_px=64).eval()

    def batches(ranks: Ranks) -> list[Any]:
        return list(Feed(PixelSource(slides, settings, ranks=ranks), stats, CPU).shuffled([4]))

    whole = batches(ALONE)
    read.clear()
    dealt = [batches(Ranks(rank, count)) for rank in range(count)]
    if not cache:
        # Nobody reads what another one learns from, but for a tile in place of none.
        assert sum(n for _, n in read) <= 18 + count
    variances = variances_of(Feed(PixelSource(slides, settings), stats, CPU), settings)
    assert [len(own) for own in dealt] == [len(whole)] * count
    with torch.inference_mode():
        for batch, *shares in zip(whole, *dealt, strict=True):
            own = [part for part in shares if part.source.shares[1] > 0]
            assert sum(len(part.source.tile) for part in own) == len(batch.source.tile)
            seen = {(s, t): p for part in own for s, t, p in zip(part.source.slide, part.source.tile, part.pixels)}  # noqa: B905
            for s, t, pixels in zip(batch.source.slide, batch.source.tile, batch.pixels, strict=True):
                assert torch.equal(seen[s, t], pixels)
            wanted = _loss(student(batch.pixels.permute(0, 3, 1, 2) / 255), batch, variances, settings)
            losses = [_loss(student(p.pixels.permute(0, 3, 1, 2) / 255), p, variances, settings) for p in shares]
            assert float(torch.stack(losses).mean()) == pytest.approx(float(wanted), rel=1e-5)


def test_devices_are_of_one_kind() -> None:
    assert training_devices("cpu, cpu") == ["cpu", "cpu"]
    with pytest.raises(DeviceError, match="cuda:97"):
        training_devices("cuda:97,cpu")
    with pytest.raises(ConfigError):
        training_devices("toaster")


def request_of(cohort: Path, out: Path, **changes: Any) -> DistillRequest:
    base = DistillRequest(
        bags=cohort / "job" / "bags", teacher="texture", student="timm:test_vit", lr="5x", hr="20x", out=out,
        settings=QUICK, random_student=True,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(distill_cohort: Path, tmp_path: Path) -> None:
    alone = run_distillation(request_of(distill_cohort, tmp_path / "one" / "lr.safetensors"))
    said: list[str] = []
    request = request_of(distill_cohort, tmp_path / "two" / "lr.safetensors", devices=("cpu", "cpu"))
    both = run_distillation(request, said.append)
    assert [line.split(":")[0] for line in said if line.startswith("epoch")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for one, other in zip(alone.history.epochs, both.history.epochs, strict=True):
        assert one.keys() == other.keys()
        assert [other[name] for name in one] == pytest.approx([one[name] for name in one], rel=1e-3, abs=1e-4)
    first, second = weights_of(alone.path), weights_of(both.path)
    # Sums in another order, and nothing else.
    for name, value in first.items():
        assert torch.allclose(second[name], value, atol=2e-5), name
    # Gathered by other threads, the same sums may differ in the last bit.
    assert both.baseline.keys() == alone.baseline.keys()
    for name, figures in alone.baseline.items():
        as_before = pytest.approx(dataclasses.astuple(figures), rel=1e-9, abs=1e-12)
        assert dataclasses.astuple(both.baseline[name]) == as_before
    # It goes on where it was, with as many processes or fewer.
    again = run_distillation(dataclasses.replace(request, devices=()))
    assert again.history.epochs == both.history.epochs


@pytest.mark.slow
def test_the_first_process_makes_the_targets_and_all_end_with_the_first_error(
    distill_cohort: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(QUICK, epochs=1)
    request = request_of(distill_cohort, tmp_path / "lr.safetensors", settings=settings, compute=True)
    result = run_distillation(dataclasses.replace(request, devices=("cpu", "cpu")))
    assert len(list((tmp_path / "lr.targets").glob("*.h5"))) == 6
    assert result.path.is_file()
    wrong = dataclasses.replace(request, devices=("cpu", "cpu"), only_cases=("nobody",))
    with pytest.raises(SplitError, match="no bag is of the case nobody"):
        run_distillation(wrong)


def told(argument: str, ranks: Ranks, device: str, say: Any) -> Any:
    """What the processes of the tests below do."""
    if argument == "sum":
        say(f"from {ranks.rank} on {device}")
        return ranks.summed(np.array([1.0, float(ranks.rank)])).tolist(), os.environ["WSI_PIPE_CORES"]
    if ranks.rank == 1:
        if argument == "error":
            raise SplitError("rank 1 has found something", remedy="mend it")
        if argument == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if argument == "silent":
            os._exit(1)
        raise ZeroDivisionError("a mistake of ours")
    ranks.wait()
    return None


@pytest.mark.slow
def test_what_ends_one_process_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    result = launch(told, "sum", ["cpu", "cpu"], said.append)
    assert result[0] == [2.0, 1.0]
    assert sorted(said) == ["from 0 on cpu", "from 1 on cpu"]
    with pytest.raises(SplitError, match="rank 1 has found something; mend it"):
        launch(told, "error", ["cpu", "cpu"], said.append)
    with pytest.raises(TrainingError, match=r"the process on cpu ended \(signal 9\)"):
        launch(told, "kill", ["cpu", "cpu"], said.append)
    # As where a process does not even start; the others wait for it.
    with pytest.raises(TrainingError, match=r"the process on cpu ended \(status 1\)"):
        launch(told, "silent", ["cpu", "cpu"], said.append)
    with pytest.raises(TrainingError, match="a mistake of ours"):
        launch(told, "bug", ["cpu", "cpu"], said.append)
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.slow
def test_an_interruption_ends_all_processes(distill_cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr.safetensors"
    command = [sys.executable, "-m", "lrmil", "distill", "--bags", distill_cohort / "job" / "bags", "--teacher"]
    command += ["texture", "--student", "timm:test_resnet", "--random-student", "--all", "--out", out]
    command += ["--devices", "cpu,cpu", "--epochs", "500", "--patience", "500", "--val-fraction", "0.3"]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    state = tmp_path / "lr.state.safetensors"
    end = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    children = _children(process.pid)
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    _, told_of = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in told_of
    # The last of them, which tidies up after the others, ends when it sees that they have.
    while (left := [child for child in children if _state(child) != "Z"]) and time.monotonic() < end + 300:
        time.sleep(0.05)
    assert not left
    assert not out.exists()


def _children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
