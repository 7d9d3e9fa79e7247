"""Do missing-aware prompts help, and which head behind them? The tiny CLIP of the examples, on its pictures and titles.

    python benchmarks/prompts.py               # a few hours of one core; --part 0/2 and 1/2 share them between two
    python benchmarks/prompts.py --report      # the section of RESULTS.md, of the CSV as it is

A cell is what is trained in the towers, with a head, on rows that lack something. In the towers: "none"; "last", the
final norms and the image projection, which DCP trains beside its prompts; these and the prompts of "map" or "dcp". The
heads: "linear", a layer on the features side by side; "paper"; "shared", the default; "each case", prototypes for each
missing case. 70 % of the rows lack their text, their image, or one of "both"; or "none" lacks anything. Training,
validation and test lack modalities alike, each by a table of its own; what was trained, and validated, on complete rows
is also tested with every kind of gap. A seed is one of tables, initialisation and order of the rows.

One budget for all: five epochs of batches of 32, a tenth of the steps warms up, the rest decays; the epoch is that of
the best macro-F1 on validation. There are three learning rates to choose from, for each kind of tower and head: by
validation of "both" with seed 0, and then for all its cells. The last layers have a tenth of it. Pictures are not
augmented. Prompts are short: 6 tokens of DCP, and of MAP 2 in each of 6 blocks, 7 on average. The published 36 would be
more than half of the image tower's 65, and twice the text tower's 16. With prompts, half of the complete rows are
encoded as their sub-cases, too, and a quarter where all are complete. Test scores are of the test split, once for each
cell. "Seconds" are of the processor, for training and validation; without prompts with the one pass of the blocks,
which are frozen and never run again.
"""

import argparse
import copy
import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import validate
from prompts_model import BATCH, HEADS, MODALITIES, SPLITS, Rows, build, pictures, pooled, present_of, weights
from prompts_report import TOWERS, section
from torch import Tensor
from tqdm import tqdm

from protohead import PrototypeClassifier
from protohead.metrics import evaluate

MISSING, TUNED = ("both", "none", "text", "image"), "both"  # In the order of the runs.
SLOWER = 0.1  # The last layers' part of the learning rate.
COLUMNS = (
    *("towers", "head", "trained", "seed", "learning_rate", "tried", "epoch", "validation", "seconds"),
    *("test", "case", "rows", "accuracy", "macro_f1", "ece", "budget"),
)


class Budget(NamedTuple):
    """What all cells have alike."""

    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    epochs: int = 5
    seeds: int = 5
    missing: tuple[str, ...] = MISSING
    rows: int | None = None  # Of each split; all by default.

    def digest(self) -> str:
        """What results must have in common to stand in one CSV: the towers' weights, and how all trained."""
        return f"{weights()}/{self.epochs}/{self.rows or 'all'}/{' '.join(f'{rate:g}' for rate in self.rates)}"


QUICK = Budget(rates=(3e-3, 1e-2), epochs=1, seeds=1, missing=("both", "none"), rows=13)


class Task(NamedTuple):
    """One line of the matrix with one seed."""

    towers: str
    head: str
    trained: str
    seed: int


def objective(head: str, trained: str) -> dict[str, float]:
    """What is minimised: a linear layer and the paper know no sub-cases."""
    if head in ("linear", "paper"):
        return {"subcase_weight": 0.0}
    return {"subcase_share": 0.25 if trained == "none" else 0.5}


@torch.no_grad()
def predict(model: PrototypeClassifier, part: Rows, present: Tensor) -> Tensor:
    """(N, K) logits of all rows."""
    model.eval()
    index = torch.arange(len(present)).split(4 * BATCH)
    return torch.cat([model(part.take(some), present[some]) for some in index])


def fit(task: Task, data: Mapping[str, Rows], rate: float, epochs: int) -> tuple[float, int, PrototypeClassifier]:
    """The best macro-F1 on validation, its epoch, and the model then."""
    torch.manual_seed(task.seed)
    labels, validation = data["train"].labels, data["val"]
    model = build(task.towers, task.head, 1 + max(int(part.labels.max()) for part in data.values()))
    present, held_out = (present_of(len(data[s].labels), s, task.trained, task.seed) for s in SPLITS[:2])
    slow = [p for name, p in model.encoders.named_parameters() if p.requires_grad and ".prompts." not in name]
    fast = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in slow)]
    groups = [{"params": fast}] + [{"params": slow}] * bool(slow)
    optimizer = torch.optim.AdamW(groups)
    peaks, steps = [rate, SLOWER * rate][: len(groups)], epochs * -(-len(labels) // BATCH)
    options: dict[str, Any] = {"pct_start": 0.1, "anneal_strategy": "linear", "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, **options)
    order, best = torch.Generator().manual_seed(task.seed), (-1.0, 0, dict[str, Any]())
    for epoch in range(1, epochs + 1):
        model.train()
        for index in torch.randperm(len(labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            inputs, extra = data["train"].take(index), objective(task.head, task.trained)
            model.loss(inputs, present[index], labels[index], **extra).backward()
            optimizer.step()
            schedule.step()
        score, _ = validate(predict(model, validation, held_out), validation.labels)
        if score > best[0]:
            best = score, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[2])
    return *best[:2], model


# -- the runs ---------------------------------------------------------------------------------------------------------


def run(task: Task, rates: tuple[float, ...], budget: Budget) -> list[dict[str, Any]]:
    """The lines of a cell with one seed: at the best of the learning rates, of which there may be one."""
    data, spent = (pictures(budget.rows), 0.0) if task.towers in ("map", "dcp") else pooled(budget.rows)
    found: list[tuple[float, float, float, int, PrototypeClassifier]] = []
    for rate in rates:
        begin = time.process_time()
        score, epoch, model = fit(task, data, rate, budget.epochs)
        found.append((score, rate, time.process_time() - begin + spent, epoch, model))
    score, rate, seconds, epoch, model = max(found, key=lambda x: x[0])
    common: dict[str, Any] = {**task._asdict(), "learning_rate": f"{rate:g}", "epoch": epoch}
    common |= {"tried": " ".join(f"{x[1]:g}:{x[0]:.4f}" for x in found), "validation": f"{score:.4f}"}
    common |= {"seconds": f"{seconds:.1f}", "budget": budget.digest()}
    part, lines = data["test"], []
    # What a row gets depends on its own case alone: each row once in each case, and then any table.
    masks = torch.tensor([[True, True], [True, False], [False, True]])
    every = torch.stack([predict(model, part, mask.expand(len(part.labels), 2)) for mask in masks])
    for test in dict.fromkeys((task.trained, *(budget.missing if task.trained == "none" else ()))):
        present = present_of(len(part.labels), "test", test, task.seed)
        case = (present[:, None] == masks).all(2).long().argmax(1)
        logits = every[case, torch.arange(len(case))]
        for row in evaluate(logits, part.labels, present, MODALITIES).rows():
            scores = {name: f"{row[name]:.4f}" for name in ("accuracy", "macro_f1", "ece")}
            lines.append({**common, "test": test, "case": row["case"], "rows": row["rows"], **scores})
    return lines


def tasks(budget: Budget, part: int = 0, parts: int = 1) -> list[Task]:
    """All runs, or a share of the pairs of towers and heads, seed by seed."""
    pairs = [(towers, head) for towers in TOWERS for head in HEADS][part::parts]
    seeds = range(budget.seeds)
    return [Task(*pair, trained, seed) for seed in seeds for trained in budget.missing for pair in pairs]


def finished(path: Path, digest: str) -> dict[Task, float]:
    """The runs that are in the CSV, and their learning rates.

    Raises:
        ValueError: If it is another CSV, or one of other weights or another budget.
    """
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    if lines and tuple(lines[0]) != COLUMNS:
        raise ValueError(f"Expected {path} to be a CSV of this program to go on with, but its columns are others.")
    if others := {x["budget"] for x in lines} - {digest}:
        raise ValueError(f"Expected to go on with {path} with the budget {digest}, but it has {sorted(others)}.")
    return {Task(x["towers"], x["head"], x["trained"], int(x["seed"])): float(x["learning_rate"]) for x in lines}


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write all the lines of a run at once: another process may write, too, and this one may be ended."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(lines)
    with open(path, "a", newline="") as file:
        file.write(text.getvalue())


def main() -> None:
    """Run what is not in the CSV yet, or report on what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"), help="the CSV, gone on with")
    parser.add_argument("--part", default="0/1", help="share i of n, as 0/2, of the work (default: 0/1)")
    parser.add_argument("--quick", action="store_true", help="few rows, one epoch, one seed, to see that it works")
    parser.add_argument("--report", action="store_true", help="print what the CSV says, and run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        return print("\n".join(section(arguments.output)))
    torch.set_num_threads(1)
    budget = QUICK if arguments.quick else Budget()
    part, parts = map(int, arguments.part.split("/"))
    known, todo = finished(arguments.output, budget.digest()), tasks(budget, part, parts)
    for task in tqdm([task for task in todo if task not in known], unit="run"):
        tuned = task._replace(trained=TUNED, seed=0)
        rates = budget.rates if task == tuned else (known[tuned],)
        lines = run(task, rates, budget)
        append(arguments.output, lines)
        known[task] = float(lines[0]["learning_rate"])


if __name__ == "__main__":
    main()
