"""Seeded tables of which sample lacks which modality, for experiments, and the files that they are kept in.

The same arguments give the same table on every machine and with every version of Python and torch. Tables of train,
validation and test take different seeds, or are one table over all ids.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Context, Decimal
from heapq import heapify, heapreplace
from itertools import compress
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protohead.cases import _modality_names, _values, case_names, present_from_missing_type

__all__ = ["MissingTable", "load_map_table", "missing_table"]


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
        self.ids = _read_ids(ids)
        self.modalities = _read_modalities(modalities)
        self.present = _read_mask("present", present, len(self.ids), self.modalities)
        self._rows = {id: row for row, id in enumerate(self.ids)}

    def __repr__(self) -> str:
        """The first line of :meth:`describe`."""
        return f"{type(self).__name__}({self.describe().splitlines()[0]})"

    def describe(self) -> str:
        """The rates as papers give them: η, the incomplete rows; each modality, as *present*; then the rows by case.

        Example:
            >>> print(missing_table(200, ["image", "text"], 0.7).describe())
            200 rows, η = 70 %: 65 % image / 65 % text present
            image+text: 30 % (60)
            image: 35 % (70), text missing
            text: 35 % (70), image missing
        """
        if not self.ids:
            return f"0 rows of {' / '.join(self.modalities)}"
        counts = Counter(map(tuple, self.present.tolist()))
        shares = zip(self.present.double().mean(0).tolist(), self.modalities, strict=True)
        there = " / ".join(f"{_percent(share)} {name}" for share, name in shares)
        complete = counts[(True,) * len(self.modalities)]
        lines = [f"{len(self.ids)} rows, η = {_percent(1 - complete / len(self.ids))}: {there} present"]
        for mask in sorted(counts, key=lambda mask: (-sum(mask), [not has for has in mask])):
            has = list(compress(self.modalities, mask))
            lacks = ", ".join(name for name in self.modalities if name not in has)
            line = f"{'+'.join(has) or 'nothing'}: {_percent(counts[mask] / len(self.ids))} ({counts[mask]})"
            lines.append(f"{line}, {lacks} missing" if lacks else line)
        return "\n".join(lines)

    def select(self, ids: Sequence[object] | Tensor) -> Tensor:
        """The rows of some samples, in the order of `ids`, which may name a sample twice: (B, M) bool on the CPU.

        Raises:
            KeyError: If an id is not in the table.
        """
        wanted = _strings(ids)
        if unknown := [id for id in wanted if id not in self._rows]:
            got = f"{unknown[:5]}, {len(unknown)} in all" if len(unknown) > 5 else unknown
            raise KeyError(f"Expected ids of the {len(self.ids)} rows of the table, but got others: {got}.")
        return self.present[[self._rows[id] for id in wanted]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines, ``{"id": "a", "image": true, "text": false}``, true for present; the whole file or nothing.

        Raises:
            ValueError: If there is no row, as the file could not name the modalities.
        """
        if not self.ids:
            raise ValueError("Expected a table with at least one row to save, but got none.")
        unfinished = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
                for id, row in zip(self.ids, self.present.tolist(), strict=True):
                    line = {"id": id, **dict(zip(self.modalities, row, strict=True))}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MissingTable":
        """Read what :meth:`save` wrote, or the same by hand; the first line orders the columns.

        Raises:
            ValueError: If a line is anything else, with the file and the line.
        """
        rows: dict[str, list[bool]] = {}
        modalities: tuple[str, ...] = ()
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    id, flags = _read_line(line)
                    modalities = modalities or _read_modalities(list(flags))
                    if set(flags) != set(modalities):
                        raise ValueError(f"Expected the modalities {modalities}, but got {tuple(flags)}.")
                    if id in rows:
                        raise ValueError(f"Expected no id twice, but got {id!r} again.")
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
                rows[id] = [flags[name] for name in modalities]
        if not rows:
            raise ValueError(f"Expected at least one row in {os.fspath(path)}, but got none.")
        return cls(list(rows), modalities, torch.tensor(list(rows.values()), dtype=torch.bool, device="cpu"))


def missing_table(
    ids: int | Sequence[object] | Tensor,
    modalities: Sequence[str],
    rate: float | Mapping[str, float],
    missing: str | Sequence[str] | Mapping[str, float] = "all",
    seed: int = 0,
    weights: Tensor | Sequence[float] | None = None,
    given: Tensor | None = None,
) -> MissingTable:
    """Draw which samples lack which modality; every row keeps at least one.

    Args:
        ids: N strings or integers, which are turned into strings; or N, for the ids ``"0"`` to ``"N-1"``.
        modalities: The M modality names in order.
        rate: η in [0, 1]: exactly round(η · N) rows become incomplete; a higher η adds rows to those of a lower one.
            Or a mapping from modality to its own rate, 0 where left out: exactly round(rate · N) rows lack it, drawn
            independently of the other modalities, except that a row which could keep nothing is passed over.
        missing: What an incomplete row lacks, where `rate` is η: ``"all"``, every combination in equal shares, also
            called ``"both"`` for two modalities; one modality, or several as in ``"image+audio"``; a list of these in
            equal shares; or a mapping to shares: MAP's ``both_ratio`` of 0.3 is ``{"image": 0.3, "text": 0.7}``.
        seed: A non-negative integer.
        weights: N numbers that say how likely each row is, relative to the others, to be the next to go missing. They
            make missingness depend on the label or on a feature (MNAR), as in ``1 + 4 * (labels == 3)``. A row of
            weight 0 loses nothing.
        given: (N, M) bool: what the samples really have; all by default. A row that lacks something stays as it is:
            only complete rows lose something, and N above is the number of these.

    Raises:
        ValueError: If an argument is outside of what is said here, the rates would leave a row nothing, or too few
            rows have a positive weight.
        TypeError: If an argument is of another kind: an id neither string nor integer, a rate no number, and so on.

    Example:
        >>> missing_table(["a", "b", "c", "d"], ["image", "text"], 0.5).present.tolist()
        [[True, True], [True, True], [False, True], [True, False]]
        >>> missing_table(100, ["image", "text"], {"image": 0.3, "text": 0.5})
        MissingTable(100 rows, η = 80 %: 70 % image / 50 % text present)
    """
    ids, modalities = _read_ids(ids), _read_modalities(modalities)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise TypeError(f"Expected argument `seed` to be a non-negative integer, but got {seed!r}.")
    # Python keeps the numbers that random() gives for a seed; torch, NumPy and random.sample do not.
    generator = random.Random(int(seed))
    odds = None if weights is None else [_number("weights", weight) for weight in _values("weights", weights)]
    if odds is not None and len(odds) != len(ids):
        raise ValueError(f"Expected argument `weights` to be of length {len(ids)}, one a row, but got {len(odds)}.")
    present = torch.ones(len(ids), len(modalities), dtype=torch.bool, device="cpu")
    if given is not None:
        present = _read_mask("given", given, len(ids), modalities).clone()
    complete = present.all(1).nonzero()[:, 0].tolist()

    def queue() -> list[int]:
        """The rows that can go missing, in the order in which they do."""
        keys = [generator.random() for _ in ids]
        if odds is None:
            return sorted(complete, key=keys.__getitem__)
        # Efraimidis and Spirakis: in the order of -log(u) / weight, each row is drawn in proportion to its weight among
        # those left. math.log may differ in the last bit between machines; Decimal rounds correctly on all.
        context = Context(prec=17)
        late = {row: -float(Decimal(1 - keys[row]).ln(context)) / odds[row] for row in complete if odds[row] > 0}
        return sorted(late, key=late.__getitem__)

    if isinstance(rate, Mapping):
        if missing != "all":
            raise ValueError(f"Expected `missing` to be left out where `rate` names modalities, but got {missing!r}.")
        if unknown := [name for name in rate if name not in modalities]:
            raise ValueError(f"Expected argument `rate` to name some of {modalities}, but got {unknown}.")
        rates = [_number("rate", rate.get(name, 0.0), most=1) for name in modalities]
        queues = [queue() for _ in modalities]
        lost = _lose_each([round(rate * len(complete)) for rate in rates], queues, modalities)
    else:
        rows = queue()
        count = round(_number("rate", rate, most=1) * len(complete))
        shares = _read_missing(missing, modalities)
        if count > len(rows) or (count and not shares):
            possible = (
                f"only {len(rows)} are complete and of positive weight" if shares else "none could keep a modality"
            )
            raise ValueError(f"Expected to make {count} rows incomplete, but {possible}.")
        lost = [(row, m) for row, gone in zip(rows[:count], _turns(shares), strict=False) for m in gone]
    for row, m in lost:
        present[row, m] = False
    return MissingTable(ids, modalities, present)


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
    name = os.fspath(path)
    try:
        codes = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # Which one torch.load raises depends on its version and on the file's first bytes.
        raise ValueError(f"Expected {name} to be a tensor that torch.save wrote; it cannot be read.") from error
    if not isinstance(codes, Tensor) or codes.dim() != 1:
        got = f"shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"Expected {name} to hold a tensor of shape (N,), but got {got}.")
    known = _read_ids(len(codes) if ids is None else ids)
    if len(known) != len(codes):
        raise ValueError(f"Expected {len(codes)} ids, as {name} has rows, but got {len(known)}.")
    try:
        return MissingTable(known, modalities, present_from_missing_type(codes, modalities))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _lose_each(counts: list[int], queues: list[list[int]], modalities: Sequence[str]) -> list[tuple[int, int]]:
    """Take modality m from `counts[m]` of the rows, the first of its queue that can still keep another one."""
    rows = len(queues[0])
    if max(counts) > rows or sum(counts) > rows * (len(counts) - 1):
        wanted = dict(zip(modalities, counts, strict=True))
        raise ValueError(
            f"Expected `rate` to leave each of {rows} rows a modality, but of these {wanted} would lose it."
        )
    lost: list[tuple[int, int]] = []
    bare = set(queues[0])  # Rows that have kept nothing yet.
    for m, queue in enumerate(queues):
        # There are as many bare rows at most as the modalities to come are kept, so that all will keep one.
        room = sum(rows - count for count in counts[m + 1 :])
        losers: set[int] = set()
        for row in queue:
            if len(losers) < counts[m] and (row not in bare or room > 0):
                room -= row in bare
                losers.add(row)
        lost += [(row, m) for row in losers]
        bare &= losers
    return lost


def _turns(shares: Mapping[tuple[int, ...], float]) -> Iterator[tuple[int, ...]]:
    """Without end, the columns that the next row loses: each item has its share of any number of turns."""
    # Sainte-Laguë: the k-th turn comes at (k - 1/2) / share. Turns do not depend on how many follow.
    turns = [(0.5 / share, place, 0, gone) for place, (gone, share) in enumerate(shares.items())]
    heapify(turns)
    while turns:
        _, place, taken, gone = turns[0]
        yield gone
        heapreplace(turns, ((taken + 1.5) / shares[gone], place, taken + 1, gone))


def _read_missing(
    missing: str | Sequence[str] | Mapping[str, float], modalities: Sequence[str]
) -> dict[tuple[int, ...], float]:
    """Columns that go missing together to their share."""
    cases = case_names(modalities)[1:]
    columns = {case: tuple(m for m, name in enumerate(modalities) if name in case.split("+")) for case in cases}
    if missing == "all" or (missing == "both" and len(modalities) == 2):
        # In the order of the cases, which are named by what is present. The first get the odd rows, as in MAP.
        return {tuple(m for m in range(len(modalities)) if m not in there): 1.0 for there in columns.values()}
    if not isinstance(missing, (Sequence, Mapping)):  # Such as a set, whose order changes between runs.
        raise TypeError(f"Expected argument `missing` to be a string, a list or a mapping, but got {missing!r}.")
    names = [missing] if isinstance(missing, str) else list(missing)
    if unknown := [name for name in names if name not in columns]:
        known = ("all", *(["both"] if len(modalities) == 2 else []), *cases)
        raise ValueError(f"Expected argument `missing` to be of {known}, but got {unknown}.")
    if len(set(names)) < len(names):
        raise ValueError(f"Expected nothing twice in `missing`, but got {names}.")
    given = missing if isinstance(missing, Mapping) else dict.fromkeys(names, 1.0)
    shares = {columns[name]: share for name in names if (share := _number("missing", given[name])) > 0}
    if not shares:
        raise ValueError(f"Expected argument `missing` to have a positive share, but got {missing}.")
    return shares


def _read_ids(ids: int | Sequence[object] | Tensor) -> tuple[str, ...]:
    if isinstance(ids, Integral) and not isinstance(ids, bool):
        if ids < 0:
            raise ValueError(f"Expected argument `ids` to be a number of rows, or ids, but got {ids}.")
        return tuple(map(str, range(ids)))
    names = _strings(ids)
    if twice := [id for id, count in Counter(names).items() if count > 1]:
        raise ValueError(f"Expected no id twice, but got {twice[:5]} more than once.")
    return names


def _strings(ids: Any) -> tuple[str, ...]:
    if isinstance(ids, (set, frozenset)):
        raise TypeError("Expected argument `ids` to be in an order, but got a set, whose order changes between runs.")
    values = _values("ids", ids)
    for id in values:
        if isinstance(id, bool) or not isinstance(id, (str, Integral)):
            raise TypeError(f"Expected ids to be strings or integers, but got {id!r}.")
    return tuple(map(str, values))


def _read_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    names = tuple(_modality_names(modalities))
    if "id" in names:
        raise ValueError(f"Expected no modality named 'id', which a file keeps for the ids, but got {names}.")
    return names


def _read_mask(argument: str, mask: Tensor, rows: int, modalities: Sequence[str]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"Expected argument `{argument}` to be a bool tensor, but got {kind}.")
    if mask.shape != (rows, len(modalities)):
        wanted, got = (rows, len(modalities)), tuple(mask.shape)
        raise ValueError(f"Expected argument `{argument}` to be of shape {wanted} for {modalities}, but got {got}.")
    return mask.detach().cpu()


def _read_line(line: bytes) -> tuple[str, dict[str, bool]]:
    try:
        flags = json.loads(line)
    except ValueError as error:
        raise ValueError(f"Expected JSON, but got {line.rstrip()[:80]!r}.") from error
    if not isinstance(flags, dict) or "id" not in flags:
        raise ValueError(f"Expected an object with an 'id', but got {line.rstrip()[:80]!r}.")
    (id,) = _strings([flags.pop("id")])
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"Expected true or false for {name!r}, but got {flag!r}.")
    return id, flags


def _number(argument: str, value: Any, most: float = inf) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"Expected a number for `{argument}`, but got {value!r}.")
    number = float(value)
    if not (isfinite(number) and 0 <= number <= most):
        wanted = "in [0, 1]" if most == 1 else "finite and not negative"
        raise ValueError(f"Expected argument `{argument}` to be {wanted}, but got {value!r}.")
    return number


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
