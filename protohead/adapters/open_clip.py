"""open_clip models: CLIP, CustomTextCLIP (SigLIP, timm towers) and CoCa."""

from typing import Any

import torch

from protohead.classifier import Encoder

LOOKED_FOR = (
    "open_clip's models: methods `encode_image` and `encode_text`, and attributes `visual` and `context_length`"
)


def fits(model: object) -> bool:
    """Whether this is an open_clip model, by what it has."""
    return all(hasattr(model, name) for name in ("encode_image", "encode_text", "visual", "context_length"))


def encoders(model: Any) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The two towers, and one row that they can take."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    example = {
        "image": torch.zeros(1, 3, height, width, device=device),
        "text": torch.zeros(1, model.context_length, dtype=torch.long, device=device),
    }
    return {"image": model.encode_image, "text": model.encode_text}, example
