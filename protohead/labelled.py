"""What :mod:`protohead.metrics` accepts: rows with labels, checked, on the CPU."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protohead.inputs import check_finite, check_labels, read_present

__all__ = ["Batch", "Labels", "one_hot", "read_batch", "read_labels"]


class Labels(NamedTuple):
    """The labels of N rows."""

    labels: Tensor  # (N, K) bool: the classes that each row is labelled with.
    kept: Tensor  # (N,) bool: the rows whose label is not -100.
    multilabel: bool  # Whether a row may have several labels.


class Batch(NamedTuple):
    """Rows with labels, without those that are left out."""

    logits: Tensor  # (N, K) float64
    labels: Tensor  # (N, K) bool
    present: Tensor  # (N, M) bool
    multilabel: bool


def read_batch(logits: Tensor, labels: Tensor, present: Tensor, modalities: Sequence[str]) -> Batch:
    """Check a batch as :func:`protohead.metrics.evaluate` takes it; return its rows without those labelled -100."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"Expected argument `logits` to be a floating-point tensor, but got {got}.")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"Expected argument `logits` to be of shape (N, K), but got {tuple(logits.shape)}.")
    present = read_present(present, modalities)
    if len(present) != len(logits):
        raise ValueError(f"Expected one batch size, but got {len(logits)} rows of logits, {len(present)} of `present`.")
    batch, num_classes = logits.shape
    labels, kept, multilabel = read_labels(labels, batch, num_classes)
    logits = logits.detach().cpu().double()
    check_finite("logits", logits, kept)
    if not kept.any():
        raise ValueError(f"Expected at least one row with a label other than -100, but got none of {batch}.")
    _refuse_probabilities(logits[kept], multilabel)
    return Batch(logits[kept], labels[kept], present.cpu()[kept], multilabel)


def _refuse_probabilities(logits: Tensor, multilabel: bool) -> None:
    """Of probabilities the softmax or sigmoid, and all scores of it, would be others."""
    if ((logits < 0) | (logits > 1)).any() or not logits.any():
        return
    sums = logits.sum(1)  # In half precision they are one to two digits.
    if multilabel and logits.numel() >= 20:  # So many logits are not all in [0, 1] by chance.
        raise ValueError(
            "Expected argument `logits` to be logits, but got probabilities: all are in [0, 1]. "
            "Give `torch.logit` of them."
        )
    if logits.shape[1] > 1 and ((sums - 1).abs() < 0.01).all():
        raise ValueError(
            "Expected argument `logits` to be logits, but got probabilities: all rows are in [0, 1] and sum to one. "
            "Their logarithm is as good as the logits of softmax."
        )


def read_labels(labels: Tensor, batch: int, num_classes: int) -> Labels:
    """Check labels: (N,) int64, one a row; or (N, K) of 0 and 1 in any dtype, several a row."""
    multilabel = isinstance(labels, Tensor) and labels.dim() == 2
    if isinstance(labels, Tensor):
        labels = labels.cpu()  # There check_labels looks at the values, too.
    if multilabel:
        labels = labels.double()
    check_labels(labels, batch, num_classes)
    if not multilabel:
        return Labels(one_hot(labels, num_classes), labels != -100, False)
    if (soft := (labels != 0) & (labels != 1)).any():
        row, k = soft.nonzero()[0].tolist()
        raise ValueError(f"Expected argument `labels` to be 0 or 1, but got {labels[row, k]} in row {row}.")
    return Labels(labels == 1, torch.ones(batch, dtype=torch.bool), True)


def one_hot(index: Tensor, num_classes: int) -> Tensor:
    """(N, K) bool; an index below 0 is in no column."""
    return index[:, None] == torch.arange(num_classes)
