"""PrototypeClassifier: encoders run on the rows that have their modality, and nothing else changes."""

import copy
import pickle
import sys
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from protohead import DecoupledPrototypeHead, PrototypeClassifier, attach

# Most of these heads are scored as they were made, or trained through their logits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This head is in eval mode"),
    pytest.mark.filterwarnings("ignore:This head is trained through its logits"),
]

PRESENT = torch.tensor([[True, True], [True, False], [False, True], [True, True], [False, False], [False, True]])
LABELS = torch.tensor([0, 1, 2, 0, 1, -100])


class Counting(nn.Module):
    """A small encoder that remembers how many rows it was given."""

    def __init__(self, width, out):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, out))
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        return self.layers(x)


class TwoTowers(nn.Module):
    """One module with two methods, as CLIP is, and a parameter that neither uses."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(7, 4)
        self.text = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def encode_image(self, x):
        return self.image(x)

    def encode_text(self, x):
        return self.text(x)


def build(**options):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"image": 5, "text": 4}, 3, **{"cases": "all", **options})
    return PrototypeClassifier({"image": Counting(7, 5), "text": Counting(6, 4)}, head)


def batch():
    torch.manual_seed(1)
    return {"image": torch.randn(6, 7), "text": torch.randn(6, 6)}


def encode_everything(model, inputs, present, labels=None):
    """The slow way: every encoder on every row."""
    features = {name: model.encoders[name](x) for name, x in inputs.items()}
    return model.head(features, present, labels)


def test_is_what_encoding_everything_gives():
    model, inputs = build(), batch()
    logits = model(inputs, PRESENT, LABELS)
    assert model.encoders.image.calls == [3]
    assert model.encoders.text.calls == [4]
    F.cross_entropy(logits, LABELS).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = encode_everything(model, inputs, PRESENT, LABELS)
    F.cross_entropy(expected, LABELS).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)
        assert p.grad.abs().sum() > 0
    assert model.head.seen_cases == ("image+text", "image", "text")
    assert logits[4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_stands_in_missing_rows_is_never_encoded(wrong):
    model, inputs = build(), batch()
    expected = model(inputs, PRESENT, LABELS)
    F.cross_entropy(expected, LABELS).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for m, name in enumerate(model.head.modalities):
        inputs[name][~PRESENT[:, m]] = wrong
    logits = model(inputs, PRESENT, LABELS)
    F.cross_entropy(logits, LABELS).backward()
    assert torch.equal(logits, expected)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


def test_forms_of_input_agree():
    model, inputs = build().eval(), batch()
    expected = model(inputs, PRESENT)
    lists = {
        name: [row if there else None for row, there in zip(x, PRESENT[:, m], strict=True)]
        for m, (name, x) in enumerate(inputs.items())
    }
    zeros = {name: torch.where(PRESENT[:, m, None], x, 0) for m, (name, x) in enumerate(inputs.items())}
    mappings = {name: {"x": x} for name, x in zeros.items()}
    for other in (lists, zeros, mappings):
        assert torch.equal(model(other), expected)
        assert torch.equal(model(other, PRESENT), expected)
    assert torch.equal(model({"text": zeros["text"], "image": tuple(lists["image"])}), expected)


def test_a_mask_may_say_that_zeros_are_present_and_that_values_are_missing():
    model = build().eval()
    inputs = {"image": torch.zeros(2, 7), "text": torch.ones(2, 6)}
    assert not torch.equal(model(inputs, torch.tensor([[True, False]] * 2)), torch.zeros(2, 3))
    assert torch.equal(model({"image": torch.zeros(2, 7)}), torch.zeros(2, 3))
    only = model({"text": torch.ones(2, 6)})
    assert torch.equal(model(inputs, torch.tensor([[False, True]] * 2)), only)


def test_modalities_that_are_not_given():
    model, inputs = build(), batch()
    image = PRESENT & torch.tensor([True, False])
    expected = encode_everything(model, inputs, image, LABELS)
    for text in ({}, {"text": None}, {"text": [None] * 6}, {"text": torch.full((6, 6), float("nan"))}):
        model.zero_grad()
        logits = model({"image": inputs["image"], **text}, image, LABELS)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        F.cross_entropy(logits, LABELS).backward()
        assert all(p.grad is None for p in model.encoders.text.parameters())
    assert model.encoders.text.calls == [6]  # the slow way's


def test_nothing_present_and_no_rows():
    model = build()
    logits = model({"image": torch.ones(3, 7)}, torch.zeros(3, 2, dtype=torch.bool))
    assert torch.equal(logits, torch.zeros(3, 3))
    logits.sum().backward()
    assert model({"image": torch.ones(0, 7), "text": []}).shape == (0, 3)
    assert model.head.seen_cases == ()
    assert model.encoders.image.calls == []


def test_a_row_of_a_mapping_is_missing_where_all_its_tensors_are_zero():
    sums = lambda a, b: torch.stack([a + b, a - b], dim=1)  # noqa: E731
    model = PrototypeClassifier({"image": sums}, DecoupledPrototypeHead({"image": 2}, 3))
    inputs = {"image": {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.tensor([0.0, 0.0, 5.0])}}
    assert model.encode(inputs)["image"].tolist() == [[1, 1], [0, 0], [5, -5]]


def test_lists_in_a_mapping_are_selected_by_row():
    lengths = lambda x, words, flags: x + torch.tensor([[float(len(word))] for word in words])  # noqa: E731
    model = PrototypeClassifier({"text": lengths}, DecoupledPrototypeHead({"text": 1}, 3))
    inputs = {"text": {"x": torch.tensor([[1.0], [0.0], [2.0]]), "words": ["a", "bb", "ccc"], "flags": [1, 2]}}
    assert model.encode(inputs)["text"].tolist() == [[2], [0], [5]]


def test_missing_texts_of_pandas():
    lengths = lambda words: torch.tensor([[float(len(word))] for word in words])  # noqa: E731
    model = PrototypeClassifier({"text": lengths}, DecoupledPrototypeHead({"text": 1}, 3))
    assert model.encode({"text": ["a", float("nan"), "ccc", None]})["text"].tolist() == [[1], [0], [3], [0]]


def test_frozen_from_the_start_without_attach():
    encoder = nn.Sequential(nn.Linear(7, 5), nn.Dropout()).requires_grad_(False)
    head = DecoupledPrototypeHead({"image": 5, "text": 4}, 3)
    model = PrototypeClassifier({"image": encoder, "text": nn.Linear(6, 4)}, head)
    assert [m.training for m in (model, encoder, encoder[1], model.encoders.text)] == [True, False, False, True]


def test_lists_of_anything_reach_the_encoder_as_lists():
    lengths = lambda words: torch.tensor([[len(word), 1.0] for word in words])  # noqa: E731
    head = DecoupledPrototypeHead({"text": 2, "image": 5}, 3)
    model = PrototypeClassifier({"image": Counting(7, 5), "text": lengths}, head).eval()
    features = model.encode({"text": ["a", None, "abc"], "image": torch.ones(3, 7)})
    assert features["text"].tolist() == [[1, 1], [0, 0], [3, 1]]
    assert model({"text": ["a", None, "abc"]}).shape == (3, 3)


def test_pooler_output_and_keyword_arguments():
    class Pooled(nn.Module):
        def forward(self, ids, mask=None, flag=False):
            assert flag == "kept"
            pooled = (ids * mask).float() @ torch.ones(3, 4)
            return type("Out", (), {"pooler_output": pooled, "last_hidden_state": ids})

    head = DecoupledPrototypeHead({"text": 4}, 3)
    model = PrototypeClassifier({"text": Pooled()}, head)
    ids = torch.tensor([[1, 2, 3], [0, 0, 0], [4, 5, 6]])
    features = model.encode({"text": {"ids": ids, "mask": (ids > 0).long(), "flag": "kept"}})
    assert features["text"][:, 0].tolist() == [6, 0, 15]


def test_encode_is_for_caching():
    model, inputs = build().eval(), batch()
    features = model.encode(inputs, PRESENT)
    assert {name: x.shape for name, x in features.items()} == {"image": (6, 5), "text": (6, 4)}
    assert torch.equal(model.head(features, PRESENT), model(inputs, PRESENT))
    assert torch.equal(model.head(features), model(inputs, PRESENT))
    assert (features["image"][~PRESENT[:, 0]] == 0).all()


def test_two_methods_of_one_module():
    towers = TwoTowers()
    head = DecoupledPrototypeHead({"image": 4, "text": 4}, 3, shared_space=True)
    model = PrototypeClassifier({"image": towers.encode_image, "text": towers.encode_text}, head).eval()
    assert list(model.encoders) == ["image+text"]
    assert len(list(model.parameters())) == 5 + 3
    inputs = batch()
    features = {"image": towers.image(inputs["image"]), "text": towers.text(inputs["text"])}
    expected = model.head(features, PRESENT)
    torch.testing.assert_close(model(inputs, PRESENT), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(inputs, PRESENT), expected)
        with torch.no_grad():
            twin.encoders["image+text"].image.weight.zero_()
        assert not torch.equal(twin(inputs, PRESENT), expected)
    torch.testing.assert_close(model(inputs, PRESENT), expected)


def test_a_joint_encoder_gets_all_rows():
    class Joint(nn.Module):
        def forward(self, inputs, present):
            together = inputs["image"][:, :4] + torch.where(present["text"][:, None], inputs["text"][:, :4], 0)
            return {"text": 2 * together, "image": together}

    head = DecoupledPrototypeHead({"text": 4, "image": 4}, 3)  # the order of the head, not of the encoder
    model = PrototypeClassifier(Joint(), head).eval()
    assert list(model.encoders) == ["text+image"]
    inputs, present = batch(), PRESENT[:, [1, 0]]
    features = model.encode(inputs, present)
    assert torch.equal(features["text"], 2 * features["image"])
    assert torch.equal(features["image"][1], inputs["image"][1, :4])
    assert torch.equal(model(inputs, present), model.head(features, present))


def test_frozen_parts_stay_in_eval_mode():
    model = build()
    image, text = model.encoders.image, model.encoders.text
    image.layers.insert(1, nn.Sequential(nn.BatchNorm1d(8), nn.Dropout()))
    text.layers.insert(1, nn.Dropout())
    text.requires_grad_(False)
    text.layers[-1].requires_grad_(True)
    image.layers[1].requires_grad_(False)
    assert model.train() is model
    assert [m.training for m in (model, model.head, image, image.layers[0], image.layers[1])] == [True] * 4 + [False]
    assert not any(m.training for m in image.layers[1].modules())
    assert [m.training for m in text.layers] == [False, True, True, True]  # its own dropout is between trained layers
    before = image.layers[1][0].running_mean.clone()
    model(batch(), PRESENT, LABELS)
    assert torch.equal(image.layers[1][0].running_mean, before)
    text.requires_grad_(False)
    model.train()
    assert not any(m.training for m in text.modules())
    assert not any(m.training for m in model.eval().modules())


def test_half_precision_encoders():
    model, inputs = build(), batch()
    expected = model(inputs, PRESENT)
    model.encoders.to(torch.bfloat16)
    inputs = {name: x.to(torch.bfloat16) for name, x in inputs.items()}
    logits = model(inputs, PRESENT, LABELS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model(inputs, PRESENT), expected, rtol=0.1, atol=0.5)
    assert model.encode(inputs, PRESENT)["text"].dtype == torch.bfloat16
    F.cross_entropy(logits, LABELS).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_autocast():
    model, inputs = build(), batch()
    expected = model(inputs, PRESENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs, PRESENT)
        assert model.encode(inputs, PRESENT)["image"].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.5)
    F.cross_entropy(logits, LABELS).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_float64():
    model = build().double()
    inputs = {name: x.double() for name, x in batch().items()}
    logits = model(inputs, PRESENT)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, encode_everything(model, inputs, PRESENT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, inputs = build(), batch()
    inputs["image"].requires_grad_(True)
    inputs["text"].requires_grad_(True)
    F.cross_entropy(model(inputs, PRESENT, LABELS), LABELS).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for encoder in model.encoders.values():
        inner = encoder.layers.forward
        encoder.layers.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
    F.cross_entropy(model(inputs, PRESENT, LABELS), LABELS).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def trained(path=None):
    model = build(margin=0.3, scale=9.0)
    model.encoders.text.requires_grad_(False)
    model.encoders.image.layers[0].requires_grad_(False)
    model.train()
    model(batch(), PRESENT & torch.tensor([True, False]), LABELS)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn_like(p))
    if path is not None:
        model.save(path)
    return model.eval()


def test_save_and_load(tmp_path):
    from safetensors import safe_open

    model = trained(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = sorted(file.keys())
    assert [name for name in names if name.startswith("encoders")] == [
        "encoders.image.layers.2.bias",
        "encoders.image.layers.2.weight",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    other = build()
    other.load(tmp_path / "model.safetensors")
    assert other.head.seen_cases == ("image",)
    assert torch.equal(other.eval()(batch(), PRESENT), model(batch(), PRESENT))
    assert other.head.margin.tolist() == [0.3] * 3


def test_running_statistics_of_trained_norms_are_kept(tmp_path):
    def with_norms():
        model = build()
        for name in ("image", "text"):
            model.encoders[name].layers.insert(1, nn.BatchNorm1d(8))
        model.encoders.text.requires_grad_(False)
        return model.train()

    model = with_norms()
    for _ in range(3):
        model(batch(), PRESENT)
    model.save(tmp_path / "a")
    other = with_norms()
    other.load(tmp_path / "a")
    assert torch.equal(other.eval()(batch(), PRESENT), model.eval()(batch(), PRESENT))
    assert model.encoders.image.layers[1].num_batches_tracked == 3
    assert model.encoders.text.layers[1].num_batches_tracked == 0


def test_a_file_that_lacks_what_was_trained(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    trained(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name in ("encoders.image.layers.2.weight", "head.seen"):
        save_file({key: value for key, value in state.items() if key != name}, tmp_path / "b", metadata)
        with pytest.raises(ValueError, match=f"lacks '{name}'"):
            build().load(tmp_path / "b")


def test_running_statistics_of_frozen_norms_tell_another_backbone(tmp_path):
    def with_norm(mean):
        model = build()
        model.encoders.text.layers.insert(1, nn.BatchNorm1d(8))
        model.encoders.text.layers[1].running_mean.fill_(mean)
        model.encoders.text.requires_grad_(False)
        return model.train()

    with_norm(1.0).save(tmp_path / "a")
    with_norm(1.0).load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"others: 'encoders\.text\.layers\.1\.running_mean'"):
        with_norm(2.0).load(tmp_path / "a")


def test_unused_memory_is_no_other_backbone(tmp_path):
    model = build()
    model.encoders.text.unused = nn.Parameter(torch.full((3,), float("nan")), requires_grad=False)
    model.save(tmp_path / "a")
    model.load(tmp_path / "a")


def test_load_into_a_backbone_that_was_cast(tmp_path):
    trained(tmp_path / "a")
    other = build()
    other.encoders.to(torch.bfloat16)
    other.load(tmp_path / "a")
    assert other.encoders.image.layers[2].weight.dtype == torch.bfloat16


def other_weights(model):
    with torch.no_grad():
        model.encoders.text.layers[0].weight.view(-1)[1:] *= 1.1


def other_classes(model):
    model.head.reset(4)


def other_head(model):
    model.head = DecoupledPrototypeHead({"image": 5, "text": 4}, 3, cases="shared")


def swapped_head(model):
    model.head = DecoupledPrototypeHead({"text": 4, "image": 5}, 3, cases="all")


def other_encoder(model):
    model.encoders.image.layers = nn.Sequential(nn.Linear(7, 5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (other_weights, r"frozen weights .* 1 of 6 are others: 'encoders.text.layers.0.weight'"),
        (other_classes, r"'head.bias' of shape \(4,\), but got \(3,\)"),
        (other_head, r"cases=\['image\+text'\], but got one with \['image\+text', 'image', 'text'\]"),
        (swapped_head, r"cases=\['text\+image'"),
        (other_encoder, r"also holds 'encoders.image.layers.2.bias'"),
    ],
)
def test_another_models_file_is_refused(tmp_path, change, match):
    trained(tmp_path / "a")
    other = build()
    change(other)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=match):
        other.load(tmp_path / "a")
    torch.testing.assert_close(dict(other.state_dict()), dict(before), rtol=0, atol=0)


def test_files_that_save_did_not_write(tmp_path):
    from safetensors.torch import save_file

    model = build()
    (tmp_path / "text").write_text("not safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        model.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="Expected a folder that exists"):
        model.save(tmp_path / "none" / "file")
    with pytest.raises(ValueError, match="cannot be read"):
        model.load(tmp_path / "text")
    with pytest.raises(ValueError, match="another safetensors file"):
        model.load(tmp_path / "other")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = trained(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == content


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoders", "error", "match"),
    [
        ({"image": nn.Identity()}, ValueError, r"\('image', 'text'\), but got \('image',\)"),
        ({"image": nn.Identity(), "text": nn.Identity(), "audio": nn.Identity()}, ValueError, "'audio'"),
        ({"image": nn.Identity(), "text": 3}, TypeError, "module or function as the encoder of 'text', but got 3"),
        ({"image": nn.Identity(), "text": nn.Linear}, TypeError, "encoder of 'text', but got <class"),
        (None, TypeError, "module or function as the encoder of 'image', but got None"),
        ({"image": nn.Identity(), "text": MethodType(lambda self, x: x, nn.Identity())}, ValueError, "own '<lambda>'"),
    ],
)
def test_wrong_encoders(encoders, error, match):
    with pytest.raises(error, match=match):
        PrototypeClassifier(encoders, DecoupledPrototypeHead({"image": 5, "text": 4}, 3))


IMAGE, TEXT = torch.ones(2, 7), torch.ones(2, 6)
BOTH = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("inputs", "present", "error", "match"),
    [
        (IMAGE, None, TypeError, "map modalities to inputs, but got torch.float32"),
        ({"pixel_values": IMAGE}, None, ValueError, r"\('image', 'text'\), but got others: \['pixel_values'\]"),
        ({}, None, ValueError, "one batch size, but got none"),
        ({"image": IMAGE, "text": TEXT[:1]}, None, ValueError, "'image': 2, 'text': 1"),
        ({"image": IMAGE}, BOTH[:1], ValueError, "'image': 2, 'present': 1"),
        ({"image": IMAGE}, BOTH, ValueError, "'text', which `present` says that row 0 has; got none"),
        ({"image": IMAGE, "text": [TEXT[0], None]}, BOTH, ValueError, "'text', which .* row 1 has; got none"),
        (
            {"image": IMAGE, "text": TEXT},
            BOTH.long(),
            TypeError,
            "bool tensor, or columns by name, but got torch.int64",
        ),
        ({"image": IMAGE, "text": TEXT}, BOTH[:, :1], ValueError, r"\(B, 2\)"),
        ({"image": IMAGE, "text": "ab"}, None, TypeError, "'text' to be a tensor, .*, but got str"),
        ({"image": IMAGE, "text": {}}, None, TypeError, "but got dict"),
        ({"image": torch.tensor(1.0)}, None, TypeError, "one row a sample"),
        ({"text": {"a": TEXT, "b": TEXT[:1]}}, None, ValueError, r"'a': \(2, 6\), 'b': \(1, 6\)"),
    ],
)
def test_wrong_inputs(inputs, present, error, match):
    model = build()
    for call in (model, model.encode):
        with pytest.raises(error, match=match):
            call(inputs, present)
    assert model.head.seen_cases == ()


@pytest.mark.parametrize(
    ("encoder", "match"),
    [
        (lambda x: x[:1, :4], r"'text' to return \(2, D\) .*, but got torch.float32 \(1, 4\)"),
        (lambda x: x[:, :3], r"'text' to return 4 features a row, but got \(3,\)"),
        (lambda x: x[:, None, :4], r"\(2, 1, 4\)"),
        (lambda x: x.long(), "torch.int64"),
        (lambda x: [x], "but got list"),
    ],
)
def test_wrong_features(encoder, match):
    head = DecoupledPrototypeHead({"image": 7, "text": 4}, 3)
    model = PrototypeClassifier({"image": nn.Identity(), "text": encoder}, head)
    with pytest.raises(ValueError, match=match):
        model({"image": IMAGE, "text": TEXT})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_an_error_in_an_encoder_tells_which():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        build()({"image": torch.ones(3, 9)}, torch.tensor([[True, False], [False, False], [True, False]]))
    assert caught.value.__notes__ == ["This was the encoder of 'image', given the 2 rows that have it."]


def test_wrong_joint_features():
    head = DecoupledPrototypeHead({"image": 7, "text": 6}, 3)
    for encoder, match in (
        (lambda inputs, present: inputs["image"], r"features of \('image', 'text'\), but got Tensor"),
        (lambda inputs, present: {"image": inputs["image"]}, r"but got \('image',\)"),
        (lambda inputs, present: {**inputs, "text": inputs["image"]}, "'text' to return 6 features a row, but got"),
    ):
        with pytest.raises(ValueError, match=match):
            PrototypeClassifier(encoder, head)({"image": IMAGE, "text": TEXT})


def test_loss_is_that_of_the_head_on_the_features():
    options = {"prototype_weight": 0.3, "class_weight": torch.tensor([1.0, 2.0, 3.0])}
    a, b, inputs = build(), build(), batch()
    torch.manual_seed(2)
    got = a.loss(inputs, PRESENT, LABELS, **options)
    torch.manual_seed(2)
    torch.testing.assert_close(got, b.head.loss(b.encode(inputs, PRESENT), PRESENT, LABELS, **options))
    torch.testing.assert_close(a.head.center, b.head.center)
    with pytest.raises(ValueError, match="'weight'"):
        a.loss(inputs, PRESENT, LABELS, weight=0.3)


def test_inputs_that_contradict_the_mask():
    model = build()
    present = torch.tensor([[True, True], [True, False], [False, True]] * 4)
    inputs = {"image": torch.randn(12, 7), "text": torch.randn(12, 6)}
    padded = {name: torch.where(present[:, m, None], x, 0) for m, (name, x) in enumerate(inputs.items())}
    for wrong in (~present, present.flip(1)):
        with pytest.raises(ValueError, match="inverted, or its columns are swapped"):
            model(padded, wrong)
        assert model.encoders.image.calls == []
        model(inputs, wrong)  # What stands in missing rows does not matter.
        model.encoders.image.calls.clear()
    model(padded, present)


def test_present_by_name():
    model, inputs = build().eval(), batch()
    columns = {"text": PRESENT[:, 1], "image": PRESENT[:, 0].tolist()}
    assert torch.equal(model(inputs, columns), model(inputs, PRESENT))
    for name, x in model.encode(inputs, columns).items():
        assert torch.equal(x, model.encode(inputs, PRESENT)[name])


def test_a_module_dict_is_a_mapping_of_encoders():
    encoders = nn.ModuleDict({"image": nn.Linear(7, 5), "text": nn.Linear(6, 4)})
    model = PrototypeClassifier(encoders, DecoupledPrototypeHead({"image": 5, "text": 4}, 3))
    assert model(batch(), PRESENT).shape == (6, 3)
    assert set(attach(encoders, 3, in_features={"image": 5, "text": 4}).encoders) == {"image", "text"}
