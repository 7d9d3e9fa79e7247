"""The classification head: per-modality, per-missing-case class prototypes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from protohead import state
from protohead.calibration import calibrate
from protohead.cases import case_masks, nearest_case
from protohead.context import full_precision, is_readable
from protohead.imprint import imprint
from protohead.inputs import Features, Present, check_labels, read_features, read_present
from protohead.logits import head_contributions, head_logits
from protohead.moments import Moments
from protohead.objective import Objective, prototype_loss, read_objective, training_loss
from protohead.options import check_constants, check_widths, read_constants
from protohead.prototypes import Prototypes, draw, refuse_derived
from protohead.untrained import warn_of_random_prototypes, warn_of_unlearned_center

__all__ = ["DecoupledPrototypeHead"]


class DecoupledPrototypeHead(nn.Module):
    """Classify by class prototypes of each modality and missing case: DPL, arXiv 2505.08283.

    Takes the place of a model's last fully-connected layer. The logit of class k for a row whose present modalities
    are the case c is ``scale[c] / |c| * sum(cos(h[m] - center[m], prototypes[m][c, k]) for m in c) + bias[k]``,
    computed in float32 or wider. The paper's head is ``cases="all", scale=32, centered=False``.

    Args:
        in_features: Name of each modality to its width D_m, in the order of the columns of `present`.
        num_classes: K.
        cases: Which missing cases have prototypes of their own: ``"shared"``, none, all use the same; ``"all"``, each
            of the 2**M - 1; or a list of names, where rows of other cases use the nearest's.
        scale: s, a positive number, or a mapping by case name that names every case.
        margin: μ in radians, in [0, π), a number or a mapping by case name that names every case. By default 0.10 for
            the complete case, and so for shared prototypes, and 0.15 for the others.
        shared_space: Whether the modalities share one embedding space, as CLIP's do. Then the prototype loss also
            contrasts prototypes of different modalities.
        centered: Whether there are a center and a bias. They start at zero and are learned by :meth:`loss`.
        class_names: K names, kept in checkpoints.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        modalities: The M names in order.
        cases: The C names of the cases with prototypes, in order; shared prototypes are those of the complete case.
        prototypes: Name of a modality to its (V, K, D_m) Parameter: V blocks, one per case that holds it, in order.
        bias: (K,) Parameter, or None.
        center: (ΣD_m,) buffer, the mean of each modality's features in training; or None.
        scale: (C,) buffer; change it in place, as in ``head.scale.fill_(16)``. So is `margin`, in radians.
        seen: (C, M) buffer: how many rows of each case, sub-cases too, training has had, by modality.
        temperature: (2, ..., 2, 2) buffer: what :meth:`calibrate` divides logits below 0 and above by, else 1. Of rows
            with the first of two modalities only it is ``temperature[1, 0]``. So is `shift`, (K,), what is added then.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5, cases="all")
        >>> present = torch.tensor([[True, True], [True, False]])
        >>> head({"image": torch.randn(2, 4), "text": torch.randn(2, 3)}, present).shape
        torch.Size([2, 5])
        >>> head.seen_cases
        ('image+text', 'image')
        >>> head.loss(torch.randn(2, 7), present, torch.tensor([4, 0]), prototype_weight=0.9).backward()
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    prototypes: Prototypes
    bias: nn.Parameter | None
    center: Tensor | None
    center_rows: Tensor
    scale: Tensor
    margin: Tensor
    seen: Tensor
    _masks: Tensor

    def __init__(
        self,
        in_features: Mapping[str, int],
        num_classes: int,
        *,
        cases: str | Sequence[str] = "shared",
        scale: float | Mapping[str, float] = 20.0,
        margin: float | Mapping[str, float] | None = None,
        shared_space: bool = False,
        centered: bool = True,
        class_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_widths(in_features, shared_space)
        self.modalities = tuple(self.in_features)
        masks = case_masks(self.modalities, cases)
        self.cases = tuple("+".join(compress(self.modalities, mask)) for mask in masks.tolist())
        self.shared_space, self.centered = bool(shared_space), bool(centered)
        scales, margins = read_constants(scale, margin, self.cases, self.modalities)
        state.set_classes(self, num_classes, class_names, device, dtype)
        state.register_buffers(self, masks, scales, margins)
        self.register_load_state_dict_pre_hook(state.before_load)
        self.reset_parameters()

    def forward(
        self,
        features: Features,
        present: Present | None = None,
        labels: Tensor | None = None,
        objective: Objective | Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Logits; with `labels` the margins are applied, for the loss. Without them: for predictions.

        In training mode the cases of the batch are marked as seen. In eval mode a row of a case that training has not
        seen gets the prototypes of the nearest seen case (see :func:`protohead.cases.nearest_case`), and a modality
        that training never had says nothing. Rows of a case that is not among `cases` fall back in training, too.

        Args:
            features: Name to (B, D_m) features, or one (B, ΣD_m) concatenation. A modality that is None or left out is
                missing in every row. What stands in a missing row reaches neither logits nor gradients; elsewhere NaN
                and infinity are errors.
            present: (B, M) bool, columns in the order of `modalities`; or columns by name, such as a DataFrame's. By
                default a modality is present in a row unless its features there are all zeros.
            labels: (B,) int64, where -100 is ignored; or (B, K) float in [0, 1], multi-hot or soft.
            objective: Return the loss with these options of :meth:`loss` instead: for DDP and FSDP2.

        Returns:
            (B, K) logits, float32 or wider. Zeros, without gradient, for rows with nothing present.

        Raises:
            ValueError: If shapes, names, devices or, on the CPU in eager mode, values are not as said, or contradict
                `present`. Random prototypes in eval mode, and a center that is never learned, are a warning.
            TypeError: If a dtype is not as said.
        """
        rows, mask = read_features(features, present, self.in_features, self.seen.device)
        if labels is not None:
            check_labels(labels, mask.shape[0], self.num_classes, self.seen.device)
        if is_readable(mask):
            check_constants(self.scale.tolist(), self.margin.tolist(), self.cases)
        with full_precision(mask.device):
            if objective is not None:
                return training_loss(self, rows, mask, labels, read_objective(objective, self.num_classes))
            logits, _ = head_logits(self, rows, mask, labels)
        if not self.training:
            warn_of_random_prototypes(self._due, self.seen)
        elif labels is not None and self.centered:
            warn_of_unlearned_center(self._due, self.center_rows, logits)
        return logits

    def loss(self, features: Features, present: Present | None, labels: Tensor, **options: Any) -> Tensor:
        """The whole training objective of a batch, as a scalar: see :class:`protohead.objective.Objective`.

        In training mode the center is learned too. Activation checkpointing must leave this out: to run it again would
        learn the center again. With ``centered=False`` and ``subcase_weight=0`` it is the paper's objective.

        Args:
            features: As in :meth:`forward`.
            present: As in :meth:`forward`.
            labels: As in :meth:`forward`.
            **options: `prototype_weight` (λ, 0.9), `subcase_weight` (0.5), `class_weight` and `label_smoothing` (0).

        Raises:
            ValueError: As :meth:`forward`, or if an option is not as said. Eval mode is a warning.
        """
        total: Tensor = self(features, present, labels, options)
        return total

    def contributions(self, features: Features, present: Present | None = None) -> Tensor:
        """What each modality adds to the logits; arguments as in :meth:`forward`.

        Returns:
            (B, M, K); their sum over M is what ``head(features, present)`` returns in the same mode. The bias, which
            belongs to none, is divided among the modalities.
        """
        rows, mask = read_features(features, present, self.in_features, self.seen.device)
        with full_precision(mask.device):
            return head_contributions(self, rows, mask)

    def prototype_loss(self, temperature: float = 1.0, sample: int | None = None) -> Tensor:
        """The prototype loss (PRC) of the cases seen so far: see :func:`protohead.functional.prototype_contrast`.

        Call it after the batch's forward, which marks the cases. Under FSDP2 every rank must call it, and one backward
        pass must go through its sum with the classification loss.

        Args:
            temperature: τ > 0.
            sample: With K in the thousands: how many classes, drawn anew at each call, give the anchors.

        Returns:
            A scalar; 0 for shared prototypes of modalities that share no space.
        """
        return prototype_loss(self, temperature, sample)

    def case_index(self, present: Present) -> Tensor:
        """(B, M) bool, or columns by name, to (B,) indices into `cases`, of the nearest; C where nothing is present."""
        return nearest_case(read_present(present, self.modalities, self.seen.device), self._masks > 0)

    @property
    def seen_cases(self) -> tuple[str, ...]:
        """The names of the cases whose prototypes training, or :meth:`imprint`, has used."""
        return tuple(compress(self.cases, (self.seen > 0).any(1).tolist()))

    @torch.no_grad()
    def imprint(
        self,
        features: Features | Iterable[Sequence[Any]],
        labels: Tensor | None = None,
        present: Present | None = None,
        shrinkage: float | None = None,
        *,
        classes: Sequence[int] | None = None,
        class_weight: Tensor | None = None,
        moments: Moments | None = None,
    ) -> Moments:
        """Fit the head in closed form, without a gradient: see :mod:`protohead.closed_form`.

        Sets prototypes, the same in every case; the center; and, by rows that are held out in turn, scale and bias.
        With `shrinkage` 1, or where each row is the only one of its class, it sets prototypes only, to class means.
        Those of a class without a row stay, with a warning. With torch.distributed every rank gives its own rows.

        Args:
            features: As in :meth:`forward`; or batches ``(features, labels, present)``, which are read once.
            labels: As in :meth:`forward`; soft labels weigh the rows.
            present: As in :meth:`forward`.
            shrinkage: γ in [0, 1]; by default chosen by the loss of rows that are held out.
            classes: Set the prototypes of these classes only; their bias becomes the mean of the others'.
            class_weight: (K,), as in :class:`protohead.objective.Objective`.
            moments: What an earlier call returned. Its rows count, too; shrinkage, scale and bias stay.

        Returns:
            Sums over the rows, tensors by modality and name: keep them to add rows or classes later.

        Raises:
            ValueError: As :meth:`forward`, or if features that are present are not finite, or no row counts.
            RuntimeError: If the prototypes are sharded, pruned or parametrized.
        """
        refuse_derived(self, "imprint")
        return imprint(self, features, labels, present, shrinkage, classes, class_weight, moments)

    def calibrate(
        self,
        features: Features | Iterable[Sequence[Any]],
        labels: Tensor | None = None,
        present: Present | None = None,
    ) -> dict[str, float]:
        """Make softmax, or with several labels sigmoid, of the logits in eval mode match frequencies, by missing case.

        Call it last, on validation rows. With one label logits are divided by a temperature, which leaves the answers;
        with several, those below 0 and above have one each, and each class a shift. A case of under 20 rows uses those
        that hold it, as if they had no more, or all. Few rows change little. To train or imprint undoes it.

        Args:
            features: As in :meth:`imprint`. With torch.distributed every rank gives its own rows.
            labels: As in :meth:`forward`.
            present: As in :meth:`forward`.

        Returns:
            The temperature of each of the 2**M - 1 cases by name, of logits below 0.

        Raises:
            ValueError: As :meth:`imprint`.

        Example:
            >>> head = DecoupledPrototypeHead({"image": 3, "text": 3}, num_classes=3)
            >>> labels, _ = torch.arange(300) % 3, torch.manual_seed(0)
            >>> features = torch.eye(3)[labels].repeat(1, 2) + torch.randn(300, 6)
            >>> _ = head.imprint(features[:150], labels[:150])
            >>> head.calibrate(features[150:], labels[150:])  # Complete rows; but it holds for others, too.
            {'image+text': 1.0..., 'image': 1.9..., 'text': 1.9...}
            >>> probabilities = head.eval()({"image": features[:1, :3]}).softmax(1)
        """
        return calibrate(self, features, labels, present)

    def add_classes(self, count: int, class_names: Sequence[str] | None = None) -> None:
        """Add classes, with random prototypes: train them, or imprint them, as by ``imprint(..., classes=[101])``.

        What there is stays. The Parameters are new: give them to the optimizer. Name them if the others have names.
        """
        refuse_derived(self, "add_classes")
        state.add_classes(self, count, class_names)

    def reset_parameters(self) -> None:
        """Draw every (case, modality) block from Xavier's normal distribution and forget all that training has left."""
        refuse_derived(self, "reset_parameters", allow_shards=True)
        draw(self.prototypes)
        state.forget(self)
        self._due = {"random", "center"}  # Warnings, each given once.

    def reset(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        """Start anew with other classes. The Parameters are new: give them to the optimizer."""
        refuse_derived(self, "reset")
        state.set_classes(self, num_classes, class_names, *state.kind(self))
        self.reset_parameters()

    __repr__ = state.text
    extra_repr = state.arguments
    _apply = state.apply
    get_extra_state = state.packed
    set_extra_state = state.take_over
