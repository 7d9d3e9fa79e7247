"""What clip_finetune.py does once its arguments are read: train a model of clip_model.py, score it, predict with it."""

import argparse
import csv
import json
import math
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from clip_model import build
from files import MODALITIES, InputError
from rows import Row, Rows, map_order, missing_of, present_of, read, split_rows
from tiny_clip import clip_art
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from tqdm import tqdm

from protohead import PrototypeClassifier
from protohead.metrics import Report, evaluate

Outputs = tuple[Tensor, Tensor, Tensor]  # (N, K) logits, (N, 2) present, targets


def check_device(arguments: argparse.Namespace) -> None:
    """Choose the device where none is given."""
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=arguments.device)
    except (AssertionError, RuntimeError) as error:
        got = f"{arguments.device!r}: {error}"
        raise InputError(f"Expected --device to be one that torch can use, but got {got}") from None


# -- batches -----------------------------------------------------------------------------------------------------------


def batches(data: Dataset[tuple[Tensor, ...]], arguments: argparse.Namespace, train: bool = False) -> Any:
    """A loader of batches; in training, shuffled anew in every epoch."""
    size, generator = arguments.batch_size, torch.Generator().manual_seed(arguments.seed)
    if isinstance(data, TensorDataset):  # In memory: one look-up a batch, not one a row.
        order = RandomSampler(data, generator=generator) if train else SequentialSampler(data)
        return DataLoader(data, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))
    pin, workers = torch.cuda.is_available(), arguments.workers
    return DataLoader(data, size, shuffle=train, generator=generator, pin_memory=pin, num_workers=workers)


@torch.no_grad()
def encoded(model: PrototypeClassifier, data: Rows, arguments: argparse.Namespace, what: str) -> TensorDataset:
    """The features of all rows, their present and targets: computed once, since the backbone does not change."""
    columns: list[tuple[Tensor, ...]] = []
    model.eval()
    for image, text, present, target in tqdm(batches(data, arguments), desc=f"encoding {what}"):
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp):
            inputs = {"image": image.to(arguments.device), "text": text.to(arguments.device)}
            features = model.encode(inputs, present)
        columns.append((features["image"].float(), features["text"].float(), present, target))
    return TensorDataset(*(torch.cat(column).to(arguments.device) for column in zip(*columns, strict=True)))


def run(call: Any, batch: Sequence[Tensor], arguments: argparse.Namespace, *labels: Tensor, **options: Any) -> Tensor:
    """What the whole model, or its head, makes of a batch of inputs, or of features: the logits, or the loss."""
    inputs = {"image": batch[0].to(arguments.device), "text": batch[1].to(arguments.device)}
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.amp):
        result: Tensor = call(inputs, batch[2], *labels, **options)
    return result


@torch.no_grad()
def predict(model: PrototypeClassifier, data: Any, arguments: argparse.Namespace) -> Outputs:
    """(N, K) logits, (N, 2) present and the targets of rows, or of their features."""
    model.eval()
    call = model.head if isinstance(data, TensorDataset) else model
    outputs = [
        (run(call, batch, arguments).cpu(), batch[2].cpu(), batch[3].cpu()) for batch in batches(data, arguments)
    ]
    logits, present, targets = (torch.cat(column) for column in zip(*outputs, strict=True))
    return logits, present, targets


# -- training ---------------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Train on --data, by default the clip art; write the model, its settings and the test scores to --output."""
    arguments.data = arguments.data or clip_art() / "data.csv"
    splits, present, classes, several = prepare(arguments)
    settings = {**vars(arguments), "classes": classes, "several": several, "threshold": 0.5}
    if arguments.pretrained and Path(arguments.pretrained).is_file():
        settings["pretrained"] = str(Path(arguments.pretrained).resolve())  # --predict may run elsewhere.
    model, augment, transform, tokenizer = build(settings)
    model.to(arguments.device)
    if not arguments.pretrained and ":" not in arguments.model and arguments.model != "tiny":
        print("Warning: the weights of CLIP are random: without --pretrained this only shows that the program runs.")
    tuned = bool(arguments.trainable) or arguments.prompts != "none"
    data: dict[str, Any] = {}
    for split, rows in splits.items():
        change = augment if split == "train" and tuned else transform
        data[split] = Rows(rows, present[split], targets_of(rows, classes, several), change, tokenizer)
    weight = class_weight_of(data["train"].targets, len(classes)) if arguments.class_weight else None
    if not tuned:
        data = {split: encoded(model, part, arguments, split) for split, part in data.items()}
    fit(model, data, arguments, settings, weight)
    model.load(arguments.output / "model.safetensors")
    if several:  # The one threshold at which validation has its best macro-F1.
        outputs = predict(model, data["val"], arguments)
        steps = [step / 20 for step in range(1, 20)]
        settings["threshold"] = max(steps, key=lambda step: merit(report_of(outputs, step), "macro_f1"))
    (arguments.output / "settings.json").write_text(json.dumps(settings, default=str, indent=1), "utf-8")
    write_scores(report_of(predict(model, data["test"], arguments), settings["threshold"]), arguments, settings)


def prepare(arguments: argparse.Namespace) -> tuple[dict[str, list[Row]], dict[str, Tensor], list[str], bool]:
    """The rows and what is present of them by split, the classes, and whether rows have several."""
    rows, several = read(
        arguments.data, True, arguments.dataset, arguments.allow_gaps, arguments.label_separator, arguments.workers
    )
    splits = split_rows(rows, arguments.seed)
    files = arguments.missing_table
    order = map_order(arguments.data, arguments.dataset) if any(file.suffix == ".pt" for file in files) else None
    gone = missing_of(splits, arguments.missing, arguments.missing_rate, arguments.seed, files, order)
    if gone:
        print(gone.describe())
        gone.save(arguments.output / "missing.jsonl")
    classes = sorted({label for row in splits["train"] for label in row.labels})
    if len(classes) < 2:
        raise InputError(f"Expected two classes or more in the training split, but got {classes}.")
    for row in splits["val"] + splits["test"]:
        if unknown := set(row.labels) - set(classes):
            raise InputError(f"Expected the classes of the training split, but {row.where} has {sorted(unknown)}.")
    present = {
        split: gone.select([row.id for row in part]) if gone else present_of(part) for split, part in splits.items()
    }
    return splits, present, classes, several


def targets_of(rows: list[Row], classes: list[str], several: bool) -> Tensor:
    """(N,) the class of each row; of several labels (N, K) zeros and ones."""
    index = [[classes.index(label) for label in row.labels] for row in rows]
    if not several:
        return torch.tensor([i[0] for i in index])
    targets = torch.zeros(len(rows), len(classes))
    for target, i in zip(targets, index, strict=True):
        target[i] = 1
    return targets


def class_weight_of(targets: Tensor, num_classes: int) -> Tensor:
    """(K,) weights by which every class counts as much as the others, as scikit-learn's "balanced"."""
    counts = targets.sum(0) if targets.is_floating_point() else targets.bincount(minlength=num_classes)
    return counts.sum() / (num_classes * counts.float())


def groups_of(model: PrototypeClassifier, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What trains, with its learning rate: prompts begin at random, as the head does, and need a large one."""
    named = [(name, p) for name, p in model.encoders.named_parameters() if p.requires_grad]
    prompts = [p for name, p in named if ".prompts." in name]
    others = [p for name, p in named if ".prompts." not in name]
    groups = [([*model.head.parameters(), *prompts], arguments.lr), (others, arguments.encoder_lr)]
    return [{"params": parameters, "lr": lr} for parameters, lr in groups if parameters]


def rates(arguments: argparse.Namespace, steps: int) -> Callable[[int], float]:
    """What part of the learning rates each step has: with prompts, as published, a tenth warms up, the rest decays."""
    if arguments.prompts == "none":
        return lambda step: 1.0
    warm = max(1, steps // 10)
    return lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def fit(
    model: PrototypeClassifier,
    data: dict[str, Any],
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    weight: Tensor | None,
) -> None:
    """Train; keep the epoch that validates best in --output, and note it in the settings."""
    trained = model.head if isinstance(data["train"], TensorDataset) else model
    optimizer = torch.optim.AdamW(groups_of(model, arguments))
    objective: dict[str, Any] = {"prototype_weight": arguments.weight, "class_weight": weight}
    # DPL's code has no sub-cases; a linear layer has none either, nor prototypes.
    objective |= {"subcase_weight": 0.0} if arguments.preset or arguments.head == "linear" else {}
    name = "map" if settings["several"] else "macro_f1"
    loader, best = batches(data["train"], arguments, train=True), -math.inf
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates(arguments, arguments.epochs * len(loader)))
    with tqdm(total=arguments.epochs * len(loader), desc="training") as progress:
        for epoch in range(1, arguments.epochs + 1):
            model.train()
            for batch in loader:
                loss = run(trained.loss, batch, arguments, batch[3].to(arguments.device), **objective)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            report = report_of(predict(model, data["val"], arguments), 0.5)
            if merit(report, name) > best:
                best = merit(report, name)
                settings |= {"epoch": epoch, "validation": {name: best}}
                model.save(arguments.output / "model.safetensors")
            progress.set_postfix(epoch=epoch, best=f"{100 * best:.1f}")


# -- scores -----------------------------------------------------------------------------------------------------------


def report_of(outputs: Outputs, threshold: float) -> Report:
    """The scores of predictions, by what the rows have and over all."""
    logits, present, targets = outputs
    return evaluate(logits, targets, present, MODALITIES, threshold)


def merit(report: Report, name: str) -> float:
    """A score over all rows; below all others where it is undefined."""
    score = report.all_rows[name]
    return -1.0 if math.isnan(score) else score


def write_scores(report: Report, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Print the test scores, and write them to scores.csv."""
    lines = report.rows()
    with open(arguments.output / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    ((name, score),) = settings["validation"].items()
    print(f"Epoch {settings['epoch']} of {arguments.epochs} is best on validation: {name} {100 * score:.1f} %.")
    print(f"On test, at the threshold {settings['threshold']}:\n" if settings["several"] else "On test:\n")
    print(f"{report}\n\nWritten to {arguments.output}: model.safetensors, settings.json, scores.csv.")


# -- predictions ------------------------------------------------------------------------------------------------------


def use(arguments: argparse.Namespace) -> None:
    """Write the predictions for the rows of --predict with the model in --output."""
    try:
        settings = json.loads((arguments.output / "settings.json").read_text("utf-8"))
    except OSError as error:
        raise InputError(f"Expected --output to be the folder of a trained model, but got {error}.") from None
    # A file that cannot be read must not end the predictions for the others: its row is marked.
    rows, _ = read(arguments.predict, False, arguments.dataset, True, workers=arguments.workers)
    if not rows:
        raise InputError(f"Expected rows in {arguments.predict}, but got none.")
    model, _, transform, tokenizer = build(settings)
    model.to(arguments.device)
    try:
        model.load(arguments.output / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"Expected the model in --output to load, but got: {error}") from error
    data = Rows(rows, present_of(rows), torch.zeros(len(rows)), transform, tokenizer)
    logits, present, _ = predict(model, data, arguments)
    probabilities = logits.sigmoid() if settings["several"] else logits.softmax(1)
    path = arguments.output / f"{arguments.predict.stem}.predictions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "has", "prediction", "probability", "note"])
        for row, has, x in zip(rows, present.tolist(), probabilities, strict=True):
            chosen = (x > settings["threshold"]).nonzero()[:, 0].tolist() if settings["several"] else [int(x.argmax())]
            names = [settings["classes"][i] for i in chosen if any(has)]  # Of a row with nothing, nothing is said.
            case = "+".join(compress(MODALITIES, has))
            numbers = [f"{x[i]:.4f}" for i in chosen if any(has)]
            writer.writerow([row.where, case, "|".join(names), "|".join(numbers), row.note])
    print(f"Written to {path}: {len(rows)} rows.")
