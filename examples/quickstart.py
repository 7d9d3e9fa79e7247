"""What happens to a classifier of pictures and titles when rows begin to lack one of the two?

The embedded data are frozen features of 3171 clip-art pictures and their titles, in 13 classes (examples/data). On them
this program compares

* `nn.Linear` on the concatenated features, zeros where a modality is missing;
* the head, trained with `head.loss` on the same tensors;
* the head in closed form, by `head.imprint`, without training.

(1) They are fitted on complete rows and tested where 70 % of the rows lack the picture, the text, or either (half of
them each); (2) they are fitted on rows with such gaps, too. What is trained has the same learning rates and epochs to
choose from, by macro-F1 on validation rows that are like the training rows: whoever trains on complete rows has no
others. The closed form has nothing to choose. The seed sets what is missing, the initialisation and the order of the
rows. Test rows are scored after all choices, once.
"""

import argparse
from pathlib import Path

EMBEDDED = Path(__file__).parent / "data" / "openclipart13_small_pca128.npz"


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described = "arrays image (N, D), text (N, D), label (N,), split (N,); rows where one is all zeros are left out"
    parser.add_argument("--data", type=Path, default=EMBEDDED, metavar="FILE.npz", help=described)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    described = "where the figure goes, and the scores beside it, as .csv (default: quickstart.png)"
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"), help=described)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import copy
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from npz import Split, load
from torch import nn
from torchmetrics.functional.classification import multiclass_f1_score
from tqdm import tqdm

from protohead import DecoupledPrototypeHead
from protohead.simulate import missing_table

METHODS = ("nn.Linear", "head, trained", "head, closed form")
SETTINGS = ("complete rows", "the same gaps")  # What the methods are fitted on.
MISSING = {"the picture": ["image"], "the text": ["text"], "either": ["image", "text"]}
RATE = 70  # %, of the table; these are the figure's:
RATES = (0, 10, 30, 50, 70, 90)
LEARNING_RATES = (1e-2, 3e-2, 1e-1)
EPOCHS = 15
BATCH_SIZE = 128

# (setting, what is missing, rate, method) to the test macro-F1 of each seed, in percent.
Scores = dict[tuple[str, str, int, str], np.ndarray]


def take_away(split: Split, missing: str, rate: int, widths: dict[str, int], seed: int) -> Split:
    """The rows, of which `rate` % lack what `missing` says: zeros stand there. A higher rate adds to a lower one."""
    table = missing_table(len(split.labels), list(widths), rate / 100, MISSING[missing], seed)
    keep = table.present.repeat_interleave(torch.tensor(list(widths.values())), dim=1)
    return Split(torch.where(keep, split.features, 0), split.labels)


@torch.no_grad()
def macro_f1(model: nn.Module, split: Split) -> float:
    """Of a model in eval mode, in percent."""
    logits = model(split.features)
    return 100 * multiclass_f1_score(logits, split.labels, num_classes=logits.shape[1], average="macro").item()


def fit(method: str, train: Split, val: Split, widths: dict[str, int], num_classes: int, seed: int) -> nn.Module:
    """The model, in eval mode. What is trained is kept as it was when its macro-F1 on `val` was best."""
    if method == "head, closed form":
        head = DecoupledPrototypeHead(widths, num_classes)
        head.imprint(train.features, train.labels)
        return head.eval()
    best: tuple[float, nn.Module] = -1.0, nn.Identity()
    for lr in LEARNING_RATES:
        torch.manual_seed(seed)
        model: nn.Module
        # This is the swap. The head reads from the zeros which modalities are missing.
        if method == "head, trained":
            model = DecoupledPrototypeHead(widths, num_classes)
        else:
            model = nn.Linear(sum(widths.values()), num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(EPOCHS):
            model.train()
            for batch in torch.randperm(len(train.labels)).split(BATCH_SIZE):
                x, y = train.features[batch], train.labels[batch]
                if isinstance(model, DecoupledPrototypeHead):
                    loss = model.loss(x, None, y)
                else:
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            score = macro_f1(model.eval(), val)
            if score > best[0]:
                best = score, copy.deepcopy(model)
    return best[1]


def run(path: Path, seeds: int) -> Scores:
    """Fit and test every method in both settings."""
    torch.set_num_threads(1)  # The products are small: threads only cost here, much where other work runs.
    data, widths, num_classes = load(path)
    scores: dict[tuple[str, str, int, str], list[float]] = {}
    fits = [(seed, gaps, method) for seed in range(seeds) for gaps in (None, *MISSING) for method in METHODS]
    for seed, gaps, method in tqdm(fits, unit="fit"):
        train, val, test = data["train"], data["val"], data["test"]
        if gaps is None:
            setting, tests = SETTINGS[0], [(missing, rate) for missing in MISSING for rate in RATES]
        else:
            setting, tests = SETTINGS[1], [(gaps, RATE)]
            train = take_away(train, gaps, RATE, widths, 3 * seed)
            val = take_away(val, gaps, RATE, widths, 3 * seed + 1)
        model = fit(method, train, val, widths, num_classes, seed)
        for missing, rate in tests:
            score = macro_f1(model, take_away(test, missing, rate, widths, 3 * seed + 2))
            scores.setdefault((setting, missing, rate, method), []).append(score)
    return {key: np.array(values) for key, values in scores.items()}


def spread(values: np.ndarray) -> float:
    """Standard deviation over seeds."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def verdict(scores: Scores) -> str:
    """One sentence: how far each head is from nn.Linear, on average over what is missing."""

    def compared(setting: str, rate: int) -> list[str]:
        each = [np.mean([scores[setting, missing, rate, method] for missing in MISSING], axis=0) for method in METHODS]
        said = []
        for gain in (values - each[0] for values in each[1:]):
            mean, sd = round(gain.mean(), 1) + 0.0, round(spread(gain), 1)
            how = "level" if abs(mean) <= sd else "better" if mean > 0 else "worse"
            said.append(f"{how} ({mean:+.1f} ± {sd:.1f})".replace("-", "−"))
        return said

    complete, gaps, nothing = compared(SETTINGS[0], RATE), compared(SETTINGS[1], RATE), compared(SETTINGS[0], 0)
    seeds = len(scores[SETTINGS[0], "either", RATE, METHODS[0]])
    return (
        f"Against nn.Linear, with {RATE} % of the test rows incomplete, the trained head is {complete[0]} and the "
        f"closed form {complete[1]} if fitted on complete rows, {gaps[0]} and {gaps[1]} if fitted with the same gaps; "
        f"on complete test rows they are {nothing[0]} and {nothing[1]} "
        f"(macro-F1, ± sd over {seeds} paired seeds; a difference up to its sd is called level)."
    )


def table(scores: Scores) -> str:
    """One Markdown table: macro-F1 on test, mean ± standard deviation over seeds."""
    lines = [f"| fitted on | {RATE} % of test rows lack | {' | '.join(METHODS)} |", "|---" * 5 + "|"]
    for setting in SETTINGS:
        for missing in MISSING:
            each = [scores[setting, missing, RATE, method] for method in METHODS]
            cells = [f"{values.mean():.1f} ± {spread(values):.1f}" for values in each]
            lines.append(f"| {setting} | {missing} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save(scores: Scores, path: Path) -> None:
    """The scores as a table, one line a seed."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["fitted on", "missing", "rate", "method", "seed", "macro-F1"])
        writer.writerows((*key, seed, x) for key, values in scores.items() for seed, x in enumerate(values.tolist()))


def draw(scores: Scores, path: Path) -> None:
    """Macro-F1 as more test rows lack a modality, of what was fitted on complete rows."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    styles = dict(zip(METHODS, (("#707070", "s--"), ("#c1272d", "o-"), ("#000000", "^:")), strict=True))
    means, height = {}, 0.0
    for method, (color, style) in styles.items():
        means[method] = [np.mean([scores[SETTINGS[0], missing, r, method] for missing in MISSING]) for r in RATES]
        axis.plot(RATES, means[method], style, color=color, lw=2, ms=7)
    for method in sorted(METHODS, key=lambda method: means[method][-1]):
        y = means[method][-1]
        height = max(float(y), height + 0.055 * np.ptp(axis.get_ylim()))  # No label on another.
        axis.annotate(method, (RATES[-1] + 2, height), va="center", color=styles[method][0], weight="bold")
    falls = [f"{y[0] - y[-1]:.0f}" for y in means.values()]
    title = f"Fitted on complete rows, then {RATES[-1]} % of the test rows lack a modality:\n"
    title += f"nn.Linear loses {falls[0]} points, the trained head {falls[1]}, the closed form {falls[2]}"
    axis.set_title(title, loc="left", fontsize=11.5)
    axis.set(xlabel="test rows that lack a modality (%)", ylabel="test macro-F1 (%)", xlim=(-3, 124), xticks=RATES)
    axis.grid(axis="y", color="#eeeeee")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the comparison, print the table and the verdict, save the figure and the scores."""
    parser = options()
    arguments = parser.parse_args()
    figure = arguments.figure
    if arguments.seeds < 1:
        parser.error(f"Expected --seeds to be at least 1, but got {arguments.seeds}.")
    if not figure.absolute().parent.is_dir() or figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"Expected --figure to be a .png, .pdf or .svg in a folder that exists, but got {figure}.")
    try:
        scores = run(arguments.data, arguments.seeds)
    except ValueError as error:
        parser.error(str(error))
    print(f"{table(scores)}\n\n{verdict(scores)}")
    draw(scores, figure)
    save(scores, figure.with_suffix(".csv"))
    print(f"Figure: {figure}")


if __name__ == "__main__":
    main()
