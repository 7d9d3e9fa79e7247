"""The rows and the models of prompts.py: the tiny CLIP with or without prompts, and its pictures and titles."""

import copy
import csv
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from protohead import PrototypeClassifier, attach, replace_module
from protohead.simulate import missing_table

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # Programs, not a package.
from clip_model import LinearHead
from tiny_clip import DATA, clip_art, short_prompts, tiny_clip

MODALITIES, SPLITS, RATE, BATCH = ("image", "text"), ("train", "val", "test"), 0.7, 32
HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "paper": {"cases": "all", "scale": 32, "centered": False},
    "shared": {},
    "each case": {"cases": "all"},
}


class Rows(NamedTuple):
    """A split: what the towers take, or what stands before their last layers."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """Some of the inputs."""
        return {name: x[index] for name, x in self.inputs.items()}


class Tail(nn.Module):
    """The last layers of a tower, on tokens that are pooled already: a norm and a projection."""

    def __init__(self, norm: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.norm, self.projection = copy.deepcopy(norm), nn.Parameter(projection.detach().clone())

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, W) to (n, D)."""
        features: Tensor = self.norm(pooled) @ self.projection
        return features


# -- the rows ---------------------------------------------------------------------------------------------------------


@cache
def clip_model() -> tuple[Any, Any, Any]:
    """The model, its transform and its tokenizer, which take seconds to make."""
    return tiny_clip()


def weights() -> str:
    """Which weights these are."""
    return f"{zlib.crc32((DATA / 'tiny_clip.safetensors').read_bytes()):08x}"


@cache
def pictures(rows: int | None) -> dict[str, Rows]:
    """Every split of the clip art, in memory."""
    _, transform, tokenizer = clip_model()
    with open(clip_art() / "data.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    classes, splits = sorted({line["label"] for line in lines}), {}
    for split in SPLITS:
        some = [line for line in lines if line["split"] == split][:rows]
        images = torch.stack([transform(Image.open(clip_art() / line["image"]).convert("RGB")) for line in some])
        labels = torch.tensor([classes.index(line["label"]) for line in some])
        splits[split] = Rows({"image": images, "text": tokenizer([line["text"] for line in some])}, labels)
    return splits


@cache
def pooled(rows: int | None) -> tuple[dict[str, Rows], float]:
    """What the last layers of the frozen towers are given, and the seconds that training and validation rows took."""
    clip = copy.deepcopy(clip_model()[0])
    clip.visual.ln_post, clip.ln_final = nn.Identity(), nn.Identity()
    clip.visual.proj = clip.text_projection = None
    encoders, splits, seconds = {"image": clip.encode_image, "text": clip.encode_text}, {}, 0.0
    for split, part in pictures(rows).items():
        begin = time.process_time()
        with torch.no_grad():
            inputs = {name: torch.cat([encoders[name](y) for y in x.split(BATCH)]) for name, x in part.inputs.items()}
        seconds += (time.process_time() - begin) * (split != "test")
        splits[split] = Rows(inputs, part.labels)
    return splits, seconds


def present_of(rows: int, split: str, missing: str, seed: int) -> Tensor:
    """(N, 2) what the rows of a split have."""
    if missing == "none":
        return torch.ones(rows, len(MODALITIES), dtype=torch.bool)
    return missing_table(rows, MODALITIES, RATE, missing, len(SPLITS) * seed + SPLITS.index(split)).present


# -- the models -------------------------------------------------------------------------------------------------------


def build(towers: str, head: str, num_classes: int) -> PrototypeClassifier:
    """The model of a cell; without prompts it begins behind the blocks."""
    clip = clip_model()[0]
    model: PrototypeClassifier
    if towers in ("none", "last"):
        tails = {
            "image": Tail(clip.visual.ln_post, clip.visual.proj),
            "text": Tail(clip.ln_final, clip.text_projection),
        }
        widths = {name: tail.projection.shape[1] for name, tail in tails.items()}
        trainable = ("image.*", "text.norm.*") if towers == "last" else None
        options = {"trainable": trainable, "in_features": widths, "shared_space": True, **HEADS[head]}
        model = attach(tails, num_classes, **options)
    else:
        clip = copy.deepcopy(clip)  # It is changed in place.
        model = attach(clip, num_classes, prompts=short_prompts(towers, clip), **HEADS[head])
    if head == "linear":
        replace_module(model, "head", LinearHead(model.head.in_features, num_classes))
    return model
