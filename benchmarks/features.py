"""Frozen features and labels from an .npz file, for accuracy.py."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "val", "test")


class Data(NamedTuple):
    """N rows of frozen features."""

    name: str
    features: dict[str, Tensor]  # name to (N, D_m), zeros where missing
    present: Tensor  # (N, M) bool: what the rows have
    labels: Tensor  # (N,) int64, or (N, K) float32 of 0 and 1
    rows: dict[str, Tensor]  # split to its row numbers
    num_classes: int
    digest: str  # of the file
    group: Tensor  # (N,) int64: rows of one number, near-duplicates, are never in two splits

    @property
    def widths(self) -> dict[str, int]:
        """What a head is built with."""
        return {name: x.shape[1] for name, x in self.features.items()}

    def split_anew(self, seed: int) -> "Data":
        """The training and validation rows in new splits of 60, 20 and 20 % of their groups; no test row is in any."""
        known = torch.cat([self.rows["train"], self.rows["val"]])
        groups, group = self.group[known].unique(return_inverse=True)
        place = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))[group] / len(groups)
        parts = place < 0.6, (place >= 0.6) & (place < 0.8), place >= 0.8
        rows = {name: known[part] for name, part in zip(SPLITS, parts, strict=True)}
        return self._replace(name=f"{self.name}, new splits", rows=rows)


def load(path: Path, modalities: tuple[str, ...] = ("image", "text")) -> Data:
    """Read arrays named like the modalities (N, D), `label` (N,) or (N, K) of 0 and 1, and `split` (N,).

    A modality is missing in a row where `has_<name>` says so, or its features are zeros; rows with nothing are left
    out. `group` (N,), if there, are integers: see :class:`Data`.

    Raises:
        ValueError: If the file holds anything else.
    """
    wanted = f"an .npz file with the arrays {', '.join(modalities)}, label and split"
    if len(modalities) < 2:
        raise ValueError(f"Expected two modalities or more, but got {modalities}.")
    try:
        with np.load(path) as file:
            data = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError) as error:  # TypeError: an .npy file.
        raise ValueError(f"Expected {wanted}, but {path} cannot be read: {error}") from None
    if lacking := [name for name in (*modalities, "label", "split") if name not in data]:
        raise ValueError(f"Expected {wanted}, but {path} lacks {lacking}; it has {sorted(data)}.")
    count = len(np.atleast_1d(data["label"]))
    features, columns = {}, []
    for name in modalities:
        x, has = data[name], data.get(f"has_{name}", np.ones(count, dtype=bool)).astype(bool)
        if x.ndim != 2 or len(x) != count or x.dtype.kind != "f":
            raise ValueError(f"Expected {name!r} to be floating-point ({count}, D), but got {x.dtype} {x.shape}.")
        if has.shape != (count,):
            raise ValueError(f"Expected 'has_{name}' to be of shape ({count},), but got {has.shape}.")
        x = np.where(has[:, None], x, 0).astype(np.float32)
        if not (finite := np.isfinite(x).all(1)).all():
            raise ValueError(f"Expected finite numbers, but {name!r} row {finite.argmin()} has others.")
        features[name] = torch.from_numpy(x)
        columns.append(features[name].any(1))
    present = torch.stack(columns, dim=1)
    labels, num_classes = _read_labels(data["label"])
    split = data["split"].astype(str)
    if split.shape != (count,) or set(split.tolist()) != set(SPLITS):
        got = f"{split.shape} of {sorted(set(split.ravel().tolist()))[:5]}"
        raise ValueError(f"Expected 'split' to be ({count},) of {SPLITS}, all three, but got {got}.")
    rows = {name: torch.from_numpy(split == name).logical_and(present.any(1)).nonzero()[:, 0] for name in SPLITS}
    if empty := [name for name, chosen in rows.items() if not len(chosen)]:
        raise ValueError(f"Expected rows with features in every split, but {empty} have none in {path}.")
    known = labels[rows["train"]]
    seen = known.any(0).nonzero()[:, 0].tolist() if labels.dim() == 2 else known.tolist()
    if unknown := sorted(set(range(num_classes)) - set(seen)):
        raise ValueError(f"Expected every class in the training split of {path}, but {unknown[:5]} are not.")
    name = path.stem if modalities == ("image", "text") else f"{path.stem}, {'+'.join(modalities)}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    group = np.asarray(data.get("group", np.arange(count)))
    if group.shape != (count,) or group.dtype.kind not in "iu":
        raise ValueError(f"Expected 'group' to be ({count},) integers, but got {group.dtype} {group.shape}.")
    groups = torch.from_numpy(group.astype(np.int64))
    return Data(name, features, present, labels, rows, num_classes, digest, groups)


def _read_labels(label: np.ndarray) -> tuple[Tensor, int]:
    if label.ndim == 1 and label.dtype.kind in "iu" and label.min(initial=0) >= 0:
        return torch.from_numpy(label.astype(np.int64)), int(label.max()) + 1
    if label.ndim == 2 and label.dtype.kind in "biuf" and np.isin(label, (0, 1)).all():
        return torch.from_numpy(label.astype(np.float32)), label.shape[1]
    wanted = "(N,) integers from 0, or (N, K) of 0 and 1"
    raise ValueError(f"Expected 'label' to be {wanted}, but got {label.dtype} {label.shape}.")
