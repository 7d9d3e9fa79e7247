"""What is multiplied by what on the CPU: the rows of a batch in order of the blocks of prototypes that score them."""

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, chain, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "Planner", "Share"]

FEW = 4  # Where most blocks of a modality have no more rows, those are padded to as many and multiplied in one batch.
KINDS = 2**8  # So many kinds of rows, by what they have, are looked up in a table.
SMALL, PLANS = 2**6, 2**8  # Of masks with no more elements, so many plans are remembered.


class Padding(NamedTuple):
    """Blocks with few entries, each padded to FEW."""

    slots: Tensor  # (V, FEW) 1 + the entry in each slot, 0 for none
    place: Tensor  # (N,) the slot of each entry, counted through all blocks; any where an entry is in none

    @classmethod
    def of(cls, number: Tensor) -> "Padding":
        """For so many entries of each block; where that is more than FEW, the slots stay empty."""
        start, room = number.cumsum(0) - number, torch.arange(FEW, device=number.device)
        slots = torch.where(room < number.where(number <= FEW, 0)[:, None], start[:, None] + room + 1, 0)
        block = torch.arange(len(number), device=number.device).repeat_interleave(number)
        place = torch.arange(len(block), device=number.device) - start[block]
        return cls(slots, block * FEW + place.clamp_(max=FEW - 1))

    def part(self, low: int, high: int, first: int, count: int) -> "Padding":
        """That of the blocks from `low` to `high`, whose entries are `count` from `first`."""
        return Padding((self.slots[low:high] - first).clamp_(min=0), self.place[first : first + count] - low * FEW)


class Share(NamedTuple):
    """What one modality multiplies. Its entries are the rows that it scores, in order of their blocks."""

    rows: Tensor | None  # (N,) the row of each entry; None where they are all the rows in order
    alone: list[tuple[int, slice]]  # blocks that are multiplied one by one, and their entries
    padding: "Padding | None"  # where the others are, of which there are none without


class Plan(NamedTuple):
    """What is multiplied by what."""

    shares: list[Share]
    counts: list[int]  # the entries of each block, counted through all modalities
    scores: Tensor  # (blocks, B) bool: which rows a block scores, of the blocks of all modalities
    factor: Tensor  # (B, 1) scale / |c|
    scale: Tensor  # (B, 1)
    margin: Tensor  # (B, 1)
    scored: Tensor  # (B, 1) 1 where a row is scored by anything, or 0

    @classmethod
    def of(cls, scores: Tensor, constants: Tensor, blocks: Sequence[int]) -> "Plan":
        """From `scores`, the (4, B, 1) factor, scale, margin and scored, and the number of blocks of each modality."""
        rows, number = scores.nonzero()[:, 1], scores.sum(1)
        counts, shares, stop, padding = number.tolist(), [], 0, None
        for low, high in pairwise(accumulate(blocks, initial=0)):
            begin, alone, own = stop, [], None
            if sum(0 < n <= FEW for n in counts[low:high]) >= max(4, (high - low) / 2):
                padding = padding or Padding.of(number)
                own = padding.part(low, high, begin, sum(counts[low:high]))
            for v, n in enumerate(counts[low:high]):
                start, stop = stop, stop + n
                if n > (0 if own is None else FEW):
                    alone.append((v, slice(start - begin, stop - begin)))
            whole = len(alone) == 1 and counts[low + alone[0][0]] == scores.shape[1]
            shares.append(Share(None if whole else rows[begin:stop], alone, own))
        return cls(shares, counts, scores, *constants)


class Planner:
    """Makes plans. It remembers what scores each kind of row, and the plans of small batches."""

    def __init__(self) -> None:
        self._known: dict[bool, tuple[Hashable, Tensor, Tensor, Tensor, dict[tuple[bool, ...] | None, Plan]]] = {}

    def __call__(
        self,
        present: Tensor,
        blocks: Sequence[int],
        scored_by: Callable[[Tensor], tuple[Tensor, Tensor]],
        training: bool,
        key: Hashable,
    ) -> Plan:
        """The plan of a batch.

        Args:
            present: (B, M) bool.
            blocks: As in :meth:`Plan.of`.
            scored_by: Gives the scores and constants of rows by what they have, as :meth:`Plan.of` takes them.
            training: The two modes are remembered beside each other,
            key: each as long as this, on which `scored_by` depends, stays.
        """
        modalities = present.shape[1]
        mask = tuple(chain(*present.tolist())) if present.numel() <= SMALL else None
        known = self._known.get(training)
        if known is not None and known[0] == key and mask in known[4]:
            return known[4][mask]
        with torch.inference_mode(False):  # What is remembered must not be of inference mode.
            if 2**modalities > KINDS:
                return Plan.of(*scored_by(present), blocks)
            if known is None or known[0] != key:
                kinds = torch.tensor(list(product([False, True], repeat=modalities)), device=present.device)
                digits = torch.tensor([2**m for m in reversed(range(modalities))], device=present.device)
                self._known[training] = known = key, digits, *scored_by(kinds), {}
            _, digits, scores, constants, plans = known
            kind = present.long().mv(digits)
            plan = Plan.of(scores.index_select(1, kind), constants.index_select(1, kind), blocks)
        if mask is not None:
            if len(plans) == PLANS:
                plans.clear()
            plans[mask] = plan
        return plan
