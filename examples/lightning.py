"""Train the head on an open_clip model with Lightning, and test the checkpoint that validates best.

    python examples/lightning.py                                            # a small random CLIP, a minute on a CPU
    python examples/lightning.py --model ViT-B-32 --pretrained openai       # pretrained and frozen

The data are drawn on the spot by shapes.py; put your own rows in their place, in `main` and `Batches`. Without --model
the CLIP is small, random and trained whole: its scores show that the program works, not what the method does.

`pytorch_lightning`, which `pip install lightning` brings along, is used by that name: `import lightning` would find
this file, since Python looks beside a program first. In yours `from lightning.pytorch import ...` is the same.
"""

import argparse
from pathlib import Path
from typing import Any


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="open_clip's name; none: a small random CLIP")
    parser.add_argument("--pretrained", help="tag or checkpoint file of the weights; none: random")
    parser.add_argument("--trainable", nargs="+", default=[], metavar="PATTERN", help="what of the model trains")
    parser.add_argument("--count", type=int, default=1500, help="how many rows are drawn (default: 1500)")
    parser.add_argument("--epochs", type=int, default=15, help="(default: 15)")
    parser.add_argument("--output", type=Path, default=Path("lightning_run"), help="folder (default: lightning_run)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import open_clip
import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from shapes import CLASSES, Row, draw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from protohead import PrototypeClassifier, attach
from protohead.cases import case_masks, case_names, nearest_case

PROTOTYPE_WEIGHT = 0.9  # λ; try 0.1 to 10, and keep what validates best.


class MissingModalities(LightningModule):
    """A classifier with the prototype loss, and scores by what the rows have."""

    def __init__(self, model: PrototypeClassifier, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        count = len(CLASSES)
        metrics: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=-100),
            "f1": MulticlassF1Score(count, ignore_index=-100),
        }
        self.cases, self.masks = case_names(model.head.modalities), case_masks(model.head.modalities)
        names = ("all", *self.cases)
        self.scores: Any = nn.ModuleDict({name: MetricCollection(metrics).clone(prefix=f"{name}/") for name in names})

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """The head's whole objective: cross-entropy with margins, sub-cases and λ · prototype loss."""
        rows = batch["inputs"], batch["present"], batch["labels"]
        loss = self.model.loss(*rows, prototype_weight=PROTOTYPE_WEIGHT)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Count each row among all rows, and in its case; the others are ignored there."""
        logits, labels = self.model(batch["inputs"], batch["present"]), batch["labels"]
        case = nearest_case(batch["present"], self.masks.to(logits.device))
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


class Batches:
    """Rows to a batch. What stands in for a missing picture or text does not matter: it is never encoded."""

    def __init__(self, transform: Any, tokenizer: Any) -> None:
        self.transform, self.tokenizer = transform, tokenizer

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Inputs, present and labels."""
        image = torch.stack([self.transform(row.image or Image.new("RGB", (32, 32))) for row in rows])
        text = self.tokenizer([row.text or "" for row in rows])
        present = torch.tensor([[row.image is not None, row.text is not None] for row in rows])
        labels = torch.tensor([row.label for row in rows])
        return {"inputs": {"image": image, "text": text}, "present": present, "labels": labels}


def build(name: str | None, pretrained: str | None, trainable: list[str]) -> tuple[PrototypeClassifier, Batches]:
    """The model and what makes its batches."""
    if name is None:
        vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
        text = {"context_length": 16, "width": 64, "heads": 4, "layers": 2}
        clip = open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
        transform, tokenizer = (
            open_clip.image_transform(32, is_train=False),
            open_clip.SimpleTokenizer(context_length=16),
        )
        trainable = trainable or ["*"]
    else:
        clip, _, transform = open_clip.create_model_and_transforms(name, pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    return attach(clip, len(CLASSES), trainable=trainable), Batches(transform, tokenizer)


def main() -> None:
    """Train, choose the epoch by validation, test, save."""
    arguments = options().parse_args()
    seed_everything(arguments.seed)
    rows, fifth = draw(arguments.count, missing_rate=0.3, seed=arguments.seed), arguments.count // 5
    model, collate = build(arguments.model, arguments.pretrained, arguments.trainable)
    splits = {"train": rows[2 * fifth :], "validation": rows[:fifth], "test": rows[fifth : 2 * fifth]}
    loaders: dict[str, Any] = {
        split: DataLoader(part, 32, shuffle=split == "train", collate_fn=collate)  # type: ignore[arg-type]
        for split, part in splits.items()
    }
    frozen = arguments.model is not None and not arguments.trainable
    module = MissingModalities(model, lr=1e-2 if frozen else 1e-3)
    best = ModelCheckpoint(arguments.output, monitor="all/f1", mode="max")
    settings: dict[str, Any] = {"logger": False, "default_root_dir": arguments.output}
    # Lightning's sanity check would validate a head that nothing has trained yet.
    trainer = Trainer(max_epochs=arguments.epochs, callbacks=[best], num_sanity_val_steps=0, **settings)
    trainer.fit(module, loaders["train"], loaders["validation"])
    trainer.test(module, loaders["test"], ckpt_path="best")
    model.save(arguments.output / "model.safetensors")  # The best epoch's, without what is frozen; model.load reads it.


if __name__ == "__main__":
    main()
