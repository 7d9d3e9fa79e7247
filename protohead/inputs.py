"""What a head accepts: every check that stands between a wrong input and a silent wrong answer."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["Features", "check_count", "check_labels", "check_present", "per_case", "read_features"]

Features = Tensor | Mapping[str, Tensor | None]


def read_features(features: Features, present: Tensor | None, widths: Mapping[str, int]) -> tuple[list[Tensor], Tensor]:
    """Check a batch; return one (B, D_m) tensor per modality and the (B, M) present mask.

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


def _named(features: Features, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The features that are given, by name, in order."""
    if isinstance(features, Tensor):
        total = sum(widths.values())
        if features.dim() != 2 or features.shape[1] != total:
            got = tuple(features.shape)
            raise ValueError(
                f"Expected argument `features` to be of shape (B, {total}) for {dict(widths)}, but got {got}."
            )
        features = dict(zip(widths, features.split(list(widths.values()), dim=1), strict=True))
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
            f"Expected argument `present` to be a bool tensor, but got {_kind(present)}; "
            "a mask of 0 and 1 takes .bool(), and protohead.present_from_missing_type converts MAP's codes."
        )
    if present.dim() != 2 or present.shape[1] != len(modalities):
        wanted, got = f"(B, {len(modalities)})", tuple(present.shape)
        raise ValueError(f"Expected argument `present` to be of shape {wanted} for {tuple(modalities)}, but got {got}.")


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
        wrong = (labels != -100) & ((labels < 0) | (labels >= num_classes))
        allowed = f"in [0, {num_classes}), or -100"
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


def check_count(argument: str, value: Any) -> int:
    """A positive integer, NumPy's included."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected argument `{argument}` to be a positive integer, but got {value!r}.")
    return int(value)


def _kind(value: Any) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__
