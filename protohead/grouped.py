"""The logits on the CPU: the rows that share a block of prototypes are multiplied by it together.

The cost is that of what the rows have. The formula is that of :mod:`protohead.functional`, in one autograd function:
no normalised copy of the prototypes is made or saved, the products are scaled by inverse norms instead, and each
gradient is written once.
"""

import math
import weakref
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from protohead.functional import add_angular_margin, case_cosine, full_precision, phi_with_slope
from protohead.plan import Plan, Share

__all__ = ["RememberedNorms", "grouped_logits", "inverse_norm"]

SMALL = 2**17  # Of fewer numbers to make the norms costs no more than to recognise them.

CHUNK = 2**17  # Prototypes' numbers that are multiplied at a time where only the sum of the products is wanted.


def grouped_logits(
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    plan: Plan,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    norms: Sequence[Tensor] | None = None,
    centers: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits of rows by the blocks of prototypes that score them, with margins where there are labels.

    Args:
        rows: M tensors (B, D_m) of features, all of the prototypes' dtype.
        prototypes: M tensors (V_m, K, D_m).
        plan: Which blocks score a row. One that none scores gets zeros.
        labels: As in :func:`protohead.functional.add_angular_margin`.
        bias: (K,), added to the rows that anything scores.
        norms: The :func:`inverse_norm` of the prototypes, M tensors (V_m, K), where they are known.
        centers: M tensors (D_m,) that are subtracted from the rows and take no gradient.

    Returns:
        (B, K).

    Example:
        >>> rows = [torch.zeros(2, 2), torch.tensor([[0.0], [5.0]])]
        >>> prototypes = [torch.eye(2)[None], torch.ones(1, 2, 1)]
        >>> from protohead.plan import Plan
        >>> constants = torch.tensor([[2.0, 2.0], [4.0, 4.0], [0.0, 0.0], [1.0, 1.0]])[:, :, None]
        >>> plan = Plan.of(torch.tensor([[False, True], [False, True]]), constants, blocks=[1, 1])
        >>> grouped_logits(rows, prototypes, plan)
        tensor([[0., 0.],
                [2., 2.]])
    """
    if norms is None:
        norms = [inverse_norm(p.detach()) for p in prototypes]
    if centers is None:
        centers = [None] * len(rows)
    if not torch.is_grad_enabled():
        return _score(plan, labels, bias, norms, centers, rows, prototypes)[0]
    result: Tensor = _GroupedLogits.apply(plan, labels, norms, centers, bias, *rows, *prototypes)
    return result


def inverse_norm(x: Tensor, keepdim: bool = False) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 1 for a zero vector, as in ``functional.normalize``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=keepdim)
    return norm.reciprocal_().nan_to_num_(nan=math.nan, posinf=1.0)


class RememberedNorms:
    """The :func:`inverse_norm` of prototypes in inference, remembered until these change."""

    def __init__(self) -> None:
        self._known: tuple[list[Any], list[weakref.ref[Tensor]], list[Tensor], list[Tensor]] | None = None

    def __call__(self, prototypes: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """The norms of `prototypes`, which are the parameters `own` in the dtype that is computed in."""
        if sum(p.numel() for p in own) < SMALL or any(p.is_inference() for p in own):
            return [inverse_norm(p) for p in prototypes]
        key = [prototypes[0].dtype, *[(p.data_ptr(), p._version) for p in own]]
        some, known = [_some(p) for p in own], self._known
        if (
            known is None
            or known[0] != key
            or any(ref() is not p for ref, p in zip(known[1], own, strict=True))
            or not all(map(torch.equal, known[2], some))
        ):
            norms = [inverse_norm(p) for p in prototypes]
            self._known = known = key, [weakref.ref(p) for p in own], [x.clone() for x in some], norms
        return known[3]


def _some(x: Tensor) -> Tensor:
    """Numbers of each row and each column of a matrix (..., D): a write to `.data` leaves the version, hardly them."""
    width = x.shape[-1]
    step = max(1, min(width - 1, x.numel() // width))
    while math.gcd(step, width) > 1:
        step -= 1
    return x.flatten()[::step]


def _entries(share: Share, x: Tensor, center: Tensor | None) -> Tensor:
    """The rows that a modality scores, centered, (N, D_m)."""
    if share.rows is None:
        return x if center is None else x - center
    entries = x.index_select(0, share.rows)
    return entries if center is None else entries.sub_(center)


def _score(
    plan: Plan,
    labels: Tensor | None,
    bias: Tensor | None,
    norms: Sequence[Tensor],
    centers: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor | None]]:
    """The logits, and what the backward pass takes over.

    The slope of the margins, of the one labelled class (B, 1), or of all (B, K); of each modality the inverse norms of
    its entries, (N, 1), and their cosines, (N, K), where these are much smaller than the prototypes.
    """
    out, inverses, kept = rows[0].new_zeros(len(plan.factor), prototypes[0].shape[1]), [], list[Tensor | None]()
    room = torch.empty_like(out)  # For the products of one modality after the other: new memory would cost as much.
    for share, x, center, w, norm in zip(plan.shares, rows, centers, prototypes, norms, strict=True):
        entries = _entries(share, x, center)
        inverses.append(inverse_norm(entries, keepdim=True))
        cosines = room[: len(entries)]
        if keep := 2 * cosines.numel() < w.numel():
            cosines = torch.empty_like(cosines)
        if share.padding is not None:
            padded = _padded(entries, share.padding.slots).bmm(w.mT).mul_(norm[:, None]).flatten(0, 1)
            torch.index_select(padded, 0, share.padding.place, out=cosines)
        for v, here in share.alone:
            torch.mm(entries[here], w[v].T, out=cosines[here]).mul_(norm[v])
        cosines.mul_(inverses[-1])
        out.add_(cosines) if share.rows is None else out.index_add_(0, share.rows, cosines)
        kept.append(cosines if keep else None)
        del entries, cosines  # The next modality's take their place in the caches.
    out.mul_(plan.factor)
    slope = None
    if labels is not None and labels.is_floating_point():
        labels, z = labels.to(out.dtype), out.div_(plan.scale)
        value, slope = phi_with_slope(z, plan.margin)
        out = z.lerp_(value, labels).mul_(plan.scale)
        slope = torch.lerp(slope.new_ones(()), slope, labels)
    elif labels is not None:
        target, known = labels.clamp(min=0)[:, None], labels[:, None] >= 0
        z = out.gather(1, target)
        value, slope = phi_with_slope(z / plan.scale, plan.margin)
        out.scatter_(1, target, torch.where(known, plan.scale * value, z))
        slope = torch.where(known, slope, 1)
    return out if bias is None else out.addcmul_(plan.scored, bias), slope, inverses, kept


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
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        half = len(tensors) // 2
        out, slope, inverses, cosines = _score(plan, labels, bias, norms, centers, tensors[:half], tensors[half:])
        ctx.plan, ctx.norms, ctx.centers = plan, norms, centers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, slope, bias, *inverses, *cosines, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        none, needed = (None,) * 4, ctx.needs_input_grad[4:]
        if grad is None:
            return *none, *[None for _ in needed]
        plan, centers = ctx.plan, ctx.centers
        labels, slope, bias, *saved = ctx.saved_tensors  # Once: activation checkpointing gives them no second time.
        half = len(saved) // 4
        inverses, cosines, tensors = saved[:half], saved[half : 2 * half], saved[2 * half :]
        with full_precision(grad.device):
            if torch.is_grad_enabled():  # A gradient of the gradient is wanted: autograd's own, of the plain formula.
                # Of views, as the gradient must not go on into what features have in common.
                tensors = [x.view_as(x) for x in tensors]
                rows = [x if center is None else x - center for x, center in zip(tensors[:half], centers, strict=True)]
                logits = _differentiable(plan, labels, bias, rows, tensors[half:])
                wanted = [x for x, need in zip([bias, *tensors], needed, strict=True) if need]
                grads = iter(torch.autograd.grad(logits, wanted, grad, create_graph=True, materialize_grads=True))
                return *none, *[next(grads) if need else None for need in needed]
            to_bias = grad.T.mv(plan.scored[:, 0]) if needed[0] else None
            grad = grad * plan.factor  # A copy.
            if slope is not None and labels.is_floating_point():
                grad.mul_(slope)
            elif slope is not None:
                target = labels.clamp(min=0)[:, None]
                grad.scatter_(1, target, grad.gather(1, target).mul_(slope))
            pairs = []
            for m, share in enumerate(plan.shares):
                own = tensors[m], inverses[m], cosines[m], centers[m], tensors[half + m], ctx.norms[m]
                pairs.append(_gradients(share, *own, grad, needed[1 + m], needed[1 + half + m]))
            return *none, to_bias, *chain(*zip(*pairs, strict=True))


def _gradients(
    share: Share,
    x: Tensor,
    inverse: Tensor,
    cosines: Tensor | None,
    center: Tensor | None,
    w: Tensor,
    norm: Tensor,
    grad: Tensor,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """One modality's gradients. Each loses its part along the vector, whose length does not count."""
    entries, g = _entries(share, x, center), grad if share.rows is None else grad.index_select(0, share.rows)
    along = None if cosines is None else g * cosines  # Its sums are what the gradients have along the vectors.
    g = g * inverse if share.rows is None else g.mul_(inverse)
    to_w = torch.empty_like(w, memory_format=torch.contiguous_format) if need_w else None  # For views that are written.
    steps = torch.empty_like(entries) if need_x else None
    if share.padding is not None:
        padded = _padded(g, share.padding.slots).mul_(norm[:, None])
        if steps is not None:
            torch.index_select(padded.bmm(w).flatten(0, 1), 0, share.padding.place, out=steps)
        if to_w is not None:
            torch.bmm(padded.mT, _padded(entries, share.padding.slots), out=to_w)
            sums = None if along is None else _padded(along, share.padding.slots).sum(1).flatten()
            _remove_along(w.flatten(0, 1), to_w.flatten(0, 1), norm.flatten(), sums)
    elif to_w is not None and len(share.alone) < len(w):
        for v in set(range(len(w))).difference(v for v, _ in share.alone):
            to_w[v].zero_()
    for v, here in share.alone:
        part = g[here].mul_(norm[v])
        if steps is not None:
            torch.mm(part, w[v], out=steps[here])
        if to_w is not None:
            sums = None if along is None else along[here].sum(0)
            _remove_along(w[v], torch.mm(part.T, entries[here], out=to_w[v]), norm[v], sums)
    if steps is None:
        return None, to_w
    _remove_along(entries, steps, inverse[:, 0], None if along is None else along.sum(1))
    return steps if share.rows is None else torch.zeros_like(x).index_copy_(0, share.rows, steps), to_w


def _remove_along(w: Tensor, grad: Tensor, norm: Tensor, along: Tensor | None) -> None:
    """Take from the gradient of each of N vectors (N, D) its part along the vector, in place.

    `along` (N,) are the products of the two, where they are known.
    """
    step = len(w) if along is not None else max(1, CHUNK // w.shape[1])
    for i in range(0, len(w), max(1, step)):
        x, g, n = w[i : i + step], grad[i : i + step], norm[i : i + step]
        product = torch.linalg.vecdot(x, g) if along is None else along
        g.addcmul_(x, product.mul_(n).mul_(n)[:, None], value=-1)


def _differentiable(
    plan: Plan, labels: Tensor | None, bias: Tensor | None, rows: Sequence[Tensor], prototypes: Sequence[Tensor]
) -> Tensor:
    scores = plan.scores.split([len(p) for p in prototypes])
    own = [(block.long().argmax(0), block.any(0)) for block in scores]  # Of a modality: which scores a row, if any.
    parts = [case_cosine(x, p, *block) for x, p, block in zip(rows, prototypes, own, strict=True)]
    logits = reduce(torch.add, parts) * plan.factor
    if labels is not None:
        logits = plan.scale * add_angular_margin(logits / plan.scale, labels, plan.margin[:, 0])
    return logits if bias is None else logits + plan.scored * bias
