"""Train a two-tower model with the head on several processes, with DDP or FSDP2, although rows lack pictures or texts.

    torchrun --nproc-per-node 2 examples/distributed.py --strategy ddp
    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp2 --output model.safetensors
    python examples/distributed.py --evaluate model.safetensors      # one process; also under torchrun

The data are coloured shapes with texts (shapes.py); without --pretrained the weights of CLIP are random. Each process
uses its own GPU where there are GPUs, else the CPU.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    option("--model", default="ViT-S-32", help="open_clip's name, or local-dir:... (default: ViT-S-32)")
    option("--pretrained", help="tag or checkpoint file of the weights; none: random")
    option("--trainable", nargs="*", default=["visual.proj", "text_projection"], metavar="PATTERN")
    option("--evaluate", type=Path, metavar="FILE", help="load this instead of training")
    option("--output", type=Path, metavar="FILE", help="where the trained model goes")
    option("--rows", type=int, default=600, help="for training; half as many for the test (default: 600)")
    option("--missing-rate", type=float, default=0.3, help="of rows without picture or text (default: 0.3)")
    option("--epochs", type=int, default=5, help="(default: 5)")
    option("--batch-size", type=int, default=32, help="of each process (default: 32)")
    option("--lr", type=float, default=1e-2, help="learning rate of the head (default: 0.01)")
    option("--encoder-lr", type=float, default=1e-3, help="learning rate of what is --trainable (default: 0.001)")
    option("--weight", type=float, default=0.9, help="λ, of the prototype loss (default: 0.9)")
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import open_clip
import torch
import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from shapes import CLASSES, draw
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from protohead import PrototypeClassifier, attach
from protohead.cases import case_masks, case_names, nearest_case


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, or be a group of one. Yields the device of this process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    finally:
        dist.destroy_process_group()


def build(arguments: argparse.Namespace) -> tuple[PrototypeClassifier, Any, Any]:
    """The model, the transform of its pictures and its tokenizer; a ValueError if there is no such model."""
    torch.manual_seed(0)  # FSDP2 shards what each rank has, so all must draw the same weights.
    try:
        clip, _, transform = open_clip.create_model_and_transforms(arguments.model, arguments.pretrained)
        tokenizer = open_clip.get_tokenizer(arguments.model)
    except Exception as error:  # open_clip and the model hub raise many kinds.
        raise ValueError(f"Expected --model and --pretrained that open_clip loads, but got: {error}") from error
    return attach(clip, len(CLASSES), trainable=arguments.trainable), transform, tokenizer


def prepare(count: int, missing_rate: float, seed: int, transform: Any, tokenizer: Any) -> TensorDataset:
    """Pictures, tokens, present and labels of `count` rows.

    They are tensors, zeros where missing, and not lists with None: with FSDP2 a rank whose batch lacks a modality runs
    the encoder all the same, as the others wait for its shard of the weights, on one blank row of the same shape.
    """
    rows = draw(count, missing_rate, seed)
    pictures = [None if row.image is None else transform(row.image) for row in rows]
    blank = torch.zeros_like(next(picture for picture in pictures if picture is not None))
    pixels = torch.stack([blank if picture is None else picture for picture in pictures])
    present = torch.tensor([[row.image is not None, row.text is not None] for row in rows])
    labels = torch.tensor([row.label for row in rows])
    return TensorDataset(pixels, tokenizer([row.text or "" for row in rows]), present, labels)


def wrap(model: PrototypeClassifier, strategy: str, device: torch.device) -> Any:
    """The model to call; `model` stays the one to save, and the one whose head has the prototype loss."""
    if strategy == "ddp":
        # No find_unused_parameters: a rank whose batch lacks a modality gives its encoder zero gradients.
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    for module in model.encoders.modules():
        if isinstance(module, ResidualAttentionBlock):
            fully_shard(module)
    # FSDP2 refuses scalars; CLIP's are those of its own loss, which the head never reaches.
    return fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})


@torch.no_grad()
def accuracy(model: PrototypeClassifier, wrapped: Any, data: TensorDataset, batch_size: int) -> dict[str, float]:
    """Percent right, by case and over all rows; the same on all ranks."""
    # Equally many batches on each rank, as FSDP2 needs. Row i is of rank i % ranks; at the end, rows come again.
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=False)
    cases, device = case_names(model.head.modalities), model.head.seen.device
    masks = case_masks(model.head.modalities).to(device)
    counts = torch.zeros(2, len(cases), dtype=torch.long, device=device)
    wrapped.eval()
    for number, batch in enumerate(DataLoader(data, batch_size, sampler=sampler)):
        image, text, present, labels = (x.to(device) for x in batch)
        right = wrapped({"image": image, "text": text}, present).argmax(1) == labels
        row = (number * batch_size + torch.arange(len(labels), device=device)) * dist.get_world_size() + dist.get_rank()
        for count, chosen in zip(counts, (right, right | True), strict=True):
            count += nearest_case(present[chosen & (row < len(data))], masks).bincount(minlength=len(count))
    dist.all_reduce(counts)
    hits, rows = counts.tolist()
    scores = {case: 100 * h / n for case, h, n in zip(cases, hits, rows, strict=True) if n}
    return {**scores, "all rows": 100 * sum(hits) / sum(rows)}


def train(model: PrototypeClassifier, wrapped: Any, data: TensorDataset, arguments: argparse.Namespace) -> None:
    """Train `model` through `wrapped`, which makes it one with those of the other ranks."""
    device = model.head.seen.device
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=arguments.lr)
    encoders = [p for p in model.encoders.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": encoders, "lr": arguments.encoder_lr})
    sampler: DistributedSampler[Any] = DistributedSampler(data)
    loader = DataLoader(data, arguments.batch_size, sampler=sampler)
    with tqdm(total=arguments.epochs * len(loader), desc="training", disable=dist.get_rank() > 0) as progress:
        for epoch in range(arguments.epochs):
            sampler.set_epoch(epoch)
            wrapped.train()
            for batch in loader:
                image, text, present, labels = (x.to(device) for x in batch)
                objective = {"prototype_weight": arguments.weight}
                loss = wrapped({"image": image, "text": text}, present, labels, objective)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.2f}")


def main() -> None:
    """Read the arguments, train or load, evaluate."""
    parser = options()
    arguments = parser.parse_args()
    if min(arguments.rows - 7, arguments.epochs, arguments.batch_size) < 1 or not 0 <= arguments.missing_rate <= 1:
        parser.error("Expected --rows of 8 or more, --epochs and --batch-size of 1 or more, --missing-rate in [0, 1].")
    if arguments.output and not arguments.output.absolute().parent.is_dir():
        parser.error(f"Expected --output in a folder that exists, but got {arguments.output}.")
    if not arguments.evaluate and "WORLD_SIZE" not in os.environ:  # Else one process would do the work of all.
        hint = "torchrun --nproc-per-node 2 examples/distributed.py, with these arguments"
        parser.error(f"Expected to be started by torchrun, except with --evaluate, but got one process: {hint}.")
    with process_group() as device:
        try:
            model, transform, tokenizer = build(arguments)
            wrapped = wrap(model.to(device), arguments.strategy, device)
            if arguments.evaluate:
                model.load(arguments.evaluate)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        rows, rate = arguments.rows, arguments.missing_rate
        if not arguments.evaluate:
            train(model, wrapped, prepare(rows, rate, 0, transform, tokenizer), arguments)
        scores = accuracy(model, wrapped, prepare(rows // 2, rate, 1, transform, tokenizer), arguments.batch_size)
        if arguments.output:
            model.save(arguments.output)  # On all ranks, which gather the shards for rank 0.
        if dist.get_rank() == 0:
            print(", ".join(f"{name}: {score:.1f} %" for name, score in scores.items()))


if __name__ == "__main__":
    main()
