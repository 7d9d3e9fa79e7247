"""The classification head: per-modality, per-missing-case class prototypes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from protohead.cases import case_masks, nearest_case
from protohead.functional import add_angular_margin, case_cosine, full_precision, normalize, prototype_contrast
from protohead.grouped import RememberedNorms, grouped_logits
from protohead.inputs import (
    Features,
    check_constants,
    check_count,
    check_device,
    check_labels,
    check_present,
    per_case,
    read_features,
)
from protohead.objective import (
    PROTOTYPE_WEIGHT,
    SUBCASE_WEIGHT,
    check_objective,
    classification_loss,
    split_modalities,
    update_mean,
)
from protohead.plan import Planner
from protohead.sharding import (
    gather_for_loss,
    is_sharded,
    refuse_sharded,
    shard_like,
    share_between_ranks,
    sum_between_ranks,
)

__all__ = ["DecoupledPrototypeHead"]

BEYOND = ("bias", "center", "center_rows")  # What the paper's head has not.
MANY = 2**7  # Cases; the prototype loss of those of eight modalities takes a second.


class DecoupledPrototypeHead(nn.Module):
    """Classify by class prototypes of each modality and missing case (Decoupled Prototype Learning, arXiv 2505.08283).

    Takes the place of a model's last fully-connected layer. The logit of class k for a row whose present modalities
    are the case c is ``scale[c] / |c| * sum(cos(h[m] - center[m], prototypes[m][c, k]) for m in c) + bias[k]``; the
    paper's has neither center nor bias, which start at zero and are learned by :meth:`loss`. Cosines and margins are
    computed in float32 or wider, whatever the features' dtype and autocast say.

    Args:
        in_features: Name of each modality to the width D_m of its features; their order is that of the columns of
            `present` and of a concatenated input.
        num_classes: K.
        scale: s, a positive number, or a mapping by case name that names every case.
        margin: μ in radians, in [0, π), a number or a mapping by case name that names every case. By default 0.10 for
            the complete case and 0.15 for the others.
        cases: The cases that have prototypes, or one of them; all 2**M - 1 by default. Other rows use the nearest's:
            with the complete case alone, as is recommended, all rows share one prototype of each modality and class.
        shared_space: Whether the modalities share one embedding space, as CLIP's do. Then the prototype loss also
            contrasts prototypes of different modalities.
        centered: Whether there are a center and a bias. False is the paper's head.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        modalities: The M names in order.
        cases: The C case names in order: by number of modalities present, descending, then in modality order.
        prototypes: Name of a modality to its (V, K, D_m) Parameter: V blocks, one per case that holds it, in order.
        bias: (K,) Parameter, or None.
        center: (ΣD_m,) float64 buffer, the mean of each modality's features in training; or None.
        scale: (C,) float64 buffer; change it in place, as in ``head.scale.fill_(16)``. What is no scale or margin is
            an error in the next forward, on the CPU.
        margin: (C,) float64 buffer, radians; change it in place.
        seen: (C, M) bool buffer: the modalities of each case of which training has seen rows.

    Raises:
        ValueError: If an argument is not as said.

    Warns:
        UserWarning: With more than 128 cases.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5)
        >>> features = {"image": torch.randn(2, 4), "text": torch.randn(2, 3)}
        >>> present = torch.tensor([[True, True], [True, False]])
        >>> head(features, present).shape
        torch.Size([2, 5])
        >>> head.seen_cases
        ('image+text', 'image')
    """

    bias: nn.Parameter | None
    center: Tensor | None
    center_rows: Tensor | None
    scale: Tensor
    margin: Tensor
    seen: Tensor
    _masks: Tensor
    _block: Tensor

    def __init__(
        self,
        in_features: Mapping[str, int],
        num_classes: int,
        *,
        scale: float | Mapping[str, float] = 32.0,
        margin: float | Mapping[str, float] | None = None,
        cases: str | Sequence[str] | None = None,
        shared_space: bool = False,
        centered: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(in_features, Mapping):
            raise TypeError(f"Expected argument `in_features` to map names to widths, but got {in_features!r}.")
        self.in_features = {name: check_count(f"in_features[{name!r}]", width) for name, width in in_features.items()}
        self.modalities = tuple(in_features)
        self.shared_space = shared_space
        self.centered = centered
        masks = case_masks(self.modalities, cases)
        self.cases = tuple("+".join(compress(self.modalities, mask)) for mask in masks.tolist())
        if len(masks) > MANY:
            what = f"{len(masks)} cases, each with prototypes of its own, are slow; declare those that occur"
            warnings.warn(f'{what}: `cases=["{self.cases[0]}"]` is one that all rows share.', stacklevel=2)
        for name in self.modalities:
            if hasattr(nn.ParameterDict(), name):
                raise ValueError(f"Expected a modality name that nn.ParameterDict can hold, but got {name!r}.")
        if shared_space and len(set(self.in_features.values())) > 1:
            raise ValueError(f"Expected equal widths with `shared_space=True`, but got {self.in_features}.")
        if margin is None:
            complete = "+".join(self.modalities)
            margin = {case: 0.10 if case == complete else 0.15 for case in self.cases}
        scales, margins = per_case("scale", scale, self.cases), per_case("margin", margin, self.cases)
        check_constants(scales, margins, self.cases)

        self._planner = Planner()
        self._norms = RememberedNorms()
        self.prototypes = nn.ParameterDict()
        self._new_prototypes(num_classes, device, dtype)
        # Buffers are real even where the prototypes are on the meta device, so that `to_empty` cannot lose them.
        parameter = next(self.parameters())
        real = "cpu" if parameter.is_meta else parameter.device
        constant = _constant_dtype(parameter.device)
        zeros = partial(torch.zeros, dtype=constant, device=real)
        # The features' mean, and of how many rows of each modality it is one.
        self.register_buffer("center", zeros(sum(self.in_features.values())) if centered else None)
        self.register_buffer("center_rows", zeros(len(self.modalities)) if centered else None)
        self.register_buffer("scale", torch.tensor(scales, dtype=constant, device=real))
        self.register_buffer("margin", torch.tensor(margins, dtype=constant, device=real))
        self.register_buffer("seen", torch.zeros(masks.shape, dtype=torch.bool, device=real))
        self.register_buffer("_masks", masks.to(real), persistent=False)
        # Which block of a modality's prototypes belongs to a case; 0 where the case lacks the modality.
        block = (masks.cumsum(0) - 1).where(masks, 0)
        self.register_buffer("_block", block.to(real), persistent=False)
        self.reset_parameters()

    # -- what a model calls -------------------------------------------------------------------------------------------

    def forward(
        self,
        features: Features,
        present: Tensor | None = None,
        labels: Tensor | None = None,
        objective: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Logits; with `labels` the margins are applied, for the loss. Without them: for predictions.

        In training mode the cases of the batch are marked as seen. In eval mode a row of a case that training has not
        seen is scored by the nearest seen case (see :func:`protohead.cases.nearest_case`) and the modalities it shares
        with that; while none has been seen, every case scores its own rows. A case left out of `cases=` always falls
        back like this, in training over the declared cases. What such rows lack stays unseen in the case that scores
        them, which counts as one without it: a modality that training never had says nothing.

        Args:
            features: Name to (B, D_m) features, or one (B, ΣD_m) concatenation. A modality that is None or left out is
                missing in every row. What stands in a missing row reaches neither logits nor gradients.
            present: (B, M) bool, columns in the order of `modalities`. By default a modality is present in a row
                unless its features there are all zeros.
            labels: (B,) int64, where -100 is ignored; or (B, K) float in [0, 1], multi-hot or soft.
            objective: Return what :meth:`loss` does with these of its keyword arguments, instead of logits: for DDP and
                FSDP2, under which all that trains goes through forward.

        Returns:
            (B, K) logits, float32 or wider. Zeros, without gradient, for rows with nothing present (or nothing
            in common with any seen case).

        Raises:
            ValueError: If shapes, names, devices or values are not as said. Values are checked in eager mode; those of
                labels only on the CPU, since reading them would wait for the device.
            TypeError: If a dtype is not as said.
        """
        rows, present = self._read(features, present, labels)
        with full_precision(present.device):
            if objective is not None:
                options = check_objective(objective, self.num_classes)
                if labels is None:
                    raise ValueError("Expected argument `labels` for the objective, but got None.")
                return self._objective(rows, present, labels, **options)
            return self._logits(rows, present, labels)[0]

    def loss(
        self,
        features: Features,
        present: Tensor | None,
        labels: Tensor,
        *,
        prototype_weight: float = PROTOTYPE_WEIGHT,
        subcase_weight: float = SUBCASE_WEIGHT,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The whole training objective of a batch, in one call.

        ``classification + subcase_weight * sub-cases + prototype_weight * prototype_loss()``. The classification loss,
        with margins, is the cross-entropy of one label, or the binary cross-entropy of several. A row with several
        modalities is also a sample of its sub-cases: these are split at random in two parts, each of which is
        classified like a row that has no more. This also trains cases that do not occur.

        In training mode the features' mean is learned too (a running mean over the rows that have the modality, of the
        last 10 000 or so), unless the head is not `centered`. With ``centered=False`` and ``subcase_weight=0`` this is
        the paper's objective. Activation checkpointing must leave it out: to run it again would learn the mean again.

        Args:
            features: As in :meth:`forward`.
            present: As in :meth:`forward`.
            labels: As in :meth:`forward`.
            prototype_weight: λ; where 0, the prototype loss is not computed.
            subcase_weight: Of the two parts each; where 0, they are not scored.
            class_weight: (K,), not negative: as `weight` in ``F.cross_entropy``, or, for several labels, in
                ``F.binary_cross_entropy_with_logits`` (of both answers, which `pos_weight` is not).
            label_smoothing: ε in [0, 1), as in ``F.cross_entropy``; several labels are drawn towards ½.

        Returns:
            A scalar, float32 or wider. The mean is over the rows that have a label and anything that scores them; 0
            where there is none and λ is 0.

        Raises:
            ValueError: As :meth:`forward`, or if an option is not as said; `class_weight`'s values where labels' are.
            TypeError: As :meth:`forward`.

        Warns:
            UserWarning: In eval mode where gradients are recorded: nothing would count as seen.

        Example:
            >>> head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5)
            >>> features = {"image": torch.randn(2, 4), "text": torch.randn(2, 3)}
            >>> present = torch.tensor([[True, True], [True, False]])
            >>> head.loss(features, present, torch.tensor([4, 0])).backward()
            >>> head.seen_cases
            ('image+text', 'image', 'text')
        """
        objective = {
            "prototype_weight": prototype_weight,
            "subcase_weight": subcase_weight,
            "class_weight": class_weight,
            "label_smoothing": label_smoothing,
        }
        total: Tensor = self(features, present, labels, objective)
        return total

    def contributions(self, features: Features, present: Tensor | None = None) -> Tensor:
        """What each modality adds to the logits.

        Args:
            features: As in :meth:`forward`.
            present: As in :meth:`forward`.

        Returns:
            (B, M, K); their sum over M is what ``head(features, present)`` returns in the same mode.
        """
        rows, present = self._read(features, present)
        case, active = self._route(present)
        with full_precision(present.device):
            cosine = torch.stack(self._mean_cosines(self._centered(rows), case, active), dim=1)
            parts = cosine * self.scale[case, None, None].to(cosine.dtype)
            if self.bias is None:
                return parts
            # The bias, which belongs to none, is shared.
            share = active.to(parts.dtype) / active.sum(1, keepdim=True).clamp(min=1)
            return parts + share[:, :, None] * self.bias.to(parts.dtype)

    def prototype_loss(self, temperature: float = 1.0, sample: int | None = None) -> Tensor:
        """The prototype loss (PRC) of the cases seen so far: see :func:`protohead.functional.prototype_contrast`.

        Call it after the batch's forward, which marks the cases. While none has been seen, all take part. Under FSDP2
        every rank must call it, and one backward pass must go through its sum with the classification loss.

        Args:
            temperature: τ > 0.
            sample: With K in the thousands: how many classes, drawn anew at each call, give the anchors. An unbiased
                estimate; the cost falls with it.

        Returns:
            A scalar, float32 or wider.
        """
        if not temperature > 0:
            raise ValueError(f"Expected argument `temperature` to be positive, but got {temperature}.")
        if sample is not None:
            check_count("sample", sample)
        seen = self._seen_or_all()
        blocks = [seen[held, m] for m, held in enumerate(self._masks.T)]
        prototypes = [gather_for_loss(self.prototypes, name, self) for name in self.modalities]
        dtype = _wide(*prototypes)
        with full_precision(seen.device):
            prototypes = [p.to(dtype) for p in prototypes]
            if _reads_values(seen):  # Then what is not seen costs nothing.
                prototypes = [p if b.all() else p[b] for p, b in zip(prototypes, blocks, strict=True)]
                blocks = [b[b] for b in blocks]
            return prototype_contrast(prototypes, blocks, self.shared_space, temperature, sample)

    def case_index(self, present: Tensor) -> Tensor:
        """(B, M) bool to (B,) int64 indices into `cases`; C where nothing is present.

        A case left out of ``cases=`` gets the nearest declared one. Which cases training has seen plays no part.
        """
        check_present(present, self.modalities)
        return nearest_case(present, self._masks)

    @property
    def seen_cases(self) -> tuple[str, ...]:
        """The names of the cases that have scored rows in training, or any modality's in :meth:`imprint`, in order."""
        return tuple(compress(self.cases, self.seen.any(1).tolist()))

    # -- prototypes without training, and anew ------------------------------------------------------------------------

    def imprint(self, features: Features, labels: Tensor, present: Tensor | None = None) -> None:
        """Set the prototypes to class means: a classifier with no training (weight imprinting, arXiv 1712.07136).

        The prototype of a class is the normalised mean of its normalised features, per modality, over all the rows
        that have the modality; every case starts from the same. Modalities that had rows become seen, in every case.

        Args:
            features: As in :meth:`forward`, for all the rows at once.
            labels: As in :meth:`forward`; soft labels weigh the rows.
            present: As in :meth:`forward`.

        Raises:
            ValueError: As :meth:`forward`; also if features that are present are not finite.

        Warns:
            UserWarning: For classes that have no row with a modality; their prototypes stay as they are.
        """
        refuse_sharded(self, "imprint")
        rows, present = self._read(features, present, labels)
        rows = self._centered(rows)
        for m, x in enumerate(rows):
            if (wrong := present[:, m] & ~x.isfinite().all(1)).any():
                row = wrong.nonzero()[0].item()
                raise ValueError(f"Expected finite features of {self.modalities[m]!r}, but row {row} has others.")
        if not labels.is_floating_point():
            labels = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).float()
        unknown, given = {}, []
        with torch.no_grad(), full_precision(present.device):
            for m, name in enumerate(self.modalities):
                prototype, here = self.prototypes[name], present[:, m, None]
                dtype = _wide(rows[m], prototype)
                weight = torch.where(here, labels, 0).to(dtype)
                mean = weight.T @ normalize(torch.where(here, rows[m], 0).to(dtype))
                known = (mean != 0).any(1)
                prototype.copy_(torch.where(known[:, None], normalize(mean), prototype))
                given.append(known.any())
                unknown[name] = (~known).nonzero()[:, 0].tolist()
            self.seen |= torch.stack(given) & self._masks
        for name, classes in unknown.items():
            if classes:
                what = f"No row of classes {classes} has {name!r}: these prototypes are unchanged."
                warnings.warn(what, stacklevel=2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every (case, modality) block from Xavier's normal distribution and forget all that training has left."""
        for prototype in self.prototypes.values():
            if not is_sharded(prototype):  # As `to_empty` leaves it, before the first forward.
                refuse_sharded(self, "reset_parameters")
            new = torch.empty(prototype.shape, dtype=prototype.dtype, device=prototype.device)
            for block in new:
                nn.init.xavier_normal_(block)
            prototype.copy_(shard_like(new, prototype))
        for state in (self.bias, self.center, self.center_rows, self.seen):
            if state is not None:
                state.zero_()

    def reset(self, num_classes: int) -> None:
        """Start anew with another number of classes. The Parameters are new: give them to the optimizer."""
        refuse_sharded(self, "reset")
        old = dict(self.named_parameters())
        parameter = next(self.parameters())
        self._new_prototypes(num_classes, parameter.device, parameter.dtype)
        for name, new in self.named_parameters():
            new.requires_grad_(old[name].requires_grad)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """The arguments that make this head, without its weights."""
        by_case = [dict(zip(self.cases, values.tolist(), strict=True)) for values in (self.scale, self.margin)]
        return (
            f"{self.in_features}, num_classes={self.num_classes}, scale={by_case[0]}, margin={by_case[1]}, "
            f"cases={self.cases}, shared_space={self.shared_space}, centered={self.centered}"
        )

    def __repr__(self) -> str:  # noqa: D105
        return f"{self._get_name()}({self.extra_repr()})"

    # -- checkpoints and devices --------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The case names as bytes, in a tensor since safetensors holds nothing else."""
        return torch.tensor(list(",".join(self.cases).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the checkpoint of a head with other cases: where the shapes agree they would be swapped in silence."""
        cases = tuple(bytes(state.to(torch.uint8).tolist()).decode().split(","))
        if cases != self.cases:
            raise ValueError(f"Expected a checkpoint of a head with the cases {self.cases}, but got one with {cases}.")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)  # Before anything is copied.
        scale = state_dict.get(f"{prefix}scale")  # Without it the checkpoint is not of a head at all.
        if self.bias is not None and scale is not None and not any(f"{prefix}{name}" in state_dict for name in BEYOND):
            # A head of the paper's, or one before there was a center, is the same with zeros.
            for name in BEYOND:
                own = getattr(self, name)
                zeros = torch.zeros_like(own, device=scale.device if own.is_meta else None)
                state_dict[f"{prefix}{name}"] = zeros  # type: ignore[index]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        """All but the remembered norms, which belong to these very prototypes."""
        return {**self.__dict__, "_norms": RememberedNorms()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DecoupledPrototypeHead":
        # Buffers follow the device only: `half()` must not round a margin, nor `to_empty()` wipe what was seen.
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = buffers
        device = next(self.parameters()).device
        if device.type != "meta":
            for name, value in self.named_buffers(recurse=False):
                dtype = _constant_dtype(device) if value.is_floating_point() else value.dtype
                buffers[name] = value.to(device, dtype)
        return self

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _new_prototypes(self, num_classes: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.num_classes = check_count("num_classes", num_classes)
        for name, width in self.in_features.items():
            shape = sum(name in case.split("+") for case in self.cases), self.num_classes, width
            self.prototypes[name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(self.num_classes, device=device, dtype=dtype)) if self.centered else None
        self.register_parameter("bias", bias)

    def _read(
        self, features: Features, present: Tensor | None, labels: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The batch, checked: one (B, D_m) tensor per modality, and the (B, M) mask."""
        rows, present = read_features(features, present, self.in_features, self.seen.device)
        if labels is not None:
            check_labels(labels, present.shape[0], self.num_classes)
            check_device("labels", labels, self.seen.device)
        return rows, present

    def _seen_or_all(self) -> Tensor:
        """The (C, M) masks of the cases, without what has not been seen."""
        return self._masks & (self.seen | ~self.seen.any())

    def _route(self, present: Tensor) -> tuple[Tensor, Tensor]:
        """The case that scores each row, and (B, M) which modalities it scores (none where nothing is present)."""
        masks = self._masks if self.training else self._seen_or_all()
        case = nearest_case(present, masks, masks.any(1)).clamp(max=len(self.cases) - 1)
        return case, present & masks[case]

    def _logits(self, rows: list[Tensor], present: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits, and (B, 1): 1 where a row is scored by anything, or 0."""
        # Only the other road differentiates labels.
        reads = _reads_values(present) and (labels is None or not labels.requires_grad)
        return (self._grouped if reads else self._every_block)(rows, present, labels)

    def _objective(
        self,
        rows: list[Tensor],
        present: Tensor,
        labels: Tensor,
        prototype_weight: float,
        subcase_weight: float,
        class_weight: Tensor | None,
        label_smoothing: float,
    ) -> Tensor:
        """What :meth:`loss` returns."""
        if self.training:
            if self.center is not None and self.center_rows is not None:
                total = partial(sum_between_ranks, module=self)
                update_mean(self.center, self.center_rows, rows, present, total, _reads_values(present))
        elif torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            warnings.warn("Expected training mode: in eval mode no case is marked as seen; call train().", stacklevel=4)
        batch = present.shape[0]
        index = torch.arange(batch, device=present.device)
        if subcase_weight and len(self.modalities) > 1:
            parts = split_modalities(present)
            # On the CPU the rows that have parts; elsewhere all, as to count them would wait for the device.
            some = parts[0].any(1).nonzero()[:, 0] if _reads_values(present) else index
            index = torch.cat([index, some, some])
            rows, labels = [x.index_select(0, index) for x in rows], labels[index]
            present = torch.cat([present, *(part[some] for part in parts)])
        logits, scored = self._logits(rows, present, labels)
        losses, weights = classification_loss(logits, labels, class_weight, label_smoothing)
        losses, weights = (torch.where(scored[:, 0] > 0, x, 0) for x in (losses, weights))
        count = weights[:batch].sum()
        whole = (losses[:batch].sum() + subcase_weight * losses[batch:].sum()) / torch.where(count > 0, count, 1)
        return whole + prototype_weight * self.prototype_loss() if prototype_weight else whole

    def _centers(self, dtype: torch.dtype) -> list[Tensor | None]:
        """What is subtracted from each modality's features; a copy, as the next batch changes the mean in place."""
        if self.center is None:
            return [None] * len(self.modalities)
        return [*self.center.to(dtype, copy=True).split_with_sizes([*self.in_features.values()])]

    def _centered(self, rows: list[Tensor]) -> list[Tensor]:
        dtype = _wide(*rows, *self.prototypes.values())
        return [x if c is None else x - c for x, c in zip(rows, self._centers(dtype), strict=True)]

    def _every_block(self, rows: list[Tensor], present: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits without a look at values: all blocks are multiplied, and each row takes its own.

        Also (B, 1): 1 where a row is scored by anything, or 0.
        """
        rows = self._centered(rows)
        case, active = self._route(present)
        if self.training:
            self._mark_seen(case, active)
        cosine = reduce(torch.add, self._mean_cosines(rows, case, active))
        if labels is not None:
            # Without a margin φ is the identity: a row that nothing scores keeps its zeros.
            margin = torch.where(active.any(1), self.margin[case], 0)
            cosine = add_angular_margin(cosine, labels, margin.to(cosine.dtype))
        logits, scored = cosine * self.scale[case, None].to(cosine.dtype), active.any(1, keepdim=True).to(cosine.dtype)
        return logits if self.bias is None else torch.addcmul(logits, scored, self.bias.to(logits.dtype)), scored

    def _grouped(self, rows: list[Tensor], present: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same on the CPU."""
        own = [self.prototypes[name] for name in self.modalities]
        rows, prototypes = _widened(rows, own)
        dtype, seen = prototypes[0].dtype, self.seen.flatten().tolist()
        key = dtype, not self.training and tuple(seen), tuple(self.scale.tolist()), tuple(self.margin.tolist())
        scored_by = partial(self._scored_by, dtype=dtype)
        plan = self._planner(present, [len(p) for p in prototypes], scored_by, self.training, key)
        if self.training:
            if sum(seen) < len(plan.counts):
                modality, case = self._masks.T.nonzero()[torch.tensor(plan.counts) > 0].T  # Of the blocks with rows.
                self.seen[case, modality] = True
            share_between_ranks(self.seen, self)
        bias = None if self.bias is None else self.bias.to(dtype)
        norms = None if self.training or torch.is_grad_enabled() else self._norms(prototypes, own)
        return grouped_logits(rows, prototypes, plan, labels, bias, norms, self._centers(dtype)), plan.scored

    def _scored_by(self, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rows that each block scores, and the rows' constants: see :meth:`protohead.plan.Plan.of`."""
        check_constants(self.scale.tolist(), self.margin.tolist(), self.cases)
        case, active = self._route(present)
        modality, of_block = self._masks.T.nonzero().T
        scores = (case == of_block[:, None]) & active.T[modality]
        count = active.sum(1)
        # A row that nothing scores keeps its zeros.
        scale, margin = torch.where(count > 0, torch.stack([self.scale[case], self.margin[case]]), 0)
        constants = scale / count.clamp(min=1), scale.where(count > 0, 1), margin, (count > 0).to(scale.dtype)
        return scores, torch.stack(constants)[:, :, None].to(dtype)

    def _mark_seen(self, case: Tensor, active: Tensor) -> None:
        order = torch.arange(len(self.cases), device=case.device)
        self.seen |= ((case[:, None] == order)[:, :, None] & active[:, None]).any(0)
        share_between_ranks(self.seen, self)

    def _mean_cosines(self, rows: list[Tensor], case: Tensor, active: Tensor) -> list[Tensor]:
        """One (B, K) tensor per modality: its cosines over the number of modalities that score the row."""
        own, count = [self.prototypes[name] for name in self.modalities], active.sum(1, keepdim=True).clamp(min=1)
        return [
            case_cosine(x, p, self._block[case, m], active[:, m]) / count
            for m, (x, p) in enumerate(zip(*_widened(rows, own), strict=True))
        ]


def _constant_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64.


def _wide(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of the tensors, at least float32: cosines reach 1 early in half precision."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)


def _widened(rows: list[Tensor], prototypes: list[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    """Features and prototypes in the dtype in which they are computed."""
    dtype = _wide(*rows, *prototypes)
    return [x.to(dtype) for x in rows], [p.to(dtype) for p in prototypes]


def _reads_values(present: Tensor) -> bool:
    """Whether the mask can be read: on the CPU, where no graph is recorded (which would keep it) or transformed."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    recording = tracing or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return present.device.type == "cpu" and not recording
