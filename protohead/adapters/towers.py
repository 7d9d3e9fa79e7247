"""Prompts on the two towers of an open_clip or transformers model, whose code and weights stay as they are.

The stack of blocks of each tower gets a subclass of its class, :class:`protohead.prompts.Blocks`, which does as before
but while a prompted call runs. The names in the model's state_dict do not change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from protohead.adapters import open_clip, transformers
from protohead.adapters.prompted import PromptedTowers
from protohead.prompts import COMPLETE, MODALITIES, Blocks, DcpPrompts, MapPrompts

__all__ = ["Towers", "put_on", "read_towers", "tower_widths"]

SUPPORTED = (
    "open_clip's CLIP, CustomTextCLIP and CoCa whose towers are its own transformers (no ResNet, timm or Hugging Face "
    "towers), and transformers' CLIPModel, SiglipModel and Siglip2Model"
)
PROMPTS: dict[str, Callable[..., nn.Module]] = {"dcp": DcpPrompts, "map": MapPrompts}


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
