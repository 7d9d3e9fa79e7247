"""Missing cases: which modalities a row has.

The missing case of a row is the set of modalities that are *present*, named by them: ``"image+text"``, ``"image"``.
Cases are ordered by the number of modalities present, descending, then in modality order.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

__all__ = [
    "block_index",
    "case_masks",
    "case_names",
    "check_modalities",
    "nearest_case",
]


def case_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """All ``2**M - 1`` missing cases of M modalities, in order.

    Raises:
        ValueError: If a name is not a non-empty string without ``+``, ``.`` and ``,``, or occurs twice.

    Example:
        >>> case_names(["image", "text"])
        ('image+text', 'image', 'text')
    """
    names = check_modalities(modalities)
    sizes = range(len(names), 0, -1)
    return tuple("+".join(case) for size in sizes for case in combinations(names, size))


def check_modalities(modalities: Sequence[str]) -> list[str]:
    """The names as a list: at least one, no name twice, and none that could be a case's."""
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
    modalities = check_modalities(modalities)
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
