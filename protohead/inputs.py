"""What a head and a classifier accept: every check that stands between a wrong input and a silent wrong answer."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Features",
    "blank_row",
    "check_constants",
    "check_count",
    "check_device",
    "check_inputs",
    "check_labels",
    "check_present",
    "per_case",
    "read_features",
    "select_rows",
]

Features = Tensor | Mapping[str, Tensor | None]


def read_features(
    features: Features, present: Tensor | None, widths: Mapping[str, int], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Check a batch; return one (B, D_m) tensor per modality and the (B, M) present mask, all on the device.

    Zeros stand in for a modality that is not given, so that its prototypes stay in the graph, as DDP needs.
    """
    given = _named(features, widths)
    if present is not None:
        check_present(present, tuple(widths))
    first = next(iter(given.values()), present)
    if first is None:
        raise ValueError(f"Expected features of at least one of {tuple(widths)}, or `present`, but got neither.")
    batch = first.shape[0]  # len() would fix the batch size of an exported graph.
    inputs = given if present is None else {**given, "present": present}
    if any(x.shape[0] != batch for x in inputs.values()):
        sizes = {name: x.shape[0] for name, x in inputs.items()}
        raise ValueError(f"Expected one batch size, but got {sizes}.")
    for name, x in inputs.items():
        check_device(name, x, device)
    rows = [
        given[name] if name in given else torch.zeros(batch, width, device=first.device)
        for name, width in widths.items()
    ]
    if present is None:
        return rows, torch.stack([(x != 0).any(1) for x in rows], dim=1)
    if len(given) == len(widths):
        return rows, present
    there = torch.tensor([name in given for name in widths], device=present.device)
    # In a compiled graph, where values cannot be read, a modality that is not given is missing.
    if not torch.compiler.is_compiling() and (present & ~there).any():
        row, m = (present & ~there).nonzero()[0].tolist()
        raise ValueError(
            f"Expected features of {tuple(widths)[m]!r}, which `present` says that row {row} has; got none."
        )
    return rows, present & there


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Name what is elsewhere, which torch does not."""
    if x.device != device:
        raise ValueError(f"Expected `{name}` to be on the device of the head, {device}, but got it on {x.device}.")


def _named(features: Features, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The features that are given, by name, in order."""
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
    given = {name: x for name in widths if (x := features.get(name)) is not None}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"Expected features of {name!r} to be a floating-point tensor, but got {_kind(x)}.")
        if x.dim() != 2 or x.shape[1] != widths[name]:
            got = tuple(x.shape)
            raise ValueError(f"Expected features of {name!r} to be of shape (B, {widths[name]}), but got {got}.")
    return given


def check_present(present: Tensor, modalities: Sequence[str]) -> None:
    """A (B, M) bool tensor."""
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        raise TypeError(
            f"Expected argument `present` to be a bool tensor, but got {_kind(present)}; a mask of 0 and 1 takes "
            "torch.as_tensor(mask).bool(), and protohead.present_from_missing_type converts MAP's codes."
        )
    if present.dim() != 2 or present.shape[1] != len(modalities):
        wanted, got = f"(B, {len(modalities)})", tuple(present.shape)
        raise ValueError(f"Expected argument `present` to be of shape {wanted} for {tuple(modalities)}, but got {got}.")


def check_inputs(inputs: Mapping[str, Any], present: Tensor | None, modalities: Sequence[str]) -> Tensor:
    """Check what encoders are to be given; return the (B, M) present mask, on the CPU."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"Expected argument `inputs` to map modalities to inputs, but got {_kind(inputs)}.")
    if unknown := [name for name in inputs if name not in modalities]:
        raise ValueError(f"Expected inputs of {tuple(modalities)}, but got others: {unknown}.")
    given = {name: x for name in modalities if (x := inputs.get(name)) is not None}
    sizes = {name: _batch_size(name, x) for name, x in given.items()}
    if present is not None:
        check_present(present, modalities)
        sizes["present"] = len(present)
    if len(set(sizes.values())) != 1:
        raise ValueError(f"Expected inputs of {tuple(modalities)}, all of one batch size, but got {sizes or 'none'}.")
    (batch,) = set(sizes.values())
    if present is None:
        columns = [_rows_there(given.get(name, [None] * batch)) for name in modalities]
        return torch.stack(columns, dim=1)
    present = present.cpu()
    for m, name in enumerate(modalities):
        x = given.get(name, [None] * batch)
        # Of a tensor `present` may say that zeros are there; what is None cannot be.
        if isinstance(x, Sequence) and (lacking := present[:, m] & ~_rows_there(x)).any():
            row = lacking.nonzero()[0].item()
            raise ValueError(f"Expected inputs of {name!r}, which `present` says that row {row} has; got none.")
    return present


def _batch_size(name: str, x: Any) -> int:
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes)):
        return len(x)
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if not tensors or any(value.dim() == 0 for value in tensors):
        wanted = "a tensor, a mapping of tensors (return_tensors='pt'), or a list, with one row a sample"
        raise TypeError(f"Expected inputs of {name!r} to be {wanted}, but got {_kind(x)}.")
    if len({len(value) for value in tensors}) > 1:
        got = {key: tuple(value.shape) for key, value in x.items() if isinstance(value, Tensor)}
        raise ValueError(f"Expected the tensors of {name!r} to have one batch size, but got {got}.")
    return len(tensors[0])


def _rows_there(x: Any) -> Tensor:
    """(B,) bool on the CPU: the rows that are neither None nor NaN in a list, or not zeros in all the tensors."""
    if isinstance(x, Sequence):
        missing = [row is None or (isinstance(row, float) and row != row) for row in x]
        return ~torch.tensor(missing, dtype=torch.bool, device="cpu")
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if any(value.is_meta for value in tensors):
        return torch.ones(len(tensors[0]), dtype=torch.bool, device="cpu")  # There are no values to read.
    return torch.stack([(value != 0)[:, None].flatten(1).any(1) for value in tensors]).any(0).cpu()


def select_rows(x: Any, index: Tensor, batch: int) -> Any:
    """Some of the B rows of what :func:`check_inputs` accepts; a list of tensors is stacked."""
    if isinstance(x, Mapping):
        by_row = {key for key, value in x.items() if isinstance(value, (Tensor, list, tuple)) and len(value) == batch}
        return {key: select_rows(value, index, batch) if key in by_row else value for key, value in x.items()}
    if isinstance(x, Tensor):
        return x if len(index) == batch else x[index.to(x.device)]
    rows = [x[i] for i in index.tolist()]
    return torch.stack(rows) if all(isinstance(row, Tensor) for row in rows) else rows


def blank_row(x: Tensor | Mapping[str, Any]) -> Any:
    """One row of the same form that an encoder can take: pictures of zeros, tokens and attention masks of ones."""
    if isinstance(x, Mapping):
        return {key: blank_row(value) if isinstance(value, Tensor) else value for key, value in x.items()}
    return x.new_full((1, *x.shape[1:]), 0 if x.is_floating_point() else 1)


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """(B,) int64 in [0, K) or -100, or (B, K) floating-point in [0, 1]."""
    wanted = f"int64 (B,), or floating-point (B, {num_classes})"  # Writing `batch` out here would fix it in a graph.
    if not isinstance(labels, Tensor) or not (labels.dtype == torch.int64 or labels.is_floating_point()):
        raise TypeError(f"Expected argument `labels` to be {wanted}, but got {_kind(labels)}.")
    if labels.shape != ((batch, num_classes) if labels.is_floating_point() else (batch,)):
        got = f"{labels.dtype} {tuple(labels.shape)} for B = {batch}"
        raise ValueError(f"Expected argument `labels` to be {wanted}, but got {got}.")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return  # Reading the values would wait for the device, or break the graph.
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


def per_case(argument: str, value: float | Mapping[str, float], cases: Sequence[str]) -> list[float]:
    """One number per case, from one for all or from a mapping that names them all."""
    if not isinstance(value, Mapping):
        value = dict.fromkeys(cases, value)
    if set(value) != set(cases):
        raise ValueError(f"Expected argument `{argument}` to name exactly the cases {cases}, but got {tuple(value)}.")
    for number in value.values():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"Expected argument `{argument}` to be a number, or numbers by case, but got {number!r}.")
    return [float(value[case]) for case in cases]


def check_constants(scale: Sequence[float], margin: Sequence[float], cases: Sequence[str]) -> None:
    """One of each for each case: as the constructor was given them, or as they have been changed since."""
    if len(scale) != len(cases) or not all(0 < value < math.inf for value in scale):
        raise ValueError(f"Expected `scale` to be positive, for each of the cases {cases}, but got {scale}.")
    if len(margin) != len(cases) or not all(0 <= value < math.pi for value in margin):
        wanted = f"in [0, pi) radians, for each of the cases {cases}"
        raise ValueError(f"Expected `margin` to be {wanted}, but got {margin}.")


def check_count(argument: str, value: Any) -> int:
    """A positive integer, NumPy's included."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected argument `{argument}` to be a positive integer, but got {value!r}.")
    return int(value)


def _kind(value: Any) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
