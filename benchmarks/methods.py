"""What accuracy.py compares: small modules with `forward(features, present)` and `loss(features, present, labels)`.

Features are name to (B, D_m), zeros where the (B, M) `present` says that a modality is missing. Each method is written
as its users would write it; all are trained by the same loop and choose from the same learning rates.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protohead import DecoupledPrototypeHead
from protohead.cases import case_masks, nearest_case
from protohead.functional import add_angular_margin, normalize

Features = Mapping[str, Tensor]
Widths = dict[str, int]

SCALE, MARGINS = 32.0, (0.10, 0.15)  # The published MM-IMDb setting: of the complete case, and of the others.
PROTOTYPE_WEIGHT = 0.9


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one label, binary cross-entropy of several."""
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels)


class Linear(nn.Module):
    """One linear layer on the concatenated features; with `dropout`, complete rows lose a modality that often."""

    def __init__(self, widths: Widths, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer = nn.Linear(sum(widths.values()), num_classes)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        logits: Tensor = self.layer(torch.cat(list(features.values()), dim=1))
        return logits

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch."""
        if self.dropout:
            lost = F.one_hot(torch.randint(present.shape[1], (len(present),)), present.shape[1]).bool()
            hit = present.all(1) & (torch.rand(len(present)) < self.dropout)
            kept = present & ~(lost & hit[:, None])
            features = {name: torch.where(kept[:, m, None], x, 0) for m, (name, x) in enumerate(features.items())}
        return classification_loss(self(features, present), labels)


class LinearPerCase(nn.Module):
    """A linear layer of its own for each missing case."""

    def __init__(self, widths: Widths, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.masks = case_masks(list(widths))
        self.layers = nn.ModuleList(nn.Linear(sum(widths.values()), num_classes) for _ in self.masks)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        rows, case = torch.cat(list(features.values()), dim=1), nearest_case(present, self.masks)
        logits = rows.new_zeros(len(rows), self.num_classes)
        for c in case.unique().tolist():
            chosen = (case == c).nonzero()[:, 0]
            logits = logits.index_copy(0, chosen, self.layers[c](rows[chosen]))
        return logits

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch."""
        return classification_loss(self(features, present), labels)


class LateFusion(nn.Module):
    """A classifier for each modality; their mean over what is there, and a term for which modalities these are."""

    def __init__(self, widths: Widths, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, num_classes) for width in widths.values())
        self.flags = nn.Linear(len(widths), num_classes, bias=False)

    def single(self, features: Features) -> list[Tensor]:
        """(B, K) of each modality."""
        return [layer(x) for layer, x in zip(self.layers, features.values(), strict=True)]

    def fuse(self, single: list[Tensor], present: Tensor) -> Tensor:
        """(B, K) of all."""
        total = torch.where(present[:, :, None], torch.stack(single, dim=1), 0).sum(1)
        fused: Tensor = total / present.sum(1, keepdim=True) + self.flags(present.float())
        return fused

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        return self.fuse(self.single(features), present)

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch: of the whole, and of each modality where it is."""
        single = self.single(features)
        total = classification_loss(self.fuse(single, present), labels)
        for m, logits in enumerate(single):
            if present[:, m].any():
                total = total + classification_loss(logits[present[:, m]], labels[present[:, m]])
        return total


class Undecomposed(nn.Module):
    """Prototypes for each missing case that are not divided by modality: one norm over the concatenation."""

    def __init__(self, widths: Widths, num_classes: int) -> None:
        super().__init__()
        self.masks = case_masks(list(widths))
        held = self.masks.repeat_interleave(torch.tensor(list(widths.values())), dim=1)
        self.held = held[:, None]  # (C, 1, ΣD): what a prototype consists of
        self.prototypes = nn.Parameter(torch.empty(len(self.masks), num_classes, held.shape[1]))
        for block in self.prototypes.data:
            nn.init.xavier_normal_(block)

    def cosines(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        rows = normalize(torch.cat(list(features.values()), dim=1))
        prototypes = normalize(torch.where(self.held, self.prototypes, 0))
        every: Tensor = torch.einsum("bd,ckd->bck", rows, prototypes)
        case = nearest_case(present, self.masks)
        return every.gather(1, case[:, None, None].expand(-1, 1, every.shape[2])).squeeze(1)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        return SCALE * self.cosines(features, present)

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch."""
        margin = torch.where(present.all(1), *MARGINS)
        cosine = add_angular_margin(self.cosines(features, present), labels, margin)
        return classification_loss(SCALE * cosine, labels)


class Paper(nn.Module):
    """The paper's head: prototypes for each missing case, margins, and the prototype loss."""

    def __init__(
        self,
        widths: Widths,
        num_classes: int,
        prototype_weight: float = PROTOTYPE_WEIGHT,
        cases: str = "all",
    ) -> None:
        super().__init__()
        self.prototype_weight = prototype_weight
        self.head = DecoupledPrototypeHead(widths, num_classes, cases=cases, scale=SCALE, centered=False)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        logits: Tensor = self.head(features, present)
        return logits

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch."""
        loss = classification_loss(self.head(features, present, labels), labels)
        if self.prototype_weight:
            loss = loss + self.prototype_weight * self.head.prototype_loss()
        return loss


class Ours(nn.Module):
    """What the README recommends: the head with its defaults, and its own `loss`."""

    def __init__(
        self,
        widths: Widths,
        num_classes: int,
        objective: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = dict(objective or {})
        self.head = DecoupledPrototypeHead(widths, num_classes, **options)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """(B, K)."""
        logits: Tensor = self.head(features, present)
        return logits

    def loss(self, features: Features, present: Tensor, labels: Tensor) -> Tensor:
        """The training objective of a batch."""
        return self.head.loss(features, present, labels, **self.objective)


class ClosedForm(Ours):
    """The head in closed form."""

    def start(self, features: Features, present: Tensor, labels: Tensor, balance: float = 0.0) -> None:
        """Imprint; classes weigh as their number of rows to the power of −`balance`, where there is one label."""
        weight = None
        if not labels.is_floating_point():
            weight = torch.bincount(labels, minlength=self.head.num_classes).clamp(min=1).float() ** -balance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of a modality that no row of a class has.
            self.head.imprint(features, labels, present, class_weight=weight)


class ClosedFormTrained(ClosedForm):
    """Trained from the closed form, with the scale of training."""

    def start(self, features: Features, present: Tensor, labels: Tensor, balance: float = 0.0) -> None:
        """Imprint, but for the scale."""
        scale = self.head.scale.clone()
        super().start(features, present, labels)
        self.head.scale.copy_(scale)


def cosine_head(widths: Widths, num_classes: int) -> nn.Module:
    """The paper's head with one prototype for each modality and class, the same in every case."""
    return Paper(widths, num_classes, prototype_weight=0.0, cases="shared")


def minimum_entropy(model: nn.Module, features: Features, present: Tensor) -> Tensor:
    """Logits of the case whose class distribution has the least entropy: nobody says what is missing."""
    every = []
    for mask in case_masks(list(features)):
        held = {name: x for (name, x), has in zip(features.items(), mask, strict=True) if has}
        every.append(model(held, mask.expand(len(present), -1)))
    logits = torch.stack(every)
    chosen = torch.distributions.Categorical(logits=logits).entropy().argmin(0)
    return logits[chosen, torch.arange(len(present))]


def without_fall_back(model: nn.Module, features: Features, present: Tensor) -> Tensor:
    """Logits of each row's own case, though training may never have seen it."""
    seen = model.head.seen.clone()  # type: ignore[union-attr,operator]
    model.head.seen.fill_(1)  # type: ignore[union-attr,operator]
    try:
        logits: Tensor = model(features, present)
    finally:
        model.head.seen.copy_(seen)  # type: ignore[union-attr,operator]
    return logits


METHODS: dict[str, Callable[[Widths, int], nn.Module]] = {
    "linear": Linear,
    "linear, modality dropout": partial(Linear, dropout=0.5),
    "linear per case": LinearPerCase,
    "late fusion": LateFusion,
    "cosine head": cosine_head,
    "undecomposed": Undecomposed,
    "paper, no prototype loss": partial(Paper, prototype_weight=0.0),
    "paper": Paper,
    "protohead, decoupled": partial(Ours, cases="all"),
    "closed form": ClosedForm,
    "protohead": Ours,
}
BALANCES = (0.0, 0.5, 1.0)  # What the closed form chooses from instead of learning rates.
# Parts of the whole taken away or changed, one at a time.
ABLATIONS: dict[str, Callable[[Widths, int], nn.Module]] = {
    "protohead, no sub-cases": partial(Ours, objective={"subcase_weight": 0.0}),
    "protohead, not centered": partial(Ours, centered=False),
    "protohead, scale 32": partial(Ours, scale=32.0),
    "protohead, from the closed form": ClosedFormTrained,
}
# Other ways to predict with a method that is trained the same.
PREDICTORS: dict[str, dict[str, Callable[[nn.Module, Features, Tensor], Tensor]]] = {
    "paper": {"paper, least entropy": minimum_entropy, "paper, no fall-back": without_fall_back},
}
