"""Slow, obvious transcriptions of the formulas in docs/method.md, one row, class and prototype at a time."""

import math
from itertools import combinations

import torch


def cases_of(modalities):
    """The cases as tuples of names, in order."""
    return [case for size in range(len(modalities), 0, -1) for case in combinations(modalities, size)]


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return dot / norms if norms else 0.0


def nearest(row_has, declared):
    """The case among `declared` (tuples in order) that scores a row with the modalities `row_has`."""
    holders = [case for case in declared if set(row_has) <= set(case)]
    if holders:
        return min(holders, key=len)
    return max(declared, key=lambda case: len(set(case) & set(row_has)))


def phi(z, margin):
    if z > math.cos(math.pi - margin):
        return z * math.cos(margin) - math.sqrt(max(0.0, 1 - z * z)) * math.sin(margin)
    return z - margin * math.sin(math.pi - margin)


def contributions(head, features, present, seen=None, labels=None):
    """(B, M, K) nested lists, without margins; or (B, K) logits with them, where labels are given."""
    declared = [tuple(name.split("+")) for name in head.cases]
    prototypes = {name: p.double() for name, p in head.prototypes.items()}
    every, logits = [], []
    for i, row in enumerate(present.tolist()):
        row_has = [name for name, is_in in zip(head.modalities, row, strict=True) if is_in]
        table = [[0.0] * head.num_classes for _ in head.modalities]
        logit = [0.0] * head.num_classes
        case = nearest(row_has, seen or declared) if row_has else ()
        used = [name for name in row_has if name in case]
        if used:
            c = declared.index(case)
            scale, margin = head.scale[c].item(), head.margin[c].item()
            for k in range(head.num_classes):
                z = 0.0
                for name in used:
                    block = [held for held in declared if name in held].index(case)
                    share = cosine(features[name][i].double(), prototypes[name][block, k]) / len(used)
                    table[head.modalities.index(name)][k] = scale * share
                    z += share
                y = 0.0
                if labels is not None:
                    y = float(labels[i] == k) if labels.dim() == 1 else labels[i, k].item()
                logit[k] = scale * (y * phi(z, margin) + (1 - y) * z)
        every.append(table)
        logits.append(logit)
    return torch.tensor(every if labels is None else logits, dtype=torch.float64)


def prototype_loss(head, seen, temperature):
    """`seen`: the case names that take part."""
    blocks = []  # (modality, class, prototype) of every prototype that takes part
    for name, prototype in head.prototypes.items():
        held = [case for case in head.cases if name in case.split("+")]
        for case, block in zip(held, prototype.double(), strict=True):
            blocks += [(name, k, row) for k, row in enumerate(block) if case in seen]
    losses = []
    for i, (name, k, anchor) in enumerate(blocks):
        others = [b for j, b in enumerate(blocks) if j != i and (head.shared_space or b[0] == name)]
        similarity = [cosine(anchor, row) / temperature for _, _, row in others]
        top = max(similarity, default=0.0)
        log_sum = top + math.log(math.fsum(math.exp(s - top) for s in similarity)) if others else 0.0
        positive = [s for s, other in zip(similarity, others, strict=True) if other[1] == k]
        if positive:
            losses.append(-math.fsum(s - log_sum for s in positive) / len(positive))
    return math.fsum(losses) / len(losses) if losses else 0.0
