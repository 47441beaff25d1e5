"""What cannot be looked at is not damaged: nothing is put aside or made again for an error of the surroundings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lrmil.errors import StoreError
from lrmil.store import inspect_bag
from wsi_pipe.bag import check_bag, read_header, unreachable
from wsi_pipe.bag import read as bag_reading
from wsi_pipe.care import quarantine_of, repair_job, verify_bags, verify_job
from wsi_pipe.cli import group, run_group
from wsi_pipe.errors import BagError, FileAccessError
from wsi_pipe.execute import end_own_workers
from wsi_pipe.job import read_outcomes
from wsi_pipe.job.guard import read_guarded

MakeSlide = Callable[..., Path]


def cli(*arguments: str | Path) -> int:
    return run_group(group, "wsi-pipe", [str(argument) for argument in arguments])


@pytest.fixture
def job(tmp_path: Path, make_slide: MakeSlide) -> Path:
    for seed in range(2):
        make_slide(tmp_path / f"in/s{seed}.svs", seed=seed)
    assert cli("run", tmp_path / "in", "-o", tmp_path / "job", "-r", "5x", "--keep-features") == 0
    return tmp_path / "job"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """As an HDF5 file that a notebook has open for writing."""
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def test_a_bag_that_another_process_holds_is_neither_put_aside_nor_made_again(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, before = job / "bags/s0.h5", (job / "bags/s0.h5").stat()
    with held(bag):
        findings = {f.slide_id: f for f in verify_job(job)}
        assert (findings["s0"].status, findings["s0"].unseen) == ("unseen", True)
        assert findings["s1"].problems == ()
        capsys.readouterr()
        assert cli("verify", job) == 1
        told = capsys.readouterr().out
        assert "cannot be looked at: another process holds it open for writing" in told
        assert "0 wrong, 1 cannot be looked at" in told
        assert [item.action for item in repair_job(job)] == ["unseen"]
        assert cli("verify", "--repair", job) == 1
        assert "0 files put aside, 1 that cannot be looked at left as they are" in capsys.readouterr().out
        assert quarantine_of(job).files == 0
        # Another encoder is wanted: the bag would have to be read, and is not made anew out of nothing.
        assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", "-r", "2.5x") == 1
        assert "cannot be looked at" in (job / "failures.csv").read_text()
    assert (bag.stat().st_ino, bag.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert read_outcomes(job)["s0"].status == "failed"
    assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", "-r", "2.5x") == 0
    assert check_bag(bag) == []


@pytest.mark.parametrize("kind", ["tiles/s0.h5", "features/s0/5x.texture.h5"])
def test_stage_files_that_are_held_stay(job: Path, kind: str) -> None:
    with held(job / kind):
        assert [(Path(item.path).name, item.action) for item in repair_job(job)] == [(Path(kind).name, "unseen")]
    assert (job / kind).is_file()
    assert repair_job(job) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOLCK])
def test_errors_of_the_surroundings_are_no_damage(
    job: Path, monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path
) -> None:
    bag = job / "bags/s0.h5"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bag_reading.h5py, "File", refuse)
    with pytest.raises(FileAccessError, match=os.strerror(code)):
        check_bag(bag)
    with pytest.raises(FileAccessError):
        read_header(bag)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_whose_state_cannot_be_asked_is_unseen(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    bag, inode = job / "bags/s0.h5", (job / "bags/s0.h5").stat().st_ino
    with monkeypatch.context() as patch:
        stat = Path.stat

        def refuse(path: Path, **kwargs: Any) -> os.stat_result:
            if path.name == "s0.h5" and path.parent.name == "bags":
                raise OSError(code, os.strerror(code), str(path))
            return stat(path, **kwargs)

        patch.setattr(Path, "stat", refuse)
        assert [f.unseen for f in verify_job(job)] == [True, False]
        assert [f.unseen for f in verify_bags([bag])] == [True]
        with pytest.raises(FileAccessError):
            read_guarded(read_header, bag)
        assert [item.action for item in repair_job(job)] == ["unseen"]
        assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", "-r", "2.5x") == 1
    assert bag.stat().st_ino == inode


def test_a_mask_that_cannot_be_read_is_not_made_again(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = job / "tissue/s0.geojson"
    before = mask.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:
            if path == mask:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return read(path)

        patch.setattr(Path, "read_bytes", refuse)
        assert cli("run", tmp_path / "in", "-o", job, "-r", "5x", "-r", "2.5x") == 1
        assert "cannot be looked at" in str(read_outcomes(job)["s0"].reason)
    assert mask.stat().st_mtime_ns == before


def test_a_process_that_cannot_be_started_says_nothing_of_the_file(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_own_workers()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("wsi_pipe.execute.worker.subprocess.Popen", refuse)
    with pytest.raises(FileAccessError, match="Too many open files"):
        read_guarded(read_header, job / "bags/s0.h5")


def test_what_hdf5_says_of_a_disk_is_understood() -> None:
    text = "Can't synchronously read data (file read failed: time = x, errno = 5, error message = 'Input/output error')"
    found = unreachable(Path("a.h5"), OSError(text))
    assert found is not None
    assert found.message == "a.h5: cannot be looked at: Input/output error"
    assert unreachable(Path("a.h5"), OSError("file signature not found")) is None
    assert unreachable(Path("a.h5"), FileNotFoundError(errno.ENOENT, "no")) is None


# -- what no bag may hold ---------------------------------------------------------------------------------------------


def _external_storage(path: Path) -> None:
    secret = path.with_name("secret.bin")
    with h5py.File(path, "r+") as file:
        features = file["levels/5x/features/texture"]
        shape, dtype, attrs = features.shape, features.dtype, dict(features.attrs)
        secret.write_bytes(np.ones(shape, dtype).tobytes())
        del file["levels/5x/features/texture"]
        attrs.pop("sha256")
        fake = file["levels/5x/features"].create_dataset(
            "texture", shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
        )
        fake.attrs.update(attrs)


def _external_link(path: Path) -> None:
    other = path.with_name("other.hdf")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as target:
        file.copy("levels/5x/features/texture", target, "x")
        del file["levels/5x/features/texture"]
        file["levels/5x/features/texture"] = h5py.ExternalLink(str(other), "/x")


def _virtual(path: Path) -> None:
    other = path.with_name("other.hdf")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as target:
        features = file["levels/5x/features/texture"]
        shape, dtype, attrs = features.shape, features.dtype, dict(features.attrs)
        target["x"] = features[()]
        del file["levels/5x/features/texture"]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[:] = h5py.VirtualSource(str(other), "x", shape)
        file["levels/5x/features"].create_virtual_dataset("texture", layout).attrs.update(attrs)


def _unwritten_chunks(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        features = file["levels/5x/features/texture"]
        dtype, attrs = features.dtype, dict(features.attrs)
        del file["levels/5x/features/texture"]
        huge = file["levels/5x/features"].create_dataset("texture", (10_000_000, 1024), dtype, chunks=(1000, 1024))
        huge.attrs.update(attrs)


def _compressed_zeros(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["levels/5x/tissue2"] = 0
        del file["levels/5x/tissue2"]
        file["levels/5x"].create_dataset("attention/zeros", data=np.zeros(40_000_000, np.uint8), compression="gzip")


DANGEROUS = {
    "external storage": (_external_storage, "lies in another file"),
    "external link": (_external_link, "is a link to another file"),
    "virtual": (_virtual, "put together from other files"),
    "unwritten chunks": (_unwritten_chunks, "declares arrays over 64 times larger than the file"),
    "compressed zeros": (_compressed_zeros, "declares arrays over 64 times larger than the file"),
}


@pytest.mark.parametrize("kind", DANGEROUS)
def test_bags_that_take_data_from_elsewhere_or_expand_without_end_are_refused(job: Path, kind: str) -> None:
    bag = job / "bags/s0.h5"
    change, cause = DANGEROUS[kind]
    change(bag)
    assert [problem for problem in check_bag(bag) if cause in problem]
    with pytest.raises(BagError, match=cause):
        read_header(bag)
    with pytest.raises(StoreError, match=cause):
        inspect_bag(bag, "5x", "texture")
    findings = {f.slide_id: f for f in verify_job(job)}
    assert findings["s0"].status == "broken"
    assert not findings["s1"].problems


# -- linked folders ---------------------------------------------------------------------------------------------------


def test_a_repair_works_where_bags_lie_on_another_disk(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job / "bags/s0.h5").write_bytes(b"junk")
    rename = os.replace

    def other_disk(source: Any, target: Any) -> None:
        if Path(source).name == "s0.h5" and "quarantine" in str(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "replace", other_disk)
    (item,) = repair_job(job)
    assert Path(item.moved_to).read_bytes() == b"junk"
    assert not (job / "bags/s0.h5").exists()
    assert not list(job.rglob("*.partial"))


def test_bags_of_another_job_in_a_shared_folder_are_left(
    job: Path, tmp_path: Path, make_slide: MakeSlide, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    (job / "bags").rename(shared)
    (job / "bags").symlink_to(shared)
    (shared / "of-another-job.h5").write_bytes((shared / "s0.h5").read_bytes())
    (shared / "s1.h5").write_bytes(b"junk")
    assert sorted((Path(item.path).name, item.action) for item in repair_job(job)) == [
        ("of-another-job.h5", "not ours"),
        ("s1.h5", "moved"),
    ]
    assert sorted(path.name for path in shared.iterdir()) == ["of-another-job.h5", "s0.h5"]


def test_a_repair_leaves_files_that_this_program_did_not_make(job: Path) -> None:
    mine = [job / "bags/mine.h5", job / "tiles/mine.h5", job / "features/zz/mine.h5", job / "tissue/mine.geojson"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    assert {item.action for item in repair_job(job)} == {"not ours"}
    assert all(path.read_bytes() == b"mine" for path in mine)
