"""Products with a picture, a title and a table of numbers, each of which may lack any: CLIP and an encoder of your own.

    python examples/products.py                                             # the tiny CLIP of examples/data, 20 seconds
    python examples/products.py --model ViT-B-32 --pretrained openai        # a large one

CLIP's towers stay frozen: they encode pictures and titles once. On these features the head trains, and with it the
small encoder of the numbers, which has gaps of its own: some products lack one number or two, some the whole table.

The products are drawn here; put your own in the place of `draw`. The picture shows a shape, the title says a material,
and the numbers tell small from large, so that only all three together tell the class, one of twelve.
"""

import argparse
from pathlib import Path


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="open_clip's name (default: the tiny CLIP)")
    parser.add_argument("--pretrained", help="tag or checkpoint file of the weights of --model; none: random")
    parser.add_argument("--count", type=int, default=2000, help="how many products are drawn (default: 2000)")
    parser.add_argument("--missing-rate", type=float, default=0.25, help="of pictures, of titles, of tables")
    parser.add_argument("--epochs", type=int, default=30, help="(default: 30)")
    parser.add_argument("--output", type=Path, default=Path("products.safetensors"), help="where the model goes")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import math
import random
from itertools import product
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image, ImageDraw
from tiny_clip import tiny_clip
from torch import Tensor, nn

from protohead import PrototypeClassifier, attach
from protohead.metrics import Report, evaluate

SHAPES, MATERIALS = ("round", "square", "triangular"), ("glass", "wooden")
SIZES = {"small": (20.0, 0.3), "large": (45.0, 1.2)}  # Height in cm and weight in kg, about.
CLASSES = [" ".join(parts) for parts in product(SIZES, SHAPES, MATERIALS)]
NUMBERS = ("height", "weight", "price")


class Product(NamedTuple):
    """A product; None where it lacks the picture or the title, NaN where it lacks a number."""

    image: Image.Image | None
    title: str | None
    numbers: list[float]
    label: int


def draw(count: int, missing_rate: float, rng: random.Random) -> list[Product]:
    """Products that each lack their picture, their title or their table at a rate, but keep one of them."""
    products = []
    for _ in range(count):
        size, shape, material = rng.choice([*SIZES]), rng.choice(SHAPES), rng.choice(MATERIALS)
        has = [rng.random() >= missing_rate for _ in range(3)]
        if not any(has):
            has[rng.randrange(3)] = True
        height, weight = (mean * rng.lognormvariate(0, 0.25) for mean in SIZES[size])
        numbers = [height, weight, 20 * rng.lognormvariate(0, 1)]  # The price tells nothing.
        numbers = [x if has[2] and rng.random() < 0.9 else math.nan for x in numbers]
        title = f"{rng.choice(['a fine', 'our', 'the new'])} {material} {rng.choice(['item', 'piece', 'object'])}"
        label = CLASSES.index(f"{size} {shape} {material}")
        products.append(Product(picture(shape, rng) if has[0] else None, title if has[1] else None, numbers, label))
    return products


def picture(shape: str, rng: random.Random) -> Image.Image:
    """A shape in some colour, at some place."""
    image = Image.new("RGB", (32, 32), (235, 235, 235))
    x, y, r = rng.uniform(13, 19), rng.uniform(13, 19), rng.uniform(8, 11)
    brush, fill = ImageDraw.Draw(image), tuple(rng.randrange(150) for _ in range(3))
    if shape == "round":
        brush.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        brush.rectangle((x - r, y - r, x + r, y + r), fill)
    else:
        brush.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    return image


class NumbersEncoder(nn.Module):
    """A table of numbers with gaps: each number standardised, 0 where it is missing, beside a mark that it is there."""

    mean: Tensor
    std: Tensor

    def __init__(self, columns: int, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("std", torch.ones(columns))
        self.layers = nn.Sequential(nn.Linear(2 * columns, 64), nn.ReLU(), nn.Linear(64, width))

    def fit(self, numbers: Tensor) -> None:
        """Take mean and spread from the training rows."""
        self.mean.copy_(numbers.nanmean(0))
        self.std.copy_((numbers - self.mean).square().nanmean(0).sqrt())

    def forward(self, numbers: Tensor) -> Tensor:
        """(n, columns), NaN where missing, to (n, width)."""
        there = ~numbers.isnan()
        standard = torch.where(there, (numbers - self.mean) / self.std, 0)
        features: Tensor = self.layers(torch.cat([standard, there.float()], dim=1))
        return features


class Batch(NamedTuple):
    """Inputs by modality, the (B, 3) mask of what is present, and the labels."""

    inputs: dict[str, Tensor]
    present: Tensor
    labels: Tensor

    def rows(self, index: Any) -> "Batch":
        """Some of the rows."""
        return Batch({name: x[index] for name, x in self.inputs.items()}, self.present[index], self.labels[index])


def prepare(products: list[Product], transform: Any, tokenizer: Any) -> Batch:
    """Preprocess pictures and tokenise titles. What stands in for a missing one does not matter: it is not encoded."""
    numbers = torch.tensor([row.numbers for row in products])
    inputs = {
        "image": torch.stack([transform(row.image or Image.new("RGB", (32, 32))) for row in products]),
        "text": tokenizer([row.title or "" for row in products]),
        "numbers": numbers,
    }
    present = torch.tensor([[row.image is not None, row.title is not None] for row in products])
    present = torch.cat([present, ~numbers.isnan().all(1, keepdim=True)], dim=1)
    return Batch(inputs, present, torch.tensor([row.label for row in products]))


def build(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """CLIP, the transform of its pictures, and its tokenizer."""
    if arguments.model:
        clip, _, transform = open_clip.create_model_and_transforms(arguments.model, arguments.pretrained)
        return clip, transform, open_clip.get_tokenizer(arguments.model)
    return tiny_clip()


def cache(model: PrototypeClassifier, batch: Batch) -> Batch:
    """The batch with CLIP's features, which never change, in the place of pictures and tokens."""
    with torch.no_grad():
        parts = [
            model.encode(part.inputs, part.present)
            for part in map(batch.rows, torch.arange(len(batch.labels)).split(256))
        ]
    features = {name: torch.cat([part[name] for part in parts]) for name in ("image", "text")}
    return batch._replace(inputs={**features, "numbers": batch.inputs["numbers"]})


@torch.no_grad()
def score(model: PrototypeClassifier, batch: Batch) -> Report:
    """The scores by what the products have."""
    logits = model.eval()(batch.inputs, batch.present)
    return evaluate(logits, batch.labels, batch.present, model.head.modalities)


def train(model: PrototypeClassifier, data: dict[str, Batch], arguments: argparse.Namespace) -> None:
    """Train the head and the encoder of the numbers; keep the epoch that validates best in --output."""
    encoder = model.encoders["numbers"]
    # The same head and the same encoder, on features instead of pictures and tokens.
    fast = PrototypeClassifier({"image": nn.Identity(), "text": nn.Identity(), "numbers": encoder}, model.head)
    cached = {split: cache(model, batch) for split, batch in data.items()}
    groups = [{"params": model.head.parameters(), "lr": 1e-2}, {"params": encoder.parameters(), "lr": 3e-3}]
    optimizer, best = torch.optim.AdamW(groups), -1.0
    for _ in range(arguments.epochs):
        fast.train()
        for index in torch.randperm(len(data["train"].labels)).split(64):
            inputs, present, labels = cached["train"].rows(index)
            loss = fast.loss(inputs, present, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (f1 := score(fast, cached["validation"]).all_rows["macro_f1"]) > best:
            best = f1
            model.save(arguments.output)


def main() -> None:
    """Train, choose the epoch by validation, test the whole model, and classify one product that lacks its picture."""
    arguments = options().parse_args()
    torch.manual_seed(arguments.seed)
    clip, transform, tokenizer = build(arguments)
    products, fifth = draw(arguments.count, arguments.missing_rate, random.Random(arguments.seed)), arguments.count // 5
    splits = {"train": products[2 * fifth :], "validation": products[:fifth], "test": products[fifth : 2 * fifth]}
    data = {split: prepare(part, transform, tokenizer) for split, part in splits.items()}
    numbers = data["train"].inputs["numbers"]
    encoder = NumbersEncoder(len(NUMBERS))
    encoder.fit(numbers)
    # This is the line. The width of the encoder is found on the example.
    model = attach(clip, len(CLASSES), extra={"numbers": encoder}, example={"numbers": numbers}, class_names=CLASSES)
    train(model, data, arguments)
    model.load(arguments.output)
    print(score(model, data["test"]))
    new = prepare([Product(None, "a wooden thing", [50.0, math.nan, 9.0], 0)], transform, tokenizer)
    with torch.no_grad():
        probabilities = model.eval()(new.inputs, new.present).softmax(1)[0]
    likely = ", ".join(f"{CLASSES[i]} ({probabilities[i]:.2f})" for i in probabilities.topk(3).indices)
    print(f"\nA wooden thing 50 cm high, without a picture: {likely}.")


if __name__ == "__main__":
    main()
