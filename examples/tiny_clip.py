"""The small CLIP and the pictures that come with the examples: what runs without a download.

The model is open_clip's own, of 2.4 million parameters and the words of its training; examples/data/README.md says
what it was trained on. The pictures are clip art of 64 x 64 pixels, with titles, in 13 classes.
"""

import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file

from protohead.adapters.towers import tower_widths
from protohead.prompts import DcpPrompts, MapPrompts

DATA = Path(__file__).parent / "data"


def tiny_clip() -> tuple[open_clip.CLIP, Any, Callable[[Any], torch.Tensor]]:
    """The model with its weights, in eval mode; its transform of pictures; its tokenizer of texts."""
    config = json.loads((DATA / "tiny_clip.json").read_text("utf-8"))
    clip = open_clip.CLIP(**config)
    weights = {name: weight.float() for name, weight in load_file(DATA / "tiny_clip.safetensors").items()}
    # The file has the words that were seen in training; any other says what these say on average.
    stored, words = weights["token_embedding.weight"], weights.pop("token_embedding.ids").long()
    table = stored.mean(0).repeat(clip.vocab_size, 1)
    weights["token_embedding.weight"] = table.index_copy(0, words, stored)
    clip.load_state_dict(weights)
    transform = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=False)
    return clip.eval(), transform, open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])


def short_prompts(kind: str, clip: open_clip.CLIP) -> DcpPrompts | MapPrompts:
    """Those of "dcp" or "map", 6 tokens in each tower or 2 in each of 6 blocks.

    The published 36 of DCP would be twice a text, which has 16 tokens here, and more than half of a picture's 65.
    """
    widths = tower_widths(clip)
    return DcpPrompts(widths, length=6) if kind == "dcp" else MapPrompts(widths, length=2)


def clip_art() -> Path:
    """A folder with data.csv (id, image, text, label, split) and the pictures, unpacked the first time."""
    folder = DATA / "openclipart13"
    if not folder.exists():
        # First beside it, so that nobody finds a part.
        with TemporaryDirectory(prefix="openclipart13.", dir=DATA) as beside:
            with zipfile.ZipFile(DATA / "openclipart13.zip") as file:
                file.extractall(f"{beside}/all")
            with suppress(OSError):  # Another process was faster.
                Path(beside, "all").rename(folder)
    return folder
