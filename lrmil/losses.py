"""The losses of both stages as pure functions.

Packed form: T tiles of B bags lie one after the other; ``offsets`` (B + 1,) int64 says where each bag begins. Every
loss is a scalar and a mean over bags, so the loss of several bags together is the mean of their losses one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lrmil.errors import SettingsError
from lrmil.model.segments import segment_ids, segment_log_softmax, segment_softmax, segment_sum, select_extremes

__all__ = [
    "attention_distillation",
    "bag_distillation",
    "cross_entropy",
    "final_distillation_loss",
    "instance_distillation",
    "patch_distillation_loss",
    "teacher_mass",
]


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over bags of ``weights[label] * -log softmax(logits)[label]``.

    logits: (B, C) float. labels: (B,) int64. weights: (C,) float or None for 1. Unlike torch's own weighted mean the
    sum is divided by B, so that a bag counts the same whatever it is packed with.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return losses.mean() if weights is None else (losses * weights[labels]).mean()


def bag_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(t / T) || softmax(s / T))``, summed over classes, mean over bags.

    student, teacher: logits (B, C) float; no gradient goes to the teacher. Hinton, Vinyals and Dean 2015: the factor
    T^2 keeps the size of the gradient when T changes.
    """
    target = (teacher.detach().float() / temperature).log_softmax(1)
    guess = (student.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(guess, target, reduction="batchmean", log_target=True)


def teacher_mass(
    attention_logits: Tensor, hr_offsets: Tensor, parent: Tensor, lr_offsets: Tensor, rule: str = "sum"
) -> tuple[Tensor, Tensor]:
    """The teacher's attention on the LR tiles that its HR tiles lie in.

    rule: "sum" of its softmax over all HR tiles; or, as published, the "mean" or the "max" of the children's logits,
    and the softmax over the covered LR tiles of these.

    attention_logits: (T_hr,) float. hr_offsets, lr_offsets: (B + 1,) int64 of the same bags. parent: (T_hr,) int64, the
    row of the LR tile within its own bag, or -1 for none. Returns mass (T_lr,) float32, whose sum over a bag is 1 where
    every HR tile has a parent, and covered (T_lr,) bool: tiles with at least one HR tile.
    """
    logits = attention_logits.detach()
    has_parent = parent >= 0
    row = (parent + lr_offsets[:-1][segment_ids(hr_offsets, len(parent))])[has_parent]
    attention = segment_softmax(logits, hr_offsets)
    mass = attention.new_zeros(int(lr_offsets[-1]))
    covered = torch.zeros_like(mass, dtype=torch.bool)
    covered[row] = True
    if rule == "sum":
        return mass.index_add(0, row, attention[has_parent]), covered
    how = {"mean": "mean", "max": "amax"}[rule]
    joint = mass.scatter_reduce(0, row, logits[has_parent].to(mass.dtype), how, include_self=False)
    return segment_softmax(joint.where(covered, -torch.inf), lr_offsets).where(covered, 0.0), covered


def attention_distillation(
    attention_logits: Tensor | None, mass: Tensor, covered: Tensor, offsets: Tensor, temperature: float
) -> Tensor:
    """``T^2 sum_i q_i (log q_i - log p_i)`` over the covered tiles of each bag, mean over bags.

    attention_logits: the student's, (T,) float. mass: (T,) float at least 0, the teacher's attention in each LR tile;
    ``q`` is proportional to ``mass^(1 / T)``. covered: (T,) bool; ``p`` is the softmax of the logits over these only,
    and uncovered tiles get no gradient. 0 log 0 is 0. A bag without covered tiles counts as 0. Raises SettingsError for
    a model without attention (None).
    """
    if attention_logits is None:
        raise SettingsError(
            "this model has no attention per tile, so there is nothing to distil into",
            remedy="choose an attention model, or set the weight of the soft loss to 0",
        )
    inside = attention_logits.float().where(covered, -torch.inf) / temperature
    log_p = segment_log_softmax(inside, offsets)
    log_q = segment_log_softmax((mass.detach().log() / temperature).where(covered, -torch.inf), offsets)
    # -inf - -inf and 0 * inf would be NaN, also in the gradient of the branch that `where` drops, so both are masked.
    present = covered & log_q.isfinite()
    difference = log_q.where(present, 0.0) - log_p.where(present, 0.0)
    divergence = segment_sum(log_q.exp().where(present, 0.0) * difference, offsets)
    return temperature**2 * divergence.mean()


def instance_distillation(
    head: torch.nn.Module, instances: Tensor, mass: Tensor, covered: Tensor, offsets: Tensor, k: int
) -> Tensor:
    """2-way cross-entropy of the k covered tiles with the most teacher attention against the k with the least.

    head: (M, H) -> (M, 2) logits, class 1 being "attended". instances: (T, H), the student's projected tiles, through
    which the loss reaches the projection that the bag branch uses too. mass, covered: (T,) as from ``teacher_mass``.
    k: at most half of the covered tiles are taken on each side. Mean over a bag's tiles, then mean over bags; a bag
    with fewer than two covered tiles counts as 0.
    """
    rows, attended = select_extremes(mass, offsets, k, covered)
    bag = segment_ids(offsets, len(mass))[rows]
    count = torch.bincount(bag, minlength=len(offsets) - 1).clamp_min(1)
    losses = F.cross_entropy(head(instances[rows]).float(), attended.long(), reduction="none")
    return (losses / count[bag]).sum() / (len(offsets) - 1)


def patch_distillation_loss(students: Tensor, teachers: Tensor, mask: Tensor, variance: Tensor) -> Tensor:
    """Stage 1: ``mean over l of sum(M * mean_d (P - T)^2) / (sum(M) * var_l)``.

    students: P (L, B, k*k, D) float, the student's tokens of layer l pooled to k x k. teachers: T, same shape, the
    teacher's CLS on each HR child; no gradient. mask: M (B, k*k) bool or 0/1, true for children that exist. variance:
    (L,) float, the variance of the teacher's layer on training tiles; 1 weighs layers by their size, as published.
    A batch in which no child exists gives 0.
    """
    present = mask.to(torch.bool)
    # Masked before squaring: what stands at absent children may be anything, NaN included, also in the gradient.
    difference = (students.float() - teachers.detach().float()).where(present[..., None], 0.0)
    per_layer = difference.square().mean(3).sum((1, 2)) / present.sum().clamp_min(1)
    return (per_layer / variance.to(per_layer.dtype)).mean()


def final_distillation_loss(student: Tensor, teachers: Tensor, weights: Tensor) -> Tensor:
    """Stage 1: ``mean_i sum_j w_ij * mean_d (z_LR_i - z_HR_j)^2``.

    student: z_LR (B, D) float. teachers: z_HR (B, k*k, D); no gradient. weights: w (B, k*k), the teacher's softmax
    attention renormalised over the children, or uniform; 0 where there is no child.
    """
    difference = (student.float()[:, None] - teachers.detach().float()).where(weights[..., None] > 0, 0.0)
    return (weights * difference.square().mean(2)).sum(1).mean()
