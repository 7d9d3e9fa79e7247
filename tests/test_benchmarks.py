"""The benchmarks run and report on everything that they name; how fast anything is, no test asks."""

import csv
import sys

import closed_form
import encoders
import open_clip
import prompt_cost
import pytest
import speed
import speed_methods
import torch

CPU = torch.device("cpu")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def call(monkeypatch, program, *arguments):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    program.main()


def test_speed(tmp_path, monkeypatch):
    # Not smaller: all are called as often as nn.Linear in 2 ms.
    sizes = [speed_methods.Size(256, 64, 100, 2, 0.7), speed_methods.Size(256, 32, 100, 3, 0.7)]
    monkeypatch.setattr(speed, "QUICK", sizes)
    monkeypatch.setattr(speed, "PROTOTYPES", (3, 5))
    monkeypatch.setattr(speed, "peak_memory", lambda name, size: 1.0)
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, speed, "--quick", "--threads", 1)
    folder = tmp_path / "speed"
    with open(folder / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["size"], row["M"]) for row in rows} == {(str(size), str(size.modalities)) for size in sizes}
    for size in sizes:
        here = [row for row in rows if row["size"] == str(size)]
        timed = {(row["what"], row["method"]) for row in here if row["what"] != "peak memory"}
        assert timed == {(what, name) for what in ("forward", "forward + backward") for name in speed.METHODS}
        assert all(float(row["value"]) > 0 for row in here)
    lines = (folder / "speed.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 3", "| 5"]
    assert len([line for line in lines if line.startswith("| (")]) == 6
    assert (folder / "speed.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Memory is read from /proc.")
def test_peak_memory_holds_the_gradient():
    size = speed_methods.Size(8, 512, 1000, 2, 0.7)
    assert speed.peak_memory("head", size) > 4 * 2 * 512 * 1000 / 2**20


def test_what_is_timed_is_the_same():
    size = speed_methods.Size(40, 8, 5, 3, 0.7)
    x, _, _ = speed_methods.batch_of(size, CPU)
    head, call = speed_methods.method("head, each case", size, CPU)
    gather, gathered = speed_methods.method("gather", size, CPU)
    with torch.no_grad():
        head.center.zero_()
        for code in range(1, 8):
            name = "+".join(f"m{m}" for m in range(3) if code >> m & 1)
            for m in range(3):
                if code >> m & 1:
                    holders = [case for case in head.cases if f"m{m}" in case.split("+")]
                    gather.weight[code, 8 * m : 8 * m + 8] = head.prototypes[f"m{m}"][holders.index(name)].T
        torch.testing.assert_close(call(head, x, None), gathered(gather, x, None))
        products, multiplied = speed_methods.method("products alone", size, CPU)
        for (rows, columns), weight in zip(products.groups, products.weights, strict=True):
            torch.testing.assert_close(multiplied(products, x, None)[rows], x[rows][:, columns] @ weight.T)


def test_the_plain_prototype_loss_is_the_heads():
    head = speed_methods.DecoupledPrototypeHead({"a": 6, "b": 6}, 5, cases="all", shared_space=True)
    torch.testing.assert_close(speed_methods.plain_prototype_loss(head), head.prototype_loss())


def test_encoders(monkeypatch, capsys):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-for-a-test", TINY)
    call(monkeypatch, encoders, "--model", "tiny-for-a-test", "--batch", 4, "--repeats", 1, "--rates", 0, 0.5)
    printed = capsys.readouterr().out
    assert [line.split("|")[-2].strip() for line in printed.splitlines()[-2:]] == ["1.00", "0.75"]


def test_prompt_cost(monkeypatch, capsys):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-for-a-test", TINY)
    sizes = ("--batch", 4, "--repeats", 1, "--length", 3, "--depth", 1)
    call(monkeypatch, prompt_cost, "--model", "tiny-for-a-test", *sizes)
    rows = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == [
        "3 tokens in front",
        "plain tokens",
        "DCP",
        "no prompts",
        "DCP, sub-cases",
        "70% missing",
        "every row",
        "present rows",
        "present rows, sub-cases",
    ]


def test_closed_form(monkeypatch, capsys):
    monkeypatch.setattr("shots.EPOCHS", 1)
    monkeypatch.setattr("shots.LEARNING_RATES", (0.01,))
    call(monkeypatch, closed_form, "--seeds", 1)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names[1:6] == ["class means", "Ledoit-Wolf", "OAS", "held-out rows", "trained"]
    assert names[7:10] == ["all anew", "with the sums kept", "without"]
    assert len(names[11:]) == 6
    loss = {line.split(" | ")[0]: float(line.split(" | ")[6].split(" ± ")[0]) for line in lines[5:10]}
    assert loss["| held-out rows"] < min(loss["| class means"], loss["| trained"])


def test_distances_of_unknown_rows_by_a_plain_formula():
    generator = torch.Generator().manual_seed(0)
    labels, present = torch.arange(40) % 2, torch.ones(40, 1, dtype=torch.bool)
    x = torch.randn(40, 3, generator=generator) + 2 * torch.eye(3)[labels]
    head = closed_form.DecoupledPrototypeHead({"a": 3}, 2)
    head.imprint({"a": x}, labels, present)
    rows = closed_form.Rows({"a": x}, present, labels)
    found, _ = closed_form.distances(head, 0.3, rows, rows)
    unit = torch.nn.functional.normalize(x.double() - head.center, dim=1)
    means = torch.stack([unit[labels == k].mean(0) for k in range(2)])
    spread = sum(torch.outer(row - means[k], row - means[k]) for row, k in zip(unit, labels, strict=True)) / 40
    inverse = torch.linalg.inv(0.7 * spread + 0.3 * spread.trace() / 3 * torch.eye(3))
    for i in range(40):
        expected = min(float((unit[i] - mean) @ inverse @ (unit[i] - mean)) / 3 for mean in means)
        assert found[i].item() == pytest.approx(expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Memory is read from /proc.")
def test_cost_of_the_closed_form(capsys):
    closed_form.cost(10_000, 8, 3)
    rows, width, classes, seconds, _, memory = capsys.readouterr().out.strip("| \n").split(" | ")
    assert (rows, width, classes) == ("10,000", "8", "3")
    assert float(seconds) < 60
    assert float(memory) > 0
