"""Train the head on an open_clip model with Lightning, and test the checkpoint that validates best.

    python examples/lightning.py                                            # clip art and a tiny CLIP, a minute
    python examples/lightning.py --model ViT-B-32 --pretrained openai       # a large CLIP

The rows are the pictures and titles of examples/data, of which 70 % lack one or the other here; in `main`, put a table
of yours in their place. CLIP is frozen, but for what is --trainable.

`pytorch_lightning`, which `pip install lightning` brings along, is used by that name: `import lightning` would find
this file, since Python looks beside a program first. In yours `from lightning.pytorch import ...` is the same.
"""

import argparse
from pathlib import Path
from typing import Any


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="open_clip's name (default: the tiny CLIP)")
    parser.add_argument("--pretrained", help="tag or checkpoint file of the weights of --model; none: random")
    parser.add_argument("--trainable", nargs="+", default=[], metavar="PATTERN", help="what of the model trains")
    parser.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    parser.add_argument("--output", type=Path, default=Path("lightning_run"), help="folder (default: lightning_run)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import open_clip
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from rows import Rows, read, split_rows
from tiny_clip import clip_art, tiny_clip
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from protohead import PrototypeClassifier, attach
from protohead.cases import case_masks, case_names, nearest_case
from protohead.simulate import missing_table

PROTOTYPE_WEIGHT = 0.9  # λ; try 0.1 to 10, and keep what validates best.


class MissingModalities(LightningModule):
    """A classifier with the prototype loss, and scores by what the rows have."""

    def __init__(self, model: PrototypeClassifier, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        count = model.head.num_classes
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=-100),
            "f1": MulticlassF1Score(count, ignore_index=-100),
        }
        self.cases, self.masks = case_names(model.head.modalities), case_masks(model.head.modalities)
        names = ("all", *self.cases)
        self.scores: Any = nn.ModuleDict({name: MetricCollection(metrics).clone(prefix=f"{name}/") for name in names})

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The head's whole objective: cross-entropy with margins, sub-cases and λ · prototype loss."""
        image, text, present, labels = batch
        loss = self.model.loss({"image": image, "text": text}, present, labels, prototype_weight=PROTOTYPE_WEIGHT)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Count each row among all rows, and in its case; the others are ignored there."""
        image, text, present, labels = batch
        logits = self.model({"image": image, "text": text}, present)
        case = nearest_case(present, self.masks.to(logits.device))
        self.scores["all"].update(logits, labels)
        for index, name in enumerate(self.cases):
            self.scores[name].update(logits, torch.where(case == index, labels, -100))

    def on_validation_epoch_end(self) -> None:
        """Log, and start anew. Without any row of a case, its scores are 0."""
        for scores in self.scores.values():
            self.log_dict(scores.compute())
            scores.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trainable."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def build(arguments: argparse.Namespace, class_names: list[str]) -> tuple[PrototypeClassifier, Any, Any]:
    """The model, the transform of its pictures and its tokenizer."""
    if arguments.model is None:
        clip, transform, tokenizer = tiny_clip()
    else:
        clip, _, transform = open_clip.create_model_and_transforms(arguments.model, arguments.pretrained)
        tokenizer = open_clip.get_tokenizer(arguments.model)
    model = attach(clip, len(class_names), trainable=arguments.trainable, class_names=class_names)
    return model, transform, tokenizer


def main() -> None:
    """Train, choose the epoch by validation, test, save."""
    arguments = options().parse_args()
    seed_everything(arguments.seed)
    splits = split_rows(read(clip_art() / "data.csv")[0], arguments.seed)
    classes = sorted({row.labels[0] for row in splits["train"]})
    model, transform, tokenizer = build(arguments, classes)
    loaders: dict[str, Any] = {}
    for number, (split, rows) in enumerate(splits.items()):
        ids, modalities = [row.id for row in rows], model.head.modalities
        present = missing_table(ids, modalities, 0.7, "both", seed=3 * arguments.seed + number).present
        labels = torch.tensor([classes.index(row.labels[0]) for row in rows])
        data = Rows(rows, present, labels, transform, tokenizer)
        loaders[split] = DataLoader(data, 32, shuffle=split == "train")
    module = MissingModalities(model, lr=1e-3 if arguments.trainable else 1e-2)
    best = ModelCheckpoint(arguments.output, monitor="all/f1", mode="max")
    settings: dict[str, Any] = {"logger": False, "default_root_dir": arguments.output}
    # Lightning's sanity check would validate a head that nothing has trained yet.
    trainer = Trainer(max_epochs=arguments.epochs, callbacks=[best], num_sanity_val_steps=0, **settings)
    trainer.fit(module, loaders["train"], loaders["val"])
    trainer.test(module, loaders["test"], ckpt_path="best")
    model.save(arguments.output / "model.safetensors")  # The best epoch's, without what is frozen; model.load reads it.


if __name__ == "__main__":
    main()
