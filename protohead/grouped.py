"""The logits on the CPU: the rows of one missing case are multiplied together, at the cost of what the rows have.

The formula is that of :mod:`protohead.functional`, in one autograd function: no normalised copy of the prototypes is
made or saved, the products are scaled by inverse norms instead, and each gradient is written once.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protohead.functional import add_angular_margin, margin_slope, normalize

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
        >>> prototypes = [torch.eye(2)[None], torch.ones(1, 2, 2)]
        >>> rows = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])]
        >>> groups = [Group([1], ((0, 0), (1, 0)), scale=4.0, margin=0.0)]
        >>> grouped_logits(rows, prototypes, groups)
        tensor([[0., 0.],
                [2., 2.]])
    """
    if norms is None:
        norms = [inverse_norm(p.detach()) for p in prototypes]
    if not torch.is_grad_enabled():
        return _score(groups, labels, norms, rows, prototypes, None)
    result: Tensor = _GroupedLogits.apply(groups, labels, norms, *rows, *prototypes)[0]
    return result


def inverse_norm(x: Tensor) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 0 for a zero vector."""
    return torch.linalg.vector_norm(x, dim=-1).reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)


def _score(
    groups: Sequence[Group],
    labels: Tensor | None,
    norms: Sequence[Tensor],
    rows: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    saved: list[Tensor] | None,
) -> Tensor:
    """The logits; what the backward pass needs of them is appended to `saved`."""
    batch = len(rows[0])
    out = rows[0].new_zeros(batch, prototypes[0].shape[1])
    for group in groups:
        index = _index(group, batch, out.device)
        logits, share = None, group.scale / len(group.parts)
        for m, v in group.parts:
            x = _take(rows[m], index)
            part = (x * inverse_norm(x)[:, None]) @ prototypes[m][v].T
            part *= norms[m][v] * share
            if saved is not None:
                saved.append(part)
            logits = part if logits is None else logits + part
        assert logits is not None
        if labels is not None:
            cosine, mine = logits / group.scale, _take(labels, index)
            if saved is not None:
                saved.append(cosine)
            logits = group.scale * add_angular_margin(cosine, mine, cosine.new_full((len(mine),), group.margin))
        elif index is None and len(group.parts) == 1 and saved is not None:
            logits = logits.clone()  # What is saved is no output.
        out = logits if index is None else out.index_copy_(0, index, logits)
    return out


class _GroupedLogits(torch.autograd.Function):
    @staticmethod
    def forward(groups: Sequence[Group], labels: Tensor | None, norms: Sequence[Tensor], *tensors: Tensor) -> Any:
        saved: list[Tensor] = []
        half = len(tensors) // 2
        return _score(groups, labels, norms, tensors[:half], tensors[half:], saved), *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.groups, ctx.labels, ctx.norms, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return None, None, None, *[None for _ in needed]
        tensors, saved = ctx.saved_tensors[: len(needed)], iter(ctx.saved_tensors[len(needed) :])
        if torch.is_grad_enabled():  # A gradient of the gradient is wanted: autograd's own, of the plain formula.
            return None, None, None, *_differentiable(ctx.groups, ctx.labels, tensors, needed, grad)
        half = len(tensors) // 2
        grads = [_buffer(x, need, i < half) for i, (x, need) in enumerate(zip(tensors, needed, strict=True))]
        written = set()
        for group in ctx.groups:
            index = _index(group, len(grad), grad.device)
            g, share = _take(grad, index), group.scale / len(group.parts)
            parts = [next(saved) for _ in group.parts]
            if ctx.labels is not None:
                g = margin_slope(g, next(saved), _take(ctx.labels, index), group.margin)
            for (m, v), part in zip(group.parts, parts, strict=True):
                x, w, norm = _take(tensors[m], index), tensors[half + m][v], ctx.norms[m][v]
                inverse = inverse_norm(x)[:, None]
                unit = x * inverse
                along, per_class = g * part, g * (norm * share)
                # Each gradient loses its part along the vector, whose length does not count.
                if (to := grads[m]) is not None:
                    step = (per_class @ w).addcmul_(unit, along.sum(1, keepdim=True), value=-1).mul_(inverse)
                    to.copy_(step) if index is None else to.index_copy_(0, index, step)
                if (to := grads[half + m]) is not None:
                    # Two groups may share a block, where a case without prototypes falls back.
                    torch.addmm(to[v], per_class.T, unit, beta=float((m, v) in written), out=to[v])
                    to[v].addcmul_(w, (norm.square() * along.sum(0))[:, None], value=-1)
                    written.add((m, v))
        for m, to in enumerate(grads[half:]):
            for v in range(0 if to is None else len(to)):
                if (m, v) not in written:
                    to[v].zero_()
        return None, None, None, *grads


def _index(group: Group, batch: int, device: torch.device) -> Tensor | None:
    """The group's rows; None where these are all."""
    return None if len(group.rows) == batch else torch.tensor(group.rows, device=device)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _buffer(x: Tensor, need: bool, zeros: bool) -> Tensor | None:
    """Rows that are in no group get zeros; each block of the prototypes is written, or zeroed, later."""
    if not need:
        return None
    return torch.zeros_like(x) if zeros else torch.empty_like(x)


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
