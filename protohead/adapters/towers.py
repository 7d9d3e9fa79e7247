"""Prompts on the two towers of an open_clip or transformers model, whose code and weights stay as they are.

The stack of blocks of each tower gets a subclass of its class, :class:`protohead.prompts.Blocks`, which does as before
but while a prompted call runs. The names in the model's state_dict do not change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from protohead.adapters import open_clip, transformers
from protohead.classifier import encode_rows
from protohead.context import is_transformed
from protohead.inputs import batch_size, select_rows
from protohead.prompts import COMPLETE, MODALITIES, Blocks, DcpPrompts, Edit, MapPrompts
from protohead.sharding import has_ranks, is_collective, is_sharded, run_blank, sum_between_ranks, zero_of

__all__ = ["PromptedTowers", "Towers", "put_on", "read_towers", "tower_widths"]

SUPPORTED = (
    "open_clip's CLIP, CustomTextCLIP and CoCa whose towers are its own transformers (no ResNet, timm or Hugging Face "
    "towers), and transformers' CLIPModel, SiglipModel and Siglip2Model"
)
PROMPTS: dict[str, Callable[..., nn.Module]] = {"dcp": DcpPrompts, "map": MapPrompts}


class PromptedTowers(nn.Module):
    """A joint encoder for :class:`~protohead.PrototypeClassifier`: two towers and their prompts.

    Each tower runs once, on the rows that have its modality, with the prompts of each row's missing case.

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

    def _mark(self, counts: Mapping[str, list[int]]) -> None:
        """In training, mark the cases as seen; else count rows of a case that was not as those of the other."""
        if self.training:
            if torch.is_grad_enabled() and not is_transformed():  # Not where features are cached.
                new = torch.tensor([counts[name] for name in MODALITIES], device=self.seen.device)
                self.seen += sum_between_ranks(new, self)
        else:
            for name, seen in zip(MODALITIES, self.seen.tolist(), strict=True):
                if all(seen) != any(seen):
                    counts[name][:] = [sum(counts[name]) if x else 0 for x in seen]

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

    def _edits(self, name: str, counts: list[int]) -> list[Edit]:
        """The functions of the cases that the rows have; made once a case."""
        cases = {case: count for case, count in zip((COMPLETE, name), counts, strict=True) if count}
        each = [self.prompts(name, case) for case in cases]
        if len({len(edits) for edits in each}) > 1:
            got = {case: len(edits) for case, edits in zip(cases, each, strict=True)}
            raise ValueError(f"Expected as many prompt functions for each case of {name!r}, but got {got}.")
        if len(each) == 1:
            return list(each[0])
        return [partial(_edit_groups, edits=edits, counts=[*cases.values()]) for edits in zip(*each, strict=True)]


def _edit_groups(tokens: Tensor, edits: tuple[Edit, ...], counts: list[int]) -> Tensor:
    parts = tokens.split(counts)
    return torch.cat([edit(part) for edit, part in zip(edits, parts, strict=True)])


# -- which towers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Towers:
    """Two towers that can be prompted, as they were found in a model, which is not changed yet.

    Args:
        module: What encodes.
        methods: As in :class:`PromptedTowers`.
        paths: As in :class:`PromptedTowers`.
        classes: Name of a modality to the class that its blocks are to get.
        causal: Name of a modality to whether its tokens see only those before them.
        widths: Name of a modality to the width of its tokens.
        depths: Name of a modality to the number of its blocks.
        device: Of the parameters.
        trained: The names of the model's parameters that DCP trains beside its prompts.
        prompts: The module.
    """

    module: nn.Module
    methods: dict[str, str]
    paths: dict[str, str]
    classes: dict[str, type[Blocks]]
    causal: dict[str, bool]
    widths: dict[str, int]
    depths: dict[str, int]
    device: torch.device
    trained: tuple[str, ...]
    prompts: Any = None


def tower_widths(backbone: Any) -> dict[str, int]:
    """The widths of a model's image and text tokens, which prompt modules are made for.

    Args:
        backbone: As for :func:`protohead.attach` with prompts.

    Raises:
        ValueError: If its towers cannot be prompted, with what is supported.

    Example:
        >>> import open_clip
        >>> tower_widths(open_clip.create_model("ViT-S-32"))
        {'image': 384, 'text': 384}
    """
    return read_towers(backbone).widths


def read_towers(backbone: Any, prompts: Any = None) -> Towers:
    """The towers of a model, and prompts for them.

    Args:
        backbone: The model.
        prompts: As in :func:`protohead.attach`.

    Raises:
        ValueError: If they cannot be prompted, with what is supported; or if the prompts do not fit.
        TypeError: If the prompts are neither a name nor a module.
    """
    towers: Towers | None = None
    if open_clip.fits(backbone):  # What follows imports the family.
        towers = import_module("protohead.adapters.open_clip_blocks").read_towers(backbone)
    elif transformers.fits(backbone):
        towers = import_module("protohead.adapters.transformers_blocks").read_towers(backbone)
    if towers is not None:
        return towers if prompts is None else replace(towers, prompts=_make_prompts(prompts, towers))
    raise ValueError(f"Expected a model for `prompts` of {SUPPORTED}; but got {_kind(backbone)}.")


def _kind(backbone: Any) -> str:
    towers = [type(getattr(backbone, name)).__name__ for name in ("visual", "text") if hasattr(backbone, name)]
    return type(backbone).__name__ + (f" with {' and '.join(towers)}" if towers else "")


def _make_prompts(prompts: Any, towers: Towers) -> nn.Module:
    """The prompt module that was asked for, tried on tokens of zeros."""
    if isinstance(prompts, str):
        if prompts not in PROMPTS:
            raise ValueError(f"Expected argument `prompts` to be among {[*PROMPTS]}, or a module, but got {prompts!r}.")
        prompts = PROMPTS[prompts](towers.widths)
    if not isinstance(prompts, nn.Module):
        raise TypeError(f"Expected argument `prompts` to be a name or a module, but got {type(prompts).__name__}.")
    if isinstance(prompts, (DcpPrompts, MapPrompts)) and prompts.widths != towers.widths:
        raise ValueError(f"Expected prompts for tokens of widths {towers.widths}, but got {prompts.widths}.")
    prompts.to(towers.device)
    modes = {module: module.training for module in prompts.modules()}
    try:
        prompts.eval()  # Zeros must not reach what a batch norm has counted.
        for name in MODALITIES:
            lengths = {case: _try(prompts, name, case, towers) for case in (COMPLETE, name)}
            if lengths[COMPLETE] != lengths[name]:
                raise ValueError(f"Expected prompts to add as many tokens in both cases, but there are {lengths}.")
    finally:
        for module, mode in modes.items():
            module.training = mode
    return prompts


@torch.no_grad()
def _try(prompts: nn.Module, name: str, case: str, towers: Towers) -> list[int]:
    """How many tokens there are after each function of a prompt module, where there were two."""
    edits, depth, width = prompts(name, case), towers.depths[name], towers.widths[name]
    if not isinstance(edits, (list, tuple)) or not all(callable(edit) for edit in edits):
        raise TypeError(f"Expected the prompt module to return a list of functions, but got {type(edits).__name__}.")
    if len(edits) > depth:
        raise ValueError(f"Expected prompts of at most the {depth} blocks of the {name} tower, but got {len(edits)}.")
    tokens, lengths = torch.zeros(3, 2, width, device=towers.device), []
    for edit in edits:
        before, tokens = tokens.shape[1], edit(tokens)
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else ()
        if len(shape) != 3 or (shape[0], shape[2]) != (3, width) or shape[1] < before:
            got = shape or type(tokens).__name__
            wanted = f"(n, L, {width}) tokens, not fewer than before"
            raise ValueError(f"Expected prompt functions for {name!r} to return {wanted}, but got {got}.")
        lengths.append(tokens.shape[1])
    return lengths


def put_on(towers: Towers, in_features: Mapping[str, int]) -> PromptedTowers:
    """Change the classes of the blocks, and nothing else; what could be refused has been."""
    for name, path in towers.paths.items():
        blocks: Any = towers.module.get_submodule(path)
        blocks.__class__ = towers.classes[name]
        blocks.causal = towers.causal[name]
    return PromptedTowers(towers.module, towers.methods, towers.paths, towers.prompts, in_features)
