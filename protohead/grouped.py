"""The logits on the CPU: the rows of one missing case are multiplied together, at the cost of what the rows have.

The formula is that of :mod:`protohead.functional`, in one autograd function: no normalised copy of the prototypes is
made or saved, the products are scaled by inverse norms instead, and each gradient is written once.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protohead.functional import add_angular_margin, normalize, phi, phi_slope

__all__ = ["Group", "grouped_logits", "inverse_norm"]


class Group(NamedTuple):
    """Rows with the same modalities, which one case scores."""

    rows: list[int]
    parts: tuple[tuple[int, int], ...]  # (m, v): a modality that scores them, and its block of prototypes
    scale: float
    margin: float


def grouped_logits(
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    groups: Sequence[Group],
    labels: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
) -> Tensor:
    """Logits of rows that are grouped by case, with margins where there are labels.

    Args:
        rows: M tensors (B, D_m) of features, all of the prototypes' dtype.
        prototypes: M tensors (V_m, K, D_m).
        groups: Each row in one of them at most; a row in none gets zeros.
        labels: As in :func:`protohead.functional.add_angular_margin`.
        norms: The :func:`inverse_norm` of the prototypes, M tensors (V_m, K), where they are known.

    Returns:
        (B, K).

    Example:
        >>> rows = [torch.zeros(2, 2), torch.tensor([[0.0], [5.0]])]
        >>> prototypes = [torch.eye(2)[None], torch.ones(1, 2, 1)]
        >>> grouped_logits(rows, prototypes, [Group([1], ((0, 0), (1, 0)), scale=4.0, margin=0.0)])
        tensor([[0., 0.],
                [2., 2.]])
    """
    if norms is None:
        norms = [inverse_norm(p.detach()) for p in prototypes]
    batch, device = len(rows[0]), rows[0].device
    indices = [None if len(group.rows) == batch else torch.tensor(group.rows, device=device) for group in groups]
    if not torch.is_grad_enabled():
        return _score(groups, indices, labels, norms, rows, prototypes, None)
    result: Tensor = _GroupedLogits.apply(groups, indices, labels, norms, *rows, *prototypes)
    return result


def inverse_norm(x: Tensor) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 0 for a zero vector."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)


def _score(
    groups: Sequence[Group],
    indices: Sequence[Tensor | None],
    labels: Tensor | None,
    norms: Sequence[Tensor],
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    saved: list[Tensor] | None,
) -> Tensor:
    """The logits; what the backward pass needs of them is appended to `saved`."""
    units = [x * inverse_norm(x)[:, None] for x in rows]
    out = rows[0].new_zeros(len(rows[0]), prototypes[0].shape[1])
    for group, index in zip(groups, indices, strict=True):
        parts = []
        for m, v in group.parts:
            part = F.linear(_take(units[m], index), prototypes[m][v])
            parts.append(part.mul_(norms[m][v] * (group.scale / len(group.parts))))
        logits = reduce(torch.add, parts)
        if saved is not None:
            saved += parts
        if index is not None:
            out.index_copy_(0, index, logits)
        else:
            out = logits.clone() if logits is parts[0] else logits  # What is saved must stay as it is.
    if labels is not None:
        scale, margin = _per_row(groups, out)
        if labels.is_floating_point():
            cosine = out / scale
            out = scale * add_angular_margin(cosine, labels, margin[:, 0])
        else:
            target = labels.clamp(min=0)[:, None]
            cosine = out.gather(1, target) / scale
            out.scatter_(1, target, scale * torch.where(labels[:, None] >= 0, phi(cosine, margin), cosine))
        if saved is not None:
            saved.append(cosine)
    return out


class _GroupedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Sequence[Group],
        indices: Sequence[Tensor | None],
        labels: Tensor | None,
        norms: Sequence[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        saved: list[Tensor] = []
        half = len(tensors) // 2
        out = _score(groups, indices, labels, norms, tensors[:half], tensors[half:], saved)
        ctx.groups, ctx.indices, ctx.labels, ctx.norms = groups, indices, labels, norms
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        none = (None,) * 4
        if grad is None:
            return *none, *[None for _ in needed]
        tensors, saved = ctx.saved_tensors[: len(needed)], list(ctx.saved_tensors[len(needed) :])
        if torch.is_grad_enabled():  # A gradient of the gradient is wanted: autograd's own, of the plain formula.
            return *none, *_differentiable(ctx.groups, ctx.labels, tensors, needed, grad)
        if ctx.labels is not None:
            grad = _before_margin(grad, saved.pop(), ctx.labels, _per_row(ctx.groups, grad)[1])
        half = len(tensors) // 2
        rows, prototypes = tensors[:half], tensors[half:]
        to_rows = [torch.zeros_like(x) if k else None for x, k in zip(rows, needed[:half], strict=True)]
        # Each block is written below, or zeroed at the end.
        to_prototypes = [torch.empty_like(p) if k else None for p, k in zip(prototypes, needed[half:], strict=True)]
        inverses = [inverse_norm(x)[:, None] for x in rows]
        units = [x * inverse for x, inverse in zip(rows, inverses, strict=True)]
        written: set[tuple[int, int]] = set()
        parts = iter(saved)
        for group, index in zip(ctx.groups, ctx.indices, strict=True):
            g = _take(grad, index)
            for m, v in group.parts:
                unit, w, norm = _take(units[m], index), prototypes[m][v], ctx.norms[m][v]
                along, per_class = g * next(parts), g * (norm * (group.scale / len(group.parts)))
                # Each gradient loses its part along the vector, whose length does not count.
                if (to := to_rows[m]) is not None:
                    step = (per_class @ w).addcmul_(unit, along.sum(1, keepdim=True), value=-1)
                    step *= _take(inverses[m], index)
                    to.copy_(step) if index is None else to.index_copy_(0, index, step)
                if (to := to_prototypes[m]) is not None:
                    # Two groups may share a block, where a case without prototypes falls back.
                    torch.addmm(to[v], per_class.T, unit, beta=float((m, v) in written), out=to[v])
                    to[v].addcmul_(w, (norm.square() * along.sum(0))[:, None], value=-1)
                    written.add((m, v))
        for m, to in enumerate(to_prototypes):
            if to is not None:
                for v in set(range(len(to))) - {block for modality, block in written if modality == m}:
                    to[v].zero_()
        return *none, *to_rows, *to_prototypes


def _per_row(groups: Sequence[Group], like: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) scale and margin of each row; 1 and 0, which change nothing, where a row is in no group."""
    scale, margin = [1.0] * len(like), [0.0] * len(like)
    for group in groups:
        for row in group.rows:
            scale[row], margin[row] = group.scale, group.margin
    both = like.new_tensor([scale, margin])[:, :, None]
    return both[0], both[1]


def _before_margin(grad: Tensor, cosine: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """The gradient with respect to the logits without margins."""
    if labels.is_floating_point():
        labels = labels.to(cosine.dtype)
        return grad * (labels * phi_slope(cosine, margin) + (1 - labels))
    target = labels.clamp(min=0)[:, None]
    slope = torch.where(labels[:, None] >= 0, phi_slope(cosine, margin), 1)
    return grad.scatter(1, target, grad.gather(1, target) * slope)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _differentiable(
    groups: Sequence[Group], labels: Tensor | None, tensors: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    half = len(tensors) // 2
    total = grad.new_zeros(())
    for group in groups:
        index = torch.tensor(group.rows, device=grad.device)
        units = [(normalize(tensors[m][index]), normalize(tensors[half + m][v])) for m, v in group.parts]
        cosine = torch.stack([x @ w.T for x, w in units]).mean(0)
        if labels is not None:
            cosine = add_angular_margin(cosine, labels[index], cosine.new_full((len(index),), group.margin))
        total = total + (group.scale * cosine * grad[index]).sum()
    wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(total, wanted, create_graph=True, materialize_grads=True))
    return [next(grads) if need else None for need in needed]
