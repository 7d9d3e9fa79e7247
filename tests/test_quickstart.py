"""The quickstart, on a small file of its own format and on wrong ones."""

import csv
import sys

import numpy as np
import pytest
import quickstart
import torch
from npz import Split, load

ROWS = 300
SLICES = (slice(0, 6), slice(6, 10))  # The columns of image and text.


def small_file(path, **changes):
    rng = np.random.default_rng(0)
    label = np.arange(ROWS) % 3
    arrays = {
        "image": (np.eye(3, 6)[label] + 0.15 * rng.normal(size=(ROWS, 6))).astype(np.float16),
        "text": (np.eye(3, 4)[label] + 0.15 * rng.normal(size=(ROWS, 4))).astype(np.float32),
        "label": label,
        "split": np.array(["train", "train", "train", "val", "test"])[np.arange(ROWS) * 7 % 5],
    }
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    quickstart.main()


def shorten(monkeypatch):
    for name, value in (("BATCH_SIZE", 16), ("EPOCHS", 4), ("LEARNING_RATES", (3e-2, 1e-1)), ("RATES", (0, 70))):
        monkeypatch.setattr(quickstart, name, value)


def saved_scores(path):
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    scores = {}
    for setting, missing, rate, method, _, value in lines:
        scores.setdefault((setting, missing, int(rate), method), []).append(float(value))
    return {key: np.array(values) for key, values in scores.items()}


def test_runs_on_a_file_and_learns(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    path = small_file(tmp_path / "data.npz")
    call(monkeypatch, "--data", path, "--seeds", 2, "--figure", tmp_path / "figure.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    scores = saved_scores(tmp_path / "figure.csv")
    assert printed.startswith(f"{quickstart.table(scores)}\n\n{quickstart.verdict(scores)}\n")
    assert len(scores) == 3 * (2 * 3 + 3)
    for key, values in scores.items():
        assert len(values) == 2
        assert values.min() > 60, key  # Three classes far apart: chance is 33.


def test_embedded_data():
    splits, widths, num_classes = load(quickstart.EMBEDDED)
    assert sum(len(split.labels) for split in splits.values()) == 3171
    assert widths == {"image": 128, "text": 128}
    assert num_classes == 13


def test_rows_that_lack_a_modality_are_left_out(tmp_path):
    image = np.load(small_file(tmp_path / "a.npz"))["image"]
    image[:5] = 0
    splits, _, _ = load(small_file(tmp_path / "data.npz", image=image))
    assert sum(len(split.labels) for split in splits.values()) == ROWS - 5
    assert all(split.features[:, :6].any(1).all() for split in splits.values())


@pytest.mark.parametrize(
    ("missing", "counts"), [("the picture", (30, 0, 70)), ("the text", (30, 70, 0)), ("either", (30, 35, 35))]
)
def test_what_is_taken_away(missing, counts):
    split = Split(torch.ones(100, 5), torch.zeros(100))
    rates, seeds = (70, 70, 70, 50), (0, 0, 1, 0)
    tables = [
        quickstart.take_away(split, missing, rate, {"image": 2, "text": 3}, seed).features
        for rate, seed in zip(rates, seeds, strict=True)
    ]
    image, text = tables[0][:, 0] == 1, tables[0][:, 4] == 1
    assert ((image & text).sum(), (image & ~text).sum(), (text & ~image).sum()) == counts
    assert torch.equal(tables[0], torch.stack([image, image, text, text, text], 1).float())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert (tables[3] >= tables[0]).all()


def test_what_is_fitted_and_tested_on_what(tmp_path, monkeypatch):
    """On complete rows, validation rows too, or on the same gaps; every method on the same rows."""
    shorten(monkeypatch)
    fitted, tested = [], []
    monkeypatch.setattr(quickstart, "fit", lambda method, train, val, *_: fitted.append((train, val)))
    monkeypatch.setattr(quickstart, "macro_f1", lambda model, split: tested.append(split) or 0.0)
    scores = quickstart.run(small_file(tmp_path / "data.npz"), 2)

    def lacks(split):
        return [round(100 * (split.features[:, rows] == 0).all(1).float().mean().item()) for rows in SLICES]

    each = [[lacks(split) for split in pair] for pair in fitted[:12:3]]
    assert each == [[[0, 0], [0, 0]], [[70, 0], [70, 0]], [[0, 70], [0, 70]], [[35, 35], [35, 35]]]
    assert not torch.equal(fitted[3][0].features, fitted[15][0].features)
    for first, second, third in zip(fitted[::3], fitted[1::3], fitted[2::3], strict=True):
        for splits in zip(first, second, third, strict=True):
            assert all(torch.equal(split.features, splits[0].features) for split in splits)
    complete = tested[:6]  # Of the first method, in the order of the keys.
    assert [lacks(split) for split in complete] == [[0, 0], [70, 0], [0, 0], [0, 70], [0, 0], [35, 35]]
    assert [lacks(split) for split in tested[18:27:3]] == [[70, 0], [0, 70], [35, 35]]
    same = [(i, i + 6) for i in range(12)] + [(1, 18), (18, 19), (19, 20)]  # The next method's; the other setting's.
    assert all(torch.equal(tested[i].features, tested[j].features) for i, j in same)
    assert len(tested) == 2 * 3 * (6 + 3) == 2 * len(scores)


def test_choices_are_made_on_validation(tmp_path, monkeypatch):
    splits, widths, _ = load(small_file(tmp_path / "data.npz"))
    train, val, _ = splits.values()
    shorten(monkeypatch)
    for method in quickstart.METHODS[:2]:
        for rates in ((0.0, 3e-2), (3e-2, 0.0)):
            monkeypatch.setattr(quickstart, "LEARNING_RATES", rates)
            model = quickstart.fit(method, train, val, widths, 3, 0)
            assert quickstart.macro_f1(model, val) > 90
            assert not model.training
        wrong = quickstart.fit(method, train, Split(val.features, (val.labels + 1) % 3), widths, 3, 0)
        assert quickstart.macro_f1(wrong, val) < 80


def test_the_verdict_can_say_that_we_lose():
    scores = {
        (setting, missing, rate, method): np.array([50.0, 52.0])
        for setting in quickstart.SETTINGS
        for missing in quickstart.MISSING
        for rate in (0, 70)
        for method in quickstart.METHODS
    }
    for missing in quickstart.MISSING:
        scores["complete rows", missing, 70, "head, trained"] += 1
        scores["complete rows", missing, 70, "head, closed form"] -= np.array([1.0, 2.0])
        scores["the same gaps", missing, 70, "head, trained"] += np.array([-1.0, 1.5])
        scores["complete rows", missing, 0, "head, closed form"] -= 3
    said = quickstart.verdict(scores)
    assert (
        "the trained head is better (+1.0 ± 0.0) and the closed form worse (−1.5 ± 0.7) if fitted on complete" in said
    )
    assert "level (+0.2 ± 1.8) and level (+0.0 ± 0.0) if fitted with the same gaps" in said
    assert "on complete test rows they are level (+0.0 ± 0.0) and worse (−3.0 ± 0.0)" in said


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": None}, r"lacks \['text'\]"),
        ({"image": np.zeros((ROWS, 2, 2))}, r"'image' to be floating-point \(300, D\), but got float64 \(300, 2, 2\)"),
        ({"image": np.zeros((80, 2))}, r"\(80, 2\)"),
        ({"text": np.zeros((ROWS, 4), dtype=int)}, "int64"),
        ({"text": np.full((ROWS, 4), np.nan)}, "'text' row 0 is not"),
        ({"label": np.eye(3)[np.arange(ROWS) % 3]}, r"one class a row, but got float64 \(300, 3\)"),
        ({"label": np.arange(ROWS) - 1}, "integers from 0"),
        ({"split": np.array(["train", "dev", "test"] * 100)}, r"got \['dev', 'test', 'train'\]"),
        ({"split": np.array(["train", "val", "test"])}, r"\(300,\)"),
        ({"label": np.array([{}] * ROWS)}, "cannot be read"),
        ({"label": np.zeros(ROWS, dtype=int)}, r"all among the complete training rows, but \[1\] are not"),
        ({"label": np.arange(ROWS) % 3 + 1}, r"\[0\] are not"),
        ({"label": np.arange(ROWS) % 3 * 1000}, r"\[1, 2, 3, 4, 5\]\.\.\. are not"),
        ({"image": np.zeros((ROWS, 2)), "text": np.zeros((ROWS, 2))}, "both modalities in the split 'train'"),
        ({"image": np.full((ROWS, 2), 1e300)}, "'image' row 0 is not"),
    ],
)
def test_wrong_files(tmp_path, monkeypatch, capsys, changes, match):
    path = small_file(tmp_path / "data.npz", **changes)
    with pytest.raises(ValueError, match=match):
        load(path)
    with pytest.raises(SystemExit):
        call(monkeypatch, "--data", path)
    assert "Traceback" not in capsys.readouterr().err


def test_other_wrong_arguments(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "truncated.npz").write_bytes(small_file(tmp_path / "data.npz").read_bytes()[:5000])
    for arguments, message in (
        (["--data", tmp_path / "none.npz"], "does not exist"),
        (["--data", tmp_path / "text.npz"], "is not an .npz file"),
        (["--data", tmp_path], "is not an .npz file"),
        (["--data", tmp_path / "truncated.npz"], "is not an .npz file"),
        (["--figure", tmp_path / "figure.foo"], ".png, .pdf or .svg"),
        (["--seeds", 0], "at least 1, but got 0"),
        (["--figure", tmp_path / "none" / "figure.png"], "folder that exists"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
