"""The logits of a batch by a head: which prototypes each row gets, and the formulas of functional.py with them."""

from typing import Any

import torch
from torch import Tensor

from protohead.cases import block_index
from protohead.center import split_center
from protohead.context import is_transformed, widest
from protohead.functional import modality_logits, prototype_logits
from protohead.sharding import sum_between_ranks

__all__ = ["head_contributions", "head_logits", "uncalibrate"]


def head_logits(head: Any, rows: list[Tensor], present: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, K) logits, and the (B, M) blocks of prototypes that they are made of, -1 for none.

    In training the cases are marked as seen, and a calibration is forgotten. Predictions are calibrated.

    Args:
        head: The head.
        rows: M tensors (B, D_m).
        present: (B, M) bool.
        labels: As in :meth:`protohead.DecoupledPrototypeHead.forward`.
    """
    case, block = block_index(present, head._masks > 0, None if head.training else head.seen > 0)
    if head.training and not is_transformed():
        new = torch.zeros_like(head.seen).index_add(0, case, (block >= 0).to(head.seen.dtype))
        head.seen += sum_between_ranks(new, head)
        uncalibrate(head)
    prototypes = head.prototypes()
    dtype = widest(*rows, *prototypes)
    weights, bias = [p.to(dtype) for p in prototypes], None if head.bias is None else head.bias.to(dtype)
    margin = None if labels is None else head.margin[case].to(dtype)
    scale, centers = head.scale[case].to(dtype), split_center(head, dtype)
    logits = prototype_logits(rows, weights, block, scale, margin, labels, bias, centers)
    if labels is None and not head.training:
        temperature, shift = _calibration(head, block, logits)
        logits = logits / temperature + shift
    return logits, block


def head_contributions(head: Any, rows: list[Tensor], present: Tensor) -> Tensor:
    """(B, M, K), which sum to the logits; arguments as in :func:`head_logits`."""
    case, block = block_index(present, head._masks > 0, None if head.training else head.seen > 0)
    prototypes = head.prototypes()
    dtype = widest(*rows, *prototypes)
    scale, weights = head.scale[case].to(dtype), [p.to(dtype) for p in prototypes]
    parts = modality_logits(rows, weights, block, scale, head.bias, split_center(head, dtype))
    if head.training:
        return parts
    temperature, shift = (x[:, None] for x in _calibration(head, block, parts.sum(1)))
    used = (block >= 0)[:, :, None]
    return parts / temperature + torch.where(used, shift / used.sum(1, keepdim=True).clamp(min=1), 0)


@torch.no_grad()
def uncalibrate(head: Any) -> None:
    """Take back what :meth:`protohead.DecoupledPrototypeHead.calibrate` found."""
    head.temperature.fill_(1)
    head.shift.zero_()


def _calibration(head: Any, block: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature and shift of each logit, (B, K), by the modalities that are used; 1 and 0 of none."""
    place = (block >= 0).long().unbind(1)
    below, above = head.temperature[place].to(logits.dtype)[:, :, None].unbind(1)
    return torch.where(logits > 0, above, below), head.shift[place].to(logits.dtype)
