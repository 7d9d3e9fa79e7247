"""Which modalities a row has, from what other projects write down: codes, inverted masks, columns."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from protohead.cases import check_modalities
from protohead.context import is_readable

__all__ = [
    "column_values",
    "is_empty",
    "present_from_flags",
    "present_from_missing_mask",
    "present_from_missing_type",
    "present_from_ragpt",
]


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


def present_from_missing_mask(
    missing_mask: Tensor | Sequence[Sequence[float]],
    columns: Sequence[str],
    modalities: Sequence[str],
    device: torch.device | str | None = None,
) -> Tensor:
    """Present masks from inverted ones, as in AOEPT: True, or 1, is *missing*.

    Args:
        missing_mask: (B, M) bool, or numbers 0 and 1; a tensor, an array, or a list of rows.
        columns: The M names in the order of its columns: AOEPT's are ``"text"``, then ``"image"``.
        modalities: The same names in the order of the result's columns, such as ``head.modalities``.
        device: Of the result; by default that of a tensor `missing_mask`, else the CPU.

    Returns:
        (B, M) bool.

    Raises:
        ValueError: If the shape or, on the CPU, a value is another (with its row), or the names are not the same.

    Example:
        >>> missing_masks = torch.tensor([[False, False], [True, False]])  # row 1 lacks its text
        >>> present_from_missing_mask(missing_masks, ["text", "image"], ["image", "text"]).tolist()
        [[True, True], [True, False]]
    """
    columns, modalities = check_modalities(columns), check_modalities(modalities)
    if set(columns) != set(modalities):
        raise ValueError(f"Expected `columns` to be {tuple(modalities)}, in any order, but got {tuple(columns)}.")
    mask = torch.as_tensor(missing_mask, device=device)
    if mask.dim() != 2 or mask.shape[1] != len(columns):
        got = tuple(mask.shape)
        raise ValueError(f"Expected `missing_mask` to be of shape (B, {len(columns)}) for {columns}, but got {got}.")
    if is_readable(mask) and (wrong := (mask != 0) & (mask != 1)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"Expected True or 1 where one is missing, but got {mask[row, column].item()} in row {row}.")
    return mask[:, [columns.index(name) for name in modalities]] == 0


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
    modalities = check_modalities(modalities)
    if unknown := [name for name in flags if name not in modalities]:
        raise ValueError(f"Expected flags for the modalities {tuple(modalities)}, but got {unknown}.")
    columns = {name: column_values(name, flags[name]) for name in flags if flags[name] is not None}
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
    modalities = check_modalities(modalities)
    if set(modalities) != {"image", "text"}:
        raise ValueError(f"Expected `modalities` to be 'image' and 'text', in any order, but got {modalities}.")
    values = column_values("codes", codes)
    for row, value in enumerate(values):
        if isinstance(value, bool):
            raise TypeError(f"Expected codes, but got a boolean mask ({value} in row {row}): {what}.")
        if not isinstance(value, (int, float)) or value not in meaning:
            raise ValueError(f"Expected codes among {list(meaning)}, but got {value!r} in row {row}: {what}.")
    if device is None and isinstance(codes, Tensor):
        device = codes.device
    table = [[name in meaning[value] for name in modalities] for value in values]
    return torch.tensor(table, dtype=torch.bool, device=device).reshape(len(values), 2)


def column_values(name: str, column: Any) -> list[Any]:
    """A column as Python values: the elements of tensors and arrays are unpacked, so that True is not taken for 1."""
    shape = getattr(column, "shape", None)
    no_column = isinstance(column, (str, bytes, Mapping)) or not hasattr(column, "__len__")
    if no_column or (shape is not None and len(shape) != 1):
        got = f"shape {tuple(shape)}" if shape is not None else repr(column)
        raise ValueError(f"Expected {name!r} to be one-dimensional, one value a row, but got {got}.")
    values = column.tolist() if hasattr(column, "tolist") else column
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]
