"""A temperature for each missing case: what to divide logits by, so that probabilities match frequencies."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from protohead.cases import case_masks, case_names, nearest_case
from protohead.labelled import read_batch
from protohead.options import check_count

__all__ = ["fit_temperature"]

MAX_LOG_T = math.log(100)  # log T is sought from -MAX_LOG_T to MAX_LOG_T.


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    present: Tensor,
    modalities: Sequence[str],
    cases: Sequence[str] | None = None,
    min_rows: int = 20,
) -> dict[str, float]:
    """For each case the temperature T > 0 that makes ``logits / T`` fit best (Guo et al., arXiv 1706.04599).

    T minimises cross-entropy, or binary cross-entropy with several labels, over the case's rows: take them from
    validation. Predictions of one label stay as they are, and so do those of several at a threshold of 0.5. The
    logits of a head with ``centered=False`` are cosines times ``head.scale``, which takes T in, after training: see the
    example. Where there is a bias, which T divides too, divide the logits.

    Args:
        logits: As in :func:`protohead.metrics.evaluate`.
        labels: As in :func:`protohead.metrics.evaluate`.
        present: As in :func:`protohead.metrics.evaluate`.
        modalities: As in :func:`protohead.metrics.evaluate`.
        cases: The cases whose prototypes gave the logits: ``head.seen_cases`` for a head in eval mode. All by default.
            Rows of any other case count as those of the nearest (:func:`protohead.cases.nearest_case`).
        min_rows: A case with fewer gets the temperature of all rows together.

    Returns:
        Name of each of `cases`, in order, to T in [0.01, 100]; 1 where the logits say nothing at any T.

    Raises:
        ValueError: As :func:`protohead.metrics.evaluate`; also if a case is unknown or named twice, or there is none.
        TypeError: As :func:`protohead.metrics.evaluate`.

    Warns:
        UserWarning: If a case's T is at a bound, since its rows give none: all are right, or the logits no better than
            chance.

    Example:
        >>> from protohead import DecoupledPrototypeHead
        >>> widths = {"image": 3, "text": 3}
        >>> head = DecoupledPrototypeHead(widths, num_classes=3, cases="all", scale=32, centered=False)
        >>> labels = torch.arange(90) % 3
        >>> noise = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
        >>> features = torch.eye(3)[labels].repeat(1, 2) + noise
        >>> present = torch.tensor([[True, True], [True, False], [False, True]]).repeat_interleave(30, 0)
        >>> _ = head.imprint(features, labels, present, shrinkage=1)
        >>> logits = head.eval()(features, present).detach()
        >>> temperatures = fit_temperature(logits, labels, present, head.modalities, head.seen_cases)
        >>> {case: round(T, 1) for case, T in temperatures.items()}
        {'image+text': 8.8, 'image': 16.9, 'text': 17.2}
        >>> for case, T in temperatures.items():
        ...     head.scale[head.cases.index(case)] /= T
        >>> torch.allclose(head(features, present)[0], logits[0] / temperatures["image+text"], atol=1e-5)
        True
    """
    check_count("min_rows", min_rows)
    batch = read_batch(logits, labels, present, modalities)
    names = case_names(modalities)
    allowed = _read_cases(cases, names)
    index = nearest_case(batch.present, case_masks(modalities), torch.tensor(allowed))
    if batch.multilabel:
        excess = torch.where(batch.labels, -batch.logits, batch.logits)  # How far each logit is on the wrong side of 0.
    else:
        excess = batch.logits - batch.logits[batch.labels][:, None]  # How far each is above the logit of the label.
    temperatures = {}
    for c, name in enumerate(names):
        if allowed[c]:
            rows = excess[index == c]
            temperatures[name] = _temperature(name, rows if len(rows) >= min_rows else excess, batch.multilabel)
    return temperatures


def _read_cases(cases: Sequence[str] | None, known: tuple[str, ...]) -> list[bool]:
    """Whether each known case is among `cases`."""
    if cases is None:
        return [True] * len(known)
    chosen = [cases] if isinstance(cases, str) else list(cases)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise ValueError(f"Expected `cases` to be among {known}, at least one and none twice, but got {chosen}.")
    return [name in chosen for name in known]


def _temperature(case: str, excess: Tensor, multilabel: bool) -> float:
    """The T of least loss: the loss is convex in 1/T, and its slope is 0 there. Halves an interval of log T."""
    low, high = -MAX_LOG_T, MAX_LOG_T
    for _ in range(50):
        middle = (low + high) / 2
        scaled = excess * math.exp(-middle)
        probability = scaled.sigmoid() if multilabel else scaled.softmax(1)
        slope = (excess * probability).sum().item()
        if middle == slope == 0:
            return 1.0
        low, high = (middle, high) if slope > 0 else (low, middle)
    if low == -MAX_LOG_T or high == MAX_LOG_T:
        why = "(almost) all rows are right" if low == -MAX_LOG_T else "the logits are no better than chance"
        warnings.warn(f"The temperature of {case!r} is at its bound, {math.exp(middle):g}: {why}.", stacklevel=3)
    return math.exp(middle)
