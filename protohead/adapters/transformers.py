"""transformers models: those with two towers, and ViLT, in which both modalities are one sequence."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protohead.encoding import Encoder
from protohead.raw import raw_hint

LOOKED_FOR = "transformers' models: methods `get_image_features` and `get_text_features`; or ViLT's `config.model_type`"

# [CLS] [SEP] of BERT's uncased vocabulary, which every published ViLT uses: an empty text.
EMPTY_TEXT = (101, 102)


def fits(model: object) -> bool:
    """Whether this is a two-tower model or a `ViltModel`, by what it has."""
    return _is_vilt(model) or all(hasattr(model, name) for name in ("get_image_features", "get_text_features"))


def encoders(model: Any) -> tuple[Mapping[str, Encoder] | Encoder, dict[str, Any]]:
    """The two towers, or a joint encoder, and one row that they can take."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 8, dtype=torch.long, device=device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if _is_vilt(model):
        size = model.config.image_size
        if (words := model.config.vocab_size) <= max(EMPTY_TEXT):
            raise ValueError(
                f"Expected ViLT with BERT's vocabulary, whose empty text is {EMPTY_TEXT}, but got {words} words."
            )
        return ViltTokens(model), {"image": torch.zeros(1, 3, size, size, device=device), "text": text}
    vision = getattr(model.config, "vision_config", None) or model.config.image_config
    if "spatial_shapes" in inspect.signature(model.get_image_features).parameters:  # SigLIP 2's patches of any shape
        patches = torch.zeros(1, 1, 3 * vision.patch_size**2, device=device)
        one = torch.ones(1, 1, dtype=torch.long, device=device)
        image: Any = {"pixel_values": patches, "pixel_attention_mask": one, "spatial_shapes": one.expand(1, 2)}
    else:
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        image = {"pixel_values": torch.zeros(1, 3, height, width, device=device)}
    if model.config.model_type == "flava":
        model = FlavaTokens(model)
    return {"image": model.get_image_features, "text": model.get_text_features}, {"image": image, "text": text}


def _is_vilt(model: object) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "vilt" and hasattr(model, "embeddings")


class ViltTokens(nn.Module):
    """The text and the image [CLS] tokens of ViLT's last layer; what is missing is replaced as MAP does.

    A missing text is an empty one, a missing image is all ones, of ViLT's own size.
    """

    vilt: Any

    def __init__(self, vilt: nn.Module) -> None:
        super().__init__()
        self.vilt = vilt

    def forward(self, inputs: Mapping[str, Any], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B, D) features of ``"image"`` and ``"text"``, from tokens and pixels as ViLT's processor makes them."""
        weight = self.vilt.embeddings.patch_embeddings.projection.weight
        size, batch, device = self.vilt.config.image_size, len(present["text"]), weight.device
        if batch == 0:
            return dict.fromkeys(present, weight.new_zeros(0, self.vilt.config.hidden_size))
        text, image = _tensors("text", inputs, "input_ids"), _tensors("image", inputs, "pixel_values")
        has_text, has_image = (present[name].to(device)[:, None] for name in ("text", "image"))

        ids = text.get("input_ids", torch.zeros(batch, 2, dtype=torch.long, device=device))
        length = max(2, ids.shape[1])
        empty = torch.tensor([*EMPTY_TEXT, *[0] * (length - 2)], device=device)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **text}
        instead = {"input_ids": empty, "attention_mask": empty > 0}
        for key, x in text.items():
            padded = nn.functional.pad(x, (0, length - ids.shape[1]))
            text[key] = torch.where(has_text, padded, instead.get(key, torch.zeros_like(empty)).to(x.dtype))

        # As large as ViLT's own size at least, so that a missing row is the same beside small pictures and large ones.
        pixels = image.get("pixel_values", torch.ones(batch, 3, size, size, dtype=weight.dtype, device=device))
        mask = image.get("pixel_mask", torch.ones(batch, *pixels.shape[2:], dtype=torch.long, device=device))
        room = (0, max(0, size - pixels.shape[3]), 0, max(0, size - pixels.shape[2]))
        pixels, mask = nn.functional.pad(pixels, room), nn.functional.pad(mask, room)
        square = torch.zeros_like(mask[0])
        square[:size, :size] = 1
        image["pixel_values"] = torch.where(has_image[:, :, None, None], pixels, 1).to(weight.dtype)
        image["pixel_mask"] = torch.where(has_image[:, :, None], mask, square)

        tokens = self.vilt(**text, **image).last_hidden_state
        return {"image": tokens[:, length], "text": tokens[:, 0]}


class FlavaTokens(nn.Module):
    """FLAVA's projected [CLS] tokens, which its contrastive loss compares: it alone returns features of all tokens."""

    flava: Any

    def __init__(self, flava: nn.Module) -> None:
        super().__init__()
        self.flava = flava

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """(n, D) features of pictures."""
        return _first_token(self.flava.get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """(n, D) features of texts."""
        return _first_token(self.flava.get_text_features(*args, **kwargs))


def _first_token(out: Any) -> Tensor:
    tokens: Tensor = getattr(out, "pooler_output", out)
    return tokens[:, 0]


def _tensors(name: str, inputs: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """An input in the form of a processor's output; of a list of tensors with None for missing rows, zeros there."""
    x = inputs.get(name)
    if isinstance(x, Sequence):
        if wrong := [row for row in x if row is not None and not isinstance(row, Tensor)]:
            got, (_, mark, advice) = type(wrong[0]).__name__, raw_hint(name, wrong).partition(": ")
            raise TypeError(f"Expected a list of tensors, or None, for ViLT's {name!r}, but got {got}{mark}{advice}.")
        blank = next((torch.zeros_like(row) for row in x if row is not None), None)
        x = None if blank is None else torch.stack([blank if row is None else row for row in x])
    if isinstance(x, Mapping) and key not in x:
        raise ValueError(f"Expected inputs of {name!r} to hold {key!r} for ViLT, but got {list(x)}.")
    return dict(x) if isinstance(x, Mapping) else {} if x is None else {key: x}
