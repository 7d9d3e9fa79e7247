"""Are probabilities true after calibration: ECE of accuracy.py's models before and after, with the same treatment.

    pip install ".[bench]"
    python benchmarks/calibration.py           # the embedded data; then RESULTS.md
    python benchmarks/calibration.py --data mine.npz --modalities image,text,audio

Each model is trained anew with the learning rate and the epoch that accuracy.csv says were chosen for it; there is no
other choice. What `head.calibrate` does for the head is done for all, by the same function, on the validation rows.
Models are kept in the folder calibration, so that an interrupted run goes on where it was, seed after seed.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import CLOSED, HERE, KEY, SMALL, Rows, Task, read, rows_of, tasks, train
from features import Data
from methods import METHODS
from report import CALIBRATED, write_report
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error
from tqdm import tqdm

from protohead.calibration import Fit, fit_cases
from protohead.cases import case_masks

COLUMNS = (*KEY, "test_missing", "test_rate", "recorded", "before", "after", "floor", "loss")
Fits = dict[str, Fit]


def choices(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """By model, test table, and rate: the line of accuracy.csv of all rows."""
    with open(path, newline="") as file:
        lines = [x for x in csv.DictReader(file) if x["method"] == x["trained"] and x["case"] == "all rows"]
    names = (*KEY, "test_missing", "test_rate")
    return {tuple(x[name] for name in names): x for x in lines if float(x["flipped"]) == 0}


def model_of(task: Task, data: Data, training: Rows, validation: Rows, chosen: dict[str, str], path: Path) -> nn.Module:
    """The model as it was chosen, read from the folder if it is there."""
    if path.exists():
        model = METHODS[task.method](data.widths, data.num_classes)
        model.load_state_dict(torch.load(path)["state"])
        return model.eval()
    rate, epoch = float(chosen["learning_rate"]), int(chosen["epoch"])
    _, _, _, model = train(task.method, data, training, validation, rate, task.seed, epoch)[task.method]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": model.state_dict()}, path)
    return model.eval()


def fit(model: nn.Module, validation: Rows, modalities: list[str]) -> Fits:
    """Temperatures and shifts by missing case, of any model."""

    def logits_of(index: Tensor, case: Tensor | None) -> Tensor:
        rows = validation.take(index)
        here = rows.present if case is None else case.expand(len(index), -1)
        parts = {name: torch.where(here[:, m, None], x, 0) for m, (name, x) in enumerate(rows.features.items())}
        logits: Tensor = model(parts, here)
        return logits

    return fit_cases(logits_of, validation.labels, validation.present, modalities)


def calibrated(logits: Tensor, present: Tensor, fits: Fits) -> Tensor:
    """The logits of each row as its case has them."""
    masks, found = case_masks(list(max(fits, key=len).split("+"))), logits.double()
    for mask, (temperature, shift) in zip(masks, fits.values(), strict=True):
        rows = (present == mask).all(1, keepdim=True)
        fitted = logits / torch.where(logits > 0, temperature[1], temperature[0]) + shift
        found = torch.where(rows, fitted, found)
    return found


def said_and_right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of what is said, and whether it is right, as `evaluate` has them."""
    if labels.is_floating_point():
        return logits.double().sigmoid().flatten(), labels.flatten()
    said, answer = logits.double().softmax(1).max(1)
    return said, (answer == labels).float()


def calibration_error(said: Tensor, right: Tensor) -> float:
    """As `evaluate` has it."""
    error: float = binary_calibration_error(said.clamp(max=1 - 1e-12), right.long(), n_bins=15).item()
    return error


def floor(said: Tensor, draws: int = 20) -> float:
    """The calibration error if the probabilities were true: by chance it is not 0 on so many rows."""
    generator = torch.Generator().manual_seed(0)
    each = [calibration_error(said, torch.bernoulli(said, generator=generator)) for _ in range(draws)]
    return sum(each) / draws


def scores(logits: Tensor, calibrated: Tensor, labels: Tensor) -> dict[str, float]:
    """ECE before and after, that of true probabilities, and the log loss after."""
    said, right = said_and_right(calibrated, labels)
    before = calibration_error(*said_and_right(logits, labels))
    loss = F.binary_cross_entropy_with_logits if labels.is_floating_point() else F.cross_entropy
    answers = labels.to(calibrated) if labels.is_floating_point() else labels
    after = calibration_error(said, right)
    return {"before": before, "after": after, "floor": floor(said), "loss": loss(calibrated, answers).item()}


def run(task: Task, known: dict[tuple[str, ...], dict[str, str]], folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of one model."""
    data = task.read()
    key, modalities = task.key(data.name), list(data.features)
    training, validation = (rows_of(data, name, task.missing, task.rate, task.seed) for name in ("train", "val"))
    tests = [(task.missing, task.rate)] + [("all", 0.7)] * (task.rate == 0)
    own = (*key, tests[0][0], f"{tests[0][1]:g}")
    chosen = known[own]
    path = folder / ("|".join(key).replace(" ", "_") + ".pt")
    model = model_of(task, data, training, validation, chosen, path)
    with torch.no_grad():
        fits = fit(model, validation, modalities)
        for missing, rate in tests:
            test = rows_of(data, "test", missing, rate, task.seed)
            logits = model(test.features, test.present)
            line = {"test_missing": missing, "test_rate": f"{rate:g}"}
            errors = scores(logits, calibrated(logits, test.present, fits), test.labels)
            place = (*key, *line.values())
            recorded = known[place]["ece"]
            yield (
                dict(zip(KEY, key, strict=True))
                | line
                | {"recorded": recorded}
                | {name: f"{error:.4f}" for name, error in errors.items()}
            )


def main() -> None:
    """Calibrate what is not in the CSV yet; then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", metavar="FILE.npz", help="as accuracy.py")
    parser.add_argument("--modalities", default="image,text", help="as accuracy.py")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of accuracy.csv (default: this program's)")
    parser.add_argument("--models", type=Path, default=Path("calibration"), help="folder of what is trained")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    modalities, path = tuple(arguments.modalities.split(",")), arguments.output / "calibration.csv"
    known = choices(arguments.output / "accuracy.csv")
    done = set()
    if path.exists():
        with open(path, newline="") as file:
            done = {tuple(line[name] for name in KEY) for line in csv.DictReader(file)}
    todo = [t for file in arguments.data or [SMALL] for t in tasks(file, modalities, quick=False)]
    todo = [t for t in todo if t.method in CALIBRATED and t.seed < arguments.seeds]
    todo.sort(key=lambda task: (task.method == CLOSED, task.seed))  # The closed form of wide features takes longest.
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for task in tqdm(todo, unit="model"):
            key = task.key(read(task.path, modalities).name)
            if key not in done:
                writer.writerows(list(run(task, known, arguments.models)))
                file.flush()
    write_report(arguments.output / "accuracy.csv")


if __name__ == "__main__":
    main()
