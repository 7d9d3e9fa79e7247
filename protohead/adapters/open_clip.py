"""open_clip models: CLIP, CustomTextCLIP (SigLIP, timm towers) and CoCa."""

from typing import Any

import torch
from torch import Tensor, nn

from protohead.encoding import Encoder

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
    towers = OpenClipTowers(model)
    return {"image": towers.encode_image, "text": towers.encode_text}, example


class OpenClipTowers(nn.Module):
    """Pictures come as open_clip's transforms make them, in float32, whatever the dtype of the model."""

    clip: Any

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def encode_image(self, image: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D)."""
        if not image.is_floating_point():  # The cast below would hide that nobody has prepared them.
            raise TypeError(f"Expected pictures as open_clip's transform makes them, but got {image.dtype}.")
        first = next((part for part in self.clip.visual.modules() if isinstance(part, nn.Conv2d)), None)
        features: Tensor = self.clip.encode_image(image if first is None else image.to(first.weight.dtype))
        return features

    def encode_text(self, text: Tensor) -> Tensor:
        """(n, context length) token ids -> (n, D)."""
        features: Tensor = self.clip.encode_text(text)
        return features
