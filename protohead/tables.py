"""Tables of which sample has which modality, and the files that they are kept in.

:func:`protohead.simulate.missing_table` draws such a table.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from protohead.cases import check_modalities
from protohead.present import column_values, present_from_missing_type

__all__ = ["MissingTable", "load_map_table"]


class MissingTable:
    """Which modalities each of N samples has.

    Args:
        ids: N strings or integers, which are turned into strings; or N, for the ids ``"0"`` to ``"N-1"``.
        modalities: The M modality names in the order of the columns; none may be ``"id"``.
        present: (N, M) bool. A row may have nothing.

    Attributes:
        ids: Tuple of N strings.
        modalities: Tuple of M strings.
        present: (N, M) bool on the CPU: what the head takes as `present`.

    Raises:
        ValueError: If an id occurs twice, a modality cannot be named so, or the shapes differ.
        TypeError: If an id is neither a string nor an integer, or `present` is not a bool tensor.

    Example:
        >>> table = MissingTable(["a", "b"], ["image", "text"], torch.tensor([[True, True], [True, False]]))
        >>> table
        MissingTable(2 rows, η = 50 %: 100 % image / 50 % text present)
        >>> table.select(["b", "a", "b"]).tolist()
        [[True, False], [True, True], [True, False]]
    """

    def __init__(self, ids: int | Sequence[object] | Tensor, modalities: Sequence[str], present: Tensor) -> None:
        self.ids = read_ids(ids)
        self.modalities = read_modalities(modalities)
        self.present = read_mask(present, len(self.ids), self.modalities)
        self._rows = {id: row for row, id in enumerate(self.ids)}

    def __repr__(self) -> str:
        """The first line of :meth:`describe`."""
        return f"{type(self).__name__}({self.describe().splitlines()[0]})"

    def describe(self) -> str:
        """The rates as papers state them: η, the incomplete rows; each modality, as *present*; then the rows by case.

        Example:
            >>> from protohead.simulate import missing_table
            >>> print(missing_table(200, ["image", "text"], 0.7).describe())
            200 rows, η = 70 %: 65 % image / 65 % text present
            image+text: 30 % (60)
            image: 35 % (70), text missing
            text: 35 % (70), image missing
        """
        if not self.ids:
            return f"0 rows of {' / '.join(self.modalities)}"
        incomplete = (~self.present.all(1)).double().mean().item()
        rates = self.present.double().mean(0).tolist()
        columns = [f"{_percent(rate)} {name}" for rate, name in zip(rates, self.modalities, strict=True)]
        title = f"{len(self.ids)} rows, η = {_percent(incomplete)}: {' / '.join(columns)} present"
        return "\n".join([title, *self._describe_cases()])

    def _describe_cases(self) -> list[str]:
        """A line for each case that has rows, in the order of the cases."""
        counts = Counter(map(tuple, self.present.tolist()))
        lines = []
        for mask in sorted(counts, key=lambda mask: (-sum(mask), [not has for has in mask])):
            present = list(compress(self.modalities, mask))
            missing = [name for name in self.modalities if name not in present]
            rows = f"{_percent(counts[mask] / len(self.ids))} ({counts[mask]})"
            line = f"{'+'.join(present) or 'nothing'}: {rows}"
            lines.append(f"{line}, {', '.join(missing)} missing" if missing else line)
        return lines

    def select(self, ids: Sequence[object] | Tensor) -> Tensor:
        """The rows of some samples, in the order of `ids`, which may name a sample twice: (B, M) bool on the CPU.

        Raises:
            KeyError: If an id is not in the table.
        """
        names = _strings(ids)
        if unknown := [id for id in names if id not in self._rows]:
            got = f"{unknown[:5]}, {len(unknown)} in all" if len(unknown) > 5 else unknown
            raise KeyError(f"Expected ids of the {len(self.ids)} rows of the table, but got others: {got}.")
        return self.present[[self._rows[id] for id in names]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines, ``{"id": "a", "image": true, "text": false}``, true for present; the whole file or nothing.

        Raises:
            ValueError: If there is no row, as the file could not name the modalities.
        """
        if not self.ids:
            raise ValueError("Expected a table with at least one row to save, but got none.")
        lines = []
        for id, row in zip(self.ids, self.present.tolist(), strict=True):
            line = {"id": id, **dict(zip(self.modalities, row, strict=True))}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        _write_whole(path, "".join(lines).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MissingTable":
        """Read what :meth:`save` wrote, or the same by hand; the first line orders the columns.

        Raises:
            ValueError: If a line is anything else, with the file and the line.
        """
        rows: dict[str, dict[str, bool]] = {}
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    _add_line(rows, line)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
        if not rows:
            raise ValueError(f"Expected at least one row in {os.fspath(path)}, but got none.")
        modalities = list(next(iter(rows.values())))
        present = [[row[name] for name in modalities] for row in rows.values()]
        return cls(list(rows), modalities, torch.tensor(present, dtype=torch.bool, device="cpu"))


def load_map_table(
    path: str | os.PathLike[str],
    ids: Sequence[object] | Tensor | None = None,
    modalities: Sequence[str] = ("image", "text"),
) -> MissingTable:
    """Read a missing table of MAP, DCP or DPL: a ``.pt`` file that holds one tensor of missing types 0, 1 and 2.

    Args:
        path: The file; no code in it is run.
        ids: Of the N samples, in the order of the file; ``"0"`` to ``"N-1"`` by default.
        modalities: ``"image"`` and ``"text"`` in the order of the columns.

    Raises:
        ValueError: If the file holds anything else (with its name), or there are not N ids.
    """
    file = os.fspath(path)
    codes = _load_codes(file)
    names = read_ids(len(codes) if ids is None else ids)
    if len(names) != len(codes):
        raise ValueError(f"Expected {len(codes)} ids, as {file} has rows, but got {len(names)}.")
    try:
        present = present_from_missing_type(codes, modalities)
        return MissingTable(names, modalities, present)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


# -- arguments --------------------------------------------------------------------------------------------------------


def read_ids(ids: int | Sequence[object] | Tensor) -> tuple[str, ...]:
    """Check the ids of a table, or their number; return them as strings."""
    if isinstance(ids, Integral) and not isinstance(ids, bool):
        if ids < 0:
            raise ValueError(f"Expected argument `ids` to be a number of rows, or ids, but got {ids}.")
        return tuple(map(str, range(ids)))
    names = _strings(ids)
    if twice := [id for id, count in Counter(names).items() if count > 1]:
        raise ValueError(f"Expected no id twice, but got {twice[:5]} more than once.")
    return names


def read_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    """Check the modality names of a table."""
    names = tuple(check_modalities(modalities))
    if "id" in names:
        raise ValueError(f"Expected no modality named 'id', which a file keeps for the ids, but got {names}.")
    return names


def read_mask(present: Tensor, rows: int, modalities: Sequence[str]) -> Tensor:
    """Check an (N, M) mask; return it on the CPU."""
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        kind = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"Expected argument `present` to be a bool tensor, but got {kind}.")
    wanted, got = (rows, len(modalities)), tuple(present.shape)
    if got != wanted:
        raise ValueError(f"Expected argument `present` to be of shape {wanted} for {modalities}, but got {got}.")
    return present.detach().cpu()


def _strings(ids: Any) -> tuple[str, ...]:
    if isinstance(ids, (set, frozenset)):
        raise TypeError("Expected argument `ids` to be in an order, but got a set, whose order changes between runs.")
    values = column_values("ids", ids)
    for id in values:
        if isinstance(id, bool) or not isinstance(id, (str, Integral)):
            raise TypeError(f"Expected ids to be strings or integers, but got {id!r}.")
    return tuple(map(str, values))


# -- files ------------------------------------------------------------------------------------------------------------


def _write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside `path`, then move it there: who reads `path` meets the old file or the new one."""
    # Other threads, processes and machines may save to the same path: no two of them use one name.
    unfinished = Path(path).parent / f"{uuid4().hex}.tmp"
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _add_line(rows: dict[str, dict[str, bool]], line: bytes) -> None:
    """Add what a line of a file says to the rows before it."""
    if not line.strip():
        return
    id, present = _parse_line(line)
    if not rows:
        read_modalities(list(present))
    first = next(iter(rows.values()), present)
    if set(present) != set(first):
        raise ValueError(f"Expected the modalities {tuple(first)}, but got {tuple(present)}.")
    if id in rows:
        raise ValueError(f"Expected no id twice, but got {id!r} again.")
    rows[id] = present


def _parse_line(line: bytes) -> tuple[str, dict[str, bool]]:
    try:
        entries = json.loads(line, object_pairs_hook=_dict_of_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected JSON, but got {line.rstrip()[:80]!r}.") from error
    if not isinstance(entries, dict) or "id" not in entries:
        raise ValueError(f"Expected an object with an 'id', but got {line.rstrip()[:80]!r}.")
    (id,) = _strings([entries.pop("id")])
    for name, value in entries.items():
        if not isinstance(value, bool):
            raise ValueError(f"Expected true or false for {name!r}, but got {value!r}.")
    return id, entries


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that occurs twice, json would keep the last value."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"Expected no key twice, but got {keys}.")
    return dict(pairs)


def _load_codes(file: str) -> Tensor:
    """The (N,) tensor in a file that torch.save wrote."""
    try:
        codes = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # Which one torch.load raises depends on its version and on the file's first bytes.
        raise ValueError(f"Expected {file} to be a tensor that torch.save wrote; it cannot be read.") from error
    if not isinstance(codes, Tensor) or codes.dim() != 1:
        got = f"shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"Expected {file} to hold a tensor of shape (N,), but got {got}.")
    return codes


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"
