"""UPMC Food-101 as its authors distribute it: `images/train` and `images/test` of class folders, and `texts/`.

`texts/train_titles.csv` and `texts/test_titles.csv` have no header; a line is picture name, title, class. Their quotes
are not those of a CSV: some titles open one that is never closed. So one line is one row, the name ends at its first
comma, the class begins at its last. There is no validation split: of every ten training rows of a class, in the order
of the file, the second validates.

Where MAP's `split.json` lies beside them (names of pictures for train, val and test), it splits and orders the rows,
and MAP's `text.json`, if there, has the titles: then MAP's missing tables are of these rows.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from files import SPLITS, InputError, decoded

PUBLISHED = {"train": 67988, "test": 22716}


class Title(NamedTuple):
    """A line of the titles."""

    where: str
    name: str
    text: str
    label: str


def records(folder: Path, labelled: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each picture stands, and its fields."""
    if (folder / "split.json").exists():
        for split, titles in map_splits(folder).items():
            for title in titles:
                yield fields_of(folder, title, "test" if split == "test" else "train", split)
        return
    for part in PUBLISHED:
        met = Counter[str]()
        for title in titles_of(folder, part):
            split = "val" if part == "train" and met[title.label] % 10 == 1 else part
            met[title.label] += 1
            yield fields_of(folder, title, part, split)


def order(folder: Path) -> dict[str, list[str]]:
    """The ids of MAP's rows, in the order of its tables."""
    if not (folder / "split.json").exists():
        wanted = f"MAP's split.json in {folder}, without which the order of its missing tables is not known"
        raise InputError(f"Expected {wanted}, but got none.")
    return {split: [title.name for title in titles] for split, titles in map_splits(folder).items()}


def fields_of(folder: Path, title: Title, part: str, split: str) -> tuple[str, dict[str, Any]]:
    """Where a picture stands, and its fields."""
    if not (folder / "images" / part / title.label).is_dir():
        classes = f"a class with a folder in {folder / 'images' / part}"
        raise InputError(f"Expected {classes}, but {title.where} has {title.label!r}.")
    image = f"images/{part}/{title.label}/{title.name}"
    return title.where, {"id": title.name, "image": image, "text": title.text, "label": title.label, "split": split}


def titles_of(folder: Path, part: str) -> list[Title]:
    """The lines of a part's titles, each of which is a row."""
    path, titles = folder / "texts" / f"{part}_titles.csv", []
    for number, line in enumerate(decoded(path).split("\n"), 1):
        if line := line.rstrip("\r"):
            name, first, rest = line.partition(",")
            text, last, label = rest.rpartition(",")
            if not first or not last:
                got = f"{path} line {number} has {1 + line.count(',')} fields"
                raise InputError(f"Expected picture name, title and class, but {got}.")
            titles.append(Title(f"{path} line {number}", name, unquoted(text), label))
    if len(titles) != PUBLISHED[part]:
        print(f"{path} has {len(titles)} rows, the published one {PUBLISHED[part]}.")
    return titles


def unquoted(text: str) -> str:
    """A title without the quotes of a CSV, if it has these."""
    inner = text[1:-1].replace('""', "")
    return text[1:-1].replace('""', '"') if text[:1] == text[-1:] == '"' != text and '"' not in inner else text


def map_splits(folder: Path) -> dict[str, list[Title]]:
    """The rows of MAP's split.json; like MAP, without those that have no title."""
    path = folder / "split.json"
    names = texts(path)
    if not isinstance(names, dict) or set(names) != set(SPLITS):
        raise InputError(f"Expected lists of picture names for {', '.join(SPLITS)}, but {path} has other things.")
    if (path := folder / "text.json").exists():
        known = {
            name: Title(f"{path} {name}", name, text, name.rpartition("_")[0]) for name, text in texts(path).items()
        }
        titles = {"train": known, "test": known}
    else:
        titles = {part: {title.name: title for title in titles_of(folder, part)} for part in PUBLISHED}
    splits = {}
    for split in SPLITS:
        part = titles["test" if split == "test" else "train"]
        splits[split] = [part[name] for name in names[split] if name in part]
        if lost := len(names[split]) - len(splits[split]):
            print(f"{folder / 'split.json'}: left out, as MAP does: {lost} names of {split} without a title.")
    return splits


def texts(path: Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise InputError(f"Expected {path} to be readable, but got: {error}.") from None
