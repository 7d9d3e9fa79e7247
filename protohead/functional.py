"""The formulas of Decoupled Prototype Learning (arXiv 2505.08283), without state.

:func:`prototype_logits` has the logits of a batch. Everything here is computed in the dtype that it is given: the head
calls it in float32 or wider, outside autocast, since cosines reach 1 early in half precision.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protohead.context import is_readable
from protohead.cosine import case_cosine, normalize

__all__ = [
    "add_angular_margin",
    "case_cosine",
    "modality_logits",
    "normalize",
    "phi",
    "prototype_contrast",
    "prototype_logits",
]

CHUNK = 2**22  # Similarities held at a time in the prototype loss: 16 MiB of float32.


def prototype_logits(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    block: Tensor,
    scale: Tensor,
    margin: Tensor | None = None,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    centers: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits of a batch: scale · φ(mean over the modalities of the cosines with the case's prototypes) + bias.

    Args:
        features: M tensors (B, D_m).
        prototypes: M tensors (V_m, K, D_m), one block of class prototypes for each case that holds the modality.
        block: (B, M) int64, the block of each row, -1 where the row lacks the modality; see
            :func:`protohead.cases.block_index`.
        scale: (B,) s of each row.
        margin: (B,) μ of each row, in radians, and
        labels: as in :func:`add_angular_margin`; without both there are no margins.
        bias: (K,).
        centers: M tensors (D_m,) that are subtracted from the features.

    Returns:
        (B, K). Zeros for a row without any modality.

    Example:
        >>> prototypes = [torch.eye(2)[None], torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])]
        >>> features = [torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])]
        >>> block = torch.tensor([[0, 0], [0, -1]])
        >>> prototype_logits(features, prototypes, block, torch.tensor([20.0, 20.0]))
        tensor([[20.,  0.],
                [20.,  0.]])
    """
    if centers is None:
        centers = [None] * len(features)
    each = zip(features, prototypes, block.unbind(1), centers, strict=True)
    count = (block >= 0).sum(1, keepdim=True)
    # One after the other, so that no more than two are held.
    cosine = reduce(torch.add, (case_cosine(*one) for one in each)) / count.clamp(min=1)
    if labels is not None and margin is not None:
        # A row without any modality keeps its zeros.
        cosine = add_angular_margin(cosine, labels, torch.where(count[:, 0] > 0, margin, 0))
    logits = cosine.mul_(scale[:, None])  # Nobody else has it.
    return logits if bias is None else logits.add_((count > 0) * bias)


def modality_logits(
    features: Sequence[Tensor],
    prototypes: Sequence[Tensor],
    block: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    centers: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """What each modality adds to the logits; arguments as in :func:`prototype_logits`.

    Returns:
        (B, M, K), the bias divided among the modalities that a row has.
    """
    if centers is None:
        centers = [None] * len(features)
    cosines = [case_cosine(*one) for one in zip(features, prototypes, block.unbind(1), centers, strict=True)]
    parts = torch.stack(cosines, dim=1) * scale[:, None, None]
    if bias is not None:
        parts = parts + torch.where(block[:, :, None] >= 0, bias, 0)
    return parts / (block >= 0).sum(1).clamp(min=1)[:, None, None]


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
    if is_readable(seen[0]):  # Then what is not seen costs nothing.
        prototypes = [p if s.all() else p[s] for p, s in zip(prototypes, seen, strict=True)]
        seen = [s[s] for s in seen]
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
    similarity = flat[anchors] @ flat.T
    # Not -inf: a row with no contrast at all would put NaN into the backward pass.
    unseen = torch.where(contrasts, 0, -1e30).to(flat.dtype)
    log_sum: Tensor = similarity.mul_(1 / temperature).add_(unseen).scatter_(1, anchors[:, None], -1e30).logsumexp(1)
    return log_sum
