"""The tiny CLIP and the clip art of examples/data, and clip_finetune.py on them."""

import json
import shutil

import clip_finetune
import clip_model
import clip_training
import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from pictures import open_picture
from roads import UNTRAINED
from safetensors.torch import load_file
from test_examples import few_rows, finetune, one_thread, table  # noqa: F401

pytestmark = UNTRAINED

FEATURES = np.load(tiny_clip.DATA / "openclipart13_small_pca128.npz")


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    """The pictures, unpacked elsewhere than in examples."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(tiny_clip.DATA / "openclipart13.zip", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_clip, "DATA", folder)
        unpacked = tiny_clip.clip_art()
        inode = (unpacked / "data.csv").stat().st_ino
        assert (tiny_clip.clip_art() / "data.csv").stat().st_ino == inode
        assert sorted(path.name for path in folder.iterdir()) == ["openclipart13", "openclipart13.zip"]
    return unpacked


def test_pictures_and_titles_are_of_the_rows_of_the_features(art):
    rows = table(art / "data.csv")
    assert [row["split"] for row in rows] == FEATURES["split"].tolist()
    assert [row["label"] for row in rows] == FEATURES["class_names"][FEATURES["label"]].tolist()
    assert [row["image"] for row in rows] == [f"pictures/{i:04}.webp" for i in range(3171)]
    assert all((art / row["image"]).is_file() and row["text"] for row in rows)
    assert len({row["id"] for row in rows}) == 3171
    # Rows of one title have one text feature. The teacher does not tell large letters from small ones.
    met = {}
    for row, feature in zip(rows, FEATURES["text"].astype(np.float32), strict=True):
        first = met.setdefault(row["text"].casefold(), feature)
        assert np.abs(first - feature).max() < 0.05, row
    assert 1000 < len(met) < 3171


def test_words_are_where_the_tokenizer_puts_them():
    clip, _, tokenizer = tiny_clip.tiny_clip()
    weights = load_file(tiny_clip.DATA / "tiny_clip.safetensors")
    ids = weights.pop("token_embedding.ids")
    config = json.loads((tiny_clip.DATA / "tiny_clip.json").read_text())
    compact = open_clip.CLIP(**{**config, "text_cfg": {**config["text_cfg"], "vocab_size": len(ids)}}).eval()
    assert compact.load_state_dict({k: w.float() for k, w in weights.items()}, strict=False).missing_keys == []
    tokens = tokenizer(["a red hammer", "musical instrument", "dog"])
    rows = torch.searchsorted(ids, tokens.long())
    assert torch.equal(ids[rows], tokens.long())  # All are known.
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(tokens), compact.encode_text(rows))
        # An unknown word is as any other.
        unknown = sorted(set(range(1000, 49000)) - set(ids.tolist()))[:2]
        tokens = tokens[:1].repeat(2, 1)
        tokens[:, 2] = torch.tensor(unknown)
        first, second = clip.encode_text(tokens)
    assert torch.equal(first, second)
    assert first.isfinite().all()


def test_the_towers_know_the_classes(art):
    """A test row is nearest the mean of its class more often than by chance, which random weights are hardly."""
    clip, transform, tokenizer = tiny_clip.tiny_clip()
    rows = table(art / "data.csv")[::8]
    labels = torch.as_tensor(FEATURES["label"][::8])
    train = torch.as_tensor(FEATURES["split"][::8] == "train")
    pictures = torch.stack([transform(open_picture(art / row["image"])) for row in rows])
    with torch.no_grad():
        features = {"text": clip.encode_text(tokenizer([row["text"] for row in rows]))}
        features["image"] = clip.encode_image(pictures)
    for name, chance in (("text", 0.2), ("image", 0.15)):
        x = torch.nn.functional.normalize(features[name] - features[name][train].mean(0), dim=1)
        means = torch.stack([x[train & (labels == label)].mean(0) for label in range(13)])
        right = (x @ means.T).argmax(1) == labels
        assert right[~train].float().mean() > chance, name


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Every twelfth row as the clip art, and an empty folder as the present one."""
    art, rows = few_rows(tmp_path / "art", 12)
    monkeypatch.setattr(clip_training, "clip_art", lambda: art)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return rows


def test_no_arguments(few, tmp_path, monkeypatch, capsys):
    finetune(monkeypatch)
    printed = capsys.readouterr().out
    assert "random" not in printed
    scores = table("run-1/scores.csv")
    assert [line["case"] for line in scores] == ["image+text", "image", "text", "all rows", "mean of cases"]
    test = sum(row["split"] == "test" for row in few)
    counts = [int(line["rows"]) for line in scores[:4]]
    assert counts[3] == test
    assert counts[1] + counts[2] == round(0.7 * test)
    assert abs(counts[1] - counts[2]) <= 1
    assert float(scores[3]["accuracy"]) > 0.2  # Of 13 classes.
    settings = json.loads((tmp_path / "here" / "run-1" / "settings.json").read_text())
    assert (settings["model"], settings["epochs"], settings["missing_rate"]) == ("tiny", 20, 0.7)

    finetune(monkeypatch, "--head", "linear", "--epochs", 1)
    assert "linear" in (tmp_path / "here" / "run-2" / "settings.json").read_text()
    (tmp_path / "here" / "run-3").mkdir()  # Of a training that did not end.
    finetune(monkeypatch, "--predict", tmp_path / "art" / "data.csv", "--output", "run-1")
    predictions = table("run-1/data.predictions.csv")
    right = [row["label"] == line["prediction"] for row, line in zip(few, predictions, strict=True)]
    assert sum(right) / len(few) > 0.3
    monkeypatch.setattr(clip_training, "use", lambda arguments: print(arguments.output))
    finetune(monkeypatch, "--predict", tmp_path / "art" / "data.csv")
    assert capsys.readouterr().out.splitlines()[-1] == "run-2"


@pytest.mark.parametrize("prompts", ["map", "dcp"])
def test_prompts_on_the_tiny_clip(prompts):
    settings = {"model": "tiny", "pretrained": None, "seed": 0, "trainable": [], "scale": 20.0, "margin": None}
    settings |= {"preset": None, "classes": ["a", "b"], "prompts": prompts, "head": "prototype"}
    model, augment, transform, tokenizer = clip_model.build(settings)
    picture = open_picture(tiny_clip.DATA.parent / "quickstart.png")
    assert augment(picture).shape == transform(picture).shape == (3, 64, 64)
    inputs = {"image": torch.stack([transform(picture)] * 3), "text": tokenizer(["a", "b", "c"])}
    present = torch.tensor([[True, True], [True, False], [False, True]])
    model.train().loss(inputs, present, torch.tensor([0, 1, 0])).backward()
    (towers,) = model.encoders.values()
    edits = towers.prompts("text", "text")
    assert sum(edit(torch.zeros(1, 16, 128)).shape[1] - 16 for edit in edits) == (12 if prompts == "map" else 6)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in towers.prompts.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in towers.prompts.parameters()) >= 2


def arguments_of(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["clip_finetune", *map(str, arguments)])
    return clip_finetune.checked(clip_finetune.options())


def test_defaults_depend_on_the_data_and_on_what_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = {
        (): ("tiny", 0.7, 20, 32),
        ("--prompts", "dcp"): ("tiny", 0.7, 5, 32),
        ("--trainable", "visual.proj", "--missing-rate", "0"): ("tiny", 0, 5, 32),
        ("--missing-table", "table.jsonl"): ("tiny", 0, 20, 32),
        ("--model", "ViT-B-16", "--epochs", "3", "--batch-size", "8"): ("ViT-B-16", 0.7, 3, 8),
        ("--data", "own.csv"): ("ViT-B-32", 0, 20, 64),
        ("--data", "own.csv", "--model", "tiny", "--prompts", "map"): ("tiny", 0, 5, 64),
        ("--predict", "own.csv"): ("ViT-B-32", 0, 20, 64),
    }
    for given, wanted in expected.items():
        arguments = arguments_of(monkeypatch, *given)
        assert (arguments.model, arguments.missing_rate, arguments.epochs, arguments.batch_size) == wanted, given
        assert str(arguments.output) == "run-1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dataset", "mmimdb"], "--data or --predict with --dataset"),
        (["--pretrained", "openai"], "no --pretrained with --model tiny"),
        (["--predict", "own.csv"], "run-1/settings.json"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        finetune(monkeypatch, *given)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
