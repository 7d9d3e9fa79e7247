"""The benchmarks run and report on everything that they name; how fast anything is, no test asks."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_speed(tmp_path):
    run(BENCHMARKS / "speed.py", "--quick", "--threads", 1, "--output", tmp_path)
    with open(tmp_path / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = {(row["size"], row["M"]) for row in rows}
    assert sizes == {("(4, 512, 23)", "2"), ("(32, 16, 5)", "3")}
    for size, modalities in sizes:
        here = [row for row in rows if (row["size"], row["M"]) == (size, modalities)]
        timed = {(row["what"], row["method"]) for row in here if row["what"] != "peak memory"}
        methods = ("nn.Linear", "head", "linear per case", "ArcFaceLoss", "gather")
        assert timed == {(what, name) for what in ("forward", "forward + backward") for name in methods}
        assert all(float(row["value"]) > 0 for row in here if row["what"] != "peak memory")
    lines = (tmp_path / "speed.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| (")]) == 6
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_encoders():
    printed = run(BENCHMARKS / "encoders.py", "--model", "ViT-S-32", "--batch", 4, "--repeats", 1, "--rates", 0, 0.5)
    assert [line.split("|")[-2].strip() for line in printed.splitlines()[-2:]] == ["1.00", "0.75"]
