"""Bags of other tools, as they lie in their folders, and the tables of STAMP."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.cli import group
from lrmil.errors import BagMismatchError, LabelError, StoreError
from lrmil.experiment.cohort import load_cohort
from lrmil.store import FeatureStore, find_bags, inspect_bag, pack_bags
from wsi_pipe.cli import run_group
from wsi_pipe.interop import export_job, plan_export

MakeBag = Callable[..., Path]


def values(tiles: int, seed: int = 0, dim: int = 6) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(tiles, dim)).astype(np.float16).astype(np.float32)


@pytest.fixture
def bags(make_bag: MakeBag, tmp_path: Path) -> Path:
    for i, tiles in enumerate((7, 3, 5)):
        make_bag(f"s{i}", values(tiles, i), case_id=f"c{i // 2}", encoder="uni_v1", deep=True)
    return tmp_path / "bags"


@pytest.mark.parametrize("to", ["clam", "trident", "stamp", "slide2vec"])
def test_what_is_exported_comes_back(bags: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    list(export_job(plan_export(bags, to, "20x", "uni"), out))
    store = pack_bags(out, "20x", "uni", tmp_path / "store")
    own = pack_bags(bags, "20x", "mahmood-uni", tmp_path / "own")
    assert store.slide_ids == own.slide_ids == ("s0", "s1", "s2")
    assert store.case_ids == own.case_ids
    assert store.meta == own.meta
    assert [r.slide_fingerprint for r in store.records] == [r.slide_fingerprint for r in own.records]
    # um in STAMP's files: 0.25 um to a level-0 pixel.
    unit = 0.25 if to == "stamp" else 1.0
    for i in range(3):
        mine, theirs = own.bag(i), store.bag(i)
        places, others = own.bag_coords(i) * unit, store.bag_coords(i)
        # slide2vec numbers tiles down the columns.
        order, other = (np.lexsort(p.T) for p in (places, others))
        assert np.array_equal(mine[order], theirs[other])
        np.testing.assert_allclose(places[order], others[other])
    with pytest.raises(BagMismatchError):
        inspect_bag(find_bags(out)[0], "20x", "conch")


def test_folders_are_searched_as_tools_lay_them(bags: Path, tmp_path: Path) -> None:
    # TRIDENT: two encoders and the coordinates alone below one folder; and tensors one level further down.
    root = tmp_path / "all"
    grid = root / "20x_256px_0px_overlap"
    for folder in ("features_uni_v1", "features_conch_v1", "patches", "slide_features_titan"):
        (grid / folder).mkdir(parents=True)
        (grid / folder / "a.h5").write_bytes(b"")
    deeper = root / "site" / "batch 2"
    deeper.mkdir(parents=True)
    torch.save(torch.zeros(2, 6), deeper / "b.pt")
    (deeper / "b.meta.json").write_text("{}")
    (deeper / ".hidden.h5").write_bytes(b"")
    (deeper / "again").symlink_to(root)
    with pytest.raises(StoreError, match=r"features_conch_v1, features_uni_v1; choose one with --encoder: conch, uni"):
        find_bags(root)
    for name in ("uni", "UNI", "mahmood-uni"):
        found = [path.relative_to(root).as_posix() for path in find_bags(root, name)]
        assert found == ["20x_256px_0px_overlap/features_uni_v1/a.h5", "site/batch 2/b.pt"]
    # A folder of jobs may be called by an encoder that is not the one asked for.
    job = root / "site" / "resnet50" / "job"
    (job / "bags").mkdir(parents=True)
    (job / ".wsi-pipe-job").write_text("{}")
    (job / "bags" / "c.h5").write_bytes(b"")
    assert [path.name for path in find_bags(root, "uni")] == ["a.h5", "b.pt", "c.h5"]
    with pytest.raises(StoreError, match="holds no bags of gigapath"):
        find_bags(grid, "gigapath")


def test_a_job_stands_for_its_bags(bags: Path, tmp_path: Path) -> None:
    job = tmp_path / "many" / "job"
    job.mkdir(parents=True)
    (job / ".wsi-pipe-job").write_text("{}")
    with pytest.raises(StoreError, match="holds no bags"):
        find_bags(job)
    bags.rename(job / "bags")
    for other in ("tiles", "features", "quarantine"):
        (job / other / "s0").mkdir(parents=True)
        (job / other / "s0.h5").write_bytes(b"")
    for given in (job, tmp_path / "many", job / "bags"):
        assert [path.name for path in find_bags(given)] == ["s0.h5", "s1.h5", "s2.h5"]
        assert all(path.parent == job / "bags" for path in find_bags(given))


def test_tensors_have_no_coordinates_and_that_is_said(tmp_path: Path) -> None:
    for name in ("pt_files", "h5_files"):
        (tmp_path / "clam" / name).mkdir(parents=True)
    arrays = {"a": values(4, 1), "b": values(2, 2)}
    for name, array in arrays.items():
        torch.save(torch.from_numpy(array), tmp_path / "clam/pt_files" / f"{name}.pt")
    with h5py.File(tmp_path / "clam/h5_files/a.h5", "w") as file:
        file["features"], file["coords"] = arrays["a"], np.arange(8).reshape(4, 2)
    # The one with coordinates where there are two, and none left out.
    assert [path.name for path in find_bags(tmp_path / "clam")] == ["a.h5", "b.pt"]
    store = pack_bags(tmp_path / "clam/pt_files", None, None, tmp_path / "store", "float32")
    for i, array in enumerate(arrays.values()):
        assert np.array_equal(store.bag(i), array)
        assert np.isnan(store.bag_coords(i)).all()
    assert [record.format for record in store.records] == ["pt", "pt"]
    (tmp_path / "labels.csv").write_text("slide_id,label\na,x\nb,y\n")
    assert (
        "2 bags hold no coordinates: no heat map can be drawn of them"
        in load_cohort(store, tmp_path / "labels.csv").notes()
    )
    with pytest.raises(StoreError, match="no parent index"):
        pack_bags(tmp_path / "clam/pt_files", None, None, tmp_path / "other", parent_level="5x")


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_tensor_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    torch.save(Harm(), path)
    with pytest.raises(StoreError, match="without unpickling"):
        inspect_bag(path)
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(StoreError, match="without unpickling"):
        inspect_bag(path)
    assert not (tmp_path / "harm-was-done").exists()
    torch.save({"features": torch.zeros(2, 3)}, path)
    with pytest.raises(StoreError, match="holds dict, not a tensor"):
        inspect_bag(path)
    torch.save(torch.zeros(2, 3, dtype=torch.int64), path)
    with pytest.raises(StoreError, match="not floating point"):
        inspect_bag(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(StoreError, match=r"must be \(N, D\)"):
        inspect_bag(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match=r"x\.pt"):
        inspect_bag(path)
    torch.save(torch.tensor([[1.0, float("nan")]]), path)
    with pytest.raises(StoreError, match="NaN"):
        pack_bags(path, None, None, tmp_path / "store")
    torch.save(torch.ones(1, 2, 3, dtype=torch.bfloat16), path, _use_new_zipfile_serialization=False)
    assert pack_bags(path, None, None, tmp_path / "store").bag(0).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_aliases_are_one_encoder(make_bag: MakeBag, tmp_path: Path) -> None:
    make_bag("a", values(2), encoder="uni_v1", weights="")
    make_bag("b", values(2, 1), encoder="mahmood-uni", weights="")
    store = pack_bags(tmp_path / "bags", None, None, tmp_path / "store")
    assert len(store) == 2
    for name in ("uni", "UNI", "uni_v1", "net"):
        assert inspect_bag(tmp_path / "bags/a.h5", None, name).slug == "net"
    with pytest.raises(BagMismatchError):
        inspect_bag(tmp_path / "bags/a.h5", None, "uni2")


@pytest.fixture
def store() -> FeatureStore:
    return FeatureStore.from_arrays([values(3, i) for i in range(4)], ["a", "b", "c.1", "d"])


def test_tables_of_stamp(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "clini.csv").write_text("PATIENT,AGE,KRAS\np1,50,mut\np2,60,wt\np3,70,wt\n")
    (tmp_path / "slide.csv").write_text("PATIENT,FILENAME\np1,a.h5\np1,b.h5\np2,c.1.h5\np2,e.h5\n")
    cohort = load_cohort(store, tmp_path / "clini.csv", label_column="KRAS", slide_table=tmp_path / "slide.csv")
    assert cohort.table.case_ids == ("p1", "p1", "p2", "d")
    classes = [cohort.table.classes[i] if i >= 0 else None for i in cohort.table.labels]
    assert classes == ["mut", "mut", "wt", None]
    notes = " | ".join(cohort.notes())
    for part in (
        f"1 in {tmp_path / 'slide.csv'} but without a bag: e |",
        "those of the bags: d",
        "without a label: d",
        "without a bag: p3",
    ):
        assert part in notes, notes


def test_slide_tables_that_do_not_fit(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("PATIENT,label\np1,x\np2,y\n")
    for text, message in (
        ("PATIENT,AGE\np1,5\n", "lacks a column of slides or of cases"),
        ("PATIENT,FILENAME\np1,z.h5\n", "names none of the 4 bags, such as a"),
    ):
        (tmp_path / "slide.csv").write_text(text)
        with pytest.raises(LabelError, match=message):
            load_cohort(store, tmp_path / "labels.csv", slide_table=tmp_path / "slide.csv")


def test_train_on_a_stamp_cohort(bags: Path, make_bag: MakeBag, tmp_path: Path) -> None:
    for i in range(3, 8):
        make_bag(f"s{i}", values(4, i), case_id="", encoder="uni_v1")
    out = tmp_path / "stamp"
    list(export_job(plan_export(bags, "stamp", "5x", "uni"), out))
    rows = [f"p{i},{'ab'[i % 2]}" for i in range(8)]
    (tmp_path / "clini.csv").write_text("PATIENT,MSI\n" + "\n".join(rows) + "\n")
    (tmp_path / "slide.csv").write_text("PATIENT,FILENAME\n" + "".join(f"p{i},s{i}.h5\n" for i in range(8)))
    arguments = [
        "train", "--bags", str(out), "--labels", str(tmp_path / "clini.csv"), "--label-column", "MSI",
        "--slide-table", str(tmp_path / "slide.csv"), "-r", "5x", "-e", "uni", "-o", str(tmp_path / "run"),
        "--folds", "1", "--epochs", "1", "--device", "cpu", "--replicates", "10",
    ]  # fmt: skip
    assert run_group(group, "lrmil", arguments) == 0
    table = (tmp_path / "run/splits.csv").read_text()
    assert "p0" in table
    assert "s0" not in table
