"""How speed.py and gpu.py time: methods in turn in one process, medians, and the table of ratios to `nn.Linear`."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from speed_methods import LARGEST_GATHER, METHODS, Mode, Size, prototype_losses, steps

PROTOTYPES = (101, 1000)  # Numbers of classes for the prototype loss, of two blocks of two modalities, 512 wide.


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


def measure(
    size: Size, device: torch.device, mode: Mode, seconds: float, methods: Sequence[str] = METHODS
) -> dict[tuple[str, str], float]:
    """(method, what) -> median seconds; the methods take turns."""
    torch.compiler.reset()  # Else the methods count as new shapes of those before, of which it takes only a few.
    functions: dict[tuple[str, str], Callable[[], None]] = {}
    for name in methods:
        if name == "gather" and (
            size.missing != 0.7 or size.batch * size.modalities * size.width * size.classes * 4 > LARGEST_GATHER
        ):
            continue
        functions |= {(name, what): f for what, f in steps(name, size, device, mode).items()}
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


def measure_prototype_losses(numbers: Sequence[int], device: torch.device, seconds: float) -> str:
    """A Markdown table of medians, the two taking turns."""
    lines = ["| prototype loss and gradient, K | plain | head | ratio |", "|---|---|---|---|"]
    for classes in numbers:
        functions, samples = prototype_losses(classes, device), {"plain": list[float](), "head": list[float]()}
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(samples["head"]) < 5:
            for name, function in functions.items():
                samples[name].append(timed(function, 1, device))
        plain, ours = (1e3 * statistics.median(samples[name][1:]) for name in ("plain", "head"))
        lines.append(f"| {classes} | {plain:.1f} ms | {ours:.1f} ms | {ours / plain:.2f} |")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """One line on what the numbers were measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def lines_of(size: Size, mode: str, times: dict[tuple[str, str], float]) -> list[dict[str, str]]:
    """What :func:`measure` found, as lines of the CSV, in microseconds."""
    place = place_of(size, mode)
    return [
        {**place, "what": what, "method": name, "value": f"{value * 1e6:.1f}"} for (name, what), value in times.items()
    ]


def place_of(size: Size, mode: str) -> dict[str, str]:
    """The columns that say under which conditions a number was measured."""
    return {
        "size": str(size),
        "M": str(size.modalities),
        "missing": f"{size.missing:.0%}".replace("%", " %"),
        "mode": mode,
    }


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: one line a size, missing rate and mode, with nn.Linear's numbers and the others' ratios to them."""
    measured = {row["method"] for row in rows}
    methods = [name for name in METHODS[1:] if name in measured]
    lines = ["| size | M | missing | mode | what | nn.Linear | " + " | ".join(methods) + " |"]
    lines.append("|" + "---|" * (6 + len(methods)))
    for key in dict.fromkeys(_key(row) for row in rows):
        values = {row["method"]: float(row["value"]) for row in rows if _key(row) == key}
        unit = "MiB" if key[4] == "peak memory" else "µs"
        base = values["nn.Linear"]
        known = base >= 1  # Below a MiB the memory of a process says nothing.
        cells = [f"{values[name] / base:.2f}" if name in values and known else "–" for name in methods]
        lines.append(f"| {' | '.join(key)} | {base:,.0f} {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("size", "M", "missing", "mode", "what"))
