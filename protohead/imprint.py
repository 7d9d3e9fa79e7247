"""What `DecoupledPrototypeHead.imprint` does: read rows, find prototypes by :mod:`protohead.closed_form`, write them."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from protohead.cases import block_index
from protohead.center import WINDOW, split_center
from protohead.closed_form import Choice, choose, prototypes
from protohead.context import full_precision, widest
from protohead.inputs import check_finite, check_labels, read_features
from protohead.moments import CHUNK, NEAR, Moments, Rows, collect, means, origins_at, plus
from protohead.objective import read_objective
from protohead.prototypes import write_known

__all__ = ["imprint"]

IGNORED = -100  # The label of rows that do not count.


def imprint(
    head: Any,
    features: Any,
    labels: Tensor | None,
    present: Any,
    shrinkage: float | None,
    classes: Sequence[int] | None,
    class_weight: Tensor | None,
    known: Moments | None,
) -> Moments:
    """See :meth:`protohead.DecoupledPrototypeHead.imprint`. The head is not changed before all is found."""
    written = _read_classes(classes, head)
    _check_shrinkage(shrinkage)
    class_weight = read_objective({"class_weight": class_weight}, head.num_classes).class_weight
    _check_moments(known, head)
    if shrinkage is None and classes is not None:
        shrinkage = next(iter(known.values()))["shrinkage"].item() if known else 1.0
    only_prototypes, centers = shrinkage == 1 or classes is not None, _centers(head)
    with full_precision(head.seen.device):
        origins = known or (origins_at(head.in_features, centers) if only_prototypes or not head.centered else None)
        rows = _read_rows(head, features, labels, present)
        moments, sample = collect(rows, head.in_features, head.num_classes, origins, head.seen)
        if sample is None:
            raise ValueError("Expected at least one row with a label and a modality, but got none.")
        counts = torch.stack([sums["total"][-1] for sums in moments.values()])
        moments = plus(moments, known) if known else moments
        within, choice = head.centered and not sample.labels.is_floating_point(), None
        if not only_prototypes:
            new = _new_centers(head, moments)
            choice = _choose(head, moments, sample, new, within, shrinkage, class_weight)
            only_prototypes = choice is None and shrinkage is None
            centers = centers if only_prototypes else new
            shrinkage = choice.shrinkage if choice else shrinkage
        shrinkage = 1.0 if shrinkage is None else float(shrinkage)
        found = prototypes(moments, centers, within, shrinkage)
    some = write_known(head.prototypes, found, written)
    head.seen += torch.where(some, counts, 0) * head._masks
    if choice is not None:
        head.scale.copy_(choice.scale)
    if head.centered and not only_prototypes:
        _write_center(head, moments, centers)
        head.bias.copy_(head.bias if choice is None else choice.bias)
    if head.centered and classes is not None and not written.all():
        head.bias.copy_(torch.where(written, head.bias[~written].mean(), head.bias))
    for sums in moments.values():
        sums["shrinkage"] = counts.new_tensor(shrinkage)
    return moments


def _choose(
    head: Any,
    moments: Moments,
    sample: Rows,
    centers: list[Tensor],
    within: bool,
    shrinkage: float | None,
    class_weight: Tensor | None,
) -> Choice | None:
    case, block = block_index(sample.present, head._masks > 0)
    sample = sample._replace(present=block >= 0)  # What has no prototypes in a row's case says nothing.
    with torch.inference_mode(False), torch.no_grad():
        return choose(moments, sample, centers, within, case, len(head.cases), shrinkage, class_weight, head.centered)


def _new_centers(head: Any, moments: Moments) -> list[Tensor]:
    """The means of the rows; of a modality without rows that of the head. Zeros of a head without."""
    if not head.centered:
        return _centers(head)
    each = zip(moments.values(), means(moments), _centers(head), strict=True)
    return [torch.where(sums["total"][-1] > 0, new, old) for sums, new, old in each]


def _write_center(head: Any, moments: Moments, centers: list[Tensor]) -> None:
    rows = torch.stack([sums["total"][-1] for sums in moments.values()])
    spread = torch.stack([sums["near"] for sums in moments.values()]) / NEAR
    head.center.copy_(torch.cat(centers))
    head.center_rows.copy_(torch.where(rows > 0, rows.clamp(max=WINDOW), head.center_rows))
    head.center_spread.copy_(torch.where(rows > 0, spread, head.center_spread))


def _centers(head: Any) -> list[Tensor]:
    """(D_m,) of each modality; zeros of a head without."""
    if head.centered:
        return list(split_center(head, head.seen.dtype))
    return [head.seen.new_zeros(width) for width in head.in_features.values()]


def _read_rows(head: Any, features: Any, labels: Tensor | None, present: Any) -> Iterator[Rows]:
    """The rows that count, checked, not many at a time."""
    if labels is not None:
        yield from _read_batch(head, features, labels, present, "")
        return
    if isinstance(features, (Tensor, Mapping)) or not hasattr(features, "__iter__"):
        raise TypeError("Expected argument `labels`; or, as the first, batches of (features, labels, present).")
    several = None
    for number, batch in enumerate(features):
        if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 3:
            got = type(batch).__name__
            raise TypeError(f"Expected batches of (features, labels) or (features, labels, present), but got {got}.")
        yield from _read_batch(head, batch[0], batch[1], batch[2] if len(batch) == 3 else None, f" of batch {number}")
        if several not in (None, several := batch[1].is_floating_point()):
            raise ValueError(f"Expected labels of one kind, but those of batch {number} are {batch[1].dtype}.")


def _read_batch(head: Any, features: Any, labels: Tensor, present: Any, where: str) -> Iterator[Rows]:
    rows, mask = read_features(features, present, head.in_features, head.seen.device)
    check_labels(labels, len(mask), head.num_classes, head.seen.device)
    for name, x, here in zip(head.modalities, rows, mask.T, strict=True):
        check_finite(f"features of {name!r}{where}", x, here)
    counts, dtype = mask.any(1), widest(*rows)
    if not labels.is_floating_point():
        counts &= labels != IGNORED
    for index in counts.nonzero()[:, 0].split(CHUNK):
        here, answers = mask[index], labels[index]
        parts = [torch.where(has[:, None], x[index], 0).to(dtype) for x, has in zip(rows, here.T, strict=True)]
        yield Rows(torch.cat(parts, 1), answers, here, _keys([*parts, answers.reshape(len(answers), -1)]))


def _keys(parts: Sequence[Tensor]) -> Tensor:
    """(N,) int64 that look random but are the same for the same row: from its bits, by sums that wrap around."""
    keys = torch.zeros(len(parts[0]), dtype=torch.int64, device=parts[0].device)
    for x in parts:
        bits = x.float().contiguous().view(torch.int32).long()
        weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x9E3779B97F4A7C1 | 1
        keys = (keys ^ (keys >> 31)) * 0x5851F42D4C957F2D + (bits * weights).sum(1)
    keys = (keys ^ (keys >> 29)) * 0x14057B7EF767814F
    return keys ^ (keys >> 32)


def _read_classes(classes: Sequence[int] | None, head: Any) -> Tensor:
    """(K,) bool, which classes are written."""
    written = torch.full((head.num_classes,), classes is None, device=head.seen.device)
    for k in classes if classes is not None else ():
        if not isinstance(k, Integral) or isinstance(k, bool) or not 0 <= k < head.num_classes:
            raise ValueError(f"Expected argument `classes` to hold numbers in [0, {head.num_classes}), but got {k!r}.")
        written[k] = True
    if not written.any():
        raise ValueError("Expected argument `classes` to name at least one class, but got none.")
    return written


def _check_shrinkage(shrinkage: Any) -> None:
    if shrinkage is None:
        return
    if not isinstance(shrinkage, Real) or isinstance(shrinkage, bool) or not 0 <= float(shrinkage) <= 1:
        raise ValueError(f"Expected argument `shrinkage` to be a number in [0, 1], or None, but got {shrinkage!r}.")


def _check_moments(moments: Any, head: Any) -> None:
    """Refuse what no head with these modalities has returned."""
    if moments is None:
        return
    try:
        got = {name: len(sums["origin"]) for name, sums in moments.items()}
        classes = {len(sums["rows"]) for sums in moments.values()}
    except (AttributeError, KeyError, TypeError):
        raise TypeError(f"Expected argument `moments` to be what `imprint` returns, but got {moments!r:.80}.") from None
    if list(got.items()) != list(head.in_features.items()) or max(classes) > head.num_classes:
        wanted, others = (
            f"{widths} and {k} classes" for widths, k in ((head.in_features, head.num_classes), (got, max(classes)))
        )
        raise ValueError(f"Expected argument `moments` of a head with {wanted}, or fewer, but got those of {others}.")
