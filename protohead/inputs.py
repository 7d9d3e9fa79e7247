"""What a head accepts: every check that stands between a wrong input and a silent wrong answer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protohead.context import is_readable
from protohead.present import present_from_flags

__all__ = [
    "Features",
    "Present",
    "check_agreement",
    "check_device",
    "check_features",
    "check_finite",
    "check_labels",
    "is_enough",
    "kind_of",
    "read_features",
    "read_present",
]

Features = Tensor | Mapping[str, Tensor | None]
Present = Tensor | Mapping[str, Any]  # Or a pandas DataFrame.

ENOUGH = 8  # Rows from which features can contradict a mask.


def read_features(
    features: Features, present: Present | None, widths: Mapping[str, int], device: torch.device, where: str = ""
) -> tuple[list[Tensor], Tensor]:
    """Check a batch; return one (B, D_m) tensor per modality and the (B, M) present mask, all on the device.

    Zeros stand in for a modality that is left out, so that its prototypes stay in the graph, as DDP needs. `where` is
    put in the error of features that are not finite.
    """
    rows, mask = _read_rows(features, present, widths, device)
    if is_readable(mask):
        check_features(widths, rows, mask, where)
    return rows, mask


def _read_rows(
    features: Features, present: Present | None, widths: Mapping[str, int], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    tensors = _by_name(features, widths)
    mask = None if present is None else read_present(present, tuple(widths), device)
    first = next(iter(tensors.values()), mask)
    if first is None:
        raise ValueError(f"Expected features of at least one of {tuple(widths)}, or `present`, but got neither.")
    batch = first.shape[0]  # len() would fix the batch size of an exported graph.
    inputs = tensors if mask is None else {**tensors, "present": mask}
    if any(x.shape[0] != batch for x in inputs.values()):
        sizes = {name: x.shape[0] for name, x in inputs.items()}
        raise ValueError(f"Expected one batch size, but got {sizes}.")
    for name, x in inputs.items():
        check_device(name, x, device)
    rows = [
        tensors[name] if name in tensors else torch.zeros(batch, width, device=first.device)
        for name, width in widths.items()
    ]
    if mask is None:
        return rows, torch.stack([(x != 0).any(1) for x in rows], dim=1)
    if len(tensors) == len(widths):
        # Most batches need no closer look: no feature that is present begins with a zero.
        if is_enough(mask) and (mask & torch.stack([x[:, 0] == 0 for x in rows], dim=1)).any():
            check_agreement(mask, torch.stack([(x == 0).all(1) for x in rows], dim=1), tuple(widths))
        return rows, mask
    return rows, _without_absent(mask, [name in tensors for name in widths], tuple(widths))


def _without_absent(present: Tensor, kept: list[bool], modalities: Sequence[str]) -> Tensor:
    """The mask of a batch in which some modalities are left out, which it must not call present."""
    there = torch.tensor(kept, device=present.device)
    # In a compiled graph, where values cannot be read, a modality that is left out is missing.
    if not torch.compiler.is_compiling() and (wrong := present & ~there).any():
        row, m = wrong.nonzero()[0].tolist()
        raise ValueError(f"Expected features of {modalities[m]!r}, which `present` says that row {row} has; got none.")
    return present & there


def read_present(present: Any, modalities: Sequence[str], device: torch.device | None = None) -> Tensor:
    """A (B, M) bool tensor as it is, or one made of columns by name."""
    if isinstance(present, Mapping) or hasattr(present, "columns"):
        return present_from_flags(present, modalities, device)
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(
            f"Expected `present` to be a bool tensor, or columns by name, but got {kind_of(present)}. A mask of 0 and "
            "1 takes torch.as_tensor(mask).bool(); protohead.present_from_flags converts columns of True and None, "
            "protohead.present_from_missing_type the codes of MAP, DCP and DPL, "
            "protohead.present_from_missing_mask a mask whose True is missing."
        )
    if present.dim() != 2 or present.shape[1] != len(modalities):
        wanted, got = f"(B, {len(modalities)})", tuple(present.shape)
        raise ValueError(f"Expected argument `present` to be of shape {wanted} for {tuple(modalities)}, but got {got}.")
    return present


def is_enough(present: Tensor) -> bool:
    """Whether inputs can contradict a mask: one that can be read, of enough rows."""
    return is_readable(present) and present.shape[0] >= ENOUGH


def check_agreement(present: Tensor, zero: Tensor, modalities: Sequence[str]) -> None:
    """Refuse a mask that the inputs contradict: inverted, or with its columns swapped.

    Args:
        present: (B, M) bool.
        zero: (B, M) bool, which inputs are all zeros.
        modalities: The M names in order.
    """
    # A column that is inverted is wrong in every row.
    wrong, right = (present & zero).sum(0), (present & ~zero).sum(0)
    inverted = (wrong >= 2) & (right == 0) & ~present.all(0)
    # In a complete row swapped columns do not show; where they are swapped, what is called missing is there.
    complete = present.all(1, keepdim=True)
    doubted = (present & zero & (~present & ~zero).any(1, keepdim=True)).sum(0)
    sure = (present & ~zero & ~complete).sum(0)
    # Some features are zeros by nature: as many prove nothing.
    natural = (complete & zero & (~zero).any(1, keepdim=True)).sum(0)
    swapped = (doubted >= 2) & (doubted > natural) & (sure <= (doubted if present.shape[1] > 2 else 0))
    contradicted = (inverted | swapped) & ~(~present & zero).any(0)
    if contradicted.any():
        m = int(contradicted.nonzero()[0])
        raise ValueError(
            "Expected `present` to be True where a modality is there, its columns in the order of the modalities, but "
            f"{modalities[m]!r} is all zeros in {int(wrong[m])} rows that have it by `present`, and in no row that "
            "lacks it: the mask is inverted, or its columns are swapped."
        )


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Name what is elsewhere, which torch does not."""
    if x.device != device:
        raise ValueError(f"Expected `{name}` to be on the device of the head, {device}, but got it on {x.device}.")


def _by_name(features: Features, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The features by name, in order, without those that are None."""
    if isinstance(features, Tensor):
        total = sum(widths.values())
        if features.dim() != 2 or features.shape[1] != total:
            got = tuple(features.shape)
            raise ValueError(
                f"Expected argument `features` to be of shape (B, {total}) for {dict(widths)}, but got {got}."
            )
        features = dict(zip(widths, features.split_with_sizes([*widths.values()], dim=1), strict=True))
    elif not isinstance(features, Mapping):
        raise TypeError(f"Expected argument `features` to be a tensor or a mapping, but got {type(features).__name__}.")
    if unknown := [name for name in features if name not in widths]:
        raise ValueError(f"Expected features of {tuple(widths)}, but got others: {unknown}.")
    tensors = {name: x for name in widths if (x := features.get(name)) is not None}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"Expected features of {name!r} to be a floating-point tensor, but got {kind_of(x)}.")
        if x.dim() != 2 or x.shape[1] != widths[name]:
            got = tuple(x.shape)
            raise ValueError(f"Expected features of {name!r} to be of shape (B, {widths[name]}), but got {got}.")
    return tensors


def check_labels(labels: Tensor, batch: int, num_classes: int, device: torch.device | None = None) -> None:
    """(B,) int64 in [0, K) or -100, or (B, K) floating-point in [0, 1]; on the device, where one is given."""
    wanted = f"int64 (B,), or floating-point (B, {num_classes})"  # Writing `batch` out here would fix it in a graph.
    if not isinstance(labels, Tensor) or not (labels.dtype == torch.int64 or labels.is_floating_point()):
        raise TypeError(f"Expected argument `labels` to be {wanted}, but got {kind_of(labels)}{_cast(labels)}.")
    if labels.shape != ((batch, num_classes) if labels.is_floating_point() else (batch,)):
        got = f"{labels.dtype} {tuple(labels.shape)} for B = {batch}"
        raise ValueError(f"Expected argument `labels` to be {wanted}, but got {got}{_cast(labels)}.")
    if device is not None:
        check_device("labels", labels, device)
    if not is_readable(labels):
        return
    if labels.is_floating_point():
        wrong, allowed = ~((labels >= 0) & (labels <= 1)), "in [0, 1]"
    else:
        low, high = labels.aminmax() if batch else (0, 0)
        if low >= 0 and high < num_classes:
            return
        wrong, allowed = (labels < 0) | (labels >= num_classes), f"in [0, {num_classes}), or -100"
        wrong &= labels != -100
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        value = labels[tuple(at)].item()
        raise ValueError(f"Expected argument `labels` to be {allowed}, but got {value} in row {at[0]}.")


def check_features(modalities: Iterable[str], rows: Sequence[Tensor], present: Tensor, where: str = "") -> None:
    """No NaN or infinity in the rows that have a modality: classes would be chosen, or learned, of nothing."""
    for m, (name, x) in enumerate(zip(modalities, rows, strict=True)):
        # A finite sum, one pass, is enough for nearly all batches.
        if not is_readable(x) or not math.isfinite(x.detach().sum().item()):
            advice = f"; if it lacks {name!r}, `present` must say so"
            check_finite(f"features of {name!r}{where}", x, present[:, m], advice)


def check_finite(what: str, x: Tensor, rows: Tensor, advice: str = "") -> None:
    """No NaN or infinity in some of the rows, (N,) bool."""
    if (wrong := rows & ~x.isfinite().all(1)).any():
        raise ValueError(f"Expected finite {what}, but row {int(wrong.nonzero()[0])} has others{advice}.")


def _cast(labels: Any) -> str:
    """What would make labels of what came, for an error."""
    if not isinstance(labels, Tensor):
        return "; torch.as_tensor(labels) makes a tensor"
    if labels.dim() == 1:
        return "; `.long()` casts one class a row" * (labels.dtype != torch.int64)
    return "; `.float()` casts several labels a row" * (not labels.is_floating_point())


def kind_of(value: Any) -> object:
    """What came instead, for an error."""
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
