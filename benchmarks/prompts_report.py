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

    def gaps(self, pairs: Sequence[tuple[Model, Model]], cells: Sequence[Cell]) -> list[float]:
        """First minus second, mean over pairs and cells, of each seed."""
        each = [(self.by_seed(a, cells), self.by_seed(b, cells)) for a, b in pairs]
        gaps = [[x - y for x, y in zip(*pair, strict=True)] for pair in each]
        return [mean(values) for values in zip(*gaps, strict=True)]


def section(path: Path) -> list[str]:
    """The lines of the section, below its heading."""
    r = Results(path) if path.exists() else None
    if not r or not r.seeds:
        return ["No seed of prompts.py is finished yet."]
    count = len(r.seeds)
    return [
        f"The tiny CLIP of the examples, its pictures and titles, {count} seed{'s' * (count > 1)}; `prompts.py` says",
        "what was trained how. (The CLIP has met the training pictures before, those of validation and test not.)",
        "Macro-F1 of test rows in percent. A seed is one of tables, initialisation and order:",
        "intervals (95 %, Student's t, paired by seed) do not show the luck of the test rows, nor that of the learning",
        "rate, which was chosen once. **Bold** excludes 0, without a correction for multiple comparisons.",
        "",
        "`shared` and `each case` are trained with sub-cases, as by default; `linear` and `paper` are not. Trained on",
        "complete rows, these two have not met a row that lacks something, nor have their prompts.",
        f"**{r.unfinished} runs are of seeds that are not finished, and left out.**" * (r.unfinished > 0),
        "**Of so few seeds this is a look, not a result.**" * (count < 3),
        "",
        *scores(r),
        *by_case(r),
        *questions(r),
    ]


def scores(r: Results) -> list[str]:
    """A row for each model, a column for each kind of gap, and what validation chose."""
    rows: list[Row] = []
    for model in r.models:
        values = [mean(r.by_seed(model, [cell])) for cell in CELLS.values()]
        both = [CELLS["both, 70 %"]]
        seconds, rate = (mean(r.by_seed(model, both, name)) for name in ("seconds", "learning_rate"))
        texts = [percent(x) for x in (*values, mean(r.by_seed(model, LACKING, "ece")))]
        rows.append([TOWERS[model[0]], model[1], *texts, f"{rate:g}", f"{seconds:.0f}"])
    return [
        "All rows, by what is missing; ECE, before calibration, is the mean of the four columns with gaps. The rate is",
        "the learning rate of head and prompts. Seconds are of one core, for a training with both missing. Without",
        "prompts the blocks, which are frozen, run once for all epochs.",
        *table(["towers", "head", *CELLS, "ECE", "rate", "seconds"], rows),
    ]


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
    groups = {"`linear`, `paper`": HEADS[:2], "`shared`, `each case`": HEADS[2:]}
    changes = [("last", "none"), ("map", "last"), ("dcp", "last"), ("map", "none"), ("dcp", "none")]
    helped = {
        f"{TOWERS[a]} minus {TOWERS[b]}, {name}": [((a, head), (b, head)) for head in heads]
        for a, b in changes
        for name, heads in groups.items()
    }
    heads = {
        f"`{head}` minus `linear`, {TOWERS[tower]}": [((tower, head), (tower, "linear"))]
        for head in HEADS[1:]
        for tower in TOWERS
    }
    case = {f"`each case` minus `shared`, {TOWERS[x]}": [((x, "each case"), (x, "shared"))] for x in TOWERS}
    case["`each case` minus `shared`, MAP and DCP"] = [((x, "each case"), (x, "shared")) for x in PROMPTED]
    cost = {x: mean([mean(r.by_seed((x, head), LACKING[:3], "seconds")) for head in HEADS]) for x in TOWERS}
    return [
        "**Do prompts help, and at what cost?** Mean over two heads.",
        *differences(r, helped),
        "Over the four heads and the four columns with gaps, prompts differ from the last layers alone by",
        f"{difference(r, [((x, head), ('last', head)) for x in PROMPTED for head in HEADS], LACKING)}.",
        "Seconds of a training with gaps: " + ", ".join(f"{TOWERS[x]} {cost[x]:.0f}" for x in TOWERS) + ".",
        "",
        "**Does the head help on top of prompts?** `shared` and `each case` also have sub-cases and a center.",
        *differences(r, heads),
        "Over MAP and DCP and the four columns with gaps, `shared` differs from `linear` by",
        f"{difference(r, [((x, 'shared'), (x, 'linear')) for x in PROMPTED], LACKING)}, and from `paper` by",
        f"{difference(r, [((x, 'shared'), (x, 'paper')) for x in PROMPTED], LACKING)}.",
        "",
        "**Do prototypes for each case pay where features depend on the case?**",
        *differences(r, case),
        *default(r),
    ]


def default(r: Results) -> list[str]:
    """What the prototypes of a model with prompts should be."""
    prompted, plain = (
        r.gaps([((x, "each case"), (x, "shared")) for x in towers], LACKING) for towers in (PROMPTED, ("last",))
    )
    gain, side, between, *_ = interval(prompted)
    more, surely, around, *_ = interval([x - y for x, y in zip(prompted, plain, strict=True)])
    if side > 0 and surely > 0:
        answer = '`cases="all"`: these are better with prompts, and more so than without.'
    elif side < 0:
        answer = '`cases="shared"`, as without prompts: these are better.'
    else:
        answer = '`cases="shared"`, as without prompts: no gain of the others is shown, and these are simpler.'
    return [
        f"**What should `attach(..., prompts=...)` do by default?** {answer}",
        "Over the four columns with gaps prototypes for each case differ from shared ones by",
        f"{percent(gain, '+')} ({between}) with prompts; that is {percent(more, '+')} ({around}) more than with the",
        "last layers alone.",
    ]


def difference(r: Results, pairs: list[tuple[Model, Model]], cells: Sequence[Cell]) -> str:
    """First minus second, bold if that is sure, and its interval."""
    gain, side, between, _ = interval(r.gaps(pairs, cells))
    mark = "**" * bool(side)
    return f"{mark}{percent(gain, '+')}{mark} ({between})"


def differences(r: Results, rows: dict[str, list[tuple[Model, Model]]]) -> list[str]:
    """A table: where rows lack something, alike in training and test, and trained on complete rows."""
    columns = LACKING[:3], LACKING[3:], [CELLS["complete"]]
    found: list[Row] = [[name, *(difference(r, pairs, cells) for cells in columns)] for name, pairs in rows.items()]
    return table(["difference", "gaps, mean of three", "complete, tested with both", "complete"], found)
