"""The head in closed form: how its shrinkage is chosen, against training, new classes, unknown ones, and what it costs.

    python benchmarks/closed_form.py [FILE.npz ...] > benchmarks/closed_form.md     # default: the embedded data
    python benchmarks/closed_form.py --cost                                         # a million rows, made on the fly

Training, validation and test rows lack image, text or either in 70 % of the rows; means and standard deviations are of
five seeds (of the missing tables, the order of the rows, and the classes that are left out). All scores are those of
the test split. What is trained has its learning rate and epoch from the validation split, by macro-F1; the closed form
looks at training rows only.
"""

import argparse
import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import SMALL, Rows, rows_of, validate
from features import Data, load
from shots import train
from sklearn.covariance import ledoit_wolf_shrinkage, oas
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from protohead import DecoupledPrototypeHead
from protohead.objective import classification_loss

RATE = 0.7
LEFT_OUT = 3  # Classes.
Scores = defaultdict[tuple[str, ...], list[float]]


def build(data: Data, num_classes: int | None = None) -> DecoupledPrototypeHead:
    """An untrained head."""
    return DecoupledPrototypeHead(data.widths, num_classes or data.num_classes)


def imprinted(data: Data, rows: Rows, shrinkage: float | None = None) -> DecoupledPrototypeHead:
    """A head in closed form."""
    head = build(data)
    head.imprint(rows.features, rows.labels, rows.present, shrinkage)
    return head


def score(head: DecoupledPrototypeHead, validation: Rows, rows: Rows) -> dict[str, float]:
    """Macro-F1 in percent, for several labels with the threshold of the validation split; and the loss per row."""
    with torch.no_grad():
        logits, known = head.eval()(*rows[:2]), head(*validation[:2])
    losses, weights = classification_loss(logits, rows.labels)
    if rows.labels.is_floating_point():
        _, threshold = validate(known, validation.labels)
        at = torch.tensor(threshold).logit()
        logits = torch.where(logits > at, 1.0, -1.0)
        said, true = (logits > 0).double(), rows.labels.double()
        f1 = 2 * (said * true).sum(0) / (said.sum(0) + true.sum(0)).clamp(min=1)
        return {"macro-F1": 100 * f1.mean().item(), "loss": (losses.sum() / weights.sum()).item()}
    return {"macro-F1": 100 * validate(logits, rows.labels)[0], "loss": (losses.sum() / weights.sum()).item()}


# -- which shrinkage --------------------------------------------------------------------------------------------------


def by_estimate(data: Data, rows: Rows, by: Callable[[np.ndarray], float]) -> DecoupledPrototypeHead:
    """A head in closed form with an estimator's shrinkage of the rows around class means, the modalities' mean."""
    found = []
    for x, here in zip(rows.features.values(), rows.present.T, strict=True):
        unit = F.normalize(x[here] - x[here].mean(0), dim=1).double()
        labels = rows.labels[here]
        if labels.is_floating_point():
            spread = unit
        else:
            means = torch.stack([unit[labels == k].mean(0).nan_to_num() for k in range(int(labels.max()) + 1)])
            spread = unit - means[labels]
        found.append(float(by(spread.numpy())))
    return imprinted(data, rows, float(np.mean(found)))


def timed(call: Callable[[], DecoupledPrototypeHead]) -> tuple[DecoupledPrototypeHead, float]:
    """What is returned, and the seconds that it took."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def compare(data: Data, seeds: int) -> None:
    """Print a table of the ways to choose the shrinkage, and of training."""
    scores: Scores = defaultdict(list)
    settings = [*data.features, "all"]
    for seed in tqdm(range(seeds), unit="seed", desc=data.name, leave=False):
        torch.manual_seed(seed)
        start = build(data)
        for missing in settings:
            training, validation, test = (rows_of(data, s, missing, RATE, seed) for s in ("train", "val", "test"))
            ways: dict[str, Callable[[], DecoupledPrototypeHead]] = {
                "class means": partial(imprinted, data, training, 1.0),
                "Ledoit-Wolf": partial(by_estimate, data, training, ledoit_wolf_shrinkage),
                "OAS": partial(by_estimate, data, training, lambda x: oas(x)[1]),
                "held-out rows": partial(imprinted, data, training),
                "trained": partial(train, start, training, validation, seed),
            }
            for name, way in ways.items():
                head, seconds = timed(way)
                for what, value in score(head, validation, test).items():
                    scores[name, missing, what].append(value)
                scores[name, "seconds"].append(seconds)
    print(f"\n## {data.name}\n")
    columns = [f"{what}, {missing}" for what in ("macro-F1", "loss") for missing in settings]
    print(f"| shrinkage | {' | '.join(columns)} | seconds |\n|{'---|' * (len(columns) + 2)}")
    for name in ways:
        cells = [mean(scores[name, missing, what]) for what in ("macro-F1", "loss") for missing in settings]
        print(f"| {name} | {' | '.join(cells)} | {np.median(scores[name, 'seconds']):.2f} |")


def mean(values: list[float]) -> str:
    """Mean and standard deviation."""
    digits = 1 if np.mean(values) > 10 else 3
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"


# -- classes that come later, and unknown ones ------------------------------------------------------------------------


def without_some(data: Data, rows: Rows, seed: int) -> tuple[Tensor, Tensor]:
    """(K,) new numbers of the classes, of which the last are left out; and (N,) bool, the rows of these."""
    order = torch.randperm(data.num_classes, generator=torch.Generator().manual_seed(seed))
    number = torch.empty_like(order)
    number[order] = torch.arange(data.num_classes)
    return number, number[rows.labels] >= data.num_classes - LEFT_OUT


def later(data: Data, seeds: int) -> None:
    """Print a table of the ways to add classes to a head."""
    scores: Scores = defaultdict(list)
    for seed in range(seeds):
        training, test = (rows_of(data, split, "all", RATE, seed) for split in ("train", "test"))
        number, new = without_some(data, training, seed)
        training, test = training._replace(labels=number[training.labels]), test._replace(labels=number[test.labels])
        old, added = training.take(~new), training.take(new)
        head = build(data, data.num_classes - LEFT_OUT)
        moments = head.imprint(old.features, old.labels, old.present)
        head.add_classes(LEFT_OUT)
        classes = range(data.num_classes - LEFT_OUT, data.num_classes)
        heads = {"all anew": imprinted(data, training)}
        for name, known in (("with the sums kept", moments), ("without", None)):
            heads[name] = copy.deepcopy(head)
            heads[name].imprint(added.features, added.labels, added.present, classes=classes, moments=known)
        for name, one in heads.items():
            with torch.no_grad():
                logits = one.eval()(*test[:2])
            for kind, rows in (
                ("all", test.labels >= 0),
                ("old", test.labels < classes[0]),
                ("new", test.labels >= classes[0]),
            ):
                right = (logits.argmax(1) == test.labels)[rows]
                each = [right[test.labels[rows] == k].float().mean().item() for k in test.labels[rows].unique()]
                scores[name, kind].append(100 * float(np.mean(each)))
    print(f"\n{LEFT_OUT} of {data.num_classes} classes come later; mean accuracy of the classes, all kinds of rows:\n")
    print("| the new classes | all classes | old | new |\n|---|---|---|---|")
    for name in heads:
        print(f"| {name} | {' | '.join(mean(scores[name, kind]) for kind in ('all', 'old', 'new'))} |")


def distances(head: DecoupledPrototypeHead, shrinkage: float, training: Rows, rows: Rows) -> tuple[Tensor, Tensor]:
    """Squared Mahalanobis distances to the nearest class, and the same less that to all rows, both (N,).

    They are means over the modalities that a row has.
    """
    assert head.center is not None
    total, relative = (torch.zeros(len(rows.labels), head.num_classes, dtype=torch.float64) for _ in range(2))
    centers = head.center.split(list(head.in_features.values()))
    for m, (name, center) in enumerate(zip(head.modalities, centers, strict=True)):
        here = training.present[:, m]
        unit, labels = F.normalize(training.features[name][here].double() - center, dim=1), training.labels[here]
        means = torch.stack([unit[labels == k].mean(0) for k in range(head.num_classes)])
        x = F.normalize(rows.features[name].double() - center, dim=1)
        whole, within = (
            _squared(spread, x[:, None] - at, shrinkage) for spread, at in ((unit, 0), (unit - means[labels], means))
        )
        total += torch.where(rows.present[:, m, None], within, 0)
        relative += torch.where(rows.present[:, m, None], within - whole, 0)
    count = rows.present.sum(1)
    return total.amin(1) / count, relative.amin(1) / count


def _squared(spread: Tensor, x: Tensor, shrinkage: float) -> Tensor:
    covariance = spread.T @ spread / len(spread)
    eye = torch.eye(len(covariance), dtype=torch.float64)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / len(eye) * eye
    return torch.einsum("bkd,de,bke->bk", x, torch.linalg.inv(shrunk), x) / len(eye)


def unknown(data: Data, seeds: int) -> None:
    """Print a table of how well rows of classes that training lacked are told from others."""
    scores: Scores = defaultdict(list)
    for seed in range(seeds):
        training, validation, test = (rows_of(data, s, "all", RATE, seed) for s in ("train", "val", "test"))
        number, new = without_some(data, training, seed)
        known = training.take(~new)._replace(labels=number[training.labels[~new]])
        kept = validation.take(~without_some(data, validation, seed)[1])
        kept = kept._replace(labels=number[kept.labels])
        _, other = without_some(data, test, seed)
        closed = build(data, data.num_classes - LEFT_OUT)
        shrinkage = closed.imprint(known.features, known.labels, known.present)["image"]["shrinkage"].item()
        torch.manual_seed(seed)
        trained = train(build(data, data.num_classes - LEFT_OUT), known, kept, seed)
        found = {}
        for name, head in (("closed form", closed), ("trained", trained)):
            with torch.no_grad():
                logits = head.eval()(*test[:2]).double()
            found[f"{name}, maximum softmax"] = -logits.softmax(1).amax(1)
            found[f"{name}, maximum logit"] = -logits.amax(1)
        names = "Mahalanobis distance", "relative Mahalanobis distance"
        found |= dict(zip(names, distances(closed, shrinkage, known, test), strict=True))
        for name, unlike in found.items():
            for case, rows in _cases(test.present, list(data.features)).items():
                order = unlike[rows].argsort().argsort() / rows.sum()
                scores[name, case].append(100 * binary_auroc(order, other[rows].long()).item())
    cases = list(dict.fromkeys(case for _, case in scores))
    print(f"\n{LEFT_OUT} classes are unknown; AUROC of telling their rows from others, by missing case:\n")
    print(f"| score | {' | '.join(cases)} |\n|{'---|' * (len(cases) + 1)}")
    for name in found:
        print(f"| {name} | {' | '.join(mean(scores[name, case]) for case in cases)} |")


def _cases(present: Tensor, modalities: list[str]) -> dict[str, Tensor]:
    alone = {name: present[:, m] & (present.sum(1) == 1) for m, name in enumerate(modalities)}
    return {"all rows": present.any(1), "complete": present.all(1), **alone}


# -- cost -------------------------------------------------------------------------------------------------------------


def cost(rows: int, width: int, num_classes: int) -> None:
    """Print what a pass over rows of two modalities takes, made on the fly: they are never all there."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(num_classes, 2 * width, generator=generator)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(0, rows, 8192):
            labels = torch.randint(num_classes, (8192,), generator=generator)
            noise = torch.empty(8192, 2 * width).uniform_(-2, 2, generator=generator)
            yield means[labels] + noise, labels, torch.rand(8192, 2, generator=generator) < 0.7

    made, head = 0.0, DecoupledPrototypeHead({"image": width, "text": width}, num_classes)
    start = time.perf_counter()
    for _ in batches():
        pass
    made = time.perf_counter() - start
    start = time.perf_counter()
    head.imprint(batches())
    taken = time.perf_counter() - start - made
    print(f"| {rows:,} | {width} | {num_classes} | {taken:.0f} | {made:.0f} | {peak():.1f} |", flush=True)


def peak() -> float:
    """GB that this process has had at most; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", default=[SMALL], help="default: the embedded data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cost", action="store_true", help="time and memory only: some minutes, 8 GB")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of --cost")
    arguments = parser.parse_args()
    if arguments.cost:
        print("| rows | D, twice | K | seconds | to make the rows | GB at most |\n|---|---|---|---|---|---|")
        cost(arguments.rows, 1024, 100)
        cost(arguments.rows // 10, 4096, 100)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Of a modality that no row of a class has.
    for path in arguments.data:
        data = load(path)
        compare(data, arguments.seeds)
        if not data.labels.is_floating_point() and data.num_classes > 2 * LEFT_OUT:
            later(data, arguments.seeds)
            unknown(data, arguments.seeds)


if __name__ == "__main__":
    main()
