"""The model of clip_finetune.py: open_clip's CLIP, prompts if any, and a head of prototypes or, to compare, linear."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import open_clip
import torch
from files import InputError
from tiny_clip import short_prompts, tiny_clip
from torch import Tensor, nn

from protohead import PrototypeClassifier, attach, replace_module
from protohead.objective import classification_loss, read_objective


class LinearHead(nn.Module):
    """What prototypes are compared with: a linear layer on the features side by side, zeros where one is missing.

    Its loss has no margins, sub-cases and prototype loss: it is cross-entropy, or binary for several labels.
    """

    def __init__(self, in_features: Mapping[str, int], num_classes: int) -> None:
        super().__init__()
        self.in_features, self.num_classes = dict(in_features), num_classes
        self.modalities = tuple(in_features)
        self.linear = nn.Linear(sum(in_features.values()), num_classes)

    def forward(
        self,
        features: Mapping[str, Tensor],
        present: Tensor,
        labels: Tensor | None = None,
        objective: Any = None,
    ) -> Tensor:
        """(B, K) logits; with an objective, as PrototypeClassifier gives one, the loss."""
        there = present.to(self.linear.weight.device)
        columns = [torch.where(there[:, m, None], features[name], 0) for m, name in enumerate(self.modalities)]
        logits: Tensor = self.linear(torch.cat(columns, dim=1)).float()
        if labels is None or objective is None:
            return logits
        options = read_objective(objective, self.num_classes)
        losses, weights = classification_loss(logits, labels, options.class_weight, options.label_smoothing)
        return losses.sum() / weights.sum()

    def loss(self, features: Mapping[str, Tensor], present: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """The loss of a batch of features."""
        return self(features, present, labels, options)  # type: ignore[no-any-return]


def build(settings: dict[str, Any]) -> tuple[PrototypeClassifier, Any, Any, Any]:
    """The model, its transforms for training and for evaluation, and its tokenizer.

    Raises:
        InputError: If open_clip cannot load the model, or a setting is not as said.
    """
    torch.manual_seed(settings["seed"])  # Random weights must be the same again when --predict builds them.
    clip, augment, transform, tokenizer = _clip(settings["model"], settings["pretrained"])
    try:
        return _attached(clip, settings), augment, transform, tokenizer
    except ValueError as error:
        raise InputError(str(error)) from error


def _clip(name: str, tag: str | None) -> tuple[Any, Any, Any, Any]:
    if name == "tiny":
        clip, transform, tokenizer = tiny_clip()
        return clip, open_clip.image_transform(clip.visual.image_size, is_train=True), transform, tokenizer
    known = open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in known:
        near = get_close_matches(name, known, n=5, cutoff=0.4) or known
        raise InputError(f"Expected --model to be one of open_clip's, but got {name!r}; nearest: {', '.join(near)}.")
    try:
        clip, augment, transform = open_clip.create_model_and_transforms(name, tag)
        return clip, augment, transform, open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the model hub raise many kinds.
        tags = f"; its tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))}" if tag else ""
        raise InputError(f"Expected --model and --pretrained that load, but got {error}{tags}.") from error


def _attached(clip: nn.Module, settings: dict[str, Any]) -> PrototypeClassifier:
    options = {key: settings[key] for key in ("scale", "margin")}
    options["class_names"] = settings["classes"]
    if settings["preset"]:  # It is DPL's, whose head has prototypes for each missing case, no center and no bias.
        options |= {"cases": "all", "centered": False}
    if (prompts := settings.get("prompts", "none")) != "none":
        options["prompts"] = short_prompts(prompts, clip) if settings["model"] == "tiny" else prompts
    trainable = settings["trainable"] or None  # Beside prompts: what DCP trains.
    model: PrototypeClassifier = attach(clip, len(settings["classes"]), trainable=trainable, **options)
    if settings.get("head") == "linear":
        replace_module(model, "head", LinearHead(model.head.in_features, len(settings["classes"])))
    return model
