"""The formulas of Decoupled Prototype Learning (arXiv 2505.08283), without state.

Everything here is computed in the dtype it is given: the head calls it in float32 or wider, outside autocast, since
cosines reach 1 early in half precision.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["add_angular_margin", "case_cosine", "normalize", "phi", "phi_with_slope", "prototype_contrast"]

CHUNK = 2**22  # Similarities held at a time in the prototype loss: 16 MiB of float32.


def normalize(x: Tensor) -> Tensor:
    """Scale to length one, x / ‖x‖, along the last dimension; a zero vector stays zero, with a finite gradient.

    Shape:
        (..., D) -> (..., D)

    Example:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def case_cosine(x: Tensor, prototypes: Tensor, block: Tensor, active: Tensor) -> Tensor:
    """Cosines of one modality's features with the prototypes of each row's missing case: ĥ[i,m] · ŵ[m][c_i,k].

    Args:
        x: (B, D) features.
        prototypes: (V, K, D), one block of class prototypes per case that holds this modality.
        block: (B,) int64 in [0, V), the block of each row; where `active` is False, any.
        active: (B,) bool. A row that is not active gets zeros, and what stands in it reaches no gradient.

    Returns:
        (B, K) cosines.

    Example:
        >>> prototypes = torch.eye(2).expand(3, 2, 2)
        >>> x = torch.tensor([[2.0, 0.0], [float("nan"), 1.0]])
        >>> case_cosine(x, prototypes, torch.tensor([2, 0]), torch.tensor([True, False]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    x = normalize(torch.where(active[:, None], x, 0))
    # Scaled afterwards: there is no normalised copy of the prototypes.
    norm = torch.linalg.vector_norm(prototypes, dim=-1)
    every_block = torch.einsum("bd,vkd->bvk", x, prototypes) / torch.where(norm > 0, norm, 1)
    if len(prototypes) == 1:
        return every_block.squeeze(1)
    # Not take_along_dim: it fixes the batch size of an exported graph.
    return every_block.gather(1, block[:, None, None].expand(-1, 1, prototypes.shape[1])).squeeze(1)


def add_angular_margin(cosine: Tensor, labels: Tensor, margin: Tensor) -> Tensor:
    """Add a margin to the angle between each row and its labelled classes: z ← y·φ(z) + (1−y)·z (ArcFace).

    φ(z) = cos(arccos(z) + μ) = z·cos μ − sqrt(1−z²)·sin μ where z > cos(π−μ), else z − μ·sin(π−μ). At |z| = 1 the
    root contributes no gradient instead of an infinite one.

    Args:
        cosine: (B, K).
        labels: (B,) int64, where a negative label leaves its row alone; or (B, K) float in [0, 1], multi-hot or soft.
        margin: (B,) μ of each row, in radians.

    Returns:
        (B, K).

    Example:
        >>> z = add_angular_margin(torch.tensor([[0.5, 0.5]]), torch.tensor([1]), torch.tensor([0.2]))
        >>> torch.arccos(z) - torch.arccos(torch.tensor(0.5))
        tensor([[0.0000, 0.2000]])
    """
    margin = margin[:, None]
    if labels.is_floating_point():
        labels = labels.to(cosine.dtype)
        return labels * phi(cosine, margin) + (1 - labels) * cosine
    target = labels.clamp(min=0)[:, None]
    z = cosine.gather(1, target)
    return cosine.scatter(1, target, torch.where(labels[:, None] >= 0, phi(z, margin), z))


def phi(z: Tensor, margin: Tensor) -> Tensor:
    """The cosine of an angle with the margin added: φ in :func:`add_angular_margin`.

    Args:
        z: Cosines.
        margin: μ in radians, broadcast against them.
    """
    square = 1 - z * z
    inside = square > 0
    sine = torch.where(inside, torch.where(inside, square, 1).sqrt(), 0)
    return torch.where(z > -margin.cos(), z * margin.cos() - sine * margin.sin(), z - margin * margin.sin())


def phi_with_slope(z: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`phi` and its derivative with respect to `z`, for a backward pass that is written by hand."""
    cosine, sine, root = margin.cos(), margin.sin(), (1 - z * z).clamp_(min=0).sqrt_()
    slope, near = (z / root).nan_to_num_(nan=math.nan, posinf=0.0, neginf=0.0), z > -cosine
    value = torch.where(near, z * cosine - root * sine, z - margin * sine)
    return value, torch.where(near, cosine + slope * sine, 1)


def prototype_contrast(
    prototypes: Sequence[Tensor],
    seen: Sequence[Tensor],
    shared_space: bool = False,
    temperature: float = 1.0,
    sample: int | None = None,
) -> Tensor:
    """The prototype loss (PRC): supervised contrastive loss over all prototypes with the class as label.

    The mean over anchors a of −mean over the positives p of log(exp(a·p/τ) / Σ_{q≠a} exp(a·q/τ)), where a, p and q are
    normalised prototypes and the positives are those of the same class in other blocks. Blocks that are not seen are
    neither anchors nor contrasts; an anchor without a positive is left out of the mean. 0 where no anchor has one.
    Memory grows with the number of prototypes, not with its square.

    Args:
        prototypes: One (V, K, D) tensor per modality: V blocks, one per case that holds it.
        seen: One (V,) bool tensor per modality.
        shared_space: Contrast the modalities with each other (one D for all), instead of each within itself.
        temperature: τ.
        sample: Let only the prototypes of this many classes, drawn at random, be anchors: an unbiased estimate of the
            mean, for K in the thousands. All are still contrasts.

    Returns:
        A scalar.

    Example:
        >>> image, text = torch.eye(3).expand(2, 3, 3), torch.eye(3).expand(2, 3, 3)
        >>> both = torch.tensor([True, True])
        >>> prototype_contrast([image, text], [both, both], shared_space=True)  # log(3e + 8) - 1
        tensor(1.7822)
    """
    if shared_space:
        prototypes, seen = [torch.cat(list(prototypes))], [torch.cat(list(seen))]
    parts = [_contrast(normalize(p), s, temperature, sample) for p, s in zip(prototypes, seen, strict=True)]
    total = torch.stack([loss for loss, _ in parts]).sum()
    anchors = torch.stack([count for _, count in parts]).sum()
    return total / anchors.clamp(min=1)


def _contrast(prototypes: Tensor, seen: Tensor, temperature: float, sample: int | None) -> tuple[Tensor, Tensor]:
    """The sum of the anchors' losses, and the number of anchors that have a positive."""
    blocks, classes, _ = prototypes.shape
    if blocks < 2:  # No anchor has a positive.
        return prototypes.sum() * 0, seen.sum() * 0
    # The positives of all anchors of a class, Σ_a Σ_{p≠a} a·p, are ‖Σ a‖² − Σ ‖a‖²: K·V·D, not (K·V)²·D.
    total = torch.where(seen[:, None, None], prototypes, 0).sum(0)
    length = torch.linalg.vector_norm(prototypes.detach(), dim=2)  # 1, or that of a zero vector.
    positives = total.square().sum(1) - torch.where(seen[:, None], length.square(), 0).sum(0)
    flat = rearrange(prototypes, "v k d -> (v k) d")
    anchors = torch.arange(len(flat), device=flat.device)
    if sample is not None and sample < classes:
        drawn = torch.randperm(classes, device=flat.device)[:sample]
        anchors, positives = anchors.view(blocks, classes)[:, drawn].flatten(), positives[drawn]
    contrasts = seen.repeat_interleave(classes)
    chunks = anchors.split(max(1, CHUNK // len(flat)))
    if len(chunks) > 1:  # One block of the similarities is held at a time, and made again in the backward pass.
        sums = [checkpoint(_log_sum, flat, i, contrasts, temperature, use_reentrant=False) for i in chunks]
        log_sum = torch.cat(sums)
    else:
        log_sum = _log_sum(flat, anchors, contrasts, temperature)
    log_sum = rearrange(log_sum, "(v k) -> v k", v=blocks)
    others = seen.sum() - 1
    loss = torch.where(seen[:, None], log_sum, 0).sum() - positives.sum() / others.clamp(min=1) / temperature
    return torch.where(others > 0, loss, 0), torch.where(others > 0, seen.sum() * log_sum.shape[1], 0)


def _log_sum(flat: Tensor, anchors: Tensor, contrasts: Tensor, temperature: float) -> Tensor:
    """The logarithm of Σ_{q≠a} exp(a·q/τ) of some anchors."""
    similarity: Tensor = _Gram.apply(flat) if len(anchors) == len(flat) else flat[anchors] @ flat.T
    # Not -inf: a row with no contrast at all would put NaN into the backward pass.
    unseen = torch.where(contrasts, 0, -1e30).to(flat.dtype)
    log_sum: Tensor = similarity.mul_(1 / temperature).add_(unseen).scatter_(1, anchors[:, None], -1e30).logsumexp(1)
    return log_sum


class _Gram(torch.autograd.Function):
    """x xᵀ, whose gradient autograd computes with two products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x @ x.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return (grad + grad.T) @ x


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
