"""The benchmarks run and report on everything that they name; how fast anything is, no test asks."""

import csv
import subprocess
import sys
from pathlib import Path

import speed
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments, cwd=None):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_speed(tmp_path):
    run(BENCHMARKS / "speed.py", "--quick", "--threads", 1, cwd=tmp_path)
    tmp_path = tmp_path / "speed"
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = {(row["size"], row["M"]) for row in rows}
    assert sizes == {("(4, 512, 23)", "2"), ("(32, 16, 5)", "3")}
    for size, modalities in sizes:
        here = [row for row in rows if (row["size"], row["M"]) == (size, modalities)]
        timed = {(row["what"], row["method"]) for row in here if row["what"] != "peak memory"}
        methods = speed.METHODS
        assert timed == {(what, name) for what in ("forward", "forward + backward") for name in methods}
        assert all(float(row["value"]) > 0 for row in here if row["what"] != "peak memory")
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 101", "| 1000"]
    assert len([line for line in lines if line.startswith("| (")]) == 6
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_timed_is_the_same():
    size = speed.Size(40, 8, 5, 3, 0.7)
    x, _, _ = speed.batch_of(size, torch.device("cpu"))
    head, call, _ = speed.method("head, decoupled", size, torch.device("cpu"))
    gather, gathered, _ = speed.method("gather", size, torch.device("cpu"))
    with torch.no_grad():
        for code in range(1, 8):
            name = "+".join(f"m{m}" for m in range(3) if code >> m & 1)
            for m in range(3):
                if code >> m & 1:
                    holders = [case for case in head.cases if f"m{m}" in case.split("+")]
                    gather.weight[code, 8 * m : 8 * m + 8] = head.prototypes[f"m{m}"][holders.index(name)].T
        torch.testing.assert_close(call(head, x, None), gathered(gather, x, None))
        products, multiplied, _ = speed.method("products alone", size, torch.device("cpu"))
        for (rows, columns), weight in zip(products.groups, products.weights, strict=True):
            torch.testing.assert_close(multiplied(products, x, None)[rows], x[rows][:, columns] @ weight.T)


def test_the_plain_prototype_loss_is_the_heads():
    head = speed.DecoupledPrototypeHead({"a": 6, "b": 6}, 5, shared_space=True)
    torch.testing.assert_close(speed.plain_prototype_loss(head), head.prototype_loss())


def test_encoders():
    printed = run(BENCHMARKS / "encoders.py", "--model", "ViT-S-32", "--batch", 4, "--repeats", 1, "--rates", 0, 0.5)
    assert [line.split("|")[-2].strip() for line in printed.splitlines()[-2:]] == ["1.00", "0.75"]
