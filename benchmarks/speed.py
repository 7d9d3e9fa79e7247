"""How fast is the head on the CPU, beside `nn.Linear` and other heads? Times, peak memory, a table and a figure.

For each size, missing rate and number of threads all methods run in one process, in turn, so that what disturbs the
machine disturbs all; the numbers are medians. Peak memory is that of a training step in a process of its own, beyond
what the process held before it (the parameters among it). gpu.py is for a GPU.

    python benchmarks/speed.py            # all: about 10 minutes on two cores; nothing else should run
    python benchmarks/speed.py --quick    # the small sizes, a few repeats, into the folder speed: does it work?
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from speed_methods import METHODS, QUICK, SIZES, Mode, Size, batch_of, method, steps
from speed_timing import PROTOTYPES, lines_of, machine, measure, measure_prototype_losses, place_of, table
from tqdm import tqdm

HERE = Path(__file__).parent
CPU = torch.device("cpu")
COLORS = ("#444b55", "#d1495b", "#e98a95", "#2a9d6f", "#8a8f98", "#3d7ea6", "#e0a030")


def peak_memory(name: str, size: Size) -> float:
    """MiB of a training step beyond what was held before it, in a process of its own."""
    arguments = [sys.executable, __file__, "--memory", name, *map(str, size)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def print_memory(name: str, size: Size) -> None:
    """What :func:`peak_memory` runs."""
    torch.set_num_threads(1)
    steps(
        name, size._replace(batch=2, width=4, classes=2), CPU, Mode("warm-up")
    )  # Loads what is loaded at the first step.
    module, call = method(name, size, CPU)
    x, _, labels = batch_of(size, CPU)
    x.requires_grad_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew from here.
    out = call(module, x, labels)
    (out if out.dim() == 0 else F.cross_entropy(out, labels)).backward()
    print(resident("VmHWM") - before)


def resident(what: str) -> float:
    """MiB of this process in memory now (VmRSS) or at its peak (VmHWM); Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Time as a ratio to nn.Linear's, by size: a panel for each mode, forward hollow and training step solid."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows = [row for row in rows if row["what"] != "peak memory" and row["missing"] == "70 %"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.5 * len(modes), 4), sharey=True, layout="constrained", squeeze=False
    )
    colors = dict(zip(METHODS, COLORS, strict=True))
    for axis, mode in zip(axes[0], modes, strict=True):
        sizes = list(dict.fromkeys((row["size"], row["M"]) for row in rows if row["mode"] == mode))
        for name in METHODS[1:]:
            for what, face in (("forward", "white"), ("forward + backward", colors[name])):
                points = {
                    ((row["size"], row["M"]), row["method"]): float(row["value"])
                    for row in rows
                    if row["mode"] == mode and row["what"] == what
                }
                known = [(i, s) for i, s in enumerate(sizes) if (s, name) in points]
                ratios = [points[s, name] / points[s, METHODS[0]] for _, s in known]
                label = name if what != "forward" else None
                axis.plot([i for i, _ in known], ratios, "o", ms=7, color=colors[name], mfc=face, label=label)
        axis.axhline(1, color=colors["nn.Linear"], lw=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(sizes)), [f"{s}\nM = {m}" for s, m in sizes], rotation=40, ha="right")
        axis.set_title(f"{mode}, 70 % missing")
        axis.grid(axis="y", color="#eceef1")
    axes[0, 0].set_ylabel("time, nn.Linear = 1\n(hollow: forward; solid: training step)")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def rows_of(sizes: Sequence[Size], threads: Sequence[int], seconds: float) -> list[dict[str, str]]:
    """The lines of the CSV: the times on each number of threads, then the memory."""
    rows = []
    with tqdm(total=len(sizes) * (len(threads) + 1)) as progress:
        for size in sizes:
            for count in threads:
                mode = f"{count} thread{'s' if count > 1 else ''}"
                progress.set_description(f"{size}, M = {size.modalities}, {mode}")
                torch.set_num_threads(count)
                rows += lines_of(size, mode, measure(size, CPU, Mode(mode), seconds))
                progress.update()
            if Path("/proc/self/status").exists():
                place = {**place_of(size, "CPU"), "what": "peak memory"}
                rows += [{**place, "method": name, "value": f"{peak_memory(name, size):.1f}"} for name in METHODS[:3]]
            progress.update()
    return rows


def main() -> None:
    """Measure, print the table, write table, CSV and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads on the CPU (default: 1 2)"
    )
    described = "folder of speed.csv, speed.md and speed.png (default: that of this program; with --quick, ./speed)"
    parser.add_argument("--output", type=Path, help=described)
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        name, batch, width, classes, modalities, missing = arguments.memory
        return print_memory(name, Size(int(batch), int(width), int(classes), int(modalities), float(missing)))
    output = arguments.output or (Path("speed") if arguments.quick else HERE)
    output.mkdir(parents=True, exist_ok=True)

    sizes, seconds = (QUICK, 0.2) if arguments.quick else (SIZES, 3.0)
    rows = rows_of(sizes, arguments.threads, seconds)
    torch.set_num_threads(1)
    text = f"{machine(CPU)}\n\n{table(rows)}\n\n{measure_prototype_losses(PROTOTYPES, CPU, seconds)}\n"
    (output / "speed.md").write_text(text)
    with (output / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, output / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
