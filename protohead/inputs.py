"""What a head and a classifier accept: every check that stands between a wrong input and a silent wrong answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protohead.context import is_readable
from protohead.present import is_empty, present_from_flags
from protohead.raw import raw_hint

__all__ = [
    "Features",
    "Present",
    "batch_size",
    "blank_row",
    "check_device",
    "check_finite",
    "check_inputs",
    "check_labels",
    "read_features",
    "read_present",
    "select_rows",
]

Features = Tensor | Mapping[str, Tensor | None]
Present = Tensor | Mapping[str, Any]  # Or a pandas DataFrame.

ENOUGH = 8  # Rows from which features can contradict a mask.


def read_features(
    features: Features, present: Present | None, widths: Mapping[str, int], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Check a batch; return one (B, D_m) tensor per modality and the (B, M) present mask, all on the device.

    Zeros stand in for a modality that is left out, so that its prototypes stay in the graph, as DDP needs.
    """
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
        if _is_enough(mask) and (mask & torch.stack([x[:, 0] == 0 for x in rows], dim=1)).any():
            _check_agreement(mask, torch.stack([(x == 0).all(1) for x in rows], dim=1), tuple(widths))
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
            f"Expected `present` to be a bool tensor, or columns by name, but got {_kind(present)}. A mask of 0 and 1 "
            "takes torch.as_tensor(mask).bool(); protohead.present_from_flags converts columns of True and None, "
            "protohead.present_from_missing_type the codes of MAP, DCP and DPL, "
            "protohead.present_from_missing_mask a mask whose True is missing."
        )
    if present.dim() != 2 or present.shape[1] != len(modalities):
        wanted, got = f"(B, {len(modalities)})", tuple(present.shape)
        raise ValueError(f"Expected argument `present` to be of shape {wanted} for {tuple(modalities)}, but got {got}.")
    return present


def _is_enough(present: Tensor) -> bool:
    """Whether inputs can contradict a mask: one that can be read, of enough rows."""
    return is_readable(present) and present.shape[0] >= ENOUGH


def _check_agreement(present: Tensor, zero: Tensor, modalities: Sequence[str]) -> None:
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
        raise ValueError(f"Expected features of {tuple(widths)}, but got {unknown}.")
    tensors = {name: x for name in widths if (x := features.get(name)) is not None}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"Expected features of {name!r} to be a floating-point tensor, but got {_kind(x)}.")
        if x.dim() != 2 or x.shape[1] != widths[name]:
            got = tuple(x.shape)
            raise ValueError(f"Expected features of {name!r} to be of shape (B, {widths[name]}), but got {got}.")
    return tensors


def check_inputs(inputs: Mapping[str, Any], present: Present | None, modalities: Sequence[str]) -> Tensor:
    """Check what encoders are to be given; return the (B, M) present mask, on the CPU."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"Expected argument `inputs` to map modalities to inputs, but got {_kind(inputs)}.")
    if unknown := [name for name in inputs if name not in modalities]:
        raise ValueError(f"Expected inputs of {tuple(modalities)}, but got others: {unknown}.")
    rows = {name: x for name in modalities if (x := inputs.get(name)) is not None}
    sizes = {name: batch_size(name, x) for name, x in rows.items()}
    mask = None if present is None else read_present(present, modalities)
    if mask is not None:
        sizes["present"] = len(mask)
    if len(set(sizes.values())) != 1:
        raise ValueError(f"Expected inputs of {tuple(modalities)}, all of one batch size, but got {sizes or 'none'}.")
    (batch,) = set(sizes.values())
    columns = {name: rows.get(name, [None] * batch) for name in modalities}
    if mask is None:
        return torch.stack([_rows_there(x) for x in columns.values()], dim=1)
    mask = mask.cpu()
    for m, (name, x) in enumerate(columns.items()):
        # Of a tensor `present` may say that zeros are there; what is None cannot be.
        if isinstance(x, Sequence) and (lacking := mask[:, m] & ~_rows_there(x)).any():
            row = lacking.nonzero()[0].item()
            raise ValueError(f"Expected inputs of {name!r}, which `present` says that row {row} has; got none.")
    if _is_enough(mask) and all(_is_on_cpu(x) for x in columns.values()):
        _check_agreement(mask, ~torch.stack([_rows_there(x) for x in columns.values()], dim=1), modalities)
    return mask


def batch_size(name: str, x: Any) -> int:
    """How many rows an input has."""
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes)):
        return len(x)
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if not tensors or any(value.dim() == 0 for value in tensors):
        wanted = "a tensor, a mapping of tensors (return_tensors='pt'), or a list, with one row a sample"
        _, mark, advice = raw_hint(name, x).partition(": ")
        raise TypeError(f"Expected inputs of {name!r} to be {wanted}, but got {_kind(x)}{mark}{advice}.")
    if len({len(value) for value in tensors}) > 1:
        got = {key: tuple(value.shape) for key, value in x.items() if isinstance(value, Tensor)}
        raise ValueError(f"Expected the tensors of {name!r} to have one batch size, but got {got}.")
    return len(tensors[0])


def _is_on_cpu(x: Any) -> bool:
    """Whether this is a tensor or a mapping, whose tensors can be read without waiting."""
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    return bool(tensors) and all(is_readable(value) for value in tensors)


def _rows_there(x: Any) -> Tensor:
    """(B,) bool on the CPU: the rows that are neither None nor NaN in a list, or not zeros in all the tensors."""
    if isinstance(x, Sequence):
        missing = [is_empty(row) for row in x]
        return ~torch.tensor(missing, dtype=torch.bool, device="cpu")
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if any(value.is_meta for value in tensors):
        return torch.ones(len(tensors[0]), dtype=torch.bool, device="cpu")  # There are no values to read.
    return torch.stack([(value != 0)[:, None].flatten(1).any(1) for value in tensors]).any(0).cpu()


def select_rows(x: Any, index: Tensor | None, batch: int) -> Any:
    """Some of the B rows, or all, of what :func:`check_inputs` accepts; a list of tensors is stacked."""
    if isinstance(x, Mapping):
        by_row = {key for key, value in x.items() if isinstance(value, (Tensor, list, tuple)) and len(value) == batch}
        return {key: select_rows(value, index, batch) if key in by_row else value for key, value in x.items()}
    if isinstance(x, Tensor):
        return x if index is None else x[index.to(x.device)]
    rows = list(x) if index is None else [x[i] for i in index.tolist()]
    return torch.stack(rows) if all(isinstance(row, Tensor) for row in rows) else rows


def blank_row(x: Tensor | Mapping[str, Any]) -> Any:
    """One row of the same form that an encoder can take: pictures of zeros, tokens and attention masks of ones."""
    if isinstance(x, Mapping):
        return {key: blank_row(value) if isinstance(value, Tensor) else value for key, value in x.items()}
    return x.new_full((1, *x.shape[1:]), 0 if x.is_floating_point() else 1)


def check_labels(labels: Tensor, batch: int, num_classes: int, device: torch.device | None = None) -> None:
    """(B,) int64 in [0, K) or -100, or (B, K) floating-point in [0, 1]; on the device, where one is given."""
    wanted = f"int64 (B,), or floating-point (B, {num_classes})"  # Writing `batch` out here would fix it in a graph.
    if not isinstance(labels, Tensor) or not (labels.dtype == torch.int64 or labels.is_floating_point()):
        raise TypeError(f"Expected argument `labels` to be {wanted}, but got {_kind(labels)}{_cast(labels)}.")
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


def check_finite(what: str, x: Tensor, rows: Tensor) -> None:
    """No NaN or infinity in some of the rows, (N,) bool."""
    if (wrong := rows & ~x.isfinite().all(1)).any():
        raise ValueError(f"Expected finite {what}, but row {int(wrong.nonzero()[0])} has others.")


def _cast(labels: Any) -> str:
    """What would make labels of what came, for an error."""
    if not isinstance(labels, Tensor):
        return "; torch.as_tensor(labels) makes a tensor"
    if labels.dim() == 1:
        return "; `.long()` casts one class a row" * (labels.dtype != torch.int64)
    return "; `.float()` casts several labels a row" * (not labels.is_floating_point())


def _kind(value: Any) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
