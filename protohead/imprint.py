"""What `DecoupledPrototypeHead.imprint` does: read rows, find prototypes by closed_form.py, write them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from protohead.cases import block_index
from protohead.center import WINDOW
from protohead.closed_form import Choice, choose, prototypes
from protohead.context import full_precision, widest
from protohead.inputs import check_finite, check_labels, read_features
from protohead.moments import CHUNK, Moments, Rows, add, by_modality, collect, empty, means, origins_at, plus
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
    moments: Any,
) -> Moments:
    """See :meth:`protohead.DecoupledPrototypeHead.imprint`. The head is not changed before all is found."""
    written, known = _read_classes(classes, head), _read_moments(moments, head)
    _check_shrinkage(shrinkage)
    class_weight = read_objective({"class_weight": class_weight}, head.num_classes).class_weight
    shrinkage = _shrinkage(known) if classes is not None and shrinkage is None else shrinkage
    stays = classes is not None or shrinkage == 1  # All but the prototypes.
    with full_precision(head.seen.device):
        origins = known or (origins_at(head.in_features, _centers(head)) if stays or not head.centered else None)
        rows = _read_rows(head, features, labels, present)
        sums, sample = collect(rows, head.in_features, head.num_classes, origins, head.seen)
        if sample is None:
            raise ValueError("Expected at least one row with a label and a modality, but got none.")
        counts = torch.stack([x["total"][-1] for x in sums.values()])
        within = head.centered and not sample.labels.is_floating_point()
        _check_one_label(known, sample)
        sums = plus(sums, known) if known else sums
        centers = _means(head, sums)
        choice, source = None if stays else _choose(head, sums, sample, centers, within, shrinkage, class_weight), sums
        if choice is None:
            centers, shrinkage = _centers(head), _shrinkage(known) if shrinkage is None else float(shrinkage)
            alone = not (stays or known)  # Each row is the only one of its class.
            choice = Choice(1.0 if alone else shrinkage)
            source = _seen_from(sums, sample, centers) if alone else sums
        found = prototypes(source, centers, within, choice.shrinkage)
    some = write_known(head.prototypes, found, written)
    head.seen += torch.where(some, counts, 0) * head._masks
    _write_rest(head, sums, sample, centers, choice, written)
    for x in sums.values():
        x["shrinkage"] = counts.new_tensor(choice.shrinkage)
    return sums


def _choose(
    head: Any,
    moments: Moments,
    sample: Rows,
    centers: list[Tensor],
    within: bool,
    shrinkage: float | None,
    class_weight: Tensor | None,
) -> Choice | None:
    said = torch.stack([x.any() for x in prototypes(moments, centers, within, 1)])
    masks = head._masks > 0
    case, block = block_index(sample.present, masks, (head.seen > 0) | (masks & said))
    sample = sample._replace(present=block >= 0)  # What has no prototypes in a row's case says nothing.
    with torch.inference_mode(False), torch.no_grad():
        class_weight = None if class_weight is None else class_weight.clone()  # It may be of inference mode.
        return choose(moments, sample, centers, within, case, len(head.cases), shrinkage, class_weight, head.centered)


def _shrinkage(known: Moments) -> float:
    """What was chosen for earlier rows; class means if there are none."""
    return next(iter(known.values()))["shrinkage"].item() if known else 1.0


def _centers(head: Any) -> list[Tensor]:
    """(D_m,) of each modality; zeros of a head without."""
    center = head.center if head.centered else head.seen.new_zeros(sum(head.in_features.values()))
    return list(center.split_with_sizes([*head.in_features.values()]))


def _seen_from(sums: Moments, sample: Rows, centers: list[Tensor]) -> Moments:
    """Sums with the centers as origins, if the sample is all rows: one at the mean of all says nothing from there."""
    if any(x["total"][-1] != count for x, count in zip(sums.values(), sample.present.sum(0), strict=True)):
        return sums
    new = empty(origins_at(sums, centers), len(next(iter(sums.values()))["rows"]))
    add(new, sample)
    return new


def _means(head: Any, moments: Moments) -> list[Tensor]:
    """What the centers are to be: the means of the rows; where there is no row, what they are."""
    if not head.centered:
        return _centers(head)
    each = zip(moments.values(), means(moments), _centers(head), strict=True)
    return [torch.where(sums["total"][-1] > 0, mean, center) for sums, mean, center in each]


def _write_rest(
    head: Any, moments: Moments, sample: Rows, centers: list[Tensor], choice: Choice, written: Tensor
) -> None:
    if choice.scale is None:
        if head.centered and not written.all():  # A bias that is like the others.
            head.bias.copy_(torch.where(written, head.bias[~written].mean(), head.bias))
        return
    head.scale.copy_(choice.scale)
    if not head.centered:
        return
    head.bias.copy_(choice.bias)
    head.center.copy_(torch.cat(centers))
    rows = torch.stack([sums["total"][-1] for sums in moments.values()])
    each = zip(by_modality(sample, map(len, centers)), centers, strict=True)
    distances = [torch.linalg.vector_norm(x.to(center) - center, dim=1) for (x, _), center in each]
    spread = torch.stack([distance.sum() / max(1, len(distance)) for distance in distances])
    head.center_rows.copy_(torch.where(rows > 0, rows.clamp(max=WINDOW), head.center_rows))
    head.center_spread.copy_(torch.where(spread > 0, spread, head.center_spread))


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
        if not len(index):  # That is how an empty tensor is split.
            return
        here = mask[index]
        parts = [torch.where(has[:, None], x[index], 0).to(dtype) for x, has in zip(rows, here.T, strict=True)]
        key = _keys([*parts, here, labels[index].view(len(index), *labels.shape[1:] or (1,))])
        yield Rows(torch.cat(parts, 1), labels[index], here, key, key)


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
    named = classes.tolist() if isinstance(classes, Tensor) else () if classes is None else classes
    if not isinstance(named, Iterable):
        raise TypeError(f"Expected argument `classes` to be a list of numbers, or None, but got {classes!r}.")
    for k in named:
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


def _check_one_label(known: Moments, sample: Rows) -> None:
    """Where these rows have one label, earlier ones must have had: else a row is in several classes."""
    if not sample.labels.is_floating_point() and any(x["rows"].sum() != x["total"][-1] for x in known.values()):
        raise ValueError("Expected labels of one kind, but those of `moments` are floating-point, and these int64.")


def _read_moments(moments: Any, head: Any) -> Moments:
    """Sums on the head's device; none, if there are none."""
    try:
        known = {n: {k: x.to(head.seen) for k, x in sums.items()} for n, sums in moments.items()} if moments else {}
        got = {name: len(sums["origin"]) for name, sums in known.items()}
        classes = max((len(sums["rows"]) for sums in known.values()), default=0)
    except (AttributeError, KeyError, TypeError):
        raise TypeError(f"Expected argument `moments` to be what `imprint` returns, but got {moments!r:.80}.") from None
    if known and (list(got.items()) != list(head.in_features.items()) or classes > head.num_classes):
        wanted = f"{head.in_features} and no more than {head.num_classes} classes"
        raise ValueError(f"Expected argument `moments` of a head with {wanted}, but got {got} and {classes} classes.")
    return known
