"""benchmarks/calibration.py: what it does to any model is what `calibrate` does to a head; what the report says."""

import copy
import csv

import accuracy
import calibration
import pytest
import report
import torch
from test_accuracy import written

from protohead.metrics import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:Temperatures at a bound")  # These texts are noise.


@pytest.fixture
def task(tmp_path):
    path = written(tmp_path / "a.npz", rows=480)
    return accuracy.Task(path, ("image", "text"), "none", 0.0, 0, "protohead", (0.01,), 2)


def known(task, method):
    line = {"learning_rate": "0.01", "epoch": "2", "ece": "0.5"}
    key = task._replace(method=method).key("a")
    return {(*key, "none", "0"): line, (*key, "all", "0.7"): line | {"ece": "0.25"}}


def test_a_head_is_calibrated_as_it_calibrates_itself(task, tmp_path):
    (own, gaps) = calibration.run(task, known(task, "protohead"), tmp_path)
    data = task.read()
    rows = {name: accuracy.rows_of(data, name, "none", 0.0, 0) for name in ("train", "val", "test")}
    test = accuracy.rows_of(data, "test", "all", 0.7, 0)
    _, _, _, model = accuracy.train("protohead", data, rows["train"], rows["val"], 0.01, 0, 2)["protohead"]
    for line, part, recorded in ((own, rows["test"], "0.5"), (gaps, test, "0.25")):
        head = copy.deepcopy(model.head).eval()
        with torch.no_grad():
            before = evaluate(head(part.features, part.present), part.labels, part.present, ["image", "text"])
            head.calibrate(rows["val"].features, rows["val"].labels, rows["val"].present)
            after = evaluate(head(part.features, part.present), part.labels, part.present, ["image", "text"])
        assert float(line["before"]) == pytest.approx(before.all_rows["ece"], abs=1e-4)
        assert float(line["after"]) == pytest.approx(after.all_rows["ece"], abs=1e-4)
        assert line["recorded"] == recorded
    assert (gaps["test_missing"], gaps["test_rate"], gaps["trained"]) == ("all", "0.7", "protohead")
    assert list(calibration.run(task, known(task, "protohead"), tmp_path)) == [own, gaps]  # Of the model in the folder.


def test_the_floor_is_what_true_probabilities_have():
    """The rest of a bin with n rows is normal with the variance p (1 - p) / n."""
    said = torch.full((800,), 0.3, dtype=torch.float64)
    assert calibration.floor(said) == pytest.approx((2 / torch.pi * 0.3 * 0.7 / 800) ** 0.5, rel=0.4)


@pytest.mark.parametrize("several", [False, True])
def test_scores(several):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0], [1, 0], [0, 1]]) if several else torch.tensor([0, 0, 1])
    found = calibration.scores(2 * logits, logits, labels)
    loss = torch.nn.functional.binary_cross_entropy_with_logits if several else torch.nn.functional.cross_entropy
    assert found["loss"] == pytest.approx(loss(logits, labels.double() if several else labels).item())
    report = evaluate(logits, labels, torch.ones(3, 2, dtype=torch.bool), ["image", "text"])
    assert found["after"] == pytest.approx(report.all_rows["ece"])
    assert found["before"] != found["after"]


def test_any_model_is_calibrated(task, tmp_path):
    task = task._replace(method="linear")
    for line in calibration.run(task, known(task, "linear"), tmp_path):
        assert 0 <= float(line["after"]) <= 1


def test_the_report(tmp_path):
    """Two data sets and seeds; the closed form is not finished in the second."""
    lines = []
    errors = {"linear": (0.06, 0.03), "closed form": (0.04, 0.02), "protohead": (0.08, 0.02)}
    for data in ("toys", "more"):
        for method, (before, after) in errors.items():
            for seed in range(2):
                for train, rate in (("none", "0"), ("all", "0.7")):
                    if (data, method) == ("more", "closed form") and (seed or rate != "0"):
                        continue
                    for test in {(train, rate), ("all", "0.7")}:
                        line = dict(zip(accuracy.KEY, (data, method, train, rate, seed), strict=True))
                        line |= {"test_missing": test[0], "test_rate": test[1], "recorded": before + 0.001}
                        worse = 0.1 * (test != (train, rate))
                        line |= {"before": before + worse, "after": after + worse + 0.002 * seed}
                        lines.append(line | {"floor": 0.01, "loss": 0.5 + after})
    path = tmp_path / "calibration.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, calibration.COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    text = "\n".join(report.calibration(path))
    assert "| toys | 6.0 → 3.1 | 4.0 → 2.1 | 8.0 → 2.1 |" in text
    assert "| more | 6.0 → 3.1 | – → – | 8.0 → 2.1 |" in text
    assert "| all cells | 6.0 → 3.1 | – → – | 8.0 → 2.1 |" in text
    assert "| all cells | 1.0 | – | 1.0 |" in text
    assert "| more | 0.530 | – | 0.520 |" in text
    assert "| tested with all, 70 % | 16.0 → 13.1 | – → – | 18.0 → 12.1 |" in text
    assert "| `linear` | −1.0 | −1.0 to −1.0 |" in text
    assert "`linear` 2, `closed form` 0, `protohead` 2." in text
    assert report.calibration(tmp_path / "none.csv") == ["Not measured here: calibration.py does."]
