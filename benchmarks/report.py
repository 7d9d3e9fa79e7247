"""RESULTS.md and its figures, wholly from the CSV that accuracy.py writes: python benchmarks/report.py [CSV]."""

import argparse
import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from methods import ABLATIONS, METHODS
from scipy.stats import t as student

Setting = tuple[str, float]  # What is missing, and at which rate.
Row = Sequence[str | float]
OURS, NO_PARTS = "protohead", "protohead, no sub-cases"
UNTRAINED, NO_MASK = "paper, no fall-back", "paper, least entropy"
FEW, THREE = ("linear", "late fusion", "cosine head", "paper", OURS), ("linear", "paper", OURS)
ALL_ROWS, LACKING, ENOUGH = "all rows", ("all", 0.7), 30  # ENOUGH rows of a case, for its score to say something.
SHORT = {"linear, modality dropout": "linear, dropout", "paper, no prototype loss": "paper, no proto. loss"}
CALIBRATED = ("linear", "linear, modality dropout", "late fusion", "cosine head", "paper", "closed form", OURS)
# What the methods that use the head are, in its own terms.
HEADS = {
    OURS: 'the head with its defaults, `cases="shared"` (first spelled `cases="image+text"`) and `scale=20`',
    f"{OURS}, decoupled": 'the same with prototypes for each missing case, `cases="all"` (first the default)',
    "paper": 'the paper\'s head, `cases="all", scale=32, centered=False`',
    "closed form": "the head with its defaults, by `imprint` alone, without training",
    "cosine head": 'the paper\'s head with `cases="shared"`, without the prototype loss',
}
# Okabe and Ito's colours, which the colour-blind tell apart.
COLORS = {"linear": "#444b55", "late fusion": "#e69f00", "cosine head": "#009e73", "paper": "#0072b2", OURS: "#d55e00"}
MARKS = dict(zip(FEW, "svD^o", strict=True))


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


def verdict(r: Results) -> list[str]:
    rates = ", ".join(f"{100 * rate:g}" for rate in sorted({cell[1][1] for cell in r.every}))
    rows, worse, tested = list[Row](), list[Row](), list[tuple[float, float]]()
    groups = defaultdict[int, list[str]](list)
    for other in (method for method in r.methods if method != OURS):
        gain, side, between, _ = r.compare(OURS, other, r.every)
        groups[side].append(f"`{other}`")
        found = [x for cell in r.every if not math.isnan((x := (*cell, *r.compare(OURS, other, [cell])))[2])]
        counts = [f"{sum(x[3] == way for x in found)} of {len(found)}" for way in (1, -1)]
        rows.append([f"`{other}`", percent(gain, "+"), between, *counts])
        tested += [(x[2], x[5]) for x in found if x[4] != "–"]
        worse += [[x[0], at(x[1]), f"`{other}`", percent(x[2], "+"), x[4]] for x in found if x[3] < 0]
    better, worse_than, level = (", ".join(groups[side]) or "none" for side in (1, -1, 0))
    said = f"On average it is significantly better than {better}; worse than {worse_than}; neither: {level}."
    said = said if tested else "No two seeds to compare it by, so nothing is significant."
    data = "; ".join(f"{name} ({count} seed{'s' * (count > 1)})" for name, count in r.seeds.items())
    lines = [
        f"{len(r.methods)} classifiers on the same frozen features of {data}, with",
        f"{rates} % of the rows lacking a modality. The seeds are of missing tables, initialisation and order of rows,",
        "and where data are averaged those that all have. Every method that is trained had the same learning rates and",
        "epochs to choose from, by macro-F1 on the",
        "validation split; all scores are of the test split, in percent; ± is the standard deviation of our own over",
        "seeds. A cell is a data set with a kind and rate of missing modality, alike in training and test; there are",
        f"{len(r.every)}. Intervals (95 %, Student's t, paired by seed) show the luck of the seed, not how other data",
        "would do. Significant is what excludes 0, without a correction for multiple comparisons unless it is said.",
        "A seed is also one of its own splits, of the training and validation rows alone: so intervals show the luck"
        " of the rows, too, though seeds share most of them." * any("new splits" in name for name in r.data),
        f"**{r.unfinished} settings and seeds are unfinished, and left out.**" * (r.unfinished > 0),
        "**Of so few seeds this is a look, not a result.**" * (min(r.seeds.values()) < 3),
        "",
        *(f"- `{name}`: {what}." for name, what in HEADS.items() if name in r.methods),
        f"\n**Over all cells `{OURS}` has a mean macro-F1 of {percent(r.mean(OURS, r.every))}. {said}**",
        *table((f"`{OURS}` minus", "difference", "95 %", "cells better", "cells worse"), rows),
    ]
    text = f"There are cells in which `{OURS}` is significantly worse: {len(worse)} of {len(tested)} comparisons."
    text = text if worse else f"There is no cell in which `{OURS}` is significantly worse than another method."
    limit = holm(p for _, p in tested)
    left = [sum(sign * gain > 0 and p <= limit for gain, p in tested) for sign in (-1, 1)]
    text = f"**{text}** By chance about {len(tested) / 40:.0f} would be, were all methods equal."
    lines += [f"{text} With Holm's correction for all of them it is worse in {left[0]} and better in {left[1]}."] * (
        len(tested) > 0
    )
    return lines + table(("data", "missing", "worse than", "difference", "95 %"), worse) * (len(worse) > 0)


def by_setting(r: Results) -> list[str]:
    lines = []
    for data, cells in r.groups[: len(r.data)]:
        rows = [(at(cell[1]), [cell]) for cell in cells]
        lines += [f"### {data}", *compared(r, "missing", rows)]
        if any(r.by_seed(method, cells, "map") for method in THREE):
            lines += ["Mean average precision:", *compared(r, "missing", rows, "map", THREE)]
    return lines


def crosswise(r: Results) -> list[str]:
    lines = [f"Macro-F1 of {' / '.join(THREE)}.", ""]
    for data in r.data:
        tests = {kind: [[(data, kind, (*test, 0.0))] for test in r.kinds[data]] for kind in r.kinds[data]}
        scores = {kind: [marked([r.mean(m, cell) for m in THREE]) for cell in cells] for kind, cells in tests.items()}
        rows = [[at(kind), *(" / ".join(texts) for texts in row)] for kind, row in scores.items()]
        lines += [f"### {data}", *table(["trained ↓, tested →", *map(at, tests)], rows)]
    # A case that is not in its own test was not in training either.
    keys = [x for x in r.lines if x[1] == OURS and not x[3][2] and (*x[:3], (*x[2], 0.0), x[4]) not in r.lines]
    if unseen := [(key[0], *key[2:]) for key in keys if mean(r.get(*key, metric="rows").values()) >= ENOUGH]:
        lines += [f"### Cases that training lacked\n\nOn their rows alone, where a test has {ENOUGH} of them or more."]
        lines += compared(r, "mean of", [(f"{len(unseen)} cases", unseen)], methods=(*FEW[:3], UNTRAINED, *FEW[3:]))
        for a, b in (("paper", UNTRAINED), (OURS, "paper"), (OURS, "linear"), (OURS, NO_PARTS)):
            known = sum(bool(r.get(x[0], b, *x[1:])) for x in unseen)
            some = f" in the {known} of them that it has" * (known < len(unseen))
            gain, _, between, _ = r.compare(a, b, unseen)
            lines += [f"- `{a}` minus `{b}`{some}: {percent(gain, '+')} ({between})."] * (known > 0)
    return lines


def masks(r: Results) -> list[str]:
    flips, rows = sorted({key[3][2] for key in r.lines}), []
    for name, cells in r.groups:
        tests = [[(data, s, (*s, wrong)) for data, s in cells if s == LACKING] for wrong in flips]
        rows += [(f"{name}, {100 * wrong:g} %", some) for wrong, some in zip(flips, tests, strict=True)]
    gain, _, between, _ = r.compare(NO_MASK, "paper", r.every)
    lines = [f"Macro-F1 with this share of the mask wrong in the test; {at(LACKING)}.", *compared(r, "wrong", rows)]
    return [*lines, f"Without a mask, in all cells: `{NO_MASK}` minus `paper` is {percent(gain, '+')} ({between})."]


def parts(r: Results) -> list[str]:
    rows, groups = list[Row](), [[cell for cell in cells if cell[1][1] == LACKING[1]] for _, cells in r.groups]
    for part in (method for method in (*METHODS, *ABLATIONS) if method.startswith(f"{OURS}, ")):
        found = [r.compare(part, OURS, cells) for cells in groups]
        if not all(math.isnan(x[0]) for x in found):
            rows.append([f"`{part}`", *(f"{percent(x[0], '+')} ({x[2]})" for x in found)])
    if not rows:
        return ["Not measured here."]
    text = f"Each minus `{OURS}` at {100 * LACKING[1]:g} %: below 0, `{OURS}` is better as it is."
    return [text, *table(["changed", *(name for name, _ in r.groups)], rows)]


def choice(r: Results) -> list[str]:
    def ranked(cells: Sequence[Any], metric: str = "macro_f1") -> list[str]:
        scores = {method: r.mean(method, cells, metric) for method in r.methods}
        return sorted((m for m in scores if not math.isnan(scores[m])), key=lambda m: -scores[m])

    lines = ["In brackets: ours, or the next, minus the best, which the same test scores picked; * is significant.", ""]
    enough = list[str]()
    for name, every in r.groups:
        texts, close = [], []
        for rate in sorted({cell[1][1] for cell in every}):
            first, *rest = ranked(cells := [cell for cell in every if cell[1][1] == rate])
            texts.append(f"at {100 * rate:g} % `{first}` with {percent(r.mean(first, cells))}")
            for second in ([OURS] if OURS in rest else rest)[:1]:
                gain, side, *_ = r.compare(second, first, cells)
                texts[-1] += f" (`{second}` {percent(gain, '+')}{'*' * (side < 0)})"
            close += [f"{100 * rate:g}"] * (r.compare(OURS, "linear", cells)[1] < 1)
        lines.append(f"- On {name} the best method is: {'; '.join(texts)}.")
        enough += [f"{name} at {', '.join(close)} %"] * (len(close) > 0)
    where = "; ".join(enough) or "nowhere"
    lines.append(f"- Where `{OURS}` is not significantly better than `linear`, the simplest: {where}.")
    for said, metric in (("Best calibrated (ECE)", "ece"), ("Knows best which answers are right (AURC)", "aurc")):
        lines.append(f"- {said}: `{'`, then `'.join(ranked(r.every, metric)[:-4:-1])}`.")
    return lines


def calibration(path: Path) -> list[str]:
    """What calibration.py has found, of the data and seeds that are finished."""
    if not path.exists():
        return ["Not measured here: calibration.py does."]
    cells = defaultdict[Any, dict[Any, dict[str, str]]](dict)  # Data, seed and method, then what is missing and where.
    with open(path, newline="") as file:
        for x in csv.DictReader(file):
            setting = x["train_missing"], x["train_rate"], x["test_missing"], x["test_rate"]
            cells[x["data"], int(x["seed"]), x["trained"]][setting] = x
    data, methods = list(dict.fromkeys(key[0] for key in cells)), [m for m in CALIBRATED if any(m in k for k in cells)]
    whole = {name: max(len(found) for key, found in cells.items() if key[0] == name) for name in data}
    known = {key: found for key, found in cells.items() if len(found) == whole[key[0]]}
    # A seed counts for a method if all data have it.
    seeds = {m: [s for s in range(99) if all((name, s, m) in known for name in data)] for m in methods}

    def errors(method: str, name: str, seed: int, column: str, alike: bool = True) -> list[float]:
        found = known[name, seed, method].items()
        return [float(x[column]) for setting, x in found if (setting[:2] == setting[2:]) == alike]

    def average(method: str, names: Sequence[str], seed: int, column: str, alike: bool = True) -> float:
        return mean([x for name in names for x in errors(method, name, seed, column, alike)])

    def row(title: str, names: Sequence[str], columns: Sequence[str], alike: bool = True, text: Any = percent) -> Row:
        # A method of which no seed is finished in all data has its data sets.
        some = {m: [s for s in range(99) if all((name, s, m) in known for name in names)] for m in methods}
        each = {m: [mean([average(m, names, s, c, alike) for s in some[m]]) for c in columns] for m in methods}
        return [title, *(" → ".join(map(text, each[m])) for m in methods)]

    lines = [
        "ECE before → after calibration on the validation rows, by the function that `head.calibrate` uses: for each",
        "missing case a temperature or, for several labels, two, below 0 and above, and a shift for each class.",
        "The models are those above, trained anew.",
        "How many seeds are finished in all data: " + ", ".join(f"`{m}` {len(seeds[m])}" for m in methods) + ".",
    ]
    groups = [*((name, [name]) for name in data), *[("all cells", data)] * (len(data) > 1)]
    lines += table(["ECE", *methods], [row(name, names, ("before", "after")) for name, names in groups])
    lines += ["By chance it is not 0 on so many rows. If the probabilities after were true, it would be on average:"]
    lines += table(["ECE", *methods], [row(name, names, ("floor",)) for name, names in groups])
    lines += ["The log loss after, which has no such floor, and is what calibration makes small:"]
    losses = [
        row(name, names, ("loss",), text=lambda x: "–" if math.isnan(x) else f"{x:.3f}") for name, names in groups
    ]
    lines += table(["log loss", *methods], losses)
    gaps = row("tested with all, 70 %", data, ("before", "after"), alike=False)
    lines += ["Trained and calibrated on complete rows:", *table(["ECE", *methods], [gaps])]
    rows = list[Row]()
    for other in (m for m in methods if m != OURS and seeds[m] and seeds.get(OURS)):
        both = [s for s in seeds[other] if s in seeds[OURS]]
        gains = [average(OURS, data, s, "after") - average(other, data, s, "after") for s in both]
        rows.append([f"`{other}`", percent(mean(gains), "+"), interval(gains)])
    lines += table([f"`{OURS}` minus, after", "difference", "95 %"], rows) * (len(rows) > 0)
    far = max(abs(float(x["before"]) - float(x["recorded"])) for found in known.values() for x in found.values())
    return [*lines, f"No model's ECE before differs from that in the tables above by more than {percent(far)}."]


def draw(r: Results, path: Path, names: Callable[[str], Sequence[str]], size: tuple[float, float], panel: Any) -> None:
    """A row for each data set, with a panel for each of the names."""
    count = max(1, *(len(names(data)) for data in r.data))
    figure = Figure(figsize=(size[0] * count, size[1] * len(r.data) + 0.4), layout="constrained")
    for row, data in zip(figure.subplots(len(r.data), count, squeeze=False), r.data, strict=True):
        for axis, name in zip_longest(row, names(data)):
            panel(r, axis, data, name) if name else axis.set_axis_off()
        row[0].set_ylabel(data.replace(", ", ",\n") + "\n" + row[0].get_ylabel())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def draw_rates(r: Results, axis: Any, data: str, case: str) -> None:
    for method in FEW:
        settings = [setting for name, setting in r.every if name == data and setting[0] in ("none", "all")]
        found = [(s[1], np.array([*r.get(data, method, s, (*s, 0.0), case).values()])) for s in settings]
        points = [(x, y.mean(), y.std(ddof=int(len(y) > 1))) for x, y in found if len(y)]
        x, middle, spread = 100 * np.array(points).reshape(-1, 3).T
        axis.plot(x, middle, color=COLORS[method], marker=MARKS[method], ms=4, label=method)
        axis.fill_between(x, middle - spread, middle + spread, color=COLORS[method], alpha=0.15, lw=0)
    axis.set(title=case, xlabel="rows that lack a modality, %", ylabel="macro-F1, %", xlim=(-4, 94))


def draw_matrix(r: Results, axis: Any, data: str, method: str) -> None:
    kinds = r.kinds[data]
    every = {m: [[r.mean(m, [(data, a, (*b, 0.0))]) for b in kinds] for a in kinds] for m in THREE}
    known = [x for rows in every.values() for row in rows for x in row if not math.isnan(x)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    axis.imshow(every[method], cmap="cividis", vmin=low, vmax=high)
    for (i, j), x in np.ndenumerate(every[method]):
        axis.text(j, i, percent(x), ha="center", va="center", color="k" if 2 * x > low + high else "w")
    labels = [at(kind) for kind in kinds]
    axis.set_xticks(range(len(kinds)), labels, rotation=35, ha="right")
    axis.set_yticks(range(len(kinds)), labels)
    axis.set(title=method, xlabel="missing in test", ylabel="missing in training")


def draw_seeds(r: Results, axis: Any, data: str, _: str) -> None:
    for x, method in enumerate(r.methods):
        if values := [100 * y for y in r.get(data, method, LACKING).values()]:
            color = COLORS.get(method, "#8a8f98")
            axis.boxplot(values, positions=[x], widths=0.6, showfliers=False, medianprops={"color": color, "lw": 2})
            axis.plot([x] * len(values), values, "o", ms=4, color=color, alpha=0.7)
    axis.set_xticks(range(len(r.methods)), [SHORT.get(m, m) for m in r.methods], rotation=30, ha="right")
    axis.set(title=f"{at(LACKING)}: a point for each seed", ylabel="macro-F1, %")


def draw_reliability(r: Results, axis: Any, data: str, case: str) -> None:
    axis.plot([0, 1], [0, 1], color="#b0b4ba", lw=1)
    for method in THREE:
        bins = np.zeros((10, 3))  # How many, and sums of probability and of what is right.
        for line in r.lines.get((data, method, LACKING, (*LACKING, 0.0), case), {}).values():
            for n, p, right in (map(float, text.split(":")) for text in line["reliability"].split()):
                bins[min(int(10 * p), 9)] += n, n * p, n * right
        count, said, right = bins[bins[:, 0] > 0].T
        axis.plot(said / count, right / count, color=COLORS[method], marker=MARKS[method], ms=4, label=method)
    errors = [f"{m} {percent(r.mean(m, [(data, LACKING, (*LACKING, 0.0), case)], 'ece'))}" for m in THREE]
    axis.set_title(f"{case}\nECE: {', '.join(errors)}", fontsize=8)
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="probability", ylabel="share that is right")


def write_report(path: Path) -> None:
    """Write RESULTS.md and the figures next to the CSV."""
    r = Results(path)
    lines = ["# Accuracy", "", "Written by report.py from what accuracy.py measured; not by hand.", ""]
    if not r.data:
        path.with_name("RESULTS.md").write_text("\n".join([*lines, "No setting is finished yet.", ""]))
        return
    chosen = f"On validation data, by which the settings that are recommended for `{OURS}` were chosen too:"
    averages = [*compared(r, "test", r.groups), chosen, *compared(r, "validation", r.groups, "validation")]
    errors = [x for name in ("ECE", "AURC") for x in compared(r, name, r.groups, name.lower())]
    for title, figures, text in (
        ("Verdict", "", verdict(r)),
        ("Macro-F1 by method, the mean over settings", "", averages),
        ("By what is missing", "rates seeds", by_setting(r)),
        ("Trained on one, tested on another", "matrix", crosswise(r)),
        ("Wrong and unknown masks", "", masks(r)),
        (
            f"What each part of `{OURS}` gives",
            "",
            [*parts(r), "", "What was tried, did not help and left no code: benchmarks/README.md."],
        ),
        ("Calibration and selective prediction, the mean over settings", "reliability", ["Lower is better.", *errors]),
        ("Probabilities after calibration", "", calibration(path.with_name("calibration.csv"))),
        ("Which to choose", "", choice(r)),
    ):
        lines += [f"## {title}", "", *(f"![{name}](accuracy_{name}.png)\n" for name in figures.split()), *text, ""]
    path.with_name("RESULTS.md").write_text(re.sub("\n{3,}", "\n\n", "\n".join(lines)))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, names, size, panel in (
            ("rates", lambda data: [*r.cases[data], ALL_ROWS], (2.7, 2.5), draw_rates),
            ("matrix", lambda data: THREE if r.kinds[data] else (), (3.3, 3.1), draw_matrix),
            ("seeds", lambda data: [ALL_ROWS], (7.0, 2.9), draw_seeds),
            ("reliability", r.cases.__getitem__, (3.2, 3.3), draw_reliability),
        ):
            draw(r, path.with_name(f"accuracy_{name}.png"), names, size, panel)


def main() -> None:
    """Write the report of a CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", default=Path(__file__).with_name("accuracy.csv"))
    path = parser.parse_args().csv
    try:
        with open(path) as file:
            columns = file.readline().strip().split(",")
    except OSError as error:
        parser.error(str(error))
    if not {"data", "trained", "macro_f1"} <= set(columns):
        parser.error(f"Expected a CSV that accuracy.py wrote, but {path} has the columns {columns}.")
    write_report(path)


if __name__ == "__main__":
    main()
