"""What accuracy.py measured: its CSV, read, averaged over seeds and settings, and put in tables."""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from methods import METHODS
from scipy.stats import t as student

Setting = tuple[str, float]  # What is missing, and at which rate.
Row = Sequence[str | float]
OURS, NO_PARTS = "protohead", "protohead, no sub-cases"
FEW, THREE = ("linear", "late fusion", "cosine head", "paper", OURS), ("linear", "paper", OURS)
ALL_ROWS, LACKING, ENOUGH = "all rows", ("all", 0.7), 30  # ENOUGH rows of a case, for its score to say something.
SHORT = {"linear, modality dropout": "linear, dropout", "paper, no prototype loss": "paper, no proto. loss"}
UNTRAINED, NO_MASK = "paper, no fall-back", "paper, least entropy"


class Results:
    """The CSV, without the settings and seeds in which a main method is not finished, so that means compare.

    A cell is data and what is missing in training; then, if other than in training, what is missing in the test, as
    (kind, rate, share of the mask that is wrong), and the case whose rows count.
    """

    def __init__(self, path: Path) -> None:
        whole = path.read_text().rpartition("\n")[0]  # An interrupted run may end in the middle of a line.
        lines = list(csv.DictReader(whole.splitlines()))
        blocks = [(x["data"], (x["train_missing"], float(x["train_rate"])), int(x["seed"])) for x in lines]
        done, main = defaultdict[Any, set[str]](set), defaultdict[str, set[str]](set)
        for x, block in zip(lines, blocks, strict=True):
            done[block].add(x["trained"])
            main[block[0]] |= {x["trained"]} & set(METHODS)
        kept = {block for block, methods in done.items() if methods >= main[block[0]]}
        self.unfinished = len(done) - len(kept)
        self.lines = defaultdict[Any, dict[int, dict[str, str]]](dict)
        for x, block in zip(lines, blocks, strict=True):
            if block in kept:
                test = x["test_missing"], float(x["test_rate"]), float(x["flipped"])
                self.lines[block[0], x["method"], block[1], test, x["case"]][block[2]] = x
        self.data = list(dict.fromkeys(key[0] for key in self.lines))
        self.seeds = {data: len({block[2] for block in kept if block[0] == data}) for data in self.data}
        self.methods = [method for method in METHODS if any(method in main[data] for data in self.data)]
        cells: set[Any] = {block[:2] for block in kept}
        self.every = sorted(cells, key=lambda c: (self.data.index(c[0]), c[1][1], c[1][0] == "all", c))
        groups = [(data, [cell for cell in self.every if cell[0] == data]) for data in self.data]
        self.groups = groups + [("all cells", self.every)] * (len(groups) > 1)

        self.cases, self.kinds = dict[str, list[str]](), dict[str, list[Setting]]()
        for data in self.data:  # The complete case and those of one modality; and what is trained and tested crosswise.
            complete = max((key[4] for key in self.lines if key[0] == data), key=lambda case: case.count("+"))
            self.cases[data] = [complete, *complete.split("+")]
            self.kinds[data] = [kind for name, kind in self.every if name == data and kind[1] in (0, LACKING[1])]

    def get(self, data: str, method: str, train: Setting, *other: Any, metric: str = "macro_f1") -> dict[int, float]:
        """Seed to score of a method in a cell, where it is defined."""
        lines = self.lines.get((data, method, train, *other, *((*train, 0.0), ALL_ROWS)[len(other) :]), {})
        return {seed: float(line[metric]) for seed, line in lines.items() if line[metric] not in ("", "nan")}

    def by_seed(self, method: str, cells: Iterable[tuple[Any, ...]], metric: str = "macro_f1") -> dict[int, float]:
        """The mean over the cells, for each seed that they all have."""
        found = [self.get(data, method, *rest, metric=metric) for data, *rest in cells]
        seeds = set.intersection(*map(set, found)) if found else set()
        return {seed: mean([scores[seed] for scores in found]) for seed in sorted(seeds)}

    def mean(self, method: str, cells: Iterable[tuple[Any, ...]], metric: str = "macro_f1") -> float:
        """The mean over cells and seeds."""
        return mean(self.by_seed(method, cells, metric).values())

    def compare(self, a: str, b: str, cells: Sequence[tuple[Any, ...]]) -> tuple[float, int, str, float]:
        """Of a minus b, in the cells of both, paired by seed.

        The mean; 1 or −1 if its interval is above or below 0; the interval; the p-value of Student's t-test.
        """
        cells = [cell for cell in cells if self.by_seed(a, [cell]) and self.by_seed(b, [cell])]
        x, y = self.by_seed(a, cells), self.by_seed(b, cells)
        values = [x[seed] - y[seed] for seed in x.keys() & y.keys()]
        middle = mean(values)
        if len(values) < 2:
            return middle, 0, "–", math.nan
        half, error, freedom = spread(values)
        text = f"{percent(middle - half, '+')} to {percent(middle + half, '+')}"
        p = 2 * float(student.sf(abs(middle) / error, freedom)) if error else float(middle == 0)
        return middle, (middle > half) - (middle < -half), text, p


def spread(values: Sequence[float]) -> tuple[float, float, int]:
    """Half the 95 % interval of a mean by Student's t, its standard error, and the degrees of freedom."""
    error, freedom = float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1
    return float(student.ppf(0.975, freedom)) * error, error, freedom


def interval(values: Sequence[float]) -> str:
    """95 %, as text."""
    if len(values) < 2:
        return "–"
    middle, half = mean(values), spread(values)[0]
    return f"{percent(middle - half, '+')} to {percent(middle + half, '+')}"


def holm(p_values: Iterable[float], level: float = 0.05) -> float:
    """The largest p-value that is significant among so many (Holm, 1979), or −1."""
    limit, ordered = -1.0, sorted(p_values)
    for i, p in enumerate(ordered):
        if p > level / (len(ordered) - i):
            break
        limit = p
    return limit


def mean(values: Collection[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def percent(x: float, sign: str = "") -> str:
    """One decimal, or a dash where undefined; with the sign "+" a difference, in points."""
    text = f"{100 * x:{sign}.1f}".replace("-", "−")
    return "–" if math.isnan(x) else "0.0" if sign and float(f"{100 * x:.1f}") == 0 else text


def marked(row: Row, best: Callable[[Any], float] = max) -> list[str]:
    """Numbers in percent, the best in bold; text as it is."""
    known = [x for x in row if not isinstance(x, str) and not math.isnan(x)]
    texts = [x if isinstance(x, str) else percent(x) for x in row]
    return [f"**{x}**" if known and x == percent(best(known)) else x for x in texts]


def table(head: Iterable[str], rows: Iterable[Row], best: Callable[[Any], float] = max) -> list[str]:
    """In Markdown, the best number of each row in bold."""
    names = [SHORT.get(name, name) for name in head]
    return ["", *(f"| {' | '.join(marked(row, best))} |" for row in (names, ["---"] * len(names), *rows)), ""]


def compared(r: Results, head: str, rows: Any, metric: str = "macro_f1", methods: Sequence[str] = ()) -> list[str]:
    """A table by the rows' names and cells and by methods; ± is the standard deviation of ours over seeds."""
    found, methods = list[Row](), methods or r.methods
    for name, cells in rows:
        ours = list(r.by_seed(OURS, cells, metric).values())
        spread = percent(float(np.std(ours, ddof=1)) if len(ours) > 1 else math.nan)
        found.append([name, *(r.mean(method, cells, metric) for method in methods), spread])
    return table([head, *methods, "±"], found, min if metric in ("ece", "aurc") else max)


def at(setting: Setting) -> str:
    """What is missing."""
    return f"{setting[0]}, {100 * setting[1]:g} %" if setting[1] else "none"
