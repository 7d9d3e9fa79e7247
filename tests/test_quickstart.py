"""The quickstart, on a small file of its own format and on wrong ones."""

import sys

import numpy as np
import pytest
import quickstart
import torch

ROWS = 300


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


def test_runs_on_a_file_and_learns(tmp_path, monkeypatch, capsys):
    image = np.load(small_file(tmp_path / "a.npz"))["image"]
    image[:5] = 0  # Rows that really lack their image.
    path = small_file(tmp_path / "data.npz", image=image)
    for name, value in (("BATCH_SIZE", 16), ("EPOCHS", 4), ("LEARNING_RATES", (3e-2, 1e-1))):
        monkeypatch.setattr(quickstart, name, value)
    call(monkeypatch, "--data", path, "--seeds", 2, "--figure", tmp_path / "figure.png")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("Over all test rows the head is ")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    whole = [line for line in printed if "| all rows |" in line]
    assert len(whole) == 3
    for line in whole:
        for cell in line.split("|")[3:7]:
            assert float(cell.split("±")[0]) > 80, line  # Three classes far apart: chance is 33.


def test_embedded_data():
    splits, widths, num_classes = quickstart.load(quickstart.HERE / "data" / "openclipart13_small_pca128.npz")
    assert sum(len(split.labels) for split in splits.values()) == 3171
    assert widths == {"image": 128, "text": 128}
    assert num_classes == 13


@pytest.mark.parametrize(("missing", "counts"), [("image", (30, 0, 70)), ("text", (30, 70, 0)), ("both", (30, 35, 35))])
def test_missing_table(missing, counts):
    split = quickstart.Split(torch.ones(100, 5), torch.ones(100, 2, dtype=torch.bool), torch.zeros(100))
    tables = [quickstart.let_go_missing(split, missing, {"image": 2, "text": 3}, seed) for seed in (0, 0, 1)]
    present = tables[0].present
    image, text = present.T
    assert ((image & text).sum(), (image & ~text).sum(), (text & ~image).sum()) == counts
    assert torch.equal(tables[0].features, present.repeat_interleave(torch.tensor([2, 3]), 1).float())
    assert torch.equal(present, tables[1].present)
    assert not torch.equal(present, tables[2].present)


def test_a_row_keeps_its_only_modality():
    present = torch.tensor([[True, False]]).repeat(10, 1)
    split = quickstart.Split(torch.ones(10, 2), present, torch.zeros(10))
    table = quickstart.let_go_missing(split, "image", {"image": 1, "text": 1}, 0)
    assert torch.equal(table.present, present)


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
        ({"label": np.zeros(ROWS, dtype=int)}, r"all in the training split, but \[1\] are not"),
        ({"label": np.arange(ROWS) % 3 + 1}, r"\[0\] are not"),
        ({"label": np.arange(ROWS) % 3 * 1000}, r"\[1, 2, 3, 4, 5\]\.\.\. are not"),
        ({"image": np.zeros((ROWS, 2)), "text": np.zeros((ROWS, 2))}, "'train' that are not all zeros"),
        ({"image": np.full((ROWS, 2), 1e300)}, "'image' row 0 is not"),
    ],
)
def test_wrong_files(tmp_path, monkeypatch, capsys, changes, match):
    path = small_file(tmp_path / "data.npz", **changes)
    with pytest.raises(ValueError, match=match):
        quickstart.load(path)
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
        (["--scale", 0], "positive --scale"),
        (["--figure", tmp_path / "none" / "figure.png"], "folder that exists"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, *arguments)
        assert message in capsys.readouterr().err
