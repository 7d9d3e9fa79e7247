"""Two towers that are run with prompts: a joint encoder."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from protohead.context import is_recorded, is_transformed
from protohead.encoding import batch_size, encode_present, encode_rows, select_rows
from protohead.prompts import COMPLETE, MODALITIES, Edit
from protohead.sharding import has_ranks, is_collective, is_sharded, run_blank, sum_between_ranks, zero_of

__all__ = ["PromptedTowers"]


class PromptedTowers(nn.Module):
    """A joint encoder for :class:`~protohead.PrototypeClassifier`: two towers and their prompts.

    Each tower runs once, on the rows that have its modality, with the prompts of each row's missing case. In a graph
    that is recorded it runs on every row.

    Args:
        towers: The module that encodes.
        methods: Name of a modality to the name of its encoder among the methods of `towers`.
        paths: Name of a modality to the path in `towers` of its :class:`~protohead.prompts.Blocks`.
        prompts: The prompt module.
        in_features: Name of a modality to the width of its features.

    Attributes:
        seen: (2, 2) buffer: how many rows of image and text, complete and alone, training has had. In eval mode a case
            that it has not had uses the prompts of the complete case, and that one, if only it was not had, those of
            the modality alone.
    """

    seen: Tensor
    by_case = True  # What the features of a row are depends on what else the row has.

    def __init__(
        self,
        towers: nn.Module,
        methods: Mapping[str, str],
        paths: Mapping[str, str],
        prompts: nn.Module,
        in_features: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.towers, self.prompts = towers, prompts
        self.methods, self.paths, self.in_features = dict(methods), dict(paths), dict(in_features)
        device = next(towers.parameters()).device
        self.register_buffer("seen", torch.zeros(2, 2, dtype=torch.int64, device=device))

    def forward(
        self, inputs: Mapping[str, Any], present: Mapping[str, Tensor], rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The features of B rows, zeros where a modality is missing.

        Args:
            inputs: As in :class:`~protohead.PrototypeClassifier`.
            present: Name of a modality to its (B,) bool column.
            rows: (B,) int64: which rows of the inputs these are, one of them maybe several times; by default each once.

        Returns:
            Name to (B, D_m).
        """
        if is_recorded():
            return self._record(inputs, present, rows)
        columns = {name: present[name].cpu() for name in MODALITIES}
        complete = columns["image"] & columns["text"]
        if has_ranks():
            self._check_shards()
        # Rows of one case stand together; the complete case comes first.
        groups = {name: [complete, column & ~complete] for name, column in columns.items()}
        counts = {name: [int(group.sum()) for group in groups[name]] for name in MODALITIES}
        self._mark(counts)
        features = {}
        for name in present:
            index = torch.cat([group.nonzero()[:, 0] for group in groups[name]])
            every = len(complete) in counts[name]  # All of one case: they stand as they are.
            source = rows if every else index if rows is None else rows[index]
            x = self._encode(name, inputs, source, counts[name])
            features[name] = x if every else x.new_zeros(len(complete), x.shape[1]).index_copy(0, index.to(x.device), x)
        if has_ranks():  # Each rank may have other cases, but needs all prompts.
            zero = zero_of([p for p in self.parameters() if p.requires_grad and not is_sharded(p)], self.seen.device)
            features = {name: x + zero for name, x in features.items()}
        return features

    def _record(
        self, inputs: Mapping[str, Any], present: Mapping[str, Tensor], rows: Tensor | None
    ) -> dict[str, Tensor]:
        """The features in a recorded graph: tokens are edited for both cases, and each row takes those of its own."""
        complete, features = present["image"] & present["text"], {}
        if self.training:
            counts = [[complete.sum(), (present[name] & ~complete).sum()] for name in MODALITIES]
            self._count(torch.stack([torch.stack(pair) for pair in counts]))
        for name, column in present.items():
            x, seen = inputs.get(name), self.seen[MODALITIES.index(name)] > 0
            if x is None:
                features[name] = self.seen.new_zeros(column.shape[0], self.in_features[name], dtype=torch.float32)
                continue
            first = complete.to(seen.device)
            if not self.training:  # As in `_mark`. ONNX Runtime has no `where` of booleans.
                first = (first | (seen[0] & ~seen[1])) & (seen[0] | ~seen[1])
            blocks: Any = self.towers.get_submodule(self.paths[name])
            if rows is not None:
                x = select_rows(x, rows, batch_size(name, x))
            with blocks.prompted(self._edits(name, [1, 1], first)):
                encoded: Any = encode_present(name, getattr(self.towers, self.methods[name]), x, column)
            features[name] = encoded
        return features

    def _mark(self, counts: Mapping[str, list[int]]) -> None:
        """In training, mark the cases as seen; else count rows of a case that was not as those of the other."""
        if self.training:
            self._count(torch.tensor([counts[name] for name in MODALITIES]))
        else:
            for name, seen in zip(MODALITIES, self.seen.tolist(), strict=True):
                if all(seen) != any(seen):
                    counts[name][:] = [sum(counts[name]) if x else 0 for x in seen]

    def _count(self, new: Tensor) -> None:
        if torch.is_grad_enabled() and not is_transformed():  # Not where features are cached.
            self.seen += sum_between_ranks(new.to(self.seen.device), self)

    def _encode(self, name: str, inputs: Mapping[str, Any], source: Tensor | None, counts: list[int]) -> Tensor:
        """(n, D) features of some rows of the inputs, or all; the first as complete rows, the others as alone."""
        encoder: Callable[..., Any] = getattr(self.towers, self.methods[name])
        blocks: Any = self.towers.get_submodule(self.paths[name])
        run, count = partial(encode_rows, name, encoder), sum(counts)
        if count:
            x = inputs[name]
            with blocks.prompted(self._edits(name, counts)):
                return run(rows=select_rows(x, source, batch_size(name, x)), count=count)
        if has_ranks() and is_collective(self.towers, name):
            with blocks.prompted(self._edits(name, [1, 0])):
                return run_blank(self.towers, partial(run, count=1), name, inputs)[:0]
        return torch.zeros(0, self.in_features[name], device=self.seen.device)

    def _check_shards(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(self.prompts, FSDPModule):  # Its calls, as many as the rank has cases, would be collectives.
            raise RuntimeError("Expected `fully_shard` on the model, not on its prompts alone: ranks have other cases.")

    def _edits(self, name: str, counts: list[int], complete: Tensor | None = None) -> list[Edit]:
        """The functions of the cases that the rows have, in order of these or as (n,) `complete` says."""
        cases = {case: count for case, count in zip((COMPLETE, name), counts, strict=True) if count}
        each = [self.prompts(name, case) for case in cases]
        if len({len(edits) for edits in each}) > 1:
            got = {case: len(edits) for case, edits in zip(cases, each, strict=True)}
            raise ValueError(f"Expected as many prompt functions for each case of {name!r}, but got {got}.")
        if len(each) == 1:
            return list(each[0])
        if complete is not None:
            return [partial(_edit_both, edits=edits, complete=complete) for edits in zip(*each, strict=True)]
        return [partial(_edit_groups, edits=edits, counts=[*cases.values()]) for edits in zip(*each, strict=True)]


def _edit_both(tokens: Tensor, edits: tuple[Edit, ...], complete: Tensor) -> Tensor:
    first, second = (edit(tokens) for edit in edits)
    return torch.where(complete[:, None, None], first, second)


def _edit_groups(tokens: Tensor, edits: tuple[Edit, ...], counts: list[int]) -> Tensor:
    parts = tokens.split(counts)
    return torch.cat([edit(part) for edit, part in zip(edits, parts, strict=True)])
