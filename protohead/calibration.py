"""Probabilities that are true: what turns the logits of each missing case into those that match frequencies.

They are divided by a temperature (Guo et al., arXiv 1706.04599), which leaves the answers as they are. Where a row may
have several labels, each with a probability of its own, logits below 0 and above 0 have a temperature each, since
cosines have a bound, and a number is added for each class (Platt, 1999; Kull et al., 2017).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protohead.cases import block_index, case_masks, case_names
from protohead.imprint import read_rows
from protohead.moments import Rows
from protohead.sharding import from_all_ranks

__all__ = ["Fit", "calibrate", "fit_cases"]

Fit = tuple[Tensor, Tensor]  # (2,) temperatures, of logits below 0 and above, and the (K,) shifts.

MIN_ROWS = 20  # From which rows are enough for a case.
MAX_LOG_T = math.log(100)  # log T is sought from -MAX_LOG_T to MAX_LOG_T,
STEPS = 40  # by halving this interval so often.
PRIOR = 0.5  # Standard deviation of what is fitted, before a row is seen.
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
        buffer[place] = torch.stack(values).to(buffer)
    return {case: temperature[0].item() for case, (temperature, _) in found.items()}


def fit_cases(
    logits_of: Callable[[Tensor, Tensor | None], Tensor],
    labels: Tensor,
    present: Tensor,
    modalities: Sequence[str],
) -> dict[str, Fit]:
    """For each case the temperatures T and the shifts b for which ``logits / T + b`` fit best.

    They minimise the cross-entropy of one label, where there is one T and b is 0, or the binary cross-entropy of
    several, over the rows of the case, if these are enough; else over the rows that hold the case, as if they had no
    more; else over all rows. A penalty, which many rows outweigh, keeps few rows from moving them far: where all rows
    are right, the loss alone would make each probability 1.

    Args:
        logits_of: Called with the (n,) indices of some rows and a case, (M,) bool on the CPU: their (n, K) logits if
            they had just its modalities; or, with None, as they are.
        labels: (N,) int64 in [0, K), or (N, K) floating-point in [0, 1].
        present: (N, M) bool.
        modalities: The M names.

    Returns:
        Name of each of the 2^M − 1 cases, in order, to T, (2,), of logits below 0 and above, and b, (K,). T is 1 where
        the logits say nothing.
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
        fit = _fit_several if labels.is_floating_point() else _fit_one
        found[name] = fit(logits_of(index, case).double(), labels[index])
    return found


def _fit_one(logits: Tensor, labels: Tensor) -> Fit:
    """Of one label: where the slope by log T is 0. The penalty is that of a normal distribution of log T around 0."""
    none = logits.new_zeros(logits.shape[1])
    logits = logits - logits.gather(1, labels[:, None])  # How far each is above that of the label.
    low, high = -MAX_LOG_T, MAX_LOG_T
    for _ in range(STEPS if logits.any() else 0):
        middle = (low + high) / 2
        steep = math.exp(-middle)
        slope = steep * (logits * (logits * steep).softmax(1)).sum() - middle / PRIOR**2
        low, high = (middle, high) if slope > 0 else (low, middle)
    return logits.new_full((2,), math.exp((low + high) / 2)), none


def _fit_several(logits: Tensor, labels: Tensor) -> Fit:
    """Of several labels: by L-BFGS, from the temperature that makes the standard deviation of the logits 1.

    The penalty is that of a normal distribution of log T around this, of the other log T around the first, and of each
    class's shift around the common one. So few rows move them little, and no rows make them infinite. The gradients are
    written out, since autograd does not work in `torch.inference_mode`.
    """
    labels, count = labels.double(), labels.numel()
    labels = (count * labels + 0.5) / (count + 1)  # As if half a label were otherwise: the common shift is finite, too.
    spread = (logits - logits[0, 0]).std(correction=0).item() or 1.0
    sides = torch.stack([logits.clamp(max=0), logits.clamp(min=0)]) / spread
    means = sides.mean((1, 2))  # Taken off, so that logits far from 0 do not tie the common shift to the steepness.
    below, above = sides - means[:, None, None]
    x = logits.new_zeros(3 + logits.shape[1])  # The steepness of either side, as logarithms; common shift; by class.
    optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steep = x[:2].exp()
        fitted = steep[0] * below + steep[1] * above + x[2] + x[3:]
        error = fitted.sigmoid() - labels
        slope = torch.stack([(error * below).sum() * steep[0], (error * above).sum() * steep[1], error.sum()])
        off = torch.cat([x[:1], x[1:2] - x[:1], x[3:]]) / PRIOR**2
        x.grad = torch.cat([slope, error.sum(0) + off[2:]])
        x.grad[:2] += torch.stack([off[0] - off[1], off[1]])
        bce = F.binary_cross_entropy_with_logits(fitted, labels, reduction="sum")
        return bce + off.square().sum() * PRIOR**2 / 2

    optimizer.step(loss)
    return spread / x[:2].exp(), x[2] - x[:2].exp() @ means + x[3:]


def _gather_rows(head: Any, features: Any, labels: Tensor | None, present: Any) -> Rows:
    """The rows that count, those of all ranks."""
    flat = [x for rows in read_rows(head, features, labels, present) for x in rows]
    parts = [rank[i : i + 3] for rank in from_all_ranks(flat) for i in range(0, len(rank), 3)]
    if not parts:
        raise ValueError("Expected at least one row with a label and a modality, but got none.")
    return Rows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
