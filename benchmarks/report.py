"""RESULTS.md and its figures, wholly from the CSV that accuracy.py writes: python benchmarks/report.py [CSV].

Beside it those of calibration.py and prompts.py, if they are there, have a section each.
"""

import argparse
import csv
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import write_figures
from methods import ABLATIONS, METHODS
from prompts_report import section as prompts
from results import (
    ENOUGH,
    FEW,
    LACKING,
    NO_MASK,
    NO_PARTS,
    OURS,
    THREE,
    UNTRAINED,
    Results,
    Row,
    at,
    compared,
    holm,
    interval,
    marked,
    mean,
    percent,
    table,
)

CALIBRATED = ("linear", "linear, modality dropout", "late fusion", "cosine head", "paper", "closed form", OURS)
# What the methods that use the head are, in its own terms.
HEADS = {
    OURS: 'the head with its defaults, `cases="shared"` (first spelled `cases="image+text"`) and `scale=20`',
    f"{OURS}, decoupled": 'the same with prototypes for each missing case, `cases="all"` (first the default)',
    "paper": 'the paper\'s head, `cases="all", scale=32, centered=False`',
    "closed form": "the head with its defaults, by `imprint` alone, without training",
    "cosine head": 'the paper\'s head with `cases="shared"`, without the prototype loss',
}


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
        rows.append([f"`{other}`", percent(mean(gains), "+"), interval(gains)[2]])
    lines += table([f"`{OURS}` minus, after", "difference", "95 %"], rows) * (len(rows) > 0)
    far = max(abs(float(x["before"]) - float(x["recorded"])) for found in known.values() for x in found.values())
    return [*lines, f"No model's ECE before differs from that in the tables above by more than {percent(far)}."]


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
        ("Prompts", "", prompts(path.with_name("prompts.csv"))),
        ("Which to choose", "", choice(r)),
    ):
        lines += [f"## {title}", "", *(f"![{name}](accuracy_{name}.png)\n" for name in figures.split()), *text, ""]
    path.with_name("RESULTS.md").write_text(re.sub("\n{3,}", "\n\n", "\n".join(lines)))
    write_figures(r, path)


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
