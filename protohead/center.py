"""The running mean of each modality's features, which stands in the place of the origin."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from protohead.context import is_readable

__all__ = ["split_center", "update_center"]

WINDOW = 10_000  # Rows that the center remembers, so that it follows encoders that are trained.
REMEMBERED = 8  # Rows as which the spread so far counts in the median of a batch: it decides where there are fewer.
FARTHEST = 3  # Times the usual distance from the center: a row that is farther away counts as if it were there.


def split_center(head: Any, dtype: torch.dtype) -> Sequence[Tensor | None]:
    """The center of each modality, (D_m,); None of a head without."""
    if head.center is None:
        return [None] * len(head.modalities)
    centers: Sequence[Tensor] = head.center.to(dtype).split_with_sizes([*head.in_features.values()])
    return centers


@torch.no_grad()
def update_center(
    center: Tensor,
    count: Tensor,
    spread: Tensor,
    features: Sequence[Tensor],
    present: Tensor,
    total: Callable[[Tensor], Tensor],
) -> None:
    """Update in place the running mean of each modality's features, over the rows that have it on any rank.

    What a row can do is bounded: one that is farther from the center than FARTHEST times the usual distance moves it
    no more than one at that distance. So it follows encoders that drift, but not a few rows that have overflowed. The
    usual distance is the mean so far or, where many rows are farther away, the median of the batch.

    Args:
        center: (ΣD_m,) the means.
        count: (M,) of how many rows they are the means; no more than WINDOW, or than a batch has.
        spread: (M,) the mean distance of a row from its center.
        features: M tensors (B, D_m).
        present: (B, M) bool.
        total: Sums over the ranks.
    """
    means = center.split_with_sizes([x.shape[1] for x in features])
    parts = [
        _distances(x, here, mean, number, width)
        for x, here, mean, number, width in zip(features, present.T, means, count, spread, strict=True)
    ]
    sums = [torch.cat([part[0] for part in parts]), *(torch.stack([part[i] for part in parts]) for i in (1, 2))]
    whole = total(torch.cat(sums).to(center.dtype))
    move, rows, distances = whole.split_with_sizes([len(center), len(count), len(count)])
    count.copy_(torch.maximum((count + rows).clamp(max=WINDOW), rows))
    each = count.clamp(min=1)
    for mean, step, number in zip(means, move.split_with_sizes([len(mean) for mean in means]), each, strict=True):
        mean += step / number
    spread += (distances - rows * spread) / each


def _distances(
    x: Tensor, present: Tensor, mean: Tensor, count: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one modality's rows: the bounded sum of their differences from the mean, their number, and their distances."""
    x = x.to(torch.promote_types(x.dtype, mean.dtype))  # The square of 1e19 overflows in float32.
    if is_readable(present):
        x = x[present]
        present = present[present]
    present = present & x.isfinite().all(1)  # One row that has overflowed must not spoil all later ones.
    difference = torch.where(present[:, None], x - mean.to(x.dtype), 0)
    distance = torch.where(present, torch.linalg.vector_norm(difference, dim=1), math.nan)
    known = (torch.arange(REMEMBERED, device=x.device) < count) & (spread > 0)
    median = torch.cat([distance, torch.where(known, spread, math.nan).to(x.dtype)]).nanmedian()
    bounded = distance.clamp(max=FARTHEST * torch.maximum(median, spread.to(x.dtype)))
    # 0 where the distance is 0, infinite or that of no row.
    factor = torch.where(present & (distance > 0), bounded / distance, 0)
    return (factor[:, None] * difference).sum(0), present.sum().to(x.dtype), torch.where(present, bounded, 0).sum()
