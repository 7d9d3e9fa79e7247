"""Sums over rows, by which :mod:`protohead.closed_form` finds prototypes: one pass, bounded memory, any order."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from protohead.cosine import NOISE
from protohead.sharding import from_all_ranks, sum_over_ranks

__all__ = [
    "CHUNK",
    "Moments",
    "Rows",
    "add",
    "by_modality",
    "collect",
    "empty",
    "means",
    "origins_at",
    "plus",
    "seen_from",
]

# Of each modality, with rows u = [x − origin, 1] / ‖x − origin‖, from whose sums follow those for any other center:
#   origin (D,), near () what is nearer to the origin counts as if it were at that distance; the rest are sums:
#   total (D + 1,) of [x − origin, 1], second (D + 1, D + 1) of u uᵀ, by_class (K, D + 1) of u, rows (K,) of 1.
Moments = dict[str, dict[str, Tensor]]
SUMS = ("total", "second", "by_class", "rows")

SAMPLE = 10_000  # Rows;
LOGITS = 4_000_000  # fewer where so many logits come of fewer,
FEWEST = 2_000  # but not fewer than these.
CHUNK = 2**13  # Rows at a time.
NEAR = 0.01  # Of the usual distance from the origin.


class Rows(NamedTuple):
    """Rows that count: those with a label and a modality."""

    features: Tensor  # (N, ΣD_m), float32 or wider
    labels: Tensor  # (N,) int64 in [0, K), or (N, K) in [0, 1]
    present: Tensor  # (N, M) bool

    def take(self, index: Tensor | slice) -> "Rows":
        """Some of the rows."""
        return Rows(*(x[index] for x in self))


def by_modality(rows: Rows, widths: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each modality the features of the rows that have it, and which rows these are."""
    for x, here in zip(rows.features.split_with_sizes(list(widths), 1), rows.present.T, strict=True):
        index = here.nonzero()[:, 0]
        yield x.index_select(0, index), index


def collect(
    batches: Iterable[Rows], widths: Mapping[str, int], num_classes: int, start: Moments | None, like: Tensor
) -> tuple[Moments, Rows | None]:
    """The sums of all rows, and a sample of the rows: None where there is no row.

    Each modality takes 8 (D + 1)² + 8 K (D + 1) bytes, and 2 D² operations a row; the sample up to 20,000 rows. With
    torch.distributed each rank has its own rows, and all ranks get the same.

    Args:
        batches: The rows, at most `CHUNK` at a time.
        widths: Name to D_m.
        num_classes: K.
        start: Where the origins are, such as other sums; by default they are the means of the first rows.
        like: Of the device and dtype of the sums.
    """
    batches, first = iter(batches), list[Rows]()
    while start is None and sum(len(rows.labels) for rows in first) < SAMPLE:
        if (rows := next(batches, None)) is None:
            break
        first.append(rows)
    moments = empty(start or _first_origins(first, widths, like), num_classes)
    size, limit, kept = max(FEWEST, min(SAMPLE, LOGITS // num_classes)), 1.0, list[Sequence[Tensor]]()
    generator = torch.Generator().manual_seed(0)
    for rows in chain(first, batches):
        add(moments, rows)
        draw = torch.rand(len(rows.labels), dtype=torch.float64, generator=generator).to(rows.labels.device)
        chosen = draw <= limit
        kept.append([draw[chosen], *rows.take(chosen)])
        if sum(len(part[0]) for part in kept) > 2 * size:
            kept = [_smallest(kept, size)]
            limit = float(kept[0][0][-1])
    for sums in moments.values():
        for name in SUMS:
            sum_over_ranks(sums[name])
    kept = [part for part in from_all_ranks(_smallest(kept, size) if kept else ()) if part]
    return moments, Rows(*_smallest(kept, size)[1:]) if kept else None


def _smallest(parts: Sequence[Sequence[Tensor]], size: int) -> list[Tensor]:
    """Of draws and the rows that they are of, those with the smallest draws: a random sample."""
    together = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    order = together[0].argsort(stable=True)[:size]
    return [x[order] for x in together]


def _first_origins(batches: Sequence[Rows], widths: Mapping[str, int], like: Tensor) -> Moments:
    """The mean of each modality's rows, and what is near to it."""
    sums, left = [like.new_zeros(width + 2) for width in widths.values()], SAMPLE
    for rows in batches:
        some = rows.take(slice(left))  # So that it does not matter how large the batches are.
        left -= len(some.labels)
        for total, (x, _) in zip(sums, by_modality(some, widths.values()), strict=True):
            x = x.to(like)
            total += torch.cat([x.sum(0), x.square().sum()[None], x.new_tensor([len(x)])])
    moments = {}
    for name, total in zip(widths, map(sum_over_ranks, sums), strict=True):
        average = total[:-1] / total[-1].clamp(min=1)
        variance = average[-1] - average[:-1].square().sum()
        moments[name] = {"origin": average[:-1], "near": NEAR * variance.clamp(min=0).sqrt()}
    return moments


def origins_at(names: Iterable[str], centers: Iterable[Tensor]) -> Moments:
    """Origins that are centers: nothing is too near to one that stays. They are copies, since a center may move."""
    return {name: {"origin": x.clone(), "near": x.new_zeros(())} for name, x in zip(names, centers, strict=True)}


def empty(moments: Moments, num_classes: int) -> Moments:
    """Sums of no rows, with the origins of others."""
    new = {}
    for name, sums in moments.items():
        width = len(sums["origin"]) + 1
        shapes = (width,), (width, width), (num_classes, width), (num_classes,)
        zeros = {key: sums["origin"].new_zeros(shape) for key, shape in zip(SUMS, shapes, strict=True)}
        new[name] = {"origin": sums["origin"], "near": sums["near"], **zeros}
    return new


def add(moments: Moments, rows: Rows) -> None:
    """Add rows to the sums, in place."""
    widths = [len(sums["origin"]) for sums in moments.values()]
    for sums, (x, index) in zip(moments.values(), by_modality(rows, widths), strict=True):
        origin, labels = sums["origin"], rows.labels[index]
        difference = x.to(origin) - origin
        distance = torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        sums["total"] += torch.cat([difference.sum(0), origin.new_tensor([len(x)])])
        u = torch.cat([difference, torch.ones_like(distance)], 1) / distance.clamp(min=sums["near"])
        # Nothing but rounding lies between these rows and the origin.
        noise = NOISE * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(origin, math.inf)
        u = torch.where(distance > noise, u, 0)
        low, high = u[:, -1:].aminmax() if len(x) else (0, 0)
        ordinary = float(low) > 1e-15 and float(high) < 1e15
        rounded = u.to(x.dtype) if ordinary else u  # The product is twice as fast in float32, if that has the squares.
        sums["second"] += rounded.T @ rounded
        if labels.is_floating_point():
            sums["by_class"] += labels.to(u).T @ u
            sums["rows"] += labels.to(u).sum(0)
        else:
            sums["by_class"].index_add_(0, labels, u)
            sums["rows"] += torch.bincount(labels, minlength=len(sums["rows"]))


def plus(moments: Moments, others: Moments, sign: int = 1) -> Moments:
    """The sums with those of other rows added, or taken away; `others` may be of fewer classes."""
    new = {}
    for name, sums in moments.items():
        new[name] = dict(sums)
        for key in SUMS:
            new[name][key] = sums[key].clone()
            other = others[name][key]
            new[name][key][: len(other)] += sign * other
    return new


def means(moments: Moments) -> list[Tensor]:
    """The mean of each modality's rows, (D,)."""
    return [x["origin"] + x["total"][:-1] / x["total"][-1].clamp(min=1) for x in moments.values()]


def seen_from(sums: Mapping[str, Tensor], center: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows v = (x − center) / ‖x − origin‖ of one modality: the sum of v vᵀ, (D, D), and by class of v, (K, D)."""
    second, by_class, shift = sums["second"], sums["by_class"], center - sums["origin"]
    cross = torch.outer(second[:-1, -1], shift)
    whole = second[:-1, :-1] - cross - cross.T + second[-1, -1] * torch.outer(shift, shift)
    return whole, by_class[:, :-1] - by_class[:, -1:] * shift
