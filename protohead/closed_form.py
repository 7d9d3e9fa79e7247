"""Prototypes in closed form: class means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from protohead.cosine import centered, normalize

__all__ = ["class_means"]


@torch.no_grad()
def class_means(
    features: Sequence[Tensor],
    labels: Tensor,
    present: Tensor,
    num_classes: int,
    centers: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """The normalised mean of each class's normalised features (weight imprinting, arXiv 1712.07136).

    Args:
        features: M tensors (N, D_m).
        labels: (N,) int64, where -100 is ignored; or (N, K) float in [0, 1], which weigh the rows.
        present: (N, M) bool.
        num_classes: K.
        centers: M tensors (D_m,) that are subtracted from the features.

    Returns:
        M tensors (K, D_m); zeros for a class that no row with the modality has, or whose rows cancel.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 5.0], [7.0, 7.0]])
        >>> class_means([x], torch.tensor([0, 0, 1]), torch.tensor([[True], [True], [False]]), 2)
        [tensor([[0.7071, 0.7071],
                [0.0000, 0.0000]])]
    """
    if not labels.is_floating_point():
        labels = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    if centers is None:
        centers = [None] * len(features)
    means = []
    for x, here, center in zip(features, present.T[:, :, None], centers, strict=True):
        rows = normalize(centered(torch.where(here, x, 0), center)[0])
        means.append(normalize(torch.where(here, labels, 0).to(x.dtype).T @ rows))
    return means
