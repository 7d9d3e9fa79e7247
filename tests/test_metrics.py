"""Each score against a slow, obvious transcription."""

import csv
import importlib
import io
import math
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc, multiclass_f1_score

from protohead import DecoupledPrototypeHead
from protohead.cases import case_names
from protohead.metrics import Report, contributions_by_class, evaluate

NAMES = ("image", "text")
ROWS, CLASSES = 60, 5
EXACT = {"rel": 1e-6, "abs": 1e-6, "nan_ok": True}  # torchmetrics divides in float32.


# -- the definitions, in plain Python: `p`, `truth` and `predicted` are lists of rows ----------------------------------


def slow_scores(logits, labels, threshold=0.5):
    logits, several = logits.double().tolist(), labels.dim() == 2
    count = len(logits[0])
    if several:
        truth = [[value == 1 for value in row] for row in labels.tolist()]
        p = [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
        predicted = [[x > threshold for x in row] for row in p]
    else:
        truth = [[k == label for k in range(count)] for label in labels.tolist()]
        p = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]
        predicted = [[k == row.index(max(row)) for k in range(count)] for row in logits]
    columns = [list(zip(*table, strict=True)) for table in (p, truth, predicted)]
    by_class = list(zip(*columns, strict=True))
    flat = [[x for row in table for x in row] for table in (p, truth, predicted)]
    if several:
        forecasts = list(zip(flat[0], flat[1], strict=True))
        decisions = [(x if yes else 1 - x, yes != true) for x, true, yes in zip(*flat, strict=True)]
    else:
        forecasts = [(x, true) for x, true, yes in zip(*flat, strict=True) if yes]
        decisions = [(x, not true) for x, true in forecasts]
    scores = {"rows": len(logits)}
    if not several:
        scores["accuracy"] = mean([true for _, true in forecasts])
    scores["macro_f1"] = mean([slow_f1(true, yes) for _, true, yes in by_class if any(true) or any(yes)])
    if several:
        scores["map"] = mean([slow_precision(x, true) for x, true, _ in by_class if any(true) and not all(true)])
    scores["auroc"] = mean([slow_auroc(x, true) for x, true, _ in by_class if any(true) and not all(true)])
    return {**scores, "ece": slow_ece(forecasts), "aurc": slow_aurc(decisions)}


def mean(values):
    return sum(values) / len(values) if values else math.nan


def slow_f1(true, predicted):
    both = sum(a and b for a, b in zip(true, predicted, strict=True))
    return 2 * both / (sum(true) + sum(predicted))


def slow_auroc(p, true):
    """How often a row of the class has the higher probability of two; a draw counts half."""
    pairs = [(a, b) for a, x in zip(p, true, strict=True) if x for b, y in zip(p, true, strict=True) if not y]
    return mean([(a > b) + (a == b) / 2 for a, b in pairs])


def slow_precision(p, true):
    """The precision at the threshold of each row of the class."""
    return mean([mean([y for b, y in zip(p, true, strict=True) if b >= a]) for a, x in zip(p, true, strict=True) if x])


def slow_ece(forecasts):
    bins = [[(x, true) for x, true in forecasts if min(int(15 * x), 14) == number] for number in range(15)]
    gaps = [abs(sum(true - x for x, true in members)) for members in bins]
    return sum(gaps) / len(forecasts)


def slow_aurc(decisions):
    """The mean over many random orders of the equally confident, each followed literally."""
    generator = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(1 if len({x for x, _ in decisions}) == len(decisions) else 4000):
        order = torch.randperm(len(decisions), generator=generator).tolist()
        ranked = [wrong for _, wrong in sorted((decisions[i] for i in order), key=lambda pair: -pair[0])]
        areas.append(mean([mean(ranked[:n]) for n in range(1, len(ranked) + 1)]))
    return mean(areas)


def single(rows=ROWS, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits = 2 * torch.randn(rows, classes, generator=generator) + 2 * F.one_hot(labels, classes)
    present = torch.tensor([[True, True], [True, False], [False, True]])[torch.arange(rows) % 3]
    return logits, labels, present


def several(rows=ROWS, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, classes, generator=generator) < 0.3).float()
    logits = 2 * torch.randn(rows, classes, generator=generator) + 2 * labels - 1
    return logits, labels, single(rows)[2]


# -- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [single, several])
def test_every_score_is_its_definition_in_every_case(kind, seed):
    logits, labels, present = kind(seed=seed)
    report = evaluate(logits, labels, present, NAMES)
    assert list(report.cases) == ["image+text", "image", "text"]
    for case, scores in report.cases.items():
        rows = (present == torch.tensor([name in case.split("+") for name in NAMES])).all(1)
        assert scores == pytest.approx(slow_scores(logits[rows], labels[rows]), **EXACT)
    assert report.all_rows == pytest.approx(slow_scores(logits, labels), **EXACT)
    for name in set(report.all_rows) - {"rows"}:
        assert report.mean_of_cases[name] == pytest.approx(mean([scores[name] for scores in report.cases.values()]))
    assert report.mean_of_cases["rows"] == ROWS


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7, 1.0])
def test_threshold(threshold):
    logits, labels, present = several()
    scores = evaluate(logits, labels, present, NAMES, threshold).all_rows
    assert scores == pytest.approx(slow_scores(logits, labels, threshold), **EXACT)


def test_one_label_is_as_torchmetrics_has_it():
    logits, labels, present = single(rows=12, classes=20)  # Most classes do not occur.
    scores = evaluate(logits, labels, present, NAMES).all_rows
    assert scores["accuracy"] == pytest.approx(multiclass_accuracy(logits, labels, 20, average="micro").item())
    assert scores["macro_f1"] == pytest.approx(multiclass_f1_score(logits, labels, 20, average="macro").item())
    logits, labels, present = single()
    scores = evaluate(logits, labels, present, NAMES).all_rows
    assert scores["auroc"] == pytest.approx(multiclass_auroc(logits, labels, CLASSES).item())


@pytest.mark.parametrize("kind", [single, several])
def test_ties(kind):
    logits, labels, present = kind(rows=9)
    logits = logits.mul(0.5).round()  # Many equal probabilities.
    scores, slow = evaluate(logits, labels, present, NAMES).all_rows, slow_scores(logits, labels)
    assert scores.pop("aurc") == pytest.approx(slow.pop("aurc"), abs=0.01)  # of 4000 random orders
    assert scores == pytest.approx(slow, **EXACT)


def test_equally_confident_predictions_come_in_random_order():
    logits, present = torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool)
    logits[0, 0] = 9.0  # right; then three tied, all predicted to be class 0, of which one is wrong
    scores = evaluate(logits, torch.tensor([0, 0, 1, 0]), present, NAMES).all_rows
    assert scores["aurc"] == pytest.approx((0 + (1 / 3) / 2 + (2 / 3) / 3 + 1 / 4) / 4)


@pytest.mark.parametrize("kind", [single, several])
def test_order_of_rows_plays_no_part(kind):
    logits, labels, present = kind()
    logits = logits.mul(0.5).round()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    shuffled = evaluate(logits[order], labels[order], present[order], NAMES)
    for line, other in zip(evaluate(logits, labels, present, NAMES).rows(), shuffled.rows(), strict=True):
        assert line.pop("case") == other.pop("case")
        assert line == pytest.approx(other, rel=1e-12)


def test_a_case_is_scored_as_its_rows_alone():
    logits, labels, _ = single()
    names = ("audio", "image", "text")
    present = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    report = evaluate(logits, labels, present, names)
    assert list(report.cases) == [*case_names(names), "(nothing)"]
    seen = 0
    for case in case_names(names):
        rows = (present == torch.tensor([name in case.split("+") for name in names])).all(1)
        alone = evaluate(logits[rows], labels[rows], present[rows], names)
        assert list(alone.cases) == [case]
        assert report.cases[case] == alone.cases[case] == pytest.approx(alone.all_rows, nan_ok=True)
        seen += report.cases[case]["rows"]
    assert report.cases["(nothing)"] == pytest.approx(
        evaluate(logits[~present.any(1)], labels[~present.any(1)], present[~present.any(1)], names).all_rows,
        nan_ok=True,
    )
    assert report.all_rows["rows"] == seen + report.cases["(nothing)"]["rows"] == ROWS


def test_rows_with_nothing_are_shown_but_not_averaged():
    logits, labels, present = single()
    present[:3] = False
    logits[:3] = 0
    report, others = evaluate(logits, labels, present, NAMES), evaluate(logits[3:], labels[3:], present[3:], NAMES)
    assert report.cases["(nothing)"]["rows"] == 3
    assert report.all_rows["accuracy"] != others.all_rows["accuracy"]
    assert report.mean_of_cases == others.mean_of_cases
    nothing = evaluate(logits[:3], labels[:3], present[:3], NAMES)
    assert nothing.mean_of_cases["rows"] == 0
    assert math.isnan(nothing.mean_of_cases["accuracy"])


def test_ignored_rows_count_nowhere():
    logits, labels, present = single()
    labels[::4] = -100
    logits[0], kept = math.nan, labels != -100
    report = evaluate(logits, labels, present, NAMES)
    assert report == evaluate(logits[kept], labels[kept], present[kept], NAMES)
    assert report.all_rows["rows"] == 45


def test_undefined_scores_are_nan_and_left_out_of_means():
    logits, present = torch.tensor([[2.0, 0], [1, 0], [3, 0], [0, 1]]), single(4)[2]
    present[:2], present[2:] = True, torch.tensor([True, False])
    report = evaluate(logits, torch.tensor([0, 0, 0, 1]), present, NAMES)
    assert math.isnan(report.cases["image+text"]["auroc"])  # Class 0 only: no row of another.
    assert report.cases["image+text"]["macro_f1"] == 1
    assert report.mean_of_cases["auroc"] == report.cases["image"]["auroc"] == 1
    line = str(report).splitlines()[1].split()
    assert line == ["image+text", "2", "100.0", "100.0", "–", line[5], "0.0"]
    none = evaluate(-torch.ones(3, 2), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), NAMES).all_rows
    assert [name for name, score in none.items() if math.isnan(score)] == ["macro_f1", "map", "auroc"]


def test_a_label_of_every_row_and_of_none_is_left_out():
    logits, labels, present = several()
    labels[:, 0], labels[:, 1] = 1, 0
    scores = evaluate(logits, labels, present, NAMES).all_rows
    rest = evaluate(logits[:, 2:], labels[:, 2:], present, NAMES).all_rows
    assert scores["map"] == rest["map"]
    assert scores["auroc"] == rest["auroc"]


def test_one_class():
    present = torch.ones(3, 2, dtype=torch.bool)
    scores = evaluate(torch.randn(3, 1), torch.zeros(3, dtype=torch.long), present, NAMES).all_rows
    expected = {"rows": 3, "accuracy": 1, "macro_f1": 1, "auroc": math.nan, "ece": 0, "aurc": 0}
    assert scores == pytest.approx(expected, abs=1e-9, nan_ok=True)
    logits, labels = torch.tensor([[2.0], [1], [-3]]), torch.tensor([[1], [0], [0]])
    scores = evaluate(logits, labels, present, NAMES).all_rows
    assert scores == pytest.approx(slow_scores(logits, labels), **EXACT)
    assert scores["map"] == 1


def test_certain_predictions_share_the_last_bin():
    present, labels = torch.ones(4, 2, dtype=torch.bool), torch.tensor([1, 1, 0, 0])
    certain = torch.tensor([[0.0, 900], [0, 900], [0, 900], [3, 0]])  # three of 1.0, of which one is wrong, and 0.953
    scores = evaluate(certain, labels, present, NAMES).all_rows
    assert scores["ece"] == pytest.approx(torch.tensor(3.0).sigmoid().item() / 4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_widened(dtype):
    logits, labels, present = single()
    logits = logits.to(dtype).requires_grad_()
    assert evaluate(logits, labels, present, NAMES) == evaluate(logits.double(), labels, present, NAMES)
    big = torch.tensor([[20.0, 0.0], [21.0, 0.0], [0.0, 1.0]], dtype=dtype)  # float32 has 1.0 for both.
    scores = evaluate(big, torch.tensor([1, 0, 1]), present[:3], NAMES).all_rows
    assert scores["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_labels_of_any_dtype(dtype):
    logits, labels, present = several()
    assert evaluate(logits, labels.to(dtype), present, NAMES) == evaluate(logits, labels, present, NAMES)


def test_rows_and_table():
    logits, labels, present = single()
    report = evaluate(logits, labels, present, NAMES)
    lines = report.rows()
    assert [line["case"] for line in lines] == ["image+text", "image", "text", "all rows", "mean of cases"]
    assert list(lines[0]) == ["case", "rows", "accuracy", "macro_f1", "auroc", "ece", "aurc"]
    assert lines[3] == {"case": "all rows", **report.all_rows}
    file = io.StringIO()
    writer = csv.DictWriter(file, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    read = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert float(read[1]["auroc"]) == report.cases["image"]["auroc"]
    assert read[1]["rows"] == "20"
    table = str(report).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["scores", "in", "%", *list(lines[0])[1:]]
    assert table[2].split()[:3] == ["image", "20", f"{100 * report.cases['image']['accuracy']:.1f}"]
    assert list(evaluate(*several(), NAMES).all_rows) == ["rows", "macro_f1", "map", "auroc", "ece", "aurc"]


LOGITS, LABELS, PRESENT = single(6)


def test_report_is_plain():
    report = evaluate(LOGITS, LABELS, PRESENT, NAMES)
    assert isinstance(report, Report)
    assert {type(value) for scores in report.cases.values() for value in scores.values()} == {int, float}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": LOGITS.long()}, TypeError, "`logits` to be a floating-point tensor, but got torch.int64"),
        ({"logits": LOGITS.tolist()}, TypeError, "`logits` to be a floating-point tensor, but got list"),
        ({"logits": LOGITS[0]}, ValueError, r"`logits` to be of shape \(N, K\), but got \(5,\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, r"but got \(6, 0\)"),
        ({"logits": LOGITS.index_fill(0, torch.tensor([4]), math.inf)}, ValueError, "finite logits, but row 4 has"),
        ({"labels": LABELS.tolist()}, TypeError, "`labels` to be int64 .*, but got list"),
        ({"labels": LABELS.int()}, TypeError, "got torch.int32"),
        ({"labels": LABELS[:5]}, ValueError, r"got torch.int64 \(5,\) for B = 6"),
        (
            {"labels": LABELS.index_fill(0, torch.tensor([3]), 5)},
            ValueError,
            r"in \[0, 5\), or -100, but got 5 in row 3",
        ),
        ({"labels": torch.full((6, 5), 0.5)}, ValueError, "`labels` to be 0 or 1, but got 0.5 in row 0"),
        ({"labels": torch.full((6, 5), -100)}, ValueError, r"in \[0, 1\], but got -100.0 in row 0"),
        ({"labels": torch.ones(6, 4)}, ValueError, r"\(B, 5\), but got .* \(6, 4\)"),
        ({"labels": torch.full((6,), -100)}, ValueError, "at least one row with a label .*, but got none of 6"),
        ({"logits": LOGITS[:0], "labels": LABELS[:0], "present": PRESENT[:0]}, ValueError, "but got none of 0"),
        ({"present": PRESENT.int()}, TypeError, "`present` to be a bool tensor.* but got torch.int32"),
        ({"present": PRESENT[:, :1]}, ValueError, r"`present` to be of shape \(B, 2\)"),
        ({"present": PRESENT[:5]}, ValueError, "one batch size, but got 6 rows of logits, 5 of `present`"),
        ({"modalities": ("image", "image")}, ValueError, "no name twice"),
    ],
)
def test_wrong_use(change, error, match):
    with pytest.raises(error, match=match):
        evaluate(**{"logits": LOGITS, "labels": LABELS, "present": PRESENT, "modalities": NAMES, **change})


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_wrong_threshold(threshold):
    with pytest.raises(ValueError, match=rf"`threshold` to be in \[0, 1\], but got {threshold}"):
        evaluate(LOGITS, LABELS, PRESENT, NAMES, threshold)


def test_torchmetrics_is_needed_for_evaluate_only():
    """And `import protohead` needs neither this module nor those for experiments."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "protohead"]
    with mock.patch.dict(sys.modules, {"torchmetrics": None, "torchmetrics.functional": None}):
        for name in loaded:
            del sys.modules[name]
        importlib.import_module("protohead")
        assert not {f"protohead.{name}" for name in ("metrics", "simulate", "tables")} & set(sys.modules)
        metrics = importlib.import_module("protohead.metrics")
        with pytest.raises(ImportError, match=r'pip install "protohead\[eval\]"'):
            metrics.evaluate(LOGITS, LABELS, PRESENT, NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 5, 1000])
def test_probabilities_are_no_logits(classes, dtype):
    logits = torch.randn(30, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels, present = torch.arange(30) % classes, torch.ones(30, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="Expected argument `logits` to be logits, but got probabilities"):
        evaluate(logits.softmax(1), labels, present, NAMES)
    evaluate(logits, labels, present, NAMES)


def test_some_rows_may_look_like_probabilities():
    logits, labels, present = single()
    logits = logits.softmax(1)
    logits[3] *= 1.5
    evaluate(logits, labels, present, NAMES)
    evaluate(torch.ones(60, 1), torch.zeros(60, dtype=torch.int64), present, NAMES)  # One class.


# -- contributions_by_class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [single, several])
@pytest.mark.parametrize("rows", [60, 9000])
def test_contributions_are_means_over_the_rows_of_a_class(kind, rows):
    _, labels, present = kind(rows)
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, CLASSES)
    features = {"image": torch.randn(rows, 4), "text": torch.randn(rows, 3)}
    if kind is single:
        labels[::7] = -100
    features["image"][~present[:, 0]] = math.nan
    found = contributions_by_class(head, features, labels, present)
    added = head.contributions(features, present)
    labelled = labels == 1 if kind is several else labels[:, None] == torch.arange(CLASSES)
    for k in range(CLASSES):
        for m in range(2):
            at = labelled[:, k] & present[:, m]
            assert found[k, m] == pytest.approx(added[at, m, k].double().mean().item(), abs=1e-5)
    assert found.shape == (CLASSES, 2)
    assert not found.requires_grad


def test_contributions_without_a_row_are_nan():
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, 3).eval()
    both = torch.ones(2, 7)
    found = contributions_by_class(head, both, torch.tensor([0, 2]), torch.tensor([[True, False], [True, True]]))
    assert found.isnan().tolist() == [[False, True], [True, True], [False, False]]
    both[0, 4:] = 0  # As zeros say that the text is missing.
    assert torch.equal(contributions_by_class(head, both, torch.tensor([0, 2])).isnan(), found.isnan())
    assert contributions_by_class(head, both[:0], torch.zeros(0, dtype=torch.long)).isnan().all()
    assert not head.training


def test_contributions_refuse_what_is_wrong():
    head, labels = DecoupledPrototypeHead({"image": 4, "text": 3}, 3), torch.tensor([0, 2])
    features = torch.ones(2, 7)
    features[1, 5] = math.inf
    with pytest.raises(ValueError, match="finite features of 'text', but row 1 has others"):
        contributions_by_class(head, features, labels)
    with pytest.raises(ValueError, match=r"in \[0, 3\), or -100, but got 3 in row 0"):
        contributions_by_class(head, torch.ones(2, 7), labels + 3)
    with pytest.raises(ValueError, match=r"\(B, 7\)"):
        contributions_by_class(head, features[:, :5], labels)


def test_sigmoids_are_refused_where_rows_have_several_labels():
    labels = torch.eye(4)[torch.arange(12) % 4]
    logits = 4 * labels - 2
    present = torch.ones(12, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"to be logits, but got probabilities: all are in \[0, 1\]"):
        evaluate(logits.sigmoid(), labels, present, ("image", "text"))
    assert evaluate(0 * logits, labels, present, ("image", "text")).all_rows["rows"] == 12  # Nothing is known of them.
