"""Missing cases: which modalities a row has, and how other projects write that down.

The missing case of a row is the set of modalities that are *present*, named by them: ``"image+text"``, ``"image"``.
Cases are ordered by the number of modalities present, descending, then in modality order.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "block_index",
    "case_masks",
    "case_names",
    "nearest_case",
    "present_from_flags",
    "present_from_missing_type",
    "present_from_ragpt",
]


def case_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """All ``2**M - 1`` missing cases of M modalities, in order.

    Raises:
        ValueError: If a name is not a non-empty string without ``+``, ``.`` and ``,``, or occurs twice.

    Example:
        >>> case_names(["image", "text"])
        ('image+text', 'image', 'text')
    """
    names = _modality_names(modalities)
    sizes = range(len(names), 0, -1)
    return tuple("+".join(case) for size in sizes for case in combinations(names, size))


def _modality_names(modalities: Sequence[str]) -> list[str]:
    if not isinstance(modalities, Iterable):
        raise TypeError(f"Expected argument `modalities` to be a list of names, but got {modalities!r}.")
    names = [modalities] if isinstance(modalities, str) else list(modalities)
    for name in names:
        if not isinstance(name, str) or not name or set(name) & set("+.,"):
            raise ValueError(f"Expected modality names to be non-empty strings without '+.,', but got {name!r}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected at least one modality and no name twice, but got {names}.")
    return names


def case_masks(modalities: Sequence[str], cases: str | Sequence[str] = "all") -> Tensor:
    """Which modalities each case holds.

    Args:
        modalities: The M modality names in order.
        cases: ``"all"``; ``"shared"``, the complete case alone, whose prototypes all rows share; or a list of names, in
            any order.

    Returns:
        (C, M) bool on the CPU, the cases in order.

    Raises:
        ValueError: If a case is unknown or given twice, or if a modality is in no case.

    Example:
        >>> case_masks(["image", "text"]).int().tolist()
        [[1, 1], [1, 0], [0, 1]]
        >>> case_masks(["image", "text"], "shared").int().tolist()
        [[1, 1]]
    """
    modalities = _modality_names(modalities)
    known = case_names(modalities)
    if isinstance(cases, str):
        if cases not in ("all", "shared"):
            what = f"'shared', 'all' or a list of names, such as {[known[0]]}"
            raise ValueError(f"Expected `cases` to be {what}, but got {cases!r}.")
        known = known if cases == "all" else known[:1]
    else:
        declared = list(cases) if isinstance(cases, Iterable) else [cases]
        if unknown := [case for case in declared if case not in known]:
            raise ValueError(f"Expected `cases` to be among {known}, but got {unknown}.")
        if len(set(declared)) < len(declared):
            raise ValueError(f"Expected no case twice in `cases`, but got {declared}.")
        known = tuple(case for case in known if case in declared)
    held = [case.split("+") for case in known]
    for name in modalities:
        if not any(name in case for case in held):
            raise ValueError(f"Expected every modality in at least one case, but {name!r} is in none of {known}.")
    return torch.tensor([[name in case for name in modalities] for case in held], dtype=torch.bool, device="cpu")


def nearest_case(present: Tensor, masks: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The case of each row; where that is not allowed or not declared, the nearest one that is.

    The nearest case is the smallest one that holds all that the row has, else the one that shares most with it; of
    equals, the first. Works on any device without waiting for it.

    Args:
        present: (B, M) bool.
        masks: (C, M) bool, from :func:`case_masks`.
        allowed: (C,) bool; all by default. At least one must be.

    Returns:
        (B,) int64, indices into the cases; C (one past the last) where nothing is present.

    Example:
        >>> masks = case_masks(["image", "text"])
        >>> nearest_case(torch.tensor([[True, True], [False, True], [False, False]]), masks).tolist()
        [0, 2, 3]
        >>> nearest_case(torch.tensor([[False, True]]), masks, torch.tensor([True, True, False])).tolist()
        [0]
    """
    return torch.where(present.any(1), _rank(present, masks, allowed).argmax(1), len(masks))


def _rank(present: Tensor, masks: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(B, C) numbers, the highest that of the nearest case; of equals, the first counts."""
    shared = present.float() @ masks.float().T  # (B, C); small whole numbers are exact
    # One number ranks the cases: those that hold all that the row has, smallest first, are above M, the others below.
    holds_all = 2 * masks.shape[1] + 1 - masks.sum(1)
    rank = torch.where(shared == present.sum(1, keepdim=True), holds_all, shared)
    if allowed is not None:
        rank = torch.where(allowed, rank, -1)
    return rank


def block_index(present: Tensor, masks: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The case that classifies each row, and which block of each modality's prototypes that means.

    Args:
        present: (B, M) bool.
        masks: (C, M) bool, from :func:`case_masks`.
        seen: (C, M) bool, the modalities of each case that can be used; all by default, and where none is seen.

    Returns:
        (B,) int64 in [0, C), any where nothing is present; and (B, M) int64, the block of the cases that hold the
        modality, -1 where it says nothing about the row.

    Example:
        >>> masks = case_masks(["image", "text"])
        >>> block_index(torch.tensor([[True, True], [False, True]]), masks)
        (tensor([0, 2]), tensor([[ 0,  0],
                [-1,  1]]))
    """
    usable = masks if seen is None else masks & (seen | ~seen.any())
    if len(masks) == 1:
        return torch.zeros_like(present[:, 0], dtype=torch.int64), (present & usable).long() - 1
    rank = _rank(present, masks)
    if seen is not None:  # By what can be used; of equals, the case of training.
        rank = rank + 4 * (masks.shape[1] + 1) * _rank(present, usable, usable.any(1))
    case = rank.argmax(1)
    return case, torch.where(present & usable[case], (masks.cumsum(0) - 1)[case], -1)


def present_from_missing_type(
    missing_type: Tensor | Sequence[float], modalities: Sequence[str], device: torch.device | str | None = None
) -> Tensor:
    """Present masks from the ``missing_type`` of MAP, DCP and DPL: 0 complete, 1 text missing, 2 image missing.

    Args:
        missing_type: (B,) tensor, or the list of floats that their batches hold.
        modalities: ``"image"`` and ``"text"`` in the order of the columns, such as ``head.modalities``.
        device: Of the result; by default that of a tensor `missing_type`, else the CPU.

    Returns:
        (B, 2) bool.

    Raises:
        ValueError: If a code is none of 0, 1, 2 (with its row), or the modalities are others.
        TypeError: If it is a boolean mask.

    Example:
        >>> present_from_missing_type([0.0, 1.0, 2.0], ["image", "text"]).tolist()
        [[True, True], [True, False], [False, True]]
    """
    meaning = {0: {"image", "text"}, 1: {"image"}, 2: {"text"}}
    what = "MAP's missing types are 0 (complete), 1 (text missing), 2 (image missing)"
    return _present_from_codes(missing_type, meaning, what, modalities, device)


def present_from_ragpt(
    codes: Tensor | Sequence[float],
    missing: str,
    modalities: Sequence[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """Present masks from RAGPT's missing tables, whose codes mean different things in their two kinds.

    Args:
        codes: (B,) numbers. In a table for one modality 0 is missing and 1 present; in one for both, 0 is text missing,
            1 image missing and 2 complete.
        missing: The kind of table: what it lets go missing, ``"image"``, ``"text"`` or ``"both"``.
        modalities: ``"image"`` and ``"text"`` in the order of the columns, such as ``head.modalities``.
        device: Of the result; by default that of a tensor `codes`, else the CPU.

    Returns:
        (B, 2) bool.

    Raises:
        ValueError: If a code is outside the convention (with its row), or another argument is none of those allowed.
        TypeError: If `codes` is a boolean mask.

    Example:
        >>> present_from_ragpt([0, 1], "text", ["image", "text"]).tolist()
        [[True, False], [True, True]]
        >>> present_from_ragpt([0, 1, 2], "both", ["image", "text"]).tolist()
        [[True, False], [False, True], [True, True]]
    """
    if missing == "both":
        meaning = {0: {"image"}, 1: {"text"}, 2: {"image", "text"}}
        what = "RAGPT's codes for both are 0 (text missing), 1 (image missing), 2 (complete)"
    elif missing in ("image", "text"):
        meaning = {0: {"image", "text"} - {missing}, 1: {"image", "text"}}
        what = f"RAGPT's codes for {missing} are 0 ({missing} missing), 1 (complete)"
    else:
        raise ValueError(f"Expected argument `missing` to be 'image', 'text' or 'both', but got {missing!r}.")
    return _present_from_codes(codes, meaning, what, modalities, device)


def present_from_flags(
    flags: Mapping[str, Tensor | Sequence[bool | None] | None],
    modalities: Sequence[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """Present masks from one column of booleans per modality, or a pandas DataFrame.

    Args:
        flags: Name of a modality to its (B,) column of True (present), False, None, NaN or ``pandas.NA`` (missing); a
            column that is None or left out is missing in every row.
        modalities: The M names in the order of the result's columns, such as ``head.modalities``.
        device: Of the result; the CPU by default.

    Returns:
        (B, M) bool.

    Raises:
        ValueError: If a flag is anything else (with its row), a name is unknown, or the lengths differ.

    Example:
        >>> present_from_flags({"image": [True, None], "text": [True, True]}, ["image", "text"]).tolist()
        [[True, True], [False, True]]
    """
    modalities = _modality_names(modalities)
    if unknown := [name for name in flags if name not in modalities]:
        raise ValueError(f"Expected flags for the modalities {tuple(modalities)}, but got {unknown}.")
    columns = {name: _values(name, flags[name]) for name in flags if flags[name] is not None}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Expected columns of one length, and at least one column, but got lengths {lengths}.")
    for name, column in columns.items():
        for row, value in enumerate(column):
            if not (isinstance(value, bool) or is_empty(value)):
                raise ValueError(
                    f"Expected True, False or None, but got {value!r} for {name!r} in row {row}. Of columns of 0 and 1 "
                    "`columns == 1` makes such, of paths or texts `columns.notna()`."
                )
    rows = next(iter(lengths.values()))
    table = [[value is True for value in columns.get(name, [None] * rows)] for name in modalities]
    return torch.tensor(table, dtype=torch.bool, device=device).T.contiguous()


def is_empty(value: Any) -> bool:
    """None, NaN, or pandas' marks of what is missing, whose types are known by name: pandas may not be there."""
    is_nan = isinstance(value, Real) and value != value
    return value is None or type(value).__name__ in ("NAType", "NaTType") or bool(is_nan)


def _present_from_codes(
    codes: Tensor | Sequence[float],
    meaning: Mapping[int, set[str]],
    what: str,
    modalities: Sequence[str],
    device: torch.device | str | None,
) -> Tensor:
    modalities = _modality_names(modalities)
    if set(modalities) != {"image", "text"}:
        raise ValueError(f"Expected `modalities` to be 'image' and 'text', in any order, but got {modalities}.")
    values = _values("codes", codes)
    for row, value in enumerate(values):
        if isinstance(value, bool):
            raise TypeError(f"Expected codes, but got a boolean mask ({value} in row {row}): {what}.")
        if not isinstance(value, (int, float)) or value not in meaning:
            raise ValueError(f"Expected codes among {list(meaning)}, but got {value!r} in row {row}: {what}.")
    if device is None and isinstance(codes, Tensor):
        device = codes.device
    table = [[name in meaning[value] for name in modalities] for value in values]
    return torch.tensor(table, dtype=torch.bool, device=device).reshape(len(values), 2)


def _values(name: str, column: Any) -> list[Any]:
    """A column as Python values: the elements of tensors and arrays are unpacked, so that True is not taken for 1."""
    shape = getattr(column, "shape", None)
    no_column = isinstance(column, (str, bytes, Mapping)) or not hasattr(column, "__len__")
    if no_column or (shape is not None and len(shape) != 1):
        got = f"shape {tuple(shape)}" if shape is not None else repr(column)
        raise ValueError(f"Expected {name!r} to be one-dimensional, one value a row, but got {got}.")
    values = column.tolist() if hasattr(column, "tolist") else column
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]
