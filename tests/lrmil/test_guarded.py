"""Bags on which HDF5 loops for ever are refused by name, and hang nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.checkpoint import ModelCard
from lrmil.config import ModelSettings
from lrmil.distill import selection as distilling
from lrmil.errors import StoreError
from lrmil.model import build_model
from lrmil.predictor import Predictor, write_attention
from lrmil.store import check_readable, inspect_bag, pack_bags
from lrmil.store.formats import inspect_here
from wsi_pipe import execute
from wsi_pipe.errors import BagError
from wsi_pipe.execute import worker
from wsi_pipe.job import guard

MakeBag = Callable[..., Path]
DIM = 8
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def loops(make_bag: MakeBag, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A bag with zeros where HDF5 keeps its strings, whose end the library then looks for without end."""
    monkeypatch.setattr(guard, "CPU_S", 1.0)
    path = make_bag("loops", features())
    zero_heap(path)
    yield path
    execute.end_own_workers()


def zero_heap(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = raw.index(b"GCOL") + 512
    raw[start : start + 512] = bytes(512)
    path.write_bytes(raw)


def features(n: int = 5) -> NDArray[np.float16]:
    return np.random.default_rng(n).normal(size=(n, DIM)).astype(np.float16)


def predictor() -> Predictor:
    torch.manual_seed(0)
    model = build_model(ModelSettings("abmil", in_dim=DIM, classes=2, hidden=8, attention_dim=4)).eval()
    return Predictor(model, ModelCard(model.settings, ("a", "b"), encoder="timm:some/net", level="5x"))


@pytest.mark.slow
def test_a_bag_that_hdf5_loops_on_is_no_bag(loops: Path, make_bag: MakeBag, tmp_path: Path) -> None:
    said = r"loops\.h5: unreadable: HDF5 did not return within 1 s of computing; make the bag again"
    for look in (inspect_bag, check_readable):
        with pytest.raises(StoreError, match=said):
            look(loops)
    good = [make_bag(name, features(n)) for n, name in enumerate("abc", 3)]
    with pytest.raises(StoreError, match=said):
        pack_bags([*good, loops], "5x", None, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert len(pack_bags(good, "5x", None, tmp_path / "store")) == 3


@pytest.mark.slow
def test_it_costs_a_prediction_its_own_slide(loops: Path, make_bag: MakeBag) -> None:
    first, last = make_bag("first", features(3)), make_bag("last", features(4))
    found = list(predictor().predict_bags([first, loops, last]))
    assert [(one.slide_id, one.status) for one in found] == [("first", "done"), ("loops", "failed"), ("last", "done")]
    assert "HDF5 did not return" in str(found[1].reason)


def test_attention_is_not_written_into_a_damaged_bag(loops: Path, make_bag: MakeBag) -> None:
    whole = make_bag("whole", features())
    predicted = predictor().predict_bag(whole)
    whole.write_bytes(loops.read_bytes())
    with pytest.raises(BagError, match=r"whole\.h5: attention is not written into it: unreadable: HDF5 did not"):
        write_attention(predicted, "m")
    assert whole.read_bytes() == loops.read_bytes()


def test_distillation_refuses_it(loops: Path) -> None:
    with pytest.raises(StoreError, match=r"loops\.h5: unreadable"):
        distilling._attrs(loops)


def test_bags_are_looked_into_in_one_process_and_few_turns(
    make_bag: MakeBag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bags = [make_bag(f"b{n:03d}", features(2)) for n in range(guard.BATCH + 3)]
    execute.end_own_workers()
    started, turns = [], []
    popen, call = worker.subprocess.Popen, worker.KillableWorker.call

    def counting(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **options)

    def turning(self: Any, *arguments: Any, **options: Any) -> Any:
        turns.append(arguments)
        return call(self, *arguments, **options)

    monkeypatch.setattr(worker.subprocess, "Popen", counting)
    monkeypatch.setattr(worker.KillableWorker, "call", turning)
    store = pack_bags(bags, "5x", None, tmp_path / "store")
    assert store.slide_ids == tuple(bag.stem for bag in bags)
    assert (len(started), len(turns)) == (1, 2)
    # A file that was found sound is not looked at again, until it changes.
    for times, bag in ((3, bags[0]), (4, bags[1])):
        check_readable(bag)
        check_readable(bag)
        assert len(turns) == times
    bags[0].write_bytes(bags[2].read_bytes())
    check_readable(bags[0])
    assert len(turns) == 5


def test_paths_are_told_as_they_were_given(make_bag: MakeBag, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = make_bag("a", features())
    monkeypatch.chdir(bag.parent)
    info = inspect_bag("a.h5")
    assert info.path == "a.h5"
    assert info == inspect_here(Path("a.h5"), None, None, weights_sha256="")


def test_what_looks_into_bags_needs_no_torch() -> None:
    execute.end_own_workers()
    code = "__import__('lrmil.store.guarded') and 'torch' in __import__('sys').modules"
    assert execute.run_bounded(eval, 60.0, code) is False
