"""Deep correlated prompting on CLIP (DCP), with the prototype head in the place of DCP's classifier.

In a clone of DCP's repository this takes two more lines in run.py, around the one that builds the model:

    from protohead import attach
    model = CLIPransformerSS(_config)
    attach(model, num_classes=23, prototype_weight=0.1)  # mmimdb; hatememes: 2; food101: 101

DCP's loader, objectives, optimizer and Trainer stay as they are, and so does the rest of its source. To test a trained
model, build it with load_path="" (its constructor loads with strict=True, and fails), then attach, then
load_state_dict. docs/research_code.md has the lines, what DCP forgets to save, and what was run on the original.

This program does the same on a module of DCP's shape around a model of open_clip, with DCP's staged prompts in their
simplest form: those of the next layer are made from those of both towers in the last one; common and dynamic prompts
are left out. The data are drawn here, with several labels a row, as in MM-IMDb: a film has some of four genres, each of
which is on its poster as a disc of some colour, in its plot as a word, or both. So with both modalities every label can
be right; with one, five in six; without any, one in two. By default the CLIP is small, random and trained whole; with
--model NAME and --pretrained TAG, or a file, only prompts, final norms, image projection and head are, as in DCP. (That
has been run on weights saved to a file, not on published ones.)
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

BATCH_SIZE = 32


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="one of open_clip's, such as ViT-B-32")
    parser.add_argument("--pretrained", metavar="TAG", help="its weights: a tag of open_clip, or a file")
    parser.add_argument("--rows", type=int, default=1000, help="(default: 1000, and half as many for the test)")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH_SIZE} rows each (default: 300)")
    parser.add_argument("--missing-rate", type=float, default=0.5, help="share of incomplete rows (default: 0.5)")
    parser.add_argument("--prototype-weight", type=float, default=0.1, help="λ (default: 0.1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from protohead import attach

GENRES = {"western": (220, 180, 40), "romance": (210, 40, 60), "space": (40, 70, 210), "nature": (50, 170, 70)}
FILLERS = ("a film", "one night", "in a small town", "with old friends", "and nobody knows")
CASES = {0: "image+text", 1: "image", 2: "text"}  # DCP's missing_type: complete, text missing, image missing
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def with_prompts(x: Tensor, prompts: Sequence[Tensor], blocks: Any, mask: Tensor | None) -> Tensor:
    """Run the blocks with prompts in front, those of the first layers replaced by each layer's own; tokens only."""
    length = prompts[0].shape[1]
    for i, block in enumerate(blocks):
        if i < len(prompts):
            x = torch.cat([prompts[i], x if i == 0 else x[:, length:]], dim=1)
        x = block(x, attn_mask=mask)
    return x[:, length:]


def encode_image(tower: Any, image: Tensor, prompts: Sequence[Tensor]) -> Any:
    """(B, 3, H, W) to (B, D), with open_clip's image tower."""
    x = tower.conv1(image).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    x = with_prompts(tower.ln_pre(x), prompts, tower.transformer.resblocks, None)
    return tower.ln_post(x[:, 0]) @ tower.proj


class TextEncoder(nn.Module):
    """open_clip's text tower, with prompts, which every token sees."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.token_embedding, self.positional_embedding = clip.token_embedding, clip.positional_embedding
        self.transformer, self.ln_final, self.text_projection = clip.transformer, clip.ln_final, clip.text_projection

    def forward(self, ids: Tensor, prompts: Sequence[Tensor]) -> Any:
        """(B, T) to (B, D)."""
        length = prompts[0].shape[1] + ids.shape[1]
        mask = torch.full((length, length), -torch.inf, device=ids.device).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.ln_final(with_prompts(x, prompts, self.transformer.resblocks, mask))
        return x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


class PromptLearner(nn.Module):
    """First prompts for complete and for missing, of either tower; then each layer's from both of the layer before."""

    def __init__(self, image_width: int, text_width: int, length: int, depth: int) -> None:
        super().__init__()
        both = image_width + text_width
        self.image = nn.Parameter(0.02 * torch.randn(2, length, image_width))
        self.text = nn.Parameter(0.02 * torch.randn(2, length, text_width))

        def mlps(width: int) -> nn.ModuleList:
            layer = nn.LayerNorm(both), nn.Linear(both, both // 16), nn.GELU(), nn.Linear(both // 16, width)
            return nn.ModuleList(nn.Sequential(*layer) for _ in range(depth))

        self.to_image, self.to_text = mlps(image_width), mlps(text_width)

    def forward(self, missing_type: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B,) to two (B, L, W) a layer, the image tower's and the text tower's."""
        image, text = self.image[(missing_type == 2).long()], self.text[(missing_type == 1).long()]
        prompts = []
        for to_image, to_text in zip(self.to_image, self.to_text, strict=True):
            both = torch.cat([image, text], dim=2)
            image, text = to_image(both), to_text(both)
            prompts.append((image, text))
        return prompts


class CustomCLIP(nn.Module):
    """What DCP calls `model`."""

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        super().__init__()
        usual = isinstance(clip, open_clip.CLIP) and clip.text_pool_type == "argmax"
        if not usual or getattr(clip.visual, "pool_type", "") != "tok" or clip.visual.attn_pool:
            raise ValueError("Expected --model to be a CLIP with a ViT of open_clip's own, such as ViT-B-32.")
        self.tokenizer = tokenizer
        self.image_encoder, self.text_encoder = clip.visual, TextEncoder(clip)
        widths = clip.visual.conv1.out_channels, clip.token_embedding.embedding_dim
        self.prompt_learner = PromptLearner(*widths, length=4, depth=(len(clip.transformer.resblocks) + 1) // 2)

    def forward(self, image: Tensor, text: list[str], missing_type: list[float]) -> Tensor:
        """(B, 2·D): image features, then text features."""
        images, texts = zip(*self.prompt_learner(torch.tensor(missing_type, device=image.device)), strict=True)
        ids = self.tokenizer(text).to(image.device)
        return torch.cat([encode_image(self.image_encoder, image, images), self.text_encoder(ids, texts)], dim=1)


class CLIPransformerSS(nn.Module):
    """A module with DCP's attributes and calls."""

    def __init__(self, clip: Any, tokenizer: Any, num_classes: int, train_all: bool) -> None:
        super().__init__()
        self.model = CustomCLIP(clip, tokenizer)
        self.mmimdb_classifier = nn.Linear(2 * clip.visual.output_dim, num_classes)
        trainable = ("prompt", "ln_final", "ln_post", "classifier")
        for name, p in self.named_parameters():
            p.requires_grad_(train_all or any(part in name for part in trainable) or name.endswith(".proj"))

    def infer(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The features, with zeros for what is missing."""
        features = self.model(batch["image"][0], batch["text"][0], batch["missing_type"])
        half, missing_type = features.shape[1] // 2, torch.tensor(batch["missing_type"])
        features[missing_type == 1, half:] = 0
        features[missing_type == 2, :half] = 0
        return {"cls_feats": features}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """DCP's objective for mmimdb: the classifier is given the features alone."""
        logits = self.mmimdb_classifier(self.infer(batch)["cls_feats"])
        labels = torch.tensor(batch["label"], device=logits.device).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        return {"mmimdb_loss": loss, "mmimdb_logits": logits, "mmimdb_labels": labels}

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """The sum of every loss in the output, as DCP's."""
        total: Tensor = sum(value for name, value in self(batch).items() if "loss" in name)
        return total


def make_rows(count: int, missing_rate: float, rng: random.Random) -> list[dict[str, Any]]:
    """Films as DCP's datasets give them; of those with something missing, half lack the image, half the text."""
    missing, rows = round(missing_rate * count), []
    for missing_type in [2.0] * (missing // 2) + [1.0] * (missing - missing // 2) + [0.0] * (count - missing):
        poster, words = Image.new("RGB", (32, 32), (rng.randrange(90, 170),) * 3), [rng.choice(FILLERS)]
        label = [rng.randrange(2) for _ in GENRES]
        corners = rng.sample([(0, 0), (16, 0), (0, 16), (16, 16)], 4)
        for has, (genre, color), (left, top) in zip(label, GENRES.items(), corners, strict=True):
            where = rng.choice(["poster", "plot", "both"]) if has else "nowhere"
            if where in ("poster", "both"):
                x, y = left + rng.randrange(4), top + rng.randrange(4)
                ImageDraw.Draw(poster).ellipse((x, y, x + 11, y + 11), fill=color)
            if where in ("plot", "both"):
                words += [genre, rng.choice(FILLERS)]
        text = "" if missing_type == 1 else " ".join(words)
        rows.append({"image": np.array(poster), "text": text, "label": label, "missing_type": missing_type})
    return rows


def collate(rows: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """A batch as DCP's collate gives it: a list of one view, a tuple of one list of texts."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    image = torch.from_numpy(np.stack(columns["image"])).permute(0, 3, 1, 2) / 127.5 - 1
    image = F.interpolate(image, size=(size, size), mode="bilinear")
    image[torch.tensor(columns["missing_type"]) == 2] = 1  # DCP's missing image.
    return {**columns, "image": [image.to(DEVICE)], "text": (columns["text"],)}


def build(model: str | None, pretrained: str | None) -> tuple[Any, Any]:
    """An open_clip model and its tokenizer."""
    if model is None:
        vision = CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=8, image_size=32)
        text = CLIPTextCfg(context_length=24, width=64, heads=4, layers=3)
        return open_clip.CLIP(64, vision, text), open_clip.SimpleTokenizer(context_length=24)
    clip = open_clip.create_model(model, pretrained=pretrained)
    return clip, open_clip.get_tokenizer(model)


def main() -> None:
    """Train, and print the accuracy of the labels by missing case."""
    parser = options()
    arguments = parser.parse_args()
    if arguments.rows < BATCH_SIZE or arguments.steps < 1 or not 0 <= arguments.missing_rate <= 1 or arguments.lr <= 0:
        parser.error(f"Expected --rows >= {BATCH_SIZE}, --steps >= 1, --missing-rate in [0, 1], and --lr > 0.")
    if arguments.model is None:
        if arguments.pretrained:
            parser.error("Expected --model beside --pretrained.")
        torch.set_num_threads(1)  # The products are small: threads only cost here.
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    try:
        clip, tokenizer = build(arguments.model, arguments.pretrained)
        module = CLIPransformerSS(clip, tokenizer, len(GENRES), train_all=arguments.model is None)
        # This is the line. A margin shifts the logits of several labels, so that 0 divides them less well: it is small.
        attach(module, len(GENRES), prototype_weight=arguments.prototype_weight, scale=16.0, margin=0.05)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    rows, tests = (make_rows(count, arguments.missing_rate, rng) for count in (arguments.rows, arguments.rows // 2))
    size = clip.visual.image_size[0]

    module.to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=arguments.lr)
    progress = tqdm(range(arguments.steps), unit="step")
    for _ in progress:
        loss = module.training_step(collate(rng.sample(rows, BATCH_SIZE), size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    module.eval()
    batch = collate(tests, size)
    with torch.no_grad():
        output = module(batch)
    right = 100 * ((output["mmimdb_logits"] > 0) == (output["mmimdb_labels"] > 0)).float().mean(1).cpu()
    print("| rows with | rows | labels right | at best |\n|---|---|---|---|")
    for missing_type, name in CASES.items():
        chosen = torch.tensor(batch["missing_type"]) == missing_type
        if chosen.any():
            best = 100 if missing_type == 0 else 100 * 5 / 6
            print(f"| {name} | {chosen.sum()} | {right[chosen].mean():.1f} | {best:.1f} |")


if __name__ == "__main__":
    main()
