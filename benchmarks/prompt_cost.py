"""What do missing-aware prompts cost? A CLIP of open_clip with random weights, which cost what trained ones do.

The time of a forward pass and of a training step with DCP's prompts against the same towers with as many plain tokens
in front, against the towers alone (of which the last norms and the image projection are trained), and with sub-cases;
then of a batch in which most rows lack their image or their text, half and half, against encoding all rows. What is
compared takes turns; the numbers are medians.

    python benchmarks/prompt_cost.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from protohead import PrototypeClassifier, attach
from protohead.adapters.towers import tower_widths
from protohead.prompts import DcpPrompts, Edit, put_in_front

LAST = ("visual.proj", "visual.ln_post.*", "ln_final.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PlainTokens(nn.Module):
    """As many tokens before the first block, the same in every case."""

    def __init__(self, widths: dict[str, int], length: int) -> None:
        super().__init__()
        tokens = {name: nn.Parameter(0.02 * torch.randn(length, width)) for name, width in widths.items()}
        self.tokens = nn.ParameterDict(tokens)

    def forward(self, modality: str, case: str) -> list[Edit]:
        """One function."""
        tokens = self.tokens[modality]
        return [lambda x: put_in_front(x, tokens)]


@dataclass
class Run:
    """A model, a batch of which some rows lack a modality, the weight of sub-cases, and bfloat16 autocast or not."""

    model: PrototypeClassifier
    inputs: dict[str, Tensor]
    present: Tensor
    subcase_weight: float = 0.0
    half: bool = False

    def forward(self) -> None:
        """Logits, without a graph."""
        with torch.no_grad(), self.autocast():
            self.model(self.inputs, self.present).sum().item()  # Waits for a GPU.

    def step(self) -> None:
        """The objective and its gradients."""
        self.model.zero_grad()
        labels = torch.arange(len(self.present), device=DEVICE) % 101
        with self.autocast():
            loss = self.model.loss(self.inputs, self.present, labels, subcase_weight=self.subcase_weight)
        loss.backward()
        next(self.model.head.parameters()).sum().item()

    def autocast(self) -> torch.autocast:
        """What a forward pass runs in."""
        return torch.autocast(DEVICE, torch.bfloat16, enabled=self.half)


def build(name: str, prompts: Callable[[dict[str, int]], nn.Module] | None) -> PrototypeClassifier:
    """The model, of which the same is trained beside the prompts."""
    clip = open_clip.create_model(name, device=DEVICE)
    module = None if prompts is None else prompts(tower_widths(clip))
    model: PrototypeClassifier = attach(clip, 101, prompts=module, trainable=LAST)
    return model


def models(name: str, length: int, depth: int) -> dict[str, PrototypeClassifier]:
    """With DCP's prompts, with as many plain tokens, and the towers alone."""
    return {
        "plain tokens": build(name, lambda widths: PlainTokens(widths, length)),
        "DCP": build(name, lambda widths: DcpPrompts(widths, length, depth)),
        "no prompts": build(name, None),
    }


def random_inputs(name: str, rows: int) -> dict[str, Tensor]:
    """Pictures and texts of the sizes that the model takes."""
    config = open_clip.get_model_config(name)
    size, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    ids = torch.randint(1, text["vocab_size"], (rows, text["context_length"]), device=DEVICE)
    return {"image": torch.randn(rows, 3, size, size, device=DEVICE), "text": ids}


def table(first: str, runs: dict[str, Run], repeats: int) -> list[str]:
    """Milliseconds of each, and the ratio to those of the first."""
    kinds = ("forward", "step")
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in runs for kind in kinds}
    order = list(times)
    for _ in tqdm(range(repeats + 1)):  # The first does not count.
        for name, kind in order:
            call: Any = getattr(runs[name], kind)
            begin = time.perf_counter()
            call()
            times[name, kind].append(time.perf_counter() - begin)
        order.reverse()  # Which comes first is a few per cent.
    found = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    base = next(iter(runs))
    lines = [f"| {first} | forward, ms | ratio | step, ms | ratio |", "|---|---|---|---|---|"]
    for name in runs:
        cells = [f"{milliseconds(found[name, kind])} | {found[name, kind] / found[base, kind]:.2f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def milliseconds(value: float) -> str:
    """With three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="a name in open_clip.list_models() (default: ViT-B-16)")
    parser.add_argument("--batch", type=int, default=20, help="rows (default: 20)")
    parser.add_argument("--missing", type=float, default=0.7, help="the missing rate (default: 0.7)")
    parser.add_argument("--length", type=int, default=36, help="prompts in front (default: 36)")
    parser.add_argument("--depth", type=int, default=6, help="blocks with prompts of their own (default: 6)")
    parser.add_argument("--repeats", type=int, default=6, help="how often each is timed (default: 6)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default: 1)")
    options = parser.parse_args()
    if options.model not in open_clip.list_models():
        parser.error(f"Expected --model to be in open_clip.list_models(), but got {options.model!r}.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    built = models(options.model, options.length, options.depth)
    dcp = built["DCP"]
    inputs, missing = random_inputs(options.model, options.batch), round(options.missing * options.batch)
    every = torch.ones(options.batch, 2, dtype=torch.bool)
    some = every.clone()
    some[: missing // 2, 0] = False
    some[missing // 2 : missing, 1] = False
    runs = {name: Run(model, inputs, every) for name, model in built.items()}
    runs["DCP, sub-cases"] = Run(dcp, inputs, every, 0.5)
    lines = table(f"{options.length} tokens in front", runs, options.repeats)
    runs = {"every row": Run(dcp, inputs, every), "present rows": Run(dcp, inputs, some)}
    runs["present rows, sub-cases"] = Run(dcp, inputs, some, 0.5)
    lines += ["", *table(f"{options.missing:.0%} missing", runs, options.repeats)]
    where = f"{DEVICE}, {options.threads} thread(s), torch {torch.__version__}"
    print("\n".join([f"{options.model}, batch {options.batch}, {where}", *lines]))


if __name__ == "__main__":
    main()
