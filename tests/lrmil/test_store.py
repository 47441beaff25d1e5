"""The packed store against the arrays that went in, for every bag format and stored type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lrmil.errors import BagMismatchError, StoreError
from lrmil.store import FeatureStore, ResidentStore, find_bags, inspect_bag, pack_bags
from lrmil.store.dtypes import decode_bfloat16, encode_bfloat16

MakeBag = Callable[..., Path]
Array = NDArray[np.float32]


def random_bags(sizes: list[int], dim: int = 6, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, dim)).astype(np.float32) for n in sizes]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_packed_bags_come_back_in_the_stored_type(make_bag: MakeBag, tmp_path: Path, dtype: str) -> None:
    arrays = random_bags([4, 1, 7])
    paths = [make_bag(f"s{i}", a, case_id=f"c{i // 2}") for i, a in enumerate(arrays)]
    store = pack_bags(paths, "5x", "timm:some/net", tmp_path / "store", dtype)  # type: ignore[arg-type]
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    for i, array in enumerate(arrays):
        expected = torch.from_numpy(array).to(kind).float().numpy()
        assert np.array_equal(store.bag(i).astype(np.float32), expected)
    assert store.slide_ids == ("s0", "s1", "s2")
    assert store.case_ids == ("c0", "c0", "c1")
    assert store.lengths.tolist() == [4, 1, 7]
    assert (store.dim, len(store)) == (6, 3)
    assert (store.meta.encoder, store.meta.level, store.meta.mpp) == ("timm:some/net", "5x", 2.0)
    assert store.meta.weights_sha256 == "ab" * 32
    # 256 px at 2 um/px on a slide of 0.25 um/px are 2048 level-0 pixels; row 3 is cell (3, 0).
    assert store.bag_coords(0)[3].tolist() == [3 * 2048, 0]
    assert store.records[0].tile_size_l0 == (2048.0, 2048.0)
    store.verify()


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_rounds_as_torch_does(values: Array) -> None:
    expected = torch.from_numpy(values).bfloat16()
    encoded = encode_bfloat16(values)
    assert np.array_equal(encoded.view(np.int16), expected.view(torch.int16).numpy())
    assert np.array_equal(decode_bfloat16(encoded), expected.float().numpy())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_store_round_trip(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dtype: str) -> None:
    folder = tmp_path_factory.mktemp("bags")
    arrays = random_bags(sizes, dim=3)
    for i, array in enumerate(arrays):
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"], file["coords"] = array, np.arange(2 * len(array)).reshape(-1, 2)
    packed = pack_bags(folder, None, None, folder / "store", dtype)  # type: ignore[arg-type]
    memory = FeatureStore.from_arrays(arrays, [f"s{i}" for i in range(len(arrays))], dtype=dtype)  # type: ignore[arg-type]
    again = FeatureStore.open(folder / "store")
    for store in (packed, again):
        assert store.content_hash == memory.content_hash
        assert np.array_equal(np.asarray(store.flat), memory.flat)
        assert store.offsets.tolist() == memory.offsets.tolist()
        store.verify()


def test_parents_are_composed_through_the_levels_between(make_bag: MakeBag, tmp_path: Path) -> None:
    features = random_bags([7])[0]
    features[:, 0] = np.arange(7)
    path = make_bag("s", features, deep=True)
    for level, plus in (("10x", 100), ("20x", 200)):
        store = pack_bags([path], level, None, tmp_path / level, "float32", parent_level="5x")
        assert store.parents is not None
        # Each child's features are its LR ancestor's plus a constant, so the ancestor can be read off.
        assert np.array_equal(store.bag(0)[:, 0] - plus, features[store.parents, 0])
        reopened = FeatureStore.open(tmp_path / level)
        assert reopened.parents is not None
        assert np.array_equal(reopened.parents, store.parents)
    with pytest.raises(StoreError, match="not coarser"):
        pack_bags([path], "5x", None, tmp_path / "x", parent_level="20x")


def test_other_parents_are_packed_again(make_bag: MakeBag, tmp_path: Path) -> None:
    path = make_bag("s", random_bags([7])[0], deep=True)
    before = pack_bags([path], "10x", None, tmp_path / "store", parent_level="5x").parents
    assert before is not None
    before = np.array(before)
    with h5py.File(path, "r+") as file:
        file["levels/10x/parent"][...] = 6 - file["levels/10x/parent"][...]
    after = pack_bags([path], "10x", None, tmp_path / "store", parent_level="5x").parents
    assert after is not None
    assert np.array_equal(after, 6 - before)


def test_trident_bags(tmp_path: Path) -> None:
    array = random_bags([5])[0]
    for name, shape in (("flat", (5, 6)), ("batched", (1, 5, 6))):
        folder = tmp_path / name
        folder.mkdir()
        with h5py.File(folder / "slide.h5", "w") as file:
            file["features"] = array.reshape(shape)
            file["coords"] = np.arange(10).reshape((*shape[:-1], 2))
            file["coords"].attrs.update(patch_size=256, patch_size_level0=512, target_magnification=20)
        info = inspect_bag(folder / "slide.h5", "20x", "uni_v1")
        assert (info.format, info.encoder, info.mpp, info.tile_px) == ("trident", "uni_v1", 0.5, 256)
        assert info.tile_size_l0 == (512.0, 512.0)
        store = pack_bags(folder, "20x", "uni_v1", tmp_path / f"store-{name}", "float32")
        assert np.array_equal(store.bag(0), array)
        assert store.bag_coords(0)[4].tolist() == [8, 9]
        with pytest.raises(BagMismatchError, match=r"slide\.h5 holds features at 20x \(0\.5 um/px\), not at 5x"):
            inspect_bag(folder / "slide.h5", "5x")


def test_clam_bags_take_the_users_word_for_what_they_do_not_state(tmp_path: Path) -> None:
    array = random_bags([3])[0]
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"], file["coords"] = array, np.zeros((3, 2), np.int32)
    info = inspect_bag(tmp_path / "slide.h5", "20x", "resnet50")
    assert (info.format, info.level, info.encoder, info.mpp) == ("clam", "20x", "resnet50", None)


def test_stamp_bags(tmp_path: Path) -> None:
    array = random_bags([3])[0].astype(np.float16)
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["feats"], file["coords"] = array, np.array([[0, 0], [256, 0], [512, 0]], np.float32)
        file.attrs.update(extractor="mahmood-uni", unit="um", tile_size_um=256.0, tile_size_px=224)
    info = inspect_bag(tmp_path / "slide.h5")
    assert (info.format, info.encoder, info.level, info.coords_unit) == ("stamp", "mahmood-uni", "8.75x", "um")
    assert info.mpp == pytest.approx(256 / 224)
    store = pack_bags(tmp_path, None, "mahmood-uni", tmp_path / "store")
    assert np.array_equal(store.bag(0), array)
    with pytest.raises(BagMismatchError, match="mahmood-uni, not of conch"):
        inspect_bag(tmp_path / "slide.h5", encoder="conch")


@pytest.mark.parametrize(
    ("change", "what"),
    [({"weights": "cd" * 32}, "weights cdcd"), ({"encoder": "other", "weights": ""}, "encoder other")],
)
def test_bags_of_other_encoders_or_weights_are_refused_by_name(
    make_bag: MakeBag, tmp_path: Path, change: dict[str, str], what: str
) -> None:
    first, second = random_bags([3, 3])
    paths = [make_bag("a", first), make_bag("b", second, **change)]
    with pytest.raises(BagMismatchError, match=f"b.h5: {what}"):
        pack_bags(paths, "5x", "net", tmp_path / "store")


def test_one_set_of_weights_may_go_by_two_names(make_bag: MakeBag, tmp_path: Path) -> None:
    first, second = random_bags([3, 3])
    paths = [
        make_bag("a", first, encoder="/here/lr.safetensors"),
        make_bag("b", second, encoder="/there/lr.safetensors"),
    ]
    assert len(pack_bags(paths, "5x", "net", tmp_path / "store")) == 2
    info = inspect_bag(paths[0], "5x", "/elsewhere/lr.safetensors", weights_sha256="ab" * 32)
    assert info.encoder == "/here/lr.safetensors"


def test_missing_level_or_encoder_lists_what_there_is(make_bag: MakeBag) -> None:
    path = make_bag("a", random_bags([3])[0], deep=True)
    with pytest.raises(StoreError, match="has no level '40x'; it has 10x, 20x, 5x"):
        inspect_bag(path, "40x")
    with pytest.raises(StoreError, match="has no encoder at 5x 'uni'; it has net"):
        inspect_bag(path, "5x", "uni")
    assert inspect_bag(path).level == "5x"


def test_what_is_no_bag_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.h5").write_bytes(b"not HDF5")
    with pytest.raises(StoreError, match=r"broken\.h5 is not a readable HDF5 file"):
        inspect_bag(tmp_path / "broken.h5")
    with h5py.File(tmp_path / "coords.h5", "w") as file:
        file["coords"] = np.zeros((3, 2))
    with pytest.raises(StoreError, match=r"coords\.h5 is no feature bag"):
        inspect_bag(tmp_path / "coords.h5")
    (tmp_path / "none").mkdir()
    with pytest.raises(StoreError, match="holds no bags"):
        find_bags(tmp_path / "none")


def test_a_damaged_bag_is_refused_by_name(make_bag: MakeBag, tmp_path: Path) -> None:
    array = random_bags([100], dim=256)[0]
    whole = make_bag("whole", array).read_bytes()
    for cut in (len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.h5").write_bytes(whole[:cut])
        with pytest.raises(StoreError, match=r"cut\.h5 is (not a readable|damaged)"):
            pack_bags([tmp_path / "cut.h5"], "5x", None, tmp_path / "store")
    for gone in ("cells", "coords", "features"):
        path = make_bag(f"without-{gone}", array)
        with h5py.File(path, "r+") as file:
            del file[f"levels/5x/{gone}"]
        if gone == "coords":  # a store can do without: they are NaN
            assert np.isnan(pack_bags([path], "5x", None, tmp_path / "store").coords).all()
            continue
        with pytest.raises(StoreError, match=rf"without-{gone}\.h5 (is damaged|has 0 encoder)"):
            pack_bags([path], "5x", None, tmp_path / "store")
    path = make_bag("flipped", array)
    with h5py.File(path, "r+") as file:
        (data,) = file["levels/5x/features"].values()
        data.attrs["sha256"] = "0" * 64
    with pytest.raises(StoreError, match=r"flipped\.h5: features are not what was written"):
        pack_bags([path], "5x", None, tmp_path / "store")
    path = make_bag("other-type", array)
    with h5py.File(path, "r+") as file:
        file["levels/5x/cells"].attrs["mpp"] = "fine"
    with pytest.raises(StoreError, match=r"other-type\.h5 is damaged"):
        inspect_bag(path)


def test_nan_and_overflow_are_refused_by_name(tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf), ("big", 1e5)):
        folder = tmp_path / name
        folder.mkdir()
        array = np.zeros((4, 3), np.float32)
        array[2, 1] = value
        with h5py.File(folder / "slide.h5", "w") as file:
            file["features"] = array
        what = "a feature of 100000 is beyond float16" if name == "big" else "1 of 4 rows hold NaN or infinity"
        with pytest.raises(StoreError, match=f"slide.h5: {what}"):
            pack_bags(folder, None, None, folder / "store")
        assert not (folder / "store").exists()
        assert {p.name for p in folder.iterdir()} == {"slide.h5", ".store.lock"}
    store = pack_bags(tmp_path / "big", None, None, tmp_path / "big" / "store", "bfloat16")
    assert store.bag(0)[2, 1] == pytest.approx(1e5, rel=2**-8)


def test_pack_reuses_the_same_bags_only(make_bag: MakeBag, tmp_path: Path) -> None:
    arrays = random_bags([3, 2])
    paths = [make_bag("a", arrays[0]), make_bag("b", arrays[1])]
    out = tmp_path / "store"
    pack_bags(paths, "5x", None, out)
    made = (out / "features.bin").stat().st_ino
    pack_bags(paths, "5x", None, out)
    assert (out / "features.bin").stat().st_ino == made
    make_bag("b", arrays[1] + 1, fingerprint="another")
    again = pack_bags(paths, "5x", None, out)
    assert np.array_equal(again.bag(1), (arrays[1] + 1).astype(np.float16))
    assert pack_bags(paths, "5x", None, out, "bfloat16").dtype == "bfloat16"
    assert len(pack_bags(paths[:1], "5x", None, out)) == 1


def test_pack_never_replaces_a_folder_of_other_files(make_bag: MakeBag, tmp_path: Path) -> None:
    path = make_bag("a", random_bags([3])[0])
    with pytest.raises(StoreError, match="other files in it"):
        pack_bags([path], "5x", None, path.parent)
    assert path.is_file()


def test_two_bags_of_one_slide_are_refused(make_bag: MakeBag, tmp_path: Path) -> None:
    array = random_bags([3])[0]
    paths = [make_bag("a", array), make_bag("a", array, folder="more")]
    with pytest.raises(StoreError, match=r"slide id 'a' is in .*bags/a\.h5 and .*more/a\.h5"):
        pack_bags(paths, "5x", None, tmp_path / "store")


def test_empty_bags_stay_with_their_reason(make_bag: MakeBag, tmp_path: Path) -> None:
    paths = [make_bag("blank", np.zeros((0, 6), np.float32)), make_bag("full", random_bags([3])[0])]
    store = pack_bags(paths, "5x", None, tmp_path / "store")
    assert store.lengths.tolist() == [0, 3]
    assert store.records[0].empty_reason == "no tissue found"
    assert store.records[1].empty_reason is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "gone"])
def test_damage_is_found(make_bag: MakeBag, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "store"
    pack_bags([make_bag("a", random_bags([5])[0])], "5x", None, out)
    data = out / "features.bin"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-2])
    elif damage == "flip":
        raw = bytearray(data.read_bytes())
        raw[7] ^= 1
        data.write_bytes(raw)
    elif damage == "header":
        head = json.loads((out / "store.json").read_text())
        del head["dtype"]
        (out / "store.json").write_text(json.dumps(head))
    else:
        data.unlink()
    with pytest.raises(StoreError, match="store"):
        FeatureStore.open(out).verify()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("place", ["device", "mapped"])
def test_resident_rows_equal_the_bags(dtype: str, place: str) -> None:
    arrays = random_bags([3, 0, 5, 1, 4])
    store = FeatureStore.from_arrays(
        arrays,
        dtype=dtype,  # type: ignore[arg-type]
        parents=[np.arange(len(a)) for a in arrays],
    )
    resident = ResidentStore.of(store, "cpu", place=place)
    assert resident.placement == place
    for chosen in ([0, 2, 3], [4, 1, 0], [2], [3, 2, 4, 0], []):
        got = resident.gather(chosen)
        expected = np.concatenate([store.bag(i) for i in chosen] or [np.zeros((0, 6))]).astype(np.float32)
        assert np.array_equal(got.features.float().numpy(), expected)
        lengths = [len(arrays[i]) for i in chosen]
        assert got.offsets.tolist() == np.cumsum([0, *lengths]).tolist()
        assert got.segment.tolist() == np.repeat(np.arange(len(chosen)), lengths).tolist()
        assert got.parent is not None
        assert got.parent.tolist() == [row for n in lengths for row in range(n)]
    assert ResidentStore.of(store, "cpu", torch.float32, place=place).gather([0]).features.dtype == torch.float32


def test_one_bag_and_neighbours_are_not_copied() -> None:
    resident = ResidentStore.of(FeatureStore.from_arrays(random_bags([3, 4, 5])), "cpu")
    base = resident.flat.data_ptr()
    step = resident.dim * resident.flat.element_size()
    assert resident.gather([1]).features.data_ptr() == base + 3 * step
    assert resident.gather([1, 2]).features.data_ptr() == base + 3 * step


def test_arrays_that_are_not_finite_or_differ_are_refused() -> None:
    with pytest.raises(StoreError, match="bag b holds NaN"):
        FeatureStore.from_arrays([np.zeros((1, 2)), np.array([[np.nan, 0]])], ["a", "b"], dtype="bfloat16")
    with pytest.raises(StoreError, match="one D"):
        FeatureStore.from_arrays([np.zeros((1, 2)), np.zeros((1, 3))])


def test_pinned_memory_needs_a_gpu() -> None:
    with pytest.raises(StoreError, match="CUDA"):
        ResidentStore.of(FeatureStore.from_arrays(random_bags([3])), "cpu", place="pinned")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("place", ["device", "pinned", "mapped"])
def test_rows_on_a_gpu_equal_the_bags(place: str) -> None:
    arrays = random_bags([3, 5, 1, 4])
    store = FeatureStore.from_arrays(arrays, dtype="bfloat16")
    got = ResidentStore.of(store, "cuda", place=place).gather([3, 0, 1])
    expected = np.concatenate([store.bag(i) for i in (3, 0, 1)])
    assert np.array_equal(got.features.float().cpu().numpy(), expected)
