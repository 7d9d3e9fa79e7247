"""Probabilities that are true: what turns the logits of each missing case into those that match frequencies.

They are divided by a temperature (Guo et al., arXiv 1706.04599). Where a row may have several labels a number is added,
too (Platt, 1999): the probabilities of a row can all be too high there, as those of softmax cannot.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from protohead.cases import block_index, case_masks, case_names
from protohead.imprint import read_rows
from protohead.moments import Rows
from protohead.sharding import from_all_ranks

__all__ = ["calibrate", "fit_cases"]

MIN_ROWS = 20  # From which rows are enough for a case.
MAX_LOG_T = math.log(100)  # log T is sought from -MAX_LOG_T to MAX_LOG_T,
STEPS = 40  # by halving this interval so often.
CHUNK = 4096  # Rows that the head is given at a time.


@torch.no_grad()
def calibrate(head: Any, features: Any, labels: Tensor | None, present: Any) -> dict[str, float]:
    """See :meth:`protohead.DecoupledPrototypeHead.calibrate`."""
    rows, mode = _gather_rows(head, features, labels, present), head.training
    # By what the head uses: a modality that training never had says nothing.
    used = block_index(rows.present, head._masks > 0, head.seen > 0)[1] >= 0
    if not (says := used.any(1)).any():
        raise ValueError("Expected at least one row with a modality that training has had, but got none.")
    rows, used = rows.take(says), used[says]
    widths = torch.tensor([*head.in_features.values()], device=head.seen.device)

    def logits_of(index: Tensor, case: Tensor | None) -> Tensor:
        parts = []
        for some in index.split(CHUNK):
            here = rows.present[some] if case is None else case.to(some.device).expand(len(some), -1)
            there = here.repeat_interleave(widths, 1)
            parts.append(head(torch.where(there, rows.features[some], 0), here))
        return torch.cat(parts)

    own = head.temperature, head.shift
    try:  # Whatever happens, what was there is put back.
        head.temperature, head.shift = torch.ones_like(own[0]), torch.zeros_like(own[1])
        head.eval()
        found = fit_cases(logits_of, rows.labels, used, head.modalities)
    finally:
        head.temperature, head.shift = own
        head.train(mode)
    place = case_masks(head.modalities).long().to(head.seen.device).unbind(1)
    for buffer, values in zip((head.temperature, head.shift), zip(*found.values(), strict=True), strict=True):
        buffer[place] = buffer.new_tensor(values)
    return {case: temperature for case, (temperature, _) in found.items()}


def fit_cases(
    logits_of: Callable[[Tensor, Tensor | None], Tensor],
    labels: Tensor,
    present: Tensor,
    modalities: Sequence[str],
) -> dict[str, tuple[float, float]]:
    """For each case the temperature T and the number b for which ``logits / T + b`` fit best.

    They minimise the cross-entropy of one label, where b is 0, or the binary cross-entropy of several, over the rows of
    the case, if these are enough; else over the rows that hold the case, as if they had no more; else over all rows.

    Args:
        logits_of: Called with the (n,) indices of some rows and a case, (M,) bool on the CPU: their (n, K) logits if
            they had just its modalities; or, with None, as they are.
        labels: (N,) int64 in [0, K), or (N, K) floating-point in [0, 1].
        present: (N, M) bool.
        modalities: The M names.

    Returns:
        Name of each of the 2^M − 1 cases, in order, to T in [0.01, 100] and b; 1 where the logits say nothing.

    Warns:
        UserWarning: If a T is at a bound, since the rows give none: all are right, or the logits no better than chance.
    """
    found = {}
    for name, mask in zip(case_names(modalities), case_masks(modalities), strict=True):
        case: Tensor | None = mask
        own, holds = (present == mask.to(present.device)).all(1), (present >= mask.to(present.device)).all(1)
        if own.sum() >= MIN_ROWS:
            chosen, case = own, None
        elif holds.sum() >= MIN_ROWS:
            chosen = holds
        else:
            chosen, case = torch.ones_like(own), None
        index = chosen.nonzero()[:, 0]
        found[name] = _fit(logits_of(index, case).double(), labels[index])
    if extreme := {name: t for name, (t, _) in found.items() if abs(math.log(t)) > 0.999 * MAX_LOG_T}:
        warnings.warn(
            f"Temperatures at a bound: {', '.join(f'{name} {t:.3g}' for name, t in extreme.items())}. At 0.01 (almost) "
            "all rows are right, at 100 the logits are no better than chance.",
            stacklevel=5,
        )
    return found


def _fit(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """T and b of least loss. With the best b for each T, the loss is convex in 1/T, and its slope is 0 at the best."""
    several, shift = labels.is_floating_point(), 0.0
    if several:
        labels = labels.double()
        rate = labels.mean().item()
        rate = min(max(rate, 0.5 / labels.numel()), 1 - 0.5 / labels.numel())  # As if half a label were otherwise.
        says_nothing = bool((logits == logits[0, 0]).all())
    else:
        logits = logits - logits.gather(1, labels[:, None])  # How far each is above that of the label.
        says_nothing = not logits.any()
    low, high = -MAX_LOG_T, MAX_LOG_T
    for _ in range(STEPS):
        middle = (low + high) / 2
        scaled = logits * math.exp(-middle)
        if several:
            shift = _shift(scaled, rate, shift)
            slope = (logits * ((scaled + shift).sigmoid() - labels)).sum()
        else:
            slope = (logits * scaled.softmax(1)).sum()
        if says_nothing:
            return 1.0, shift
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp(middle), shift


def _shift(logits: Tensor, rate: float, start: float) -> float:
    """The b for which the probabilities are the rate on average: Newton's steps, within an interval that shrinks."""
    reach = math.log(rate / (1 - rate))
    low, high = reach - logits.max().item(), reach - logits.min().item()
    shift = min(max(start, low), high)
    for _ in range(100):
        probability = (logits + shift).sigmoid()
        error = probability.mean().item() - rate
        low, high = (low, shift) if error > 0 else (shift, high)
        steepness = (probability * (1 - probability)).mean().item()
        step = shift - error / max(steepness, 1e-300)
        step = step if low < step < high else (low + high) / 2
        if abs(step - shift) < 1e-9 * (1 + abs(shift)):
            break
        shift = step
    return shift


def _gather_rows(head: Any, features: Any, labels: Tensor | None, present: Any) -> Rows:
    """The rows that count, those of all ranks."""
    flat = [x for rows in read_rows(head, features, labels, present) for x in rows]
    parts = [rank[i : i + 3] for rank in from_all_ranks(flat) for i in range(0, len(rank), 3)]
    if not parts:
        raise ValueError("Expected at least one row with a label and a modality, but got none.")
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
