"""Does the head help, when, and by how much: macro-F1 and more by missing case, on frozen features.

    pip install ".[bench]"
    python benchmarks/accuracy.py              # the embedded data: under 15 minutes on two cores
    python benchmarks/accuracy.py --data mine.npz --modalities image,text,audio  # into the folder accuracy
    python benchmarks/accuracy.py --split-anew  # each seed with splits of its own, of the rows that are not for test

For every missing rate, kind of missing modality, and seed (of the missing tables, the initialisation and the order of
the rows), each method is trained at the same four learning rates, and its learning rate and epoch are picked by
macro-F1 on the validation split; all scores are those of the test split. The closed form has neither: the weight of
rare classes is picked instead, of three, where there is one label. Training, validation and test lack modalities alike,
each with a table of its own. Models trained at 0 and at 70 % are also tested on the other kinds of table, and
those at 70 % of everything with masks of which some are wrong.

It writes a CSV of one line per model, test table and missing case, then RESULTS.md and the figures: see report.py. An
interrupted run goes on where it was.
"""

import argparse
import copy
import csv
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from features import Data, load
from methods import ABLATIONS, BALANCES, METHODS, PREDICTORS
from report import write_report
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score
from tqdm import tqdm

from protohead.cases import case_masks, case_names
from protohead.metrics import evaluate
from protohead.simulate import missing_table

HERE = Path(__file__).parent
SMALL = HERE.parent / "examples" / "data" / "openclipart13_small_pca128.npz"
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RATES = (0.0, 0.3, 0.5, 0.7, 0.9)
FLIPS = (0.01, 0.05, 0.2)
EPOCHS = 15
BATCH_SIZE = 128
MAIN = ("linear", "late fusion", "cosine head", "paper", "protohead, decoupled", "protohead")
CLOSED = "closed form"  # The method that is not trained.
METRICS = ("accuracy", "macro_f1", "auroc", "map", "ece", "aurc")
KEY = ("data", "trained", "train_missing", "train_rate", "seed")
COLUMNS = (
    *(*KEY, "method", "learning_rate", "epoch", "validation"),
    *("test_missing", "test_rate", "flipped", "case", "rows", *METRICS, "reliability", "budget"),
)


class Task(NamedTuple):
    """One method, trained on one table at every learning rate."""

    path: Path
    modalities: tuple[str, ...]
    missing: str
    rate: float
    seed: int
    method: str
    learning_rates: tuple[float, ...]
    epochs: int
    split_anew: bool = False

    def read(self) -> Data:
        """Its data, in its splits."""
        data = read(self.path, self.modalities)
        return data.split_anew(self.seed) if self.split_anew else data

    def key(self, data: str) -> tuple[str, ...]:
        """What tells its lines in the CSV from those of others: the columns KEY."""
        return data, self.method, self.missing, f"{self.rate:g}", str(self.seed)


class Rows(NamedTuple):
    """A batch, or a split."""

    features: dict[str, Tensor]
    present: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        return Rows({name: x[index] for name, x in self.features.items()}, self.present[index], self.labels[index])


def rows_of(data: Data, split: str, missing: str, rate: float, seed: int, flipped: float = 0.0) -> Rows:
    """The rows of a split as they are with some modalities missing.

    Each entry of the mask is wrong with the probability `flipped`, except where that would leave a row nothing.
    """
    index, modalities = data.rows[split], list(data.features)
    present = data.present[index]
    if rate:
        number = 3 * seed + ("train", "val", "test").index(split)
        present = missing_table(len(index), modalities, rate, missing, number, present=present).present
    there = present
    if flipped:
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.rand(present.shape, generator=generator) < flipped
        said = present ^ wrong
        present = torch.where(said.any(1, keepdim=True), said, present)
    # What is missing is zeros, whatever the mask says; what the mask calls missing is not looked at.
    seen = there & present
    features = {name: torch.where(seen[:, m, None], x[index], 0) for m, (name, x) in enumerate(data.features.items())}
    return Rows(features, present, data.labels[index])


def thresholds(logits: Tensor) -> Tensor:
    """Thresholds for several labels that are worth a try: quantiles of the logits."""
    return logits.flatten().quantile(torch.linspace(0.5, 0.98, 13))


def validate(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Macro-F1, and the threshold on probabilities that gives it where there are several labels."""
    count = logits.shape[1]
    if not labels.is_floating_point():
        return multiclass_f1_score(logits, labels, count, average="macro", validate_args=False).item(), 0.5
    scores = []
    for threshold in thresholds(logits):
        marked = (logits > threshold).long()
        score = multilabel_f1_score(marked, labels.long(), count, average="macro", validate_args=False)
        scores.append((score.item(), threshold.sigmoid().item()))
    return max(scores)


def train(
    method: str, data: Data, training: Rows, validation: Rows, rate: float, seed: int, epochs: int
) -> dict[str, tuple[float, float, int, nn.Module]]:
    """For each way to predict with the method: the best validation score, its threshold and epoch, the model then."""
    torch.manual_seed(seed)
    model = {**METHODS, **ABLATIONS}[method](data.widths, data.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    best: dict[str, tuple[float, float, int, nn.Module]] = {}
    alone = method == CLOSED
    if hasattr(model, "start"):
        model.start(*training, balance=rate if alone else 0.0)  # type: ignore[operator]
    for epoch in [0] if alone else range(1, epochs + 1):
        model.train()
        for index in torch.randperm(len(training.labels)).split(BATCH_SIZE) if epoch else ():
            optimizer.zero_grad()
            model.loss(*training.take(index)).backward()  # type: ignore[operator]
            optimizer.step()
        model.eval()
        for name, predict in predictors(method).items():
            with torch.no_grad():
                score, threshold = validate(predict(model, *validation[:2]), validation.labels)
            if name not in best or score > best[name][0]:
                best[name] = score, threshold, epoch, copy.deepcopy(model)
    return best


def predictors(method: str) -> dict[str, Any]:
    """The ways to predict with a method, by name: its own first."""
    return {method: lambda model, features, present: model(features, present), **PREDICTORS.get(method, {})}


@cache
def read(path: Path, modalities: tuple[str, ...]) -> Data:
    """The data, once for each process."""
    return load(path, modalities)


def run(task: Task) -> list[dict[str, Any]]:
    """The lines of one task."""
    torch.set_num_threads(1)
    data = task.read()
    training, validation = (rows_of(data, name, task.missing, task.rate, task.seed) for name in ("train", "val"))
    rates = task.learning_rates
    if task.method == CLOSED:
        rates = BALANCES[:1] if data.labels.is_floating_point() else BALANCES
    runs = [(rate, train(task.method, data, training, validation, rate, task.seed, task.epochs)) for rate in rates]
    lines = []
    for name, predict in predictors(task.method).items():
        learning_rate, found = max(runs, key=lambda item: item[1][name][0])
        score, threshold, epoch, model = found[name]
        for missing, rate, flipped in test_tables(task, data):
            test = rows_of(data, "test", missing, rate, task.seed, flipped)
            with torch.no_grad():
                logits = predict(model, test.features, test.present)
            # Scores go by what the rows really have, whatever a wrong mask says.
            there = rows_of(data, "test", missing, rate, task.seed).present
            report = evaluate(logits, test.labels, there, list(data.features), threshold=threshold)
            for row in report.rows():
                line = dict(zip(KEY, task.key(data.name), strict=True))
                line |= {"method": name, "learning_rate": f"{learning_rate:g}", "epoch": str(epoch)}
                line |= {"validation": f"{score:.4f}", "test_missing": missing, "test_rate": f"{rate:g}"}
                line |= {"flipped": f"{flipped:g}", "case": str(row["case"]), "rows": str(row["rows"])}
                line["budget"] = budget(data, task.epochs)
                if (task.missing, task.rate) == (missing, rate) == ("all", 0.7) and not flipped:
                    line["reliability"] = reliability(logits, test, line["case"], list(data.features))
                lines.append(line | {name: f"{row[name]:.4f}" for name in METRICS if name in row})
    return lines


def reliability(logits: Tensor, test: Rows, case: str, modalities: list[str]) -> str:
    """For ten bins of probability: how many predictions, their mean probability, and how many of them are right."""
    cases = {name: mask for name, mask in zip(case_names(modalities), case_masks(modalities), strict=True)}
    if case not in cases:
        return ""
    chosen = (test.present == cases[case]).all(1)
    logits, labels = logits[chosen], test.labels[chosen]
    if labels.is_floating_point():
        probability, right = logits.sigmoid().flatten(), labels.flatten()
    else:
        probability, said = logits.softmax(1).max(1)
        right = (said == labels).float()
    index = (probability * 10).long().clamp(max=9)
    bins = [torch.zeros(10).index_add(0, index, x) for x in (torch.ones_like(right), probability, right)]
    return " ".join(f"{int(n)}:{p / n:.3f}:{r / n:.3f}" for n, p, r in zip(*bins, strict=True) if n)


def test_tables(task: Task, data: Data) -> Iterator[tuple[str, float, float]]:
    """What is missing, at which rate, and how much of the mask is wrong, for each test of a trained model."""
    yield task.missing, task.rate, 0.0
    if task.rate in (0.0, 0.7):
        for missing in kinds(data):
            if (missing, 0.7) != (task.missing, task.rate):
                yield missing, 0.7, 0.0
    if task.rate == 0.7:
        if task.missing != "none":
            yield "none", 0.0, 0.0
        if task.missing == "all":
            for flipped in FLIPS:
                yield "all", 0.7, flipped


def kinds(data: Data) -> list[str]:
    """What can go missing: each modality, and every combination."""
    return [*data.features, "all"]


# -- the whole --------------------------------------------------------------------------------------------------------


def tasks(path: Path, modalities: tuple[str, ...], quick: bool, split_anew: bool = False) -> list[Task]:
    """All that is to be trained on one file."""
    kept: dict[str, Any] = {"learning_rates": LEARNING_RATES, "epochs": EPOCHS, "split_anew": split_anew}
    missing, rates, seeds, methods = [*modalities, "all"], list(RATES), range(5), list(METHODS)
    if split_anew:
        rates, seeds, methods = [0.0, 0.7], range(10), list(MAIN)
    if quick:
        kept |= {"learning_rates": LEARNING_RATES[1:2], "epochs": 2}
        missing, rates, seeds, methods = ["all"], [0.7], range(2), ["linear", "paper", "protohead"]
    settings = [("none", 0.0) if not rate else (kind, rate) for rate in rates for kind in missing]
    return [
        Task(path, modalities, kind, rate, seed, method, **kept)
        for seed in seeds
        for kind, rate in dict.fromkeys(settings)
        for method in (methods + list(ABLATIONS) if rate == 0.7 and not quick and not split_anew else methods)
    ]


def budget(data: Data, epochs: int) -> str:
    """What results must have in common to stand in one CSV: the very file, and how long all trained."""
    return f"{data.digest}/{epochs}"


def finished(path: Path, budgets: dict[str, str]) -> set[tuple[str, ...]]:
    """The keys of the tasks whose lines are in the CSV; those of the last one, which may be incomplete, are removed.

    Raises:
        ValueError: If it is another CSV, or has lines of data of that name with another of the `budgets`.
    """
    if not path.exists():
        return set()
    whole = path.read_text().rpartition("\n")[0]  # The last line may be cut off.
    lines = list(csv.DictReader(whole.splitlines()))
    if lines and tuple(lines[0]) != COLUMNS:
        raise ValueError(f"Expected {path} to be a CSV of this program to go on with, but its columns are others.")
    if others := sorted({x["data"] for x in lines if x["budget"] != budgets.get(x["data"], x["budget"])}):
        raise ValueError(f"Expected to go on with {path}, but its {others} were other data, or trained otherwise.")
    keys = [tuple(line[name] or "" for name in KEY) for line in lines]
    kept = [line for line, key in zip(lines, keys, strict=True) if key != keys[-1]]
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    os.replace(part, path)
    return set(keys[:-1]) - set(keys[-1:])


def train_all(todo: list[Task], path: Path, workers: int) -> None:
    """Run the tasks in several processes; what is finished is in the CSV at once."""
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        open(path, "a", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        futures = [pool.submit(run, task) for task in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit="model", smoothing=0.05):
                writer.writerows(future.result())
                file.flush()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    """Train what is not in the CSV yet; then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described = "arrays named like the modalities (N, D), label (N,) or (N, K), split (N,); may be given several times"
    parser.add_argument("--data", type=Path, action="append", metavar="FILE.npz", help=described)
    described = "modalities of all the files, separated by commas (default: image,text)"
    parser.add_argument("--modalities", default="image,text", help=described)
    described = "folder of all that is written (default: that of this program; with any other option, ./accuracy)"
    parser.add_argument("--output", type=Path, help=described)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="a small part, to see that it works")
    described = "ten seeds, each with new splits of the training and validation rows; main methods at 0 and 70 %%"
    parser.add_argument("--split-anew", action="store_true", help=described)
    arguments = parser.parse_args()
    modalities, files = tuple(arguments.modalities.split(",")), arguments.data or [SMALL]
    apart = arguments.data or arguments.quick or arguments.split_anew
    output = arguments.output or (Path("accuracy") if apart else HERE)
    path = output / "accuracy.csv"
    try:
        if arguments.workers < 1:
            raise ValueError(f"Expected --workers to be at least 1, but got {arguments.workers}.")
        data = {file: read(file, modalities) for file in files}
        output.mkdir(parents=True, exist_ok=True)
        todo = [task for file in files for task in tasks(file, modalities, arguments.quick, arguments.split_anew)]
        names = {task.path: task.read().name for task in todo}
        known = finished(path, {names[file]: budget(one, todo[0].epochs) for file, one in data.items()})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    todo = [task for task in todo if task.key(names[task.path]) not in known]
    todo.sort(key=lambda task: task.seed)  # A run that is cut short has all settings, of fewer seeds.
    train_all(todo, path, arguments.workers)
    write_report(path)


if __name__ == "__main__":
    main()
