"""Evaluation by missing case, a temperature for each case, and what each modality says of each class.

``import protohead`` does not import this. :func:`evaluate` needs torchmetrics: ``pip install "protohead[eval]"``.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from protohead.cases import case_masks, case_names, nearest_case
from protohead.head import DecoupledPrototypeHead
from protohead.inputs import Features, check_count, check_labels, check_present, read_features

__all__ = ["Report", "contributions_by_class", "evaluate", "fit_temperature"]

NOTHING = "(nothing)"
WIDEST = math.log(100)  # The logarithms of temperatures are sought from -WIDEST to WIDEST.


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` returns: scores as fractions of 1, NaN where undefined. It prints as a table in percent.

    Attributes:
        cases: Name of each case that has rows, in case order, to its scores by name; the first is ``"rows"``, a count.
            Rows with nothing present are a case of their own, ``"(nothing)"``, the last.
        all_rows: The scores of all the rows together.
        mean_of_cases: Of each score the plain mean over `cases` where it is defined. ``"(nothing)"`` is left out, so
            that a stray empty row does not weigh as much as a whole case; ``"rows"`` is the count of the others.
    """

    cases: dict[str, dict[str, float]]
    all_rows: dict[str, float]
    mean_of_cases: dict[str, float]

    def rows(self) -> list[dict[str, str | float]]:
        """One flat dict a line of the table, with the key ``"case"`` first, for csv.DictWriter or pandas."""
        lines = [*self.cases.items(), ("all rows", self.all_rows), ("mean of cases", self.mean_of_cases)]
        return [{"case": case, **scores} for case, scores in lines]

    def __str__(self) -> str:
        """An aligned table, the scores in percent and – where undefined."""
        table = [["scores in %", *self.all_rows]]
        for case, count, *scores in (line.values() for line in self.rows()):
            table.append([str(case), str(count), *("–" if x != x else f"{100 * float(x):.1f}" for x in scores)])
        first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
        return "\n".join(
            "  ".join([line[0].ljust(first), *(cell.rjust(n) for cell, n in zip(line[1:], others, strict=True))])
            for line in table
        )


def evaluate(
    logits: Tensor, labels: Tensor, present: Tensor, modalities: Sequence[str], threshold: float = 0.5
) -> Report:
    """Score predictions for each missing case, for all rows, and as the mean of the cases.

    The case of a row is what it has, whichever case's prototypes scored it. The scores, all of float64 probabilities,
    the softmax of the logits or, with several labels, their sigmoid:

    - ``accuracy``: With one label a row only; of several labels most are right by naming none.
    - ``macro_f1``: Mean F1 over the classes that occur in the labels or the predictions of the rows, as torchmetrics
      has it with one label and scikit-learn with ``zero_division=nan``.
    - ``map``: With several labels only. Mean average precision over the classes that some of the rows have and some
      have not: of a class without either it says nothing (0/0, or 1 for whatever model).
    - ``auroc``: Mean area under the ROC curve of each class against the rest, over the same classes.
    - ``ece``: Expected calibration error (Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599): the mean distance
      between probability and frequency over 15 equal bins, of the predicted class; with several labels, of all N·K
      probabilities.
    - ``aurc``: Area under the risk-coverage curve (Geifman et al., arXiv 1805.08206): the error rate among the n most
      confident predictions, averaged over n. Confidence is the predicted class's probability; with several labels the
      N·K decisions each count, with the probability of what was decided. Equally confident ones come in random order,
      and the expected value is returned.

    Rows with nothing present have uniform logits in this library's head: their prediction is class 0 or no label.

    Args:
        logits: (N, K) floating-point, on any device.
        labels: (N,) int64, where -100 leaves a row out; or (N, K) of 0 and 1 in any dtype, several a row.
        present: (N, M) bool.
        modalities: The M names in the order of the columns, such as ``head.modalities``.
        threshold: With several labels: a label is predicted if its probability is above.

    Returns:
        The scores.

    Raises:
        ValueError: If shapes or values are not as said, a logit is not finite, or no row is left.
        TypeError: If a dtype is not as said.
        ImportError: If torchmetrics is missing.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
        >>> present = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
        >>> report = evaluate(logits, torch.tensor([0, 1, 1, 1]), present, ["image", "text"])
        >>> print(report)
        scores in %    rows  accuracy  macro_f1  auroc   ece  aurc
        image+text        3      66.7      66.7   50.0  44.7  61.1
        image             1     100.0     100.0      –  11.9   0.0
        all rows          4      75.0      73.3   66.7  36.5  52.1
        mean of cases     4      83.3      83.3   50.0  28.3  30.6
        >>> round(report.cases["image+text"]["macro_f1"], 3)
        0.667
        >>> report.rows()[1]["case"]
        'image'
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected argument `threshold` to be in [0, 1], but got {threshold}.")
    logits, marks, present, several = _read(logits, labels, present, modalities)
    probability = logits.sigmoid() if several else logits.softmax(1)
    said = probability > threshold if several else _one_hot(logits.argmax(1), logits.shape[1])
    members: dict[str, list[int]] = {}
    for row, has in enumerate(present.tolist()):
        members.setdefault("+".join(compress(modalities, has)) or NOTHING, []).append(row)
    cases = {
        case: _scores(probability[rows], marks[rows], said[rows], several)
        for case in (*case_names(modalities), NOTHING)
        if (rows := members.get(case))
    }
    all_rows = _scores(probability, marks, said, several)
    averaged = [scores for case, scores in cases.items() if case != NOTHING]
    mean = {name: torch.tensor([scores[name] for scores in averaged]).double().nanmean().item() for name in all_rows}
    mean["rows"] = sum(int(scores["rows"]) for scores in averaged)
    return Report(cases, all_rows, mean)


def fit_temperature(
    logits: Tensor,
    labels: Tensor,
    present: Tensor,
    modalities: Sequence[str],
    cases: Sequence[str] | None = None,
    min_rows: int = 20,
) -> dict[str, float]:
    """For each case the temperature T > 0 that makes ``logits / T`` fit best (Guo et al., arXiv 1706.04599).

    T minimises cross-entropy, or binary cross-entropy with several labels, over the case's rows: take them from
    validation. Predictions of one label stay as they are, and so do those of several at a threshold of 0.5. The
    logits of a head with ``centered=False`` are cosines times ``head.scale``, which takes T in, after training: see the
    example. Where there is a bias, which T divides too, divide the logits.

    Args:
        logits: As in :func:`evaluate`.
        labels: As in :func:`evaluate`.
        present: As in :func:`evaluate`.
        modalities: As in :func:`evaluate`.
        cases: The cases that scored the rows: ``head.seen_cases`` for a head in eval mode. All by default. Rows of any
            other case count as those of the nearest (:func:`protohead.cases.nearest_case`).
        min_rows: A case with fewer gets the temperature of all rows together.

    Returns:
        Name of each of `cases`, in order, to T in [0.01, 100]; 1 where the logits say nothing at any T.

    Raises:
        ValueError: As :func:`evaluate`; also if a case is unknown or given twice, or there is none.
        TypeError: As :func:`evaluate`.

    Warns:
        UserWarning: If a case's T is at a bound, since its rows give none: all are right, or the logits no better than
            chance.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 3, "text": 3}, num_classes=3, centered=False)
        >>> labels = torch.arange(90) % 3
        >>> noise = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
        >>> features = torch.eye(3)[labels].repeat(1, 2) + noise
        >>> present = torch.tensor([[True, True], [True, False], [False, True]]).repeat_interleave(30, 0)
        >>> head.imprint(features, labels, present)
        >>> logits = head.eval()(features, present).detach()
        >>> temperatures = fit_temperature(logits, labels, present, head.modalities, head.seen_cases)
        >>> {case: round(T, 1) for case, T in temperatures.items()}
        {'image+text': 8.8, 'image': 16.9, 'text': 17.2}
        >>> for case, T in temperatures.items():
        ...     head.scale[head.cases.index(case)] /= T
        >>> torch.allclose(head(features, present)[0], logits[0] / temperatures["image+text"], atol=1e-5)
        True
    """
    check_count("min_rows", min_rows)
    logits, marks, present, several = _read(logits, labels, present, modalities)
    masks, names = case_masks(modalities), case_names(modalities)
    chosen = list(names if cases is None else [cases] if isinstance(cases, str) else cases)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(names):
        raise ValueError(f"Expected `cases` to be among {names}, at least one and none twice, but got {chosen}.")
    index = nearest_case(present, masks, torch.tensor([name in chosen for name in names]))
    # How far each class's logit is above that of the label; with several labels, on the wrong side of 0.
    excess = torch.where(marks, -logits, logits) if several else logits - logits[marks][:, None]
    found = {}
    for c, name in enumerate(names):
        if name in chosen:
            rows = excess[index == c]
            found[name] = _temperature(name, rows if len(rows) >= min_rows else excess, several)
    return found


@torch.no_grad()
def contributions_by_class(
    head: DecoupledPrototypeHead, features: Features, labels: Tensor, present: Tensor | None = None
) -> Tensor:
    """What each modality adds, on average, to the logit of the class that a row is labelled with.

    The mean is over the rows that have both the label and the modality. A modality that the head does not use for a
    row, because the nearest seen case lacks it, adds 0 there.

    Args:
        head: The head, whose mode (training or eval) is kept.
        features: As in the head's forward, for all the rows at once; they are worked through in parts.
        labels: As in :func:`evaluate`, (B,) or (B, K).
        present: As in the head's forward.

    Returns:
        (K, M) float64 on the CPU, columns in the order of ``head.modalities``; NaN where there is no such row.

    Raises:
        ValueError: As the head and :func:`evaluate`.
        TypeError: As the head and :func:`evaluate`.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 4, "text": 4}, num_classes=2)
        >>> present = torch.tensor([[True, True], [True, False]])
        >>> contributions_by_class(head, torch.ones(2, 8), torch.tensor([0, 1]), present).isnan().tolist()
        [[False, False], [False, True]]
    """
    rows, present = read_features(features, present, head.in_features, head.seen.device)
    marks, _, _ = _read_labels(labels, len(present), head.num_classes)
    for m, name in enumerate(head.modalities):
        _check_finite(f"features of {name!r}", rows[m], present[:, m])
    total = torch.zeros(len(rows), head.num_classes, dtype=torch.float64)
    count = torch.zeros_like(total)
    for *some, here, mark in zip(*(x.split(4096) for x in (*rows, present, marks)), strict=True):
        added = head.contributions(dict(zip(head.modalities, some, strict=True)), here).cpu().double()
        counted = here.cpu()[:, :, None] & mark[:, None]  # (B, M, K)
        total += torch.where(counted, added, 0).sum(0)
        count += counted.sum(0)
    return (total / count).T


# -- the steps --------------------------------------------------------------------------------------------------------


def _read(
    logits: Tensor, labels: Tensor, present: Tensor, modalities: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Check a batch; on the CPU, without ignored rows: (N, K) float64 logits, (N, K) bool labels, (N, M) bool present.

    Last, whether a row may have several labels.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"Expected argument `logits` to be a floating-point tensor, but got {got}.")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"Expected argument `logits` to be of shape (N, K), but got {tuple(logits.shape)}.")
    check_present(present, modalities)
    if len(present) != len(logits):
        raise ValueError(f"Expected one batch size, but got {len(logits)} rows of logits, {len(present)} of `present`.")
    marks, kept, several = _read_labels(labels, *logits.shape)
    logits = logits.detach().cpu().double()
    _check_finite("logits", logits, kept)
    if not kept.any():
        raise ValueError(f"Expected at least one row with a label other than -100, but got none of {len(logits)}.")
    return logits[kept], marks[kept], present.cpu()[kept], several


def _read_labels(labels: Tensor, batch: int, num_classes: int) -> tuple[Tensor, Tensor, bool]:
    """(N, K) bool, the labels of each row; (N,) bool, the rows that count; and whether a row may have several."""
    several = isinstance(labels, Tensor) and labels.dim() == 2
    if isinstance(labels, Tensor):
        labels = labels.cpu().double() if several else labels.cpu()  # On the CPU values are checked, too.
    check_labels(labels, batch, num_classes)
    if not several:
        return _one_hot(labels, num_classes), labels != -100, False
    if (soft := (labels != 0) & (labels != 1)).any():
        at = soft.nonzero()[0].tolist()
        raise ValueError(f"Expected argument `labels` to be 0 or 1, but got {labels[tuple(at)]} in row {at[0]}.")
    return labels == 1, torch.ones(batch, dtype=torch.bool), True


def _one_hot(index: Tensor, num_classes: int) -> Tensor:
    return index[:, None] == torch.arange(num_classes)


def _check_finite(what: str, values: Tensor, kept: Tensor) -> None:
    if (wrong := kept & ~values.isfinite().all(1)).any():
        raise ValueError(f"Expected finite {what}, but row {int(wrong.nonzero()[0])} has others.")


def _scores(probability: Tensor, marks: Tensor, said: Tensor, several: bool) -> dict[str, float]:
    """All scores of some rows, each argument (N, K)."""
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError('evaluate() needs torchmetrics: pip install "protohead[eval]".') from error

    def class_mean(metric: Callable[..., Tensor], predicted: Tensor, classes: Tensor) -> float:
        count = int(classes.sum())
        if not count:
            return math.nan
        return metric(predicted[:, classes], marks[:, classes].long(), count, validate_args=False).item()

    decided = marks.any(0) & ~marks.all(0)
    scores: dict[str, float] = {"rows": len(marks)}
    if not several:
        scores["accuracy"] = (said & marks).any(1).double().mean().item()
    scores["macro_f1"] = class_mean(classification.multilabel_f1_score, said.long(), (said | marks).any(0))
    if several:
        scores["map"] = class_mean(classification.multilabel_average_precision, probability, decided)
        confidence, wrong = torch.where(said, probability, 1 - probability).flatten(), (said != marks).flatten()
    else:
        confidence, wrong = probability[said], ~marks[said]
    scores["auroc"] = class_mean(classification.multilabel_auroc, probability, decided)
    forecast, true = (probability.flatten(), marks.flatten()) if several else (confidence, ~wrong)
    # torchmetrics would give a probability of exactly 1 a bin of its own.
    forecast = forecast.clamp(max=1 - 1e-12)
    scores["ece"] = classification.binary_calibration_error(forecast, true.long(), n_bins=15).item()
    scores["aurc"] = _area_under_risk_coverage(confidence, wrong)
    return scores


def _area_under_risk_coverage(confidence: Tensor, wrong: Tensor) -> float:
    """The mean over n of the expected error rate among the n most confident of N; arguments (N,)."""
    _, tie, size = (-confidence).unique(return_inverse=True, return_counts=True)  # ascending: most confident first
    errors = torch.bincount(tie, weights=wrong.double())
    expected = (errors / size).repeat_interleave(size).cumsum(0)
    return float((expected / torch.arange(1, len(wrong) + 1)).mean())


def _temperature(case: str, excess: Tensor, several: bool) -> float:
    """Where the loss, which is convex in 1/T, has slope 0: found by halving an interval of log T."""
    low, high = -WIDEST, WIDEST
    for _ in range(50):
        middle = (low + high) / 2
        scaled = excess * math.exp(-middle)
        slope = (excess * (scaled.sigmoid() if several else scaled.softmax(1))).sum().item()
        if middle == slope == 0:
            return 1.0
        low, high = (middle, high) if slope > 0 else (low, middle)
    if low == -WIDEST or high == WIDEST:
        why = "(almost) all rows are right" if low == -WIDEST else "the logits are no better than chance"
        warnings.warn(f"The temperature of {case!r} is at its bound, {math.exp(middle):g}: {why}.", stacklevel=3)
    return math.exp(middle)
