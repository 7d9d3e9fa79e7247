"""Train a classifier for missing modalities on an open_clip model and rows of pictures and texts; then use it.

    python examples/clip_finetune.py                                        # clip art and a tiny CLIP: nothing to fetch
    python examples/clip_finetune.py --prompts dcp                          # the same with prompts
    python examples/clip_finetune.py --data data.csv --model ViT-B-32 --pretrained openai --output run      # your rows
    python examples/clip_finetune.py --predict new.csv --output run         # writes run/new.predictions.csv

Without --data the rows are the 3171 pictures and titles of 13 classes in examples/data, 70 % of them without picture or
title, and the model is the tiny CLIP beside them (--model tiny; see examples/data/README.md): scores in half a minute
on two cores, with prompts in two. Yours are a CSV or JSONL of the columns image (a path, relative to the file), text,
label and, optionally, split (train, val, test), or a folder of class folders: see files.py, which reads them, and
labels.py. What is empty, null or absent is missing. Several labels are a list in JSONL, and a|b in CSV. Without splits
70 % of the rows train, 15 % validate and 15 % test. Folders of MM-IMDb, UPMC Food-101 and Hateful Memes are read as
their owners distribute them:

    python examples/clip_finetune.py --data FOLDER --dataset mmimdb --missing-rate 0.7 --preset DPL_DCP --output run

By default CLIP is frozen: its features are computed once, and only the head is trained on them. With --trainable, what
that names is trained too, and with --prompts missing-aware prompts are: each step then runs CLIP, forward and back (see
docs/prompts.md). --head linear is a linear layer, to compare with. The epoch is chosen by validation, and so is the
threshold of several labels; the scores by missing case are those of the test rows. The model is in clip_model.py, its
training in clip_training.py.
"""

import argparse
import os
from itertools import count
from pathlib import Path
from typing import Any

from files import MODALITIES, READERS, InputError
from presets import VARIANTS, published

# On frozen features an epoch takes a second, and validation picks one of them; fine-tuning wants 3 to 10.
FROZEN_EPOCHS, EPOCHS = 20, 5


def options() -> argparse.ArgumentParser:
    """What the program takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--data", type=Path, help="train on this CSV, JSONL or folder (default: the clip art)")
    what.add_argument("--predict", type=Path, help="write predictions for these rows with the model in --output")
    option = parser.add_argument
    output = "folder of the model; new for training (default: the next of run-1, run-2, ...; in --predict the last)"
    option("--output", type=Path, help=output)
    model = "open_clip's name, hf-hub:..., local-dir:... or tiny (default: tiny for the clip art, ViT-B-32 for --data)"
    option("--model", default="ViT-B-32", help=model)
    option("--pretrained", help="tag or checkpoint file of the weights; none: random, but for tiny")
    prompts = "train missing-aware prompts of MAP or DCP in CLIP's towers, which need 6 blocks (default: none)"
    option("--prompts", choices=["none", "map", "dcp"], default="none", help=prompts)
    head = "of prototypes, or a linear layer on the features, with zeros for what is missing (default: prototype)"
    option("--head", choices=["prototype", "linear"], default="prototype", help=head)
    trainable = "what trains, as 'visual.proj' '*ln_*' (default: nothing; with --prompts image projection, last norms)"
    option("--trainable", nargs="+", default=[], metavar="PATTERN", help=trainable)
    option("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that load pictures")
    option("--seed", type=int, default=0, help="of the splits, what goes missing, and the training (default: 0)")
    option("--device", help="(default: cuda if there is one, else cpu)")
    _add_data_options(option)
    _add_training_options(option)
    return parser


def _add_data_options(option: Any) -> None:
    option("--dataset", choices=list(READERS), help="what the folder is, if it is one that datasets/ has a reader of")
    gaps = "files that are absent or unreadable, and empty texts, are missing; always so in --predict"
    option("--allow-gaps", action="store_true", help=gaps)
    separator = "of several labels in one text (default: |, and texts with , or ; are refused); '': nothing is"
    option("--label-separator", metavar="MARK", help=separator)
    rate = "share of the complete rows that lose image or text (default: 0.7 for the clip art, 0 for --data)"
    option("--missing-rate", type=float, default=0.0, help=rate)
    option("--missing", choices=[*MODALITIES, "both"], help="what is taken; both: half each (default: both)")
    table = "what is missing instead: a .jsonl of protohead.simulate by ids, or MAP's .pt of train, val and test"
    option("--missing-table", type=Path, nargs="+", default=[], metavar="FILE", help=table)


def _add_training_options(option: Any) -> None:
    preset = (
        "DPL's published prompts, λ, margins, scale, lr, batch size and epochs for --dataset, --missing, "
        "--missing-rate, but for options that are given. λ is what ran: 0 where DPL's code multiplies it by zero"
    )
    option("--preset", choices=VARIANTS, help=preset)
    slow = f"{EPOCHS} with --prompts or --trainable, each about 20 seconds of two cores on the clip art"
    epochs = f"(default: {FROZEN_EPOCHS} of the head alone; {slow})"
    option("--epochs", type=int, help=epochs)
    option("--batch-size", type=int, default=64, help="(default: 64; 32 for the clip art)")
    # Prototypes start with norms of 1 to 2 in hundreds of dimensions: steps of 0.01 turn them within some epochs.
    option("--lr", type=float, default=1e-2, help="learning rate of head and prompts (default: 0.01)")
    # Larger ones soon destroy what CLIP knows.
    option("--encoder-lr", type=float, default=1e-5, help="learning rate of what is --trainable (default: 1e-5)")
    # Try scales of 16 to 64 and λ of 0.1 to 10, and keep what validates best.
    option("--scale", type=float, default=20.0, help="of the cosines (default: 20)")
    option("--margin", type=float, help="radians, for all cases (default: 0.1 for complete rows, 0.15 for others)")
    option("--weight", type=float, default=0.9, help="λ, of the prototype loss (default: 0.9)")
    balanced = "balanced: weigh each class by the inverse of its frequency in training, so that rare ones count"
    option("--class-weight", choices=["balanced"], help=balanced)


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with those of a preset and what depends on others; wrong ones end the program."""
    arguments = parser.parse_args()
    if not arguments.data and not arguments.predict:
        if arguments.dataset:
            parser.error("Expected --data or --predict with --dataset.")
        rate = 0.0 if arguments.missing_table else 0.7
        parser.set_defaults(model="tiny", batch_size=32, missing_rate=rate)
        arguments = parser.parse_args()
    if arguments.missing and not arguments.missing_rate and not arguments.missing_table:
        parser.error("Expected --missing-rate or --missing-table with --missing.")
    arguments.missing = arguments.missing or "both"
    if arguments.preset:
        if not arguments.dataset:
            parser.error("Expected --dataset with --preset.")
        wanted = (arguments.preset, arguments.dataset, arguments.missing, arguments.missing_rate)
        try:
            settings, notes = published(*wanted)
        except InputError as error:
            parser.error(str(error))
        parser.set_defaults(**settings, missing="both")
        arguments = parser.parse_args()  # What is given goes before.
        used = ", ".join(f"{name} {getattr(arguments, name)}" for name in settings)
        print(f"{arguments.preset}: {used}. {notes}".rstrip())
    if arguments.epochs is None:
        arguments.epochs = EPOCHS if arguments.trainable or arguments.prompts != "none" else FROZEN_EPOCHS
    arguments.output = arguments.output or _next_output(bool(arguments.predict))
    _check(parser, arguments)
    return arguments


def _next_output(predict: bool) -> Path:
    """The first folder of run-1, run-2, ... that does not exist; for predictions the last that has a trained model."""
    free = next(number for number in count(1) if not Path(f"run-{number}").exists())
    trained = [number for number in range(1, free) if Path(f"run-{number}", "settings.json").exists()]
    return Path(f"run-{max(trained, default=1) if predict else free}")


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    least = {"epochs": 1, "batch_size": 1, "workers": 0, "weight": 0, "lr": 0, "encoder_lr": 0, "seed": 0}
    for name, low in least.items():
        if not low <= (got := getattr(arguments, name)) < float("inf"):
            parser.error(f"Expected --{name.replace('_', '-')} to be {low} or more, but got {got}.")
    if not 0 <= arguments.missing_rate <= 1:
        parser.error(f"Expected --missing-rate to be from 0 to 1, but got {arguments.missing_rate}.")
    if arguments.missing_table and arguments.missing_rate and not arguments.preset:  # A preset goes by both.
        parser.error("Expected one of --missing-rate and --missing-table, but got both.")
    if arguments.model == "tiny" and arguments.pretrained:
        parser.error("Expected no --pretrained with --model tiny, which has its own weights.")
    own = [name for name in ("scale", "margin", "weight") if getattr(arguments, name) != parser.get_default(name)]
    if arguments.head == "linear" and own:
        parser.error(f"Expected no --{' or --'.join(own)} with --head linear, which has no prototypes.")


def main() -> None:
    """Read the arguments, then train or predict."""
    parser = options()
    arguments = checked(parser)
    import clip_training  # Here, since it loads torch and open_clip, for which --help should not wait.

    try:
        clip_training.check_device(arguments)
        if arguments.predict:
            clip_training.use(arguments)
        else:
            if (arguments.output / "model.safetensors").exists():
                raise InputError(f"Expected --output to be a new folder, but {arguments.output} has a model.")
            arguments.output.mkdir(parents=True, exist_ok=True)
            clip_training.train(arguments)
    except InputError as error:
        # A loader's worker process hands an error on with its traceback as the message, of which this is the end.
        parser.error(str(error).strip().rsplit("InputError: ", 1)[-1])


if __name__ == "__main__":
    main()
