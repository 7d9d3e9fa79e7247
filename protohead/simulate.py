"""Seeded tables of which sample lacks which modality, for experiments.

The same arguments give the same table on every machine and with every version of Python and torch. Tables of train,
validation and test take different seeds, or are one table over all ids.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import Context, Decimal
from functools import partial
from heapq import heapify, heapreplace
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from protohead.cases import case_names
from protohead.present import column_values
from protohead.tables import MissingTable, load_map_table, read_ids, read_mask, read_modalities

__all__ = ["MissingTable", "load_map_table", "missing_table"]

Columns = tuple[int, ...]  # Of modalities that go missing together.


def missing_table(
    ids: int | Sequence[object] | Tensor,
    modalities: Sequence[str],
    rate: float | Mapping[str, float],
    missing: str | Sequence[str] | Mapping[str, float] = "all",
    seed: int = 0,
    weights: Tensor | Sequence[float] | None = None,
    present: Tensor | None = None,
) -> MissingTable:
    """Draw which samples lack which modality; every row keeps at least one.

    Args:
        ids: N strings or integers, which are turned into strings; or N, for the ids ``"0"`` to ``"N-1"``.
        modalities: The M modality names in order.
        rate: η in [0, 1]: exactly round(η · N) rows become incomplete; a higher η adds rows to those of a lower one.
            Or a mapping from modality to its own rate, 0 where left out: exactly round(rate · N) rows lack it, drawn
            independently of the other modalities, except that a row which could keep nothing is passed over.
        missing: What an incomplete row lacks, where `rate` is η: ``"all"``, every combination in equal proportions,
            also called ``"both"`` for two modalities; one modality, or several as in ``"image+audio"``; a list of
            these in equal proportions; or a mapping to proportions: MAP's ``both_ratio`` of 0.3 is
            ``{"image": 0.3, "text": 0.7}``.
        seed: A non-negative integer.
        weights: N numbers that say how likely each row is, relative to the others, to be the next to go missing. They
            make missingness depend on the label or on a feature (MNAR), as in ``1 + 4 * (labels == 3)``. A row of
            weight 0 loses nothing.
        present: (N, M) bool: what the samples really have; all by default. A row that lacks something stays as it is:
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
    ids, modalities = read_ids(ids), read_modalities(modalities)
    if present is None:
        present = torch.ones(len(ids), len(modalities), dtype=torch.bool, device="cpu")
    present = read_mask(present, len(ids), modalities).clone()
    complete = present.all(1).nonzero()[:, 0].tolist()
    weights = _read_weights(weights, len(ids))
    draw = partial(_draw_order, _seeded_generator(seed), len(ids), complete, weights)
    if isinstance(rate, Mapping):
        if missing != "all":
            raise ValueError(f"Expected `missing` to be left out where `rate` names modalities, but got {missing!r}.")
        counts = _read_rates(rate, modalities, len(complete))
        orders = [draw() for _ in modalities]
        lost = _lose_by_modality(counts, orders, modalities)
    else:
        count = round(_number("rate", rate, most=1) * len(complete))
        proportions = _read_missing(missing, modalities)
        lost = _lose_together(count, draw(), proportions)
    for row, column in lost:
        present[row, column] = False
    return MissingTable(ids, modalities, present)


# -- the steps --------------------------------------------------------------------------------------------------------


def _draw_order(
    generator: random.Random, rows: int, complete: Sequence[int], weights: Sequence[float] | None
) -> list[int]:
    """The rows that can go missing, in the order in which they do."""
    keys = [generator.random() for _ in range(rows)]
    if weights is None:
        return sorted(complete, key=keys.__getitem__)
    # Efraimidis and Spirakis: in the order of -log(u) / weight, each row is drawn in proportion to its weight among
    # those left. math.log may differ in the last bit between machines; Decimal rounds correctly on all.
    context = Context(prec=17)
    times = {row: -float(Decimal(1 - keys[row]).ln(context)) / weights[row] for row in complete if weights[row] > 0}
    return sorted(times, key=times.__getitem__)


def _lose_together(count: int, order: Sequence[int], proportions: Mapping[Columns, float]) -> list[tuple[int, int]]:
    """(row, column) pairs: each of the first `count` rows loses one of the combinations of columns."""
    if count and not proportions:
        raise ValueError(f"Expected to make {count} rows incomplete, but none could keep a modality.")
    if count > len(order):
        possible = f"only {len(order)} are complete and of positive weight"
        raise ValueError(f"Expected to make {count} rows incomplete, but {possible}.")
    pairs = zip(order[:count], _deal(proportions), strict=False)
    return [(row, column) for row, columns in pairs for column in columns]


def _deal(proportions: Mapping[Columns, float]) -> Iterator[Columns]:
    """Without end, what the next row loses: after any number of rows the combinations are in proportion."""
    # Sainte-Laguë: the k-th turn comes at (k - 1/2) / proportion. Turns do not depend on how many follow.
    turns = [(0.5 / proportion, place, 1, columns) for place, (columns, proportion) in enumerate(proportions.items())]
    heapify(turns)
    while turns:
        _, place, k, columns = turns[0]
        yield columns
        heapreplace(turns, ((k + 0.5) / proportions[columns], place, k + 1, columns))


def _lose_by_modality(
    counts: Sequence[int], orders: Sequence[Sequence[int]], modalities: Sequence[str]
) -> list[tuple[int, int]]:
    """(row, column) pairs: `counts[m]` rows lose modality m, the first in its order that can still keep another."""
    rows = len(orders[0])
    if max(counts) > rows or sum(counts) > rows * (len(counts) - 1):
        wanted = dict(zip(modalities, counts, strict=True))
        raise ValueError(
            f"Expected `rate` to leave each of {rows} rows a modality, but of these {wanted} would lose it."
        )
    lost: list[tuple[int, int]] = []
    bare = set(orders[0])  # Rows that have kept nothing yet.
    for m, order in enumerate(orders):
        # Rows that stay bare must each keep a later modality, and the later ones are kept `room` times in all.
        room = sum(rows - count for count in counts[m + 1 :])
        losers: set[int] = set()
        for row in order:
            if len(losers) < counts[m] and (row not in bare or room > 0):
                room -= row in bare
                losers.add(row)
        lost += [(row, m) for row in losers]
        bare &= losers
    return lost


# -- arguments --------------------------------------------------------------------------------------------------------


def _seeded_generator(seed: int) -> random.Random:
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise TypeError(f"Expected argument `seed` to be a non-negative integer, but got {seed!r}.")
    # Python keeps the numbers that random() gives for a seed; torch, NumPy and random.sample do not.
    return random.Random(int(seed))


def _read_weights(weights: Tensor | Sequence[float] | None, rows: int) -> list[float] | None:
    if weights is None:
        return None
    numbers = [_number("weights", weight) for weight in column_values("weights", weights)]
    if len(numbers) != rows:
        raise ValueError(f"Expected argument `weights` to be of length {rows}, one a row, but got {len(numbers)}.")
    return numbers


def _read_rates(rate: Mapping[str, float], modalities: Sequence[str], rows: int) -> list[int]:
    """How many rows lose each modality."""
    if unknown := [name for name in rate if name not in modalities]:
        raise ValueError(f"Expected argument `rate` to name some of {modalities}, but got {unknown}.")
    return [round(_number("rate", rate.get(name, 0.0), most=1) * rows) for name in modalities]


def _read_missing(
    missing: str | Sequence[str] | Mapping[str, float], modalities: Sequence[str]
) -> dict[Columns, float]:
    """The combinations of columns that go missing, in proportion."""
    cases = case_names(modalities)[1:]
    every = ("all", "both") if len(modalities) == 2 else ("all",)
    if isinstance(missing, str) and missing in every:
        # In the order of the cases, which are named by what is present. The first get the odd rows, as in MAP.
        return {_columns(modalities, case, held=False): 1.0 for case in cases}
    if not isinstance(missing, (Sequence, Mapping)):  # Such as a set, whose order changes between runs.
        raise TypeError(f"Expected argument `missing` to be a string, a list or a mapping, but got {missing!r}.")
    names = [missing] if isinstance(missing, str) else list(missing)
    if unknown := [name for name in names if name not in cases]:
        raise ValueError(f"Expected argument `missing` to be of {(*every, *cases)}, but got {unknown}.")
    if len(set(names)) < len(names):
        raise ValueError(f"Expected nothing twice in `missing`, but got {names}.")
    values = missing if isinstance(missing, Mapping) else dict.fromkeys(names, 1.0)
    numbers = {name: _number("missing", values[name]) for name in names}
    if not any(numbers.values()):
        raise ValueError(f"Expected argument `missing` to have a positive proportion, but got {missing}.")
    return {_columns(modalities, name): number for name, number in numbers.items() if number > 0}


def _columns(modalities: Sequence[str], case: str, held: bool = True) -> Columns:
    """The columns of the modalities that a case holds, or of the others."""
    names = case.split("+")
    return tuple(m for m, name in enumerate(modalities) if (name in names) == held)


def _number(argument: str, value: Any, most: float = inf) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"Expected a number for `{argument}`, but got {value!r}.")
    number = float(value)
    if not (isfinite(number) and 0 <= number <= most):
        wanted = "in [0, 1]" if most == 1 else "finite and not negative"
        raise ValueError(f"Expected argument `{argument}` to be {wanted}, but got {value!r}.")
    return number
