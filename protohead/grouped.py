"""The logits on the CPU: the rows of one missing case are multiplied together, at the cost of what the rows have.

The formula is that of :mod:`protohead.functional`, in one autograd function: no normalised copy of the prototypes is
made or saved, the products are scaled by inverse norms instead, and each gradient is written once.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
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
    order = _Order.of(groups, rows[0])
    if not torch.is_grad_enabled():
        return _score(groups, order, labels, norms, rows, prototypes, None)
    result: Tensor = _GroupedLogits.apply(groups, order, labels, norms, *rows, *prototypes)
    return result


class _Order(NamedTuple):
    """The rows of the groups one behind the other, and back."""

    batch: int
    there: Tensor | None  # None where the rows are one group, in order.
    back: Tensor | None
    sizes: list[int]

    @classmethod
    def of(cls, groups: Sequence[Group], like: Tensor) -> "_Order":
        batch, there = len(like), [row for group in groups for row in group.rows]
        sizes = [len(group.rows) for group in groups]
        if len(groups) == 1 and len(there) == batch:
            return cls(batch, None, None, sizes)
        back = [len(there)] * batch  # Behind all groups is a row of zeros.
        for place, row in enumerate(there):
            back[row] = place
        make = partial(torch.tensor, dtype=torch.int64, device=like.device)
        return cls(batch, make(there), make(back), sizes)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = (x if self.there is None else x.index_select(0, self.there)).split(self.sizes)
        return parts

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        if self.back is None:
            return parts[0]
        rest = [like.new_zeros(1, like.shape[1])] if sum(self.sizes) < self.batch else []
        return torch.cat(parts + rest).index_select(0, self.back)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 0 for a zero vector."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)


def _score(
    groups: Sequence[Group],
    order: _Order,
    labels: Tensor | None,
    norms: Sequence[Tensor],
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    saved: list[Tensor] | None,
) -> Tensor:
    """The logits; what the backward pass needs of them is appended to `saved`."""
    if not groups:
        return rows[0].new_zeros(order.batch, prototypes[0].shape[1])
    units = [order.split(x * inverse_norm(x)[:, None]) for x in rows]
    blocks = [(p.unbind(), norm.unbind()) for p, norm in zip(prototypes, norms, strict=True)]
    logits = []
    for i, group in enumerate(groups):
        parts = []
        for m, v in group.parts:
            w, norm = blocks[m][0][v], blocks[m][1][v]
            # A product with a factor, to which nothing is added: `norm` is not read here.
            part = torch.addmm(norm, units[m][i], w.T, beta=0, alpha=group.scale / len(group.parts))
            parts.append(part.mul_(norm))
        logits.append(reduce(torch.add, parts))
        if saved is not None:
            saved += parts
            if order.back is None and len(parts) == 1:
                logits[i] = logits[i].clone()  # What is saved must stay as it is.
    out = order.join(logits, logits[0])
    if labels is not None:
        scale, margin = _per_row(groups, out)
        if labels.is_floating_point():
            cosine = out / scale
            out = scale * add_angular_margin(cosine, labels, margin[:, 0])
        else:
            target = labels.clamp(min=0)[:, None]
            z = out.gather(1, target)
            cosine = z / scale
            out.scatter_(1, target, torch.where(labels[:, None] >= 0, scale * phi(cosine, margin), z))
        if saved is not None:
            saved.append(cosine)
    return out


class _GroupedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Sequence[Group],
        order: _Order,
        labels: Tensor | None,
        norms: Sequence[Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        saved: list[Tensor] = []
        half = len(tensors) // 2
        out = _score(groups, order, labels, norms, tensors[:half], tensors[half:], saved)
        ctx.groups, ctx.order, ctx.labels, ctx.norms = groups, order, labels, norms
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
        if not ctx.groups:
            return *none, *[torch.zeros_like(x) if k else None for x, k in zip(tensors, needed, strict=True)]
        if ctx.labels is not None:
            grad = _before_margin(grad, saved.pop(), ctx.labels, _per_row(ctx.groups, grad)[1])
        half = len(tensors) // 2
        rows, prototypes = tensors[:half], tensors[half:]
        # Each block is written below, or zeroed at the end.
        to_prototypes = [torch.empty_like(p) if k else None for p, k in zip(prototypes, needed[half:], strict=True)]
        order: _Order = ctx.order
        every = [inverse_norm(x)[:, None] for x in rows]
        units = [order.split(x * inverse) for x, inverse in zip(rows, every, strict=True)]
        inverses = [order.split(inverse) for inverse in every]
        steps: list[list[Tensor | None]] = [[None] * len(ctx.groups) for _ in rows]
        written: set[tuple[int, int]] = set()
        parts = iter(saved)
        for i, (group, g) in enumerate(zip(ctx.groups, order.split(grad), strict=True)):
            for m, v in group.parts:
                unit, w, norm = units[m][i], prototypes[m][v], ctx.norms[m][v]
                along, per_class = g * next(parts), g * (norm * (group.scale / len(group.parts)))
                # Each gradient loses its part along the vector, whose length does not count.
                if needed[m]:
                    step = (per_class @ w).addcmul_(unit, along.sum(1, keepdim=True), value=-1)
                    steps[m][i] = step.mul_(inverses[m][i])
                if (to := to_prototypes[m]) is not None:
                    # Two groups may share a block, where a case without prototypes falls back.
                    torch.addmm(to[v], per_class.T, unit, beta=float((m, v) in written), out=to[v])
                    to[v].addcmul_(w, (norm.square() * along.sum(0))[:, None], value=-1)
                    written.add((m, v))
        to_rows = [_joined(order, steps[m], x) if needed[m] else None for m, x in enumerate(rows)]
        for m, to in enumerate(to_prototypes):
            if to is not None:
                for v in set(range(len(to))) - {block for modality, block in written if modality == m}:
                    to[v].zero_()
        return *none, *to_rows, *to_prototypes


def _joined(order: _Order, parts: list[Tensor | None], like: Tensor) -> Tensor:
    """One tensor of what there is for each group, zeros where that is nothing."""
    sizes = zip(parts, order.sizes, strict=True)
    whole = [like.new_zeros(size, like.shape[1]) if part is None else part for part, size in sizes]
    return order.join(whole, like)


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
