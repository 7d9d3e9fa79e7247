"""What prompts.py found, in Markdown, wholly from its CSV: a section of RESULTS.md."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from results import Row, interval, mean, percent, table

TOWERS = {"none": "none", "last": "last layers", "map": "MAP", "dcp": "DCP"}
HEADS = ("linear", "paper", "shared", "each case")
PROMPTED = ("map", "dcp")
# What is missing in training, and in the test.
CELLS = {
    "complete": ("none", "none"),
    "text, 70 %": ("text", "text"),
    "image, 70 %": ("image", "image"),
    "both, 70 %": ("both", "both"),
    "complete, tested with both": ("none", "both"),
}
LACKING = [cell for cell in CELLS.values() if cell != ("none", "none")]
Cell = tuple[str, str]
Model = tuple[str, str]  # What is trained in the towers, and the head.


class Results:
    """The CSV, without the seeds of which a run is missing, so that means compare."""

    def __init__(self, path: Path) -> None:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        self.models = [(towers, head) for towers in TOWERS for head in HEADS]
        self.lines = defaultdict[Any, dict[int, dict[str, str]]](dict)
        runs = defaultdict[int, set[Any]](set)
        for x in lines:
            seed, model = int(x["seed"]), (x["towers"], x["head"])
            self.lines[model, (x["trained"], x["test"]), x["case"]][seed] = x
            runs[seed].add((model, x["trained"]))
        trained = {cell[0] for cell in CELLS.values()}
        every = {(model, kind) for model in self.models for kind in trained}
        self.seeds = sorted(seed for seed, found in runs.items() if found == every)
        self.unfinished = sum(len(found) for seed, found in runs.items() if seed not in self.seeds)

    def by_seed(
        self, model: Model, cells: Iterable[Cell], name: str = "macro_f1", case: str = "all rows"
    ) -> list[float]:
        """The mean over some cells, of each seed."""
        found = [self.lines[model, cell, case] for cell in cells]
        return [
            mean([float(lines[seed][name]) for lines in found]) for seed in self.seeds if all(seed in x for x in found)
        ]

    def gap(self, pairs: Sequence[tuple[Model, Model]], cells: Sequence[Cell]) -> tuple[float, int, str]:
        """First minus second, mean over pairs and cells: the mean over seeds, its sign if sure, and its interval."""
        each = [(self.by_seed(a, cells), self.by_seed(b, cells)) for a, b in pairs]
        gaps = [[x - y for x, y in zip(*pair, strict=True)] for pair in each]
        return interval([mean(values) for values in zip(*gaps, strict=True)])[:3]


def section(path: Path) -> list[str]:
    """The lines of the section.

    Raises:
        ValueError: If no seed is finished.
    """
    r = Results(path)
    if not r.seeds:
        raise ValueError(f"Expected a seed whose runs are all in {path}, but there is none.")
    count = len(r.seeds)
    return [
        "## Prompts",
        "",
        f"The tiny CLIP of the examples, its pictures and titles, {count} seed{'s' * (count > 1)}; `prompts.py` says",
        "what was trained how. Macro-F1 over all test rows, in percent; intervals are 95 %, Student's t, paired by",
        "seed, without a correction for multiple comparisons. Seconds are of one core, for one training.",
        f"**{r.unfinished} runs are of seeds that are not finished, and left out.**" * (r.unfinished > 0),
        "**Of so few seeds this is a look, not a result.**" * (count < 3),
        *scores(r),
        *by_case(r),
        *questions(r),
    ]


def scores(r: Results) -> list[str]:
    """A row for each model, a column for each kind of gap."""
    rows: list[Row] = []
    for model in r.models:
        values = [mean(r.by_seed(model, [cell])) for cell in CELLS.values()]
        seconds = mean(r.by_seed(model, [CELLS["both, 70 %"]], "seconds"))
        error = mean(r.by_seed(model, LACKING, "ece"))
        texts = [percent(x) for x in (*values, error)]
        rows.append([TOWERS[model[0]], model[1], *texts, f"{seconds:.0f}"])
    return table(["towers", "head", *CELLS, "mean ECE", "seconds (both)"], rows)


def by_case(r: Results) -> list[str]:
    """The rows of each case, trained and tested with both missing, and trained on complete rows."""
    rows: list[Row] = []
    cases = ("image+text", "image", "text")
    cells = (("both", "both"), ("none", "both"))
    for model in r.models:
        values = [percent(mean(r.by_seed(model, [cell], case=case))) for cell in cells for case in cases]
        rows.append([TOWERS[model[0]], model[1], *values])
    names = [f"{how}: {case}" for how in ("trained with both", "on complete rows") for case in cases]
    return ["By what a row has, tested with both missing:", *table(["towers", "head", *names], rows)]


def questions(r: Results) -> list[str]:
    """The four questions of the benchmark, each with differences and a sentence."""
    ours, towers = ("shared", "each case"), tuple(TOWERS)
    help_ = {
        f"{TOWERS[a]} minus {TOWERS[b]}": [((a, head), (b, head)) for head in HEADS]
        for a, b in (("last", "none"), ("map", "none"), ("dcp", "none"), ("map", "last"), ("dcp", "last"))
    }
    heads = {
        f"`{head}` minus `linear`, {TOWERS[tower]}": [((tower, head), (tower, "linear"))]
        for head in HEADS[1:]
        for tower in towers
    }
    case = {f"`each case` minus `shared`, {TOWERS[x]}": [((x, ours[1]), (x, ours[0]))] for x in towers}
    case["`each case` minus `shared`, MAP and DCP"] = [((x, ours[1]), (x, ours[0])) for x in PROMPTED]
    cost = {x: mean([mean(r.by_seed((x, head), LACKING[:3], "seconds")) for head in HEADS]) for x in towers}
    ratios = ", ".join(f"{TOWERS[x]} {cost[x]:.0f} s ({cost[x] / cost['last']:.1f})" for x in towers)
    gain, side, between = r.gap(case["`each case` minus `shared`, MAP and DCP"], LACKING)
    default = '`cases="all"`' if side > 0 else '`cases="shared"`'
    known = "is" if side else "is not"
    return [
        "**Do prompts help, and at what cost?** Mean over the four heads.",
        *differences(r, help_),
        f"Seconds of a training with gaps, and their ratio to the last layers alone: {ratios}.",
        "",
        "**Does the head help on top of prompts?**",
        *differences(r, heads),
        "**Do prototypes for each case pay where features depend on the case?**",
        *differences(r, case),
        f"**What should `attach(..., prompts=...)` do by default?** {default}: over all gaps, with prompts, prototypes",
        f"for each case are {percent(gain, '+')} ({between}) from shared ones, which {known} significant;",
        "shared ones are simpler.",
    ]


def differences(r: Results, rows: dict[str, list[tuple[Model, Model]]]) -> list[str]:
    """A table: where rows lack something, alike in training and test, and trained on complete rows."""
    found: list[Row] = []
    for name, pairs in rows.items():
        texts: list[str] = []
        for cells in (LACKING[:3], LACKING[3:], [CELLS["complete"]]):
            gain, side, between = r.gap(pairs, cells)
            mark = "**" * bool(side)
            texts.append(f"{mark}{percent(gain, '+')}{mark} ({between})")
        found.append([name, *texts])
    return table(["difference", "gaps, mean of three", "complete, tested with both", "complete"], found)
