"""What training writes and reuses: damage is found, two do not share a folder, and a refusal changes nothing."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lrmil.checkpoint import load_model, read_card, read_tensors, write_tensors
from lrmil.config import ModelSettings, TrainSettings
from lrmil.errors import ModelFileError, ResumeError, StoreError
from lrmil.experiment.cohort import open_features
from lrmil.splits import FoldIndices
from lrmil.store import FeatureStore, pack, pack_bags
from lrmil.trainer import train
from lrmil.trainer.training import hold_run
from wsi_pipe.encoders.tensor_file import write_tensor_file
from wsi_pipe.errors import NotOursError, OutputError

SETTINGS = TrainSettings(
    model=ModelSettings(name="gated-abmil", hidden=8, attention_dim=4),
    epochs=2,
    max_bags=4,
    patience=0,
    precision="float32",
    device="cpu",
    small_cohorts="off",
)
SPLIT = FoldIndices(np.arange(0, 8), np.arange(8, 12), np.arange(12, 16))
LABELS = np.arange(16) % 2


def make_store() -> FeatureStore:
    rng = np.random.default_rng(0)
    return FeatureStore.from_arrays([rng.normal(size=(3, 6)).astype(np.float32) for _ in range(16)])


def run(out: Path, settings: TrainSettings = SETTINGS) -> Any:
    return train(make_store(), LABELS, SPLIT, settings, out)


def flip(path: Path, at: int, bit: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "fold_1"
    run(out)
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished training."""
    out = tmp_path / "fold_1"
    out.mkdir()
    for path in trained.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, name: str, share: float) -> None:
    path = folder / name
    flip(path, int(path.stat().st_size * share), 4)
    error = ModelFileError if name == "model.safetensors" else ResumeError
    with pytest.raises(error, match=name):
        load_model(path) if error is ModelFileError else run(folder)


def test_a_changed_card_is_found_without_reading_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    at = raw.index(b"temperature") + len("temperature") + 4
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    with pytest.raises(ModelFileError, match="header is not what was written"):
        read_card(path)


def test_files_of_versions_without_digests_are_read(folder: Path) -> None:
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if not k.endswith("sha256")}
    # The tensors that were read are the file itself, mapped.
    write_tensor_file(path.with_suffix(".new"), load_file(path), metadata)
    path.with_suffix(".new").replace(path)
    module, _ = load_model(path)
    assert sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_tensors_are_written_as_the_format_says(tmp_path: Path, dtype: str) -> None:
    values = (torch.arange(12).reshape(3, 4) % 2).to(getattr(torch, dtype))
    tensors = {"a": values, "b.ü": values[:, 1], "scalar": values[0, 1], "none": values[:0], "odd": torch.ones(3)}
    write_tensor_file(tmp_path / "x.safetensors", tensors, {"text": 'with "quotes" and ü'})
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in tensors.items())


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_while_tensors_are_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, "kind", {})
    before = path.read_bytes()
    with file_limit(4096), pytest.raises(OutputError, match=r"cannot write .*state\.safetensors: File too large"):
        write_tensors(path, {"a": torch.ones(5000)}, "kind", {})
    assert everything(tmp_path) == {"state.safetensors": before}
    assert read_tensors(path, "kind")[0]["a"].tolist() == [1, 1, 1]


def test_a_second_training_into_a_folder_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    out = tmp_path / "fold_1"
    with hold_run(out):
        before = everything(out)
        with pytest.raises(ResumeError, match=f"another training is at work in this folder .process {os.getpid()} on"):
            run(out)
        assert everything(out) == before
    assert run(out).model_path == out / "model.safetensors"


def test_a_refused_resume_writes_nothing(folder: Path) -> None:
    before = everything(folder)
    with pytest.raises(ResumeError, match="other settings"):
        run(folder, replace(SETTINGS, learning_rate=1e-3))
    assert {**everything(folder), ".lock": b""} == {**before, ".lock": b""}


def test_a_model_without_a_state_is_not_lost_to_other_settings(folder: Path) -> None:
    (folder / "state.safetensors").unlink()
    before = everything(folder)
    with pytest.raises(ResumeError, match="is a model of other settings or features"):
        run(folder, replace(SETTINGS, learning_rate=1e-3))
    assert {**everything(folder), ".lock": b""} == {**before, ".lock": b""}
    run(folder, replace(SETTINGS, save_every=0))


def test_a_folder_of_users_files_is_no_place_for_a_training(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine = 1\n")
    with pytest.raises(NotOursError, match=r"holds files already \(config\.toml\) and is not the folder of a training"):
        run(tmp_path)
    assert everything(tmp_path) == {"config.toml": b"mine = 1\n"}


def test_a_folder_that_an_earlier_version_trained_in_goes_on(folder: Path) -> None:
    (folder / ".lrmil-run").unlink()
    assert run(folder).best_epoch
    assert (folder / ".lrmil-run").is_file()


def test_what_a_killed_training_left_half_written_goes(folder: Path) -> None:
    half, mine = folder / ".state.safetensors.0123456789ab.partial", folder / ".mine.partial"
    for path in (half, mine):
        path.write_bytes(b"half")
    run(folder)
    assert (half.exists(), mine.exists()) == (False, True)


# -- stores -----------------------------------------------------------------------------------------------------------

MakeBag = Callable[..., Path]


@pytest.fixture
def bags(make_bag: MakeBag) -> list[Path]:
    rng = np.random.default_rng(1)
    return [make_bag(name, rng.normal(size=(20, 6)).astype(np.float32)) for name in "abc"]


@pytest.mark.parametrize("name", ["features.bin", "coords.npy", "offsets.npy", "store.json"])
def test_a_damaged_store_is_packed_again_and_never_trained_on(bags: list[Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "run/store"
    whole = np.asarray(pack_bags(bags, "5x", None, out).flat).copy()
    path = out / name
    status = path.stat()
    at = path.read_bytes().index(b"slide_id") + 12 if name == "store.json" else status.st_size - 3
    flip(path, at)
    # Neither its size nor its time tells.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = pack_bags(bags, "5x", None, out)
    again.verify()
    assert np.array_equal(again.flat, whole)
    assert again.slide_ids == ("a", "b", "c")


@pytest.mark.parametrize("name", ["features.bin", "coords.npy", "store.json"])
def test_a_damaged_store_that_is_given_is_refused(bags: list[Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "store"
    pack_bags(bags, "5x", None, out)
    assert len(open_features(out, level=None, encoder=None, store_dir=tmp_path / "x")) == 3
    path = out / name
    flip(path, path.read_bytes().index(b"slide_id") + 12 if name == "store.json" else path.stat().st_size - 3)
    with pytest.raises(StoreError, match="pack it again"):
        open_features(out, level=None, encoder=None, store_dir=tmp_path / "x")


def test_a_store_of_a_version_without_these_hashes_is_reused(bags: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "store"
    pack_bags(bags, "5x", None, out)
    head = json.loads((out / "store.json").read_text())
    del head["head_hash"], head["places_hash"]
    (out / "store.json").write_text(json.dumps(head))
    inode = (out / "features.bin").stat().st_ino
    pack_bags(bags, "5x", None, out)
    assert (out / "features.bin").stat().st_ino == inode


def test_a_store_in_a_folder_with_files_of_others_is_not_replaced(bags: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "store"
    pack_bags(bags, "5x", None, out)
    (out / "notes.txt").write_text("mine")
    before = everything(out)
    with pytest.raises(StoreError, match="other files in it"):
        pack_bags(bags[:2], "5x", None, out)
    assert everything(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "store.json").write_text("{}")
    with pytest.raises(StoreError, match="other files in it"):
        pack_bags(bags, "5x", None, other)


def test_what_a_killed_packing_left_goes_and_nothing_else(bags: list[Path], tmp_path: Path) -> None:
    half, mine = tmp_path / ".store.0123456789ab.partial", tmp_path / ".store.mine.partial"
    held = tmp_path / ".store.ba9876543210.partial"
    for folder in (half, mine, held):
        folder.mkdir()
        (folder / "features.bin").write_bytes(b"half")
    (held / "mine.txt").write_text("mine")
    pack_bags(bags, "5x", None, tmp_path / "store")
    assert not half.exists()
    assert (mine / "features.bin").exists()
    assert (held / "mine.txt").exists()


def test_a_packing_waits_for_another_into_the_same_folder_and_takes_its_store(
    bags: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    hold = pack.hold_file

    @contextmanager
    def watched(*args: Any, **kwargs: Any) -> Iterator[None]:
        with hold(*args, **kwargs):
            order.append(kwargs["wait"])
            yield

    monkeypatch.setattr(pack, "hold_file", watched)
    pack_bags(bags, "5x", None, tmp_path / "store")
    assert order == [True]
