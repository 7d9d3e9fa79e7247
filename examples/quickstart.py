"""Swap `nn.Linear` for `DecoupledPrototypeHead` on real features, and see what that does where modalities are missing.

The embedded data are frozen features of 3171 clip-art pictures and their titles, in 13 classes (examples/data). At a
missing rate of 70 % (image, text, or both in turn), for training, validation and test alike, this program trains

* an `nn.Linear` on the concatenated features, zeros where a modality is missing;
* the head on the same features.

Both have the same epochs and learning rates to choose from, and choose by macro-F1 on the validation split. The seed
sets the missing table and the initialisation. The scores are those of the test split.
"""

import argparse
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, is_zipfile

HERE = Path(__file__).parent
SCALE = 20.0  # Chosen on validation, over this and two other data sets: see benchmarks/RESULTS.md.


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE / "data" / "openclipart13_small_pca128.npz"
    described = "arrays image (N, D), text (N, D), label (N,), split (N,); zeros where a modality is missing"
    parser.add_argument("--data", type=Path, default=default, metavar="FILE.npz", help=described)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    parser.add_argument("--scale", type=float, default=SCALE, help=f"the head's scale (default: {SCALE:g})")
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"), help="where the figure goes")
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from tqdm import tqdm

from protohead import DecoupledPrototypeHead
from protohead.simulate import missing_table

MISSING_RATE = 0.7
MISSING = ("image", "text", "both")
METHODS = ("nn.Linear", "head")
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
EPOCHS = 15
BATCH_SIZE = 64


class Split(NamedTuple):
    """One split of the data: (N, D) concatenated features, (N, 2) present mask, (N,) labels."""

    features: Tensor
    present: Tensor
    labels: Tensor


def load(path: Path) -> tuple[dict[str, Split], dict[str, int], int]:
    """The three splits, the width of each modality, and the number of classes.

    Raises:
        ValueError: If the file is not in the format of the embedded one.
    """
    wanted = "an .npz file with the arrays image (N, D), text (N, D), label (N,) and split (N,)"
    if not path.is_file() or not is_zipfile(path):
        what = "is not an .npz file" if path.exists() else "does not exist"
        raise ValueError(f"Expected {wanted}, but {path} {what}.")
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in ("image", "text", "label", "split") if name in file}
    except (OSError, ValueError, BadZipFile) as error:
        raise ValueError(f"Expected {wanted}, but {path} cannot be read: {error}") from None
    if lacking := {"image", "text", "label", "split"} - set(data):
        raise ValueError(f"Expected {wanted}, but {path} lacks {sorted(lacking)}.")
    rows = len(data["label"]) if data["label"].ndim else 0
    for name in ("image", "text"):
        if data[name].ndim != 2 or len(data[name]) != rows or data[name].dtype.kind != "f":
            got = f"{data[name].dtype} {data[name].shape}"
            raise ValueError(f"Expected {name!r} to be floating-point ({rows}, D), but got {got}.")
        with np.errstate(over="ignore"):  # What overflows is refused below.
            data[name] = data[name].astype(np.float32)
        if not (finite := np.isfinite(data[name]).all(1)).all():
            raise ValueError(
                f"Expected finite numbers (zeros where missing), but {name!r} row {finite.argmin()} is not."
            )
    if data["label"].ndim != 1 or data["label"].dtype.kind not in "iu" or data["label"].min(initial=0) < 0:
        got = f"{data['label'].dtype} {data['label'].shape}"
        raise ValueError(f"Expected 'label' to be (N,) integers from 0, one class a row, but got {got}.")
    if data["split"].shape != (rows,) or set(data["split"].tolist()) != {"train", "val", "test"}:
        names = sorted({str(name) for name in data["split"].ravel().tolist()})[:5]
        raise ValueError(f"Expected 'split' to be ({rows},) of 'train', 'val' and 'test', all three, but got {names}.")

    features = {name: torch.from_numpy(data[name]) for name in ("image", "text")}
    present = torch.stack([(x != 0).any(1) for x in features.values()], dim=1)
    labels = torch.from_numpy(data["label"].astype(np.int64))
    splits = {}
    for name in ("train", "val", "test"):
        chosen = torch.from_numpy((data["split"] == name) & present.any(1).numpy())
        splits[name] = Split(torch.cat(list(features.values()), dim=1)[chosen], present[chosen], labels[chosen])
        if not chosen.any():
            raise ValueError(
                f"Expected rows in the split {name!r} that are not all zeros, but there are none in {path}."
            )
    classes = int(labels.max()) + 1
    if unknown := sorted(set(range(max(classes, 2))) - set(splits["train"].labels.tolist())):
        got = f"{unknown[:5]}{'...' if len(unknown) > 5 else ''} are not"
        raise ValueError(f"Expected two classes or more, numbered from 0, all in the training split, but {got} in it.")
    return splits, {name: x.shape[1] for name, x in features.items()}, classes


def let_go_missing(split: Split, missing: str, widths: dict[str, int], seed: int) -> Split:
    """Take `missing` away from 70 % of the rows; for "both", the image from one half of these, the text from the other.

    A row that lacks something already keeps what it has.
    """
    present = missing_table(len(split.labels), list(widths), MISSING_RATE, missing, seed, present=split.present).present
    keep = present.repeat_interleave(torch.tensor(list(widths.values())), dim=1)
    return Split(torch.where(keep, split.features, 0), present, split.labels)


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Macro-averaged F1, in percent."""
    return 100 * multiclass_f1_score(logits, labels, num_classes=logits.shape[1], average="macro").item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Accuracy over all rows, in percent."""
    return 100 * multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro").item()


def train(
    method: str,
    splits: dict[str, Split],
    widths: dict[str, int],
    num_classes: int,
    lr: float,
    seed: int,
    scale: float,
) -> tuple[float, Tensor, Tensor]:
    """Train one model; its best macro-F1 on validation over the epochs, and its logits on validation and test then."""
    torch.manual_seed(seed)
    # This is the swap. The head reads from the zeros which modalities are missing.
    model: nn.Module
    if method == "head":
        model = DecoupledPrototypeHead(widths, num_classes, scale=scale)
    else:
        model = nn.Linear(sum(widths.values()), num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rows, best = splits["train"], (-1.0, torch.empty(0), torch.empty(0))
    for _ in range(EPOCHS):
        model.train()
        for batch in torch.randperm(len(rows.labels)).split(BATCH_SIZE):
            x, y = rows.features[batch], rows.labels[batch]
            if isinstance(model, DecoupledPrototypeHead):  # noqa: SIM108 - this is what changes, in the open
                loss = model.loss(x, None, y)
            else:
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(splits["val"].features)
            score = macro_f1(logits, splits["val"].labels)
            if score > best[0]:
                best = score, logits, model(splits["test"].features)
    return best


def run(path: Path, seeds: int, scale: float) -> dict[tuple[str, str, str], np.ndarray]:
    """(missing, case, method) -> (seeds, 2) macro-F1 and accuracy on test, and on validation for the last case."""
    data, widths, num_classes = load(path)
    torch.set_num_threads(1)  # The products are small: threads only cost here, much where other work runs.
    scores: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with tqdm(total=len(MISSING) * seeds * len(METHODS) * len(LEARNING_RATES), unit="run") as progress:
        for missing in MISSING:
            for seed in range(seeds):
                tables = {name: 3 * seed + number for number, name in enumerate(data)}
                splits = {name: let_go_missing(data[name], missing, widths, table) for name, table in tables.items()}
                for method in METHODS:
                    progress.set_description(f"{missing} missing, seed {seed}, {method}")
                    runs = []
                    for lr in LEARNING_RATES:
                        runs.append(train(method, splits, widths, num_classes, lr, seed, scale))
                        progress.update()
                    _, validation, logits = max(runs, key=lambda run: run[0])
                    present, labels = splits["test"].present, splits["test"].labels
                    cases = {
                        "image+text": present.all(1),
                        "image": present[:, 0] & ~present[:, 1],
                        "text": present[:, 1] & ~present[:, 0],
                        "all rows": torch.ones_like(present[:, 0]),
                    }
                    for case, rows in cases.items():
                        if rows.any():
                            score = macro_f1(logits[rows], labels[rows]), accuracy(logits[rows], labels[rows])
                            scores.setdefault((missing, case, method), []).append(score)
                    score = macro_f1(validation, splits["val"].labels), accuracy(validation, splits["val"].labels)
                    scores.setdefault((missing, "all rows, validation", method), []).append(score)
    return {key: np.array(values) for key, values in scores.items()}


def deviation(values: np.ndarray) -> float:
    """Standard deviation over seeds."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def table(scores: dict[tuple[str, str, str], np.ndarray]) -> str:
    """One Markdown table, then one line that says what it shows."""
    lines = [
        "| 70 % missing | rows with | macro-F1 nn.Linear | macro-F1 head | accuracy nn.Linear | accuracy head |",
        "|---|---|---|---|---|---|",
    ]
    for missing, case in dict.fromkeys(key[:2] for key in scores):
        linear, head = (scores[missing, case, method] for method in METHODS)
        columns = [scores[:, metric] for metric in (0, 1) for scores in (linear, head)]
        cells = [f"{values.mean():.1f} ± {deviation(values):.1f}" for values in columns]
        lines.append(f"| {missing} | {case} | {' | '.join(cells)} |")
    gains = [scores[m, "all rows", "head"][:, 0] - scores[m, "all rows", "nn.Linear"][:, 0] for m in MISSING]
    gain = np.mean(gains, axis=0)
    where = ", ".join(f"{missing} {x.mean():+.1f}" for missing, x in zip(MISSING, gains, strict=True))
    verdict = "better" if gain.mean() > 0 else "worse"
    lines.append("")
    lines.append(
        f"Over all test rows the head is {abs(gain.mean()):.1f} points of macro-F1 {verdict} than nn.Linear "
        f"(sd {deviation(gain):.1f} over {len(gain)} seeds, paired; by what is missing: {where})."
    )
    return "\n".join(lines)


def draw(scores: dict[tuple[str, str, str], np.ndarray], path: Path) -> None:
    """Macro-F1 by missing case: a dot and its standard deviation per method, one panel per missing setting."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(MISSING), figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = {"image": "70 % of images missing", "text": "70 % of texts missing", "both": "35 % + 35 % missing"}
    names = {"image+text": "image\n+ text", "image": "image\nonly", "text": "text\nonly", "all rows": "all\nrows"}
    styles = {"nn.Linear": ("#8a8f98", "s"), "head": ("#d1495b", "o")}
    for axis, missing in zip(axes, MISSING, strict=True):
        cases = [case for m, case, method in scores if m == missing and method == "head" and case in names]
        means = {method: [scores[missing, case, method][:, 0].mean() for case in cases] for method in METHODS}
        axis.vlines(range(len(cases)), means["nn.Linear"], means["head"], color="#d9dce1", linewidth=6, zorder=1)
        for shift, method in zip((-0.07, 0.07), METHODS, strict=True):
            color, marker = styles[method]
            bars = [deviation(scores[missing, case, method][:, 0]) for case in cases]
            x = np.arange(len(cases)) + shift
            label = {"head": "DecoupledPrototypeHead"}.get(method, method)
            axis.errorbar(x, means[method], bars, fmt=marker, color=color, ms=7, capsize=3, lw=1.2, label=label)
        for position, (low, high) in enumerate(zip(means["nn.Linear"], means["head"], strict=True)):
            axis.annotate(
                f"{high - low:+.1f}", (position + 0.17, (low + high) / 2), va="center", fontsize=9, color="#444b55"
            )
        axis.set_xticks(range(len(cases)), [names[case] for case in cases])
        axis.set_xlim(-0.5, len(cases) - 0.3)
        axis.set_title(titles[missing], fontsize=11)
        axis.grid(axis="y", color="#eceef1")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("test macro-F1 (%), mean ± sd")
    axes[0].legend(frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the comparison, print the table, save the figure."""
    parser = options()
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"Expected --seeds to be at least 1, but got {arguments.seeds}.")
    if not 0 < arguments.scale < float("inf"):
        parser.error(f"Expected a positive --scale, but got {arguments.scale:g}.")
    if not arguments.figure.absolute().parent.is_dir() or arguments.figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"Expected --figure to be a .png, .pdf or .svg in a folder that exists, not {arguments.figure}.")
    try:
        scores = run(arguments.data, arguments.seeds, arguments.scale)
    except ValueError as error:
        parser.error(str(error))
    print(table(scores))
    draw(scores, arguments.figure)
    print(f"Figure: {arguments.figure}")


if __name__ == "__main__":
    main()
