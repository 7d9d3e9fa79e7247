"""UPMC Food-101 as its authors distribute it: `images/train` and `images/test` of class folders, and `texts/`.

`texts/train_titles.csv` and `texts/test_titles.csv` have no header; a line is picture name, title, class. There is no
validation split: of every ten training rows of a class, in the order of the file, the second validates.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import InputError, reading


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each picture stands, and its fields."""
    for part in ("train", "test"):
        path, met = folder / "texts" / f"{part}_titles.csv", Counter[str]()
        with reading(path), open(path, newline="", encoding="utf-8-sig") as lines:
            table = csv.reader(lines)
            for fields in table:
                where = f"{path} line {table.line_num}"
                if len(fields) != 3:
                    raise InputError(f"Expected picture name, title and class, but {where} has {len(fields)} fields.")
                image, text, label = fields
                if not (folder / "images" / part / label).is_dir():
                    classes = f"a class with a folder in {folder / 'images' / part}"
                    raise InputError(f"Expected {classes}, but {where} has {label!r}.")
                split = "val" if part == "train" and met[label] % 10 == 1 else part
                met[label] += 1
                image = f"images/{part}/{label}/{image}"
                yield where, {"id": Path(image).name, "image": image, "text": text, "label": label, "split": split}
