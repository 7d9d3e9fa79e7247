"""The training objective of a batch, and its options in one dataclass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protohead.center import update_center
from protohead.context import full_precision, is_readable, is_recorded, is_transformed, widest
from protohead.functional import prototype_contrast
from protohead.logits import head_logits
from protohead.options import check_count
from protohead.sharding import gather_for_loss, sum_between_ranks
from protohead.untrained import warn_of_eval_mode

__all__ = [
    "EncodedObjective",
    "Objective",
    "add_subcases",
    "classification_loss",
    "encode_subcases",
    "prototype_loss",
    "read_objective",
    "split_modalities",
    "training_loss",
]


@dataclass(frozen=True, eq=False)
class Objective:
    """``classification + subcase_weight * sub-cases + prototype_weight * prototype_loss()``.

    The classification loss, with margins, is the cross-entropy of one label or the binary cross-entropy of several. A
    row with several modalities is also a sample of its sub-cases: these are split at random in two parts, each of which
    is classified like a row that has no more. This also trains cases that do not occur.

    Args:
        prototype_weight: λ of the prototype loss, which is not computed where this is 0. 0.9 is published for MM-IMDb.
        subcase_weight: Of the two parts each. 0 leaves them out.
        subcase_share: With prompts only, whose features depend on the case: what part of the complete rows is encoded
            again as its sub-cases, drawn anew for each batch; the weight makes up for the others. In (0, 1].
        class_weight: (K,), not negative: as `weight` in ``F.cross_entropy``, or, for several labels, in
            ``F.binary_cross_entropy_with_logits`` (of both answers, which `pos_weight` is not).
        label_smoothing: ε in [0, 1), as in ``F.cross_entropy``; several labels are drawn towards ½.

    Raises:
        ValueError: If a value is not as said; those of `class_weight` are read on the CPU only.
    """

    prototype_weight: float = 0.9
    subcase_weight: float = 0.5
    subcase_share: float = 1.0
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:  # noqa: D105
        for name, limit in (("prototype_weight", math.inf), ("subcase_weight", math.inf), ("label_smoothing", 1)):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < limit:
                raise ValueError(f"Expected `{name}` to be a number in [0, {limit}), but got {value!r}.")
        share = self.subcase_share
        if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
            raise ValueError(f"Expected `subcase_share` to be a number in (0, 1], but got {share!r}.")
        weight = self.class_weight
        if weight is None:
            return
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 1:
            got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
            raise ValueError(f"Expected `class_weight` to be a floating-point (K,) tensor, but got {got}.")
        if is_readable(weight) and not ((weight >= 0) & weight.isfinite()).all():
            raise ValueError(f"Expected `class_weight` to be finite and not negative, but got {weight}.")


OPTIONS = tuple(field.name for field in fields(Objective))


@dataclass(frozen=True, eq=False)
class EncodedObjective(Objective):
    """The objective of a batch whose last rows are its sub-cases, encoded as such: see :func:`encode_subcases`.

    Args:
        subcases: How many rows.
    """

    subcases: int = 0


def read_objective(options: Objective | Mapping[str, Any], num_classes: int) -> Objective:
    """The objective of some options.

    Raises:
        ValueError: If an option is unknown or not as said.
    """
    if not isinstance(options, Objective):
        if not isinstance(options, Mapping) or set(options) - set(OPTIONS):
            raise ValueError(f"Expected the objective to have some of the options {OPTIONS}, but got {options!r}.")
        options = Objective(**options)
    weight = options.class_weight
    if weight is not None and len(weight) != num_classes:
        raise ValueError(f"Expected `class_weight` to be of shape ({num_classes},), but got {tuple(weight.shape)}.")
    return options


def training_loss(
    head: Any,
    rows: list[Tensor],
    present: Tensor,
    labels: Tensor | None,
    objective: Objective,
) -> Tensor:
    """The whole objective of a batch; in training the head's center is learned of it.

    Args:
        head: The head.
        rows: M tensors (B, D_m) of features.
        present: (B, M) bool.
        labels: As in :func:`classification_loss`.
        objective: The options.

    Returns:
        A scalar.
    """
    if labels is None:
        raise ValueError("Expected argument `labels` for the objective, but got None.")
    encoded = isinstance(objective, EncodedObjective)
    batch = present.shape[0] - (objective.subcases if isinstance(objective, EncodedObjective) else 0)
    if not head.training:
        warn_of_eval_mode(any(p.requires_grad for p in head.parameters()))
    elif head.centered and not is_transformed():  # Then nothing outside can be written.
        total = partial(sum_between_ranks, module=head)
        own = [x[:batch] for x in rows]
        update_center(head.center, head.center_rows, head.center_spread, own, present[:batch], total)
    if objective.subcase_weight and present.shape[1] > 1 and not encoded:
        index, present = add_subcases(present)
        rows, labels = [x.index_select(0, index) for x in rows], labels[index]
    logits, block = head_logits(head, rows, present, labels)
    losses, weights = classification_loss(logits, labels, objective.class_weight, objective.label_smoothing)
    counts = (block >= 0).any(1)  # The other rows have nothing to be classified by.
    losses, weights = (torch.where(counts, x, 0) for x in (losses, weights))
    total_loss = losses[:batch].sum() + objective.subcase_weight * losses[batch:].sum()
    weight = weights[:batch].sum()
    loss = total_loss / torch.where(weight > 0, weight, 1)
    return loss + objective.prototype_weight * head.prototype_loss() if objective.prototype_weight else loss


def prototype_loss(head: Any, temperature: float, sample: int | None) -> Tensor:
    """See :meth:`protohead.DecoupledPrototypeHead.prototype_loss`."""
    if not temperature > 0:
        raise ValueError(f"Expected argument `temperature` to be positive, but got {temperature}.")
    if sample is not None:
        check_count("sample", sample)
    seen = (head.seen > 0) | ~(head.seen > 0).any()
    blocks = [seen[held > 0, m] for m, held in enumerate(head._masks.T)]
    head.prototypes()  # What torch.nn.utils does to them is done anew.
    prototypes = [gather_for_loss(head.prototypes, name, head) for name in head.modalities]
    dtype = widest(*prototypes)
    with full_precision(seen.device):
        return prototype_contrast([p.to(dtype) for p in prototypes], blocks, head.shared_space, temperature, sample)


def add_subcases(present: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a batch, and behind them the two sub-cases of each row that has several modalities.

    Args:
        present: (B, M) bool.

    Returns:
        (N,) int64, which row each is; and (N, M) bool, what it has. On a GPU all rows have sub-cases, maybe with
        nothing, since to count them would wait for the device.
    """
    first, second = split_modalities(present)
    rows = torch.arange(present.shape[0], device=present.device)
    some = first.any(1).nonzero()[:, 0] if is_readable(present) else rows
    return torch.cat([rows, some, some]), torch.cat([present, first[some], second[some]])


def encode_subcases(present: Tensor, objective: Objective) -> tuple[Tensor, Tensor, EncodedObjective]:
    """As :func:`add_subcases`, before the rows are encoded: for features that depend on the missing case.

    Args:
        present: (B, M) bool; on the CPU, but in a recorded graph, where all rows have sub-cases, maybe with nothing.
        objective: The options.

    Returns:
        (N,) int64, which row each is; (N, M) bool, what it has; and the objective of these rows.

    Example:
        >>> rows, present, _ = encode_subcases(torch.tensor([[True, False], [True, True]]), Objective())
        >>> rows.tolist(), sorted(present.tolist()[2:])
        ([0, 1, 1, 1], [[False, True], [True, False]])
    """
    rows, (first, second) = torch.arange(len(present), device=present.device), split_modalities(present)
    some = rows if is_recorded() else first.any(1).nonzero()[:, 0]
    whole, weight = len(some), objective.subcase_weight
    if not weight:
        some = some[:0]
    elif objective.subcase_share < 1:
        some = some[torch.randperm(whole, device=present.device)[: max(1, round(objective.subcase_share * whole))]]
        weight *= whole / max(1, len(some))
    options = {name: getattr(objective, name) for name in OPTIONS} | {"subcase_weight": weight}
    index, mask = torch.cat([rows, some, some]), torch.cat([present, first[some], second[some]])
    return index, mask, EncodedObjective(**options, subcases=2 * len(some))


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
        class_weight: As in :class:`Objective`.
        label_smoothing: As in :class:`Objective`.

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
    weights = torch.ones_like(losses) if class_weight is None else class_weight[labels.clamp(min=0)]
    return losses, torch.where(labels >= 0, weights, 0)
