"""Hateful Memes as Facebook AI distributes it: `train.jsonl`, `dev_seen.jsonl`, `test_seen.jsonl` and `img/`.

In the first release the last two are `dev.jsonl` and `test.jsonl`. A line is {"id": 42953, "img": "img/42953.png",
"label": 0, "text": "..."}; 1 is hateful. dev validates. The first release has no labels in its test.jsonl: training,
which tests on it, refuses that; --predict needs none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files import InputError, read_jsonl

FILES = {
    "train": ("train.jsonl",),
    "val": ("dev_seen.jsonl", "dev.jsonl"),
    "test": ("test_seen.jsonl", "test.jsonl"),
}


def records(folder: Path, labelled: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each meme stands, and its fields."""
    for split, names in FILES.items():
        path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
        for where, fields in read_jsonl(path).rows:
            if missing := [key for key in ("id", "img", "text") if key not in fields]:
                raise InputError(f"Expected the fields id, img and text, but {where} lacks {missing}.")
            if (label := fields.get("label")) not in (0, 1, None):
                raise InputError(f"Expected the label 0 or 1, but {where} has {label!r}.")
            if labelled and label is None:
                hint = "the first release has none for its test, the second has a test_seen.jsonl with labels"
                raise InputError(f"Expected a label, but {where} has none: {hint}.")
            yield where, {**fields, "image": fields["img"], "split": split}


def order(folder: Path) -> dict[str, list[str]]:
    """The ids of MAP's rows, in the order of its tables, which is that of the lines."""
    ids: dict[str, list[str]] = {}
    for split, names in FILES.items():
        files = {name: ids_of(folder / name) for name in names if (folder / name).exists()}
        ids[split], *others = files.values() or [[]]
        if any(other != ids[split] for other in others):  # MAP may have read either.
            raise InputError(f"Expected {list(files)} in {folder} to hold the same rows in the same order.")
    return ids


def ids_of(path: Path) -> list[str]:
    return [str(fields.get("id")) for _, fields in read_jsonl(path).rows]
