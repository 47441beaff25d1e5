"""The parts of patch distillation: child maps, turns, weights, the student, agreement, the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lrmil.distill import DistillSettings
from lrmil.distill.augment import stain_mixes, stained, turned
from lrmil.distill.children import child_map, turn
from lrmil.distill.evaluate import Agreement, RunningAgreement, linear_baseline, mean_baseline
from lrmil.distill.feed import TargetBatch
from lrmil.distill.jitter import jittered_grids
from lrmil.distill.student import Student, pool_to, relative_blocks
from lrmil.distill.targets import DistillSlide, attention_weights, target_stats, uniform_weights
from lrmil.distill.train import DistillHistory, Runner, _settle_norms, losses_of
from lrmil.errors import SettingsError
from lrmil.pictures.distill import draw_distillation
from wsi_pipe.encoders.architectures import PooledNetwork, timm_recipe
from wsi_pipe.encoders.loading import build_random
from wsi_pipe.encoders.pixels import normalise
from wsi_pipe.encoders.recipe import Preprocessing, Recipe
from wsi_pipe.errors import ConfigError
from wsi_pipe.geometry import TileGrid, TileSpec

GREY = Preprocessing(None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def grids(
    k: int = 4, *, overlap_px: int = 0, drop: float = 0.3, seed: int = 0, size_px: int = 64
) -> tuple[TileGrid, TileGrid]:
    """3 x 2 LR tiles and their HR tiles in random order, some of them absent."""
    rng = np.random.default_rng(seed)
    lr_cells = np.array([(c, r) for r in range(2) for c in range(3)], np.int32)
    every = np.array([(c, r) for r in range(2 * k) for c in range(3 * k)], np.int32)
    hr_cells = rng.permutation(every)[: int(len(every) * (1 - drop))]
    parent = np.array([(r // k) * 3 + c // k for c, r in hr_cells], np.int32)

    def grid(mpp: float, cells: NDArray[np.int32], above: NDArray[np.int32] | None) -> TileGrid:
        side = size_px * mpp / 0.5
        spec = TileSpec(mpp, size_px, overlap_px)
        tissue = np.ones(len(cells), np.float32)
        return TileGrid(spec, (mpp, mpp), (0.0, 0.0), (side, side), (side, side), cells, tissue, above)

    return grid(0.5 * k, lr_cells, None), grid(0.5, hr_cells, parent)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_child_map_agrees_with_plain_loops(k: int) -> None:
    lr, hr = grids(k, seed=k)
    found = child_map(lr, hr, "slide")
    assert found.k == k
    where = {tuple(cell): row for row, cell in enumerate(hr.cells.tolist())}
    for row, children in zip(found.rows, found.children, strict=True):
        column, line = lr.cells[row].tolist()
        wanted = [where.get((column * k + x, line * k + y), -1) for y in range(k) for x in range(k)]
        assert children.tolist() == wanted


def test_lr_tiles_without_children_are_left_out() -> None:
    lr, hr = grids(2, drop=0.0)
    keep = np.flatnonzero(hr.parent != 4)
    fewer = TileGrid(
        hr.spec, hr.mpp_effective, hr.origin_l0, hr.stride_l0, hr.tile_size_l0,
        hr.cells[keep], hr.tissue[keep], hr.parent[keep],
    )  # fmt: skip
    found = child_map(lr, fewer, "slide")
    assert found.rows.tolist() == [0, 1, 2, 3, 5]
    assert lr.take(found.rows).cells.tolist() == lr.cells[found.rows].tolist()


def test_grids_without_definite_children_are_refused() -> None:
    with pytest.raises(SettingsError, match="overlap"):
        child_map(*grids(4, overlap_px=8), "slide")
    lr, hr = grids(4)
    with pytest.raises(SettingsError, match="no parents"):
        child_map(hr, lr, "slide")


@pytest.mark.parametrize("symmetry", range(8))
def test_a_turn_moves_the_child_map_with_the_pixels(symmetry: int) -> None:
    k, side = 4, 32
    part = side // k
    # Every pixel says in which child it lies, and the children's numbers are their places before the turn.
    y, x = np.mgrid[:side, :side] // part
    tile = np.repeat((y * k + x).astype(np.uint8)[..., None], 3, axis=2)
    # Beside a tile that is turned otherwise.
    both = torch.from_numpy(np.stack([tile, tile]))
    seen_as = turned(both, torch.tensor([symmetry, 7 - symmetry]))[0].numpy()
    children = turn(np.arange(k * k), k, symmetry)
    seen = [int(seen_as[r * part + 3, c * part + 5, 0]) for r in range(k) for c in range(k)]
    assert children.tolist() == seen


def test_turns_are_the_eight_symmetries() -> None:
    maps = {tuple(turn(np.arange(9), 3, s).tolist()) for s in range(8)}
    assert len(maps) == 8


def jittered(tile: NDArray[np.uint8], drawn: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """One tile in other stains, pixel by pixel: to stain amounts, changed there, and back; before rounding."""
    from lrmil.distill.augment import RGB_FROM_HED

    density = -np.log((tile.astype(np.float64) + 1) / 256)
    amounts = np.linalg.solve(RGB_FROM_HED.T, density.reshape(-1, 3).T).T
    scale, shift = (low + (high - low) * part for (low, high), part in zip(
        ((1 - strength, 1 + strength), (-strength / 5, strength / 5)), drawn, strict=True
    ))  # fmt: skip
    back = (amounts * scale + shift) @ RGB_FROM_HED
    return np.asarray((256 * np.exp(-back) - 1).reshape(tile.shape))


@pytest.mark.parametrize("strength", [1e-7, 0.1, 0.6])
def test_a_batch_is_stained_as_its_tiles_would_be(strength: float) -> None:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    drawn = rng.random((5, 2, 3))
    found = stained(torch.from_numpy(tiles), torch.from_numpy(stain_mixes(drawn, strength)))
    assert found.dtype == torch.uint8
    assert found.shape == tiles.shape
    for got, tile, own in zip(found.numpy(), tiles, drawn, strict=True):
        wanted = np.clip(jittered(tile, own, strength), 0, 255)
        # Rounded, and a float32 off at most.
        assert np.abs(got - wanted).max() <= 0.51
    if strength == 1e-7:
        # The same arithmetic as at any strength, so that a wrong matrix would show.
        assert np.array_equal(found.numpy(), tiles)
    else:
        assert np.abs(found.numpy().astype(int) - tiles).mean() > 1


def test_numbers_are_drawn_as_tile_by_tile() -> None:
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    mixes = stain_mixes(one.random((4, 2, 3)), 0.2)
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for mix in mixes:
        scale, shift = other.uniform(0.8, 1.2, 3), other.uniform(-0.04, 0.04, 3)
        drawn = np.stack([(scale - 0.8) / 0.4, (shift + 0.04) / 0.08])
        got = stained(torch.from_numpy(tile)[None], torch.from_numpy(mix)[None])[0].numpy()
        assert np.abs(got - np.clip(jittered(tile, drawn, 0.2), 0, 255)).max() <= 0.51


def test_staining_scales_the_density_of_a_stain() -> None:
    from lrmil.distill.augment import RGB_FROM_HED

    def pixel(amount: float) -> NDArray[np.float64]:
        return np.asarray(256 * np.exp(-amount * RGB_FROM_HED[0]) - 1)

    tile = np.rint(pixel(0.8)).astype(np.uint8).reshape(1, 1, 1, 3)
    # The first stain by 1.5, the others by 1, no shift: 1 is in the middle of what is drawn.
    drawn = np.array([[[1.0, 0.5, 0.5], [0.5, 0.5, 0.5]]])
    out = stained(torch.from_numpy(tile), torch.from_numpy(stain_mixes(drawn, 0.5)))
    assert np.abs(out[0, 0, 0].numpy() - pixel(1.2)).max() <= 1.5


def test_attention_is_renormalised_over_the_children_of_each_tile() -> None:
    lr, hr = grids(2, drop=0.4, seed=3)
    children = child_map(lr, hr, "slide")
    attention = np.random.default_rng(1).dirichlet(np.full(len(hr), 0.2))
    found = attention_weights(children, attention)
    for weights, rows in zip(found, children.children, strict=True):
        there = rows[rows >= 0]
        expected = attention[there] / attention[there].sum()
        assert np.allclose(weights[rows >= 0], expected, atol=1e-6)
        assert (weights[rows < 0] == 0).all()
    nothing = attention_weights(children, np.zeros(len(hr)))
    assert np.allclose(nothing, uniform_weights(children))
    assert np.allclose(uniform_weights(children).sum(1), 1)


def test_blocks_keep_their_relative_depth() -> None:
    assert relative_blocks([0, 1, 10, 11], 12, 12) == [0, 1, 10, 11]
    assert relative_blocks([0, 1, 22, 23], 24, 12) == [0, 0, 11, 11]
    assert relative_blocks([0, 10, 11], 12, 6) == [0, 5, 5]
    assert relative_blocks([5, 11], 12, 24) == [11, 23]


def test_pooling_to_the_children_is_a_mean_over_areas() -> None:
    tokens = torch.arange(2 * 8 * 8 * 3, dtype=torch.float32).reshape(2, 8, 8, 3)
    found = pool_to(tokens, 4)
    expected = tokens.reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, 16, 3)
    assert torch.allclose(found, expected)


def network(name: str, side: int = 64) -> PooledNetwork:
    return build_random(Recipe(name, 64 if name == "test_vit" else 96, GREY, "model", {}), name, input_px=side)


def vit_student() -> Student:
    torch.manual_seed(0)
    net = network("test_vit").requires_grad_(True)
    return Student(net, blocks=[0, 4], layer_dims=[64, 64], final_dim=64, k=4, side_px=64)


def batch(student: Student, dims: tuple[int, ...]) -> TargetBatch:
    rng = torch.Generator().manual_seed(1)
    layers = [torch.randn(2, 16, d, generator=rng) for d in dims]
    weights = torch.full((2, 16), 1 / 16)
    final = torch.randn(2, 16, 64, generator=rng)
    return TargetBatch(layers, final, torch.ones(2, 16, dtype=torch.bool), weights)


@pytest.mark.parametrize("final", [0.0, 1.0])
def test_without_the_final_loss_the_last_block_and_norm_learn_nothing(final: float) -> None:
    student = vit_student()
    output = student(torch.randn(2, 3, 64, 64))
    losses_of(output, batch(student, (64, 64)), torch.ones(3), DistillSettings(final=final)).backward()  # type: ignore[no-untyped-call]
    trunk = student.network.trunk
    last = [p for module in (trunk.blocks[-1], trunk.norm, trunk.fc_norm) for p in module.parameters()]
    reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in last]
    assert any(reached) == (final > 0)
    assert bool(trunk.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0)


def test_layers_and_final_features_weigh_alike_whatever_their_units() -> None:
    student = vit_student()
    output = student(torch.randn(2, 3, 64, 64))
    # A teacher whose final features are a thousand times as large as its layers, as after a projection without a norm.
    targets = batch(student, (64, 64))
    large = targets._replace(final=targets.final * 1000)
    both = [
        losses_of(output, t, torch.tensor([1.0, 1.0, v]), DistillSettings(patch=0.0)).item()
        for t, v in ((targets, 1.0), (large, 1e6))
    ]
    # The student, which began at the scale of 1, is now as good as 0.
    assert 0.2 < both[1] / both[0] < 1.0
    assert losses_of(output, large, torch.ones(3), DistillSettings(patch=0.0)).item() > 1e5 * both[0]


def test_a_convolutional_student_uses_its_last_map_that_is_fine_enough() -> None:
    net = build_random(Recipe("test_resnet", 96, GREY, "model", {}), "test_resnet")
    student = Student(net, blocks=[], layer_dims=[10], final_dim=7, k=4, side_px=64)
    images = torch.randn(2, 3, 64, 64)
    output = student.eval()(images)
    assert output.patches[0].shape == (2, 16, 10)
    assert output.final.shape == (2, 7)
    assert torch.allclose(output.feature, net(images), atol=1e-6)
    with pytest.raises(SettingsError, match="coarser than 64 x 64"):
        Student(net, blocks=[], layer_dims=[10], final_dim=7, k=64, side_px=64)


def test_a_convolutional_student_learns_every_layer_from_one_map() -> None:
    net = build_random(Recipe("test_resnet", 96, GREY, "model", {}), "test_resnet")
    torch.manual_seed(0)
    # Its map has 192 channels: a layer of that width is projected too, or the map would have to equal it.
    student = Student(net, blocks=[], layer_dims=[192, 10, 192], final_dim=7, k=4, side_px=64).eval()
    assert [tuple(p.weight.shape) for p in student.layer_projections] == [(192, 192), (10, 192), (192, 192)]
    images = torch.randn(2, 3, 64, 64)
    output = student(images)
    assert torch.allclose(output.feature, net(images), atol=1e-6)
    maps = [m for m in net.trunk.forward_intermediates(images)[1] if m.shape[-1] >= 4]
    assert maps[-1].shape[1] == 192
    for projection, patches in zip(student.layer_projections, output.patches, strict=True):
        for row in range(4):
            for column in range(4):
                part = maps[-1].shape[-1] // 4
                area = maps[-1][:, :, row * part : (row + 1) * part, column * part : (column + 1) * part]
                expected = projection(area.mean((2, 3)))
                assert torch.allclose(patches[:, row * 4 + column], expected, atol=1e-5)


def test_equal_widths_need_no_projection() -> None:
    student = vit_student()
    assert not [name for name, _ in student.named_parameters() if "projection" in name]


def test_agreement_of_the_mean_is_nothing_and_of_the_truth_all() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(3, 2, (50, 4)).astype(np.float32)
    mean, std = wanted.mean(0), wanted.std(0)
    for predicted, expected in ((np.tile(mean, (50, 1)), 0.0), (wanted, 1.0)):
        running = RunningAgreement(mean, std)
        running.add(predicted[:20], wanted[:20])
        running.add(predicted[20:], wanted[20:])
        assert running.result().explained_variance == pytest.approx(expected, abs=1e-5)
    guess = wanted + rng.normal(0, 1, wanted.shape)
    running = RunningAgreement(mean, np.ones(4, np.float32))
    running.add(guess, wanted)
    expected = 1 - ((guess - wanted) ** 2).sum() / ((wanted - mean) ** 2).sum()
    assert running.result().explained_variance == pytest.approx(expected, rel=1e-5)
    assert np.isnan(RunningAgreement(mean, std).result().explained_variance)


def slides(count: int, *, linear: bool) -> list[DistillSlide]:
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(4, 6, 3))
    out = []
    for i in range(count):
        lr, hr = grids(2, drop=0.0, seed=i)
        children = child_map(lr, hr, "slide")
        inputs = rng.normal(size=(len(lr), 6))
        final = np.zeros((len(hr), 3), np.float32)
        for row, places in zip(inputs, children.children, strict=True):
            for place, child in enumerate(places):
                final[child] = row @ matrix[place] if linear else rng.normal(size=3)
        out.append(
            DistillSlide(
                f"s{i}", f"c{i}", "", (0.5, 0.5), lr, children, (final,), final, uniform_weights(children), inputs
            )
        )
    return out


def test_the_linear_baseline_finds_what_is_linear_and_nothing_in_noise() -> None:
    train, val = slides(20, linear=True)[:15], slides(20, linear=True)[15:]
    found = linear_baseline(train, val, target_stats(train, standardise=True))
    assert found["layer0"].explained_variance > 0.99
    assert found["final"].explained_variance > 0.99
    noise = slides(20, linear=False)
    found = linear_baseline(noise[:15], noise[15:], target_stats(noise[:15], standardise=True))
    assert found["layer0"].explained_variance < 0.2
    assert linear_baseline([], [], target_stats(train, standardise=False)) == {}


@pytest.mark.parametrize("standardise", [True, False])
def test_what_a_constant_explains_is_nothing_wherever_the_features_lie(standardise: bool) -> None:
    # A ViT's features lie far from 0: measured from there, their mean alone would explain nearly all.
    far = [
        dataclasses.replace(slide, layers=(slide.final + 20,), final=slide.final + 20)
        for slide in slides(20, linear=False)
    ]
    stats = target_stats(far[:15], standardise=standardise)
    for name, agreement in mean_baseline(far[15:], stats).items():
        assert -0.2 < agreement.explained_variance <= 0.01, name
    noise = linear_baseline(far[:15], far[15:], stats)
    assert max(agreement.explained_variance for agreement in noise.values()) < 0.2
    assert max(abs(agreement.cosine) for agreement in noise.values()) < 0.6


def test_the_centre_of_the_final_features_weighs_children_as_the_loss_does() -> None:
    train = slides(3, linear=True)
    rng = np.random.default_rng(0)
    weights = [rng.dirichlet(np.ones(4), len(slide)).astype(np.float32) for slide in train]
    train = [dataclasses.replace(slide, weights=w) for slide, w in zip(train, weights, strict=True)]
    wanted = [
        sum(w[i, j] * slide.final[slide.children.children[i, j]] for j in range(4))
        for slide, w in zip(train, weights, strict=True)
        for i in range(len(slide))
    ]
    assert np.allclose(target_stats(train, standardise=True).final_centre, np.mean(wanted, axis=0), atol=1e-5)


def test_target_statistics_count_children_alone() -> None:
    train = slides(3, linear=True)
    data = np.concatenate([s.final[s.children.children.ravel()] for s in train])
    stats = target_stats(train, standardise=False)
    assert stats.variance[0] == pytest.approx(data.var(0).mean(), rel=1e-4)
    assert (stats.final_std == 1).all()
    stats = target_stats(train, standardise=True)
    assert np.allclose(stats.layer_mean[0], data.mean(0), atol=1e-5)
    assert np.allclose(stats.final_std, data.std(0), rtol=1e-4)
    with pytest.raises(SettingsError, match="no training slide"):
        target_stats([], standardise=True)


@pytest.mark.parametrize(
    "wrong", [{"patch": 0.0, "final": 0.0}, {"epochs": 0}, {"lr": 0.0}, {"val_fraction": 1.0}, {"precision": "half"}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DistillSettings(**wrong)  # type: ignore[arg-type]


def test_the_picture_shows_figures_and_baselines(tmp_path: Path) -> None:
    epochs = [
        {"loss": 2.0 / n, "val_loss": 2.5 / n, "layer0_explained_variance": 0.1 * n, "layer0_cosine": 0.1 * n}
        for n in range(1, 5)
    ]
    path = tmp_path / "course.svg"
    draw_distillation(path, DistillHistory(epochs, 3, True), {"layer0": Agreement(0.25, 0.3)})
    assert path.stat().st_size > 1000
    draw_distillation(path, DistillHistory(), {})


@pytest.mark.parametrize("seed", range(6))
def test_jittered_grids_stay_aligned_and_on_the_slide(seed: int) -> None:
    lr, hr = grids(4, seed=seed)
    # 3 x 2 LR tiles of 256 level-0 pixels, the slide a little larger.
    size = (3 * 256 + 40, 2 * 256 + 200)
    low, high = jittered_grids(lr, hr, size, np.random.default_rng(seed))
    assert low.origin_l0 == high.origin_l0
    assert all(v % 4 == 0 and abs(v) <= 128 for v in low.origin_l0)
    for grid in (low, high):
        assert (grid.corners_l0 >= 0).all()
        assert (grid.corners_l0 + grid.tile_size_l0 <= size).all()
    # A tile is left out only where its LR tile leaves the slide.
    moved = np.asarray(low.origin_l0) + lr.cells * 256
    fits = (moved >= 0).all(1) & (moved + 256 <= size).all(1)
    assert low.cells.tolist() == lr.cells[fits].tolist()
    assert hr.parent is not None
    assert high.cells.tolist() == hr.cells[fits[hr.parent]].tolist()
    if len(high):
        child_map(low, high, "slide")
        assert high.parent is not None
        inside = high.corners_l0 - low.corners_l0[high.parent]
        assert ((inside >= 0) & (inside <= 192)).all()


def test_jittered_grids_differ_from_draw_to_draw() -> None:
    lr, hr = grids(4)
    rng = np.random.default_rng(0)
    origins = {jittered_grids(lr, hr, (4096, 4096), rng)[0].origin_l0 for _ in range(20)}
    assert len(origins) > 15


def test_batch_norms_are_those_of_the_network_as_it_is() -> None:
    recipe, _ = timm_recipe("test_resnet")
    torch.manual_seed(0)
    student = Student(build_random(recipe, "student"), blocks=[], layer_dims=[5], final_dim=5, k=2, side_px=64)
    norms = [m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.running_mean.fill_(7.0)
    rng = np.random.default_rng(0)
    batches = [torch.from_numpy(rng.integers(0, 255, (8, 64, 64, 3), np.uint8)) for _ in range(3)]
    seen: list[torch.Tensor] = []
    handle = norms[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    student.train()
    _settle_norms(Runner(student, GREY, torch.device("cpu"), torch.float32), batches)
    handle.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert len(seen) == 3
    assert torch.allclose(norms[0].running_mean, means.mean(0), atol=1e-5)
    assert [norm.momentum for norm in norms] == momenta
    # In evaluation it now gives nearly what it gave in training.
    with torch.no_grad():
        images = normalise(batches[0], GREY)
        trained = student(images).feature
        student.eval()
        assert (student(images).feature - trained).abs().mean() < 0.25 * trained.std()
