"""The losses against their formulas in numpy, and the mistakes of the published code, each by name."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrmil.config import LossSettings, ModelSettings
from lrmil.data import BagBatch
from lrmil.errors import SettingsError
from lrmil.losses import (
    attention_distillation,
    bag_distillation,
    cross_entropy,
    final_distillation_loss,
    instance_distillation,
    patch_distillation_loss,
    teacher_mass,
)
from lrmil.model import MILModel, build_model
from lrmil.model.segments import segment_ids
from lrmil.trainer.steps import plain_step, student_step
from lrmil.trainer.targets import TeacherTargets

LENGTHS = [6, 1, 9, 4]
OFFSETS = torch.tensor([0, 6, 7, 16, 20])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max())
    return np.asarray(e / e.sum())


def slices(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


# Cross-entropy and the bag's distillation


def test_cross_entropy_is_a_mean_over_bags_whatever_they_are_packed_with() -> None:
    logits, labels, weights = random(6, 3), torch.tensor([0, 1, 2, 2, 2, 0]), torch.tensor([2.0, 0.5, 1.0])
    expected = np.mean([-weights[y] * np.log(softmax(z.numpy())[y]) for z, y in zip(logits, labels, strict=True)])
    whole = cross_entropy(logits, labels, weights)
    torch.testing.assert_close(whole, torch.tensor(expected))
    halves = (cross_entropy(logits[:3], labels[:3], weights) + cross_entropy(logits[3:], labels[3:], weights)) / 2
    torch.testing.assert_close(whole, halves)
    torch.testing.assert_close(cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_bag_distillation_is_the_formula(temperature: float) -> None:
    student, teacher = random(5, 3, seed=1), random(5, 3, seed=2)
    per_bag = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        per_bag.append(temperature**2 * np.sum(p * np.log(p / q)))
    expected = torch.tensor(np.mean(per_bag))
    torch.testing.assert_close(bag_distillation(student, teacher, temperature), expected)


def test_bag_distillation_is_no_mean_over_classes() -> None:
    # The published code averaged the divergence over a 1-D vector: C times too small, and dependent on C.
    student, teacher = torch.zeros(1, 4), torch.tensor([[20.0, 0, 0, 0]])
    torch.testing.assert_close(bag_distillation(student, teacher, 1.0), torch.tensor(4.0).log(), rtol=1e-4, atol=0)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    bag_distillation(student, teacher, 2.0).backward()
    assert student.grad is not None
    assert teacher.grad is None


# The teacher's mass in LR tiles


def test_teacher_mass_sums_a_softmax_into_parents() -> None:
    hr_offsets, lr_offsets = torch.tensor([0, 5, 8]), torch.tensor([0, 3, 5])
    scores = torch.tensor([1.0, 2.0, 0.5, -1.0, 0.0, 3.0, -300.0, 2.0])
    parent = torch.tensor([0, 0, 2, 2, -1, 1, 1, 1])
    mass, covered = teacher_mass(scores, hr_offsets, parent, lr_offsets)
    first, second = softmax(scores[:5].numpy()), softmax(scores[5:].numpy())
    expected = torch.tensor([first[0] + first[1], 0, first[2] + first[3], 0, second.sum()])
    torch.testing.assert_close(mass, expected)
    assert covered.tolist() == [True, False, True, False, True]


def test_weights_are_attention_not_raw_logits() -> None:
    # Raw logits as weights would change under a constant added to all of them; a softmax does not.
    scores, parent = random(10), torch.arange(10) // 2
    offsets, lr_offsets = torch.tensor([0, 10]), torch.tensor([0, 5])
    mass, _ = teacher_mass(scores, offsets, parent, lr_offsets)
    shifted, _ = teacher_mass(scores - 50, offsets, parent, lr_offsets)
    torch.testing.assert_close(mass, shifted)
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0))
    assert (mass >= 0).all()


# Attention


def attention_by_hand(logits: Tensor, mass: Tensor, covered: Tensor, temperature: float) -> float:
    per_bag = []
    for rows in slices(OFFSETS):
        inside = covered[rows].numpy()
        if not inside.any():
            per_bag.append(0.0)
            continue
        p = softmax(logits[rows].detach().double().numpy()[inside] / temperature)
        q = mass[rows].double().numpy()[inside] ** (1 / temperature)
        q = q / q.sum()
        divergence = sum(a * (np.log(a) - np.log(b)) for a, b in zip(q, p, strict=True) if a > 0)
        per_bag.append(temperature**2 * divergence)
    return float(np.mean(per_bag))


def masses(seed: int = 3) -> tuple[Tensor, Tensor]:
    mass = random(20, seed=seed).abs() + 0.01
    covered = torch.ones(20, dtype=torch.bool)
    covered[[1, 4, 6, 10, 11]] = False  # tile 6 is the whole second bag
    mass[~covered] = 0
    mass[[2, 8]] = 0  # covered, but the teacher looks away entirely
    return mass, covered


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_attention_distillation_is_the_formula(temperature: float) -> None:
    logits, (mass, covered) = random(20, seed=4).requires_grad_(), masses()
    loss = attention_distillation(logits, mass, covered, OFFSETS, temperature)
    expected = attention_by_hand(logits, mass, covered, temperature)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[~covered] == 0).all()
    assert (logits.grad[covered] != 0).all()


def test_attention_distillation_is_a_sum_over_instances_and_a_mean_over_bags() -> None:
    # The published code averaged over the instances, so that large bags hardly counted.
    for count in (10, 1000):
        mass = torch.zeros(count)
        mass[0] = 1
        loss = attention_distillation(
            torch.zeros(count), mass, torch.ones(count, dtype=torch.bool), torch.tensor([0, count]), 1.0
        )
        assert float(loss) == pytest.approx(np.log(count), rel=1e-5)


def test_equal_attention_costs_nothing_and_has_no_gradient() -> None:
    logits = random(20, seed=4).requires_grad_()
    mass = torch.cat([logits[rows].detach().softmax(0) for rows in slices(OFFSETS)])
    loss = attention_distillation(logits, mass, torch.ones(20, dtype=torch.bool), OFFSETS, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(20), rtol=0, atol=1e-6)


def test_uncovered_tiles_are_left_out_however_low_the_logits_are() -> None:
    # The published code gave uncovered parents the logit 0, which stood above all covered ones when those are negative.
    mass, covered = torch.tensor([0.7, 0.3, 0.0]), torch.tensor([True, True, False])
    offsets = torch.tensor([0, 3])
    low = torch.tensor([-30.0, -31.0, 50.0])
    alone = attention_distillation(low[:2], mass[:2], covered[:2], torch.tensor([0, 2]), 1.0)
    torch.testing.assert_close(attention_distillation(low, mass, covered, offsets, 1.0), alone)


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(SettingsError, match="no attention"):
        attention_distillation(None, *masses(), OFFSETS, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 5))
def test_attention_distillation_is_never_negative(seed: int, temperature: float) -> None:
    logits = 5 * random(20, seed=seed)
    mass, covered = masses(seed + 1)
    loss = float(attention_distillation(logits, mass, covered, OFFSETS, temperature))
    assert loss >= -1e-5
    assert loss == pytest.approx(attention_by_hand(logits, mass, covered, temperature), rel=1e-3, abs=1e-5)


# Instances


def test_instance_distillation_by_hand() -> None:
    head, instances, (mass, covered) = torch.nn.Linear(5, 2), random(20, 5), masses()
    mass = mass + torch.linspace(0, 1e-4, 20) * covered  # no ties
    loss = instance_distillation(head, instances, mass, covered, OFFSETS, 3)
    per_bag = []
    for rows in slices(OFFSETS):
        inside = covered[rows].nonzero()[:, 0]
        k = min(3, len(inside) // 2)
        order = inside[mass[rows][inside].argsort(descending=True)]
        chosen = torch.cat([order[:k], order[len(order) - k :]])
        target = torch.tensor([1] * k + [0] * k)
        empty = torch.zeros(())
        per_bag.append(torch.nn.functional.cross_entropy(head(instances[rows][chosen]), target) if k else empty)
    torch.testing.assert_close(loss, torch.stack(per_bag).mean())


def test_bags_with_nothing_to_tell_apart_cost_nothing() -> None:
    covered = torch.tensor([True, False, False])
    loss = instance_distillation(
        torch.nn.Linear(5, 2), random(3, 5), torch.tensor([1.0, 0, 0]), covered, torch.tensor([0, 3]), 4
    )
    assert float(loss.detach()) == 0


# Stage 1


def test_patch_distillation_is_the_formula() -> None:
    students, teachers = random(2, 3, 16, 7, seed=1), random(2, 3, 16, 7, seed=2)
    mask = random(3, 16, seed=3) > 0
    variance = torch.tensor([0.5, 4.0])
    expected = 0.0
    for layer in range(2):
        squared = ((students[layer] - teachers[layer]) ** 2).mean(2)[mask].sum()
        expected += float(squared / (mask.sum() * variance[layer])) / 2
    teachers[:, ~mask] = torch.nan  # what stands at absent children must not matter
    students.requires_grad_()
    loss = patch_distillation_loss(students, teachers, mask, variance)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert students.grad is not None
    assert (students.grad[:, ~mask] == 0).all()
    assert (students.grad[:, mask] != 0).all()


def test_patch_distillation_without_children_is_zero() -> None:
    mask = torch.zeros(2, 4, dtype=torch.bool)
    loss = patch_distillation_loss(random(1, 2, 4, 3), random(1, 2, 4, 3, seed=1), mask, torch.ones(1))
    assert float(loss) == 0


def test_final_distillation_is_the_formula() -> None:
    student, teachers = random(3, 7).requires_grad_(), random(3, 16, 7, seed=1)
    weights = random(3, 16, seed=2).abs() * (random(3, 16, seed=3) > 0)
    weights = weights / weights.sum(1, keepdim=True)
    expected = np.mean(
        [
            sum(float(weights[i, j] * ((student[i].detach() - teachers[i, j]) ** 2).mean()) for j in range(16))
            for i in range(3)
        ]
    )
    teachers[weights == 0] = torch.nan
    loss = final_distillation_loss(student, teachers, weights)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# The terms together: which parameters each is meant for


def batch_and_targets() -> tuple[BagBatch, TeacherTargets]:
    mass, covered = masses()
    index = torch.arange(4)
    batch = BagBatch(random(20, 12, seed=7), OFFSETS, segment_ids(OFFSETS, 20), torch.tensor([0, 1, 1, 0]), index)
    return batch, TeacherTargets(random(4, 2, seed=8), mass, covered, OFFSETS)


def student(name: str = "gated-abmil") -> MILModel:
    torch.manual_seed(0)
    return build_model(ModelSettings(name=name, in_dim=12, hidden=8, attention_dim=4, dropout=0.25))


NONE = LossSettings(ce=0, bag=0, soft=0, hard=0, instances=2)
PROJECTION = {"projection.weight", "projection.bias"}
ATTENTION = {"attention.weight", "attention.bias", "attention_score.weight"}
CLASSIFIER = {"classifier.weight", "classifier.bias"}
HEAD = {"instance_head.weight", "instance_head.bias"}


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("ce", PROJECTION | ATTENTION | CLASSIFIER),
        ("bag", PROJECTION | ATTENTION | CLASSIFIER),
        ("soft", PROJECTION | ATTENTION),
        ("hard", PROJECTION | HEAD),
    ],
)
def test_each_term_reaches_the_parameters_it_is_meant_for(term: str, reached: set[str]) -> None:
    # The published instance loss ran on detached features, so nothing of it reached the student.
    model = student().eval()
    batch, targets = batch_and_targets()
    step = student_step(torch.ones(2), replace(NONE, **{term: 1.0}), targets)
    loss = step(model, batch)
    assert set(loss.terms) == ({"ce", term})
    loss.total.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-8}
    # The softmax does not see a constant added to all scores, so rounding alone is left of that gradient.
    assert got - {"attention_score.bias"} == reached


@pytest.mark.parametrize("name", ["gated-abmil", "clam-sb", "mean"])
def test_with_the_teachers_weights_at_zero_the_numbers_are_those_of_plain_mil_bit_for_bit(name: str) -> None:
    batch, targets = batch_and_targets()
    weights = torch.tensor([1.5, 0.75])
    found = []
    for step in (plain_step(weights), student_step(weights, replace(NONE, ce=1.0), targets)):
        model = student(name).train()
        torch.manual_seed(3)
        loss = step(model, batch)
        loss.total.backward()
        found.append((loss.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][n], found[1][1][n]) for n in found[0][1])


def test_targets_follow_the_order_of_the_batch() -> None:
    _, targets = batch_and_targets()
    chosen = torch.tensor([2, 0])
    offsets = torch.tensor([0, 9, 15])
    batch = BagBatch(random(15, 12), offsets, segment_ids(offsets, 15), torch.tensor([1, 0]), chosen)
    logits, mass, covered = targets.of(batch)
    assert targets.mass is not None
    assert targets.covered is not None
    assert mass is not None
    assert covered is not None
    assert torch.equal(logits, targets.logits[chosen])
    assert torch.equal(mass, torch.cat([targets.mass[7:16], targets.mass[0:6]]))
    assert torch.equal(covered, torch.cat([targets.covered[7:16], targets.covered[0:6]]))
