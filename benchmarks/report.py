"""RESULTS.md and its figures, wholly from the CSV that accuracy.py writes: python benchmarks/report.py [CSV]."""

import argparse
import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from methods import ABLATIONS, METHODS

Setting = tuple[str, float]  # What is missing, and at which rate.
Cell = tuple[str, Setting]  # Of which data.
Scores = dict[int, float]  # Seed to score.
OURS, UNTRAINED, NO_MASK = "protohead", "paper, no fall-back", "paper, least entropy"
FEW, THREE = ("linear", "late fusion", "cosine head", "paper", OURS), ("linear", "paper", OURS)
ALL_ROWS, NO_CASES = "all rows", ("all rows", "mean of cases", "(nothing)")
LACKING, ENOUGH = ("all", 0.7), 30  # Rows of a case, for its score to say something.
SHORT = {"linear, modality dropout": "linear, dropout", "paper, no prototype loss": "paper, no proto. loss"}
# Okabe and Ito's colours, which the colour-blind tell apart.
LOOKS = dict(
    zip(FEW, (("#444b55", "s"), ("#e69f00", "v"), ("#009e73", "D"), ("#0072b2", "^"), ("#d55e00", "o")), strict=True)
)
# Student's t for a two-sided 95 % interval, for 1 to 30 degrees of freedom.
T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Results:
    """The CSV, without the settings and seeds in which a main method is not finished, so that means compare."""

    def __init__(self, path: Path) -> None:
        whole = path.read_text().rpartition("\n")[0]  # An interrupted run may end in the middle of a line.
        lines = [(_block(line), line) for line in csv.DictReader(whole.splitlines())]
        done: dict[tuple[str, Setting, int], set[str]] = {}
        main: dict[str, set[str]] = {}
        for block, line in lines:
            done.setdefault(block, set()).add(line["trained"])
            main.setdefault(block[0], set()).update({line["trained"]} & set(METHODS))
        kept = {block for block, methods in done.items() if methods >= main[block[0]]}
        self.unfinished = len(done) - len(kept)
        self.seeds = {seed for _, _, seed in kept}
        self.data = [data for data in main if data in {block[0] for block in kept}]
        self.methods = [method for method in METHODS if any(method in main[data] for data in self.data)]
        self.lines: dict[tuple[str, str, Setting, Setting, float, str], dict[int, dict[str, str]]] = {}
        for block, line in lines:
            if block in kept:
                test = line["test_missing"], float(line["test_rate"])
                key = (block[0], line["method"], block[1], test, float(line["flipped"]), line["case"])
                self.lines.setdefault(key, {})[block[2]] = line
        self.modalities: dict[str, list[str]] = {}
        self.settings: dict[str, list[Setting]] = {}
        for data in self.data:
            cases = [key[5] for key in self.lines if key[0] == data and key[5] not in NO_CASES]
            self.modalities[data] = max(cases, key=lambda case: case.count("+")).split("+")
            order = ["none", *self.modalities[data], "all"]
            found = {setting for name, setting, _ in kept if name == data}
            self.settings[data] = sorted(found, key=lambda setting: (setting[1], order.index(setting[0])))

    def get(
        self,
        *which: Any,
        test: Setting | None = None,
        flipped: float = 0.0,
        case: str = ALL_ROWS,
        metric: str = "macro_f1",
    ) -> Scores:
        """Of data, method, and what it is trained on: seed to score, tested on the same unless another is named."""
        lines = self.lines.get((*which, test or which[2], flipped, case), {})
        return {seed: float(line[metric]) for seed, line in lines.items() if line[metric] not in ("", "nan")}

    def cells(self, *methods: str, data: str = "", rate: float | None = None) -> list[Cell]:
        """Wherever all these methods have been trained: on this data, at this rate, or any."""
        every = [(name, setting) for name in self.data for setting in self.settings[name] if data in ("", name)]
        return [c for c in every if rate in (None, c[1][1]) and all(self.get(c[0], m, c[1]) for m in methods)]

    def mean(self, method: str, cells: Iterable[Cell], **which: Any) -> float:
        """Over cells, of the mean over seeds."""
        return mean(mean(self.get(data, method, train, **which).values()) for data, train in cells)

    def compare(self, a: str, b: str, cells: Iterable[Cell]) -> tuple[float, int, str]:
        """One method to another by macro-F1."""
        return compare([(self.get(data, a, train), self.get(data, b, train)) for data, train in cells])

    def unseen(self, data: str) -> list[tuple[Setting, Setting, str]]:
        """Training, test, and a case in the test that training lacked."""
        tests = [key[2:] for key in self.lines if key[:2] == (data, OURS) and key[5] not in NO_CASES and not key[4]]
        found = [
            (train, test, case)
            for train, test, _, case in tests
            if not self.lines.get((data, OURS, train, train, 0.0, case))
        ]
        return [
            (train, test, case)
            for train, test, case in found
            if mean(self.get(data, OURS, train, test=test, case=case, metric="rows").values()) >= ENOUGH
        ]


def _block(line: dict[str, str]) -> tuple[str, Setting, int]:
    return line["data"], (line["train_missing"], float(line["train_rate"])), int(line["seed"])


def mean(values: Iterable[float]) -> float:
    """NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def compare(pairs: Sequence[tuple[Scores, Scores]]) -> tuple[float, int, str]:
    """The mean difference of paired scores; whether its 95 % interval over seeds is above 0 (1), below (−1) or neither.

    The last is that interval in words. A seed counts if all the pairs have it.
    """
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in pairs)) if pairs else set()
    values = [mean(a[seed] - b[seed] for a, b in pairs) for seed in sorted(seeds)]
    middle = mean(values)
    if len(values) < 2:
        return middle, 0, "–"
    half = T[min(len(values) - 1, len(T)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return middle, int(middle > half) - int(middle < -half), f"{signed(middle - half)} to {signed(middle + half)}"


def percent(x: float) -> str:
    """One decimal, or a dash where undefined."""
    return "–" if math.isnan(x) else f"{100 * x:.1f}"


def signed(x: float) -> str:
    """A difference in points."""
    text = percent(x)
    return text.removeprefix("-") if text in ("–", "-0.0", "0.0") else f"{100 * x:+.1f}".replace("-", "−")


def table(head: Iterable[str], rows: Iterable[Sequence[str | float]], best: Callable[[Any], float] = max) -> list[str]:
    """In Markdown; numbers in percent, and the best of a row in bold."""
    names = [SHORT.get(name, name) for name in head]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        known = [x for x in row if isinstance(x, float) and not math.isnan(x)]
        top = percent(best(known)) if known else ""
        texts = [x if isinstance(x, str) else percent(x) for x in row]
        lines.append([f"**{x}**" if x == top else x for x in texts])
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def at(setting: Setting) -> str:
    """What is missing."""
    return f"{setting[0]}, {100 * setting[1]:g} %" if setting[1] else "none"


def words(methods: Iterable[str]) -> str:
    """Some methods in a sentence."""
    return ", ".join(f"`{method}`" for method in methods) or "none"


# -- sections -----------------------------------------------------------------------------------------------------------


def verdict(r: Results) -> list[str]:
    rates = ", ".join(f"{100 * rate:g}" for rate in sorted({setting[1] for _, setting in r.cells()}))
    lines = [
        f"{len(r.methods)} classifiers on the same frozen features, where {rates} % of the rows lack a modality. Data:",
        f"{'; '.join(r.data)}. Seeds: {len(r.seeds)}, of the missing tables, the initialisation and the order of the rows.",
        "Every method had the same learning rates and epochs to choose from, by macro-F1 on the validation split; all",
        "scores are of the test split, in percent. A cell is a data set with a kind and rate of missing modality, the",
        f"same in training and test: {len(r.cells())} in all. Intervals (95 %, Student's t, paired by seed) tell the luck",
        "of the seed, not how other data would do. Significant is what excludes 0, uncorrected for multiple comparisons.",
        *[f"**The run is not finished: {r.unfinished} settings and seeds lack methods; left out.**"]
        * (r.unfinished > 0),
        "",
    ]
    rows, worse, told = [], [], 0
    groups: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for other in r.methods:
        if other == OURS or not (cells := r.cells(OURS, other)):
            continue
        whole, single = r.compare(OURS, other, cells), [(r.compare(OURS, other, [cell]), cell) for cell in cells]
        count = [f"{sum(found[1] == side for found, _ in single)} of {len(cells)}" for side in (1, -1)]
        rows.append([f"`{other}`", signed(whole[0]), whole[2], *count])
        groups[whole[1]] += [other]
        told += sum(found[2] != "–" for found, _ in single)
        worse += [[c[0], at(c[1]), f"`{other}`", signed(found[0]), found[2]] for found, c in single if found[1] < 0]
    mean_of_all = f"`{OURS}` has a mean macro-F1 of {percent(r.mean(OURS, r.cells()))} over all cells."
    if not told:
        lines += [f"{mean_of_all} **There are no two seeds to compare, so nothing is significant.**"]
    else:
        lines += [f"**{mean_of_all} By their averages it is significantly better than {words(groups[1])};"]
        lines += [f"significantly worse than {words(groups[-1])}; not told apart from {words(groups[0])}.**"]
    lines += table((f"`{OURS}` minus", "difference", "95 %", "cells better", "cells worse"), rows)
    if told and not worse:
        lines += [f"**There is no cell in which `{OURS}` is significantly worse than another method.**"]
    elif told:
        lines += [
            f"**In {len(worse)} of {told} comparisons, a cell with a method each, `{OURS}` is significantly worse**"
        ]
        lines += [f"(if all were equal, about {told / 40:.0f} would be, by chance):"]
        lines += table(("data", "missing", "worse than", "difference", "95 %"), worse)
    return lines


def means(r: Results, title: str, metric: str, best: Callable[[Any], float] = max) -> list[str]:
    """The mean over the settings by data set and method, and over the data sets."""
    rows = [[data, *(r.mean(m, r.cells(data=data), metric=metric) for m in r.methods)] for data in r.data]
    average = [mean(values) for values in list(zip(*rows, strict=True))[1:]]
    return table([title, *r.methods], [*rows, ["mean", *average]] if len(rows) > 1 else rows, best)


def by_setting(r: Results) -> list[str]:
    lines = []
    for data in r.data:
        rows: list[list[str | float]] = []
        for s in r.settings[data]:
            ours = list(r.get(data, OURS, s).values())
            spread = percent(float(np.std(ours, ddof=1)) if len(ours) > 1 else math.nan)
            rows.append([at(s), *(r.mean(m, [(data, s)]) for m in r.methods), spread])
        lines += [f"### {data}", *table(["missing", *r.methods, f"± ({OURS})"], rows)]
        if any(r.get(data, m, s, metric="map") for m in THREE for s in r.settings[data]):
            rows = [[at(s), *(r.mean(m, [(data, s)], metric="map") for m in THREE)] for s in r.settings[data]]
            lines += ["Mean average precision:", *table(["missing", *THREE], rows)]
    return lines


def crosswise(r: Results) -> list[str]:
    lines = [f"Macro-F1 of {' / '.join(THREE)}, the best in bold.", ""]
    for data in r.data:
        rows = []
        for train in (settings := crossed(r, data)):
            found = [[r.mean(m, [(data, train)], test=test) for m in THREE] for test in settings]
            rows.append([at(train), *(" / ".join(table(THREE, [x])[3][2:-2].split(" | ")) for x in found)])
        lines += [f"### {data}", *table(["trained ↓, tested →", *map(at, settings)], rows)]
    methods = (*FEW[:3], UNTRAINED, *FEW[3:])
    unseen = [(data, *which) for data in r.data for which in r.unseen(data)]
    if not unseen:
        return lines
    scores = {m: [r.get(d, m, train, test=test, case=case) for d, train, test, case in unseen] for m in methods}
    row = [f"{len(unseen)} cases", *(mean(mean(x.values()) for x in scores[m]) for m in methods)]
    lines += ["### Cases that training lacked", "", f"On their rows alone, where a test has at least {ENOUGH} of them:"]
    lines += table(["mean of", *methods], [row])
    for a, b in (("paper", UNTRAINED), (OURS, "paper"), (OURS, "linear")):
        gain, _, between = compare(list(zip(scores[a], scores[b], strict=True)))
        lines += [f"- `{a}` minus `{b}`: {signed(gain)} ({between})."]
    return [*lines, ""]


def masks(r: Results) -> list[str]:
    flips = sorted({key[4] for key in r.lines})
    every = [*([data] for data in r.data), *([r.data] if len(r.data) > 1 else [])]
    rows = [
        [
            f"{some[0] if len(some) == 1 else 'mean'}, {100 * flip:g} %",
            *(r.mean(m, [(d, LACKING) for d in some], flipped=flip) for m in r.methods),
        ]
        for some in every
        for flip in flips
    ]
    cost, _, between = r.compare(NO_MASK, "paper", r.cells(NO_MASK, "paper"))
    text = f"Of models trained on {at(LACKING)}; the test's masks are wrong in so many of their entries."
    lines = [text, *table(["data, wrong", *r.methods], rows)]
    return [
        *lines,
        f"Without any mask, by the case of least entropy, `paper` differs by {signed(cost)} ({between}).",
        "",
    ]


def parts(r: Results) -> list[str]:
    rows = []
    for part in ("loss(), a block per case", *ABLATIONS):
        if cells := r.cells(OURS, part, rate=LACKING[1]):
            gain, _, between = r.compare(part, OURS, cells)
            rows.append(
                [
                    f"`{part}`",
                    signed(gain),
                    between,
                    *(signed(r.compare(part, OURS, [c for c in cells if c[0] == data])[0]) for data in r.data),
                ]
            )
    text = f"Each minus `{OURS}`, at {100 * LACKING[1]:g} % missing: below 0, the part helps."
    return [text, *table(("changed", "difference", "95 %", *r.data), rows)]


def choice(r: Results) -> list[str]:
    lines = [
        "The best by the same test scores as above, with how far it is ahead of `protohead` or, if that is best, the",
        "next; * is significant.",
        "",
    ]
    enough = []
    for data in [*r.data, ""][: len(r.data) + (len(r.data) > 1)]:
        texts = []
        for rate in sorted({s[1] for _, s in r.cells(data=data)}):
            cells = r.cells(data=data, rate=rate)
            first, *rest = ranked({m: r.mean(m, cells) for m in r.methods})
            text = f"at {100 * rate:g} % `{first}` with {percent(r.mean(first, cells))}"
            if rest:
                second = OURS if OURS in rest else rest[0]
                ahead, side, _ = r.compare(first, second, cells)
                text += f" (`{second}`: {signed(-ahead)}{'*' * (side > 0)})"
            texts.append(text)
            if data and r.compare(OURS, "linear", cells)[1] < 1:
                enough.append(f"{data} at {100 * rate:g} %")
        lines.append(f"- On {data or 'average over all data'} the best is {', '.join(texts)}.")
    lines.append(
        f"- `{OURS}` is not significantly better than `linear`, the simplest, on: {'; '.join(enough) or 'none of these'}."
    )
    for name, metric, low in (("calibrated (ECE)", "ece", -1), ("ranked by confidence (AURC)", "aurc", -1)):
        order = ranked({m: low * r.mean(m, r.cells(), metric=metric) for m in r.methods})
        lines.append(f"- Best {name}, on average: {words(order[:3])}.")
    return lines


def ranked(scores: dict[str, float]) -> list[str]:
    """The best first, without those that have none."""
    return sorted((m for m in scores if not math.isnan(scores[m])), key=lambda m: -scores[m])


def crossed(r: Results, data: str) -> list[Setting]:
    """What is trained and tested crosswise."""
    return [setting for setting in r.settings[data] if setting[1] in (0, LACKING[1])]


# -- figures ------------------------------------------------------------------------------------------------------------


def grid(r: Results, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A row of panels for each data set."""
    figure = Figure(figsize=(width * columns, height * len(r.data) + 0.5), layout="constrained")
    axes = figure.subplots(len(r.data), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def cases(r: Results, data: str) -> list[str]:
    """The cases to draw: the complete one, and those of one modality."""
    return ["+".join(r.modalities[data]), *r.modalities[data]]


def draw_rates(r: Results) -> Figure:
    figure, axes = grid(r, 1 + max(len(cases(r, data)) for data in r.data), 2.7, 2.5)
    for data, row in zip(r.data, axes, strict=True):
        settings = [setting for setting in r.settings[data] if setting[0] in ("none", "all")]
        for axis, case in zip(row, [*cases(r, data), ALL_ROWS], strict=False):
            axis.set_axis_on()
            for method in FEW:
                found = [(100 * s[1], [100 * x for x in r.get(data, method, s, case=case).values()]) for s in settings]
                points = [(x, np.mean(y), np.std(y, ddof=1) if len(y) > 1 else 0.0) for x, y in found if y]
                x, middle, spread = np.array(points).reshape(-1, 3).T
                color, mark = LOOKS[method]
                axis.plot(x, middle, color=color, marker=mark, ms=4, lw=1.5, label=method)
                axis.fill_between(x, middle - spread, middle + spread, color=color, alpha=0.15, lw=0)
            axis.set(title=case, xlabel="rows lacking a modality, %", xlim=(-4, 94))
        row[0].set_ylabel(f"{broken(data)}\nmacro-F1, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(FEW))
    return figure


def draw_matrix(r: Results) -> Figure:
    figure, axes = grid(r, len(THREE), 3.3, 3.1)
    for data, row in zip(r.data, axes, strict=True):
        settings = crossed(r, data)
        values = np.array([[[r.mean(m, [(data, a)], test=b) for b in settings] for a in settings] for m in THREE]) * 100
        known = values[~np.isnan(values)]
        low, high = known.min(), known.max()
        for axis, method, matrix in zip(row, THREE, values, strict=True):
            axis.set_axis_on()
            axis.imshow(matrix, cmap="cividis", vmin=low, vmax=high)
            for (i, j), x in np.ndenumerate(matrix):
                axis.text(j, i, percent(x / 100), ha="center", va="center", color="k" if x > (low + high) / 2 else "w")
            names = [at(setting).replace(", ", "\n") for setting in settings]
            axis.set_xticks(range(len(names)), names)
            axis.set_yticks(range(len(names)), names)
            axis.set(title=method, xlabel="missing in test")
        row[0].set_ylabel(f"{broken(data)}\nmissing in training")
    return figure


def draw_seeds(r: Results) -> Figure:
    figure, axes = grid(r, 1, 7, 2.9)
    for data, axis in zip(r.data, axes[:, 0], strict=True):
        axis.set_axis_on()
        for x, method in enumerate(r.methods):
            values = [100 * y for y in r.get(data, method, LACKING).values()]
            color = LOOKS.get(method, ("#8a8f98", ""))[0]
            if values:
                axis.boxplot(values, positions=[x], widths=0.6, showfliers=False, medianprops={"color": color, "lw": 2})
            axis.plot([x] * len(values), values, "o", ms=4, color=color, alpha=0.7)
        axis.set_xticks(range(len(r.methods)), [SHORT.get(m, m) for m in r.methods], rotation=30, ha="right")
        axis.set_ylabel(f"{broken(data)}\nmacro-F1, %")
    axes[0, 0].set_title(f"Trained and tested with {at(LACKING)} missing: a point for each seed")
    return figure


def draw_reliability(r: Results) -> Figure:
    figure, axes = grid(r, max(len(cases(r, data)) for data in r.data), 3.2, 3.3)
    for data, row in zip(r.data, axes, strict=True):
        for axis, case in zip(row, cases(r, data), strict=False):
            axis.set_axis_on()
            axis.plot([0, 1], [0, 1], color="#b0b4ba", lw=1)
            for method in THREE:
                bins = np.zeros((10, 3))  # Count, and sums of probability and of what is right.
                for line in r.lines.get((data, method, LACKING, LACKING, 0.0, case), {}).values():
                    for n, p, right in (map(float, text.split(":")) for text in line["reliability"].split()):
                        bins[min(int(p * 10), 9)] += n, n * p, n * right
                count, *sums = bins[bins[:, 0] > 0].T
                error = percent(r.mean(method, [(data, LACKING)], case=case, metric="ece"))
                color, mark = LOOKS[method]
                axis.plot(sums[0] / count, sums[1] / count, color=color, marker=mark, ms=4, label=f"{method} {error}")
            axis.set(xlabel="probability", xlim=(0, 1), ylim=(0, 1), aspect="equal")
            title = f"{case}; ECE in %:"
            axis.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, title=title, columnspacing=0.8, handlelength=1
            )
        row[0].set_ylabel(f"{broken(data)}\nshare that is right")
    return figure


def broken(name: str) -> str:
    """A name in several lines."""
    return name.replace(", ", ",\n")


# -- the whole ----------------------------------------------------------------------------------------------------------


def write_report(path: Path) -> None:
    """Write RESULTS.md and the figures next to the CSV."""
    r = Results(path)
    lines = ["# Accuracy", "", "Written by report.py from accuracy.csv, by accuracy.py.", ""]
