"""clip_finetune.py with prompts and with a linear head, on a small random model of six blocks."""

import json
import subprocess
import sys
from types import SimpleNamespace

import clip_finetune
import clip_model
import clip_training
import presets
import pytest
import rows as rows_module
import shapes
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from safetensors.torch import load_file
from test_examples import TINY, finetune, one_thread, table  # noqa: F401

from protohead import load_head

pytestmark = UNTRAINED

TOWER = {"width": 16, "layers": 6}
DEEP = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "head_width": 8, "patch_size": 16, **TOWER},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "heads": 2, **TOWER},
    },
    "preprocess_cfg": {},
}
SETTINGS = {"pretrained": None, "seed": 0, "trainable": [], "scale": 20.0, "margin": None, "preset": None}
ARGUMENTS = {"device": "cpu", "amp": False, "seed": 0, "workers": 0, "batch_size": 64}
SETTINGS |= {"classes": ["a", "b", "c"], "prompts": "none", "head": "prototype"}


def model_folder(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("model")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return model_folder(tmp_path_factory, DEEP)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return model_folder(tmp_path_factory, TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return shapes.write(shapes.draw(60, 0.5), tmp_path_factory.mktemp("shapes"))


def remember(monkeypatch):
    """The models that are built, and their parameters then."""
    built, build = [], clip_model.build

    def remembering(settings):
        parts = build(settings)
        built.append((parts[0], {name: p.detach().clone() for name, p in parts[0].named_parameters()}))
        return parts

    monkeypatch.setattr(clip_training, "build", remembering)
    return built


@pytest.mark.parametrize(("prompts", "head"), [("dcp", "prototype"), ("map", "linear")])
def test_prompts_and_heads(tmp_path, deep, data, monkeypatch, prompts, head):
    built, output = remember(monkeypatch), tmp_path / "run"
    arguments = "--data", data, "--model", deep, "--prompts", prompts, "--head", head, "--batch-size", 21
    finetune(monkeypatch, *arguments, "--epochs", 1, "--output", output)
    model, before = built[0]
    (towers,) = model.encoders.values()
    assert type(towers.prompts).__name__.lower() == f"{prompts}prompts"
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    last = {"visual.proj"} | {f"{norm}.{p}" for norm in ("visual.ln_post", "ln_final") for p in ("weight", "bias")}
    assert {name.rpartition("clip.")[2] for name in changed if "clip." in name} == last
    saved = load_file(output / "model.safetensors")
    assert {name for name in saved if name in before} == changed
    assert "encoders.image+text.seen" in saved
    if head == "linear":
        assert saved["head.linear.weight"].shape == (6, 32)
        with pytest.raises(ValueError, match="exactly one head"):
            load_head(output / "model.safetensors")
    else:
        assert load_head(output / "model.safetensors").class_names == tuple(sorted(shapes.CLASSES))

    if head == "prototype":
        finetune(monkeypatch, "--predict", data, "--output", output)
    else:  # In a new process, which builds the model anew.
        command = [sys.executable, clip_finetune.__file__, "--workers", "0", "--device", "cpu"]
        command += ["--predict", str(data), "--output", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, result.stderr
    predictions = table(output / "data.predictions.csv")
    rows, _ = rows_module.read(data)
    _, _, transform, tokenizer = clip_model.build({**SETTINGS, "model": deep})
    part = rows_module.Rows(rows, rows_module.present_of(rows), torch.zeros(60), transform, tokenizer)
    logits, present, _ = clip_training.predict(model, part, SimpleNamespace(**{**ARGUMENTS, "batch_size": 7}))
    assert len({tuple(row) for row in present.tolist()}) == 3
    for x, line in zip(logits.softmax(1), predictions, strict=True):
        assert line["prediction"] == sorted(shapes.CLASSES)[x.argmax()]
        assert float(line["probability"]) == pytest.approx(x.max().item(), abs=1e-4)


def test_a_linear_head_on_frozen_features(tmp_path, shallow, data, monkeypatch):
    built, output = remember(monkeypatch), tmp_path / "run"
    finetune(monkeypatch, "--data", data, "--model", shallow, "--head", "linear", "--epochs", 2, "--output", output)
    finetune(monkeypatch, "--predict", data, "--output", output)
    (model, before), _ = built
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head.linear.weight", "head.linear.bias"}
    predictions = table(output / "data.predictions.csv")
    saved, (rows, _) = load_file(output / "model.safetensors"), rows_module.read(data)
    _, _, transform, tokenizer = clip_model.build({**SETTINGS, "model": shallow})
    part = rows_module.Rows(rows, rows_module.present_of(rows), torch.zeros(60), transform, tokenizer)
    features = clip_training.encoded(model, part, SimpleNamespace(**ARGUMENTS), "rows").tensors
    for i in range(60):
        # By definition: zeros for what is missing.
        h = [x[i] if there else torch.zeros(64) for x, there in zip(features, part.present[i], strict=False)]
        x = (saved["head.linear.weight"] @ torch.cat(h) + saved["head.linear.bias"]).softmax(0)
        assert predictions[i]["prediction"] == sorted(shapes.CLASSES)[x.argmax()]
        assert float(predictions[i]["probability"]) == pytest.approx(x.max().item(), abs=1e-4)


def test_the_linear_loss():
    torch.manual_seed(0)
    head = clip_model.LinearHead({"image": 3, "text": 2}, 4)
    features = {"image": torch.randn(6, 3), "text": torch.randn(6, 2)}
    present = torch.tensor([[1, 1], [1, 0], [0, 1]] * 2).bool()
    zeroed = torch.cat([features["image"] * present[:, :1], features["text"] * present[:, 1:]], 1)
    logits, weight = zeroed @ head.linear.weight.T + head.linear.bias, torch.rand(4)
    features["text"][1] = torch.nan  # Missing: whatever stands there.
    labels, several = torch.tensor([0, 1, 2, 3, -100, 1]), torch.rand(6, 4)
    torch.testing.assert_close(head(features, present), logits)
    options = {"prototype_weight": 0.9, "subcase_weight": 0.5, "class_weight": weight}
    for target, expected in (
        (labels, F.cross_entropy(logits, labels, weight)),
        (several, F.binary_cross_entropy_with_logits(logits, several, weight)),
    ):
        torch.testing.assert_close(head.loss(features, present, target, **options), expected)
    head.loss(features, present, labels).backward()
    assert head.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("head", ["prototype", "linear"])
def test_what_trains_at_which_rate(deep, head):
    model = clip_model.build({**SETTINGS, "model": deep, "prompts": "map", "head": head})[0]
    arguments = SimpleNamespace(lr=1e-2, encoder_lr=1e-5, prompts="map")
    new, old = clip_training.groups_of(model, arguments)
    assert (new["lr"], old["lr"]) == (1e-2, 1e-5)
    prompts = {p for name, p in model.named_parameters() if ".prompts." in name}
    assert len(prompts) == 2
    assert set(new["params"]) == prompts | set(model.head.parameters())
    assert len(old["params"]) == 5
    assert set(new["params"]) | set(old["params"]) == {p for p in model.parameters() if p.requires_grad}
    # A tenth of the steps warms up; then the rates fall, as published.
    rate = clip_training.rates(arguments, 20)
    assert [rate(step) for step in (0, 1, 2, 11, 20)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    arguments.prompts = "none"
    assert clip_training.rates(arguments, 20)(19) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "dcp"], "at most the 2 blocks of the image tower, but got 6"),
        (["--model", "RN50", "--prompts", "map"], "no ResNet, timm or Hugging Face towers"),
        (["--head", "linear", "--scale", 16, "--weight", 0.5], "no --scale or --weight with --head linear"),
        (["--prompts", "cdp"], "invalid choice: 'cdp'"),
    ],
)
def test_wrong_options(tmp_path, shallow, data, monkeypatch, capsys, arguments, message):
    if "RN50" in arguments:
        small = {**TINY["model_cfg"], "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}}
        folder = tmp_path / "resnet"
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps({**TINY, "model_cfg": small}))
        arguments = ["--model", f"local-dir:{folder}", *arguments[2:]]
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--data", data, "--model", shallow, "--output", tmp_path / "run", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["clip_finetune", "--output", "run", *map(str, arguments)])
    return clip_finetune.checked(clip_finetune.options())


def test_presets_set_prompts_and_head(monkeypatch):
    rows = "--data", "data.csv", "--dataset", "food101", "--missing-rate", 0.7
    arguments = parsed(monkeypatch, *rows, "--preset", "DPL_DCP")
    assert (arguments.prompts, arguments.head, arguments.lr, arguments.encoder_lr) == ("dcp", "prototype", 0.01, 0.01)
    arguments = parsed(monkeypatch, *rows, "--preset", "DPL_NoPrompt")
    assert (arguments.prompts, arguments.head) == ("none", "prototype")
    given = "--prompts", "map", "--head", "linear", "--encoder-lr", 1e-4
    arguments = parsed(monkeypatch, *rows, "--preset", "DPL_DCP", *given)
    assert (arguments.prompts, arguments.head, arguments.encoder_lr) == ("map", "linear", 1e-4)
    assert set(presets.PROMPTS) == set(presets.VARIANTS)


def test_a_linear_head_has_no_sub_cases(tmp_path, deep, data, monkeypatch):
    losses, steps, run = [], [], clip_training.run
    monkeypatch.setattr(clip_training, "rates", lambda _, total: lambda step: steps.append((step, total)) or 1.0)

    def remembering(call, batch, arguments, *labels, **options):
        losses.extend([options] if labels else [])
        return run(call, batch, arguments, *labels, **options)

    monkeypatch.setattr(clip_training, "run", remembering)
    for number, options in enumerate(([], ["--head", "linear"])):
        output = tmp_path / str(number)
        arguments = "--data", data, "--model", deep, "--prompts", "map", "--epochs", 1
        finetune(monkeypatch, *arguments, "--output", output, *options)
    assert [options.get("subcase_weight") for options in losses] == [None, 0.0]
    assert set(steps) == {(0, 1), (1, 1)}
