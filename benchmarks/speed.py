"""How fast is the head, beside `nn.Linear` and other heads? Times, peak memory, a table and a figure.

For each size, missing rate and number of threads all methods run in one process, in turn, so that what disturbs the
machine disturbs all; the numbers are medians. Peak memory is that of a training step in a process of its own, beyond
what the process held before it (the parameters among it). On a GPU the times are CUDA events', eager and compiled, in
float32 and under bfloat16 autocast.

    python benchmarks/speed.py            # all: about 10 minutes on two cores; nothing else should run
    python benchmarks/speed.py --quick    # the small sizes, a few repeats, into the folder speed: does it work?
"""

import argparse
import csv
import functools
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from protohead import DecoupledPrototypeHead

HERE = Path(__file__).parent
METHODS = ("nn.Linear", "head", "head, each case", "products alone", "linear per case", "ArcFaceLoss", "gather")
COLORS = ("#444b55", "#d1495b", "#e98a95", "#2a9d6f", "#8a8f98", "#3d7ea6", "#e0a030")
PROTOTYPES = (101, 1000)  # Numbers of classes for the prototype loss, of two blocks of two modalities, 512 wide.


class Size(NamedTuple):
    """Rows, features per modality, classes, modalities, missing rate."""

    batch: int
    width: int
    classes: int
    modalities: int
    missing: float

    def __str__(self) -> str:  # noqa: D105
        return f"({self.batch}, {self.width}, {self.classes})"


TWO = [(4, 512, 23), (64, 512, 101), (256, 512, 101), (256, 512, 1000), (1024, 768, 1000), (64, 768, 21843)]
SIZES = [Size(*size, 2, missing) for size in TWO for missing in (0.0, 0.7, 0.9)]
SIZES += [Size(256, 256, 101, modalities, 0.7) for modalities in (3, 4, 6)]
QUICK = [SIZES[1], Size(32, 16, 5, 3, 0.7)]
# The largest (B, ΣD, K) weight that the gather formulation is let make, in bytes; a training step holds several.
LARGEST_GATHER = 2**30


class PerCase(nn.Module):
    """One linear layer per missing case, on the rows of that case."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        count, self.classes = 2**size.modalities, size.classes
        self.layers = nn.ModuleList(nn.Linear(size.modalities * size.width, size.classes) for _ in range(count))

    def forward(self, x: Tensor, case: Tensor) -> Tensor:  # noqa: D102
        out = x.new_zeros(len(x), self.classes)
        for number, layer in enumerate(self.layers):
            mask = case == number
            if mask.any():
                out[mask] = layer(x[mask])
        return out


class Products(nn.Module):
    """The limit: for each missing case one product of its rows, of the modalities they have, and a weight."""

    def __init__(self, size: Size, present: Tensor) -> None:
        super().__init__()
        self.classes, self.groups = size.classes, []
        for has in present.unique(dim=0):
            rows = (present == has).all(1).nonzero()[:, 0]
            columns = torch.arange(size.modalities * size.width, device=present.device).view(size.modalities, -1)[has]
            self.groups.append((rows, columns.flatten()))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(size.classes, len(columns)) / size.width**0.5) for _, columns in self.groups
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = x.new_zeros(len(x), self.classes)
        for (rows, columns), weight in zip(self.groups, self.weights, strict=True):
            out = out.index_copy(0, rows, x[rows[:, None], columns] @ weight.T)
        return out


class Gather(nn.Module):
    """The formula with one weight a row: normalise the (B, ΣD, K) weight of each row's case by modality, multiply."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        shape = 2**size.modalities, size.modalities * size.width, size.classes
        self.weight = nn.Parameter(torch.randn(shape) / size.width**0.5)

    def forward(self, x: Tensor, case: Tensor, count: Tensor) -> Tensor:  # noqa: D102
        size = self.size
        weight = self.weight[case].unflatten(1, (size.modalities, size.width))
        features = F.normalize(x.unflatten(1, (size.modalities, size.width)), dim=2)
        cosine = torch.einsum("bmd,bmdk->bk", features, F.normalize(weight, dim=2)) / count[:, None]
        logits: Tensor = 20 * cosine
        return logits


def batch_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features with zeros where a modality is missing, the present mask, labels.

    A row that is not complete has any of the incomplete cases, each as likely.
    """
    generator = torch.Generator().manual_seed(0)
    cases = torch.arange(1, 2**size.modalities)[:, None] >> torch.arange(size.modalities) & 1
    chosen = torch.randint(0, len(cases) - 1, (size.batch,), generator=generator)
    incomplete = torch.rand(size.batch, generator=generator) < size.missing
    present = torch.where(incomplete[:, None], cases[chosen] > 0, True)
    x = torch.randn(size.batch, size.modalities, size.width, generator=generator)
    x = torch.where(present[:, :, None], x, 0).flatten(1)
    labels = torch.randint(0, size.classes, (size.batch,), generator=generator)
    return x.to(device), present.to(device), labels.to(device)


def method(name: str, size: Size, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A module, and what makes logits, or a loss, of it, features and labels or None."""
    x, present, labels = batch_of(size, device)
    case = (present.long() << torch.arange(size.modalities, device=device)).sum(1)
    total = size.modalities * size.width
    if name in ("head", "head, each case"):
        widths = {f"m{m}": size.width for m in range(size.modalities)}
        cases = "shared" if name == "head" else "all"
        head = DecoupledPrototypeHead(widths, size.classes, cases=cases, device=device)
        with torch.no_grad():  # It has a center then. A few rows, so that memory is not touched before it is measured.
            head.loss(x[:2], present[:2], labels[:2], prototype_weight=0.0)
        return head, lambda head, x, y: head(x, present, y)
    if name == "products alone":
        return Products(size, present).to(device), lambda products, x, y: products(x)
    if name == "nn.Linear":
        return nn.Linear(total, size.classes, device=device), lambda layer, x, y: layer(x)
    if name == "linear per case":
        return PerCase(size).to(device), lambda layers, x, y: layers(x, case)
    if name == "ArcFaceLoss":
        from pytorch_metric_learning.losses import ArcFaceLoss

        loss = ArcFaceLoss(size.classes, total).to(device)
        return loss, lambda loss, x, y: loss.get_logits(x) if y is None else loss(x, y)
    return Gather(size).to(device), lambda gather, x, y: gather(x, case, present.sum(1))


def steps(name: str, size: Size, device: torch.device, compiled: bool) -> dict[str, Callable[[], None]]:
    """The two things that are timed, as functions of nothing."""
    torch.manual_seed(0)
    module, call = method(name, size, device)
    x, _, labels = batch_of(size, device)
    trained = x.clone().requires_grad_()  # As behind an encoder that is trained.
    run = torch.compile(call) if compiled else call

    def forward() -> None:
        if module.training:
            module.eval()
        with torch.no_grad():
            run(module, x, None)

    def step() -> None:
        if not module.training:
            module.train()
        trained.grad = None
        for p in module.parameters():
            p.grad = None
        out = run(module, trained, labels)
        loss = out if out.dim() == 0 else F.cross_entropy(out, labels)
        loss.backward()

    step()  # The head has then seen all cases.
    return {"forward": forward, "forward + backward": step}


def timed(function: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begin) / repeats


def measure(size: Size, device: torch.device, compiled: bool, seconds: float) -> dict[tuple[str, str], float]:
    """(method, what) -> median seconds; the methods take turns."""
    functions: dict[tuple[str, str], Callable[[], None]] = {}
    for name in METHODS:
        if name == "gather" and (
            size.missing != 0.7 or size.batch * size.modalities * size.width * size.classes * 4 > LARGEST_GATHER
        ):
            continue
        functions |= {(name, what): f for what, f in steps(name, size, device, compiled).items()}
    repeats, samples = {}, {key: list[float]() for key in functions}
    for (name, what), function in functions.items():
        timed(function, 1, device)
        if name == METHODS[0]:
            # As often for all: where a method is called again and again, its weights stay in the caches.
            repeats[what] = max(1, int(2e-3 / timed(function, 3, device)))
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(samples[METHODS[0], "forward"]) < 5:
        for key, function in functions.items():
            if key[0] != "gather" or not samples[key]:  # It is so slow that once tells how much.
                samples[key].append(timed(function, 1 if key[0] == "gather" else repeats[key[1]], device))
    return {key: statistics.median(values) for key, values in samples.items()}


def peak_memory(name: str, size: Size) -> float:
    """MiB of a training step beyond what was held before it, in a process of its own."""
    arguments = [sys.executable, __file__, "--memory", name, *map(str, size)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def print_memory(name: str, size: Size) -> None:
    """What :func:`peak_memory` runs."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    steps(name, size._replace(batch=2, width=4, classes=2), device, False)  # Loads what is loaded at the first step.
    module, call = method(name, size, device)
    x, _, labels = batch_of(size, device)
    x.requires_grad_()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew from here.
    out = call(module, x, labels)
    (out if out.dim() == 0 else F.cross_entropy(out, labels)).backward()
    print(resident("VmHWM") - before)


def plain_prototype_loss(head: DecoupledPrototypeHead) -> Tensor:
    """The formula with all similarities at once."""
    flat = F.normalize(torch.cat(list(head.prototypes.values())), dim=2).flatten(0, 1)
    classes = torch.arange(len(flat), device=flat.device) % head.num_classes
    similarity = (flat @ flat.T).fill_diagonal_(-math.inf)
    log_fraction = similarity - similarity.logsumexp(1, keepdim=True)
    positive = (classes[:, None] == classes).fill_diagonal_(False)
    return -(torch.where(positive, log_fraction, 0).sum(1) / positive.sum(1)).mean()


def prototype_losses(classes: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The prototype loss and its gradient: the plain form, and the head's."""
    torch.manual_seed(0)
    widths = {"image": 512, "text": 512}
    head = DecoupledPrototypeHead(widths, classes, cases="all", shared_space=True, device=device)

    def step(loss: Callable[[], Tensor]) -> None:
        head.zero_grad()
        loss().backward()

    return {
        "plain": functools.partial(step, functools.partial(plain_prototype_loss, head)),
        "head": functools.partial(step, head.prototype_loss),
    }


def measure_prototype_losses(device: torch.device, seconds: float) -> str:
    """A Markdown table of medians, the two taking turns."""
    lines = ["| prototype loss and gradient, K | plain | head | ratio |", "|---|---|---|---|"]
    for classes in PROTOTYPES:
        functions, samples = prototype_losses(classes, device), {"plain": list[float](), "head": list[float]()}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(samples["head"]) < 5:
            for name, function in functions.items():
                samples[name].append(timed(function, 1, device))
        plain, ours = (1e3 * statistics.median(samples[name][1:]) for name in ("plain", "head"))
        lines.append(f"| {classes} | {plain:.1f} ms | {ours:.1f} ms | {ours / plain:.2f} |")
    return "\n".join(lines)


def resident(what: str) -> float:
    """MiB of this process in memory now (VmRSS) or at its peak (VmHWM); Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(what))


def machine(device: torch.device) -> str:
    """One line on what the numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: one line a size, missing rate and mode, with nn.Linear's numbers and the others' ratios to them."""
    lines = ["| size | M | missing | mode | what | nn.Linear | " + " | ".join(METHODS[1:]) + " |"]
    lines.append("|" + "---|" * (6 + len(METHODS) - 1))
    keys = dict.fromkeys(tuple(row[name] for name in ("size", "M", "missing", "mode", "what")) for row in rows)
    for key in keys:
        values = {row["method"]: float(str(row["value"])) for row in rows if _key(row) == key}
        unit = "MiB" if key[4] == "peak memory" else "µs"
        base = values["nn.Linear"]
        known = base >= 1  # Below a MiB the memory of a process says nothing.
        cells = [f"{values[name] / base:.2f}" if name in values and known else "–" for name in METHODS[1:]]
        lines.append(f"| {' | '.join(map(str, key))} | {base:,.0f} {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("size", "M", "missing", "mode", "what"))


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Time as a ratio to nn.Linear's, by size: a panel for each mode, forward hollow and training step solid."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows = [row for row in rows if row["what"] != "peak memory" and row["missing"] == "70 %"]
    modes = list(dict.fromkeys(str(row["mode"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.5 * len(modes), 4), sharey=True, layout="constrained", squeeze=False
    )
    colors = dict(zip(METHODS, COLORS, strict=True))
    for axis, mode in zip(axes[0], modes, strict=True):
        sizes = list(dict.fromkeys((row["size"], row["M"]) for row in rows if row["mode"] == mode))
        for name in METHODS[1:]:
            for what, face in (("forward", "white"), ("forward + backward", colors[name])):
                points = {
                    ((row["size"], row["M"]), row["method"]): float(str(row["value"]))
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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, seconds = (QUICK, 0.2) if arguments.quick else (SIZES, 3.0)
    modes: list[tuple[str, Callable[[], None], bool, bool]] = []
    if device.type == "cuda":
        for compiled in (False, True):
            for half in (False, True):
                name = f"{'compiled' if compiled else 'eager'}, {'bf16 autocast' if half else 'float32'}"
                modes.append((name, lambda: None, compiled, half))
    else:
        for count in arguments.threads:
            name = f"{count} thread{'s' if count > 1 else ''}"
            modes.append((name, functools.partial(torch.set_num_threads, count), False, False))
    rows: list[dict[str, object]] = []
    with tqdm(total=len(sizes) * (len(modes) + 1)) as progress:
        for size in sizes:
            common = {"size": str(size), "M": size.modalities, "missing": f"{size.missing:.0%}".replace("%", " %")}
            for mode, prepare, compiled, half in modes:
                progress.set_description(f"{size}, M = {size.modalities}, {mode}")
                prepare()
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    medians = measure(size, device, compiled, seconds)
                rows += [
                    {**common, "mode": mode, "what": what, "method": name, "value": f"{value * 1e6:.1f}"}
                    for (name, what), value in medians.items()
                ]
                progress.update()
            if device.type == "cpu" and Path("/proc/self/status").exists():
                for name in METHODS[:3]:
                    value = f"{peak_memory(name, size):.1f}"
                    rows.append({**common, "mode": "CPU", "what": "peak memory", "method": name, "value": value})
            progress.update()
    torch.set_num_threads(1)
    text = f"{machine(device)}\n\n{table(rows)}\n\n{measure_prototype_losses(device, seconds)}\n"
    (output / "speed.md").write_text(text)
    with (output / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, output / "speed.png")
    print(text)


if __name__ == "__main__":
    main()
