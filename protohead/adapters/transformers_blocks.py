"""The encoders of transformers' CLIP, SigLIP and SigLIP 2, whose tokens can be edited between layers.

This module imports transformers. Texts should be padded to one length (``padding="max_length"``): DCP's dynamic prompts
read all the tokens of a row, padding included.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, Siglip2Model, SiglipModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder
from transformers.models.siglip2.modeling_siglip2 import Siglip2Encoder

from protohead.adapters.towers import Towers
from protohead.prompts import Blocks

__all__ = ["PromptedClipEncoder", "PromptedSiglip2Encoder", "PromptedSiglipEncoder", "read_towers"]

# In transformers 4 CLIP's layers take two masks.
MASKS = [name for name in inspect.signature(CLIPEncoder.forward).parameters if name.endswith("attention_mask")]
OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")  # A prompted call returns the last tokens only.


class PromptedEncoder(Blocks):
    """What the three have in common."""

    layers: Any

    def forward(self, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(n, L, W) tokens to an object that holds tokens."""
        if not self.is_prompted():
            return super().forward(inputs_embeds, *args, **kwargs)
        masks = [kwargs.pop(name, None) for name in (MASKS if isinstance(self, CLIPEncoder) else MASKS[:1])]
        masks[: len(args)] = args
        for mask in masks:
            if mask is not None and (not isinstance(mask, Tensor) or mask.dim() not in (2, 4)):
                raise ValueError(
                    "Expected the attention of transformers to be 'eager', 'sdpa' or 'flash_attention_2' with prompts, "
                    f"but got a mask of type {type(mask).__name__}."
                )
        options = {name: value for name, value in kwargs.items() if name not in OUTPUTS}
        layers = [partial(_call, layer, options) for layer in self.layers]
        return BaseModelOutput(last_hidden_state=self.run(inputs_embeds, layers, masks))


def _call(layer: Any, options: dict[str, Any], x: Tensor, *masks: Tensor | None) -> Tensor:
    # A layer checkpoints itself in training mode; these are frozen, and so in eval mode.
    if getattr(layer, "gradient_checkpointing", False) and not layer.training and torch.is_grad_enabled():
        out: Any = checkpoint(layer, x, *masks, **options, use_reentrant=False)
    else:
        out = layer(x, *masks, **options)
    tokens: Tensor = out[0] if isinstance(out, tuple) else out
    return tokens


class PromptedClipEncoder(PromptedEncoder, CLIPEncoder):
    """CLIP's."""


class PromptedSiglipEncoder(PromptedEncoder, SiglipEncoder):
    """SigLIP's."""


class PromptedSiglip2Encoder(PromptedEncoder, Siglip2Encoder):
    """SigLIP 2's."""


CLASSES = {
    CLIPEncoder: PromptedClipEncoder,
    SiglipEncoder: PromptedSiglipEncoder,
    Siglip2Encoder: PromptedSiglip2Encoder,
}


def read_towers(model: Any) -> Towers | None:
    """The two towers, if the model is one of these."""
    if type(model) not in (CLIPModel, SiglipModel, Siglip2Model):
        return None
    stacks = {"image": model.vision_model.encoder, "text": model.text_model.encoder}
    classes = {name: CLASSES.get(type(stack), type(stack)) for name, stack in stacks.items()}
    if not all(prompted in CLASSES.values() for prompted in classes.values()):
        return None
    parts = ("visual_projection.", "vision_model.post_layernorm.", "text_model.final_layer_norm.")
    return Towers(
        module=model,
        methods={"image": "get_image_features", "text": "get_text_features"},
        paths={"image": "vision_model.encoder", "text": "text_model.encoder"},
        classes=classes,
        causal={"image": False, "text": isinstance(model, CLIPModel)},
        widths={"image": model.config.vision_config.hidden_size, "text": model.config.text_config.hidden_size},
        depths={name: len(stack.layers) for name, stack in stacks.items()},
        device=next(model.parameters()).device,
        trained=tuple(name for name, _ in model.named_parameters() if name.startswith(parts)),
    )
