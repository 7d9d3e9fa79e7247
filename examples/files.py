"""Files as rows of fields, read strictly: what is not understood is an error with file and line, never another row.

A table is a CSV (with commas, semicolons or tabs) or a JSONL in UTF-8, with the columns image (a path, relative to the
file), text, label and, optionally, split and id. Their names are matched without case, and the usual other ones are
known (see COLUMNS). A folder has class folders, or train, val and test folders of these, with pictures. The .txt of the
same stem beside a picture is its text; a .txt without a picture is a row that has no picture.

`datasets/` has readers for data sets in the layout of their owners: a program NAME.py there with a function `records`.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

# Programs that are run by path, and no package: that would hide Hugging Face's `datasets`.
READERS = {path.stem: path for path in sorted((Path(__file__).parent / "datasets").glob("*.py"))}
MODALITIES = ("image", "text")
# A column of the name itself goes before one of another name.
COLUMNS = {
    "image": "image img picture photo file filename filepath path imagefile imagefilename imagename imagepath imgpath",
    "text": "text caption title description sentence",
    "label": "label labels class classes classname category categories genre genres target",
    "split": "split subset partition",
    "id": "id",
}
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev", "development"),
    "test": ("test", "testing"),
}
# As pandas reads them, in any case.
MISSING = {"", "<na>", "n/a", "na", "#n/a", "#n/a n/a", "#na", "nan", "-nan", "nat", "none", "null"}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
Line = tuple[int, int, list[str]]  # The first and the last line of a row, and its cells.
PICTURES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".jp2"}


class InputError(ValueError):
    """Something in the data or the arguments that the user can put right."""


class Table(NamedTuple):
    """The columns' names, and each row's fields by these names with where it stands."""

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]


def records(path: Path, labelled: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its image, text, label, split and id, as far as the file has them.

    Raises:
        InputError: If the file is not as said above.
    """
    kind = path.suffix.lower()
    if path.is_dir():
        yield from folder(path, labelled)
    elif kind in (".csv", ".tsv") and path.is_file():
        yield from named(path, read_csv(path), labelled)
    elif kind in (".jsonl", ".ndjson") and path.is_file():
        yield from named(path, read_jsonl(path), labelled)
    else:
        raise InputError(f"Expected a folder, a .csv, a .tsv or a .jsonl that exists, but got {path}.")


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Expected {path} to be readable, but got: {error}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise InputError(
            f"Expected UTF-8, but {path} line {line} has the byte 0x{byte:02x}: save it as UTF-8."
        ) from None
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise InputError(f"Expected text, but {path} line {line} has a zero byte: save it as UTF-8.")
    return text


# -- tables -----------------------------------------------------------------------------------------------------------


def named(path: Path, table: Table, labelled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table with the names that are used here for their columns."""
    if not table.columns:
        raise InputError(f"Expected rows, but {path} has none.")
    columns = find_columns(path, table.columns, labelled)
    unused = [name for name in table.columns if name not in columns.values()]
    for name in unused:
        values = {str(fields.get(name)).strip().casefold() for _, fields in table.rows}
        if "split" not in columns and len(values) > 1 and all(map(split_named, values)):
            raise InputError(f"Expected the split in a column split, but {path} has it in {name!r}: rename that.")
    if unused or any(field != name for field, name in columns.items()):
        others = f"; not used: {', '.join(map(repr, unused))}" if unused else ""
        print(f"{path}: {', '.join(f'{field} is {name!r}' for field, name in columns.items())}{others}.")
    words: Counter[str] = Counter()
    for where, fields in table.rows:
        row = {field: fields.get(name) for field, name in columns.items()}
        for field in {"image", "text", "split"} & set(row):
            if isinstance(value := row[field], str) and value.strip().casefold() in MISSING:
                row[field] = None
                words[value.strip()] += 1
        yield where, row
    if found := [f"{word} ({count})" for word, count in words.items() if word]:
        print(f"{path}: read as missing: {', '.join(found)}.")


def find_columns(path: Path, names: Sequence[str], labelled: bool) -> dict[str, str]:
    """The column of each of image, text, label, split and id that there is.

    Raises:
        InputError: If one that is needed is not there, or several could be meant.
    """
    columns: dict[str, str] = {}
    for field, known in COLUMNS.items():
        exact = [name for name in names if simplified(name) == field]
        found = exact or [name for name in names if simplified(name) in known.split()]
        if len(found) > 1 and (labelled or field in MODALITIES):
            raise InputError(
                f"Expected one column {field}, but {path} has {found}: rename the one to be used {field!r}."
            )
        if found:
            columns[field] = found[0]
    lacking = [name for name in MODALITIES if name not in columns]
    unknown = [name for name in names if name not in columns.values() and name.strip()]
    if len(lacking) == 2 or (lacking and unknown):
        # Another name could be the picture's or the text's, which must not be dropped.
        wanted = f"a column {lacking[0]} ({', '.join(COLUMNS[lacking[0]].split())})"
        hint = "rename it, or add an empty one" if len(lacking) == 1 else "columns are separated by , ; or tab"
        raise InputError(f"Expected {wanted}, but {path} has {list(names)}: {hint}.")
    if labelled and "label" not in columns:
        wanted = f"a column label ({', '.join(COLUMNS['label'].split())})"
        raise InputError(f"Expected {wanted}, but {path} has {list(names)}.")
    return columns


def simplified(name: str) -> str:
    """A column's name without case, blanks, underscores and hyphens."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def split_named(name: str) -> str | None:
    """The split that a name means: train, val or test."""
    key = name.strip().casefold()
    return next((split for split, names in SPLITS.items() if key in names), None)


# -- CSV --------------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> Table:
    """A strict reading: an unclosed quote, which would swallow the rows after it, is an error."""
    text = decoded(path)
    delimiter = find_delimiter(path, text)
    lines = list(io.StringIO(text, newline=""))
    (_, _, header), *rows = csv_rows(path, lines, delimiter) if text.strip() else [(1, 1, [""])]
    header = [name.strip() for name in header]
    find_columns(path, header, labelled=False)
    for first, _, cells in rows:
        if len(cells) != len(header):
            wanted = f"{len(header)} fields, as in the header"
            raise InputError(f"Expected {wanted}, but {path} line {first} has {len(cells)}.")
    check_spans(path, header, rows, lines, delimiter)
    return Table(header, [(f"{path} line {first}", dict(zip(header, cells, strict=True))) for first, _, cells in rows])


def find_delimiter(path: Path, text: str) -> str:
    """That with which the header has most of the columns that are known."""
    known = {name for names in COLUMNS.values() for name in names.split()}
    counts = {}
    for delimiter in DELIMITERS:
        header: list[str] = []
        with suppress(InputError):  # A header in quotes can be read with its own delimiter only.
            _, _, header = next(csv_rows(path, io.StringIO(text, newline=""), delimiter), (1, 1, []))
        counts[delimiter] = sum(simplified(name) in known for name in header)
    best = [delimiter for delimiter, count in counts.items() if count == max(counts.values())]
    if len(best) > 1 and counts[best[0]] > 1:
        names = " or ".join(DELIMITERS[delimiter] for delimiter in best)
        raise InputError(f"Expected one delimiter, but the header of {path} can be read with {names}.")
    return best[0]


def csv_rows(path: Path, lines: Any, delimiter: str) -> Iterator[Line]:
    """The rows; blank lines are left out."""
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "limit" in str(error):
                what = f"begins a longer one, of {csv.field_size_limit()} characters or more; is a quote not closed?"
                raise InputError(f"Expected shorter fields, but {path} line {first} {what}") from None
            if "expected after" in str(error) or "end of data" in str(error):
                what = f"{path} line {first} opens one that line {reader.line_num} does not close"
                raise InputError(f"Expected closed quotes, but {what}; a quote within quotes is doubled.") from None
            raise InputError(f"Expected a CSV, but {path} line {first} is not: {error}.") from None
        if cells:
            yield first, reader.line_num, cells


def check_spans(path: Path, header: list[str], rows: list[Line], lines: list[str], delimiter: str) -> None:
    """Refuse a row of several lines each of which is a row by itself: its quote was an inch, and another one ends it.

    Such lines have the header's fields; the first has a label that other rows have too, or the last a picture.
    """
    place = {field: header.index(name) for field, name in find_columns(path, header, False).items()}
    labels = {cells[place["label"]].strip() for _, _, cells in rows} - {""} if "label" in place else set()

    def split(line: str) -> list[str]:
        cells = [cell.strip().strip('"') for cell in line.strip("\r\n").split(delimiter)]
        if "text" in place and len(cells) > len(header):  # The text's own delimiters.
            cells[place["text"] : place["text"] + 1 + len(cells) - len(header)] = [""]
        return cells

    for first, last, _ in rows:
        parts = [split(line) for line in lines[first - 1 : last]] if last > first else [[]]
        if any(len(cells) < len(header) for cells in parts):
            continue
        has_label = "label" in place and parts[0][place["label"]] in labels
        if has_label or ("image" in place and Path(parts[-1][place["image"]]).suffix.lower() in PICTURES):
            what = f"{path} line {first} opens one that ends in line {last}, and each of these lines is a row by itself"
            raise InputError(f"Expected closed quotes, but {what}; a quote within quotes is doubled.")


# -- JSONL ------------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path) -> Table:
    """JSON objects, one a line; NaN, which Python writes, is null."""
    rows = []
    for number, line in enumerate(io.StringIO(decoded(path), newline=None), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                fields = json.loads(line, object_pairs_hook=unique, parse_constant=lambda _: None)
            except ValueError as error:
                raise InputError(f"Expected {where} to be readable, but got: {error}.") from None
            if not isinstance(fields, dict):
                raise InputError(f"Expected a JSON object a line, but {where} is another thing.")
            rows.append((where, fields))
    return Table(list(dict.fromkeys(name for _, fields in rows for name in fields)), rows)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict; of a key that occurs twice, json would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the keys {[key for key, _ in pairs]}, one of them twice")
    return fields


# -- folders ----------------------------------------------------------------------------------------------------------


def folder(path: Path, labelled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures and texts of class folders; what is hidden, as systems and editors leave it, is passed over."""
    parts = {file: file.relative_to(path).parts for file in sorted(path.rglob("*")) if file.is_file()}
    files = [file for file, names in parts.items() if not any(x[0] == "." or x == "__MACOSX" for x in names)]
    if tables := [file for file in files if file.suffix.lower() in (".csv", ".tsv", ".jsonl", ".ndjson")]:
        raise InputError(f"Expected a folder of pictures and texts, but {path} has a table: give {tables[0]} itself.")
    kinds = PICTURES | {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in kinds]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    if others := Counter(file.suffix for file in files if file.suffix.lower() not in kinds | {".txt"}):
        print(f"{path}: passed over: {', '.join(f'{suffix} ({count})' for suffix, count in others.items())}.")
    stems = {picture.with_suffix("") for picture in pictures}
    for file in sorted(pictures + [text for stem, text in texts.items() if stem not in stems]):
        text, (*places, _) = texts.get(file.with_suffix("")), parts[file]
        fields = {"id": "/".join(parts[file]), "image": None if file == text else str(Path(*parts[file]))}
        if labelled:
            fields |= split_and_class(file, places)
        yield str(file), {**fields, "text": decoded(text) if text else None}


def split_and_class(file: Path, places: list[str]) -> dict[str, str]:
    """What the one or two folders around a file say."""
    if not places or len(places) > 2 or (len(places) == 1 and split_named(places[0])):
        wanted = "pictures and texts in class folders, or in such in train, val and test"
        raise InputError(f"Expected {wanted}, but {file} lies elsewhere.")
    return {"label": places[-1]} | ({"split": places[0]} if len(places) == 2 else {})
