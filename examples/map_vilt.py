"""Missing-aware prompts on ViLT (MAP), with the prototype head in the place of MAP's classifier.

In a clone of MAP's repository this takes two more lines in run.py, around the one that builds the model:

    from protohead import attach
    model = ViLTransformerSS(_config)
    attach(model, num_classes=2, prototype_weight=0.9)  # hatememes; food101: 101; mmimdb: 23

MAP's loader, objectives, optimizer and Trainer stay as they are, and so does the rest of its source. To test a trained
model, build it with load_path="", then attach, then load_state_dict: MAP's own test_only=True loads with strict=False
before there is a head, and scores a random one. docs/research_code.md has the lines, and what was run on the original.

This program does the same on a module of MAP's shape around the ViLT of transformers, with MAP's input-level prompts.
The data are drawn here: the picture shows a fruit, the caption names a dish, and the class is the pair of them, one of
nine. So with both modalities every row can be right; with one, a third; without any, a ninth. By default the ViLT is
small, random and trained whole; --pretrained NAME takes the weights of a published one, and trains prompts and head
only, as MAP does. (That has been run on a small model saved to a folder, not on a published one.)
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

BATCH_SIZE = 32


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", metavar="NAME", help="a ViLT of the Hugging Face hub, or a folder with one")
    parser.add_argument("--rows", type=int, default=1000, help="(default: 1000, and half as many for the test)")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH_SIZE} rows each (default: 300)")
    parser.add_argument("--missing-rate", type=float, default=0.5, help="share of incomplete rows (default: 0.5)")
    parser.add_argument("--prototype-weight", type=float, default=0.9, help="λ (default: 0.9)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, ViltConfig, ViltModel

from protohead import attach

FRUITS = {"strawberry": (200, 30, 50), "lime": (80, 180, 40), "lemon": (240, 220, 60)}
DISHES = ("soup", "cake", "salad")
CAPTIONS = ("a bowl of {}", "the {} of the day", "grandmother made this {} for us", "{} served cold")
CASES = {0: "image+text", 1: "image", 2: "text"}  # MAP's missing_type: complete, text missing, image missing
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ViLTransformerSS(nn.Module):
    """A module with MAP's attributes and calls: prompts per missing type are prepended before the first blocks."""

    def __init__(self, vilt: Any, num_classes: int, prompt_length: int, train_all: bool) -> None:
        super().__init__()
        width, self.layers = vilt.config.hidden_size, (vilt.config.num_hidden_layers + 1) // 2
        self.embeddings = vilt.embeddings
        self.transformer = nn.ModuleDict({"blocks": vilt.encoder.layer, "norm": vilt.layernorm})
        self.pooler = vilt.pooler
        self.food101_classifier = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes)
        )
        # As MAP's: zeros, but for one row of ones.
        prompts = torch.eye(3, prompt_length)[:, None, :, None].repeat(1, self.layers, 1, width)
        self.complete_prompt, self.missing_img_prompt, self.missing_text_prompt = map(nn.Parameter, prompts)
        for name, p in self.named_parameters():
            p.requires_grad_(train_all or any(part in name for part in ("prompt", "pooler", "classifier")))

    def infer(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The features of a batch, under MAP's keys."""
        image = batch["image"][0]
        pixel_mask = torch.ones_like(image[:, 0], dtype=torch.long)
        blocks: Any = self.transformer["blocks"]
        x, mask = self.embeddings(batch["text_ids"], batch["text_masks"], None, image, pixel_mask, None, None)
        by_type = torch.stack([self.complete_prompt, self.missing_text_prompt, self.missing_img_prompt])
        prompts = by_type[torch.tensor(batch["missing_type"], device=x.device).long()]
        for i, block in enumerate(blocks):
            if i < self.layers:
                x = torch.cat([prompts[:, i], x], dim=1)
                mask = F.pad(mask, (prompts.shape[2], 0), value=1)
            x = block(x, (1 - mask[:, None, None].to(x.dtype)) * -1e4)[0]
        x = self.transformer["norm"](x)[:, self.layers * prompts.shape[2] :]
        texts = batch["text_ids"].shape[1]
        return {
            "text_feats": x[:, :texts],
            "image_feats": x[:, texts:],
            "cls_feats": self.pooler(x),
            "image_masks": mask[:, -(x.shape[1] - texts) :],
            "text_ids": batch["text_ids"],
            "text_masks": batch["text_masks"],
        }

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """MAP's objective for food101: the classifier is given the features alone."""
        logits = self.food101_classifier(self.infer(batch)["cls_feats"])
        labels = torch.tensor(batch["label"], device=logits.device)
        return {"food101_loss": F.cross_entropy(logits, labels), "food101_logits": logits, "food101_labels": labels}

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        """The sum of every loss in the output, as MAP's."""
        total: Tensor = sum(value for name, value in self(batch).items() if "loss" in name)
        return total


def draw(fruit: str, rng: random.Random) -> np.ndarray:
    """(32, 32, 3): a fruit somewhere on a plate of some grey."""
    grey = rng.randrange(90, 170)
    picture = Image.new("RGB", (32, 32), (grey, grey, grey))
    left, top, size = rng.randrange(2, 14), rng.randrange(2, 14), rng.randrange(12, 17)
    color = tuple(max(0, min(255, value + rng.randrange(-25, 26))) for value in FRUITS[fruit])
    ImageDraw.Draw(picture).ellipse((left, top, left + size, top + rng.randrange(10, 17)), fill=color)
    return np.array(picture)


def make_rows(count: int, missing_rate: float, rng: random.Random) -> list[dict[str, Any]]:
    """Rows as MAP's datasets give them; of those with something missing, half lack the image, half the text."""
    missing = round(missing_rate * count)
    types = [2.0] * (missing // 2) + [1.0] * (missing - missing // 2) + [0.0] * (count - missing)
    rows = []
    for missing_type in types:
        label = rng.randrange(len(FRUITS) * len(DISHES))
        image = draw(list(FRUITS)[label // len(DISHES)], rng)
        text = rng.choice(CAPTIONS).format(DISHES[label % len(DISHES)])
        if missing_type == 1:
            text = ""
        rows.append({"image": image, "text": text, "label": label, "missing_type": missing_type})
    return rows


def collate(rows: list[dict[str, Any]], tokenize: Callable[[list[str]], Any], size: int) -> dict[str, Any]:
    """A batch as MAP's collate gives it: a list of one view, and lists of floats and labels; on the GPU, if any."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    image = torch.from_numpy(np.stack(columns["image"])).permute(0, 3, 1, 2) / 127.5 - 1
    image = F.interpolate(image, size=(size, size), mode="bilinear")
    image[torch.tensor(columns["missing_type"]) == 2] = 1  # MAP's missing image.
    tokens = tokenize(columns["text"])
    texts = {"text_ids": tokens["input_ids"].to(DEVICE), "text_masks": tokens["attention_mask"].to(DEVICE)}
    return {**columns, "image": [image.to(DEVICE)], **texts}


def small_tokenizer() -> tuple[Callable[[list[str]], dict[str, Tensor]], int]:
    """One token a word, between [CLS] (1) and [SEP] (2); 0 pads. With the size of the vocabulary."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()} | set(DISHES))
    index = {word: i for i, word in enumerate(words, start=3)}
    length = 2 + max(len(caption.split()) for caption in CAPTIONS)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        ids = [[1, *(index[word] for word in text.split()), 2] for text in texts]
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": (padded != 0).long()}

    return tokenize, 3 + len(words)


def build(pretrained: str | None) -> tuple[Any, Callable[[list[str]], Any]]:
    """A ViLT and its tokenizer.

    Raises:
        OSError: If there is no such pretrained model.
    """
    if pretrained is None:
        tokenize, vocabulary = small_tokenizer()
        config = ViltConfig(
            vocab_size=vocabulary, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=16, image_size=32, patch_size=8, hidden_act="gelu",
        )  # fmt: skip
        return ViltModel(config), tokenize
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    vilt = ViltModel.from_pretrained(pretrained)
    return vilt, lambda texts: tokenizer(
        texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )


def main() -> None:
    """Train, and print the accuracy by missing case."""
    parser = options()
    arguments = parser.parse_args()
    if arguments.rows < BATCH_SIZE or arguments.steps < 1 or not 0 <= arguments.missing_rate <= 1 or arguments.lr <= 0:
        parser.error(f"Expected --rows >= {BATCH_SIZE}, --steps >= 1, --missing-rate in [0, 1], and --lr > 0.")

    if arguments.pretrained is None:
        torch.set_num_threads(1)  # The products are small: threads only cost here.
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    try:
        vilt, tokenize = build(arguments.pretrained)
        module = ViLTransformerSS(vilt, len(FRUITS) * len(DISHES), prompt_length=4, train_all=not arguments.pretrained)
        # This is the line.
        attach(module, len(FRUITS) * len(DISHES), prototype_weight=arguments.prototype_weight, margin=0.15)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = make_rows(arguments.rows, arguments.missing_rate, rng)
    tests = make_rows(arguments.rows // 2, arguments.missing_rate, rng)
    size = vilt.config.image_size

    module.to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=arguments.lr)
    progress = tqdm(range(arguments.steps), unit="step")
    for _ in progress:
        loss = module.training_step(collate(rng.sample(rows, BATCH_SIZE), tokenize, size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")

    module.eval()
    right: dict[str, list[bool]] = {name: [] for name in CASES.values()}
    with torch.no_grad():
        for start in range(0, len(tests), BATCH_SIZE):
            batch = collate(tests[start : start + BATCH_SIZE], tokenize, size)
            output = module(batch)
            hits = output["food101_logits"].argmax(1) == output["food101_labels"]
            for missing_type, hit in zip(batch["missing_type"], hits.tolist(), strict=True):
                right[CASES[int(missing_type)]].append(hit)
    print("| rows with | rows | accuracy | at best |\n|---|---|---|---|")
    for name, hits in right.items():
        if hits:
            best = 100 if name == "image+text" else 100 / 3
            print(f"| {name} | {len(hits)} | {100 * sum(hits) / len(hits):.1f} | {best:.1f} |")


if __name__ == "__main__":
    main()
