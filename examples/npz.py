"""Reads a file of features for the quickstart."""

from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

NAMES = ("image", "text", "label", "split")


class Split(NamedTuple):
    """Rows: (N, ΣD) concatenated features, zeros where a modality is missing, and (N,) labels."""

    features: Tensor
    labels: Tensor


def load(path: Path) -> tuple[dict[str, Split], dict[str, int], int]:
    """The complete rows of the three splits, the width of each modality, and the number of classes.

    Raises:
        ValueError: If the file is not in the format of the embedded one.
    """
    data = read(path)
    check(data)
    features = torch.from_numpy(np.hstack([data["image"], data["text"]]))
    labels = torch.from_numpy(data["label"].astype(np.int64))
    complete = data["image"].any(1) & data["text"].any(1)
    splits = {}
    for name in ("train", "val", "test"):
        chosen = torch.from_numpy(complete & (data["split"] == name))
        if not chosen.any():
            raise ValueError(f"Expected rows that have both modalities in the split {name!r}, but {path} has none.")
        splits[name] = Split(features[chosen], labels[chosen])
    classes = int(labels.max()) + 1
    if unknown := sorted(set(range(max(classes, 2))) - set(splits["train"].labels.tolist())):
        got = f"{unknown[:5]}{'...' if len(unknown) > 5 else ''} are not"
        raise ValueError(f"Expected two classes or more, from 0, all among the complete training rows, but {got}.")
    return splits, {name: data[name].shape[1] for name in ("image", "text")}, classes


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file."""
    wanted = "an .npz file with the arrays image (N, D), text (N, D), label (N,) and split (N,)"
    if not is_zipfile(path):
        what = "is not an .npz file" if path.exists() else "does not exist"
        raise ValueError(f"Expected {wanted}, but {path} {what}.")
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in NAMES if name in file}
    except (OSError, ValueError, BadZipFile) as error:
        raise ValueError(f"Expected {wanted}, but {path} cannot be read: {error}") from None
    if lacking := sorted(set(NAMES) - set(data)):
        raise ValueError(f"Expected {wanted}, but {path} lacks {lacking}.")
    return data


def check(data: dict[str, np.ndarray]) -> None:
    """Refuse arrays of other shapes, dtypes or values; make the features float32."""
    label, split = data["label"], data["split"]
    rows = len(label) if label.ndim else 0
    for name in ("image", "text"):
        x = data[name]
        if x.ndim != 2 or len(x) != rows or x.dtype.kind != "f":
            raise ValueError(f"Expected {name!r} to be floating-point ({rows}, D), but got {x.dtype} {x.shape}.")
        with np.errstate(over="ignore"):  # What overflows is refused, too.
            data[name] = x.astype(np.float32)
        if not (finite := np.isfinite(data[name]).all(1)).all():
            raise ValueError(
                f"Expected finite numbers, zeros where missing, but {name!r} row {finite.argmin()} is not."
            )
    if label.ndim != 1 or label.dtype.kind not in "iu" or label.min(initial=0) < 0:
        got = f"{label.dtype} {label.shape}"
        raise ValueError(f"Expected 'label' to be (N,) integers from 0, one class a row, but got {got}.")
    if split.shape != (rows,) or set(split.tolist()) != {"train", "val", "test"}:
        names = sorted({str(name) for name in split.ravel().tolist()})[:5]
        raise ValueError(f"Expected 'split' to be ({rows},) of 'train', 'val' and 'test', all three, but got {names}.")
