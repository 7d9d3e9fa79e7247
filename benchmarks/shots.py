"""Without training: `head.imprint` with few rows of each class, and whether training goes better from there.

    python benchmarks/shots.py [FILE.npz] [--names FILE.npz]

For 1, 4, 16 and all complete training rows of each class: macro-F1 by missing case on the test split, of which 70 %
lacks image or text, of class means, of the closed form, of a head trained from there (with the scale of training), and
of one trained from the random start.
Training takes its learning rate and epoch from the validation split. The mean and standard deviation of five seeds (of
the rows, the missing table and the start). With embeddings of the class names, which class_names.npz has for the
embedded data, also of no rows at all: prototypes of the modality that they are of, imprinted from the names.
"""

import argparse
import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from accuracy import BATCH_SIZE, EPOCHS, HERE, LEARNING_RATES, SMALL, Rows, rows_of, validate
from features import Data, load
from tqdm import tqdm

from protohead import DecoupledPrototypeHead
from protohead.metrics import evaluate

SHOTS = (1, 4, 16, 0)  # 0: all
STARTS = ("class means", "closed form", "closed form, then trained", "random, then trained")


def pick(training: Rows, shots: int, num_classes: int, seed: int) -> Rows:
    """So many rows of each class, where there are as many."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(training.labels), generator=generator)
    if shots:
        of_class = [order[training.labels[order] == k][:shots] for k in range(num_classes)]
        order = torch.cat(of_class)
    return training.take(order)


def train(head: DecoupledPrototypeHead, training: Rows, validation: Rows, seed: int) -> DecoupledPrototypeHead:
    """The head at its best epoch and learning rate by validation."""
    best, chosen = -1.0, head
    for rate in LEARNING_RATES:
        torch.manual_seed(seed)
        model = copy.deepcopy(head)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        for _ in range(EPOCHS):
            model.train()
            for index in torch.randperm(len(training.labels)).split(BATCH_SIZE):
                batch = training.take(index)
                optimizer.zero_grad()
                model.loss(*batch).backward()
                optimizer.step()
            with torch.no_grad():
                score, _ = validate(model.eval()(*validation[:2]), validation.labels)
            if score > best:
                best, chosen = score, copy.deepcopy(model)
    return chosen


def named(path: Path, data: Data) -> DecoupledPrototypeHead:
    """A head imprinted with embeddings of class names, (P, D) by modality, and their `label` (P,)."""
    with np.load(path) as file:
        rows = {name: torch.from_numpy(file[name]).float() for name in data.features if name in file}
        labels = torch.from_numpy(file["label"])
    # Rows are classified by the modalities that there are names in; the others have not been seen.
    head = DecoupledPrototypeHead(data.widths, data.num_classes, cases="all")
    imprint(head, Rows(rows, None, labels), shrinkage=1)  # type: ignore[arg-type]
    return head


def imprint(head: DecoupledPrototypeHead, rows: Rows, shrinkage: float | None = None) -> None:
    """Without a word on what has no rows: few rows of a class may all lack a modality, and so may names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head.imprint(rows.features, rows.labels, rows.present, shrinkage)


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=SMALL, help="one label a row; default: the embedded data")
    parser.add_argument("--names", type=Path, help="embeddings of class names in some of the modalities, and label")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    names = arguments.names or (HERE / "class_names.npz" if arguments.data == SMALL else None)
    try:
        data = load(arguments.data)
    except ValueError as error:
        parser.error(str(error))
    if data.labels.is_floating_point():
        parser.error("Expected one label a row, but got several.")
    torch.set_num_threads(1)
    scores: dict[tuple[int | str, str], dict[str, list[float]]] = {}

    def add(key: tuple[int | str, str], head: DecoupledPrototypeHead, test: Rows) -> None:
        with torch.no_grad():
            logits = head.eval()(*test[:2])
        for row in evaluate(logits, test.labels, test.present, list(data.features)).rows():
            scores.setdefault(key, {}).setdefault(str(row["case"]), []).append(100 * float(row["macro_f1"]))

    for seed in tqdm(range(arguments.seeds), unit="seed"):
        whole = rows_of(data, "train", "none", 0.0, seed)
        validation, test = (rows_of(data, split, "all", 0.7, seed) for split in ("val", "test"))
        if names:
            add(("none", "class names"), named(names, data), test)
        for shots in SHOTS:
            training = pick(whole, shots, data.num_classes, seed)
            torch.manual_seed(seed)
            random = DecoupledPrototypeHead(data.widths, data.num_classes)
            means, closed = copy.deepcopy(random), copy.deepcopy(random)
            imprint(means, training, shrinkage=1)
            imprint(closed, training)
            start = copy.deepcopy(closed)
            start.scale.copy_(random.scale)
            heads = means, closed, *(train(head, training, validation, seed) for head in (start, random))
            for name, head in zip(STARTS, heads, strict=True):
                add((shots or "all", name), head, test)
    cases = list(next(iter(scores.values())))
    print(f"| rows a class | start | {' | '.join(cases)} |\n|{'---|' * (2 + len(cases))}")
    for key, found in scores.items():
        cells = [f"{np.mean(found[case]):.1f} ± {np.std(found[case], ddof=1):.1f}" for case in cases]
        print(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
