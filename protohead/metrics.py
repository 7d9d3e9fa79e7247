"""Evaluation by missing case, and what each modality adds to the logit of each class.

``import protohead`` does not import this. :func:`evaluate` needs torchmetrics: ``pip install "protohead[eval]"``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from protohead.cases import case_names
from protohead.head import DecoupledPrototypeHead
from protohead.inputs import Features, check_features, read_features
from protohead.labelled import one_hot, read_batch, read_labels

__all__ = ["Report", "contributions_by_class", "evaluate"]

NOTHING = "(nothing)"


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
        lines = [["scores in %", *self.all_rows]]
        for case, count, *scores in (line.values() for line in self.rows()):
            lines.append([str(case), str(count), *(_percent(float(score)) for score in scores)])
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        table = []
        for name, *cells in lines:
            aligned = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
            table.append("  ".join([name.ljust(first), *aligned]))
        return "\n".join(table)


def evaluate(
    logits: Tensor, labels: Tensor, present: Tensor, modalities: Sequence[str], threshold: float = 0.5
) -> Report:
    """Score predictions for each missing case, for all rows, and as the mean of the cases.

    The case of a row is what it has, whichever case's prototypes gave its logits. The scores, all of float64
    probabilities, the softmax of the logits or, with several labels, their sigmoid:

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
        ValueError: If shapes or values are not as said, a logit is not finite, they are plainly probabilities (rows
            in [0, 1] that sum to one or, with several labels, all in [0, 1]), or no row is left.
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
    batch = read_batch(logits, labels, present, modalities)
    if batch.multilabel:
        probability = batch.logits.sigmoid()
        predicted = probability > threshold
    else:
        probability = batch.logits.softmax(1)
        predicted = one_hot(batch.logits.argmax(1), batch.logits.shape[1])

    def scores_of(rows: list[int] | slice) -> dict[str, float]:
        return _scores(probability[rows], batch.labels[rows], predicted[rows], batch.multilabel)

    cases = {case: scores_of(rows) for case, rows in _rows_by_case(batch.present, modalities).items()}
    all_rows = scores_of(slice(None))
    return Report(cases, all_rows, _mean_of_cases(cases, all_rows))


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
    labels, _, _ = read_labels(labels, len(present), head.num_classes)
    check_features(head.modalities, rows, present)  # On devices, too.
    total = torch.zeros(len(rows), head.num_classes, dtype=torch.float64)
    count = torch.zeros_like(total)
    for *some, here, label in zip(*(x.split(4096) for x in (*rows, present, labels)), strict=True):
        added = head.contributions(dict(zip(head.modalities, some, strict=True)), here).cpu().double()
        counted = here.cpu()[:, :, None] & label[:, None]  # (B, M, K)
        total += torch.where(counted, added, 0).sum(0)
        count += counted.sum(0)
    return (total / count).T


# -- the steps --------------------------------------------------------------------------------------------------------


def _rows_by_case(present: Tensor, modalities: Sequence[str]) -> dict[str, list[int]]:
    """The rows of each case that has some, in the order of the cases."""
    rows: dict[str, list[int]] = {case: [] for case in (*case_names(modalities), NOTHING)}
    for row, mask in enumerate(present.tolist()):
        rows["+".join(compress(modalities, mask)) or NOTHING].append(row)
    return {case: members for case, members in rows.items() if members}


def _mean_of_cases(cases: Mapping[str, Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The plain mean of each score over the cases where it is defined; of the rows the sum."""
    averaged = [scores for case, scores in cases.items() if case != NOTHING]
    means = {}
    for name in names:
        means[name] = torch.tensor([scores[name] for scores in averaged]).double().nanmean().item()
    means["rows"] = sum(int(scores["rows"]) for scores in averaged)
    return means


def _scores(probability: Tensor, labels: Tensor, predicted: Tensor, multilabel: bool) -> dict[str, float]:
    """All scores of some rows, each argument (N, K)."""
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError('evaluate() needs torchmetrics: pip install "protohead[eval]".') from error

    occurs = (labels | predicted).any(0)
    on_both_sides = labels.any(0) & ~labels.all(0)
    if multilabel:
        forecast, true = probability.flatten(), labels.flatten()
        confidence = torch.where(predicted, probability, 1 - probability).flatten()
        wrong = (predicted != labels).flatten()
    else:
        forecast, true = probability[predicted], labels[predicted]
        confidence, wrong = forecast, ~true
    scores: dict[str, float] = {"rows": len(labels)}
    if not multilabel:
        scores["accuracy"] = true.double().mean().item()
    scores["macro_f1"] = _class_mean(classification.multilabel_f1_score, predicted.long(), labels, occurs)
    if multilabel:
        metric = classification.multilabel_average_precision
        scores["map"] = _class_mean(metric, probability, labels, on_both_sides)
    scores["auroc"] = _class_mean(classification.multilabel_auroc, probability, labels, on_both_sides)
    # torchmetrics would give a probability of exactly 1 a bin of its own.
    forecast = forecast.clamp(max=1 - 1e-12)
    scores["ece"] = classification.binary_calibration_error(forecast, true.long(), n_bins=15).item()
    scores["aurc"] = _area_under_risk_coverage(confidence, wrong)
    return scores


def _class_mean(metric: Callable[..., Tensor], predicted: Tensor, labels: Tensor, classes: Tensor) -> float:
    """The mean of a metric over some of the classes, a (K,) mask."""
    count = int(classes.sum())
    if not count:
        return math.nan
    return metric(predicted[:, classes], labels[:, classes].long(), count, validate_args=False).item()


def _area_under_risk_coverage(confidence: Tensor, wrong: Tensor) -> float:
    """The mean over n of the expected error rate among the n most confident of N; arguments (N,)."""
    _, tie, size = (-confidence).unique(return_inverse=True, return_counts=True)  # ascending: most confident first
    errors = torch.bincount(tie, weights=wrong.double())
    expected = (errors / size).repeat_interleave(size).cumsum(0)
    return float((expected / torch.arange(1, len(wrong) + 1)).mean())


def _percent(score: float) -> str:
    return "–" if math.isnan(score) else f"{100 * score:.1f}"
