"""How clip_finetune.py scores, weighs classes and goes on where a file cannot be read; and how fast --help answers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import clip_training
import pytest
import torch
from PIL import Image
from test_datasets import finetune, tiny  # noqa: F401
from test_examples import one_thread, table  # noqa: F401

EXAMPLES = Path(clip_training.__file__).parent
HEAVY = {"torch", "open_clip", "transformers", "matplotlib", "numpy", "lightning", "pytorch_lightning", "torchvision"}

# -- scores -----------------------------------------------------------------------------------------------------------


def perfect(num_classes=23):
    """The outputs of a perfect model, whose rows of one case have 3 of the classes."""
    targets = torch.zeros(12, num_classes)
    targets[torch.arange(12), torch.arange(12) % 3] = 1
    targets[6:, 3:] = torch.eye(num_classes - 3)[:6]
    present = torch.tensor([[True, False]] * 6 + [[True, True]] * 6)
    return 8 * targets - 4, present, targets


def test_labels_that_no_row_of_a_case_has_do_not_count():
    report = clip_training.report_of(perfect(), 0.5)
    assert report.cases["image"]["macro_f1"] == report.all_rows["macro_f1"] == report.all_rows["map"] == 1
    assert clip_training.merit(report, "map") == 1


def test_a_score_that_is_undefined_is_the_lowest():
    logits, present, targets = perfect()
    report = clip_training.report_of((logits, present, torch.zeros_like(targets)), 0.5)
    assert clip_training.merit(report, "map") == -1


def test_one_threshold_is_chosen_on_validation(tmp_path, tiny, monkeypatch):  # noqa: F811
    lines = [
        {"text": f"text {i}", "label": [["A", "B"], ["B"], ["A"]][i % 3], "split": ("train", "val", "test")[i // 6 % 3]}
        for i in range(36)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scored, made = [], clip_training.report_of

    def remember(outputs, threshold):
        scored.append((outputs, threshold, made(outputs, threshold)))
        return scored[-1][2]

    monkeypatch.setattr(clip_training, "report_of", remember)
    finetune(monkeypatch, "--data", tmp_path / "data.jsonl", "--model", tiny, "--output", tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    *validation, (test, threshold, report) = scored
    best = max(validation[1:], key=lambda entry: entry[2].all_rows["macro_f1"])
    assert settings["threshold"] == threshold == best[1]
    # The test rows are looked at once.
    assert len(scored) == 21
    assert not any(torch.equal(test[0], outputs[0]) for outputs, _, _ in validation)
    line = next(line for line in table(tmp_path / "run" / "scores.csv") if line["case"] == "all rows")
    assert float(line["macro_f1"]) == report.all_rows["macro_f1"]


def test_balanced_class_weights(tmp_path, tiny, monkeypatch):  # noqa: F811
    # As scikit-learn's compute_class_weight("balanced", ...).
    weight = clip_training.class_weight_of(torch.tensor([0, 0, 0, 1]), 2)
    assert weight.tolist() == pytest.approx([4 / 6, 2])
    several = torch.tensor([[1.0, 0], [1, 0], [1, 1]])
    assert clip_training.class_weight_of(several, 2).tolist() == pytest.approx([4 / 6, 2])

    lines = [f"text {i},{'rare' if i % 6 == 5 else 'often'},{('train', 'val', 'test')[i // 6 % 3]}" for i in range(36)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label,split", *lines]))
    given = []
    run = clip_training.run

    def remember(call, batch, arguments, *labels, **options):
        given.extend([options["class_weight"]] if options else [])
        return run(call, batch, arguments, *labels, **options)

    monkeypatch.setattr(clip_training, "run", remember)
    for number, option in enumerate(([], ["--class-weight", "balanced"])):
        arguments = "--data", tmp_path / "data.csv", "--model", tiny, "--output", tmp_path / str(number), *option
        finetune(monkeypatch, *arguments)
    assert given[0] is None
    assert given[1].tolist() == pytest.approx([12 / (2 * 10), 12 / (2 * 2)])


# -- files that cannot be read ----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A table in which one picture is broken."""
    lines = [f"{i}.png,text {i},{'AB'[i % 2]},{('train', 'val', 'test')[i % 3]}" for i in range(12)]
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 90, 10)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no picture")
    (tmp_path / "data.csv").write_text("\n".join(["image,text,label,split", *lines]))
    return tmp_path / "data.csv"


def test_an_unreadable_picture_in_training(data, tiny, monkeypatch, capsys):  # noqa: F811
    arguments = "--data", data, "--model", tiny
    with pytest.raises(SystemExit):
        finetune(monkeypatch, *arguments, "--output", data.parent / "run")
    assert f"{data} line 5: Expected a picture that PIL reads, but" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(clip_training, "Rows", remembering(clip_training.Rows, given))
    finetune(monkeypatch, *arguments, "--allow-gaps", "--output", data.parent / "run")
    assert capsys.readouterr().out.count(str(data.parent / "3.png")) == 1
    assert given[0][1].tolist() == [[True, True], [False, True], [True, True], [True, True]]


def remembering(kind, given):
    class Remembering(kind):
        def __init__(self, rows, present, *others):
            super().__init__(rows, present, *others)
            given.append((rows, present))

    return Remembering


def test_an_unreadable_picture_in_prediction(data, tiny, monkeypatch):  # noqa: F811
    output = data.parent / "run"
    finetune(monkeypatch, "--data", data, "--model", tiny, "--allow-gaps", "--output", output)
    with open(data, "a") as file:
        file.write("\n3.png,,A,test\nnone.png,words,A,test\n")
    finetune(monkeypatch, "--predict", data, "--output", output)
    with open(output / "data.predictions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 14
    marked = {line["row"].rpartition(" ")[2]: line for line in lines if line["note"]}
    broken, absent = f"unreadable: {data.parent}/3.png", f"not there: {data.parent}/none.png"
    assert {row: (line["has"], line["note"]) for row, line in marked.items()} == {
        "5": ("text", broken),
        "14": ("", broken),
        "15": ("text", absent),
    }
    assert [bool(line["prediction"]) for line in marked.values()] == [True, False, True]


# -- options ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, program
    else:
        raise AssertionError(program)
"""


def test_help_does_not_wait_for_imports():
    programs = [str(path) for path in sorted(EXAMPLES.glob("*.py")) if "ArgumentParser(" in path.read_text()]
    assert len(programs) >= 8
    script = SCRIPT.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, " + repr(str(EXAMPLES)) + ")" + script, *programs]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: ") == len(programs)


def test_labels_with_separators(tmp_path, tiny, monkeypatch, capsys):  # noqa: F811
    lines = [f"text {i},{('A;B', 'B', 'A')[i % 3]},{('train', 'val', 'test')[i // 6 % 3]}" for i in range(36)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label,split", *lines]))
    arguments = "--data", tmp_path / "data.csv", "--model", tiny, "--output", tmp_path / "run"
    with pytest.raises(SystemExit):
        finetune(monkeypatch, *arguments)
    assert "line 2 has 'A;B': --label-separator ';' takes it for several" in capsys.readouterr().err
    finetune(monkeypatch, *arguments, "--label-separator", ";")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["classes"] == ["A", "B"]
