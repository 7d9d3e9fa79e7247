"""Rows of pictures and texts from a table, a folder or a published data set: what clip_finetune.py reads.

files.py says what tables and folders look like, labels.py how labels are written, pictures.py how pictures are opened.
What is empty, null, absent or written as pandas writes what is missing is missing. A row has an id, by which a table of
what is missing calls it: that of the column, or its number from 0; in a folder its path.
"""

import random
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from files import MODALITIES, READERS, SPLITS, InputError, records, split_named
from labels import read_labels
from pictures import open_picture, unreadable
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protohead.simulate import MissingTable, load_map_table, missing_table


class Row(NamedTuple):
    """One row, and where it stands."""

    where: str
    image: Path | None
    text: str | None
    labels: list[str]
    split: str | None
    id: str = ""
    note: str = ""  # Of a picture that is missing because its file is: that file.


def read(
    path: Path,
    labelled: bool = True,
    dataset: str | None = None,
    allow_gaps: bool = False,
    separator: str | None = None,
    workers: int = 0,
) -> tuple[list[Row], bool]:
    """The rows of a table, a folder or, with its name, a data set, and whether they have several labels.

    Args:
        path: The file or folder.
        labelled: Whether labels are wanted.
        dataset: Name of one of the READERS.
        allow_gaps: Whether a picture file that is not there or cannot be read and, in a data set, an empty text are
            missing. A data set has none of these by design, and a table says itself what is missing: by default a file
            that is not there is an error, and one that cannot be read is when it is opened.
        separator: Of several labels in one text, as in :func:`labels.read_labels`.
        workers: Threads that look for files that cannot be read.

    Raises:
        InputError: If anything is not as said above, with the row.
    """
    reader = _program(dataset)["records"](path, labelled) if dataset else records(path, labelled)
    base = path if path.is_dir() else path.parent
    rows: list[Row] = []
    found = []
    for where, fields in reader:
        rows.append(_row(where, fields, base, len(rows), labelled))
        found.append((where, fields.get("label")))
    if labelled:
        # What folders are called, and what data sets hold, is taken as it is.
        labels, several = read_labels(found, "" if dataset or path.is_dir() else separator)
        rows = [row._replace(labels=names) for row, names in zip(rows, labels, strict=True)]
        if {row.split is None for row in rows} == {True, False}:
            where = next(row.where for row in rows if row.split is None)
            raise InputError(f"Expected a split in every row or in none, but {where} has none.")
    rows = _without_gaps(rows, bool(dataset), workers) if allow_gaps else _checked(rows, bool(dataset))
    return rows, labelled and several


def map_order(path: Path, dataset: str | None) -> dict[str, list[str]] | None:
    """The ids of the rows of a data set in the order of MAP's missing tables, which have none; None for other rows."""
    order: dict[str, list[str]] | None = _program(dataset)["order"](path) if dataset else None
    return order


def _program(dataset: str) -> dict[str, Any]:
    return runpy.run_path(str(READERS[dataset]))


def _row(where: str, fields: Mapping[str, Any], base: Path, number: int, labelled: bool) -> Row:
    """One row, its picture's path as it is said; the labels are read later, all together."""
    for name in ("image", "text", "split"):
        if not isinstance(fields.get(name), str | None):
            raise InputError(f"Expected {name} to be a text or null, but {where} has {fields[name]!r}.")
    image, text, split = ((fields.get(name) or "").strip() or None for name in ("image", "text", "split"))
    if labelled and split and not split_named(split):
        names = " or ".join("/".join(names) for names in SPLITS.values())
        raise InputError(f"Expected the split to be {names}, but {where} has {split!r}.")
    id = fields.get("id")
    return Row(
        where,
        _path(base, image) if image else None,
        text,
        [],
        split_named(split) if split else None,
        str(number if id is None else id),
    )


def _path(base: Path, image: str) -> Path:
    """The path of a picture, also of one that was written on Windows."""
    path, other = base / image, base / image.replace("\\", "/")
    return other if _is_file(other) and not _is_file(path) else path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # Such as a name that is too long: a text in the place of a path.
        return False


def _checked(rows: list[Row], published: bool) -> list[Row]:
    """The rows, of which none has a gap."""
    hint = "; --allow-gaps takes it for missing"
    for row in rows:
        if row.image and not _is_file(row.image):
            raise InputError(f"Expected a picture that exists, but {row.where} has {row.image}{hint}.")
        if published and row.text is None:
            raise InputError(f"Expected a text, but {row.where} has an empty one{hint}.")
    return rows


def _without_gaps(rows: list[Row], published: bool, workers: int) -> list[Row]:
    """The rows, in which gaps are missing; they are counted, and the first are named."""
    paths = [row.image for row in rows if row.image]
    absent = {path for path in paths if not _is_file(path)}
    broken = unreadable(dict.fromkeys(path for path in paths if path not in absent), workers)
    if len(absent) > 1 and absent.issuperset(paths):
        raise InputError(f"Expected some pictures to exist, but none of {len(paths)} does: {paths[0]}, ...")
    empty = [row.where for row in rows if published and row.text is None]
    kinds = {"pictures that are not there": absent, "unreadable pictures": broken, "empty texts": empty}
    for what, gaps in kinds.items():
        if gaps:
            some = ", ".join(sorted(map(str, gaps))[:3]) + ", ..." * (len(gaps) > 3)
            print(f"Taken for missing in {len(rows)} rows: {len(gaps)} {what} ({some}).")
    notes = dict.fromkeys(broken, "unreadable") | dict.fromkeys(absent, "not there")
    return [
        row._replace(image=None, note=f"{notes[row.image]}: {row.image}") if row.image in notes else row for row in rows
    ]


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
            kept[number] = row._replace(split=list(SPLITS)[(position >= 0.7) + (position >= 0.85)])
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
                image = self.transform(open_picture(row.image))
            except ValueError as error:
                hint = "--allow-gaps takes it for missing"
                raise InputError(f"{row.where}: {error}; {hint}.") from None
        if has_text and row.text is not None:
            text = self.tokenizer(row.text)[0]
        return image, text, self.present[index], self.targets[index]


def present_of(rows: Sequence[Row]) -> Tensor:
    """(N, 2) which of image and text each row has."""
    return torch.tensor([[row.image is not None, row.text is not None] for row in rows])


def missing_of(
    splits: dict[str, list[Row]],
    missing: str = "both",
    rate: float = 0.0,
    seed: int = 0,
    files: Sequence[Path] = (),
    order: Mapping[str, Sequence[str]] | None = None,
) -> MissingTable | None:
    """Which of image and text the rows are used with: what they have, less what is drawn or what a table says.

    Args:
        splits: The rows by split.
        missing: `image`, `text` or, for half of the rows each, `both`.
        rate: Share of the complete rows of every split that lose one. A row keeps its only modality.
        seed: Of the draw.
        files: Instead of it, a .jsonl by id for all rows, or MAP's .pt for each split, which have no ids.
        order: The ids of MAP's rows by split, in the order of its tables; without it these are refused.

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
    table = _read_tables(files, order) if files else None
    parts = []
    for place, rows in enumerate(splits.values()):
        ids, present = [row.id for row in rows], present_of(rows)
        if table is None:  # Another seed for every split: with the same one, val would repeat train's pattern.
            number = len(splits) * seed + place
            parts.append(missing_table(ids, MODALITIES, rate, missing, number, present=present).present)
            continue
        try:
            parts.append(table.select(ids)[:, [table.modalities.index(name) for name in MODALITIES]] & present)
        except KeyError as error:
            raise InputError(f"{files[0]}: {error.args[0]}") from None
    return MissingTable(list(met), MODALITIES, torch.cat(parts))


def _read_tables(files: Sequence[Path], order: Mapping[str, Sequence[str]] | None) -> MissingTable:
    """The one table of a .jsonl, or of MAP's .pt of train, val and test."""
    jsonl = [file.suffix.lower() != ".pt" for file in files]
    if jsonl not in ([True], [False] * len(SPLITS)):
        wanted, got = f"one .jsonl, or a .pt each of {', '.join(SPLITS)}", " ".join(map(str, files))
        raise InputError(f"Expected --missing-table to be {wanted}, but got {got}.")
    if jsonl != [True] and order is None:
        hint = "MAP's .pt have none, and their order is known only of the data sets that MAP reads (--dataset)"
        raise InputError(f"Expected --missing-table to be a .jsonl, which has ids, but got {files[0]}: {hint}.")
    try:
        if order is None or jsonl == [True]:
            table = MissingTable.load(files[0])
        else:
            parts = [load_map_table(file, order[split], MODALITIES) for file, split in zip(files, SPLITS, strict=True)]
            ids = [id for part in parts for id in part.ids]
            table = MissingTable(ids, MODALITIES, torch.cat([part.present for part in parts]))
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    if set(table.modalities) != set(MODALITIES):
        raise InputError(f"Expected {files[0]} to be of {MODALITIES}, but got {table.modalities}.")
    return table
