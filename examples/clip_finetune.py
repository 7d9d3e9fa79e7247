"""Train a classifier for missing modalities on an open_clip model and your own rows of pictures and texts; then use it.

    python examples/shapes.py shapes                                        # a small data set to try it on
    python examples/clip_finetune.py --data shapes/data.csv --model ViT-B-32 --pretrained openai --output run
    python examples/clip_finetune.py --predict new.csv --output run         # writes run/new.predictions.csv

The rows are a CSV or JSONL of the columns image (a path, relative to the file), text, label and, optionally, split
(train, val, test), or a folder of class folders: see rows.py, which reads them. What is empty, null or absent is
missing. Several labels are a list in JSONL, and a|b in CSV. Without splits 70 % of the rows train, 15 % validate and
15 % test. Folders of MM-IMDb, UPMC Food-101 and Hateful Memes are read as their owners distribute them:

    python examples/clip_finetune.py --data FOLDER --dataset mmimdb --missing-rate 0.7 --preset DPL_DCP --output run

By default CLIP is frozen: its features are computed once, and only the head is trained on them. With --trainable, what
that names is trained too. The epoch is chosen by validation; the scores by missing case are those of the test rows.
"""

import argparse
import csv
import json
import os
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import compress
from pathlib import Path
from typing import Any

import open_clip
import torch
from presets import VARIANTS, published
from rows import MODALITIES, READERS, InputError, Rows, missing_of, present_of, read, split_rows
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_f1_score,
    multilabel_average_precision,
    multilabel_f1_score,
)
from tqdm import tqdm

from protohead import PrototypeClassifier, attach
from protohead.cases import case_names

# -- the model --------------------------------------------------------------------------------------------------------


def build(settings: dict[str, Any]) -> tuple[PrototypeClassifier, Any, Any, Any]:
    """The model, its transforms for training and for evaluation, and its tokenizer.

    Raises:
        InputError: If open_clip cannot load the model, or a setting is not as said.
    """
    name, tag, known = settings["model"], settings["pretrained"], open_clip.list_models()
    if ":" not in name and name.replace("/", "-") not in known:
        near = get_close_matches(name, known, n=5, cutoff=0.4) or known
        raise InputError(f"Expected --model to be one of open_clip's, but got {name!r}; nearest: {', '.join(near)}.")
    torch.manual_seed(settings["seed"])  # Random weights must be the same again when --predict builds them.
    try:
        clip, augment, transform = open_clip.create_model_and_transforms(name, tag)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the model hub raise many kinds.
        tags = f"; its tags: {', '.join(open_clip.list_pretrained_tags_by_model(name))}" if tag else ""
        raise InputError(f"Expected --model and --pretrained that load, but got {error}{tags}.") from error
    options = {key: settings[key] for key in ("trainable", "scale", "margin")}
    options["class_names"] = settings["classes"]
    if settings["preset"]:  # It is DPL's, whose head has prototypes for each missing case, no center and no bias.
        options |= {"cases": "all", "centered": False}
    try:
        return attach(clip, len(settings["classes"]), **options), augment, transform, tokenizer
    except ValueError as error:
        raise InputError(str(error)) from error


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
def predict(model: PrototypeClassifier, data: Any, arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) logits, (N, 2) present and the targets of rows, or of their features."""
    model.eval()
    call = model.head if isinstance(data, TensorDataset) else model
    outputs = [
        (run(call, batch, arguments).cpu(), batch[2].cpu(), batch[3].cpu()) for batch in batches(data, arguments)
    ]
    logits, present, targets = (torch.cat(column) for column in zip(*outputs, strict=True))
    return logits, present, targets


def score(logits: Tensor, targets: Tensor, threshold: float) -> dict[str, float]:
    """Two scores in percent, the first of which chooses the epoch."""
    count = logits.shape[1]
    if targets.is_floating_point():
        marks, known = targets.long(), targets.any(0)  # Average precision is undefined for a class that no row has.
        f1 = multilabel_f1_score(logits.sigmoid(), marks, count, threshold)
        precision = torch.zeros(())
        if known.sum() > 1:
            precision = multilabel_average_precision(logits[:, known], marks[:, known], int(known.sum()))
        return {"mAP": 100 * precision.item(), "macro-F1": 100 * f1.item()}
    accuracy = multiclass_accuracy(logits, targets, count, average="micro")
    f1 = multiclass_f1_score(logits, targets, count, average="macro")
    return {"macro-F1": 100 * f1.item(), "accuracy": 100 * accuracy.item()}


def table(outputs: tuple[Tensor, Tensor, Tensor], threshold: float) -> list[dict[str, Any]]:
    """The scores by what the rows have, with the number of rows, and over all."""
    logits, present, targets = outputs
    names = ["+".join(compress(MODALITIES, row)) for row in present.tolist()]
    lines = []
    for case in (*case_names(MODALITIES), "all rows"):
        rows = torch.tensor([case in (name, "all rows") for name in names])
        if rows.any():
            scores = {name: f"{x:.1f}" for name, x in score(logits[rows], targets[rows], threshold).items()}
            lines.append({"rows with": case, "count": int(rows.sum()), **scores})
    return lines


# -- the two things to do ---------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Train on --data; write the model, its settings and the test scores to --output."""
    rows, several = read(arguments.data, True, arguments.dataset, arguments.allow_gaps)
    splits = split_rows(rows, arguments.seed)
    gone = missing_of(splits, arguments.missing, arguments.missing_rate, arguments.seed, arguments.missing_table)
    if gone:
        print(gone.describe())
        gone.save(arguments.output / "missing.jsonl")
    classes = sorted({label for row in splits["train"] for label in row.labels})
    if len(classes) < 2:
        raise InputError(f"Expected two classes or more in the training split, but got {classes}.")
    for row in splits["val"] + splits["test"]:
        if unknown := set(row.labels) - set(classes):
            raise InputError(f"Expected the classes of the training split, but {row.where} has {sorted(unknown)}.")
    settings = {**vars(arguments), "classes": classes, "several": several, "threshold": 0.5}
    if arguments.pretrained and Path(arguments.pretrained).is_file():
        settings["pretrained"] = str(Path(arguments.pretrained).resolve())  # --predict may run elsewhere.
    model, augment, transform, tokenizer = build(settings)
    model.to(arguments.device)
    if not arguments.pretrained and ":" not in arguments.model:
        print("Warning: the weights of CLIP are random: without --pretrained this only shows that the program runs.")

    data: dict[str, Any] = {}
    for split, part in splits.items():
        index = [[classes.index(label) for label in row.labels] for row in part]
        targets = torch.tensor([i[0] for i in index]) if not several else torch.zeros(len(part), len(classes))
        if several:
            for target, i in zip(targets, index, strict=True):
                target[i] = 1
        present = gone.select([row.id for row in part]) if gone else present_of(part)
        prepare = augment if split == "train" and arguments.trainable else transform
        data[split] = Rows(part, present, targets, prepare, tokenizer)
        if not arguments.trainable:
            data[split] = encoded(model, data[split], arguments, split)

    trained = model if arguments.trainable else model.head
    groups: list[dict[str, Any]] = [{"params": model.head.parameters(), "lr": arguments.lr}]
    if arguments.trainable:
        chosen = [p for p in model.encoders.parameters() if p.requires_grad]
        groups.append({"params": chosen, "lr": arguments.encoder_lr})
    optimizer = torch.optim.AdamW(groups)
    objective = {"prototype_weight": arguments.weight} | ({"subcase_weight": 0.0} if arguments.preset else {})
    loader, best, path = batches(data["train"], arguments, train=True), -1.0, arguments.output / "model.safetensors"
    with tqdm(total=arguments.epochs * len(loader), desc="training") as progress:
        for epoch in range(1, arguments.epochs + 1):
            model.train()
            for batch in loader:
                loss = run(trained.loss, batch, arguments, batch[3].to(arguments.device), **objective)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.update()
            logits, _, targets = predict(model, data["val"], arguments)
            scores = score(logits, targets, 0.5)
            if (first := next(iter(scores.values()))) > best:
                best, settings["epoch"], settings["validation"] = first, epoch, scores
                model.save(path)
            progress.set_postfix(epoch=epoch, best=f"{best:.1f}")
    model.load(path)
    if several:  # The one threshold at which validation has its best macro-F1.
        logits, _, targets = predict(model, data["val"], arguments)
        steps = [step / 20 for step in range(1, 20)]
        settings["threshold"] = max(steps, key=lambda step: score(logits, targets, step)["macro-F1"])
    (arguments.output / "settings.json").write_text(json.dumps(settings, default=str, indent=1), "utf-8")

    lines = table(predict(model, data["test"], arguments), settings["threshold"])
    with open(arguments.output / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    validation = ", ".join(f"{name} {x:.1f}" for name, x in settings["validation"].items())
    print(f"Epoch {settings['epoch']} of {arguments.epochs} is best on validation: {validation}.")
    print(f"On test, at the threshold {settings['threshold']}:\n" if several else "On test:\n")
    for cells in (list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)):
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\nWritten to {arguments.output}: model.safetensors, settings.json, scores.csv.")


def use(arguments: argparse.Namespace) -> None:
    """Write the predictions for the rows of --predict with the model in --output."""
    try:
        settings = json.loads((arguments.output / "settings.json").read_text("utf-8"))
    except OSError as error:
        raise InputError(f"Expected --output to be the folder of a trained model, but got {error}.") from None
    rows, _ = read(arguments.predict, False, arguments.dataset, arguments.allow_gaps)
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
        writer.writerow(["row", "has", "prediction", "probability"])
        for row, has, x in zip(rows, present.tolist(), probabilities, strict=True):
            chosen = (x >= settings["threshold"]).nonzero()[:, 0].tolist() if settings["several"] else [int(x.argmax())]
            names = [settings["classes"][i] for i in chosen if any(has)]  # Of a row with nothing, nothing is said.
            case = "+".join(compress(MODALITIES, has))
            numbers = [f"{x[i]:.4f}" for i in chosen if any(has)]
            writer.writerow([row.where, case, "|".join(names), "|".join(numbers)])
    print(f"Written to {path}: {len(rows)} rows.")


def main() -> None:
    """Read the arguments, then train or predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="train on this CSV, JSONL or folder")
    what.add_argument("--predict", type=Path, help="write predictions for these rows with the model in --output")
    option = parser.add_argument
    option("--output", type=Path, required=True, help="folder of the model; new for training")
    option("--model", default="ViT-B-32", help="open_clip's name, hf-hub:... or local-dir:... (default: ViT-B-32)")
    option("--pretrained", help="tag or checkpoint file of the weights; none: random")
    option(
        "--trainable", nargs="+", default=[], metavar="PATTERN", help="what of CLIP trains, as 'visual.proj' '*ln_*'"
    )
    option("--dataset", choices=list(READERS), help="what the folder is, if it is one that datasets/ has a reader of")
    option("--allow-gaps", action="store_true", help="picture files that are absent, and empty texts, are missing")
    option(
        "--missing-rate",
        type=float,
        default=0.0,
        help="share of the complete rows that lose image or text (default: 0)",
    )
    option("--missing", choices=[*MODALITIES, "both"], help="what is taken; both: half each (default: both)")
    option(
        "--missing-table",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what is missing instead: a .jsonl of protohead.simulate by ids, or MAP's .pt of train, val and test",
    )
    option(
        "--preset",
        choices=VARIANTS,
        help="DPL's published λ, margins, scale, lr, batch size and epochs for --dataset, --missing, --missing-rate, "
        "but for options that are given. λ is what ran: 0 where DPL's code multiplies the prototype loss by zero",
    )
    # On frozen features an epoch takes a second, and validation picks one of them; fine-tuning wants 3 to 10.
    option("--epochs", type=int, default=20, help="(default: 20)")
    option("--batch-size", type=int, default=64, help="(default: 64)")
    # Prototypes start with norms of 1 to 2 in hundreds of dimensions: steps of 0.01 turn them within some epochs.
    option("--lr", type=float, default=1e-2, help="learning rate of the head (default: 0.01)")
    # Larger ones soon destroy what CLIP knows.
    option("--encoder-lr", type=float, default=1e-5, help="learning rate of what is --trainable (default: 1e-5)")
    # Try scales of 16 to 64 and λ of 0.1 to 10, and keep what validates best.
    option("--scale", type=float, default=20.0, help="of the cosines (default: 20)")
    option("--margin", type=float, help="radians, for all cases (default: 0.1 for complete rows, 0.15 for others)")
    option("--weight", type=float, default=0.9, help="λ, of the prototype loss (default: 0.9)")
    option("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that load pictures")
    option("--seed", type=int, default=0, help="of the splits, what goes missing, and the training (default: 0)")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, notes = parser.parse_args(), ""
    if arguments.missing and not arguments.missing_rate and not arguments.missing_table:
        parser.error("Expected --missing-rate or --missing-table with --missing.")
    arguments.missing = arguments.missing or "both"
    if arguments.preset:
        if not arguments.dataset:
            parser.error("Expected --dataset with --preset.")
        wanted = (arguments.preset, arguments.dataset, arguments.missing, arguments.missing_rate)
        try:
            settings, notes = published(*wanted)
        except InputError as error:
            parser.error(str(error))
        parser.set_defaults(**settings, missing="both")
        arguments = parser.parse_args()  # What is given goes before.
    least = {"epochs": 1, "batch_size": 1, "workers": 0, "weight": 0, "lr": 0, "encoder_lr": 0, "seed": 0}
    for name, low in least.items():
        if not low <= getattr(arguments, name) < float("inf"):
            got = getattr(arguments, name)
            parser.error(f"Expected --{name.replace('_', '-')} to be {low} or more, but got {got}.")
    if not 0 <= arguments.missing_rate <= 1:
        parser.error(f"Expected --missing-rate to be from 0 to 1, but got {arguments.missing_rate}.")
    if arguments.missing_table and arguments.missing_rate and not arguments.preset:  # A preset goes by both.
        parser.error("Expected one of --missing-rate and --missing-table, but got both.")
    try:
        torch.zeros(1, device=arguments.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"Expected --device to be one that torch can use, but got {arguments.device!r}: {error}")
    try:
        if arguments.predict:
            use(arguments)
        else:
            if (arguments.output / "model.safetensors").exists():
                raise InputError(f"Expected --output to be a new folder, but {arguments.output} has a model.")
            arguments.output.mkdir(parents=True, exist_ok=True)
            if arguments.preset:
                used = ", ".join(f"{name} {getattr(arguments, name)}" for name in settings)
                print(f"{arguments.preset}: {used}. {notes}".rstrip())
            train(arguments)
    except InputError as error:
        # A loader's worker process hands an error on with its traceback as the message, of which this is the end.
        parser.error(str(error).strip().rsplit("InputError: ", 1)[-1])


if __name__ == "__main__":
    main()
