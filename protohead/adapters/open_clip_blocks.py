"""open_clip's own transformers, whose tokens can be edited between blocks. This module imports open_clip."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.transformer import Transformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protohead.adapters.open_clip import OpenClipTowers
from protohead.adapters.towers import Towers
from protohead.prompts import Blocks

__all__ = ["PromptedTransformer", "read_towers"]


class PromptedTransformer(Blocks, Transformer):  # type: ignore[misc]
    """open_clip's stack of blocks; at module level, so that it can be pickled."""

    resblocks: Any
    grad_checkpointing: bool

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(n, L, W) tokens to tokens."""
        if not self.is_prompted():
            result: Tensor = super().forward(x, attn_mask)
            return result
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        return self.run(x, [partial(_call, block, recompute) for block in self.resblocks], [attn_mask])


def _call(block: Callable[..., Tensor], recompute: bool, x: Tensor, mask: Tensor | None) -> Tensor:
    if recompute:  # The block alone: the edits are not made again.
        result: Tensor = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
        return result
    return block(x, attn_mask=mask)


def read_towers(model: Any) -> Towers | None:
    """The two towers, if they are open_clip's own."""
    text = getattr(model, "text", model)
    owners = {"image": model.visual, "text": text}
    stacks: dict[str, Any] = {name: getattr(owner, "transformer", None) for name, owner in owners.items()}
    if not all(type(stack) in (Transformer, PromptedTransformer) and stack.batch_first for stack in stacks.values()):
        return None
    parts = ("visual.proj", "visual.ln_post.", "ln_final.", "text.ln_final.")
    return Towers(
        module=OpenClipTowers(model),
        methods={"image": "encode_image", "text": "encode_text"},
        paths={"image": "clip.visual.transformer", "text": f"clip.{'' if text is model else 'text.'}transformer"},
        classes=dict.fromkeys(stacks, PromptedTransformer),
        causal={"image": False, "text": text.attn_mask is not None},
        widths={name: stack.width for name, stack in stacks.items()},
        depths={name: len(stack.resblocks) for name, stack in stacks.items()},
        device=next(model.parameters()).device,
        trained=tuple(name for name, _ in model.named_parameters() if name.startswith(parts)),
    )
