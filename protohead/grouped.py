"""The logits on the CPU: the rows that share a block of prototypes are multiplied by it together.

The cost is that of what the rows have. The formula is that of :mod:`protohead.functional`, in one autograd function:
no normalised copy of the prototypes is made or saved, the products are scaled by inverse norms instead, and each
gradient is written once.
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from protohead.functional import add_angular_margin, case_cosine, full_precision, phi, phi_slope
from protohead.plan import Plan, Share

__all__ = ["grouped_logits", "inverse_norm"]


def grouped_logits(
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    plan: Plan,
    labels: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    centers: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits of rows by the blocks of prototypes that score them, with margins where there are labels.

    Args:
        rows: M tensors (B, D_m) of features, all of the prototypes' dtype.
        prototypes: M tensors (V_m, K, D_m).
        plan: Which blocks score a row. One that none scores gets zeros.
        labels: As in :func:`protohead.functional.add_angular_margin`.
        norms: The :func:`inverse_norm` of the prototypes, M tensors (V_m, K), where they are known.
        centers: M tensors (D_m,) that are subtracted from the rows and take no gradient.

    Returns:
        (B, K).

    Example:
        >>> rows = [torch.zeros(2, 2), torch.tensor([[0.0], [5.0]])]
        >>> prototypes = [torch.eye(2)[None], torch.ones(1, 2, 1)]
        >>> from protohead.plan import Plan
        >>> constants = torch.tensor([[2.0, 2.0], [4.0, 4.0], [0.0, 0.0]])[:, :, None]
        >>> plan = Plan.of(torch.tensor([[0, 0], [1, 2]]), constants, blocks=[1, 1])
        >>> grouped_logits(rows, prototypes, plan)
        tensor([[0., 0.],
                [2., 2.]])
    """
    if norms is None:
        norms = [inverse_norm(p.detach()) for p in prototypes]
    if centers is None:
        centers = [None] * len(rows)
    if not torch.is_grad_enabled():
        return _score(plan, labels, norms, centers, rows, prototypes)[0]
    result: Tensor = _GroupedLogits.apply(plan, labels, norms, centers, *rows, *prototypes)
    return result


def inverse_norm(x: Tensor, keepdim: bool = False) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 1 for a zero vector, as in ``functional.normalize``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return norm.reciprocal_().nan_to_num_(nan=math.nan, posinf=1.0)


def _entries(share: Share, x: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that a modality scores, centered and normalised, (N, D_m); and their inverse norms, (N, 1)."""
    unit = x.index_select(0, share.rows)
    if center is not None:
        unit.sub_(center)
    inverse = inverse_norm(unit, keepdim=True)
    return unit.mul_(inverse), inverse


def _score(
    plan: Plan,
    labels: Tensor | None,
    norms: Sequence[Tensor],
    centers: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The logits, and what the backward pass needs of them."""
    cosines = rows[0].new_empty(1 + sum(plan.counts), prototypes[0].shape[1])
    cosines[0].zero_()  # That of what is missing.
    for share, x, center, w, norm in zip(plan.shares, rows, centers, prototypes, norms, strict=True):
        unit, _ = _entries(share, x, center)
        part = cosines.narrow(0, 1 + share.first, len(unit))
        if share.padding is not None:
            padded = w.bmm(_padded(unit, share.padding.slots).mT).mul_(norm[:, :, None]).mT.flatten(0, 1)
            torch.index_select(padded, 0, share.padding.place, out=part)
        for v, here in share.alone:
            torch.mm(unit[here], w[v].T, out=part[here]).mul_(norm[v])
    out: Tensor = torch.embedding_bag(cosines, plan.places.flatten(), plan.starts)[0].mul_(plan.factor)
    if labels is None:
        return out, [cosines]
    if labels.is_floating_point():
        cosine = out / plan.scale
        return plan.scale * add_angular_margin(cosine, labels, plan.margin[:, 0]), [cosines, cosine]
    target = labels.clamp(min=0)[:, None]
    z = out.gather(1, target)
    cosine = z / plan.scale
    out.scatter_(1, target, torch.where(labels[:, None] >= 0, plan.scale * phi(cosine, plan.margin), z))
    return out, [cosines, cosine]


def _padded(entries: Tensor, slots: Tensor) -> Tensor:
    """The entries in their slots, (V, R, ...), with zeros between them."""
    whole = torch.cat([entries.new_zeros(1, entries.shape[1]), entries])
    return whole.index_select(0, slots.flatten()).view(*slots.shape, -1)


class _GroupedLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        labels: Tensor | None,
        norms: Sequence[Tensor],
        centers: Sequence[Tensor | None],
        *tensors: Tensor,
    ) -> Tensor:
        half = len(tensors) // 2
        out, saved = _score(plan, labels, norms, centers, tensors[:half], tensors[half:])
        ctx.plan, ctx.norms, ctx.centers = plan, norms, centers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved, *([] if labels is None else [labels]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, none = ctx.needs_input_grad[4:], (None,) * 4
        if grad is None:
            return *none, *[None for _ in needed]
        half, plan, centers = len(needed) // 2, ctx.plan, ctx.centers
        saved = ctx.saved_tensors  # Once: activation checkpointing gives them no second time.
        tensors, (cosines, *with_margin) = saved[: len(needed)], saved[len(needed) :]
        with full_precision(grad.device):
            if torch.is_grad_enabled():  # A gradient of the gradient is wanted: autograd's own, of the plain formula.
                # Of views, as the gradient must not go on into what features have in common.
                tensors = [x.view_as(x) for x in tensors]
                rows = [x if center is None else x - center for x, center in zip(tensors[:half], centers, strict=True)]
                logits = _differentiable(plan, with_margin[1] if with_margin else None, rows, tensors[half:])
                wanted = [x for x, need in zip(tensors, needed, strict=True) if need]
                grads = iter(torch.autograd.grad(logits, wanted, grad, create_graph=True, materialize_grads=True))
                return *none, *[next(grads) if need else None for need in needed]
            if with_margin:
                cosine, labels = with_margin
                grad = _before_margin(grad, cosine, labels, plan.margin).mul_(plan.factor)  # A copy.
            else:
                grad = grad * plan.factor
            pairs = []
            for m, share in enumerate(plan.shares):
                own = tensors[m], centers[m], tensors[half + m], ctx.norms[m]
                pairs.append(_gradients(share, plan.places[:, m], *own, grad, cosines, needed[m], needed[half + m]))
            return *none, *chain(*zip(*pairs, strict=True))


def _gradients(
    share: Share,
    places: Tensor,
    x: Tensor,
    center: Tensor | None,
    w: Tensor,
    norm: Tensor,
    grad: Tensor,
    cosines: Tensor,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """One modality's gradients. Each loses its part along the vector, whose length does not count."""
    unit, inverse = _entries(share, x, center)
    grad = grad.index_select(0, share.rows)
    along = grad * cosines.narrow(0, 1 + share.first, len(unit))
    to_w = torch.empty_like(w) if need_w else None
    to_x = x.new_empty(1 + len(unit), x.shape[1]) if need_x else None
    steps = None if to_x is None else to_x[1:]
    if share.padding is not None:
        g, a, u = (_padded(t, share.padding.slots) for t in (grad, along, unit))
        g.mul_(norm[:, None])
        if steps is not None:
            torch.index_select(g.bmm(w).flatten(0, 1), 0, share.padding.place, out=steps)
        if to_w is not None:
            torch.bmm(g.mT, u, out=to_w).addcmul_(w, (norm.square() * a.sum(1))[:, :, None], value=-1)
    elif to_w is not None:
        for v in set(range(len(w))).difference(v for v, _ in share.alone):
            to_w[v].zero_()
    for v, here in share.alone:
        block, inverse_v = w[v], norm[v]
        g = grad[here].mul_(inverse_v)  # In place: grad is a copy.
        if steps is not None:
            torch.mm(g, block, out=steps[here])
        if to_w is not None:
            length = along[here].sum(0).mul_(inverse_v).mul_(inverse_v)
            torch.mm(g.T, unit[here], out=to_w[v]).addcmul_(block, length[:, None], value=-1)
    if to_x is None or steps is None:
        return None, to_w
    to_x[0].zero_()  # That of what is missing.
    steps.addcmul_(unit, along.sum(1, keepdim=True), value=-1).mul_(inverse)
    return to_x.index_select(0, (places - share.first).clamp_(min=0)), to_w


def _before_margin(grad: Tensor, cosine: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """The gradient with respect to the logits without margins."""
    if labels.is_floating_point():
        labels = labels.to(cosine.dtype)
        return grad * (labels * phi_slope(cosine, margin) + (1 - labels))
    target = labels.clamp(min=0)[:, None]
    slope = torch.where(labels[:, None] >= 0, phi_slope(cosine, margin), 1)
    return grad.scatter(1, target, grad.gather(1, target) * slope)


def _differentiable(plan: Plan, labels: Tensor | None, rows: Sequence[Tensor], prototypes: Sequence[Tensor]) -> Tensor:
    parts, first = [], 1
    for x, p, block in zip(rows, prototypes, plan.block.T, strict=True):
        parts.append(case_cosine(x, p, (block - first).clamp(min=0), block > 0))
        first += len(p)
    factor, scale, margin = (x.clone() for x in (plan.factor, plan.scale, plan.margin))  # Not of inference mode.
    logits = reduce(torch.add, parts) * factor
    if labels is None:
        return logits
    return scale * add_angular_margin(logits / scale, labels, margin[:, 0])
