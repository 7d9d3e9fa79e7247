"""The examples as programs, each on a small model and few pictures; the quickstart has a file of its own."""

import copy
import csv
import gc
import importlib.util
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import clip_finetune
import clip_training
import open_clip
import pytest
import rows as rows_module
import shapes
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from protohead import attach
from protohead.cases import case_names

HERE = Path(clip_finetune.__file__).parent
CHANCE = 100 / len(shapes.CLASSES)
TINY = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes.write(shapes.draw(600, 0.3), tmp_path_factory.mktemp("shapes"))


def load_program(name):
    # By its path, and under another name: `lightning` is also a package.
    spec = importlib.util.spec_from_file_location(f"{name}_example", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch, program, *arguments):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    program.main()


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def few_rows(folder, step):
    """Every `step`-th row of the clip art in a folder, and these rows."""
    (folder / "pictures").mkdir(parents=True)
    with zipfile.ZipFile(HERE / "data" / "openclipart13.zip") as file:
        header, *lines = file.read("data.csv").decode().splitlines(keepends=True)
        (folder / "data.csv").write_text(header + "".join(lines[::step]))
        rows = table(folder / "data.csv")
        for row in rows:
            file.extract(row["image"], folder)
    return folder, rows


# -- shapes.py --------------------------------------------------------------------------------------------------------


def test_shapes_are_seeded_and_lack_what_is_said():
    one, two, other = (shapes.draw(100, 0.3, seed) for seed in (0, 0, 1))
    assert sum(row.image is None for row in one) == sum(row.text is None for row in one) == 15
    assert not any(row.image is None and row.text is None for row in one)
    assert [row.text for row in one] == [row.text for row in two] != [row.text for row in other]
    pictures = [[row.image and row.image.tobytes() for row in rows] for rows in (one, two, other)]
    assert pictures[0] == pictures[1] != pictures[2]
    for row in one:
        colour, shape = shapes.CLASSES[row.label].split()
        assert row.text is None or (colour in row.text and not set(shapes.SHAPES) - {shape} & set(row.text.split()))


def test_shapes_program(tmp_path, monkeypatch):
    call(monkeypatch, shapes, tmp_path / "new", "--count", 20)
    rows, several = rows_module.read(tmp_path / "new" / "data.csv")
    assert len(rows) == 20
    assert not several
    assert sum(row.image is None for row in rows) == sum(row.text is None for row in rows) == 3


# -- clip_finetune.py -------------------------------------------------------------------------------------------------


def finetune(monkeypatch, *arguments):
    call(monkeypatch, clip_finetune, "--workers", 0, "--device", "cpu", *arguments)


def test_frozen_features_then_predictions(tmp_path, tiny, data, monkeypatch, capsys):
    built = []
    build = clip_training.build

    def remember(settings):
        parts = build(settings)
        built.append((parts[0], {name: p.clone() for name, p in parts[0].encoders.named_parameters()}))
        return parts

    monkeypatch.setattr(clip_training, "build", remember)
    arguments = ("--data", data, "--model", tiny, "--missing-rate", 0.1, "--epochs", 6)
    finetune(monkeypatch, *arguments, "--output", tmp_path / "run")
    printed = capsys.readouterr().out
    scores = table(tmp_path / "run" / "scores.csv")
    assert [line["case"] for line in scores] == ["image+text", "image", "text", "all rows", "mean of cases"]
    assert sum(int(line["rows"]) for line in scores[:3]) == int(scores[3]["rows"]) == 90
    splits = rows_module.split_rows(rows_module.read(data)[0], 0)
    complete = int(rows_module.present_of(splits["test"]).all(1).sum())
    assert int(scores[0]["rows"]) == complete - round(0.1 * complete) < complete
    assert 100 * float(scores[3]["accuracy"]) > 2.5 * CHANCE
    shown = next(line.split() for line in printed.splitlines() if line.startswith("all rows"))
    assert shown[2:5] == ["90", *(f"{100 * float(scores[3][name]):.1f}" for name in ("accuracy", "macro_f1"))]
    model, before = built[0]
    assert all(torch.equal(p, before[name]) for name, p in model.encoders.named_parameters())
    assert not any(name.startswith("encoders") for name in load_file(tmp_path / "run" / "model.safetensors"))

    finetune(monkeypatch, *arguments, "--output", tmp_path / "again")
    assert (tmp_path / "again" / "scores.csv").read_text() == (tmp_path / "run" / "scores.csv").read_text()

    new = data.parent / "new.csv"
    new.write_text(data.read_text().replace("label", "ignored") + ",,\n")
    finetune(monkeypatch, "--predict", new, "--output", tmp_path / "run")
    predictions = table(tmp_path / "run" / "new.predictions.csv")
    assert predictions[-1] == {**dict.fromkeys(predictions[0], ""), "row": f"{new} line 602"}
    transform, tokenizer = open_clip.image_transform(32, is_train=False), open_clip.get_tokenizer(tiny)
    model.eval()
    for row, line in zip(rows_module.read(data)[0][:40], predictions, strict=False):
        inputs = {
            "image": [transform(opened(row.image)) if row.image else None],
            "text": [tokenizer(row.text)[0] if row.text else None],
        }
        with torch.no_grad():
            probability, index = model(inputs).softmax(1).max(1)
        assert line["prediction"] == sorted(shapes.CLASSES)[index], row
        assert float(line["probability"]) == pytest.approx(probability.item(), abs=1e-3)
        assert line["has"] == "+".join(name for name in ("image", "text") if getattr(row, name))


def opened(path):
    with Image.open(path) as file:
        return file.convert("RGB")


@pytest.mark.parametrize("layout", ["folder", "jsonl"])
def test_trained_encoders_and_several_labels(tmp_path, tiny, monkeypatch, layout):
    rows = shapes.draw(500, 0.3)
    splits = ["train"] * 400 + ["val"] * 50 + ["test"] * 50
    for number, (row, split) in enumerate(zip(rows, splits, strict=True)):
        folder = tmp_path / "data" / split / shapes.CLASSES[row.label]
        folder.mkdir(parents=True, exist_ok=True)
        if row.image:
            row.image.save(folder / f"{number}.png")
        if row.text:
            (folder / f"{number}.txt").write_text(row.text)
    path = tmp_path / "data"
    if layout == "jsonl":
        path = path / "data.jsonl"
        with open(path, "w") as file:
            for number, (row, split) in enumerate(zip(rows, splits, strict=True)):
                label = shapes.CLASSES[row.label]
                image = f"{split}/{label}/{number}.png" if row.image else None
                fields = {"image": image, "text": row.text, "label": label.split(), "split": split}
                file.write(json.dumps({name: x for name, x in fields.items() if x is not None}) + "\n")
    output = tmp_path / "run"
    arguments = ("--data", path, "--model", tiny, "--output", output)
    if layout == "folder":
        trainable = "--trainable", "visual.*", "transformer.*", "--encoder-lr", 3e-3
        finetune(monkeypatch, *arguments, *trainable, "--epochs", 3)
    else:
        finetune(monkeypatch, *arguments, "--amp")
    scores, settings = table(output / "scores.csv"), json.loads((output / "settings.json").read_text())
    assert [int(line["rows"]) for line in scores[:4]] == [
        sum(bool(row.image) == image and bool(row.text) == text for row in rows[450:])
        for image, text in ((True, True), (True, False), (False, True))
    ] + [50]
    finetune(monkeypatch, "--predict", path, "--output", output)
    predictions = table(output / "data.predictions.csv")
    if layout == "folder":
        saved = load_file(output / "model.safetensors")
        assert "encoders.image+text.clip.visual.proj" in saved
        assert 100 * float(scores[3]["accuracy"]) > 2.5 * CHANCE
        assert len(settings["classes"]) == 6
        test = [line for line in predictions if "/test/" in line["row"]]
        right = sum(line["prediction"] == Path(line["row"]).parent.name for line in test)
        assert right / 50 == pytest.approx(float(scores[3]["accuracy"]))
    else:
        assert settings["classes"] == ["blue", "circle", "red", "square", "triangle"]
        assert 100 * float(scores[3]["map"]) > 60  # Of random scores: 40, the share of labels that are true.
        assert 0.05 <= settings["threshold"] <= 0.95
        numbers = [float(x) for line in predictions for x in line["probability"].split("|") if x]
        assert min(numbers) >= settings["threshold"]
        labels = [set(line["prediction"].split("|")) - {""} for line in predictions[450:]]
        truth = [set(shapes.CLASSES[row.label].split()) for row in rows[450:]]
        assert sum(len(a & b) for a, b in zip(labels, truth, strict=True)) / sum(map(len, labels)) > 0.5


def test_workers_read_the_same(tmp_path, tiny, data, monkeypatch):
    rows, _ = rows_module.read(data)
    _, _, transform, tokenizer = clip_training.build(
        {"model": tiny, "pretrained": None, "seed": 0, "trainable": [], "scale": 20.0, "margin": None}
        | {"classes": ["a", "b"], "preset": None}
    )
    read = rows_module.Rows(rows[:6], rows_module.present_of(rows[:6]), torch.zeros(6), transform, tokenizer)
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(read, 6, num_workers=workers)
        (batch,) = list(loader)
        for index in range(6):
            assert all(torch.equal(x[index], y) for x, y in zip(batch, read[index], strict=True))


def test_missing_rate_takes_half_of_each():
    path = Path("picture.png")
    rows = [rows_module.Row("", path, "text", [], None)] * 90 + [rows_module.Row("", None, "text", [], None)] * 10
    rows = [row._replace(id=str(number)) for number, row in enumerate(rows)]
    present = rows_module.missing_of({"train": rows}, rate=1.0).present
    assert present.any(1).all()
    assert not present.all(1).any()
    assert int(present[:90, 0].sum()) == 45
    assert torch.equal(present, rows_module.missing_of({"train": rows}, rate=1.0).present)
    assert rows_module.present_of(rows)[:90].all()
    assert rows_module.missing_of({"train": rows}) is None


TABLE = "image,text,label,split\n" + "".join(
    f",text {i},{i % 2},{('train', 'val', 'test')[i % 3]}\n" for i in range(12)
)
NO_SPLIT = "image,text,label\n" + "".join(f",text {i},{i % 2}\n" for i in range(12))


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("data.csv", TABLE + "none.png,,0,train\n", [], "line 14 has {folder}/none.png"),
        (
            "data.csv",
            TABLE + "broken.png,,0,train\n",
            [],
            "line 14: Expected a picture that PIL reads, but {folder}/broken.png is not: cannot identify",
        ),
        ("data.csv", TABLE + "broken.png,,0,train\n", ["--workers", 1], "{folder}/broken.png is not: cannot id"),
        ("data.csv", TABLE + ",text,0,eval\n", [], "or test/testing, but {folder}/data.csv line 14 has 'eval'"),
        (
            "data.csv",
            TABLE + ",text,0,\n",
            [],
            "Expected a split in every row or in none, but {folder}/data.csv line 14",
        ),
        ("data.csv", TABLE + ",text,2,test\n", [], "the training split, but {folder}/data.csv line 14 has ['2']"),
        (
            "data.csv",
            TABLE + ",text,,test\n",
            [],
            "Expected a label, or a list of labels, but {folder}/data.csv line 14",
        ),
        ("data.csv", TABLE + ",text,0\n", [], "4 fields, as in the header, but {folder}/data.csv line 14"),
        ("data.csv", TABLE.replace("val", "test"), [], "got none in ['val']"),
        ("data.csv", "image,text,label\n", [], "Expected rows, but the data has none"),
        ("data.csv", "image,text,label\nnan,N/A,0\nnull,None,1\n", [], "got none in ['train', 'val', 'test']"),
        ("data.csv", NO_SPLIT.replace(",1\n", ",0\n"), [], "two classes or more in the training split, but got ['0']"),
        (
            "data.csv",
            "pic,caption,label\na,b,0\n",
            [],
            "but {folder}/data.csv has ['pic', 'caption', 'label']: rename it",
        ),
        (
            "data.csv",
            "image,text\n,a\n",
            [],
            "genres, target), but {folder}/data.csv has ['image', 'text']",
        ),
        ("data.csv", TABLE.encode("utf-16"), [], "Expected UTF-8, but {folder}/data.csv line 1 has the byte 0xff"),
        ("data.jsonl", '{"text": "a", "label": 0}\n{"text": 3, "label": 1}\n', [], "data.jsonl line 2 has 3"),
        (
            "data.jsonl",
            '{"text": "a", "label": 0}\n\n{"text"\n',
            [],
            "{folder}/data.jsonl line 3 to be readable, but got: Expecting",
        ),
        ("data.jsonl", '{"text": "a", "label": {"a": 1}}\n', [], "line 1 has {{'a': 1}}"),
        ("data.jsonl", "[1]\n", [], "JSON object a line"),
        ("data.txt", TABLE, [], "a .csv, a .tsv or a .jsonl that exists, but got {folder}/data.txt"),
        ("data.csv", TABLE, ["--model", "ViT-B-23"], "'ViT-B-23'; nearest: ViT-B-32, "),
        ("data.csv", TABLE, ["--model", "ViT-B-32", "--pretrained", "opnai"], "its tags: openai, "),
        ("data.csv", TABLE, ["--model", "local-dir:none"], "that load, but got Directory"),
        ("data.csv", TABLE, ["--trainable", "visul.*"], "'visul.*' matches none"),
        ("data.csv", TABLE, ["--scale", -1], "`scale` to be positive"),
        ("data.csv", TABLE, ["--margin", 4], "`margin` to be in [0, pi)"),
        ("data.csv", TABLE, ["--epochs", 0], "--epochs to be 1 or more, but got 0"),
        ("data.csv", TABLE, ["--missing-rate", 2], "but got 2"),
        ("data.csv", TABLE, ["--missing-rate", 0.5, "--missing-table", "a.jsonl"], "--missing-table, but got both"),
        ("data.csv", TABLE, ["--encoder-lr", -1], "--encoder-lr to be 0 or more"),
        ("data.csv", TABLE, ["--seed", -1], "--seed to be 0 or more"),
        ("data.csv", TABLE, ["--device", "gpu"], "that torch can use, but got 'gpu'"),
        ("data.csv", TABLE, ["--output", "{folder}/trained"], "has a model"),
    ],
)
def test_wrong_input(tmp_path, tiny, monkeypatch, capsys, name, content, arguments, message):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", remembered(open_clip.create_model_and_transforms))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "model.safetensors").touch()
    arguments = [x.format(folder=tmp_path) if isinstance(x, str) else x for x in arguments]
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--data", tmp_path / name, "--model", tiny, "--output", tmp_path / "run", *arguments)
    printed = capsys.readouterr().err
    if "--workers" in arguments:
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        gc.collect()  # Else torch waits five seconds for its worker, some tests later.
    assert message.format(folder=tmp_path) in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "model.safetensors").exists()


MODELS = {}


def remembered(create):
    # Most wrong inputs need a model only because it comes first.
    def create_once(name, tag):
        if name not in MODELS or tag:
            MODELS[name] = create(name, tag)
        return MODELS[name]

    return create_once


def test_empty_rows_are_counted(tmp_path, tiny, monkeypatch, capsys):
    (tmp_path / "data.csv").write_text(TABLE + ",  ,0,train\n")
    finetune(monkeypatch, "--data", tmp_path / "data.csv", "--model", tiny, "--output", tmp_path / "run", "--epochs", 1)
    printed = capsys.readouterr().out
    assert "Skipped 1 of 13 rows, which have neither image nor text." in printed
    assert "the weights of CLIP are random" not in printed  # A local folder may hold weights.
    assert [line["case"] for line in table(tmp_path / "run" / "scores.csv")] == ["text", "all rows", "mean of cases"]


def test_classes_of_one_row_train():
    rows = [rows_module.Row("", None, "text", [str(number)], None) for number in range(5)] * 2
    rows += [rows_module.Row("", None, "text", ["0"], None)] * 20
    for seed in range(10):
        splits = rows_module.split_rows(rows, seed)
        assert {row.labels[0] for row in splits["train"]} == set("01234")
        assert sum(map(len, splits.values())) == 30


def test_wrong_predictions(tmp_path, tiny, data, monkeypatch, capsys):
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--predict", data, "--output", run)
    assert "folder of a trained model" in capsys.readouterr().err
    finetune(monkeypatch, "--data", data, "--model", tiny, "--output", run, "--epochs", 1)
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps({**settings, "seed": 1}))  # Other random weights.
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--predict", data, "--output", run)
    assert "frozen weights" in capsys.readouterr().err


# -- huggingface.py and lightning.py ----------------------------------------------------------------------------------


def test_huggingface(tmp_path, monkeypatch, capsys):
    example = load_program("huggingface")
    call(monkeypatch, example, "--count", 500, "--epochs", 5, "--lr", 3e-3, "--output", tmp_path)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("| all |"))
    count, f1, accuracy = (float(cell) for cell in line.split("|")[2:5])
    assert count == 100
    assert min(f1, accuracy) > 2 * CHANCE
    assert f"Reloaded from {tmp_path}: accuracy {accuracy} on the same rows." in printed
    counts = [float(line.split("|")[2]) for line in printed.splitlines() if line.startswith(("| image", "| text"))]
    assert sum(counts) == 100
    assert len(counts) == 3


def test_huggingface_loss():
    example = load_program("huggingface")
    model, collate = example.build(None, [])
    batch = collate(shapes.draw(8, 0.5))
    owner = SimpleNamespace(model=model)
    model.eval()  # The encoders have no dropout; in training only the head differs.
    model.head.seen.fill_(1)  # As if it were trained.
    logits = model(batch["inputs"], batch["present"])
    loss, outputs = example.PrototypeTrainer.compute_loss(owner, model, batch, return_outputs=True)
    assert torch.equal(outputs["logits"], logits)
    assert torch.equal(loss, F.cross_entropy(logits, batch["labels"]))
    twin = copy.deepcopy(model.train())
    loss = example.PrototypeTrainer.compute_loss(owner, model, batch)
    features = twin.encode(batch["inputs"], batch["present"])
    wanted = twin.head.loss(features, batch["present"], batch["labels"], prototype_weight=0.9)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


# Lightning 2.6 on torch 2.14; its advice to load these few rows with more processes; and that what is frozen is in eval
# mode, as it should be.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training:UserWarning")
def test_lightning(tmp_path, monkeypatch):
    example = load_program("lightning")
    tested, (art, rows) = [], few_rows(tmp_path / "art", 12)
    monkeypatch.setattr(example, "Trainer", remembering(example.Trainer, tested))
    monkeypatch.setattr(example, "clip_art", lambda: art)
    call(monkeypatch, example, "--epochs", 3, "--output", tmp_path / "run")
    ((scores,),) = tested
    assert scores["all/accuracy"] > 2 / 13  # Of 13 classes.
    assert set(scores) == {f"{case}/{x}" for case in ("all", "image+text", "image", "text") for x in ("f1", "accuracy")}

    classes = sorted({row["label"] for row in rows})
    model, transform, tokenizer = example.build(SimpleNamespace(model=None, trainable=[]), classes)
    model.load(tmp_path / "run" / "model.safetensors")
    splits = rows_module.split_rows(rows_module.read(art / "data.csv")[0], 0)
    test, missing = splits["test"], rows_module.missing_of(splits, "both", 0.7, 0)
    labels = torch.tensor([classes.index(row.labels[0]) for row in test])
    data = rows_module.Rows(test, missing.select([row.id for row in test]), labels, transform, tokenizer)
    images, texts, present, labels = (torch.stack(column) for column in zip(*data, strict=True))
    with torch.no_grad():
        right = model.eval()({"image": images, "text": texts}, present).argmax(1) == labels
    image, text = present.T
    cases = {"all": image | text, "image+text": image & text, "image": image & ~text, "text": text & ~image}
    for case, chosen in cases.items():
        assert right[chosen].float().mean().item() == pytest.approx(scores[f"{case}/accuracy"]), case


def remembering(trainer_class, tested):
    class Remembering(trainer_class):
        def test(self, *arguments, **kwargs):
            tested.append(super().test(*arguments, **kwargs))

    return Remembering


# -- products.py ------------------------------------------------------------------------------------------------------


def test_products(tmp_path, monkeypatch, capsys):
    products = load_program("products")
    made = []
    monkeypatch.setattr(products, "attach", lambda *args, **kwargs: made.append(attach(*args, **kwargs)) or made[-1])
    before = []
    fit = products.NumbersEncoder.fit
    monkeypatch.setattr(
        products.NumbersEncoder, "fit", lambda self, x: fit(self, x) or before.append(copy.deepcopy(self.state_dict()))
    )
    output = tmp_path / "model.safetensors"
    call(monkeypatch, products, "--count", 900, "--epochs", 10, "--output", output)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    accuracy = {line[0]: float(line[2]) for line in lines if line and line[0] in case_names(made[0].head.modalities)}
    assert accuracy["image+text+numbers"] > 50  # Of twelve; any two tell one of two or three, so 50 at most.
    assert max(accuracy["text+numbers"], accuracy["image+text"], accuracy["image+numbers"]) > 20
    assert ["A", "wooden", "thing"] in [line[:3] for line in lines]
    # CLIP stays as it is; the encoder of the numbers has learned, and what was saved is the model that was tested.
    (model,) = made
    assert {name.split(".")[0] for name, p in model.encoders.named_parameters() if p.requires_grad} == {"numbers"}
    after = model.encoders["numbers"].state_dict()
    assert torch.equal(after["mean"], before[0]["mean"])
    assert not torch.equal(after["layers.0.weight"], before[0]["layers.0.weight"])
    saved = load_file(output)
    assert torch.equal(saved["encoders.numbers.layers.0.weight"], after["layers.0.weight"])


def test_gaps_in_the_numbers_of_products():
    products = load_program("products")
    torch.manual_seed(0)
    encoder = products.NumbersEncoder(2)
    encoder.fit(torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.nan, 7.0]]))
    assert encoder.mean.tolist() == [2, 6]
    assert encoder.std.tolist() == [1, 1]
    rows = torch.tensor([[math.nan, 6.0], [2.0, 6.0], [math.nan, math.nan]])
    features = encoder(rows)
    assert features.isfinite().all()
    # A number that is missing is not one that is average.
    assert not torch.allclose(features[0], features[1])
    assert not torch.allclose(features[0], features[2])
