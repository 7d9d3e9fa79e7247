"""Prototypes in closed form: class means, and the covariance within the classes, shrunk. No gradient is needed.

``prototype[k] = S⁻¹ m[k]`` with ``S = (1 − γ) C + γ tr(C) / D · I``, where γ is the shrinkage. m[k] is the mean of the
rows of class k, each centered and scaled to length one. C is their covariance within the classes; for several labels,
and for a head without a center, the second moment of all rows. These are the shrunk Gaussian discriminants of arXiv
2402.04087, for each modality on its own. γ = 1 is weight imprinting, arXiv 1712.07136.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from protohead.cosine import NOISE, centered, normalize
from protohead.moments import Moments, Rows, add, by_modality, empty, plus, seen_from
from protohead.objective import classification_loss

__all__ = ["Choice", "choose", "prototypes"]

SHRINKAGE = (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.03, 0.01)  # To choose from, by the loss
SCALES = (5.0, 8.0, 12.0, 18.0, 27.0, 40.0)  # at the best of these.
USUAL_SCALE = 20.0
FOLDS = 5


class Choice(NamedTuple):
    """What gives the least loss."""

    shrinkage: float
    scale: Tensor  # (C,)
    bias: Tensor  # (K,)


class _Solution(NamedTuple):
    """One modality, along the eigenvectors of its covariance."""

    means: Tensor  # (K, D)
    values: Tensor  # (D,)
    vectors: Tensor  # (D, D)

    def prototypes(self, shrinkage: float) -> Tensor:
        """(K, D), of length one; zeros for a class without rows."""
        shrunk = (1 - shrinkage) * self.values + shrinkage * self.values.mean()
        return normalize(self.means / shrunk)


class _Fold(NamedTuple):
    """One modality of rows that are held out."""

    which: Tensor  # (N,), the numbers of these rows in the sample
    rows: Tensor  # (N, D), of length one, along the eigenvectors
    solution: _Solution  # of all other rows


def prototypes(moments: Moments, centers: list[Tensor], within: bool, shrinkage: float) -> list[Tensor]:
    """M tensors (K, D_m), of length one; zeros for a class that no row with the modality has.

    Args:
        moments: Of `protohead.moments`.
        centers: M tensors (D_m,).
        within: Whether C is the covariance within the classes: for one label, and a head with a center.
        shrinkage: γ in [0, 1]. Small ones need more rows than dimensions.
    """
    each = list(zip(moments.values(), centers, strict=True))
    if shrinkage == 1:  # Class means alone.
        return [normalize(_class_means(*one)) for one in each]
    solutions = [_solve(*one, within) for one in each]
    return [solution.prototypes(shrinkage) @ solution.vectors.T for solution in solutions]


def _solve(sums: Mapping[str, Tensor], center: Tensor, within: bool) -> _Solution:
    covariance, means = seen_from(sums, center)[0], _class_means(sums, center)
    if within:  # Around means that have one more row, at the center: one row alone would lie on its mean.
        rows = sums["rows"][:, None]
        covariance = covariance - (means * (rows - rows / (rows + 1).square())).T @ means
    values, vectors = torch.linalg.eigh(covariance)
    floor = torch.finfo(torch.float32).eps * values[-1]  # The sums of float32 rows have its rounding.
    return _Solution(means @ vectors, values.clamp(min=floor) + (floor <= 0), vectors)


def _class_means(sums: Mapping[str, Tensor], center: Tensor) -> Tensor:
    """(K, D); zeros for a class without rows, or whose rows cancel but for rounding."""
    rows = sums["rows"][:, None]
    means = seen_from(sums, center)[1] / torch.where(rows > 0, rows, 1)
    noise = NOISE * torch.finfo(means.dtype).eps  # Of rows of length one.
    return torch.where(torch.linalg.vector_norm(means, dim=1, keepdim=True) > noise, means, 0)


def choose(
    moments: Moments,
    sample: Rows,
    centers: list[Tensor],
    centered: bool,
    case: Tensor,
    cases: int,
    shrinkage: float | None,
    class_weight: Tensor | None,
) -> Choice | None:
    """What gives the least classification loss of rows that are held out, in turn: first γ, then scale and bias.

    While γ is chosen, the bias is that of the classes' frequencies.

    Args:
        moments: As in :func:`prototypes`.
        sample: Some of their rows; without modalities that have no prototypes in a row's case.
        centers: As in :func:`prototypes`.
        centered: Whether the head has a center and a bias.
        case: (N,) int64, which scale each row of the sample has.
        cases: C.
        shrinkage: γ if it is known.
        class_weight: (K,), of the loss.

    Returns:
        None where no row can be held out: each is the only one of its class.
    """
    folds = _held_out(moments, sample, centers, centered and not sample.labels.is_floating_point())
    known, labels = sample.present.any(1), sample.labels
    if not labels.is_floating_point():  # A class whose rows are all in one fold is not known without it.
        known = torch.zeros_like(known)
        for which, _, solution in folds:
            known[which] |= solution.means.any(1)[labels[which]]
    if len(known) < 2 or not known.any():
        return None
    labels, case = labels[known], case[known]
    prior = _prior(labels, len(folds[0].solution.means), class_weight) * centered

    def loss(logits: Tensor) -> Tensor:
        losses, weights = classification_loss(logits, labels, class_weight)
        return losses.sum() / weights.sum().clamp(min=1e-9)

    def least(shrinkage: float) -> float:
        cosine = _cosines(folds, sample, shrinkage)[known]
        return min(loss(scale * cosine + prior).item() for scale in SCALES)

    shrinkage = min(SHRINKAGE, key=least) if shrinkage is None else shrinkage
    cosine = _cosines(folds, sample, shrinkage)[known]
    return Choice(shrinkage, *_calibrate(cosine, loss, case, cases, prior, centered))


def _held_out(moments: Moments, sample: Rows, centers: list[Tensor], within: bool) -> list[_Fold]:
    order = _keys(sample, map(len, centers)).argsort(stable=True)
    if not sample.labels.is_floating_point():  # Each class is divided among the folds.
        order = order[sample.labels[order].argsort(stable=True)]
    folds = []
    for index in (order[number::FOLDS] for number in range(min(FOLDS, len(order)))):
        rows = sample.take(index)
        part = empty(moments, len(next(iter(moments.values()))["rows"]))
        add(part, rows)
        others = plus(moments, part, -1)
        each = by_modality(rows, map(len, centers))
        for sums, center, (x, which) in zip(others.values(), centers, each, strict=True):
            solution = _solve(sums, center, within)
            unit = normalize(centered(x, center.to(x))[0]).to(center)
            small = solution._replace(vectors=center.new_empty(0))  # They are large, and not needed any more.
            folds.append(_Fold(index[which], unit @ solution.vectors, small))
    return folds


def _keys(rows: Rows, widths: Iterable[int]) -> Tensor:
    """(N,) int64 that look random, but are the same for the same row: from its bits, by sums that wrap around.

    By them the folds do not depend on the order of the rows.
    """
    count = len(rows.labels)
    keys = torch.zeros(count, dtype=torch.int64, device=rows.labels.device)
    for x in (*rows.features.split_with_sizes(list(widths), 1), rows.labels.reshape(count, rows.labels[0].numel())):
        bits = x.float().contiguous().view(torch.int32).long()
        weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x9E3779B97F4A7C1 | 1
        keys = (keys ^ (keys >> 31)) * 0x5851F42D4C957F2D + (bits * weights).sum(1)
    keys = (keys ^ (keys >> 29)) * 0x14057B7EF767814F
    return keys ^ (keys >> 32)


def _cosines(folds: list[_Fold], sample: Rows, shrinkage: float) -> Tensor:
    """(N, K), the mean over the modalities, by prototypes that are made without the row."""
    count, first = sample.present.sum(1, keepdim=True).clamp(min=1), folds[0]
    total = first.rows.new_zeros(len(count), len(first.solution.means))
    for which, rows, solution in folds:
        total[which] += rows @ solution.prototypes(shrinkage).T
    return total / count


def _prior(labels: Tensor, num_classes: int, class_weight: Tensor | None) -> Tensor:
    """(K,): the bias where nothing is known of a row, with one row more of each class, or of each answer."""
    if labels.is_floating_point():
        return ((labels.double().sum(0) + 1) / (len(labels) + 2)).logit()
    weights = None if class_weight is None else class_weight.double()[labels]
    rows = torch.bincount(labels, weights, num_classes).double() + 1
    return (rows / rows.sum()).log()


def _calibrate(
    cosine: Tensor, loss: Callable[[Tensor], Tensor], case: Tensor, cases: int, prior: Tensor, biased: bool
) -> tuple[Tensor, Tensor]:
    """The scales and the bias of least loss; where rows are few, near to what is usual."""
    usual = math.log(USUAL_SCALE)
    log_scale, bias = cosine.new_full((cases,), usual), prior.to(cosine, copy=True)
    optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        mean = log_scale[case].mean()  # Of the rows, so that a case without any has their scale.
        unusual = (log_scale - mean).square().sum() + (mean - usual) ** 2 + (bias - prior).square().sum()
        total = loss(log_scale.exp()[case, None] * cosine + bias) + unusual / (2 * len(cosine))
        total.backward()
        return total

    with torch.enable_grad():
        log_scale.requires_grad_()
        bias.requires_grad_(biased)
        optimizer.step(closure)
    return log_scale.detach().exp(), bias.detach()
