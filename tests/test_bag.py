"""The bag's schema, read back with plain h5py, and what ``check_bag`` finds."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsi_pipe.bag import (
    Bag,
    BagAttrs,
    BagLevel,
    Features,
    check_bag,
    check_feature_file,
    read_attrs,
    read_bag,
    read_feature_file,
    read_feature_header,
    read_grids,
    read_level,
    write_attention,
    write_bag,
    write_feature_file,
)
from wsi_pipe.errors import BagError, OutputError
from wsi_pipe.geometry import TileGrid, TileSpec

MPP = 0.25


def make_features(rows: int, dim: int = 5, dtype: str = "float16", seed: int = 0) -> Features:
    values = np.random.default_rng(seed).normal(size=(rows, dim)).astype(dtype)
    return Features("timm:some/net", values, "ab" * 32, "MIT", "float32", '{"mean": [0.5]}', f"fp{seed}", {"3": values})


def make_bag(cells_lr: list[tuple[int, int]], children: int = 4, status: str = "done") -> Bag:
    """An LR grid at 2 um/px with the first ``children`` of the 16 HR tiles of each cell."""
    lr = TileGrid(
        TileSpec(2.0), (2.0, 2.0), (0.0, 0.0), (2048.0, 2048.0), (2048.0, 2048.0),
        np.asarray(cells_lr, np.int32).reshape(-1, 2), np.full(len(cells_lr), 0.5, np.float32),
    )  # fmt: skip
    hr_cells = [(4 * c + k % 4, 4 * r + k // 4) for c, r in cells_lr for k in range(children)]
    hr = TileGrid(
        TileSpec(0.5), (0.5, 0.5), (0.0, 0.0), (512.0, 512.0), (512.0, 512.0),
        np.asarray(hr_cells, np.int32).reshape(-1, 2), np.ones(len(hr_cells), np.float32),
        parent=np.repeat(np.arange(len(cells_lr), dtype=np.int32), children),
    )  # fmt: skip
    attrs = BagAttrs(
        "S 1", "case", "/slides/s.svs", "f" * 64, 100_000, 80_000, (MPP, MPP), "user", "aperio", "tiff", "", "0.1.0",
        "2026-01-01T00:00:00Z", status, "" if status == "done" else "blank", "seg", "tile", "5x", "net",
    )  # fmt: skip
    return Bag(
        attrs,
        (
            BagLevel(lr, {"net": make_features(len(lr))}),
            BagLevel(hr, {"net": make_features(len(hr), seed=1)}),
        ),
    )


@pytest.fixture
def bag_path(tmp_path: Path) -> Path:
    path = tmp_path / "bags" / "S 1.h5"
    write_bag(path, make_bag([(0, 0), (3, 2), (5, 7)]))
    return path


def test_schema_read_back_with_plain_h5py(bag_path: Path) -> None:
    with h5py.File(bag_path) as file:
        assert file.attrs["schema"] == "wsi-pipe-bag"
        assert file.attrs["schema_version"] == 1
        assert file.attrs["slide_id"] == "S 1"
        assert file.attrs["mpp_l0"].tolist() == [MPP, MPP]
        assert set(file) == {"levels", "coords", "features"}
        assert set(file["levels"]) == {"5x", "20x"}
        low, high = file["levels/5x"], file["levels/20x"]
        assert low["cells"].dtype == np.int32
        assert low["cells"][:].tolist() == [[0, 0], [3, 2], [5, 7]]
        assert low["cells"].attrs["stride_l0"].tolist() == [2048, 2048]
        assert low["coords"].dtype == np.int64
        assert low["coords"][:].tolist() == [[0, 0], [6144, 4096], [10240, 14336]]
        assert dict(low["coords"].attrs) == {
            "patch_size": 256, "patch_size_level0": 2048, "level0_magnification": 40, "target_magnification": 5,
            "overlap": 0, "name": "S 1", "level0_width": 100_000, "level0_height": 80_000,
        }  # fmt: skip
        assert "parent" not in low
        assert high["parent"][:].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert high["features/net"].dtype == np.float16
        assert high["features/net"].attrs["encoder"] == "timm:some/net"
        assert high["layers/net/3"].shape == (12, 5)
        for name, target in (("coords", "/levels/5x/coords"), ("features", "/levels/5x/features/net")):
            link = file.get(name, getlink=True)
            assert isinstance(link, h5py.SoftLink)
            assert link.path == target
            assert np.array_equal(file[name][:], file[target][:])


def test_large_features_are_chunked_by_about_a_mebibyte(tmp_path: Path) -> None:
    bag = make_bag([(c % 48, c // 48) for c in range(1800)], children=1)
    wide = replace(bag.levels[0], features={"net": make_features(1800, 1024)})
    write_bag(tmp_path / "b.h5", replace(bag, levels=(wide, bag.levels[1])))
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["levels/5x/features/net"].chunks == (512, 1024)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(st.integers(0, 48), st.integers(0, 38)), unique=True, max_size=20),
    children=st.integers(1, 16),
)
def test_round_trip(tmp_path: Path, cells: list[tuple[int, int]], children: int) -> None:
    bag = make_bag(cells, children, status="done" if cells else "empty")
    path = tmp_path / "round.h5"
    write_bag(path, bag)
    back = read_bag(path)
    assert back.attrs == bag.attrs == read_attrs(path)
    for found, wanted in zip(back.levels, bag.levels, strict=True):
        for name in ("cells", "tissue", "parent", "coords"):
            np.testing.assert_array_equal(getattr(found.grid, name), getattr(wanted.grid, name))
        assert (
            replace(found.grid, cells=wanted.grid.cells, tissue=wanted.grid.tissue, parent=None).spec
            == wanted.grid.spec
        )
        assert found.grid.stride_l0 == wanted.grid.stride_l0
        np.testing.assert_array_equal(found.features["net"].values, wanted.features["net"].values)
        np.testing.assert_array_equal(found.features["net"].layers["3"], wanted.features["net"].layers["3"])
    assert [grid.label for grid in read_grids(path)] == ["5x", "20x"]


def test_read_level_names_what_there_is(bag_path: Path) -> None:
    view = read_level(bag_path, "20x", "timm:some/net")
    assert view.features.shape == (12, 5)
    assert view.parent_label == "5x"
    assert read_level(bag_path, "5x").parent_label is None
    with pytest.raises(BagError, match=r"no level 10x; its levels are 5x, 20x"):
        read_level(bag_path, "10x")
    with pytest.raises(BagError, match=r"no features of other at 5x; choose an encoder it has: timm:some/net"):
        read_level(bag_path, "5x", "other")


def _set(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][...] = value

    return change


def _drop(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


def _attr(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def _nan(file: h5py.File) -> None:
    file["levels/20x/features/net"][7, 2] = np.nan


def _foreign_attention(file: h5py.File) -> None:
    file["levels/5x"].create_group("attention")["m"] = np.ones(3, np.float32)


def _lost_attr(file: h5py.File) -> None:
    del file.attrs["vendor"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_set("levels/20x/parent", 1), "8 tiles lie outside their parent in 5x"),
        (_set("levels/20x/parent", -1), "12 tiles lie outside their parent"),
        (_set("levels/5x/coords", 9), "coords do not follow"),
        (_set("levels/5x/tissue", 1.5), "tissue fractions leave"),
        (_nan, "hold NaN or infinity in 1 rows"),
        (_drop("coords"), "/coords does not lead"),
        (_drop("levels/5x/features/net"), "/features does not lead"),
        (_drop("levels/20x/parent"), "lacks parent"),
        (_attr("schema", "other"), "is not a wsi-pipe-bag file"),
        (_attr("schema_version", 99), "schema version 99"),
        (_attr("status", "empty"), "status is empty but there are 15 tiles"),
        (_attr("primary_level", "1x"), "primary level '1x'"),
        (_foreign_attention, "sums to 3, not 1"),
        (_lost_attr, "lacks the attribute vendor"),
    ],
)
def test_check_finds(bag_path: Path, damage: Callable[[h5py.File], None], problem: str) -> None:
    assert check_bag(bag_path) == []
    with h5py.File(bag_path, "r+") as file:
        damage(file)
    assert any(problem in found for found in check_bag(bag_path)), check_bag(bag_path)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.999])
def test_truncated_files_are_found(bag_path: Path, part: float) -> None:
    data = bag_path.read_bytes()
    bag_path.write_bytes(data[: int(len(data) * part)])
    assert check_bag(bag_path)
    with pytest.raises(BagError, match="not a readable HDF5 file"):
        read_bag(bag_path)


def flip_a_bit(path: Path, name: str) -> None:
    """One bit of one stored value, the lowest of its mantissa, as a disk would."""
    with h5py.File(path) as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["features/net", "layers/net/3"])
def test_one_flipped_bit_of_the_features_is_found(bag_path: Path, name: str) -> None:
    flip_a_bit(bag_path, f"levels/20x/{name}")
    (problem,) = check_bag(bag_path)
    assert "20x" in problem
    assert "not what was written" in problem
    with pytest.raises(BagError, match=r"is damaged .*not what was written"):
        read_bag(bag_path)


def test_features_without_a_digest_are_valid(bag_path: Path) -> None:
    with h5py.File(bag_path, "r+") as file:
        data = file["levels/20x/features/net"]
        wanted = hashlib.sha256(data[()].tobytes()).hexdigest()
        assert data.attrs["sha256"] == wanted
        del data.attrs["sha256"]
    flip_a_bit(bag_path, "levels/20x/features/net")
    assert check_bag(bag_path) == []


def test_a_bag_that_does_not_hold_together_is_not_written(tmp_path: Path) -> None:
    bag = make_bag([(0, 0), (1, 1)])
    wrong = replace(bag.levels[1].grid, parent=np.zeros(8, np.int32))
    with pytest.raises(BagError, match="4 tiles lie outside"):
        write_bag(tmp_path / "x.h5", replace(bag, levels=(bag.levels[0], replace(bag.levels[1], grid=wrong))))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(bag_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bag_path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wsi_pipe.bag.write._write_level", full)
    with pytest.raises(OutputError, match=r"No space left.*free some space"):
        write_bag(bag_path, make_bag([(1, 1)]))
    assert bag_path.read_bytes() == before
    assert [p.name for p in bag_path.parent.iterdir()] == ["S 1.h5"]


def test_a_disk_that_fills_up_is_an_error_and_no_crash(bag_path: Path) -> None:
    code = (
        "import resource, sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from wsi_pipe.bag import read_bag, write_attention, write_bag\nfrom wsi_pipe.errors import OutputError\n"
        "import numpy as np\npath = Path(sys.argv[1])\nbag = read_bag(path)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "for write in (lambda: write_bag(path, bag), lambda: write_attention(path, '5x', 'm', np.ones(3) / 3)):\n"
        "    try:\n        write()\n    except OutputError as error:\n        print(error)\n"
    )
    before = bag_path.read_bytes()
    done = subprocess.run([sys.executable, "-c", code, str(bag_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("cannot write") == 2
    assert bag_path.read_bytes() == before
    assert [p.name for p in bag_path.parent.iterdir()] == [bag_path.name]


@pytest.mark.parametrize("value", [0.25, "many", [0.25]], ids=["scalar", "text", "one"])
def test_an_attribute_that_makes_no_sense_is_damage(bag_path: Path, value: object) -> None:
    """Readers raise BagError whatever a file holds: another error would end a whole run in place of one slide."""
    with h5py.File(bag_path, "r+") as file:
        file.attrs["mpp_l0"] = value
    assert "is damaged" in check_bag(bag_path)[0]
    for read in (read_attrs, read_bag):
        with pytest.raises(BagError, match="is damaged"):
            read(bag_path)


def test_attention_is_added_and_replaced(bag_path: Path) -> None:
    for values in ([0.2, 0.3, 0.5], [1.0, 0.0, 0.0]):
        write_attention(bag_path, "5x", "model-a", np.asarray(values, np.float32))
        assert check_bag(bag_path) == []
        with h5py.File(bag_path) as file:
            np.testing.assert_allclose(file["levels/5x/attention/model-a"][:], values)
    with pytest.raises(BagError, match="does not fit 3 tiles"):
        write_attention(bag_path, "5x", "model-a", np.ones(2, np.float32) / 2)
    with pytest.raises(BagError, match="has no level 40x"):
        write_attention(bag_path, "40x", "model-a", np.ones(2, np.float32) / 2)


def test_feature_file_round_trip(tmp_path: Path) -> None:
    path, features = tmp_path / "f.h5", make_features(7, dtype="float32")
    write_feature_file(path, "S 1", "5x", "net", features)
    header = read_feature_header(path)
    assert (header.slide_id, header.level, header.slug, header.shape) == ("S 1", "5x", "net", (7, 5))
    assert header.fingerprint == features.fingerprint
    back = read_feature_file(path)
    np.testing.assert_array_equal(back.values, features.values)
    np.testing.assert_array_equal(back.layers["3"], features.layers["3"])
    assert check_feature_file(path) == []
    bad = replace(features, values=np.full((2, 2), np.inf, np.float32), layers={})
    with pytest.raises(BagError, match="NaN or infinity in 2 rows"):
        write_feature_file(path, "S 1", "5x", "net", bad)
    assert read_feature_header(path).shape == (7, 5)
