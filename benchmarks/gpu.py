"""What do the head and prompts cost on a GPU? At most six minutes, one report in Markdown.

Training steps of a CLIP under bfloat16 autocast, with DCP's prompts, with as many plain tokens and without any; then
the head beside `nn.Linear`, eager, the prototype loss, and the head compiled. What is compared takes turns; the numbers
are medians, of the head by CUDA events. What the time does not suffice for is left out by name. Without a GPU, small
sizes run on the CPU: that shows that the program works, not what a GPU takes.

    python benchmarks/gpu.py --output benchmarks/gpu.md
    python benchmarks/gpu.py --quick    # small sizes: does it work?
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import open_clip
import prompt_cost
import torch
from speed_methods import METHODS, SIZES, Mode, Size
from speed_timing import PROTOTYPES, lines_of, machine, measure, measure_prototype_losses, table

TINY = Path(__file__).parents[1] / "examples" / "data" / "tiny_clip.json"
HEADS = METHODS[:3]
# One missing rate: on a GPU every block is multiplied whatever a row lacks.
ALL = [size for size in SIZES if size.missing == 0.7]
# Not smaller: all are called as often as nn.Linear in 2 ms.
QUICK = [Size(256, 64, 100, 2, 0.7), Size(256, 64, 50, 2, 0.7), Size(256, 32, 100, 3, 0.7)]
EAGER = [Mode("eager, float32"), Mode("eager, bf16 autocast", True)]
COMPILED = [Mode("compiled, float32", False, "inductor"), Mode("compiled, bf16 autocast", True, "inductor")]
# Without a GPU or time: the compiler takes seconds for each method and size.
CAPTURED = [Mode("captured, not compiled", True, "eager")]


def prompts(name: str, batch: int, repeats: int) -> str:
    """Training steps of the CLIP with prompts and without; all rows have both modalities."""
    every = torch.ones(batch, 2, dtype=torch.bool)
    inputs = prompt_cost.random_inputs(name, batch)
    runs = {
        kind: prompt_cost.Run(model, inputs, every, half=True)
        for kind, model in prompt_cost.models(name, length=36, depth=6).items()
    }
    return "\n".join(prompt_cost.table(f"{name}, {batch} rows, 36 tokens, bf16 autocast", runs, repeats))


def heads(sizes: Sequence[Size], modes: Sequence[Mode], device: torch.device, seconds: float, end: float) -> str:
    """The head, shared and for each case, beside `nn.Linear`; nothing is begun after `end`."""
    rows, left_out = [], []
    for mode in modes:
        for size in sizes:
            if time.monotonic() < end:
                rows += lines_of(size, mode.name, measure(size, device, mode, seconds, HEADS))
            else:
                left_out.append(f"{mode.name} {size}, M = {size.modalities}")
    lines = [table(rows)] if rows else []
    if left_out:
        lines.append(f"Left out for lack of time: {'; '.join(left_out)}.")
    return "\n\n".join(lines)


def report(device: torch.device, quick: bool, end: float) -> Iterator[str]:
    """The parts, each when it is measured; what takes longest, compiling, comes last."""
    yield machine(device)
    if device.type == "cpu":
        yield "No GPU was found: small sizes on the CPU, which say nothing of one."
    if quick:
        open_clip.add_model_config(TINY)
        yield prompts(TINY.stem, 4, 1)
        yield heads(QUICK, EAGER, device, 0.0, end)
        yield measure_prototype_losses((23, 101), device, 0.0)
        yield heads(QUICK, CAPTURED, device, 0.0, end)
    else:
        yield prompts("ViT-B-16", 64, 20)
        yield heads(ALL, EAGER, device, 2.0, end)
        yield measure_prototype_losses(PROTOTYPES, device, 2.0)
        # Without three modalities and more: with prototypes for each case these are large graphs.
        yield heads([size for size in ALL if size.modalities == 2], COMPILED, device, 1.0, end)


def main() -> None:
    """Measure, print, and write what is there after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats; so it is without a GPU")
    parser.add_argument("--output", type=Path, help="file that the report is written to")
    # The last measurement that is begun may take a minute, of which most is compiling.
    parser.add_argument("--minutes", type=float, default=5, help="begin nothing after that (default: 5)")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts: list[str] = []
    for part in report(device, arguments.quick or device.type == "cpu", end):
        print(part, end="\n\n", flush=True)
        parts.append(part)
        if arguments.output:
            arguments.output.write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
