"""benchmarks/accuracy.py: the files that it reads, the rows that it makes of them, and a small run that is resumed."""

import csv
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accuracy
import numpy as np
import pytest
import report
import shots
import torch
from features import load
from methods import ABLATIONS, METHODS, minimum_entropy, without_fall_back

SMALL = accuracy.SMALL
WIDTHS = {"image": 6, "text": 4}


def arrays(rows=60, **changes):
    rng = np.random.default_rng(0)
    label = np.arange(rows) % 3
    data = {
        "image": rng.normal(size=(rows, 6)).astype(np.float16) + label[:, None],
        "text": rng.normal(size=(rows, 4)).astype(np.float32),
        "label": label,
        "split": np.array(["train", "train", "val", "test"])[np.arange(rows) // 3 % 4],
    }
    return {name: x for name, x in {**data, **changes}.items() if x is not None}


def written(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def test_reads_one_label_or_several_and_natural_gaps(tmp_path):
    data = load(written(tmp_path / "a.npz", has_text=np.arange(60) % 2 == 0))
    assert data.widths == WIDTHS
    assert (data.num_classes, data.labels.dtype) == (3, torch.int64)
    assert data.present[:, 0].all()
    assert torch.equal(data.present[:, 1], torch.arange(60) % 2 == 0)
    assert not data.features["text"][1::2].any()
    assert {name: len(rows) for name, rows in data.rows.items()} == {"train": 30, "val": 15, "test": 15}
    several = load(written(tmp_path / "b.npz", label=np.eye(3, dtype=np.int8)[np.arange(60) % 3]))
    assert (several.num_classes, several.labels.dtype) == (3, torch.float32)
    three = load(written(tmp_path / "c.npz", audio=np.ones((60, 2))), ("image", "text", "audio"))
    assert three.name == "c, image+text+audio"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": None}, r"lacks \['text'\]; it has \['image', 'label', 'split'\]"),
        ({"text": np.ones((60, 4), dtype=int)}, "int64"),
        ({"text": np.full((60, 4), np.nan)}, "'text' row 0"),
        ({"has_text": np.ones(3, dtype=bool)}, r"\(60,\), but got \(3,\)"),
        ({"label": np.arange(60) - 1}, "integers from 0"),
        ({"label": np.full((60, 3), 0.5)}, "of 0 and 1, but got float64"),
        ({"label": np.arange(60) // 59}, r"in the training split of .*, but \[1\] are not"),
        ({"split": np.array(["train", "dev", "test"] * 20)}, r"\['dev', 'test', 'train'\]"),
        ({"label": np.array([{}] * 60)}, "cannot be read"),
    ],
)
def test_wrong_files(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        load(written(tmp_path / "a.npz", **changes))


def test_wrong_kinds_of_files(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        load(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"two modalities or more, but got \('image',\)"):
        load(written(tmp_path / "a.npz"), ("image",))


def test_rows_lack_what_is_said_and_wrong_masks_are_wrong(tmp_path):
    data = load(written(tmp_path / "a.npz", rows=4800))
    right, again = (accuracy.rows_of(data, "test", "image", 0.7, 1) for _ in range(2))
    assert right.present.sum(0).tolist() == [360, 1200]
    assert torch.equal(right.present, again.present)
    assert not torch.equal(right.present, accuracy.rows_of(data, "test", "image", 0.7, 2).present)
    assert not right.features["image"][~right.present[:, 0]].any()
    wrong = accuracy.rows_of(data, "test", "image", 0.7, 1, flipped=0.2)
    share = (wrong.present != right.present).float().mean()
    assert 0.11 < share < 0.18  # A fifth, less what would have left a row nothing.
    assert wrong.present.any(1).all()
    # What is called missing is gone; what is called present, but is not there, stays zeros.
    there = wrong.present & right.present
    for m, (name, x) in enumerate(wrong.features.items()):
        assert torch.equal(x, torch.where(there[:, m, None], data.features[name][data.rows["test"]], 0))


def test_heads_are_what_their_names_say():
    heads = {name: model.head for name, build in METHODS.items() if hasattr(model := build(WIDTHS, 3), "head")}
    found = {name: (head.cases, set(head.scale.tolist()), head.centered) for name, head in heads.items()}
    shared, every = ("image+text",), ("image+text", "image", "text")
    assert found == {
        "cosine head": (shared, {32}, False),
        "paper, no prototype loss": (every, {32}, False),
        "paper": (every, {32}, False),
        "closed form": (shared, {20}, True),
        "protohead, decoupled": (every, {20}, True),
        "protohead": (shared, {20}, True),
    }


def test_the_closed_form_is_not_trained(monkeypatch, tmp_path):
    data = load(written(tmp_path / "a.npz", rows=240))
    training, validation = (accuracy.rows_of(data, split, "all", 0.3, 0) for split in ("train", "val"))
    monkeypatch.setattr(METHODS["closed form"], "loss", None)
    ((name, (_, _, epoch, model)),) = accuracy.train("closed form", data, training, validation, 0.5, 0, 15).items()
    assert (name, epoch) == ("closed form", 0)
    head = accuracy.METHODS["protohead"](data.widths, data.num_classes).head
    rows = torch.bincount(training.labels, minlength=data.num_classes).clamp(min=1)
    head.imprint(*(training.features, training.labels, training.present), class_weight=rows**-0.5)
    torch.testing.assert_close(model.head.prototypes["image"], head.prototypes["image"])
    torch.testing.assert_close(model.head.bias, head.bias)
    started = ABLATIONS["protohead, from the closed form"](data.widths, data.num_classes)
    started.start(*training)
    assert started.head.scale.tolist() == [20]
    assert started.head.center.any()


def test_every_method_learns():
    torch.manual_seed(0)
    labels = torch.arange(90) % 3
    features = {name: torch.eye(3, d)[labels] + 0.1 * torch.randn(90, d) for name, d in WIDTHS.items()}
    present = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()[torch.arange(90) // 3 % 3]
    features = {name: torch.where(present[:, m, None], x, 0) for m, (name, x) in enumerate(features.items())}
    for name, build in (METHODS | ABLATIONS).items():
        for y in (labels, torch.eye(3)[labels]):
            model = build(WIDTHS, 3)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(20):
                optimizer.zero_grad()
                model.train().loss(features, present, y).backward()
                optimizer.step()
            model.eval()
            right = (model(features, present).argmax(1) == labels).float().mean()
            assert right > 0.95, name
            if name == "paper" and y is labels:
                assert (minimum_entropy(model, features, present).argmax(1) == labels).float().mean() > 0.9
                head = model.head
                head.seen[2] = 0
                assert not torch.equal(model(features, present), without_fall_back(model, features, present))
                assert head.seen_cases == ("image+text", "image")


class Here(ThreadPoolExecutor):
    """In this process, which has imported everything; what it is sent and sends back is pickled all the same."""

    def __init__(self, workers, context):
        super().__init__(workers)

    def submit(self, function, task):
        return super().submit(lambda: pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(task))))))


def test_a_quick_run_and_its_resumption(tmp_path, monkeypatch, capsys):
    data = written(tmp_path / "a.npz", rows=480)
    arguments = ["--quick", "--data", data, "--output", tmp_path, "--workers", 1]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *map(str, arguments)])
    monkeypatch.setattr(report, "write_figures", lambda *arguments: None)
    monkeypatch.setattr(accuracy, "ProcessPoolExecutor", Here)
    accuracy.main()
    path = tmp_path / "accuracy.csv"
    whole = path.read_text()
    lines = list(csv.DictReader(whole.splitlines()))
    assert {line["trained"] for line in lines} == {"linear", "paper", "protohead"}
    assert {line["case"] for line in lines} == {"image+text", "image", "text", "all rows", "mean of cases"}
    assert all(0.1 < float(line["macro_f1"]) < 1 for line in lines if line["case"] == "all rows")
    assert "protohead" in (tmp_path / "RESULTS.md").read_text()
    # An interruption has left half of the third task.
    kept = whole.splitlines(keepends=True)
    own = [i for i, line in enumerate(kept) if line.startswith(",".join(kept[-1].split(",")[:5]))]
    path.write_text("".join(kept[: own[0] + 2]) + kept[own[0] + 2][:9])
    capsys.readouterr()
    accuracy.main()
    assert "1/1" in capsys.readouterr().err
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    # Results of other data of that name, or of another budget, are not gone on with.
    path.write_text(wrong := whole.replace("/2\n", "/9\n"))
    with pytest.raises(ValueError, match="were other data, or trained otherwise"):
        accuracy.finished(path, {"a": lines[0]["budget"]})
    assert path.read_text() == wrong


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["accuracy.py", "--output", str(tmp_path), *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            accuracy.main()
        return capsys.readouterr().err

    for arguments, message in (
        (["--data", tmp_path / "none.npz"], "cannot be read"),
        (["--modalities", "image,sound"], "lacks ['sound']"),
        (["--workers", 0], "at least 1"),
    ):
        assert message in error(*arguments)
    assert "File exists" in error("--output", written(tmp_path / "a.npz"))
    (tmp_path / "accuracy.csv").write_text("a,b\n1,2\n")
    assert "its columns are others" in error()
    assert Path(tmp_path / "accuracy.csv").read_text() == "a,b\n1,2\n"


def test_new_splits(tmp_path):
    group = np.arange(600) // 3  # Triples, not in order of splits.
    data = load(written(tmp_path / "a.npz", rows=600, group=group.astype(np.int32)))
    known = set(data.rows["train"].tolist()) | set(data.rows["val"].tolist())
    found = [data.split_anew(seed) for seed in (0, 0, 1)]
    for new in found:
        parts = [new.rows[name].tolist() for name in ("train", "val", "test")]
        assert new.name == "a, new splits"
        assert sorted(parts[0] + parts[1] + parts[2]) == sorted(known)  # No test row, and none twice.
        groups = [{int(group[row]) for row in part} for part in parts]
        assert sum(map(len, groups)) == len(set.union(*groups))  # No group in two.
        assert [round(len(x) / len(set(group[list(known)])), 2) for x in groups] == [0.6, 0.2, 0.2]
    assert torch.equal(found[0].rows["test"], found[1].rows["test"])
    assert not torch.equal(found[0].rows["test"], found[2].rows["test"])


def test_tasks_of_new_splits():
    whole = accuracy.tasks(SMALL, ("image", "text"), quick=False, split_anew=True)
    assert {task.method for task in whole} == set(accuracy.MAIN) <= set(METHODS)
    assert {(task.missing, task.rate) for task in whole} == {("none", 0), ("image", 0.7), ("text", 0.7), ("all", 0.7)}
    assert {task.seed for task in whole} == set(range(10))
    assert whole[0].read().rows["test"].tolist() != accuracy.read(SMALL, ("image", "text")).rows["test"].tolist()


def test_shots(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(shots, "SHOTS", (1, 0))
    monkeypatch.setattr(shots, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["shots.py", str(written(tmp_path / "a.npz", rows=240)), "--seeds", "2"])
    shots.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(shots.STARTS)
    assert lines[0].endswith("| image+text | image | text | all rows | mean of cases |")
    one = shots.pick(accuracy.rows_of(load(tmp_path / "a.npz"), "train", "none", 0.0, 0), 1, 3, 0)
    assert sorted(one.labels.tolist()) == [0, 1, 2]


def test_class_names_score_what_they_are_of():
    head = shots.named(accuracy.HERE / "class_names.npz", load(accuracy.SMALL))
    assert head.seen_cases == ("image+text", "text")
    logits = head.eval()({"image": torch.randn(3, 128), "text": head.prototypes["text"][1, [0, 4, 12]]})
    assert logits.argmax(1).tolist() == [0, 4, 12]
    assert not head({"image": torch.randn(3, 128)}).any()
