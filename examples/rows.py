"""Rows of pictures and texts from a CSV, a JSONL or a folder: what clip_finetune.py reads.

A table has the columns image (a path, relative to the file), text, label and, optionally, split (train, val, test).
What is empty, null, absent or, in a CSV, as pandas writes it (nan, null, none, n/a) is missing. Several labels are a
list in JSONL, and a|b in CSV. A folder has class folders, or train, val and test folders of these, with pictures. The
.txt of the same stem beside a picture is its text; a .txt without a picture is a row that has no picture.
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val", "test")
MISSING = {"nan", "null", "none", "n/a"}


class InputError(ValueError):
    """Something in the data or the arguments that the user can put right."""


class Row(NamedTuple):
    """One row, and where it stands."""

    where: str
    image: Path | None
    text: str | None
    labels: list[str]
    split: str | None


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its fields as the file has them."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        pictures = [file for file in files if file.suffix.lower() in suffixes]
        texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
        alone = [file for stem, file in texts.items() if stem not in {picture.with_suffix("") for picture in pictures}]
        for file in sorted(pictures + alone):
            text = texts.get(file.with_suffix(""))
            fields: dict[str, Any] = dict(zip(("label", "split"), file.relative_to(path).parts[-2::-1], strict=False))
            fields["image"] = None if file == text else str(file.relative_to(path))
            yield str(file), fields | {"text": text.read_text("utf-8") if text else None}
    elif path.suffix.lower() == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            for fields in table:
                if None in fields or None in fields.values():
                    wanted = f"{len(table.fieldnames or ())} fields, as in the header"
                    raise InputError(f"Expected {wanted}, but {path} line {table.line_num} has more or fewer.")
                for name in ("image", "text"):
                    if fields.get(name, "").strip().lower() in MISSING:
                        fields[name] = ""
                if "|" in (label := fields.get("label", "")):
                    fields["label"] = [part.strip() for part in label.split("|") if part.strip()]
                yield f"{path} line {table.line_num}", fields
    elif path.suffix.lower() == ".jsonl":
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise InputError(f"Expected a JSON object a line, but {path} line {number} is another thing.")
                    yield f"{path} line {number}", fields
    else:
        raise InputError(f"Expected a folder, a .csv or a .jsonl that exists, but got {path}.")


def read(path: Path, labelled: bool = True) -> tuple[list[Row], bool]:
    """The rows of a table or folder, and whether they have several labels.

    Raises:
        InputError: If anything is not as said above, with the row.
    """
    base = path if path.is_dir() else path.parent
    rows, several = [], False
    try:
        for where, fields in records(path):
            if not {"image", "text"} & set(fields):
                raise InputError(f"Expected a column image or text, but {where} has {list(fields)}.")
            for name in ("image", "text", "split"):
                if not isinstance(fields.get(name), str | None):
                    raise InputError(f"Expected {name} to be a text or null, but {where} has {fields[name]!r}.")
            image, text, split = ((fields.get(name) or "").strip() or None for name in ("image", "text", "split"))
            if image is not None and not (base / image).is_file():
                raise InputError(f"Expected a picture that exists, but {where} has {base / image}.")
            label = fields.get("label") if labelled else []
            several |= isinstance(label, list)
            labels = label if isinstance(label, list) else [label]
            if path.is_dir() and label is None:
                raise InputError(f"Expected pictures and texts in class folders, but {where} is in none.")
            if not all(isinstance(x, str | int) and str(x).strip() for x in labels):
                raise InputError(f"Expected a label, or a list of labels, but {where} has {label!r}.")
            if labelled and split not in (None, *SPLITS):
                raise InputError(f"Expected the split to be one of {SPLITS}, but {where} has {split!r}.")
            rows.append(Row(where, base / image if image else None, text, [str(x).strip() for x in labels], split))
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"Expected {path} to be readable, but after {len(rows)} rows: {error}.") from None
    if labelled and {row.split is None for row in rows} == {True, False}:
        where = next(row.where for row in rows if row.split is None)
        raise InputError(f"Expected a split in every row or in none, but {where} has none.")
    return rows, several


def split_rows(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """The rows by split (drawn, where the data has none), without those that have neither picture nor text."""
    kept = [row for row in rows if row.image is not None or row.text is not None]
    if len(kept) < len(rows):
        print(f"Skipped {len(rows) - len(kept)} of {len(rows)} rows, which have neither image nor text.")
    if kept and kept[0].split is None:
        random.Random(seed).shuffle(kept)
        met: set[str] = set()
        for number, row in enumerate(kept):
            # The first row of every class trains: a class that only the test has could not be learned.
            share = number / len(kept) if met.issuperset(row.labels) else 0
            met.update(row.labels)
            kept[number] = row._replace(split=SPLITS[(share >= 0.7) + (share >= 0.85)])
    if not rows:
        raise InputError("Expected rows, but the data has none.")
    splits = {split: [row for row in kept if row.split == split] for split in SPLITS}
    if empty := [split for split, part in splits.items() if not part]:
        raise InputError(f"Expected rows with image or text in every split, but got none in {empty}.")
    return splits


class Rows(Dataset[tuple[Tensor, ...]]):
    """What the model is given of each row: image, text, present and target; zeros stand for what is missing."""

    def __init__(self, rows: list[Row], present: Tensor, targets: Tensor, transform: Any, tokenizer: Any) -> None:
        self.rows, self.present, self.targets = rows, present, targets
        self.transform, self.tokenizer = transform, tokenizer
        self.no_image = torch.zeros_like(transform(Image.new("RGB", (8, 8))))
        self.no_text = torch.zeros_like(tokenizer("")[0])

    def __len__(self) -> int:  # noqa: D105
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:  # noqa: D105
        row, (has_image, has_text) = self.rows[index], self.present[index].tolist()
        image, text = self.no_image, self.no_text
        if has_image and row.image is not None:
            try:
                with Image.open(row.image) as file:
                    image = self.transform(file.convert("RGB"))
            except Exception as error:  # PIL raises many kinds for broken files.
                raise InputError(
                    f"Expected a picture that PIL reads, but {row.where} has {row.image}: {error}"
                ) from None
        if has_text and row.text is not None:
            text = self.tokenizer(row.text)[0]
        return image, text, self.present[index], self.targets[index]


def present_of(rows: Sequence[Row], missing_rate: float = 0.0, seed: int = 0) -> Tensor:
    """(N, 2) which of image and text each row has; with a rate, that share of the rows loses one, half of them each."""
    present = torch.tensor([[row.image is not None, row.text is not None] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    for place, index in enumerate(torch.randperm(len(rows), generator=generator)[: round(missing_rate * len(rows))]):
        if present[index].all():  # A row keeps its only modality.
            present[index, place % 2] = False
    return present
