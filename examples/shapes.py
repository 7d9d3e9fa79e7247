"""A small data set of pictures with texts for the other examples, drawn on the spot: coloured shapes.

A class is a colour and a shape, such as "red circle". The picture always shows the shape, but four in ten are grey; the
text always says the colour, but half of them not the shape. So each alone tells something, and both together the class.

    python examples/shapes.py shapes        # writes shapes/data.csv and the pictures, for clip_finetune.py
"""

import argparse
import csv
import random
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {"red": (205, 60, 50), "blue": (50, 80, 205)}
SHAPES = ("circle", "square", "triangle")
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
GREY = (120, 120, 120)
PAPER = bytes(170 + 86 * value // 256 for value in range(256))  # Of random bytes light ones.


class Row(NamedTuple):
    """A picture and a text, None where missing, and an index into CLASSES."""

    image: Image.Image | None
    text: str | None
    label: int


def draw(count: int, missing_rate: float = 0.3, seed: int = 0, size: int = 32) -> list[Row]:
    """`count` rows, of which `missing_rate` lack their picture or their text (half and half); size x size pixels."""
    rng = random.Random(seed)
    lacking = round(missing_rate * count)
    missing = ["image"] * (lacking // 2) + ["text"] * (lacking - lacking // 2) + [""] * (count - lacking)
    rng.shuffle(missing)
    rows = []
    for what in missing:
        label = rng.randrange(len(CLASSES))
        colour, shape = CLASSES[label].split()
        image = _picture(shape, COLOURS[colour] if rng.random() < 0.6 else GREY, rng, size)
        noun = shape if rng.random() < 0.5 else rng.choice(["thing", "sign", "mark"])
        text = f"{rng.choice(['a', 'one', 'some'])} {rng.choice(['small', 'fine', 'plain'])} {colour} {noun}"
        rows.append(Row(None if what == "image" else image, None if what == "text" else text, label))
    return rows


def write(rows: list[Row], folder: Path) -> Path:
    """Write the rows to `data.csv` (image, text, label) with the pictures beside it, and return its path."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "data.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "text", "label"])
        for number, row in enumerate(rows):
            name = "" if row.image is None else f"images/{number:05}.png"
            if row.image is not None:
                row.image.save(folder / name)
            table.writerow([name, row.text or "", CLASSES[row.label]])
    return folder / "data.csv"


def _picture(shape: str, colour: tuple[int, int, int], rng: random.Random, size: int) -> Image.Image:
    picture = Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size).translate(PAPER))
    x, y, r = (rng.uniform(low, high) * size for low, high in ((0.4, 0.6), (0.4, 0.6), (0.25, 0.35)))
    brush, box = ImageDraw.Draw(picture), (x - r, y - r, x + r, y + r)
    fill = (*(max(0, min(255, channel + rng.randrange(-30, 31))) for channel in colour),)
    if shape == "circle":
        brush.ellipse(box, fill)
    elif shape == "square":
        brush.rectangle(box, fill)
    else:
        brush.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    return picture


def main() -> None:
    """Write the data set to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where data.csv and images/ go")
    parser.add_argument("--count", type=int, default=600, help="how many rows (default: 600)")
    parser.add_argument("--missing-rate", type=float, default=0.3, help="rows without picture or text (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.count < 1 or not 0 <= arguments.missing_rate <= 1:
        parser.error("Expected --count of 1 or more and --missing-rate in [0, 1].")
    print(write(draw(arguments.count, arguments.missing_rate, arguments.seed), arguments.folder))


if __name__ == "__main__":
    main()
