"""How much of the backbone's time does `PrototypeClassifier` save, whose encoders run on the present rows only?

A CLIP of open_clip with random weights (which cost what trained ones do) classifies a batch of which some rows
lack their image or their text, half and half; the same model encodes every row and masks the features afterwards. Both
take turns; the numbers are medians.

    python benchmarks/encoders.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm

from protohead import attach


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16", help="a name in open_clip.list_models() (default: ViT-B-16)")
    parser.add_argument("--batch", type=int, default=20, help="rows (default: 20)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.7], help="missing rates (default: 0 0.7)")
    parser.add_argument("--repeats", type=int, default=6, help="how often each is timed (default: 6)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default: 1)")
    arguments = parser.parse_args()
    if arguments.model not in open_clip.list_models():
        parser.error(f"Expected --model to be in open_clip.list_models(), but got {arguments.model!r}.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = open_clip.create_model(arguments.model, device=device)
    model = attach(clip, num_classes=101).eval()
    model.head.seen.fill_(1)  # As if it were trained.
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {
        "image": torch.randn(arguments.batch, 3, height, width, device=device),
        "text": torch.randint(1, 1000, (arguments.batch, clip.context_length), device=device),
    }

    def every_row(present: Tensor) -> Tensor:
        features = {"image": clip.encode_image(inputs["image"]), "text": clip.encode_text(inputs["text"])}
        logits: Tensor = model.head(features, present.to(device))
        return logits

    def present_rows(present: Tensor) -> Tensor:
        logits: Tensor = model(inputs, present)
        return logits

    def timed(call: Callable[[Tensor], Tensor], present: Tensor) -> float:
        begin = time.perf_counter()
        call(present).sum().item()  # Waits for a GPU.
        return time.perf_counter() - begin

    lines = ["| missing | every row, ms | present rows, ms | ratio | rows encoded |", "|---|---|---|---|---|"]
    with torch.no_grad(), tqdm(total=len(arguments.rates) * arguments.repeats) as progress:
        for rate in arguments.rates:
            missing = round(rate * arguments.batch)
            present = torch.ones(arguments.batch, 2, dtype=torch.bool)
            present[: missing // 2, 0] = False
            present[missing // 2 : missing, 1] = False
            torch.testing.assert_close(present_rows(present), every_row(present), rtol=1e-4, atol=1e-4)
            samples: tuple[list[float], list[float]] = [], []
            calls = [(samples[0], every_row), (samples[1], present_rows)]
            for _ in range(arguments.repeats):
                for found, call in calls:
                    found.append(timed(call, present))
                calls.reverse()  # Which comes first is a few per cent.
                progress.update()
            whole, ours = (1e3 * statistics.median(values) for values in samples)
            encoded = present.float().mean()
            lines.append(f"| {rate:.0%} | {whole:,.0f} | {ours:,.0f} | {ours / whole:.2f} | {encoded:.2f} |")
    where = f"{device}, {arguments.threads} thread(s), torch {torch.__version__}"
    print(f"{arguments.model}, batch {arguments.batch}, {where}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
