"""Train the head on a two-tower model of transformers with transformers' own Trainer, and reload what it saved.

    python examples/huggingface.py                                          # a small random CLIP, a minute on a CPU
    python examples/huggingface.py --model openai/clip-vit-base-patch32     # pretrained and frozen

The data are drawn on the spot by shapes.py; put your own rows in their place, in `main` and the collator. Without
--model the CLIP is small, random and trained whole: its scores show that the program works, not what the method does.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="for from_pretrained: a CLIP, SigLIP, ...; none: a small random CLIP")
    parser.add_argument("--trainable", nargs="+", default=[], metavar="PATTERN", help="what of the model trains")
    parser.add_argument("--count", type=int, default=1500, help="how many rows are drawn (default: 1500)")
    parser.add_argument("--epochs", type=int, default=15, help="(default: 15)")
    parser.add_argument("--lr", type=float, help="(default: 0.01 for the head on a frozen model, else 0.001)")
    parser.add_argument("--output", type=Path, default=Path("huggingface"), help="folder (default: huggingface)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    options().parse_args()  # --help answers before the imports that follow, which take seconds.

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from shapes import CLASSES, Row, draw
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from protohead import PrototypeClassifier, attach

if (spec := find_spec("datasets")) and spec.origin is None:
    # That is the folder beside this file, but Trainer would take it for Hugging Face's package.
    sys.modules["datasets"] = None  # type: ignore[assignment]


def small_clip() -> tuple[Any, Any, Any]:
    """A random CLIP for 32 x 32 pictures and 40 bytes of text, its image processor and its tokenizer."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = transformers.ByT5Tokenizer(model_max_length=40)  # Of bytes: it has no vocabulary to be downloaded.
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    return clip, transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False), tokenizer


PROTOTYPE_WEIGHT = 0.9  # λ; try 0.1 to 10, and keep what validates best.


class Collator:
    """Rows to a batch. What stands in for a missing picture or text does not matter: it is never encoded."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """What the model is called with, by name."""
        pictures = [row.image or Image.new("RGB", (32, 32)) for row in rows]
        texts = [row.text or "" for row in rows]
        inputs = {
            "image": self.image_processor(pictures, return_tensors="pt"),
            "text": self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt"),
        }
        present = [[row.image is not None, row.text is not None] for row in rows]
        return {"inputs": inputs, "present": torch.tensor(present), "labels": torch.tensor([row.label for row in rows])}


class PrototypeTrainer(transformers.Trainer):
    """Trainer with the head's loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the head's whole objective, with sub-cases and prototype loss; in evaluation cross-entropy."""
        labels = inputs["labels"]
        if model.training:
            return model(inputs["inputs"], inputs["present"], labels, {"prototype_weight": PROTOTYPE_WEIGHT})
        logits = model(inputs["inputs"], inputs["present"])
        loss = F.cross_entropy(logits, labels)
        # What the second holds beside the loss comes to `compute_metrics` as its predictions.
        return (loss, {"logits": logits, "present": inputs["present"]}) if return_outputs else loss


def compute_metrics(evaluation: transformers.EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-F1 in percent, over all rows and by what the rows have, with the number of rows."""
    logits, present = map(torch.as_tensor, evaluation.predictions)
    labels, count = torch.as_tensor(evaluation.label_ids), logits.shape[1]
    both, image, text = present.all(1), present[:, 0] & ~present[:, 1], present[:, 1] & ~present[:, 0]
    scores: dict[str, float] = {}
    for case, rows in {"all": present.any(1), "image+text": both, "image": image, "text": text}.items():
        if rows.any():
            accuracy = multiclass_accuracy(logits[rows], labels[rows], count, average="micro")
            f1 = multiclass_f1_score(logits[rows], labels[rows], count, average="macro")
            scores |= {f"{case}_rows": int(rows.sum()), f"{case}_accuracy": round(100 * accuracy.item(), 1)}
            scores[f"{case}_macro_f1"] = round(100 * f1.item(), 1)
    return scores


def build(name: str | None, trainable: list[str]) -> tuple[PrototypeClassifier, Collator]:
    """The model and what makes its batches."""
    if name is None:
        clip, image_processor, tokenizer = small_clip()
        trainable = trainable or ["*"]
    else:
        clip, processor = transformers.AutoModel.from_pretrained(name), transformers.AutoProcessor.from_pretrained(name)
        image_processor, tokenizer = processor.image_processor, processor.tokenizer
    model: PrototypeClassifier = attach(clip, len(CLASSES), trainable=trainable)
    return model, Collator(image_processor, tokenizer)


def main() -> None:
    """Train, choose the epoch by validation, test, save and reload."""
    arguments = options().parse_args()
    transformers.set_seed(arguments.seed)
    rows = draw(arguments.count, missing_rate=0.3, seed=arguments.seed)
    fifth = len(rows) // 5
    train, validation, test = rows[2 * fifth :], rows[:fifth], rows[fifth : 2 * fifth]
    model, collator = build(arguments.model, arguments.trainable)
    settings = transformers.TrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=arguments.lr or (1e-2 if arguments.model and not arguments.trainable else 1e-3),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="all_macro_f1",
        remove_unused_columns=False,  # The collator wants whole rows.
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    trainer = PrototypeTrainer(model, settings, collator, train, validation, compute_metrics=compute_metrics)
    trainer.train()
    scores = trainer.predict(test).metrics or {}  # type: ignore[arg-type]  # A list does as a data set.
    trainer.save_model(str(arguments.output))  # The best epoch's: <output>/model.safetensors.

    again, _ = build(arguments.model, arguments.trainable)
    again.load_state_dict(load_file(arguments.output / "model.safetensors"))
    batch = collator(test)
    with torch.no_grad():
        logits = again.eval()(batch["inputs"], batch["present"])
    accuracy = multiclass_accuracy(logits, batch["labels"], len(CLASSES), average="micro")
    print("\n| rows with | count | macro-F1 | accuracy |\n| --- | --- | --- | --- |")
    for case in ("image+text", "image", "text", "all"):
        cells = [str(scores.get(f"test_{case}_{name}", "")) for name in ("rows", "macro_f1", "accuracy")]
        print(f"| {case} | {' | '.join(cells)} |")
    print(f"\nReloaded from {arguments.output}: accuracy {100 * accuracy:.1f} on the same rows.")


if __name__ == "__main__":
    main()
