"""The training objective of :meth:`DecoupledPrototypeHead.loss`, without state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PROTOTYPE_WEIGHT",
    "SUBCASE_WEIGHT",
    "check_objective",
    "classification_loss",
    "split_modalities",
    "update_mean",
]

PROTOTYPE_WEIGHT = 0.9  # λ of the published MM-IMDb settings.
SUBCASE_WEIGHT = 0.5
WINDOW = 10_000  # Rows that the features' mean remembers, so that it follows encoders that are trained.


def check_objective(objective: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """All four options of the objective, from those that are given."""
    defaults = {
        "prototype_weight": PROTOTYPE_WEIGHT,
        "subcase_weight": SUBCASE_WEIGHT,
        "class_weight": None,
        "label_smoothing": 0.0,
    }
    if not isinstance(objective, Mapping) or set(objective) - set(defaults):
        raise ValueError(f"Expected argument `objective` to map some of {tuple(defaults)}, but got {objective!r}.")
    options: dict[str, Any] = defaults | dict(objective)
    for name, limit in (("prototype_weight", math.inf), ("subcase_weight", math.inf), ("label_smoothing", 1)):
        value = options[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < limit:
            raise ValueError(f"Expected argument `{name}` to be a number in [0, {limit}), but got {value!r}.")
    weight = options["class_weight"]
    right = isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape == (num_classes,)
    if weight is not None and not right:
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        wanted = f"a floating-point ({num_classes},) tensor"
        raise ValueError(f"Expected argument `class_weight` to be {wanted}, but got {got}.")
    # As with labels, values are read where that waits for no device and breaks no graph.
    readable = weight is not None and weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError(f"Expected argument `class_weight` to be finite and not negative, but got {weight}.")
    return options


@torch.no_grad()
def update_mean(
    mean: Tensor,
    count: Tensor,
    rows: Sequence[Tensor],
    present: Tensor,
    total: Callable[[Tensor], Tensor],
    reads: bool = False,
) -> None:
    """Update in place the running mean of each modality's features, over the rows that have it on any rank.

    Args:
        mean: (ΣD_m,).
        count: (M,) of how many rows of each modality it is the mean; no more than WINDOW, or than a batch has.
        rows: M tensors (B, D_m).
        present: (B, M) bool.
        total: Sums over the ranks.
        reads: Whether the mask can be read, which is many times faster on a CPU.
    """
    sums, counts = [], []
    for m, x in enumerate(rows):
        wide = torch.promote_types(x.dtype, torch.float32)
        # One row that has overflowed must not spoil all later ones.
        here = present[:, m] & x.sum(1, dtype=wide).isfinite()
        chosen = x[here] if reads else torch.where(here[:, None], x, 0)
        sums.append(chosen.sum(0, dtype=wide).to(mean.dtype))
        counts.append(here.sum().to(mean.dtype))
    whole = total(torch.cat([*sums, torch.stack(counts)]))
    widths = torch.tensor([x.shape[1] for x in rows], device=whole.device)
    new, counted = whole[: -len(rows)], whole[-len(rows) :]
    count.copy_(torch.maximum((count + counted).clamp(max=WINDOW), counted))
    each, every = (x.repeat_interleave(widths, output_size=len(new)) for x in (counted, count))
    mean += (new - each * mean) / every.clamp(min=1)


def split_modalities(present: Tensor) -> tuple[Tensor, Tensor]:
    """Split what each row has in two parts at random, neither of them empty: two sub-cases of its missing case.

    For two modalities these are always the two. Works on any device without waiting for it.

    Args:
        present: (B, M) bool.

    Returns:
        Two (B, M) bool masks. Rows with fewer than two modalities have nothing in either.

    Example:
        >>> first, second = split_modalities(torch.tensor([[True, True, False], [False, True, False]]))
        >>> (first | second).tolist(), (first & second).any().item()
        ([[True, True, False], [False, False, False]], False)
    """
    random = torch.where(present, torch.rand(present.shape, device=present.device), 2.0)
    order, count = random.argsort(1).argsort(1), present.sum(1, keepdim=True)
    size = 1 + (torch.rand(len(present), 1, device=present.device) * (count - 1)).long()  # from 1 to count - 1
    first = present & (order < size) & (count > 1)
    return first, present & ~first & (count > 1)


def classification_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one label, or binary cross-entropy of several, of each row, and the rows' weights.

    Args:
        logits: (B, K).
        labels: (B,) int64, where -100 is ignored; or (B, K) float in [0, 1].
        class_weight: (K,), of the classes (of both answers to each label, where there are several).
        label_smoothing: ε, the share of a label that is spread over all classes, or over both answers.

    Returns:
        Two (B,) tensors: the losses times the weights, and the weights, by whose sum the mean divides.

    Example:
        >>> losses, weights = classification_loss(torch.zeros(2, 4), torch.tensor([1, -100]))
        >>> losses.sum() / weights.sum()  # log 4
        tensor(1.3863)
    """
    if class_weight is not None:
        class_weight = class_weight.to(logits)
    if labels.is_floating_point():
        smooth = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(logits, smooth, class_weight, reduction="none").mean(1)
        return losses, torch.ones_like(losses)
    losses = F.cross_entropy(logits, labels, class_weight, reduction="none", label_smoothing=label_smoothing)
    known = labels >= 0
    weights = torch.ones_like(losses) if class_weight is None else class_weight[labels.clamp(min=0)]
    return losses, torch.where(known, weights, 0)
