"""Warnings, once for each head, of one that is used as if it were trained, and of what trains silently less."""

import warnings
from functools import partial

import torch
from torch import Tensor

from protohead.context import is_eager

__all__ = ["warn_of_eval_mode", "warn_of_random_prototypes", "warn_of_unlearned_center"]


def warn_of_random_prototypes(due: set[str], seen: Tensor) -> None:
    """In eval mode, where training has seen no case. The marks are read at the first call only: that may wait.

    Args:
        due: The warnings that have not been given; this one is taken away.
        seen: The head's marks.
    """
    if "random" not in due or not is_eager():
        return
    due.discard("random")
    if not seen.any():
        warnings.warn(
            "This head is in eval mode and has seen no training: its prototypes are random, which is right before "
            "training only. Otherwise train it in train mode or imprint it, or load its checkpoint after it was put "
            "into the model.",
            stacklevel=5,
        )


def warn_of_unlearned_center(due: set[str], center_rows: Tensor, logits: Tensor) -> None:
    """Where a loss of the user's own is backpropagated through logits with margins, and the center was never learned.

    Args:
        due: The warnings that have not been given; this one is taken away.
        center_rows: How many rows the center is the mean of.
        logits: They have not been backpropagated through yet.
    """
    if "center" in due and logits.requires_grad and is_eager():
        logits.register_hook(partial(_check_center, due, center_rows))


def _check_center(due: set[str], center_rows: Tensor, grad: Tensor) -> None:
    if "center" not in due:
        return
    due.discard("center")
    if not center_rows.any():
        warnings.warn(
            "This head is trained through its logits, but its center has never been learned, nor are sub-cases "
            "trained: only `head.loss(features, present, labels)`, or `objective=`, does that. `centered=False` makes "
            "a head without a center, as the paper's.",
            stacklevel=5,
        )


def warn_of_eval_mode(parameters_are_trained: bool) -> None:
    """In eval mode where gradients of the objective are recorded."""
    if parameters_are_trained and torch.is_grad_enabled():
        warnings.warn(
            "Expected training mode: in eval mode no case is marked as seen, nor the center learned; call train(). The "
            "loss of validation rows is computed under torch.no_grad().",
            stacklevel=7,
        )
