"""Labels as tables hold them: one a row or several, in several spellings; what could mean two things is an error."""

import ast
import json
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from files import MISSING, InputError

Found = list[tuple[str, Any]]  # Where each row stands, and its label as the file has it.


def read_labels(found: Found, separator: str | None = None) -> tuple[list[list[str]], bool]:
    """The labels of each row, and whether rows can have several.

    Args:
        found: Labels: a text or number, several in one text, or a list of either.
        separator: What separates several labels in a text; "": nothing does. By default `|`, and texts with `,` or
            `;`, which could be one label or several, are refused.

    Raises:
        InputError: If a label is missing, or could mean several things.
    """
    values = [(where, _several(where, value, separator)) for where, value in found]
    lists = [value for _, value in values if isinstance(value, list)]
    names = [(where, [_name(where, item) for item in (x if isinstance(x, list) else [x])]) for where, x in values]
    _check_multi_hot(names, len(lists) == len(names))
    _check_spelling(names)
    return [labels for _, labels in names], bool(lists)


def _several(where: str, value: Any, separator: str | None) -> Any:
    """A text that holds several labels as a list of these; else the value as it is."""
    if not isinstance(value, str) or separator == "":
        return value
    text = value.strip()
    if re.fullmatch(r"[01]([ ,;][01])+", text):
        raise InputError(f"Expected names of labels, but {where} has {text!r}, which is multi-hot: name what it marks.")
    if text[:1] + text[-1:] in ("[]", "()", "{}"):
        return _list(where, text)
    if separator is None and (found := [mark for mark in ";," if mark in text]):
        hint = f"--label-separator '{found[0]}' takes it for several, --label-separator '' for one"
        raise InputError(f"Expected one label, or several as A|B, but {where} has {text!r}: {hint}.")
    parts = [part.strip() for part in text.split(separator or "|") if part.strip()]
    return parts if (separator or "|") in text else text


def _list(where: str, text: str) -> list[Any]:
    """A list as JSON or Python writes it, as pandas does with a column of lists."""
    value: Any = None
    with suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        # Python joins the texts of ['A' 'B'], as NumPy writes an array, to 'AB'.
        written, again = (re.sub(r"\s", "", x).replace('"', "'") for x in (text, repr(value)))
        value = value if written == again else None
    with suppress(ValueError):
        value = json.loads(text)
    if not isinstance(value, list | tuple):
        raise InputError(f"Expected a label, or a list such as ['A', 'B'], but {where} has {text!r}.")
    return list(value)


def _name(where: str, value: Any) -> str:
    """One label as a text; 1.0, as pandas writes integers beside gaps, is 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or str(value).strip().casefold() in MISSING:
        raise InputError(f"Expected a label, or a list of labels, but {where} has {value!r}.")
    return str(value).strip()


def _check_multi_hot(names: Sequence[tuple[str, list[str]]], all_lists: bool) -> None:
    """Refuse lists that mark labels instead of naming them."""
    for where, labels in names:
        if len(set(labels)) < len(labels):
            what = f"{where} has {labels}; of a multi-hot list, name what it marks"
            raise InputError(f"Expected no label twice in a row, but {what}.")
    lengths = {len(labels) for _, labels in names}
    if all_lists and len(lengths) == 1 and min(lengths) > 1:
        where, labels = names[0]
        if {label for _, labels in names for label in labels} <= {"0", "1", "True", "False"}:
            raise InputError(
                f"Expected names of labels, but {where} has {labels}, which is multi-hot: name what it marks."
            )


def _check_spelling(names: Sequence[tuple[str, list[str]]]) -> None:
    """Refuse a label in two spellings, which would be two classes."""
    met: dict[str, tuple[str, str]] = {}
    for where, labels in names:
        for label in labels:
            key = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
            key = re.sub(r"^(-?\d+)\.0+$", r"\1", key)
            before, other = met.setdefault(key, (label, where))
            if before != label:
                raise InputError(f"Expected one spelling of a label, but {other} has {before!r}, {where} {label!r}.")
