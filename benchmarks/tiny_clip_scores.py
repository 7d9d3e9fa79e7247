"""What the tiny CLIP of examples/data knows: zero-shot and linear-probe scores on the 13 classes of clip art.

    python benchmarks/tiny_clip_scores.py

A linear probe is a logistic regression on the features of the training rows; its penalty is chosen on the validation
rows, and the test rows are scored once. Zero-shot compares with the class names.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_clip import clip_art, tiny_clip

PENALTIES = (0.003, 0.01, 0.03, 0.1)


def main() -> None:
    """Print a table."""
    clip, transform, tokenizer = tiny_clip()
    with open(clip_art() / "data.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    label = np.array([classes.index(row["label"]) for row in rows])
    split = np.array([row["split"] for row in rows])
    pictures = torch.stack([transform(Image.open(clip_art() / row["image"])) for row in rows])
    with torch.no_grad():
        image = torch.cat([clip.encode_image(part, normalize=True) for part in pictures.split(256)])
        text = clip.encode_text(tokenizer([row["text"] for row in rows]), normalize=True)
        names = clip.encode_text(tokenizer(classes), normalize=True)
    print("| features | zero-shot, test | linear probe: accuracy, test | macro-F1, test | accuracy, validation |")
    print("|---|---|---|---|---|")
    for name, x in (("image", image), ("text", text), ("both", torch.cat([image, text], dim=1))):
        zero = ""
        if name != "both":
            right = (x @ F.normalize(names, dim=1).T).argmax(1).numpy() == label
            zero = f"{100 * right[split == 'test'].mean():.1f}"
        scores = " | ".join(f"{100 * score:.1f}" for score in probe(x.numpy(), label, split))
        print(f"| {name} | {zero} | {scores} |")


def probe(x: NDArray[np.float32], label: NDArray[np.int64], split: NDArray[np.str_]) -> tuple[float, float, float]:
    """Accuracy and macro-F1 on test, accuracy on validation, of the penalty that is best there."""
    x = StandardScaler().fit(x[split == "train"]).transform(x)
    train, val, test = (split == part for part in ("train", "val", "test"))
    models = [LogisticRegression(C=c, max_iter=1000).fit(x[train], label[train]) for c in PENALTIES]
    best = max(models, key=lambda model: model.score(x[val], label[val]))
    found = best.predict(x[test])
    return (found == label[test]).mean(), f1_score(label[test], found, average="macro"), best.score(x[val], label[val])


if __name__ == "__main__":
    main()
