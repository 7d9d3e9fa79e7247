"""What `DecoupledPrototypeHead.imprint` does: read rows, find prototypes by closed_form.py, write them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protohead.cases import block_index
from protohead.center import WINDOW
from protohead.closed_form import Choice, choose, prototypes
from protohead.context import full_precision, is_readable, widest
from protohead.inputs import check_features, check_labels, read_features
from protohead.logits import uncalibrate
from protohead.moments import CHUNK, Moments, Rows, add, by_modality, collect, empty, means, origins_at, plus
from protohead.objective import read_objective
from protohead.prototypes import write_known

__all__ = ["imprint", "read_rows"]

IGNORED = -100  # The label of rows that do not count.


class Fit(NamedTuple):
    """What is written to a head."""

    prototypes: list[Tensor]  # M of (K, D_m)
    shrinkage: float
    centers: list[Tensor]  # M of (D_m,)
    choice: Choice | None = None  # Of scale and bias


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
    only_prototypes = classes is not None or shrinkage == 1
    with full_precision(head.seen.device):
        fixed = only_prototypes or not head.centered
        origins = known or (origins_at(head.in_features, _centers(head)) if fixed else None)
        rows = read_rows(head, features, labels, present)
        new, sample = collect(rows, head.in_features, head.num_classes, origins, head.seen)
        if sample is None:
            raise ValueError("Expected at least one row with a label and a modality, but got none.")
        _check_one_label(known, sample)
        sums = plus(new, known) if known else new
        if only_prototypes or known:  # What earlier rows chose stays: later ones may be few.
            centers = _centers(head) if only_prototypes else _means(head, sums)
            earlier = next(iter(known.values()))["shrinkage"].item() if known else 1.0
            gamma = earlier if shrinkage is None else float(shrinkage)
            fit = Fit(prototypes(sums, centers, _is_within(head, sample), gamma), gamma, centers)
        else:
            fit = _fit(head, sums, sample, shrinkage, class_weight)
    some = write_known(head.prototypes, fit.prototypes, written)
    counts = torch.stack([x["total"][-1] for x in new.values()])
    head.seen += torch.where(some, counts, 0) * head._masks
    _write_rest(head, sums, sample, fit, written)
    uncalibrate(head)
    for x in sums.values():
        x["shrinkage"] = counts.new_tensor(fit.shrinkage)
    return sums


def _fit(head: Any, sums: Moments, sample: Rows, shrinkage: float | None, class_weight: Tensor | None) -> Fit:
    """The whole head; only class means where no row can be held out, since each is the only one of its class."""
    centers, within, masks = _means(head, sums), _is_within(head, sample), head._masks > 0
    known = torch.stack([x.any() for x in prototypes(sums, centers, within, 1)])
    case, block = block_index(sample.present, masks, (head.seen > 0) | (masks & known))
    rows = sample._replace(present=block >= 0)  # What has no prototypes in a row's case says nothing.
    with torch.inference_mode(False), torch.no_grad():
        weight = None if class_weight is None else class_weight.clone()  # It may be of inference mode.
        choice = choose(sums, rows, centers, head.centered, case, len(head.cases), shrinkage, weight)
    if choice is not None:
        return Fit(prototypes(sums, centers, within, choice.shrinkage), choice.shrinkage, centers, choice)
    centers, counts = _centers(head), torch.stack([x["total"][-1] for x in sums.values()])
    if torch.equal(counts, sample.present.sum(0).to(counts)):  # A row at the mean of all says nothing from there.
        sums = empty(origins_at(sums, centers), head.num_classes)
        add(sums, sample)
    return Fit(prototypes(sums, centers, within, 1.0), 1.0, centers)


def _is_within(head: Any, sample: Rows) -> bool:
    return head.centered and not sample.labels.is_floating_point()


def _centers(head: Any) -> list[Tensor]:
    """(D_m,) of each modality; zeros of a head without."""
    center = head.center if head.centered else head.seen.new_zeros(sum(head.in_features.values()))
    return list(center.split_with_sizes([*head.in_features.values()]))


def _means(head: Any, sums: Moments) -> list[Tensor]:
    """What the centers are to be: the means of the rows; where there is no row, what they are."""
    if not head.centered:
        return _centers(head)
    each = zip(sums.values(), means(sums), _centers(head), strict=True)
    return [torch.where(x["total"][-1] > 0, mean, center) for x, mean, center in each]


def _write_rest(head: Any, sums: Moments, sample: Rows, fit: Fit, written: Tensor) -> None:
    """Scale and bias, if they are chosen; the center; and, where only some classes are written, their bias."""
    if fit.choice is not None:
        head.scale.copy_(fit.choice.scale)
    if not head.centered:
        return
    if fit.choice is not None:
        head.bias.copy_(fit.choice.bias)
    elif not written.all():  # It is like the others.
        head.bias.copy_(torch.where(written, head.bias[~written].mean(), head.bias))
    if torch.equal(center := torch.cat(fit.centers), head.center):
        return
    head.center.copy_(center)
    rows = torch.stack([x["total"][-1] for x in sums.values()])
    each = zip(by_modality(sample, map(len, fit.centers)), fit.centers, strict=True)
    distances = [torch.linalg.vector_norm(x.to(center) - center, dim=1) for (x, _), center in each]
    spread = torch.stack([distance.sum() / max(1, len(distance)) for distance in distances])
    head.center_rows.copy_(torch.where(rows > 0, rows.clamp(max=WINDOW), head.center_rows))
    head.center_spread.copy_(torch.where(spread > 0, spread, head.center_spread))


def read_rows(head: Any, features: Any, labels: Tensor | None, present: Any) -> Iterator[Rows]:
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
    rows, mask = read_features(features, present, head.in_features, head.seen.device, where)
    check_labels(labels, len(mask), head.num_classes, head.seen.device)
    if not is_readable(mask):  # Else they have been checked.
        check_features(head.modalities, rows, mask, where)
    counts, dtype = mask.any(1), widest(*rows)
    if not labels.is_floating_point():
        counts &= labels != IGNORED
    for index in counts.nonzero()[:, 0].split(CHUNK):
        if not len(index):  # That is how an empty tensor is split.
            return
        here = mask[index]
        parts = [torch.where(has[:, None], x[index], 0).to(dtype) for x, has in zip(rows, here.T, strict=True)]
        yield Rows(torch.cat(parts, 1), labels[index], here)


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
    if (
        known
        and not sample.labels.is_floating_point()
        and any(x["rows"].sum() != x["total"][-1] for x in known.values())
    ):
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
