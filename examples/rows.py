"""Rows of pictures and texts from a CSV, a JSONL or a folder: what clip_finetune.py reads.

A table has the columns image (a path, relative to the file), text, label and, optionally, split (train, val, test) and
id, by which a table of what is missing calls the row (without the column: its number from 0; in a folder: its path).
What is empty, null, absent or, in a CSV, as pandas writes it (nan, null, none, n/a) is missing. Several labels are a
list in JSONL, and a|b in CSV. A folder has class folders, or train, val and test folders of these, with pictures. The
.txt of the same stem beside a picture is its text; a .txt without a picture is a row that has no picture.

`datasets/` has readers for data sets in the layout of their owners: a program NAME.py there with a function `records`.
"""

import csv
import json
import random
import runpy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protohead.simulate import MissingTable, load_map_table, missing_table

# Programs that are run by path, and no package: that would hide Hugging Face's `datasets`.
READERS = {path.stem: path for path in sorted((Path(__file__).parent / "datasets").glob("*.py"))}
MODALITIES = ("image", "text")
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
    id: str = ""


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Name what cannot be read."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"Expected {what} to be readable, but got: {error}.") from None


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
            with reading(text or file):
                fields["text"] = text.read_text("utf-8") if text else None
            yield str(file), {**fields, "id": file.relative_to(path).as_posix()}
    elif path.suffix.lower() == ".csv":
        with reading(path), open(path, newline="", encoding="utf-8-sig") as lines:
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
        with reading(path), open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    with reading(f"{path} line {number}"):
                        fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise InputError(f"Expected a JSON object a line, but {path} line {number} is another thing.")
                    yield f"{path} line {number}", fields
    else:
        raise InputError(f"Expected a folder, a .csv or a .jsonl that exists, but got {path}.")


def read(
    path: Path, labelled: bool = True, dataset: str | None = None, allow_gaps: bool = False
) -> tuple[list[Row], bool]:
    """The rows of a table, a folder or, with its name, a data set, and whether they have several labels.

    Args:
        path: The file or folder.
        labelled: Whether labels are wanted.
        dataset: Name of one of the READERS.
        allow_gaps: Whether a picture file that is not there and, in a data set, an empty text are missing. A data set
            has neither by design, so that one is an error by default.

    Raises:
        InputError: If anything is not as said above, with the row.
    """
    base = path if path.is_dir() else path.parent
    rows: list[Row] = []
    several, gaps = False, 0
    hint = "; --allow-gaps takes it for missing"
    for where, fields in runpy.run_path(str(READERS[dataset]))["records"](path) if dataset else records(path):
        if not {"image", "text"} & set(fields):
            raise InputError(f"Expected a column image or text, but {where} has {list(fields)}.")
        for name in ("image", "text", "split"):
            if not isinstance(fields.get(name), str | None):
                raise InputError(f"Expected {name} to be a text or null, but {where} has {fields[name]!r}.")
        image, text, split = ((fields.get(name) or "").strip() or None for name in ("image", "text", "split"))
        if image is not None and not (base / image).is_file():
            if not allow_gaps:
                raise InputError(f"Expected a picture that exists, but {where} has {base / image}{hint}.")
            image, gaps = None, gaps + 1
        if dataset and text is None:
            if not allow_gaps:
                raise InputError(f"Expected a text, but {where} has an empty one{hint}.")
            gaps += 1
        label = fields.get("label") if labelled else []
        several |= isinstance(label, list)
        labels = label if isinstance(label, list) else [label]
        if labelled and "label" not in fields and not path.is_dir():
            raise InputError(f"Expected a column label, but {where} has {list(fields)}.")
        if path.is_dir() and not dataset and label is None:
            raise InputError(f"Expected pictures and texts in class folders, but {where} is in none.")
        if not all(isinstance(x, str | int) and str(x).strip() for x in labels):
            raise InputError(f"Expected a label, or a list of labels, but {where} has {label!r}.")
        if labelled and split not in (None, *SPLITS):
            raise InputError(f"Expected the split to be one of {SPLITS}, but {where} has {split!r}.")
        id = str(fields.get("id", len(rows)))
        rows.append(Row(where, base / image if image else None, text, [str(x).strip() for x in labels], split, id))
    if labelled and {row.split is None for row in rows} == {True, False}:
        where = next(row.where for row in rows if row.split is None)
        raise InputError(f"Expected a split in every row or in none, but {where} has none.")
    if gaps:
        print(f"Taken for missing: {gaps} pictures or texts of {len(rows)} rows, which are not there or empty.")
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
            position = number / len(kept) if met.issuperset(row.labels) else 0
            met.update(row.labels)
            kept[number] = row._replace(split=SPLITS[(position >= 0.7) + (position >= 0.85)])
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


def present_of(rows: Sequence[Row]) -> Tensor:
    """(N, 2) which of image and text each row has."""
    return torch.tensor([[row.image is not None, row.text is not None] for row in rows])


def missing_of(
    splits: dict[str, list[Row]], missing: str = "both", rate: float = 0.0, seed: int = 0, files: Sequence[Path] = ()
) -> MissingTable | None:
    """Which of image and text the rows are used with: what they have, less what is drawn or what a table says.

    Args:
        splits: The rows by split.
        missing: `image`, `text` or, for half of the rows each, `both`.
        rate: Share of the complete rows of every split that lose one. A row keeps its only modality.
        seed: Of the draw.
        files: Instead of it, a .jsonl by id for all rows, or MAP's .pt for each split, in the order of its rows.

    Returns:
        One table of all the rows; None if nothing is to go missing.

    Raises:
        InputError: If a file does not fit the rows.
    """
    if not rate and not files:
        return None
    met: dict[str, Row] = {}
    for row in (row for part in splits.values() for row in part):
        if met.setdefault(row.id, row) is not row:
            raise InputError(f"Expected ids of their own, but {met[row.id].where} and {row.where} have {row.id!r}.")
    jsonl = [file.suffix.lower() != ".pt" for file in files]
    if jsonl not in ([], [True], [False] * len(splits)):
        wanted, got = f"one .jsonl, or a .pt each of {', '.join(splits)}", " ".join(map(str, files))
        raise InputError(f"Expected --missing-table to be {wanted}, but got {got}.")
    parts = []
    try:
        for place, rows in enumerate(splits.values()):
            ids, present = [row.id for row in rows], present_of(rows)
            if not files:  # Another seed for every split: with the same one, val would repeat train's pattern.
                table = missing_table(ids, MODALITIES, rate, missing, len(splits) * seed + place, present=present)
            elif jsonl == [True]:
                table = MissingTable.load(files[0])
            else:
                table = load_map_table(files[place], ids, MODALITIES)
            if set(table.modalities) != set(MODALITIES):
                raise InputError(f"Expected {files[0]} to be of {MODALITIES}, but got {table.modalities}.")
            parts.append(table.select(ids)[:, [table.modalities.index(name) for name in MODALITIES]] & present)
    except KeyError as error:
        raise InputError(f"{files[0]}: {error.args[0]}") from None
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    return MissingTable(list(met), MODALITIES, torch.cat(parts))
