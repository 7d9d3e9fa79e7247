"""attach(extra=...): encoders of one's own beside a model's towers; and inputs that nobody has prepared."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from protohead import PrototypeClassifier, attach, load_head
from protohead.raw import raw_hint

WIDE = 64


def tiny_clip():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "width": 64, "heads": 4, "layers": 1}
    return open_clip.CLIP(embed_dim=WIDE, vision_cfg=vision, text_cfg=text)


def mlp(width=5):
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, width))


def inputs_of(rows=4):
    pixels, tokens = torch.randn(rows, 3, 32, 32), torch.randint(1, 400, (rows, 8))
    return {"image": pixels, "text": tokens, "tabular": torch.randn(rows, 9)}


PRESENT = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]]).bool()
LABELS = torch.tensor([0, 1, 2, 3])


# -- what attach makes ------------------------------------------------------------------------------------------------


def test_a_table_beside_clip(tmp_path):
    clip, encoder = tiny_clip(), mlp()
    model = attach(clip, 12, extra={"tabular": encoder})
    assert model.head.in_features == {"image": WIDE, "text": WIDE, "tabular": 5}
    assert model.head.modalities == ("image", "text", "tabular")
    assert not any(p.requires_grad for p in clip.parameters())
    assert all(p.requires_grad for p in encoder.parameters())
    assert model.encoders["tabular"] is encoder
    assert (encoder.training, clip.training) == (True, False)

    inputs, before = inputs_of(), copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss = model.loss(inputs, PRESENT, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval()(inputs, PRESENT).argmax(1).tolist() == LABELS.tolist()
    assert all(not torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
    model.save(tmp_path / "model.safetensors")
    other = attach(tiny_clip(), 12, extra={"tabular": mlp()})
    other.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(other.eval()(inputs, PRESENT), model(inputs, PRESENT))
    assert load_head(tmp_path / "model.safetensors").modalities == model.head.modalities


def test_cached_features_train_the_encoder_beside_them():
    model, inputs = attach(tiny_clip(), 12, extra={"tabular": mlp()}), inputs_of()
    with torch.no_grad():
        features = model.encode(inputs, PRESENT)
    cached = {"image": nn.Identity(), "text": nn.Identity(), "tabular": model.encoders["tabular"]}
    fast = PrototypeClassifier(cached, model.head)
    features["tabular"] = inputs["tabular"]
    fast.loss(features, PRESENT, LABELS).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoders["tabular"].parameters())
    torch.testing.assert_close(fast.eval()(features, PRESENT), model.eval()(inputs, PRESENT))


@pytest.mark.parametrize("first", [nn.Linear(9, 4), nn.BatchNorm1d(9), nn.LayerNorm(9)])
def test_widths_are_found_on_a_row_of_zeros(first):
    encoder = nn.Sequential(nn.Sequential(first), nn.LazyLinear(3) if first is None else nn.Flatten())
    before = copy.deepcopy(encoder.state_dict())
    width = attach(tiny_clip(), 5, extra={"tabular": encoder}).head.in_features["tabular"]
    assert width == (4 if isinstance(first, nn.Linear) else 9)
    torch.testing.assert_close(encoder.state_dict(), before)


def test_widths_are_found_on_an_example_or_given():
    words = nn.EmbeddingBag(100, 6)
    rows = torch.ones(3, 2, dtype=torch.long)
    assert attach(tiny_clip(), 5, extra={"tags": words}, example={"tags": rows}).head.in_features["tags"] == 6
    widths = {"tags": 6, "text": WIDE, "image": WIDE}
    assert attach(tiny_clip(), 5, extra={"tags": words}, in_features=widths).head.modalities == tuple(widths)
    opaque = nn.Sequential(nn.Linear(9, 4), nn.Linear(5, 6))  # It cannot be tried on nine zeros.
    assert attach(tiny_clip(), 5, extra={"tags": opaque}, in_features=widths).head.in_features == widths
    everything = {"image": torch.zeros(2, 3, 32, 32), "text": torch.ones(2, 8, dtype=torch.long), "tags": rows[:2]}
    assert attach(tiny_clip(), 5, extra={"tags": words}, example=everything).head.in_features["tags"] == 6
    half = attach(tiny_clip(), 5, extra={"tabular": mlp().half()})
    assert half.head.in_features["tabular"] == 5
    two = attach(tiny_clip(), 5, extra=nn.ModuleDict({"a": mlp(3), "b": mlp(4)}))
    assert two.head.in_features == {"image": WIDE, "text": WIDE, "a": 3, "b": 4}
    function = attach(tiny_clip(), 5, extra={"numbers": lambda x: x}, example={"numbers": torch.ones(1, 9)})
    assert function.head.in_features["numbers"] == 9


def test_another_space_is_not_taken_for_clips():
    assert attach(tiny_clip(), 5).head.shared_space
    assert not attach(tiny_clip(), 5, extra={"tabular": mlp(WIDE)}).head.shared_space
    assert attach(tiny_clip(), 5, extra={"tabular": mlp(WIDE)}, shared_space=True).head.shared_space


def test_what_is_frozen_stays_frozen():
    encoder = mlp().requires_grad_(False)
    clip = tiny_clip()
    model = attach(clip, 5, extra={"tabular": encoder}, trainable="visual.proj")
    assert [name for name, p in clip.named_parameters() if p.requires_grad] == ["visual.proj"]
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not model.encoders["tabular"].training
    plain = {"image": nn.Linear(8, 4)}
    model = attach(plain, 5, in_features={"image": 4, "tabular": 5}, extra={"tabular": mlp()})
    assert model.head.modalities == ("image", "tabular")
    assert not plain["image"].weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"extra": {"text": mlp()}}, ValueError, r"other modalities than \('image', 'text'\), but got \['text'\]"),
        ({"extra": mlp()}, TypeError, "`extra` to map modalities to encoders, but got Sequential"),
        ({"extra": {"tags": nn.EmbeddingBag(9, 6)}}, ValueError, r"`example=\{'tags': ...\}`, a row for its encoder"),
        (
            {"extra": {"a": nn.Sequential(nn.Linear(9, 4), nn.Linear(5, 4))}},
            ValueError,
            r"`example=\{'a': .*4x5|shapes",
        ),
        (
            {"extra": {"a": mlp()}, "in_features": {"a": 6, "image": 64, "text": 64}},
            ValueError,
            "'a' to be 5, but got 6",
        ),
        (
            {"extra": {"a": mlp()}, "in_features": {"image": 64, "text": 64}},
            ValueError,
            "`in_features` of .*'a'.*, but",
        ),
        ({"extra": {"a": mlp()}, "example": {"a": torch.ones(1, 3)}}, RuntimeError, "shapes cannot be multiplied"),
        ({"extra": {"a": mlp()}, "trainable": "a.*"}, ValueError, "'a.*' matches none"),
    ],
)
def test_extra_encoders_that_do_not_fit(options, error, match):
    clip = tiny_clip()
    with pytest.raises(error, match=match):
        attach(clip, 5, **options)
    assert all(p.requires_grad for p in clip.parameters())


# -- inputs that nobody has prepared ----------------------------------------------------------------------------------

PICTURE = Image.new("RGB", (32, 32))
TEXTS, TOKENS = ["a red fox", "two maps"], [[3, 4, 5], [3, 4]]
TOKENISE = r"but got .*: tokenise them first, as in inputs\['text'\] = tokenizer\(texts\), with open_clip.get_token"
PREPROCESS = r"but got .*: preprocess them first, as in inputs\['image'\] = torch.stack\(\[preprocess\("


@pytest.mark.parametrize(
    ("name", "rows", "match"),
    [
        ("text", TEXTS, TOKENISE),
        ("text", ["a red fox", None], TOKENISE),
        ("text", tuple(TEXTS), TOKENISE),
        ("text", "a red fox", TOKENISE),
        ("text", np.array(TEXTS), TOKENISE),
        ("text", np.array(TEXTS, dtype=object), TOKENISE),
        ("text", TOKENS, "but got lists of numbers: tokenise them first"),
        ("image", [PICTURE, PICTURE], PREPROCESS),
        ("image", [None, PICTURE], PREPROCESS),
        ("image", PICTURE, PREPROCESS),
        ("image", [np.zeros((32, 32, 3), np.uint8)] * 2, PREPROCESS),
        ("image", np.zeros((2, 3, 32, 32), np.float32), r"but got .*: torch.as_tensor\(array\) makes a tensor"),
        ("image", ["a.png", "b.png"], "but got names of files: open and preprocess them first"),
    ],
)
def test_raw_inputs_say_what_prepares_them(name, rows, match):
    model = attach(tiny_clip(), 5).eval()
    other, good = ("image", inputs_of(2)["image"]) if name == "text" else ("text", inputs_of(2)["text"])
    for inputs in ({name: rows}, {name: rows, other: good}):
        with pytest.raises(TypeError, match=match):
            model(inputs)


def test_raw_inputs_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config={**tower, "vocab_size": 200}, vision_config=vision, projection_dim=8)
    model = attach(transformers.CLIPModel(config), 5).eval()
    with pytest.raises(TypeError, match=TOKENISE):
        model({"text": TEXTS})
    with pytest.raises(TypeError, match=PREPROCESS):
        model({"image": [PICTURE, PICTURE]})
    vilt = transformers.ViltConfig(**tower, vocab_size=200, image_size=32, patch_size=16)
    model = attach(transformers.ViltModel(vilt), 5).eval()
    with pytest.raises(TypeError, match=TOKENISE):
        model({"text": TEXTS, "image": torch.zeros(2, 3, 32, 32)})


def test_series_of_texts():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=TOKENISE):
        attach(tiny_clip(), 5)({"text": pandas.Series([None, "a red fox"])})


def test_encoders_that_take_texts_are_given_them():
    taken = []

    def encode(texts):
        taken.extend(texts)
        return torch.ones(len(texts), 3)

    model = attach({"text": encode}, 2, in_features={"text": 3})
    assert model.encode({"text": [TEXTS[0], None, TEXTS[1]]})["text"].sum(1).tolist() == [3, 0, 3]
    assert taken == TEXTS

    def fail(texts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attach({"text": fail}, 2, in_features={"text": 3}).encode({"text": TEXTS})


def test_other_errors_stay_as_they_are():
    model = attach(tiny_clip(), 5)
    with pytest.raises(RuntimeError):
        model({"image": torch.zeros(2, 5, 32, 32), "text": inputs_of(2)["text"]}, PRESENT[:2, :2])
    assert raw_hint("text", inputs_of()["text"]) == raw_hint("text", [None, None]) == raw_hint("text", []) == ""
    assert raw_hint("text", [object()]) == ""
