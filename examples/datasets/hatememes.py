"""Hateful Memes as Facebook AI distributes it: `train.jsonl`, `dev_seen.jsonl`, `test_seen.jsonl` and `img/`.

A line is {"id": 42953, "img": "img/42953.png", "label": 0, "text": "..."}; 1 is hateful. dev_seen validates. A
test_seen without labels, as in the first release, is an error in training, which tests on it; --predict needs none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import InputError
from rows import records as lines_of

FILES = {"train": "train.jsonl", "val": "dev_seen.jsonl", "test": "test_seen.jsonl"}


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each meme stands, and its fields."""
    for split, name in FILES.items():
        for where, fields in lines_of(folder / name):
            if missing := [key for key in ("id", "img", "text") if key not in fields]:
                raise InputError(f"Expected the fields id, img and text, but {where} lacks {missing}.")
            if (label := fields.get("label")) not in (0, 1, None):
                raise InputError(f"Expected the label 0 or 1, but {where} has {label!r}.")
            yield where, {**fields, "image": fields["img"], "split": split}
